"""What nvcc makes of the convolution for sm_80 and newer: registers, spills, and its loop."""

import re

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")
pytest.importorskip("pybind11", reason="native_build takes it")

from native_build import architectures
from tests.csrc.cuda_on_cpu import CSRC
from tests.csrc.test_nvcc import cuda_tool, kernels_of, run
from tests.native_build.building import cuda_build
from vovnet_fast.backends import conv_sm80

DTYPES = {"float16": "16816.F32", "bfloat16": "16816.F32.BF16", "float32": "1688.F32.TF32"}
"""Files, and what their products are called."""

REGISTERS = 65536
"""Of a processor."""

FEW = {(128, 80), (256, 80), (128, 128), (256, 128), (128, 224)}
"""Pixels and channels of the tiles that the build of the tests has."""

MEBIBYTES = 8
"""That the kernels of an architecture may take."""


@pytest.fixture(scope="module", params=DTYPES)
def few(request, once):
    """Kernels of the extension as it is built for sm_90a, by their tiles."""
    built, name = cuda_build(once), f"conv_sm80/{request.param}.cu"
    return request.param, by_tile(kernels_of(built.said[name], built.objects[name]))


def by_tile(kernels):
    names = (re.search(r"(?:\(int\))?(\d+), (?:\(int\))?(\d+)>", k.name) for k in kernels)
    return {tuple(map(int, name.groups())): kernel for name, kernel in zip(names, kernels)}


def every_tile():
    return {(pixels, n) for pixels, channels in conv_sm80._BLOCKS.items() for n in channels}


def check(dtype, tiles):
    """Nothing spills, and instructions are those that the kernel is written for."""
    for (pixels, channels), kernel in tiles.items():
        assert (kernel.stack, kernel.stores, kernel.loads) == (0, 0, 0), kernel.name
        sums = pixels * channels // 256
        blocks = 2 if sums <= 64 else 1
        assert kernel.registers <= REGISTERS // (256 * blocks), (kernel.name, kernel.registers)
        found = re.findall(r"\b(HMMA|LDSM|LDGSTS|LDL|STL|BAR)((?:\.\w+)*)", kernel.instructions)
        of = {word: [form for name, form in found if name == word] for word, _ in found}
        assert not {"LDL", "STL"} & set(of), kernel.name
        # One copy of the loop, with exactly the products of a step: 16 pixels by 8 channels each.
        down, across = pixels // 4 // 16, channels // 2 // 8
        assert of["HMMA"] == [f".{DTYPES[dtype]}"] * (2 * down * across), kernel.name
        # Four matrices a load of pixels, or of two operands of weights.
        assert of["LDSM"].count(".16.M88.4") == 2 * (down + across // 2), kernel.name
        assert of["LDSM"].count(".16.M88.2") == 2 * (across % 2), kernel.name
        assert all(re.match(r"\.E\.BYPASS\.(LTC128B\.)?128", form) for form in of["LDGSTS"])
        assert any("ZFILL" in form for form in of["LDGSTS"]), kernel.name
        if dtype != "float32":
            assert re.search(r"\bSTG\.E\S*\.128\b", kernel.instructions), kernel.name


def test_few_kernels(few):
    dtype, tiles = few
    assert set(tiles) == FEW
    check(dtype, tiles)


def check_weight_grads(kernels):
    """The same of the weight gradients: one copy of the loop, all of whose loads transpose."""
    found = [kernel for kernel in kernels if "weight_grad_kernel" in kernel.name]
    assert len(found) == 4
    for kernel in found:
        taps = 9 if re.search(r"\b3>", kernel.name) else 1
        down, pairs = (2, 1) if taps == 9 else (4, 2)
        assert (kernel.stack, kernel.stores, kernel.loads) == (0, 0, 0), kernel.name
        assert kernel.registers <= REGISTERS // 256
        words = re.findall(r"\b(HMMA|LDSM|LDL|STL)((?:\.\w+)*)", kernel.instructions)
        of = {word: [form for name, form in words if name == word] for word, _ in words}
        assert set(of) == {"HMMA", "LDSM"}, kernel.name
        assert len(of["HMMA"]) == taps * down * pairs * 2, kernel.name
        assert of["LDSM"] == [".16.MT88.4"] * (down + taps * pairs), kernel.name


def test_weight_grads(once):
    built, name = cuda_build(once), "conv_sm80/weight_grad.cu"
    check_weight_grads(kernels_of(built.said[name], built.objects[name]))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [a.name for a in architectures.default(range(1000), "aarch64")])
def test_every_kernel_and_their_size(arch, tmp_path):
    """Each takes a minute of a core."""
    if f"sm_{arch.rstrip('a')}" not in run([cuda_tool("nvcc"), "--list-gpu-code"]).split():
        pytest.skip(f"this nvcc does not know sm_{arch}")
    size = 0
    for name in (*DTYPES, "weight_grad"):
        source = CSRC / "cuda" / "conv_sm80" / f"{name}.cu"
        binary = tmp_path / f"{name}.cubin"
        words = ["-O3", "-std=c++17", "-Xptxas", "-v", f"-arch=sm_{arch}", "-cubin"]
        said = run([cuda_tool("nvcc"), *words, "-o", str(binary), str(source)])
        found = kernels_of(said, binary)
        if name == "weight_grad":
            check_weight_grads(found)
        else:
            tiles = by_tile(found)
            assert set(tiles) == every_tile()
            check(name, tiles)
        size += binary.stat().st_size
    assert size <= MEBIBYTES << 20
