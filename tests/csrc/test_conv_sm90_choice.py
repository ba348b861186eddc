"""Which tiles the Hopper convolution has, and what it has to pass before it is taken."""

import itertools
import types

import pytest
import torch

from tests.csrc.hopper import CHANNELS, SMALL, SOURCES, Layer, last_stage, with_sources
from vovnet_fast import tuning
from vovnet_fast.backends import (
    _cuda_conv,
    conv_sm90,
    conv_sm90_tiles,
    conv_sm90_trial,
    cuda,
    reference,
)

pytestmark = with_sources

# --------------------------------------------------------------------------------------
# Splits
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SMALL)
@pytest.mark.parametrize("network", ["V-39-eSE", "V-99-eSE"])
def test_small_maps_keep_nine_processors_of_ten_busy(network, size):
    """The first of the splits on offer: CTAs for 132 processors, on average over the waves."""
    n, height, width = size
    found = {}
    for c_in, c_out, kernel in last_stage(network):
        pixels = (height, width) if kernel == 3 else (1, height * width)
        shape = conv_sm90_tiles.Shape(n, *pixels, c_in, c_out, kernel, True)
        on_offer = (*conv_sm90.configs(c_out, kernel), *conv_sm90_tiles.splits(shape, 132))
        best = max(on_offer, key=lambda c: conv_sm90_tiles.useful(c, shape, 132))
        found[c_in, c_out, kernel] = conv_sm90_tiles.work(best, shape, 132).busy
    assert min(found.values()) >= 0.9, found


def test_24_tiles_in_five_parts_are_120_ctas():
    shape = conv_sm90_tiles.Shape(1, 25, 42, 224, 224, 3)
    config = conv_sm90_tiles.splits(shape, 132)[0]
    assert config == conv_sm90.Config(128, 112, parts=5)
    found = conv_sm90_tiles.work(config, shape, 132)
    assert (found.tiles, round(found.busy * 132)) == (24, 120)
    # Of 36 taps of chunks a part has 7 or 8, and those of the last chunk are half as long.
    assert found.even == pytest.approx(126 / (5 * 28))
    without = max(conv_sm90_tiles.work(c, shape, 132).busy for c in conv_sm90.configs(224))
    assert without == pytest.approx(24 / 132)


def test_splits_are_on_offer_for_small_maps_alone(simulator):
    """And all of them have room in shared memory, and a name that says which they are."""
    large = conv_sm90_tiles.Shape(1, 200, 336, 128, 128, 3)
    assert conv_sm90_tiles.splits(large, 132) == ()
    for size in SMALL:
        for c_in, c_out, kernel in last_stage("V-99-eSE"):
            n, height, width = size
            pixels = (height, width) if kernel == 3 else (1, height * width)
            shape = conv_sm90_tiles.Shape(n, *pixels, c_in, c_out, kernel, True)
            found = conv_sm90_tiles.splits(shape, 132)
            assert len(found) <= conv_sm90_tiles.SPLITS
            for config in found:
                assert config.name.startswith(conv_sm90.SPLIT)
                assert conv_sm90.config_of(config.name, c_out, kernel) == config
                layer = Layer(*size, c_in, c_out, kernel=kernel)
                fields = dict(layer.plan(config).fields, pool_partials=1)
                strips, weights, taken = simulator.plan(fields)
                assert (strips >= 2, weights >= 3, taken <= 226 << 10) == (True,) * 3, config
    assert conv_sm90.config_of("conv-sm90 split 9 128x112", 224, 3) is None


def test_names_of_splits():
    assert conv_sm90.Config(128, 112, parts=5).name == "conv-sm90 split 5 128x112"
    assert conv_sm90.Config(128, 96, (2, 1), 4).name == "conv-sm90 split 4 128x96 cluster 2x1"


# --------------------------------------------------------------------------------------
# What is taken, and how
# --------------------------------------------------------------------------------------


