"""The Hopper convolution in e4m3: its kernel on a simulated GPU, and on a GPU.

As test_conv_sm90.py does it, against vovnet_fast/arithmetic/fp8.py. The simulator adds products of
e4m3 up as Hopper's tensor cores do, to 14 bits.
"""

import ctypes
import dataclasses
import random

import pytest
import torch

from tests.csrc.hopper import CHANNELS, SMALL, Simulator, View, build, last_stage, with_sources
from vovnet_fast.arithmetic import fp8
from vovnet_fast.arithmetic.layers import QuantizedConv
from vovnet_fast.backends import (
    conv_sm90,
    conv_sm90_fp8,
    conv_sm90_fp8_trial,
    conv_sm90_tiles,
    conv_sm90_trial,
)
from vovnet_fast.selfcheck import eight_bits as check
from vovnet_fast.selfcheck import sources

TILES = {
    (pixels, block)
    for pixels, blocks in conv_sm90_tiles._BLOCKS[1].items()
    for block in blocks
}  # fmt: skip

pytestmark = [
    with_sources,
    pytest.mark.skipif(fp8.why_not() is not None, reason=str(fp8.why_not())),
]

# --------------------------------------------------------------------------------------
# The simulator
# --------------------------------------------------------------------------------------


class Params(ctypes.Structure):
    """ConvSm90Fp8Params."""

    _fields_ = [
        *((name, View) for name in ("x", "out", "feature")),
        *(
            (name, ctypes.c_void_p)
            for name in ("weight", "bias", "multiplier", "unit", "pool_partials")
        ),
        *((name, ctypes.c_int64) for name in ("n", "height", "width", "c_in", "c_out")),
        *((name, ctypes.c_int32) for name in ("kernel", "tile_h", "tile_w", "block_out")),
        *((name, ctypes.c_int32) for name in ("cluster_pixels", "cluster_channels", "parts")),
    ]


