"""What only a GPU can show: whole networks compiled, streams, graphs, devices, huge tensors."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests import straight_line
from tests.tiny import TINY
from vovnet_fast import VoVNet, backends, ops, specs, tuning
from vovnet_fast.backends import reference
from vovnet_fast.backends import triton as backend
from vovnet_fast.backends.triton.choosing import load_kernels
from vovnet_fast.compat import zip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TOLERANCE = dict(rtol=4e-3, atol=4e-3)
"""For one layer in fp16 against fp64."""


@pytest.fixture(autouse=True)
def _static_choices(monkeypatch, tmp_path):
    """The same engine in every call, so that results can be compared bit for bit."""
    monkeypatch.setenv(tuning.CACHE_ENVIRONMENT, str(tmp_path))
    monkeypatch.setenv(tuning.ENVIRONMENT, "0")
    tuning._table.cache_clear()
    with backends.use_backend("triton"), torch.no_grad():
        yield
    tuning._table.cache_clear()


def network(name, dtype, device="cuda"):
    torch.manual_seed(0)
    return straight_line.randomise(VoVNet(TINY[name])).to(device, dtype).eval()


def image(dtype, side=64, device="cuda"):
    return torch.randn(2, 3, side, side + 32, device=device, dtype=dtype)


def features(model, x):
    return ops.features(x, model.fold(x.dtype), model.out_features)


# --------------------------------------------------------------------------------------
# Whole networks
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", list(TINY))
def test_features_are_no_worse_than_eager(name, dtype):
    """Error against fp64 at most twice that of eager in the same dtype."""
    model, x = network(name, torch.float32), image(dtype)
    found = ops.features(x, model.fold(dtype), model.out_features)
    with backends.use_backend("reference"):
        exact = copy.deepcopy(model).double()(x.double())
        in_eager = copy.deepcopy(model).to(dtype)(x)
    for ours, theirs, right in zip(found, in_eager, exact, strict=True):
        assert ours.dtype == dtype
        error, allowed = ((f.double() - right).norm() for f in (ours, theirs))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * right.norm()


# --------------------------------------------------------------------------------------
# Streams, graphs, devices
# --------------------------------------------------------------------------------------


def test_kernels_follow_the_current_stream():
    """The image is written late, on a side stream: who runs on another one reads zeros."""
    model, values = network("detectron2", torch.float16), image(torch.float16)
    expected = features(model, values)
    params = model.fold(torch.float16)
    x = torch.zeros_like(values)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # Clock cycles: about a tenth of a second.
        x.copy_(values)
        found = ops.features(x, params, model.out_features)
    side.synchronize()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", list(TINY))
def test_a_captured_graph_equals_eager_launches(name):
    model, x = network(name, torch.float16), image(torch.float16)
    params = model.fold(x.dtype)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # Kernels are compiled before the capture.
        ops.features(x, params, model.out_features)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.features(x, params, model.out_features)
    for _ in range(2):
        x.copy_(image(torch.float16))
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, ops.features(x, params, model.out_features)))


def test_nothing_is_measured_during_a_capture(monkeypatch):
    """Unknown layers take the static choice there, and are measured by the next eager call."""
    model, x = network("detectron2", torch.float16), image(torch.float16)
    params = model.fold(x.dtype)
    expected = ops.features(x, params, model.out_features)
    torch.cuda.synchronize()
    monkeypatch.setenv(tuning.ENVIRONMENT, "1")
    measured = []

    def measure(candidates, run, timer):
        measured.append(candidates)
        run(candidates[-1])
        yield candidates[-1], 1.0

    monkeypatch.setattr(tuning, "_measure", measure)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.features(x, params, model.out_features)
    graph.replay()
    torch.cuda.synchronize()
    assert not measured
    assert tuning.table().choices() == {}
    assert all(map(torch.equal, found, expected))
    ops.conv_bn_relu(x, params.stem[0])
    assert len(measured) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device():
    """Launched where the tensors are, whatever device is current, which stays so."""
    model, x = network("detectron2", torch.float16), image(torch.float16)
    expected = features(model, x)
    with torch.cuda.device(0):
        found = features(model.to("cuda:1"), x.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        # Static choices depend on the number of processors, and with them the roundings.
        torch.testing.assert_close(a.to("cuda:0"), b, rtol=0.01, atol=0.01 * b.abs().max().item())


# --------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------

AMP = {torch.bfloat16: "bf16 autocast", torch.float32: "fp32"}


def in_training(spec, *, device="cuda", **options):
    """A network with weights in fp32, in training mode."""
    torch.manual_seed(0)
    return straight_line.randomise(VoVNet(spec, **options)).to(device).train()


def gradients(model, x, dtype=torch.bfloat16):
    """Of all parameters, for gradients of the features that depend on their shapes only."""
    model.zero_grad(set_to_none=True)
    amp = torch.autocast(x.device.type, dtype=dtype, enabled=dtype == torch.bfloat16)
    with torch.enable_grad(), amp:
        features = model(x)
    torch.autograd.backward(features, [given(f) for f in features])
    return [p.grad for p in model.parameters()]


def given(feature):
    """A gradient of a feature: itself, weighted by a wave over the channels.

    One that has nothing to do with the feature would cancel out, and leave roundings.
    """
    channels = torch.arange(feature.shape[1], device=feature.device)
    return feature.detach() * torch.cos(channels * 0.7).to(feature.dtype)[:, None, None]


def distance(found, expected):
    """Mean over the parameters of the relative distance.

    Those without influence, as biases before a batch norm, have but roundings for gradients.
    """
    pairs = [(f, e.double()) for f, e in zip(found, expected, strict=True) if e is not None]
    least = 1e-9 * max(e.norm() for _, e in pairs)
    apart = [(f.double() - e).norm() / e.norm() for f, e in pairs if e.norm() > least]
    return torch.stack(apart).mean().item()


def assert_gradients_no_worse_than_eager(spec, dtype, monkeypatch, **options):
    """Their distance from fp64's is at most twice that of eager in the same dtype.

    In bf16 roundings switch ReLUs, and batch norms spread that: eager itself can be off by
    0.7. Zeros are off by 1.
    """
    model = in_training(spec, **options)
    x = image(torch.float32, 128)
    with backends.use_backend("reference"):
        exact = gradients(copy.deepcopy(model).double(), x.double(), torch.float64)
        in_eager = gradients(copy.deepcopy(model), x, dtype)

    def refuse(*_, **__):
        raise AssertionError("the backward pass was not the kernels'")

    for name in ("conv_weight_grad", "conv_input_grad", "apply_gates_backward"):
        monkeypatch.setattr(reference, name, refuse)
    found = gradients(model, x, dtype)
    assert all(f.isfinite().all() for f in found if f is not None)
    allowed = 2 * distance(in_eager, exact) + torch.finfo(dtype).eps
    assert distance(found, exact) <= min(allowed, 0.95)


@pytest.mark.parametrize("norm_eval", [True, False])
@pytest.mark.parametrize("dtype", AMP, ids=AMP.get)
@pytest.mark.parametrize("name", list(TINY))
def test_gradients(name, dtype, norm_eval, monkeypatch):
    options = dict(norm_eval=norm_eval)
    assert_gradients_no_worse_than_eager(TINY[name], dtype, monkeypatch, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", AMP, ids=AMP.get)
@pytest.mark.parametrize("spec", specs.names())
def test_gradients_of_every_architecture(spec, dtype, monkeypatch):
    """Minutes: each has kernels of its own to compile."""
    assert_gradients_no_worse_than_eager(spec, dtype, monkeypatch)


@pytest.mark.parametrize("with_cp", [True, False])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_a_captured_training_step(norm_eval, with_cp):
    """The same gradients and running statistics as without a graph, on inputs that change."""
    model = in_training(TINY["detectron2"], norm_eval=norm_eval, with_cp=with_cp)
    x = image(torch.float32)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients(model, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(model, x)
    for _ in range(2):
        twin = copy.deepcopy(model)
        x.copy_(image(torch.float32))
        graph.replay()
        torch.cuda.synchronize()
        assert distance(found, gradients(twin, x)) < 1e-3
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_a_training_step_follows_the_current_stream():
    model, values = in_training(TINY["detectron2"]), image(torch.float32)
    expected = [g.clone() for g in gradients(model, values)]
    x = torch.zeros_like(values)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        x.copy_(values)
        found = gradients(model, x)
    side.synchronize()
    assert distance(found, expected) < 1e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_training_step_on_another_device():
    model, x = in_training(TINY["detectron2"]), image(torch.float32)
    expected = gradients(copy.deepcopy(model), x)
    with torch.cuda.device(0):
        found = gradients(model.to("cuda:1"), x.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    # Static choices depend on the number of processors, and with them the roundings.
    assert distance([g.to("cuda:0") for g in found], expected) < 0.02


@pytest.mark.parametrize("norm_eval", [True, False])
@pytest.mark.parametrize("name", ["detectron2", "depthwise"])
def test_training_compiles_without_a_graph_break(name, norm_eval):
    """By Inductor, forward and backward."""
    torch._dynamo.reset()
    model, x = in_training(TINY[name], norm_eval=norm_eval), image(torch.float32)
    twin = copy.deepcopy(model)
    expected = gradients(twin, x)
    compiled = torch.compile(model, fullgraph=True)
    found = gradients(compiled, x)
    assert distance(found, expected) < 0.02
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------
# More than 2^31 elements
# --------------------------------------------------------------------------------------

SLOT = 32
WINDOW = 8
"""Pixels along the sides of what is compared: the last corner, whose offsets are largest."""

HUGE = {"inside an image": (1, 5804, 5804, 2 * SLOT), "between images": (2, 4104, 4104, 2 * SLOT)}


@pytest.fixture(params=list(HUGE))
def slots(request):
    """Two slots of one buffer of more than 2^31 elements: random numbers, and zeros."""
    n, h, w, c = HUGE[request.param]
    assert n * h * w * c > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 5 * 2**31:  # The buffer, two bytes an element, and a tensor of a slot's size.
        pytest.skip("not enough memory")
    buffer = torch.empty(n, h, w, c, dtype=torch.float16, device="cuda")
    first, second = buffer[..., :SLOT], buffer[..., SLOT:]
    first.normal_()
    second.zero_()
    yield first, second
    del buffer, first, second
    torch.cuda.empty_cache()


def corner(view, size=WINDOW):
    return view[-1:, -size:, -size:]


def vectors(channels=SLOT):
    return torch.rand(2, channels, device="cuda") + 0.5


def assert_corner(out, expected, before, source):
    """The corner is right, and so is the first pixel's neighbour slot: nothing wrapped around."""
    torch.testing.assert_close(corner(out).double(), expected, **TOLERANCE)
    assert torch.equal(source[0, :WINDOW, :WINDOW], before)


