"""The functional forms and whole networks on every backend, against the reference modules.

In this folder, because the Triton backend runs in the interpreter here.
"""

import collections

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests import straight_line
from tests.extension_cases import require
from tests.tiny import FIRST, TINY
from vovnet_fast import VoVNet, backends, ops, reference
from vovnet_fast.compat import zip
from vovnet_fast.network.blocks import OSABlock
from vovnet_fast.ops import _checks
from vovnet_fast.ops.features import run as run_network

CPU = torch.device("cpu")

BACKENDS = ["reference", "cpu", "triton"]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("CPU tensors, for the interpreter; test_device.py has networks on the GPU")
    if request.param == "cpu":
        require("cpu")
    with backends.use_backend(request.param):
        yield request.param


def network(spec, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return straight_line.randomise(VoVNet(spec, **options)).to(dtype).eval()


def eager(module, *args):
    with backends.use_backend("reference"), torch.no_grad():
        return module(*args)


def assert_close(got, expected, tolerance=1e-11):
    scale = expected.abs().max().clamp_min(1e-30)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale.item())


def fold(conv, norm, **options):
    return ops.fold(
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        stride=conv.stride[0],
        **options,
    )


@torch.no_grad()
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 5)])
def test_conv_bn_relu(kernel, stride, size):
    conv = nn.Conv2d(5, 12, kernel, stride, kernel // 2).double()
    layer = straight_line.randomise(nn.Sequential(conv, nn.BatchNorm2d(12)).double()).eval()
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    got = ops.conv_bn_relu(x, fold(*layer))
    assert_close(got, layer(x).relu())
    assert got.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["ceil", "padded"])
@pytest.mark.parametrize("size", [(2, 2), (5, 8), (7, 3)])
def test_max_pool(mode, size):
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    x[0, 0, 0, 0] = float("nan")
    expected = reference.max_pool(x, mode)
    torch.testing.assert_close(ops.max_pool(x, mode), expected, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hard_sigmoid", "sigmoid"])
@pytest.mark.parametrize("identity", [False, True])
def test_ese(kind, identity):
    x, y = torch.randn(2, 2, 12, 5, 7, dtype=torch.float64)
    weight, bias = torch.randn(12, 12).double(), torch.randn(12).double()
    expected = reference.ese(x, weight[:, :, None, None], bias, kind) + (y if identity else 0)
    assert_close(ops.ese(x, weight, bias, kind, y if identity else None), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", list(TINY))
def test_osa_blocks(name):
    """Every block of every dialect, fed strided and sliced inputs."""
    model = network(TINY[name])
    for block in (m for m in model.modules() if isinstance(m, OSABlock)):
        wide = torch.randn(2, block.plan.in_channels + 3, 6, 9, dtype=torch.float64)
        wide = wide.to(memory_format=torch.channels_last)
        for x in (wide[:, 1:-2, 1:, :-1], wide.contiguous()[:, 3:]):
            assert_close(ops.osa_block(x, block.fold(x.dtype)), eager(block, x))


@torch.no_grad()
@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize(
    "out_features",
    [("stage2", "stage3", "stage4", "stage5"), ("stem_2", "stem", "stage3"), ("stem_2",)],
)
def test_networks(name, out_features):
    model = network(TINY[name], out_features=out_features)
    x = torch.randn(2, 3, 37, 45, dtype=torch.float64)
    got = ops.features(x, model.fold(x.dtype), out_features)
    for a, b in zip(got, eager(model, x), strict=True):
        assert_close(a, b)
    storages = {a.untyped_storage().data_ptr() for a in got}
    assert len(storages) == len(got)
    assert all(a.untyped_storage().nbytes() == a.numel() * a.itemsize for a in got)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_no_worse_than_eager(dtype):
    """Error against fp64 at most twice that of eager in the same dtype."""
    exact = network(TINY["detectron2"])
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    expected = eager(exact, x)
    model = network(TINY["detectron2"]).to(dtype)
    in_eager = eager(model, x.to(dtype))
    got = ops.features(x.to(dtype), model.fold(dtype), model.out_features)
    for ours, theirs, right in zip(got, in_eager, expected, strict=True):
        assert ours.dtype == dtype
        error, allowed = ((f.double() - right).norm() for f in (ours, theirs))
        assert error <= 2 * allowed


def test_model_runs_on_the_backend_that_was_chosen(backend):
    model, x = network(TINY["detectron2"]), torch.randn(1, 3, 40, 40, dtype=torch.float64)
    ran = []
    model.stage3.register_forward_hook(lambda *_: ran.append(1)).remove()
    with torch.no_grad():
        for a, b in zip(model(x), eager(model, x), strict=True):
            assert_close(a, b)
    with torch.inference_mode():
        assert len(model(x)) == 4
    if backend == "reference":
        return
    model.requires_grad_(False)
    handle = model.stage3.register_forward_hook(lambda *_: ran.append(1))
    model(x)
    assert ran == [1]
    handle.remove()
    handle = model.stage3.OSA3_1.concat.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(backends.BackendError, match="concat: it has hooks"):
        model(x)
    handle.remove()
    group = VoVNet(TINY["detectron2"], norm_cfg=dict(type="GN", num_groups=4)).double()
    with torch.no_grad(), pytest.raises(backends.BackendError, match="not GroupNorm"):
        group(x)


def test_autocast():
    model, x = network(TINY["detectron2"], torch.float32), torch.randn(1, 3, 40, 40)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x)
    assert all(f.dtype == torch.bfloat16 for f in got)
    for a, b in zip(got, eager(model, x), strict=True):
        assert_close(a.float(), b, 0.1)


@torch.no_grad()
def test_empty_batch():
    model = network(TINY["seed"])
    x = torch.empty(0, 3, 40, 40, dtype=torch.float64)
    assert [f.shape for f in model(x)] == [f.shape for f in eager(model, x)]


@pytest.mark.parametrize("name", list(TINY))
def test_gradients_of_an_empty_batch(name):
    """What autograd makes of nothing has any strides, and contiguous() leaves them."""
    model = network(TINY[name])
    sum((f * f).sum() for f in model(torch.empty(0, 3, 40, 40, dtype=torch.float64))).backward()
    assert not any(p.grad.any() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    ("backend", "name"),
    [*(("cpu", name) for name in TINY), ("triton", "depthwise")],
    indirect=["backend"],
)
def test_compiles_without_a_graph_break(name):
    """One op, whatever runs it. As plain modules: tests/network/test_modes.py."""
    torch._dynamo.reset()  # A process may compile so many variants of forward only.
    model = network(TINY[name], out_features=FIRST)
    x = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x), eager(model, x), strict=True):
        assert_close(a, b)


