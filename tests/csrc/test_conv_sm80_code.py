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


KINDS = {"__half": "float16", "__nv_bfloat16": "bfloat16", "float": "float32"}
"""Files of a dtype, by what a kernel's name calls it."""


def by_dtype(kernels, function, count):
    """Kernels of a function, by their dtype."""
    kernels = [kernel for kernel in kernels if re.search(rf"\b{function}<", kernel.name)]
    assert len(kernels) == count
    found = {dtype: [] for dtype in DTYPES}
    for kernel in kernels:
        found[KINDS[re.search(rf"\b{function}<(\w+)", kernel.name)[1]]].append(kernel)
    return found


def instructions(kernel, words):
    """Forms of instructions, by their name."""
    # Loads of nothing, which ptxas puts before copies, are left out.
    found = re.findall(rf"\b({words})\b((?:\.\w+)*) (?!RZ, \[RZ\])", kernel.instructions)
    return {word: [form for name, form in found if name == word] for word, _ in found}


def check_weight_grads(kernels):
    """The same of the weight gradients: one copy of the loop, all of whose loads transpose.

    Those of fp32 are loaded word by word.
    """
    forms = {3: (9, 2, 1), 1: (1, 4, 2), 0: (1, 1, 1)}  # Taps, and blocks of a warp.
    for dtype, found in by_dtype(kernels, "weight_grad_kernel", 9).items():
        assert len(found) == 3
        for kernel in found:
            form = int(re.search(r"(\d)>", kernel.name)[1])
            taps, down, pairs = forms[form]
            assert (kernel.stack, kernel.stores, kernel.loads) == (0, 0, 0), kernel.name
            assert kernel.registers <= REGISTERS // 256 // (2 if form == 0 else 1)
            of = instructions(kernel, "HMMA|LDSM|LDS|LDL|STL")
            loads, operands = ("LDS", 4) if dtype == "float32" else ("LDSM", 1)
            assert set(of) == {"HMMA", loads}, kernel.name
            products = taps * down * pairs * 2
            copies = len(of["HMMA"]) // products  # ptxas may unroll the loop in fp32.
            assert copies == 1 or (dtype == "float32" and copies <= 4), kernel.name
            assert of["HMMA"] == [f".{DTYPES[dtype]}"] * (copies * products), kernel.name
            form = "" if dtype == "float32" else ".16.MT88.4"
            count = copies * operands * (down + taps * pairs)
            assert of[loads] == [form] * count, kernel.name


def check_input_grads(kernels):
    """Those with stride 2 are as convolutions are, of two tiles."""
    for dtype, found in by_dtype(kernels, "kernel", 6).items():
        tiles = by_tile(found)
        assert set(tiles) == {(pixels, 64) for pixels in (128, 256)}
        check(dtype, tiles)


def check_images(kernels):
    """Of the first layer and the gradient of images: stores of whole units, and no spills."""
    for dtype, found in by_dtype(kernels, "image_kernel", 3).items():
        (kernel,) = found
        assert (kernel.stack, kernel.stores, kernel.loads) == (0, 0, 0), kernel.name
        assert kernel.registers <= REGISTERS // 256 // 2
        of = instructions(kernel, "HMMA|LDSM|LDGSTS|STS|LDL|STL")
        rows = 2 if dtype == "float32" else 1
        assert of["HMMA"] == [f".{DTYPES[dtype]}"] * (rows * 2 * 2 * 4), kernel.name
        assert of["LDSM"] == [".16.M88.4"] * (rows * 2 * (2 + 2)), kernel.name
        # Of 128 pixels and 64 filters; others are of sums.
        assert of["STS"].count(".128") == rows * (128 + 64) * 4 // 256, kernel.name
        assert not {"LDGSTS", "LDL", "STL"} & set(of), kernel.name
    for found in by_dtype(kernels, "image_grad_kernel", 3).values():
        (kernel,) = found
        assert (kernel.stack, kernel.stores, kernel.loads) == (0, 0, 0), kernel.name
        assert kernel.registers <= REGISTERS // 256 // 2
        assert re.search(r"\bLDG\.E\S*\.128\b", kernel.instructions), kernel.name


OTHERS = {
    "weight_grad": check_weight_grads, "input_grad": check_input_grads, "image": check_images
}  # fmt: skip
"""Files whose kernels are of all dtypes."""


@pytest.mark.parametrize("name", OTHERS)
def test_others(name, once):
    built, name_of = cuda_build(once), f"conv_sm80/{name}.cu"
    OTHERS[name](kernels_of(built.said[name_of], built.objects[name_of]))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [a.name for a in architectures.default(range(1000), "aarch64")])
def test_every_kernel_and_their_size(arch, tmp_path):
    """Each takes a minute of a core."""
    if f"sm_{arch.rstrip('a')}" not in run([cuda_tool("nvcc"), "--list-gpu-code"]).split():
        pytest.skip(f"this nvcc does not know sm_{arch}")
    size = 0
    for name in (*DTYPES, *OTHERS):
        source = CSRC / "cuda" / "conv_sm80" / f"{name}.cu"
        binary = tmp_path / f"{name}.cubin"
        words = ["-O3", "-std=c++17", "-Xptxas", "-v", f"-arch=sm_{arch}", "-cubin"]
        said = run([cuda_tool("nvcc"), *words, "-o", str(binary), str(source)])
        found = kernels_of(said, binary)
        if name in OTHERS:
            OTHERS[name](found)
        else:
            tiles = by_tile(found)
            assert set(tiles) == every_tile()
            check(name, tiles)
        size += binary.stat().st_size
    assert size <= MEBIBYTES << 20