@pytest.mark.parametrize("form", ["tma", "pointer", "aten"])
def test_conv_past_32_bits(slots, form):
    x, out = slots
    weight = torch.randn(SLOT, 3, 3, SLOT, device="cuda", dtype=torch.float16) / 17
    scale, shift = vectors()
    before = x[0, :WINDOW, :WINDOW].clone()
    found, _ = load_kernels().conv.choices(x, weight, out)
    engine = next((c.name for c in found if c.form == form), backend.ATEN)
    if form != "aten" and engine == backend.ATEN:
        pytest.skip("needs sm_90")
    if form == "aten" and x.shape[0] == 1:
        pytest.skip("the limit of cuDNN's own offsets, not ours")
    backend.run_engine(engine, x, weight, scale, shift, out, stride=1, relu=True, pool=False)
    # One more pixel above and to the left; below and to the right is the true padding.
    window = corner(x, WINDOW + 1).double().permute(0, 3, 1, 2)
    z = F.conv2d(window, weight.double().permute(0, 3, 1, 2), padding=1)[..., 1:, 1:]
    expected = (z.permute(0, 2, 3, 1) * scale + shift).relu()
    assert_corner(out, expected, before, x)


def test_epilogue_past_32_bits(slots):
    x, out = slots
    scale, shift = vectors()
    before = x[0, :WINDOW, :WINDOW].clone()
    load_kernels().epilogue.epilogue(x, scale, shift, out)
    assert_corner(out, (corner(x).double() * scale + shift).relu(), before, x)