def test_every_tile_fits_into_shared_memory_with_room_to_run_ahead(simulator):
    for c_out in CHANNELS:
        for config in conv_sm90.configs(c_out):
            for kernel, (h, w) in [(3, (25, 42)), (3, (200, 336)), (3, (9, 400)), (1, (50, 84))]:
                layer = Layer(1, h, w, 8, c_out, kernel=kernel)
                fields = dict(layer.plan(config).fields, pool_partials=1, c_in=4096)
                strips, weights, size = simulator.plan(fields)
                assert size <= 226 << 10, (config, kernel)
                assert strips >= 2, (config, kernel, strips)
                assert weights >= 3, (config, kernel, weights)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(kernel=5), "kernel must be 1 or 3, got 5"),
        (dict(dtype=2), "dtype code 2"),
        (dict(c_in=12), "multiple of 8 channels, got 12"),
        (dict(tile_w=4), "no tiles of 16 x 4 pixels"),
        (dict(tile_h=32), "no tiles of 32 x 8 pixels by 256 channels"),
        (dict(block_out=72), "no tiles"),
        (dict(cluster_pixels=9), "no clusters of 9 x 1"),
        (dict(cluster_pixels=3), "no clusters of 3 x 1"),
        (dict(block_out=128, parts=9), "no clusters of 1 x 1 tiles in 9 parts"),
        (dict(block_out=128, parts=3, cluster_pixels=4), "no clusters of 4 x 1 tiles in 3 parts"),
        (dict(block_out=128, parts=2, cluster_channels=3), "no parts of 3 tiles of channels"),
        (dict(block_out=128, kernel=1, parts=2), "2 parts of 1 taps and chunks"),
        (dict(block_out=160, tile_h=32, parts=2), "no parts of tiles of 32 x 8 pixels by 160"),
        (dict(block_out=112, parts=2, turns=1), "no parts of tiles of .* 112 channels in turns"),
        (dict(turns=1), "no tiles of 16 x 8 pixels by 256 channels in turns"),
        (dict(block_out=64, tile_h=32, turns=1), "no tiles of 32 x 8 pixels .* in turns"),
        (dict(c_out=204), "multiple of 8 channels, got 204"),
        (dict(add_c=12), "multiples of 8 channels, got 12 and 0"),
        (dict(add=(40, 4096, 512, 16), add_c=8), "multiples of 16 bytes"),
        (dict(mask=(32, 4096, 512, 12), mask_c=8), "multiples of 16 bytes"),
        (dict(x=(32, 4096, 512, 20)), "multiples of 16 bytes"),
        (dict(out=(40, 4096, 512, 16)), "multiples of 16 bytes"),
        (dict(out=(0, 0, 0, 0)), "multiples of 16 bytes"),
        (dict(n=1 << 25), "2\\^30 tiles"),
    ],
)
def test_what_cannot_be_is_said(wrong, words, simulator):
    fields = dict(
        x=(32, 1 << 20, 1 << 14, 64), out=(32, 1 << 20, 1 << 14, 256), add=None, mask=None,
        weight=32, scale=32, shift=32, pool_partials=None, n=1, height=100, width=100, c_in=64,
        c_out=256, add_c=0, mask_c=0, kernel=3,
        tile_h=16, tile_w=8, block_out=256, cluster_pixels=1, cluster_channels=1, parts=1,
        turns=0, relu=1, dtype=0,
    )  # fmt: skip
    simulator.plan(fields)
    with pytest.raises(AssertionError, match=words):
        simulator.plan({**fields, **wrong})


def test_tiles_follow_the_image():
    config = conv_sm90.Config(256, 160)
    assert config.tile(200, 336, 3) == (16, 16)
    assert config.tile(32, 8, 3) == (32, 8)
    assert config.tile(1, 67200, 1) == (1, 256)


def test_channels_are_padded_only_where_nothing_wide_divides_them():
    for c_out in (*CHANNELS, 320, 384, 448, 512, 768, 1024):
        for config in conv_sm90.configs(c_out):
            assert c_out % config.block_out == 0
    names = [c.name.removeprefix("conv-sm90 ") for c in conv_sm90.configs(224)]
    assert names == [
        "256x112", "256x112 cluster 2x1", "256x112 cluster 2x2",
        "128x224", "128x224 cluster 2x1", "128x224 cluster 4x1",
        "turns 128x112", "turns 128x112 cluster 2x1", "turns 128x112 cluster 4x2",
    ]  # fmt: skip
    for c_out in (1472, 1888, 2144):  # Concat buffers.
        for config in conv_sm90.configs(c_out):
            assert config.block_out >= 160
            assert -c_out % config.block_out < 0.05 * c_out
    assert conv_sm90.configs(56) == conv_sm90.configs(100) == []


