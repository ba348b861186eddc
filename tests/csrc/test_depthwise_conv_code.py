"""What nvcc makes of the depthwise 3x3 with its 1x1: registers, spills, and its loop."""

import re

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")
pytest.importorskip("pybind11", reason="native_build takes it")

from native_build import architectures
from tests.csrc.cuda_on_cpu import CSRC
from tests.csrc.test_conv_sm80_code import DTYPES, REGISTERS
from tests.csrc.test_nvcc import cuda_tool, kernels_of, run
from tests.native_build.building import cuda_build
from vovnet_fast.backends import depthwise_conv

FEW = {64, 80, 128, 224}
"""Channels of the tiles that the build of the tests has."""

MEBIBYTES = 2
"""That the kernels of an architecture may take."""


@pytest.fixture(scope="module", params=DTYPES)
def few(request, once):
    """Kernels of the extension as it is built for sm_90a, by their channels."""
    built, name = cuda_build(once), f"depthwise_conv/{request.param}.cu"
    return request.param, by_channels(kernels_of(built.said[name], built.objects[name]))


def by_channels(kernels):
    return {int(re.search(r"(\d+)>\(", kernel.name)[1]): kernel for kernel in kernels}


def check(dtype, tiles):
    """Nothing spills, and instructions are those that the kernel is written for."""
    for channels, kernel in tiles.items():
        assert (kernel.stack, kernel.stores, kernel.loads) == (0, 0, 0), kernel.name
        blocks = 2 if channels <= 128 else 1
        assert kernel.registers <= REGISTERS // (256 * blocks), (kernel.name, kernel.registers)
        words = r"\b(HMMA|LDSM|LDGSTS|LDL|STL|LDS|STS)((?:\.\w+)*)"
        found = re.findall(words, kernel.instructions)
        of = {word: [form for name, form in found if name == word] for word, _ in found}
        assert not {"LDL", "STL"} & set(of), kernel.name
        # One copy of the loop, with exactly the products of a step: 16 pixels by 8 channels each.
        down, across = 2, channels // 2 // 8
        assert of["HMMA"] == [f".{DTYPES[dtype]}"] * (2 * down * across), kernel.name
        assert of["LDSM"].count(".16.M88.4") == 2 * (down + across // 2), kernel.name
        assert of["LDSM"].count(".16.M88.2") == 2 * (across % 2), kernel.name
        # Of a column of taps: those, and the lines of a run of two, of four or with stride 2 of
        # five; then both are stored. Whole units, each of which is loaded once.
        assert of["LDS"].count(".128") == (3 + 4) + (3 + 5), kernel.name
        assert of["STS"].count(".128") == 2 + 2, kernel.name
        assert all(re.match(r"\.E\.BYPASS\.(LTC128B\.)?128", form) for form in of["LDGSTS"])
        assert any("ZFILL" in form for form in of["LDGSTS"]), kernel.name
        if dtype != "float32":
            assert re.search(r"\bSTG\.E\S*\.128\b", kernel.instructions), kernel.name


def test_few_kernels(few):
    dtype, tiles = few
    assert set(tiles) == FEW
    check(dtype, tiles)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [a.name for a in architectures.default(range(1000), "aarch64")])
def test_every_kernel_and_their_size(arch, tmp_path):
    """Ten seconds of a core each."""
    if f"sm_{arch.rstrip('a')}" not in run([cuda_tool("nvcc"), "--list-gpu-code"]).split():
        pytest.skip(f"this nvcc does not know sm_{arch}")
    size = 0
    for name in DTYPES:
        source = CSRC / "cuda" / "depthwise_conv" / f"{name}.cu"
        binary = tmp_path / f"{name}.cubin"
        words = ["-O3", "-std=c++17", "-Xptxas", "-v", f"-arch=sm_{arch}", "-cubin"]
        said = run([cuda_tool("nvcc"), *words, "-o", str(binary), str(source)])
        tiles = by_channels(kernels_of(said, binary))
        assert set(tiles) == set(depthwise_conv._BLOCKS)
        check(name, tiles)
        size += binary.stat().st_size
    assert size <= MEBIBYTES << 20