class E4m3Simulator(Simulator):
    def struct(self, fields):
        views = {name: View() for name in ("out", "feature") if fields[name] is None}
        given = {k: View(*v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return Params(**given | views)

    def check(self, fields):
        """Whether the binding takes them."""
        self.call("conv_sm90_check", ctypes.byref(self.struct(fields)))


@pytest.fixture(scope="session")
def simulator(once):
    name = "simulator.so"
    folder = once.folder(
        "conv_sm90_e4m3", lambda folder: build("conv_sm90_e4m3_simulator.cpp", folder / name)
    )
    return E4m3Simulator(folder / name)


def test_the_simulator_rounds_to_e4m3_as_torch_does(simulator):
    """Every number of e4m3, what lies half-way between two, and their neighbours."""
    bits, number = simulator.library.e4m3_bits, simulator.library.e4m3_number
    bits.argtypes, bits.restype = [ctypes.c_float], ctypes.c_int
    number.restype = ctypes.c_float
    every = torch.arange(256, dtype=torch.uint8)
    exact = every.view(fp8.ACTIVATION).float()
    assert torch.equal(torch.tensor([number(i) for i in every.tolist()]).nan_to_num(9e9),
                       exact.nan_to_num(9e9))  # fmt: skip
    known = exact[~exact.isnan()].sort().values
    half = (known[1:] + known[:-1]) / 2
    x = torch.cat([known, half, *(torch.nextafter(half, torch.tensor(s)) for s in (-1e9, 1e9))])
    x = torch.cat([x, torch.tensor([449.0, 464.0, 465.0, 1e9, -1e9, float("inf"), float("nan")])])
    wanted = fp8.to_e4m3(x).view(torch.uint8).tolist()
    found = [bits(y) for y in x.tolist()]
    assert [b & 0x7F for b in found] == [b & 0x7F for b in wanted]
    signs = [(b ^ w) & 0x80 for b, w, y in zip(found, wanted, x.tolist()) if y == y and y != 0]
    assert not any(signs)


# --------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------


class Layer:
    """Arguments of one call, in poisoned slots, and what it should compute."""

    def __init__(self, n, h, w, c_in, c_out, *, kernel=3, written="slot", crop=False, seed=None,
                 device="cpu"):  # fmt: skip
        seed = random.randrange(1 << 30) if seed is None else seed
        self.words = f"seed {seed}"
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(device)

        products = kernel * kernel * c_in
        weight = randn(c_out, kernel, kernel, c_in).to(fp8.ACTIVATION)
        multiplier = (randn(c_out).abs() + 0.1) * 8 / products**0.5
        bias, unit = randn(c_out) * products**0.5, randn(c_out).abs() * 0.01
        self.layer = QuantizedConv(weight, bias, multiplier, unit, 1, None, unit, None, 1.0)
        self.slots, self.crop, self.device = [], crop, torch.device(device)
        self.x = self.slot((n, h, w, c_in), fp8.ACTIVATION)
        self.x.copy_(randn(n, h, w, c_in).relu())
        size = n, h, w, c_out
        self.out = None if written == "feature" else self.slot(size, fp8.ACTIVATION)
        self.feature = None if written == "slot" else self.slot(size, torch.float32)

    def slot(self, shape, dtype):
        """With poison on all sides, and between the rows too if it is cropped."""
        _, h, w, c = shape
        pixel, edge = c + 32, 2 * int(self.crop)
        row = (w + edge) * pixel
        stride = ((h + edge) * row, row, pixel, 1)
        self.slots.append(check.ByteSlot(shape, stride, dtype, self.device))
        return self.slots[-1].view

    def plan(self, config):
        return conv_sm90_fp8.plan(config, self.x, self.layer, self.out, self.feature)

    def written(self):
        return [view for view in (self.out, self.feature) if view is not None]

    def exact(self):
        """What is written, by the reference."""
        x, out = self.x.contiguous(), None if self.out is None else torch.empty_like(self.out)
        feature = None if self.feature is None else torch.empty_like(self.feature)
        fp8.conv(x, self.layer, out, feature=feature)
        return [view for view in (out, feature) if view is not None]

    def check(self, partials=None, slack=check.SLACK):
        exact, found = self.exact(), [view.clone() for view in self.written()]
        if partials is not None:
            # What is stored was summed, to the last digits of fp32.
            stored = self.out.double().sum((1, 2))
            torch.testing.assert_close(partials.sum(1).double(), stored, rtol=1e-5, atol=1e-4)
        for ours, theirs in zip(found, exact, strict=True):
            apart = check.distance(ours, theirs, "fp8", slack)
            assert apart <= 1, f"{apart} apart, {self.words}"
        if self.out is not None:
            assert len(self.out.float().unique()) > 2 or self.out.numel() < 500
        source = self.x.clone()
        for slot in self.slots:
            assert slot.untouched(), "it wrote outside its slot"
        self.x.copy_(source)


def by_themselves(c_out, kernel=3):
    return [c for c in conv_sm90.configs(c_out, kernel, 1) if c.cluster == (1, 1)]


def simulate(simulator, layer, config, *, pool=False, slack=check.SLACK, **timing):
    launch = layer.plan(config)
    partials, pointer = None, None
    c_out = layer.layer.weight.shape[0]
    if pool:
        partials = torch.full((layer.x.shape[0], launch.tiles, c_out), float("nan"))
        pointer = partials.data_ptr()
    fields = dict(launch.fields, pool_partials=pointer)
    simulator.check(fields)
    fetched = simulator.run(fields, **timing)
    layer.check(partials, slack)
    n, h, w, c_in, c_out = (fields[k] for k in ("n", "height", "width", "c_in", "c_out"))
    shape = conv_sm90_tiles.Shape(n, h, w, c_in, c_out, fields["kernel"], pool, 1)
    assert fetched == conv_sm90_tiles.work(config, shape, timing.get("ctas", 2)).fetched


# --------------------------------------------------------------------------------------
# Numbers, on the simulator
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pixels", "block"), sorted(TILES))
def test_every_tile_is_right(pixels, block, simulator):
    config = conv_sm90.Config(pixels, block)
    simulate(simulator, Layer(1, 9, 11, 144, block, written="both"), config, pool=True)
    simulate(simulator, Layer(2, 9, 17, 160, block, kernel=1), config, pool=True)


@pytest.mark.parametrize("written", ["slot", "feature", "both"])
@pytest.mark.parametrize("c_in", [16, 32, 80, 96, 128, 272])
def test_every_number_of_input_channels(c_in, written, simulator):
    """Down to chunks of one, two and three steps; what lies beside a slot is poison."""
    for kernel in (1, 3):
        layer = Layer(1, 5, 7, c_in, 80, kernel=kernel, written=written)
        simulate(simulator, layer, conv_sm90.Config(128, 80), pool=written != "feature")


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (17, 9), (16, 33)])
def test_odd_sizes(size, kernel, simulator):
    for crop in (False, True):  # Cropped rows do not follow each other.
        layer = Layer(2, *size, 48, 64, kernel=kernel, crop=crop, written="both")
        simulate(simulator, layer, conv_sm90.Config(128, 64), pool=True)


