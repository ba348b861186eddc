"""The backend of the extension's CPU half: its functions, its threads, its instruction sets."""

import contextlib
import copy
import os
import platform
import subprocess
import sys

import pytest
import torch

from tests import straight_line
from tests.extension_cases import *  # noqa: F403  (tests)
from tests.extension_cases import CASES, check, everything, randn, require
from tests.features import compared
from tests.tiny import TINY
from vovnet_fast import VoVNet, backends, ops
from vovnet_fast.backends import _extension, cpu
from vovnet_fast.compat import zip
from vovnet_fast.network.blocks import OSABlock

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _built():
    require("cpu")
    torch.manual_seed(0)


@pytest.fixture
def kernels():
    return _extension.CPU


@pytest.fixture
def kernels_device():
    return CPU


@pytest.fixture
def extension():
    return _extension.load("cpu")


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_the_backend_is_these_functions(kernels):
    for name in {case.function for case in CASES}:
        if hasattr(cpu, name):
            assert getattr(cpu, name) == getattr(kernels, name) or name.startswith("conv")


# --------------------------------------------------------------------------------------
# Threads and instruction sets
# --------------------------------------------------------------------------------------


def outputs(kernels, dtype):
    """Of every function, on images that are worth several threads."""
    torch.manual_seed(0)
    x, y, g = (randn(2, 40, 41, 48, dtype=dtype) for _ in range(3))
    narrow = randn(2, 20, 21, 48, dtype=dtype)
    yield from (found for _, found in everything(kernels, dtype, CPU, g, narrow, x, y))
    out, scale = torch.empty_like(x), torch.rand(48)
    yield kernels.normalize(x, scale, scale, out, pool=True)
    partials = torch.empty(2, kernels.tiles(x), 3, 48)
    kernels.epilogue(x, None, None, x, relu=False, statistics=partials)
    yield kernels.batch_norm_finish(partials.flatten(0, 1), None, None, 1e-5)
    yield kernels.channel_sums(x)
    weight = randn(80, 3, 3, 48, dtype=dtype)
    for pack, shape in ((kernels.pack, (80, 3, 3, 48)), (kernels.pack_transposed, (48, 3, 3, 80))):
        packed = torch.empty(shape, dtype=dtype)
        pack(weight, None, packed)
        yield packed
    yield from kernels.pack_backward(weight, weight, torch.rand(80))
    yield from kernels.gates(torch.rand(64, 80, 48), 9, randn(48, 48), randn(48), "sigmoid")
    grads = (torch.rand(64, 48) for _ in range(3))
    yield from kernels.gates_backward(*grads, 9, randn(48, 48), "hard_sigmoid")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_number_of_threads_does_not_change_a_bit(dtype, kernels):
    with threads(1):
        alone = list(outputs(kernels, dtype))
    for number in (2, 3, 7):
        with threads(number):
            together = list(outputs(kernels, dtype))
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b)


def test_every_instruction_set(extension, kernels):
    """The best one is what all other tests run on."""
    *others, best = extension.isas()
    assert (*others, best)[0] in ("baseline", "neon")
    for isa in others:
        extension.use_isa(isa)
        try:
            assert extension.isa() == isa
            for case in CASES:
                for dtype in compared((torch.float16, torch.bfloat16, torch.float32)):
                    wrong = check(case, kernels, dtype, CPU)
                    assert wrong is None, f"{isa}, {case.function}, {case.words}, {dtype}: {wrong}"
        finally:
            extension.use_isa(best)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64's")
@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="asks Linux")
def test_the_instruction_sets_are_those_that_the_system_knows(extension):
    """All that were built, and that Linux lets processes use."""
    with open("/proc/cpuinfo", encoding="utf-8") as text:
        flags = set(next(line for line in text if line.startswith("flags")).split())
    avx2 = {"avx2", "fma", "f16c"}
    needed = {"avx2": avx2, "avx512": avx2 | {"avx512f", "avx512dq", "avx512bw", "avx512vl"}}
    built = _extension.build_info()["isas"].split()
    there = [isa for isa, flags_of in needed.items() if isa in built and flags_of <= flags]
    assert extension.isas() == ["baseline", *there]


def test_the_environment_chooses_an_instruction_set():
    code = "import torch; from vovnet_fast import _C; print(_C.cpu.isa())"
    found = run_python(code, VOVNET_FAST_CPU_ISA="baseline").stdout.strip()
    assert found == _extension.load("cpu").isas()[0]  # "neon" on AArch64.
    code = "from vovnet_fast import backends; print(backends.available_backends()['cpu'])"
    said = run_python(code, VOVNET_FAST_CPU_ISA="sse9").stdout
    assert "VOVNET_FAST_CPU_ISA=sse9" in said
    assert f"choose one of {found}" in said


# --------------------------------------------------------------------------------------
# The binding
# --------------------------------------------------------------------------------------


def test_fields_are_named_and_complete(extension):
    fields = dict.fromkeys(("partials", "scratch", "out"), 0) | dict(
        parts=0, c=0, groups=0, dtype=2
    )
    extension.batch_norm_merge(1, **fields)
    with pytest.raises(TypeError, match="missing argument: groups"):
        extension.batch_norm_merge(1, **{k: v for k, v in fields.items() if k != "groups"})
    with pytest.raises(TypeError, match="takes 7 arguments, got 8"):
        extension.batch_norm_merge(1, **fields, more=1)
    with pytest.raises(TypeError, match="argument c has a wrong type: 'x'"):
        extension.batch_norm_merge(1, **{**fields, "c": "x"})
    with pytest.raises(ValueError, match="dtype must be one of 2, 3, got 0"):
        extension.batch_norm_merge(1, **{**fields, "dtype": 0})


