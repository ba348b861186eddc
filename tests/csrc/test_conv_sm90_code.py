"""What nvcc makes of the Hopper convolution: registers, spills, and the instructions it is for."""

import re

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")
pytest.importorskip("pybind11", reason="native_build takes it")

from tests.csrc.test_nvcc import cuda_tool, run
from tests.native_build.building import cuda_build
from vovnet_fast.backends import conv_sm90

CHANNELS = [64, 80, 96, 112, 128, 160, 192, 224, 256]

MEBIBYTES = 8 / 3
"""That the kernels of one dtype may take, of three."""


@pytest.fixture(scope="module")
def built(once):
    return cuda_build(once)


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def compiled(request, built):
    """What ptxas says, and the instructions of every kernel, by channels and blocks."""
    name = f"conv_sm90/{request.param}.cu"
    sass = run([cuda_tool("cuobjdump"), "-sass", str(built.objects[name])])
    kernels = {}
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        channels, blocks = re.match(r"\S*Li(\d+)ELi(\d)E", part).groups()
        kernels[int(channels), int(blocks)] = part
    return built.said[name], kernels


def test_no_kernel_spills_or_waits_for_its_products(compiled):
    log, kernels = compiled
    assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(
        kernels
    )
    # Launch bounds: 3 * 128 threads share 65536 registers. What multiplies gets more later.
    assert set(re.findall(r"Used (\d+) registers", log)) == {"168"}
    # Notes of ptxas on WGMMAs that it has to make wait, and on setmaxnreg if it ignores it.
    assert "C75" not in log, re.findall(r".*C75.*", log)[:3]


def test_every_tile_has_a_kernel_with_exactly_its_channels(compiled):
    _, kernels = compiled
    wanted = {
        (config.block_out, config.pixels // (64 if config.turns else 128))
        for c in CHANNELS
        for config in conv_sm90.configs(c)
    }
    assert set(kernels) >= wanted
    for (channels, _), sass in kernels.items():
        assert set(re.findall(r"HGMMA\.(\w+)\.F32", sass)) == {f"64x{channels}x16"}
        assert "HGMMA.64x8x16" not in sass, "WGMMAs are waited for where they are issued"


def test_instructions_are_those_of_hopper(compiled):
    _, kernels = compiled
    for name, sass in kernels.items():
        for instruction in (
            "UTMALDG.4D", "UTMALDG.3D", "UTMALDG.4D.MULTICAST", "UTMALDG.3D.MULTICAST",
            "UCGABAR_ARV", "UCGABAR_WAIT", "SYNCS.ARRIVE", "SYNCS.PHASECHK", "STG.E.128",
            "USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC",
        ):  # fmt: skip
            assert instruction in sass, f"{name} has no {instruction}"
        # Of other CTAs' shared memory, by generic addresses: where tiles have parts.
        channels, blocks = name
        assert ("LD.E.128" in sass) == (channels * blocks <= 256), name
        for instruction in ("LDL", "STL", "LDSM"):
            assert not re.search(rf"\b{instruction}\b", sass), f"{name} has {instruction}"


def operations(sass):
    """What a kernel does, one after the other, without operands but for those of these two."""
    line = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([^ ;]+)(.*?);", re.MULTILINE)
    found = line.findall(sass)
    detailed = ("WARPGROUP.DEPBAR", "BAR.SYNC")
    return [name + (words if name.startswith(detailed) else "") for name, words in found]


def test_they_weigh_little(compiled):
    """Instructions are 16 bytes each."""
    _, kernels = compiled
    assert 16 * sum(len(operations(sass)) for sass in kernels.values()) <= MEBIBYTES * 2**20


def places(operations, *beginnings):
    return [i for i, name in enumerate(operations) if name.startswith(beginnings)]


def test_the_turn_is_given_before_the_last_products_are_done(compiled):
    """A warpgroup waits for its turn, multiplies, lets the other one, waits for it all, stores."""
    _, kernels = compiled
    for name, sass in kernels.items():
        found = operations(sass)
        products, stores = places(found, "HGMMA"), places(found, "STG.E.128")
        (done,) = places(found, "WARPGROUP.DEPBAR.LE gsb0, 0x0")
        assert products[-1] < done < stores[0], name
        # Of strips and of weights that the loop has read, here and to other CTAs; then the turn.
        given = [i for i in places(found, "SYNCS.ARRIVE") if products[-1] < i < done]
        assert len(given) == 5, (name, given)
        before = [i for i in places(found, "SYNCS.PHASECHK") if i < products[0]]
        assert len(before) == 3, name  # The turn, a strip, and weights.
        # Warpgroups that store meet by themselves: 128 threads, at a barrier of their own.
        meetings = [found[i] for i in places(found, "BAR.SYNC") if done < i < stores[0]]
        assert len(meetings) == 2, (name, meetings)
        assert all(re.search(r"BAR\.SYNC\S* R\d+, R\d+", words) for words in meetings), meetings


def test_nothing_is_fenced_in_the_loop(compiled):
    """What was read there is given back without a release to the cluster, a fence of memory."""
    _, kernels = compiled
    for name, sass in kernels.items():
        found = operations(sass)
        (done,) = places(found, "WARPGROUP.DEPBAR.LE gsb0, 0x0")
        first, stored = places(found, "HGMMA")[0], places(found, "BAR.SYNC")
        loop = slice(first, min(i for i in stored if i > done))
        assert not places(found[loop], "MEMBAR", "CCTL", "ERRBAR"), name
        assert places(found, "MEMBAR.ALL.GPU"), f"{name}: CTAs of a cluster begin and end together"