def test_widths_are_those_of_tiles_or_padded(simulator):
    for c_out in (144, 224, 320):
        for config in by_themselves(c_out):
            layer = Layer(1, 9, 15, 48, c_out, written="both")
            simulate(simulator, layer, config, pool=True, ctas=3)


def test_weights_stay_where_they_have_room(simulator):
    config = conv_sm90.Config(256, 64)
    for c_in, resident in ((128, True), (144, False)):
        layer = Layer(2, 17, 40, c_in, 64)
        shape = conv_sm90_tiles.Shape(2, 17, 40, c_in, 64, 3, itemsize=1)
        assert conv_sm90_tiles.work(config, shape, 2).resident == resident
        for late in (False, True):
            simulate(simulator, layer, config, late_copies=late)


@pytest.mark.parametrize("widths", [(768, *[192] * 5), (256, *[160] * 5)])
def test_1x1_over_a_concat_buffer(widths, simulator):
    """All of a block's slots at once, in weights of the slots' scales."""
    layer = Layer(1, 9, 29, sum(widths), 256, kernel=1, written="both")
    for i, slot in enumerate(layer.layer.weight.float().split(widths, dim=3)):
        begin = sum(widths[:i])
        scaled = (slot * 2.0 ** -(i % 3)).to(fp8.ACTIVATION)
        layer.layer.weight[..., begin : begin + widths[i]] = scaled
    for config in (conv_sm90.Config(256, 128), conv_sm90.Config(128, 128, (1, 2))):
        simulate(simulator, layer, config, pool=True, ctas=1)


def test_long_sums_do_not_lose_what_tensor_cores_cut(simulator):
    """Sums of 8192 products without signs: what is cut of each WGMMA's would add up."""
    layer = Layer(1, 2, 8, 8192, 64, kernel=1, written="feature")
    layer.layer.weight.copy_(layer.layer.weight.float().abs())
    layer.layer.bias.zero_()
    layer.layer.unit.fill_(1)
    launch = layer.plan(conv_sm90.Config(128, 64))
    simulator.run(dict(launch.fields, pool_partials=None))
    (exact,) = layer.exact()
    error = ((layer.feature - exact) / exact).abs().max().item()
    assert 0 < error < 2.0**-10


def test_what_is_beyond_448_becomes_448(simulator):
    layer = Layer(1, 5, 9, 48, 64, written="both")
    layer.layer.multiplier.mul_(1e3)
    layer.layer.multiplier[:2] = torch.tensor([float("inf"), 1e38])
    simulate(simulator, layer, conv_sm90.Config(128, 64), pool=True)


@pytest.mark.parametrize("kernel", [1, 3])
def test_nan_goes_where_it_goes_in_the_reference(kernel, simulator):
    layer = Layer(1, 8, 16, 32, 64, kernel=kernel, written="both")
    layer.x[0, 2, 3, 5] = float("nan")
    layer.layer.bias[7] = float("nan")
    simulator.run(dict(layer.plan(conv_sm90.Config(128, 64)).fields, pool_partials=None))
    out, feature = layer.exact()
    assert torch.equal(layer.out.float().isnan(), out.float().isnan())
    assert torch.equal(layer.feature.isnan(), feature.isnan())