class Recorder(TorchDispatchMode):
    """Counts what reaches the device, and the bytes of new memory."""

    def __init__(self):
        super().__init__()
        self.ops, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        self.ops.append(name)
        if name.startswith(("new_empty", "empty")):
            self.bytes += out.numel() * out.itemsize
        return out


@torch.no_grad()
def test_nothing_is_concatenated_or_passed_over_twice(backend, monkeypatch):
    """Ops of PyTorch on the fused path allocate and make views; kernels do all the work.

    Kernels are only counted here: the interpreter itself copies tensors about.
    """
    if backend != "triton":
        pytest.skip("PyTorch's ops, or oneDNN's, are among what it is made of")
    model, x = network(TINY["detectron2"]), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    params = model.to(memory_format=torch.channels_last).fold(x.dtype)
    view = x.permute(0, 2, 3, 1).contiguous()
    launched = []
    monkeypatch.setattr(
        "vovnet_fast.kernels._common.Launch.run",
        lambda launch, _: launched.append(launch.kernel.fn.__name__),
    )
    with Recorder() as record:
        run_network(backends.get(x.device, x.dtype, ()), view, params, model.out_features)
    assert set(record.ops) <= {"new_empty", "empty_like", "slice", "as_strided", "view", "alias"}
    blocks = list(model.spec.blocks())
    assert collections.Counter(launched) == {
        "conv_pointer_kernel": 3 + sum(plan.num_layers + 1 for plan in blocks),
        "finish_pool_kernel": len(blocks),
        "fc_gate_kernel": len(blocks),
        "apply_kernel": len(blocks),
        "max_pool_kernel": 3,
    }
    size, expected = 64 * 64 // 4, 64 * 64 // 4 * 8 * 2 * 8  # Stem layers 1 and 2, 8 channels.
    for plan in model.spec.blocks():
        side = {2: 16, 3: 8, 4: 4, 5: 2}[plan.stage]
        size = side * side * 8
        outputs = 1 if plan.index == model.spec.blocks_per_stage[plan.stage - 2] else 0
        expected += size * (plan.concat_channels + plan.out_channels * (1 + outputs))
    activations = record.bytes
    assert expected <= activations <= 1.1 * expected  # The rest are pool partials and gates.


