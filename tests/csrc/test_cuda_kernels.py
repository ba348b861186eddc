"""The kernels of csrc/cuda: on a GPU where there is one, and on the host, compiled as C++."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import sanitize
from tests.csrc import cuda_on_cpu
from tests.extension_cases import *  # noqa: F403  (tests)
from tests.extension_cases import by_dtype, randn, require
from vovnet_fast import backends, selfcheck
from vovnet_fast.backends import _extension, cuda, reference
from vovnet_fast.compat import zip
from vovnet_fast.selfcheck import runner, tensors

gpu = pytest.mark.gpu


@pytest.fixture(scope="module")
def emulation(once):
    """The kernels on the host, with the functions of ``_C.cuda``."""
    return cuda_on_cpu.built(once)


def need_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    require("cuda")


@pytest.fixture(params=["host", pytest.param("gpu", marks=gpu)], autouse=True)
def where(request):
    if request.param == "gpu":
        need_gpu()
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def kernels(where, request):
    if where == "gpu":
        return _extension.CUDA
    module = request.getfixturevalue("emulation")
    return _extension.Ops(lambda: module, cuda_on_cpu.on_host)


@pytest.fixture
def kernels_device(where):
    return torch.device("cuda" if where == "gpu" else "cpu")


on_host_only = pytest.mark.parametrize("where", ["host"], indirect=True)
on_gpu_only = pytest.mark.parametrize("where", [pytest.param("gpu", marks=gpu)], indirect=True)

# --------------------------------------------------------------------------------------
# Vectors and single elements
# --------------------------------------------------------------------------------------


def slot(values, dtype, offset, pixel, device):
    """Values in a slot that starts at an offset, with a pixel stride, in elements."""
    n, h, w, c = values.shape
    strides = (h * w * pixel, w * pixel, pixel, 1)
    storage = torch.full((n * h * w * pixel + offset + c,), torch.nan, dtype=dtype, device=device)
    return storage.as_strided(values.shape, strides, offset).copy_(values)


@by_dtype
@pytest.mark.parametrize("channels", [1, 7, 8, 19, 40])
def test_single_elements_are_computed_as_vectors_are(channels, dtype, kernels, kernels_device):
    """Whole vectors, what is left over of them, and no vectors at all: not a bit is different."""
    high = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = (randn(2, 5, 7, channels) for _ in range(2))
    a, b = (randn(2, channels, dtype=high, device=kernels_device) for _ in range(2))
    taps = randn(3, 3, channels, dtype=dtype, device=kernels_device)
    found = []
    for offset, pixel in ((32, 64), (33, 64), (32, 63)):

        def here(values, offset=offset, pixel=pixel):
            return slot(values, dtype, offset, pixel, kernels_device)

        out, small = here(x * torch.nan), here(x[:, ::2, ::2] * torch.nan)
        argmax = torch.empty(small.shape, dtype=torch.uint8, device=kernels_device)
        results = []
        kernels.epilogue(here(x), a[0], b[0], out)
        results.append(out.clone())
        kernels.apply_gates(here(x), a, here(y), out)
        results.append(out.clone())
        kernels.apply_gates_backward(here(x), a, b, here(y), out)
        results.append(out.clone())
        kernels.depthwise(here(x), taps, out)
        results.append(out.clone())
        kernels.depthwise_input_grad(here(y), taps, out, add=here(x), mask=here(y))
        results.append(out.clone())
        kernels.max_pool(here(x), small, "padded", argmax)
        results += [small.clone(), argmax.clone()]
        kernels.max_pool_backward(here(y[:, ::2, ::2]), argmax, out, "padded")
        results.append(out.clone())
        found.append(results)
    for others in found[1:]:
        for number, pair in enumerate(zip(found[0], others, strict=True)):
            assert torch.equal(*pair), number


def test_offsets_beyond_32_bits(kernels, kernels_device, where, tmp_path):
    """Rows and images that are further apart than 2^31 elements, in memory that is not there."""
    strides, shape = (2**32 + 64, 2**31 + 32, 32, 1), (2, 2, 3, 24)
    elements = 2**32 + 2**31 + 4096
    if where == "gpu":
        if torch.cuda.mem_get_info()[0] < 5 * elements:
            pytest.skip("takes 28 GiB of a GPU's memory")
        storage = torch.empty(2 * elements, dtype=torch.float16, device=kernels_device)
        storages = storage.split(elements)
    else:  # Sparse files: only the pages that are touched exist.
        storages = [
            torch.from_file(str(tmp_path / name), shared=True, size=elements, dtype=torch.float16)
            for name in "zo"
        ]
    z, out = (storage.as_strided(shape, strides, 8) for storage in storages)
    z.copy_(randn(*shape))
    scale, shift = torch.rand(2, 24, device=kernels_device)
    kernels.normalize(z, scale, shift, out)
    expected = torch.empty(shape, dtype=torch.float16, device=kernels_device)
    kernels.normalize(z.contiguous(), scale, shift, expected)
    assert torch.equal(out, expected)
    g = torch.empty_like(expected)
    taps = randn(3, 3, 24, dtype=torch.float16, device=kernels_device)
    kernels.depthwise(z, taps, out)
    kernels.depthwise(z.contiguous(), taps, g)
    assert torch.equal(out, g)


def test_reductions_of_many_parts(kernels, kernels_device):
    """More parts than a block, and than the second stage has rows of threads."""
    g, z = (randn(3, 70, 61, 40, device=kernels_device) for _ in range(2))
    norm = torch.rand(6, 40, device=kernels_device)
    assert kernels._parts(g) > 16
    pairs = [
        (kernels.channel_sums(g), g.double().sum((0, 1, 2))),
        (kernels.gate_sums(g, z), (g.double() * z).sum((1, 2))),
        (kernels.batch_norm_sums(g, z, norm),
         reference.batch_norm_sums(g.double(), z.double(), norm.double())),
        (kernels.depthwise_weight_grad(z, g),
         reference.depthwise_weight_grad(z.double(), g.double())),
    ]  # fmt: skip
    for found, exact in pairs:
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-3)


@on_host_only
@pytest.mark.parametrize(
    ("op", "fields"),
    [
        ("channel_sums", dict(parts=0)),
        ("channel_sums", dict(height=2**20)),
        ("channel_sums", dict(dtype=9)),
    ],
    ids=["parts", "height", "dtype"],
)
def test_wrong_arguments_are_errors(op, fields, emulation):
    g, out = torch.ones(1, 2, 1100, 8), torch.zeros(1, 8)
    given = dict(g=(g.data_ptr(), 0, 0, 0), partials=out.data_ptr(), out=out.data_ptr(),
                 n=1, height=2, width=1100, c=8, parts=1, dtype=2)  # fmt: skip
    (name,) = fields
    said = {
        "parts": "parts must be at least 1 where images have pixels, got 0",
        "height": r"up to 2\^30 pixels, got 1048576 x 1100: cut them into tiles",
        "dtype": "dtype must be the code of a dtype, from 0 to 3, got 9",
    }[name]
    with pytest.raises(ValueError, match=f"{op}: .*{said}"):
        getattr(emulation, op)(0, **given | fields)


# --------------------------------------------------------------------------------------
# The host's stand-in for a GPU
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    source = Path(__file__).with_name("cuda_on_cpu_faults.cpp")
    folder = tmp_path_factory.mktemp("cuda_on_cpu_faults")
    return cuda_on_cpu.load(cuda_on_cpu.build_module(folder, "cuda_on_cpu_faults", source))


@on_host_only
def test_threads_that_wait_in_vain_are_reported(faults):
    faults.barrier_for_some(64)
    faults.barrier_for_some(0)
    with pytest.raises(RuntimeError, match=r"thread 0 waits .*, but thread 63 has returned"):
        faults.barrier_for_some(63)
    with pytest.raises(RuntimeError, match=r"at the barrier .*, but thread 32 waits at"):
        faults.two_barriers(32)
    faults.shuffle_for_some(64)
    faults.shuffle_for_some(32)  # A warp without the other.
    with pytest.raises(RuntimeError, match=r"at the shuffle .*, but thread 40 has returned"):
        faults.shuffle_for_some(40)


@on_host_only
def test_a_vector_that_is_not_aligned_is_reported(faults):
    values = torch.zeros(16)
    faults.vector_from(values.data_ptr())
    with pytest.raises(RuntimeError, match="a vector of 16 bytes is not aligned"):
        faults.vector_from(values.data_ptr() + 4)


@on_host_only
def test_barriers_and_shuffles_carry_values(faults):
    values = torch.arange(64.0)
    faults.reverse(values.data_ptr(), True)
    assert values.tolist() == list(range(63, -1, -1))
    faults.reverse(values.data_ptr(), False)
    assert values.isnan().any(), "shared memory is full of NaN before it is written"
    values = torch.arange(64.0)
    faults.sum_of_lanes(values.data_ptr())
    assert values.tolist() == [496.0] * 32 + [1520.0] * 32


FAULTS = {
    "no wait": (1, "is read, and a copy of thread . is on its way there"),
    "too many pending": (2, "is read, and a copy of thread . is on its way there"),
    "no group": (3, "is read, and a copy of thread . is on its way there"),
    "no barrier": (4, "is read, and thread 0 wrote it, with no barrier between"),
    "no barrier behind": (5, "is written, and thread .* read it, with no barrier between"),
    "nothing written": (6, "is read, and nobody has written it"),
    "left under way": (7, "it returns, and has not waited for copies"),
    "two writers": (8, "is written, and thread 0 wrote it, with no barrier between"),
    "outside": (9, "byte 1024 of shared memory is outside its 1024 bytes"),
    "not aligned": (10, "byte 4 of shared memory is not aligned to 16"),
}


@on_host_only
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_misuse_of_shared_memory_is_reported(fault, early, faults):
    """Whenever copies land: it is not the numbers that show it."""
    source, found = torch.arange(512.0), torch.zeros(128)
    number, words = FAULTS.get(fault, (0, None))
    call = faults.hand_on, source.data_ptr(), found.data_ptr(), number, early
    if words is None:
        call[0](*call[1:])
        expected = source.view(2, 64, 4)[:, :, 1].roll(-1, 1)
        assert torch.equal(found.view(2, 64), expected)
        return
    with pytest.raises(RuntimeError, match=words):
        call[0](*call[1:])


@on_host_only
def test_banks_that_rows_share_are_counted(faults):
    """A matrix of rows that lie 16 bytes apart takes one turn; 32 apart, two."""
    assert [faults.matrix_conflicts(pitch) for pitch in (16, 32)] == [0, 4]


@on_host_only
@pytest.mark.skipif(cuda_on_cpu.MODULE in os.environ, reason="these are the tests that it runs")
def test_under_sanitizers(once, tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing in the kernels."""
    # Without the forms that are not chosen: compiling them takes longer than running the others.
    flags = (*cuda_on_cpu.SANITIZE, "-O0", "-DVF_EVERY_DTYPE=0", "-DVF_CONV_SM80_FEW")
    module = cuda_on_cpu.build(tmp_path, once, flags)
    others = "float16 and not bfloat16 or single and float32"
    chosen = f"host and not conv_sm80 and not test_depthwise_conv and ({others}) or watched"
    here = Path(__file__).parent
    names = [*here.glob("test_conv_sm80*.py"), here / "test_depthwise_conv.py"]
    files = __file__, *map(str, names)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen],
        env={**sanitize.environment(), "PYTHONPATH": os.getcwd(), cuda_on_cpu.MODULE: str(module)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    passed = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed[0]) > 30, done.stdout