# --------------------------------------------------------------------------------------
# Timing, clusters and parts, on the simulator
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("late_products", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_rings_hold_whatever_the_timing(late_copies, late_products, kernel, simulator):
    """Many tiles for one CTA: every stage is used again and again, also across tiles."""
    layer = Layer(1, 17, 24, 272 if kernel == 3 else 912, 128, kernel=kernel)
    simulate(
        simulator, layer, conv_sm90.Config(128, 64), pool=True, ctas=1,
        late_copies=late_copies, late_products=late_products,
    )  # fmt: skip


@pytest.mark.parametrize("cluster", [(2, 1), (1, 2), (2, 2), (1, 3), (4, 2)])
def test_clusters_share_and_may_reach_beyond_the_image(cluster, simulator):
    for kernel, late in ((1, True), (3, False)):
        layer = Layer(3, 10, 17, 48, 192, kernel=kernel, written="both")
        config = conv_sm90.Config(128, 64, cluster)
        simulate(simulator, layer, config, pool=True, ctas=8, late_copies=late)


@pytest.mark.parametrize("written", ["slot", "both"])
@pytest.mark.parametrize(
    ("c_out", "tile", "parts"),
    [(64, (256, 64), 5), (112, (256, 112), 2), (160, (128, 160), 3), (144, (128, 80), 8)],
)
def test_parts_add_up(c_out, tile, parts, written, simulator):
    """Parts end within columns; of the last tile not all channels are there."""
    config = conv_sm90.Config(*tile, parts=parts)
    layer = Layer(1, 9, 11, 144, c_out, written=written)
    simulate(simulator, layer, config, pool=True, ctas=parts)
    config = dataclasses.replace(config, cluster=(2, 1)) if parts < 5 else config
    layer = Layer(2, 17, 24, 1040, c_out, kernel=1, written=written, crop=True)
    simulate(simulator, layer, config, pool=True, ctas=8, late_products=False)


@pytest.mark.parametrize("size", SMALL[:1])
def test_splits_fit_and_have_names(size, simulator):
    for c_in, c_out, kernel in last_stage("V-39-eSE"):
        pixels = size[1:] if kernel == 3 else (1, size[1] * size[2])
        shape = conv_sm90_tiles.Shape(size[0], *pixels, c_in, c_out, kernel, True, 1)
        for config in conv_sm90_tiles.splits(shape, 132):
            assert conv_sm90.config_of(config.name, c_out, kernel, 1) == config
            fields = dict(Layer(*size, c_in, c_out, kernel=kernel).plan(config).fields)
            strips, weights, taken = simulator.plan(fields | dict(pool_partials=1))
            assert (strips >= 2, weights >= 3, taken <= 226 << 10) == (True,) * 3, config


def test_every_tile_fits_with_room_to_run_ahead(simulator):
    for c_out in CHANNELS:
        for config in conv_sm90.configs(c_out, 3, 1):
            for kernel, (h, w) in [(3, (25, 42)), (3, (200, 336)), (1, (50, 84))]:
                layer = Layer(1, h, w, 16, c_out, kernel=kernel)
                fields = dict(layer.plan(config).fields, pool_partials=1, c_in=4096)
                strips, weights, taken = simulator.plan(fields)
                assert (strips >= 2, weights >= 3, taken <= 226 << 10) == (True,) * 3, config


# --------------------------------------------------------------------------------------
# What is taken
# --------------------------------------------------------------------------------------


def legal():
    """Fields that are taken, and the memory that they tell of."""
    layer = Layer(1, 9, 11, 48, 80, written="both", seed=0)
    return dict(layer.plan(conv_sm90.Config(128, 80)).fields, pool_partials=None), layer


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(kernel=5), "kernel must be"),
        (dict(tile_w=0), "tile_h, tile_w and block_out must be from 1 to 256"),
        (dict(parts=9), "from 1 to 8"),
        (dict(out=None, feature=None), "out or feature must be"),
        (dict(out=None, pool_partials=16), "pool_partials must be None where out is"),
        (dict(weight=None), "weight must be the address of a tensor"),
        (dict(bias=None), "bias must be"),
        (dict(multiplier=2), "multiplier must be"),
        (dict(unit=None), "unit must be"),
        (dict(n=-1), "n must be at least 0"),
        (dict(c_in=2**62), "c_in must be less than"),
    ],
)
def test_the_binding_refuses(wrong, words, simulator):
    fields, _layer = legal()
    simulator.check(fields)
    with pytest.raises(AssertionError, match=words):
        simulator.check({**fields, **wrong})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(c_in=40), "multiple of 16 channels, got 40"),
        (dict(c_out=72), "multiple of 16 channels, got 72"),
        (dict(block_out=256), "no tiles of"),
        (dict(block_out=160, tile_h=32, tile_w=8), "no tiles of 32 x 8 pixels by 160"),
        (dict(block_out=128, tile_h=32, tile_w=8, parts=2), "no parts of tiles"),
        (dict(block_out=192, parts=2), "no parts of tiles"),
        (dict(x=(32, 4096, 512, 24)), "multiples of 16 bytes"),
        (dict(out=(40, 4096, 512, 16)), "multiples of 16 bytes"),
        (dict(feature=(32, 4096, 512, 2)), "the feature must have"),
        (dict(out=None, feature=None), "nowhere to write to"),
        (dict(out=None, pool_partials=16), "pool partials are sums of out"),
        (dict(kernel=1, parts=2), "2 parts of 1 taps and chunks"),
    ],
)
def test_what_cannot_be_is_said(wrong, words, simulator):
    fields, _layer = legal()
    simulator.plan(fields)
    with pytest.raises(AssertionError, match=words):
        simulator.plan({**fields, **wrong})