# --------------------------------------------------------------------------------------
# The backend
# --------------------------------------------------------------------------------------


class Broken:
    """Stands for the extension, loaded or not."""

    def __init__(self, version):
        self.version = version

    def build_info(self):
        return {"version": self.version}


class Nowhere:
    """Finds nothing."""

    @staticmethod
    def find_spec(name, path):
        return None


def broken(name):
    raise ImportError("undefined symbol: GOMP_parallel")


@pytest.mark.parametrize(
    ("where", "what", "reason"),
    [
        ("PathFinder", Nowhere, "not built, which takes a C++ compiler"),
        ("importlib.import_module", broken, "cannot be loaded: undefined symbol: GOMP_parallel"),
        (
            "importlib.import_module",
            lambda name: Broken("0.0"),
            "was built for vovnet_fast 0.0, this is",
        ),
        ("importlib.import_module", lambda name: Broken(""), "was built without its cpu half"),
    ],
)
def test_why_it_cannot_run(where, what, reason, monkeypatch):
    monkeypatch.setattr(f"vovnet_fast.backends._extension.loading.{where}", what)
    _extension.loading._loaded.cache_clear()
    try:
        said = cpu.why_not(CPU)
        assert reason in said
        assert "python setup.py build_ext --inplace" in said
        with pytest.raises(RuntimeError, match="the extension"):
            _extension.load("cpu")
    finally:
        monkeypatch.undo()
        _extension.loading._loaded.cache_clear()


def test_it_takes_tensors_on_the_cpu():
    assert cpu.why_not(CPU) is None
    assert "needs tensors on the CPU, these are on meta" in cpu.why_not(torch.device("meta"))
    x = torch.empty(1, 2, 2, 3, device="meta")
    with pytest.raises(TypeError, match=r"z must be a plain tensor, .* on meta"):
        cpu.normalize(x, x.new_ones(3), x.new_ones(3), x)


# --------------------------------------------------------------------------------------
# Gradients
# --------------------------------------------------------------------------------------


def leaf(*shape):
    return randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(stride=2),
        dict(kernel=1),
        dict(depthwise=True, kernel=1),
        dict(depthwise=True, kernel=1, stride=2),
        dict(eps=1e-3),
    ],
    ids=str,
)
def test_gradients_of_layers(options):
    options = dict(options)
    depthwise, kernel = options.pop("depthwise", False), options.pop("kernel", 3)
    tensors = [
        leaf(7, kernel, kernel, 5),
        leaf(7),
        leaf(7),
        *([leaf(3, 3, 5)] if depthwise else []),
    ]

    def call(x, weight, scale, shift, taps=None):
        return ops.conv_bn_relu(x, ops.ConvParams(weight, scale, shift, depthwise=taps, **options))

    with backends.use_backend("cpu"):
        assert torch.autograd.gradcheck(call, (leaf(2, 5, 5, 4), *tensors), fast_mode=True)


@pytest.mark.parametrize("kind", ["hard_sigmoid", "sigmoid"])
def test_gradients_of_ese(kind):
    inputs = (leaf(2, 9, 4, 3), leaf(9, 9), leaf(9), leaf(2, 9, 4, 3))
    with backends.use_backend("cpu"):
        assert torch.autograd.gradcheck(
            lambda x, w, b, y: ops.ese(x, w, b, kind, y), inputs, fast_mode=True
        )


@pytest.mark.parametrize("mode", ["ceil", "padded"])
def test_gradients_of_max_pool(mode):
    with backends.use_backend("cpu"):
        assert torch.autograd.gradcheck(lambda x: ops.max_pool(x, mode), (leaf(2, 9, 5, 6),))


@pytest.mark.parametrize("norm_eval", [True, False])
@pytest.mark.parametrize("name", list(TINY))
def test_gradients_of_networks(name, norm_eval):
    """Features and all gradients are those of plain modules in fp64."""
    eager = straight_line.randomise(VoVNet(TINY[name], norm_eval=norm_eval)).double().train()
    ours = copy.deepcopy(eager)
    x = torch.randn(2, 3, 37, 45, dtype=torch.float64)
    found = []
    for model, backend in ((eager, "reference"), (ours, "cpu")):
        with backends.use_backend(backend):
            features = model(x)
            sum((f * f).sum() for f in features).backward()
        parameters = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        found.append((features, parameters, buffers))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


def test_a_block_by_gradcheck():
    model = straight_line.randomise(VoVNet(TINY["detectron2"])).double()
    block = next(m for m in model.modules() if isinstance(m, OSABlock))
    params = block.fold(torch.float64)

    def call(x, weight):
        return ops.osa_block(x, params._replace(concat=params.concat._replace(weight=weight)))

    weight = params.concat.weight.detach().contiguous().requires_grad_()
    with backends.use_backend("cpu"):
        x = leaf(1, block.plan.in_channels, 4, 3)
        assert torch.autograd.gradcheck(call, (x, weight), fast_mode=True)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_step_is_the_same_every_time(deterministic):
    model = straight_line.randomise(VoVNet(TINY["depthwise"])).train()
    x, grads = torch.randn(2, 3, 40, 40), []
    torch.use_deterministic_algorithms(deterministic)
    try:
        for _ in range(2):
            with backends.use_backend("cpu"), torch.autocast("cpu", torch.bfloat16):
                loss = sum(f.float().square().mean() for f in model(x))
            model.zero_grad()
            loss.backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *grads))