# --------------------------------------------------------------------------------------
# The backend
# --------------------------------------------------------------------------------------


@on_host_only
def test_the_backend_is_these_functions():
    for name in {case.function for case in selfcheck.CASES}:
        function = getattr(cuda, name)
        assert function == getattr(_extension.CUDA, name) or name.startswith("conv")


@on_host_only
def test_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(_extension, "why_not", lambda half: None)
    assert "needs tensors on an NVIDIA GPU, these are on cpu" in cuda.why_not(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.why_not(None) == "torch sees no NVIDIA GPU"
    monkeypatch.setattr(_extension, "why_not", lambda half: f"no {half}")
    assert cuda.why_not(None) == "no cuda"


class Probed:
    """Stands for the extension on a GPU for which it has no code."""

    def probe(self):
        raise RuntimeError("probe: no kernel can be run: cudaErrorNoKernelImageForDevice")


@on_host_only
def test_a_gpu_without_code_for_it_is_refused(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_extension, "load", lambda half: Probed())
    monkeypatch.setattr(_extension, "build_info", lambda: {"archs": "90a"})
    said = cuda._refusal.__wrapped__(device)
    assert "cudaErrorNoKernelImageForDevice" in said
    assert "compiled for 90a, the GPU is sm_89" in said
    assert "VOVNET_FAST_CUDA_ARCHS=8.9" in said
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert cuda._refusal.__wrapped__(device) == "compute capability 7.5 is below 8.0 (Ampere)"


# --------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------


@on_gpu_only
@pytest.mark.parametrize("function", sorted({case.function for case in selfcheck.CASES}))
@pytest.mark.parametrize("dtype", selfcheck.DTYPES, ids=str)
def test_against_triton(function, dtype, kernels_device):
    """Neither is further from the other than both may be from fp64."""
    for case in selfcheck.CASES:
        if case.function != function:
            continue
        limits = [
            runner.limit(eager, exact, tf32=True)
            for eager, exact in zip(
                case.call(reference, tensors.Tensors(dtype, dtype, kernels_device)),
                case.call(reference, tensors.Tensors(dtype, torch.float64, kernels_device)),
                strict=True,
            )
        ]
        ours, theirs = (
            case.call(backends._module(name), tensors.Tensors(dtype, dtype, kernels_device))
            for name in ("cuda", "triton")
        )
        for a, b, limit in zip(ours, theirs, limits, strict=True):
            assert tensors.largest(a.double() - b) <= 2 * limit, case.words


@on_gpu_only
def test_a_step_is_captured_and_the_same_every_time(kernels, kernels_device):
    x, g = (randn(4, 50, 50, 64, dtype=torch.float16, device=kernels_device) for _ in range(2))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        first = kernels.depthwise_weight_grad(x, g), kernels.gate_sums(x, g)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = kernels.depthwise_weight_grad(x, g), kernels.gate_sums(x, g)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, first))


@on_gpu_only
def test_tensors_of_another_device_are_refused(kernels_device):
    """The extension itself sees to it that the current device is that of the output."""
    out = torch.zeros(8, pin_memory=True)
    fields = dict(g=(out.data_ptr(), 0, 0, 0), partials=0, out=out.data_ptr(),
                  n=1, height=1, width=1, c=8, parts=1, dtype=2)  # fmt: skip
    with pytest.raises(ValueError, match="not in the memory of a GPU"):
        cuda.extension().channel_sums(0, **fields)