def test_no_fields_crash_the_binding(simulator):
    """Spoilt by chance: either it is refused, or nothing that matters was."""
    chance = random.Random(0)
    numbers = (-1, 0, 1, 7, 2**20, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**62))
    said = []
    for _ in range(2000):
        fields, _layer = legal()
        for name in chance.sample(sorted(fields), chance.choice((1, 1, 2))):
            value = fields[name]
            if isinstance(value, tuple):
                where = chance.randrange(4)
                spoilt = chance.choice((0, 1, 4095) if where == 0 else numbers)
                fields[name] = (*value[:where], spoilt, *value[where + 1 :])
            elif name in ("weight", "bias", "multiplier", "unit", "pool_partials"):
                fields[name] = chance.choice((None, 1, 4095, 2**64 - 1))
            else:
                fields[name] = chance.choice(numbers)
        try:
            simulator.check(fields)
            if all(fields[name] > 0 for name in ("n", "height", "width", "c_in", "c_out")):
                simulator.plan(fields)
        except AssertionError as error:
            said.append(str(error))
    assert all(said)
    assert len(said) > 1000


def test_refusals_name_what_is_wrong():
    def refused(*shape, stride=1, written="both", **options):
        layer = Layer(*shape, written=written, **options)
        tensors = layer.x, layer.layer.weight, layer.out, layer.feature
        return conv_sm90_fp8.refusal(*tensors, stride=stride)

    assert refused(1, 5, 5, 16, 80) is None
    assert refused(1, 1, 1, 16, 80, written="slot") is None
    assert refused(1, 5, 5, 16, 80, written="feature") is None
    assert "stride 2" in refused(1, 5, 5, 16, 80, stride=2)
    assert "56 output channels" in refused(1, 5, 5, 16, 56)
    assert "72 output channels" in refused(1, 5, 5, 16, 72)
    assert "24 input channels" in refused(1, 5, 5, 24, 80)
    layer = Layer(2, 5, 5, 32, 80, written="both")
    weight, out, feature = layer.layer.weight, layer.out, layer.feature
    refusal = conv_sm90_fp8.refusal
    assert "float32" in refusal(layer.x.float(), weight, out, feature)
    assert "x does not start" in refusal(layer.x[..., 8:24], weight[..., :16], out, feature)
    assert "feature does not start" in refusal(layer.x, weight, out, feature[..., 1:])
    expanded = layer.x[:1].expand(2, -1, -1, -1)
    assert "x has strides" in refusal(expanded, weight, out, feature)


def test_it_is_on_offer_where_that_of_fp16_is(monkeypatch):
    layer = Layer(1, 5, 5, 16, 80)
    arguments = layer.x, layer.layer.weight, layer.out, None
    monkeypatch.setattr(conv_sm90, "why_not", lambda device, engine, function: "not here")
    assert conv_sm90_fp8.why_not(torch.device("cuda")) == "not here"
    assert conv_sm90_fp8.engines(*arguments) == []
    monkeypatch.setattr(conv_sm90_fp8, "why_not", lambda device: None)
    monkeypatch.setattr(conv_sm90_fp8, "_processors", lambda device: 132)
    found = conv_sm90_fp8.engines(*arguments)
    assert found[0] == "conv-sm90 256x80"
    assert conv_sm90_fp8.engines(*arguments, stride=2) == []
    assert all(conv_sm90.config_of(name, 80, 3, 1) for name in found)