def test_refusals_name_what_is_wrong():
    def refused(*shape, stride=1, **options):
        layer = Layer(*shape, **options)
        return conv_sm90.refusal(layer.x, layer.weight, layer.out, stride=stride)

    assert refused(1, 5, 5, 16, 80) is None
    assert refused(1, 1, 1, 16, 80) is None
    assert "float32" in refused(1, 5, 5, 16, 80, dtype=torch.float32)
    assert "stride 2" in refused(1, 5, 5, 16, 80, stride=2)
    assert "56 output channels" in refused(1, 5, 5, 16, 56)
    assert "100 output channels" in refused(1, 5, 5, 16, 100)
    assert "12 input channels" in refused(1, 5, 5, 12, 80)
    layer = Layer(2, 5, 5, 16, 80)
    assert "x does not start" in conv_sm90.refusal(
        layer.x[..., 4:12], layer.weight[..., :8], layer.out
    )
    tensors = (layer.x, layer.weight, layer.out)
    assert "mask does not start" in conv_sm90.refusal(*tensors, mask=layer.out[..., 4:12])
    assert "add has 12 channels" in conv_sm90.refusal(*tensors, add=layer.out[..., :12])
    expanded = layer.x[:1].expand(2, -1, -1, -1)
    assert "x has strides" in conv_sm90.refusal(expanded, layer.weight, layer.out)


# --------------------------------------------------------------------------------------
# The trials that it has to pass on a GPU, on the simulator
# --------------------------------------------------------------------------------------


@pytest.fixture
def simulated(monkeypatch, simulator):
    """Launches run on the simulator; returns the configurations that ran."""
    ran = []

    def run(config, x, weight, scale, shift, out, *, relu=True, pool=False, **beside):
        launch = conv_sm90.plan(config, x, weight, scale, shift, out, relu=relu, **beside)
        shape = (x.shape[0], launch.tiles, weight.shape[0])
        partials = torch.full(shape, float("nan")) if pool else None
        pointer = None if partials is None else partials.data_ptr()
        simulator.run(dict(launch.fields, pool_partials=pointer), ctas=config.size, seed=len(ran))
        ran.append(config)
        return partials

    monkeypatch.setattr(conv_sm90, "run_config", run)
    return ran


TRIED = conv_sm90_trial.Map((1, 9, 21), {3: 24, 1: 456}, across=2, times=1)


def of_tiles(block=64):
    return conv_sm90_trial.of_tiles(torch.device("cpu"), torch.float16, TRIED, block)


def test_what_is_right_passes_its_trials(simulated):
    trials = list(of_tiles())
    assert len(trials) > 60
    for words, trial in trials[::7]:
        assert trial() is None, words
    ran = {(config.turns, config.parts > 1, config.cluster != (1, 1)) for config in simulated}
    assert len(ran) > 4, ran


@pytest.mark.parametrize("spoil", ["a number", "a sum", "beside"])
def test_what_is_wrong_does_not(spoil, simulated, monkeypatch):
    run = conv_sm90.run_config

    def spoilt(config, x, weight, scale, shift, out, **options):
        partials = run(config, x, weight, scale, shift, out, **options)
        if spoil == "a number":
            out[0, 8, 20, -1] += 8
        elif spoil == "beside":
            out.as_strided((1,), (1,), out.storage_offset() + out.shape[3]).zero_()
        elif partials is not None:
            partials[0, -1, 5] += 100
        return partials

    monkeypatch.setattr(conv_sm90, "run_config", spoilt)
    words, trial = next(of_tiles())
    assert "128x64, 1x1 forward" in words
    assert ("outside its slot" if spoil == "beside" else "error") in trial()


def test_clusters_that_a_gpu_has_no_room_for_are_no_failure(simulated, monkeypatch):
    """But for those of one CTA, and where the error is an earlier launch's."""
    words = "conv_sm90: cannot launch 1 clusters of 8: cudaErrorInvalidClusterSize"
    assert '"cannot launch "' in (SOURCES / "launch.cu").read_text()

    def refused(config, *tensors, **options):
        raise RuntimeError(words)

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(conv_sm90, "run_config", refused)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    trials = dict(itertools.islice(of_tiles(), 5))
    [alone], others = [list(trials.values())[i] for i in (slice(1), slice(1, None))]
    assert [trial() for trial in others] == [None] * 4
    with pytest.raises(RuntimeError, match="cannot launch"):
        alone()
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="illegal memory"):
        others[0]()
    words = "CUDA error: an illegal memory access was encountered"
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(RuntimeError, match="illegal memory"):
        others[0]()