def test_gates_and_identity_past_32_bits(slots):
    x, out = slots
    gates = torch.rand(x.shape[0], SLOT, device="cuda")
    before = x[0, :WINDOW, :WINDOW].clone()
    backend.apply_gates(x, gates, x, out)
    right = corner(x).double()
    assert_corner(out, right * gates[-1].double() + right, before, x)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_past_32_bits(slots, stride):
    x, out = slots
    taps = torch.randn(3, 3, SLOT, device="cuda", dtype=torch.float16) / 3
    out = out[:, : (x.shape[1] - 1) // stride + 1, : (x.shape[2] - 1) // stride + 1]
    before = x[0, :WINDOW, :WINDOW].clone()
    backend.depthwise(x, taps, out, stride=stride)
    size = stride * WINDOW  # An even number of pixels from the end, as the sides are even.
    window = corner(x, size + stride).double().permute(0, 3, 1, 2)
    kernel = taps.double().permute(2, 0, 1).unsqueeze(1)
    z = F.conv2d(window, kernel, stride=stride, padding=1, groups=SLOT)[..., 1:, 1:]
    assert_corner(out, z.permute(0, 2, 3, 1), before, x)


@pytest.mark.parametrize("mode", ["ceil", "padded"])
def test_max_pool_past_32_bits(slots, mode):
    x, out = slots
    out = out[:, : x.shape[1] // 2, : x.shape[2] // 2]
    before = x[0, :WINDOW, :WINDOW].clone()
    backend.max_pool(x, out, mode)
    window = corner(x, 2 * WINDOW + 2).double().permute(0, 3, 1, 2)
    padding = dict(ceil_mode=True) if mode == "ceil" else dict(padding=1)
    expected = F.max_pool2d(window, 3, 2, **padding)[..., 1:, 1:].permute(0, 2, 3, 1)
    assert_corner(out, expected, before, x)