@pytest.fixture
def simulated(simulator, monkeypatch):
    """It runs on the simulator, as on a GPU of 132 processors. What it has run."""
    ran = []

    def launch(device, **fields):
        ran.append(fields)
        simulator.check(fields)
        simulator.run(fields, ctas=8)

    monkeypatch.setattr(conv_sm90_fp8, "_launch", launch)
    monkeypatch.setattr(conv_sm90_fp8, "_processors", lambda device: 132)
    return ran


TRIED = conv_sm90_trial.Map((1, 9, 21), conv_sm90_fp8_trial.WHOLE, across=2, times=1)


def of_tiles(block=64):
    return conv_sm90_fp8_trial.of_tiles(torch.device("cpu"), TRIED, block)


def test_what_is_right_passes_its_trials(simulated):
    trials = list(of_tiles())
    assert len(trials) > 20
    for words, trial in trials[::5]:
        assert trial() is None, words
    assert (
        len({(f["parts"] > 1, f["cluster_pixels"], f["cluster_channels"]) for f in simulated}) > 3
    )


@pytest.mark.parametrize("spoil", ["a number", "a sum", "a feature", "beside"])
def test_what_is_wrong_does_not(spoil, simulated, monkeypatch):
    run = conv_sm90_fp8.run_config

    def spoilt(config, x, layer, out, *, feature, pool):
        partials = run(config, x, layer, out, feature=feature, pool=pool)
        if spoil == "a number":
            out.view(torch.uint8)[0, 8, 20, -1] ^= 0x20
        elif spoil == "a feature":
            feature[0, 8, 20, 0] += 1
        elif spoil == "beside":
            out.view(torch.uint8).as_strided((1,), (1,), out.storage_offset() - 1).zero_()
        else:
            partials[0, -1, 5] += 100
        return partials

    monkeypatch.setattr(conv_sm90_fp8, "run_config", spoilt)
    _, trial = next(of_tiles())
    assert trial() is not None


def test_every_kernel_has_trials_that_it_can_run(simulator):
    tried = set()
    large = conv_sm90_trial.large(132)._replace(c_in={3: 144, 1: 208})
    for pixels in (TRIED._replace(size=conv_sm90_trial.SMALL.size), large):
        for block in conv_sm90_tiles.WIDTHS:
            for kernel in (1, 3):
                c_out = pixels.across * block
                layer = Layer(1, *pixels.size[1:], pixels.c_in[kernel], c_out, kernel=kernel)
                for config in conv_sm90_trial.forms(pixels, block, kernel, 1):
                    tried.add((config.pixels, config.block_out))
                    assert not config.turns
                    fields = dict(layer.plan(config).fields, n=pixels.size[0], pool_partials=1)
                    simulator.plan(fields)
    assert tried == TILES


def test_verdicts_depend_on_what_is_tried():
    names = {path.name for path in sources.files("conv_sm90_fp8_trial", "conv")}
    assert {"conv_sm90_fp8.py", "conv_sm90_tiles.py", "fp8.py", "eight_bits.py"} <= names


# --------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setenv(conv_sm90.ENVIRONMENT, "1")
    device = torch.device("cuda")
    reason = conv_sm90_fp8.why_not(device)
    if reason is not None:
        pytest.skip(reason)
    return device


def run_all(layer, *, pool=False):
    weight = layer.layer.weight
    found = conv_sm90_fp8.engines(layer.x, weight, layer.out, layer.feature)
    assert found
    for engine in found:
        for slot in layer.slots[1:]:
            slot.clear()
        partials = conv_sm90_fp8.run(
            engine, layer.x, layer.layer, layer.out, feature=layer.feature, pool=pool
        )
        layer.check(partials)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("written", ["slot", "feature", "both"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("c_out", CHANNELS)
def test_gpu_every_number_of_output_channels(c_out, kernel, written, gpu):
    for c_in in (16, 128, 160, 224):
        layer = Layer(2, 33, 50, c_in, c_out, kernel=kernel, written=written, device=gpu)
        run_all(layer, pool=written != "feature")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (17, 9), (200, 336), (13, 21)])
def test_gpu_odd_sizes(size, kernel, gpu):
    for crop in (False, True):
        layer = Layer(2, *size, 160, 160, kernel=kernel, crop=crop, written="both", device=gpu)
        run_all(layer, pool=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("c_in", [768, 1472, 2144, 8192])
def test_gpu_1x1_over_a_concat_buffer(c_in, gpu):
    run_all(Layer(2, 25, 42, c_in, 768, kernel=1, written="both", device=gpu), pool=True)
