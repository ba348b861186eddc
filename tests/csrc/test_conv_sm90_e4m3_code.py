"""What nvcc makes of the Hopper convolution in e4m3."""

import re

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")
pytest.importorskip("pybind11", reason="native_build takes it")

from tests.csrc.test_nvcc import cuda_tool, run
from tests.native_build.building import cuda_build
from vovnet_fast.backends import conv_sm90_tiles

SOURCE = "conv_sm90/e4m3.cu"


@pytest.fixture(scope="module")
def compiled(once):
    """What ptxas says, and the instructions of every kernel, by channels and blocks."""
    built = cuda_build(once)
    sass = run([cuda_tool("cuobjdump"), "-sass", str(built.objects[SOURCE])])
    kernels = {}
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        channels, blocks = re.match(r"\S*Li(\d+)ELi(\d)E", part).groups()
        kernels[int(channels), int(blocks)] = part
    return built.said[SOURCE], kernels


def test_no_kernel_spills_or_waits_for_its_products(compiled):
    log, kernels = compiled
    assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(
        kernels
    )
    assert set(re.findall(r"Used (\d+) registers", log)) == {"168"}
    # Notes of ptxas on WGMMAs that it has to make wait, and on setmaxnreg if it ignores it.
    assert "C75" not in log, re.findall(r".*C75.*", log)[:3]


def test_every_tile_has_a_kernel_with_exactly_its_channels(compiled):
    _, kernels = compiled
    tiles = conv_sm90_tiles._BLOCKS[1].items()
    assert set(kernels) == {(block, pixels // 128) for pixels, all_ in tiles for block in all_}
    for (channels, blocks), sass in kernels.items():
        products = re.findall(r"QGMMA\.(\w+)\.F32\.E4M3\.E4M3 \S+ \S+ (RZ|R\d+)", sass)
        assert {shape for shape, _ in products} == {f"64x{channels}x32"}
        # Of one to four steps along a chunk, the first begins from zero.
        counts = [sum(sums == "RZ" for _, sums in products), len(products)]
        assert counts == [4 * blocks, 10 * blocks]


def test_instructions_are_those_of_hopper(compiled):
    _, kernels = compiled
    for name, sass in kernels.items():
        for instruction in (
            "UTMALDG.4D", "UTMALDG.3D", "UTMALDG.4D.MULTICAST", "UTMALDG.3D.MULTICAST",
            "UCGABAR_ARV", "UCGABAR_WAIT", "SYNCS.ARRIVE", "SYNCS.PHASECHK", "STG.E.128",
            "STG.E.64", "F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C", "USETMAXREG.DEALLOC",
            "USETMAXREG.TRY_ALLOC",
        ):  # fmt: skip
            assert instruction in sass, f"{name} has no {instruction}"
        # Of other CTAs' shared memory, by generic addresses: where tiles have parts.
        channels, blocks = name
        assert ("LD.E.128" in sass) == (channels * (blocks + 1) < 384), name
        for instruction in ("LDL", "STL", "LDSM"):
            assert not re.search(rf"\b{instruction}\b", sass), f"{name} has {instruction}"