def test_every_kernel_has_trials_that_it_can_run(simulator):
    """On the large map the CTAs of any H100 have several tiles each, also of both warpgroups."""
    shared = set()
    for pixels in (conv_sm90_trial.SMALL, conv_sm90_trial.large(132)):
        for block in conv_sm90_tiles.WIDTHS:
            for kernel in (1, 3):
                forms = list(conv_sm90_trial.forms(pixels, block, kernel))
                assert len({config.name for config in forms}) == len(forms)
                alone = {config for config in forms if config.size == 1}
                assert alone == set(conv_sm90_tiles.kernels(block))
                shared |= {block for config in forms if config.parts > 1}
                c_in, c_out = pixels.c_in[kernel], pixels.across * block
                n, h, w = pixels.size
                layer = Layer(1, h, w, c_in, c_out, kernel=kernel)
                for config in forms:
                    fields = layer.plan(config).fields
                    simulator.plan(dict(fields, n=n, pool_partials=1))
                    shape = conv_sm90_tiles.Shape(
                        n, fields["height"], fields["width"], c_in, c_out, kernel
                    )
                    if pixels.times > 1:
                        work = conv_sm90_tiles.work(config, shape, 132)
                        assert work.tiles * config.parts >= 2 * 132, config
    # What parts of the widest would hand over takes the room of the rings.
    assert shared == {*conv_sm90_tiles.WIDTHS} - {256, 224}


def test_the_cuda_backend_measures_it_against_aten(monkeypatch, tmp_path):
    layer, ran = Layer(1, 5, 5, 16, 80), []
    engine = conv_sm90.configs(80)[0].name

    def run(engine, *tensors, relu, pool):
        ran.append(engine)
        return reference.conv(*tensors, relu=relu, pool=pool)

    def aten(*tensors, **options):
        ran.append("aten")
        return reference.conv(*tensors, **options)

    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "may_measure", lambda device: True)
    monkeypatch.setattr(tuning, "_announce", lambda: None)
    monkeypatch.setattr(tuning, "_device_timer", lambda device: lambda run: (run(), 1.0)[1])
    monkeypatch.setattr(conv_sm90, "engines", lambda *args, **kwargs: [engine])
    monkeypatch.setattr(conv_sm90, "run", run)
    monkeypatch.setattr(_cuda_conv, "_ops", lambda: types.SimpleNamespace(conv=aten))
    cuda.conv(*layer.tensors, pool=True)
    assert set(ran) == {"aten", engine}
    torch.testing.assert_close(layer.out.double(), layer.exact(), rtol=1e-2, atol=1e-2)


def test_the_cuda_backend_offers_it_for_gradients_of_inputs(monkeypatch):
    layer, ran, seen = Layer(1, 5, 5, 80, 80), [], []
    engine = conv_sm90.configs(80)[0].name

    def choose(device, problem, candidates, static, run, **options):
        seen.append(candidates)
        return engine

    def run(name, g, packed, scale, shift, out, **options):
        ran.append((name, scale, shift, options))

    ops = types.SimpleNamespace(pack_transposed=lambda weight, scale, out: None)
    monkeypatch.setattr(tuning, "choose", choose)
    monkeypatch.setattr(conv_sm90, "engines", lambda *args, **kwargs: [engine])
    monkeypatch.setattr(conv_sm90, "run", run)
    monkeypatch.setattr(_cuda_conv, "_ops", lambda: ops)
    add, mask = layer.beside(80), layer.beside(80)
    cuda.conv_input_grad(layer.x, layer.weight, None, layer.out, add=add, mask=mask)
    assert "aten" in seen[0]
    assert engine in seen[0]
    assert ran == [(engine, None, None, dict(add=add, mask=mask))]
    # Those of a stride are no convolution of the gradient.
    wide = torch.empty(1, 10, 10, 80, dtype=layer.x.dtype)
    monkeypatch.setattr(
        _cuda_conv, "run_input_grad_engine", lambda name, *args, **kw: ran.append(name)
    )
    cuda.conv_input_grad(layer.x, layer.weight, None, wide, stride=2)
    assert ran[1:] == ["aten"]