def test_custom_ops_pass_torchs_own_checks(backend, monkeypatch):
    """Schemas, fakes and aliasing."""
    if backend == "triton":
        pytest.skip("what is checked does not depend on the backend")
    model = network(TINY["depthwise"]).requires_grad_(False)
    x = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    calls = []
    monkeypatch.setattr(_checks, "traced", lambda x: True)

    class Catch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "vovnet_fast":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    params = model.fold(x.dtype)
    with Catch():
        ops.features(x, params, model.out_features)
        y = torch.randn(1, 8, 6, 5, dtype=torch.float64)
        ops.osa_block(y, params.blocks[0])
        ops.conv_bn_relu(x, params.stem[0])
        ops.max_pool(y)
        ops.ese(y, torch.randn(8, 8), torch.randn(8))
    assert {str(f) for f, _ in calls} == {
        f"vovnet_fast.{name}.default"
        for name in ("features", "osa_block", "conv_chain", "max_pool", "ese")
    }
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for func, args in calls:
        torch.library.opcheck(func, args, test_utils=utils)


def test_what_features_cannot_do_is_refused():
    model = network(TINY["detectron2"])
    x = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="keeps nothing for a backward pass"):
        ops.features(x, model.fold(x.dtype), model.out_features)
    params = model.fold(x.dtype)
    params = params._replace(stem=tuple(layer._replace(eps=1e-5) for layer in params.stem))
    with torch.no_grad(), pytest.raises(NotImplementedError, match="fixed statistics only"):
        ops.features(x, params, model.out_features)
    model.norm_eval = False
    with pytest.raises(
        backends.BackendError, match="stem_1: norms of it and after are in training mode"
    ):
        model.train().fold(x.dtype)


@torch.no_grad()
def test_bad_arguments_are_refused():
    model = network(TINY["detectron2"])
    params, x = model.fold(torch.float64), torch.randn(1, 3, 40, 40, dtype=torch.float64)
    block = params.blocks[1]
    y = torch.randn(1, block.in_channels, 5, 5, dtype=torch.float64)
    conv = params.stem[0]
    for call, error, message in (
        (lambda: ops.conv_bn_relu(x[0], conv), ValueError, r"x must be \[N, C, H, W\]"),
        (lambda: ops.conv_bn_relu(x.long(), conv), TypeError, "float16, bfloat16"),
        (lambda: ops.conv_bn_relu(x.float(), conv), TypeError, "fold for x.dtype"),
        (lambda: ops.conv_bn_relu(x[:, :2], conv), ValueError, "must have 3 channels"),
        (
            lambda: ops.conv_bn_relu(x, conv._replace(shift=conv.shift[1:])),
            ValueError,
            r"shift must have shape \[8\]",
        ),
        (lambda: ops.conv_bn_relu(x, conv._replace(stride=3)), ValueError, "stride must be 1 or 2"),
        (lambda: ops.max_pool(x, "floor"), ValueError, "mode must be ceil or padded"),
        (lambda: ops.max_pool(x[:, :, :1]), ValueError, "at least 2x2"),
        (lambda: ops.ese(y, y[0, 0], y[0, 0, 0]), ValueError, "fc weight must have shape"),
        (lambda: ops.osa_block(x, block), ValueError, "must have 16 channels"),
        (lambda: ops.osa_block(y, block._replace(identity=True)), ValueError, "C_in == C_out"),
        (lambda: ops.osa_block(y, block._replace(fc_bias=None)), ValueError, "give both"),
        (lambda: ops.features(x, params, ("stage3", "stage2")), ValueError, "in this order"),
        (lambda: ops.features(x, params, ()), ValueError, "one or more"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_choosing_a_backend(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("on a GPU, Triton does not take CPU tensors")
    found = backends.available_backends()
    assert list(found) == list(backends.NAMES)
    assert (found["reference"], found["triton"]) == (None, None)
    with (
        pytest.raises(ValueError, match="unknown backend 'cuda13'"),
        backends.use_backend("cuda13"),
    ):
        pass
    with backends.use_backend("auto"):
        assert backends.select(CPU, torch.float64, ("conv",)) == "reference"
        with backends.use_backend("triton"):
            assert backends.select(CPU, torch.float64, ("conv",)) == "triton"
        assert backends.chosen() == "auto"
    monkeypatch.setattr(backends._choice, "name", None)
    monkeypatch.setenv("VOVNET_FAST_BACKEND", "triton")
    assert backends.select(CPU, torch.float64, ("conv",)) == "triton"
    monkeypatch.setenv("VOVNET_FAST_BACKEND", "tritn")
    with pytest.raises(ValueError, match="'tritn': choose one of auto, reference, cpu, triton"):
        backends.select(CPU, torch.float64, ("conv",))
