"""The extension's ops in eight bits: the integers of :mod:`vovnet_fast.arithmetic.int8`, all."""

import time

import pytest
import torch

from tests.backends.cpu_engines import engine_combinations, instruction_set
from tests.extension_cases import require
from vovnet_fast import tuning
from vovnet_fast.arithmetic import LEVELS
from vovnet_fast.arithmetic import int8 as wanted
from vovnet_fast.arithmetic.layers import (
    QuantizedConv,
    QuantizedDepthwise,
    QuantizedGate,
    QuantizedSum,
)
from vovnet_fast.backends import _extension
from vovnet_fast.backends.cpu import int8, int8_winograd, packing, recording, winograd
from vovnet_fast.ops.max_pool import output_size

ENGINES = engine_combinations("int8_conv_engines")
WINOGRAD = [pair for pair in ENGINES if pair[0] in int8_winograd.NAMES]
BYTES = [pair for pair in ENGINES if pair not in WINOGRAD]
WORDS = [pair for pair in ENGINES if pair[0] == int8.WORDS]
ISAS = ["baseline"] if _extension.why_not("cpu") else _extension.load("cpu").isas()

SHAPES = [
    # n, h, w, c_in, c_out, kernel, stride
    (1, 7, 9, 64, 32, 3, 1),
    (2, 13, 5, 80, 48, 3, 1),  # a chunk that is not full, a tile alone
    (1, 20, 33, 160, 96, 3, 2),
    (2, 9, 11, 200, 40, 1, 1),
    (1, 3, 3, 5, 7, 3, 1),  # all taps of a pixel in one chunk
    (1, 30, 40, 64, 64, 1, 1),
    (1, 1, 1, 17, 16, 3, 2),
    (1, 6, 4, 448, 33, 3, 1),  # sums that are put aside
    (2, 33, 7, 1024, 16, 1, 1),
]

GUARD = 77
LEFT, RIGHT = 3, 5
"""Channels beside a slot."""


@pytest.fixture(autouse=True)
def _extension_is_there():
    require("cpu")


def integers(low, high, *shape, dtype):
    """Between both, ends included, which come up more often than others."""
    x = torch.randint(low, high + 1, shape)
    ends = torch.randint(0, 8, shape)
    x = torch.where(ends == 0, low, torch.where(ends == 1, high, x))
    return x.to(dtype)


def slot(x):
    """The same in a buffer with other channels beside it."""
    beside = (integers(0, 127, *x.shape[:3], count, dtype=x.dtype) for count in (LEFT, RIGHT))
    left, right = beside
    return torch.cat([left, x, right], 3)[..., LEFT : LEFT + x.shape[3]]


def poisoned(n, h, w, c):
    """A buffer, and the slot of it that is written to."""
    buffer = torch.full((n, h, w, LEFT + c + RIGHT), GUARD, dtype=torch.uint8)
    return buffer, buffer[..., LEFT : LEFT + c]


def conv_layer(c_out, kernel, c_in, stride, *, limit=127, dtype=torch.int8):
    """A layer whose outputs are spread over the levels, and beyond."""
    weight = integers(-limit, limit, c_out, kernel, kernel, c_in, dtype=dtype)
    spread = (kernel * kernel * c_in) ** 0.5 * limit * 60
    return QuantizedConv(
        weight,
        torch.randint(-30 * limit, 30 * limit, (c_out,), dtype=torch.int32),
        torch.rand(c_out) * 200 / spread,
        torch.rand(c_out) / 100,
        stride,
        None,
        torch.ones(c_in),
        None,
        1.0,
    )  # fmt: skip


def assert_same_conv(run, x, layer, levels, pool=True):
    n, h, w, _ = x.shape
    size = n, (h - 1) // layer.stride + 1, (w - 1) // layer.stride + 1, layer.weight.shape[0]
    found = []
    for conv in (wanted.conv, run):
        buffer, out = poisoned(*size)
        feature = torch.full(size, float("nan"))
        sums = conv(x, layer, out, levels=levels, feature=feature, pool=pool)
        alone = torch.full(size, float("nan"))
        conv(x, layer, None, levels=levels, feature=alone)
        found.append((buffer, feature, alone, sums.sum(1) if pool else alone))
    for theirs, ours in zip(*found):
        assert torch.equal(theirs, ours)
    assert len(found[0][0].unique()) > 2, "nothing was compared"


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("engine", "isa"), BYTES)
def test_conv(engine, isa, levels):
    def run(*args, **options):
        return int8.run_engine(engine, *args, **options)

    with instruction_set(isa):
        for n, h, w, c_in, c_out, kernel, stride in SHAPES:
            layer = conv_layer(c_out, kernel, c_in, stride)
            x = slot(integers(0, levels, n, h, w, c_in, dtype=torch.uint8))
            assert_same_conv(run, x, layer, levels)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("engine", "isa"), BYTES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [127, 65, 64, 33, 32, "some"])
def test_nothing_saturates(engine, isa, sign, size, levels):
    """Every product the largest there is, or the least. Of weights of 32 and 64, 16 bits hold the
    sums of 8 and 4 products of 127 levels; of those that are larger they do not."""
    layer = conv_layer(16, 3, 128, 1)
    if size == "some":  # One tile has other weights than the next one.
        layer = conv_layer(32, 3, 128, 1)
        layer.weight[:16] = 32
        layer.weight[16:, :2] = 127
        layer.weight[16:, 2] = 33
        layer = layer._replace(weight=sign * layer.weight)
    else:
        layer = layer._replace(weight=torch.full_like(layer.weight, sign * size))
    unit = torch.full((len(layer.weight),), float(sign))
    layer = layer._replace(multiplier=unit.abs() * 1e-6, unit=unit)
    x = torch.full((1, 5, 5, 128), levels, dtype=torch.uint8)
    features = []
    for conv in (wanted.conv, int8.conv):
        with instruction_set(isa):
            feature = torch.empty(1, 5, 5, len(unit))
            if conv is int8.conv:
                int8.run_engine(engine, x, layer, None, levels=levels, feature=feature)
            else:
                conv(x, layer, None, levels=levels, feature=feature)
        features.append(feature)
    assert torch.equal(*features)
    largest = 9 * 128 * levels * (size if size != "some" else 33)
    assert features[0].max() > 0.99 * largest


WINOGRAD_SHAPES = [
    # n, h, w, c_in, c_out
    (1, 8, 12, 64, 32),
    (2, 13, 5, 80, 48),  # tiles that reach over the edges
    (1, 1, 1, 17, 16),
    (3, 2, 3, 5, 7),
    (1, 6, 4, 448, 33),
    (2, 33, 30, 40, 72),  # several tasks
    (1, 40, 41, 256, 24),  # an input that no cache holds
]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("engine", "isa"), WINOGRAD)
def test_winograd_is_exact(engine, isa, levels):
    def run(*args, **options):
        return int8.run_engine(engine, *args, **options)

    with instruction_set(isa):
        for n, h, w, c_in, c_out in WINOGRAD_SHAPES:
            layer = conv_layer(c_out, 3, c_in, 1, limit=127 if c_in <= 256 else 60)
            x = slot(integers(0, levels, n, h, w, c_in, dtype=torch.uint8))
            assert_same_conv(run, x, layer, levels, pool=False)


def chequered(sign, kernel_row, count):
    """A weight of the largest numbers, with signs that make sums of tiles the largest."""
    row = torch.tensor(kernel_row)
    return sign * (127 * row[:, None] * row[None, :])[None, :, :, None].expand(16, 3, 3, count)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("engine", "isa"), WINOGRAD)
@pytest.mark.parametrize("row", [(1, 1, 1), (1, -1, 1)])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_sum_of_a_tile_is_too_large(engine, isa, sign, row, levels):
    """Weights, and steps of tiles, at the ends of their ranges, of as many channels as there may
    be: the sums of products pass over 32 bits."""
    of_one = chequered(sign, row, 1)[0].int()
    of_one = max(int(of_one.clamp(min=0).sum()), -int(of_one.clamp(max=0).sum()))
    c_in = (int8_winograd.LARGEST_OUTPUT - 1) // (of_one * levels)
    layer = conv_layer(16, 3, c_in, 1)
    layer = layer._replace(weight=chequered(sign, row, c_in).to(torch.int8).contiguous())
    signs = torch.tensor([1.0, -1.0]).repeat(8)  # One of them is not cut off by the ReLU.
    layer = layer._replace(multiplier=torch.full((16,), 1e-6), unit=signs)
    assert int8_winograd.fits(layer.weight, levels)
    h, w = torch.meshgrid(torch.arange(9), torch.arange(11), indexing="ij")
    patterns = [h * 0 + 1, (h + w) % 2, h % 2, w % 2, (h % 4 < 2) * 1, torch.rand(9, 11).round()]
    x = torch.stack(patterns).to(torch.uint8)[..., None] * levels
    features = []
    for conv in (wanted.conv, int8.conv):
        feature = torch.empty(len(x), 9, 11, 16)
        with instruction_set(isa):
            full = x.expand(-1, -1, -1, c_in).contiguous()
            if conv is int8.conv:
                int8.run_engine(engine, full, layer, None, levels=levels, feature=feature)
            else:
                conv(full, layer, None, levels=levels, feature=feature)
        features.append(feature)
    assert torch.equal(*features)


def largest_outputs(most):
    """A weight of one output channel whose outputs are `most` at most, a level."""
    taps = -(-most // 127)
    weight = torch.zeros(9 * -(-taps // 9), dtype=torch.int8)
    weight[: most // 127], weight[most // 127] = 127, most % 127
    return weight.view(-1, 3, 3).permute(1, 2, 0)[None].contiguous()


@pytest.mark.parametrize(("engine", "isa"), WINOGRAD)
@pytest.mark.parametrize("sign", [1, -1])
def test_winograd_is_exact_up_to_the_limit(engine, isa, sign):
    levels = 127
    most = (int8_winograd.LARGEST_OUTPUT - 1) // levels
    with instruction_set(isa):
        for sum_of_weights in (most, most + 1):
            weight = sign * largest_outputs(sum_of_weights)
            c_in = weight.shape[3]
            layer = conv_layer(1, 3, c_in, 1)
            layer = layer._replace(weight=weight, unit=torch.full((1,), float(sign)))
            x = torch.full((1, 4, 4, c_in), levels, dtype=torch.uint8)
            feature, theirs = torch.empty(1, 4, 4, 1), torch.empty(1, 4, 4, 1)
            options = dict(levels=levels, feature=feature)
            assert int8_winograd.fits(weight, levels) == (sum_of_weights == most)
            if sum_of_weights > most:
                with pytest.raises(ValueError, match="outputs that are less than 2\\^25"):
                    int8.run_engine(engine, x, layer, None, **options)
                continue
            int8.run_engine(engine, x, layer, None, **options)
            wanted.conv(x, layer, None, levels=levels, feature=theirs)
            assert torch.equal(feature, theirs)
            assert feature.abs().max() > 0.99 * int8_winograd.LARGEST_OUTPUT


def test_what_an_output_is_at_most_is_known_without_an_op_of_pytorch():
    """It is asked for while calls are recorded; and again where a weight was written to."""
    weight = integers(-127, 127, 24, 3, 3, 512, dtype=torch.int8)
    weight[3] = weight[3].abs()
    largest = int(weight[3].int().sum())
    with recording._Watch() as watch:
        assert int8_winograd._largest_sum(weight) == largest
        assert not int8_winograd.fits(weight, 127)
    assert not watch.computed
    weight.clamp_(-20, 20)
    assert int8_winograd._largest_sum(-weight) == int(weight[3].int().sum())
    assert int8_winograd.fits(weight, 127)
    weight.data.fill_(127)
    assert int8_winograd.fits(weight, 127)  # Nobody has counted that,
    packing.forget([weight])
    assert not int8_winograd.fits(weight, 127)


@pytest.mark.parametrize(("engine", "isa"), WINOGRAD)
def test_winograd_says_what_it_takes(engine, isa):
    x, out = torch.zeros(1, 4, 4, 16, dtype=torch.uint8), torch.zeros(1, 4, 4, 16).byte()
    with instruction_set(isa):
        with pytest.raises(ValueError, match="needs a kernel of 3"):
            int8.run_engine(engine, x, conv_layer(16, 1, 16, 1), out, levels=127)
        half = out[:, :2, :2]
        with pytest.raises(ValueError, match="needs a kernel of 3 and a stride of 1"):
            int8.run_engine(engine, x, conv_layer(16, 3, 16, 2), half, levels=127)
        with pytest.raises(ValueError, match="is for steps, not for images"):
            int8.run_engine(engine, x.view(torch.int8), conv_layer(16, 3, 16, 1), out, levels=127)


@pytest.fixture
def nothing_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    for cached in (tuning._table, winograd.fastest):
        cached.cache_clear()
    yield
    for cached in (tuning._table, winograd.fastest):
        cached.cache_clear()


@pytest.mark.parametrize("slow", ["winograd", "otherwise"])
def test_what_is_faster_is_taken(monkeypatch, nothing_measured, slow):
    """A time that is made long is avoided, whosever it is; the bits are the same."""
    found = [pair for pair in WINOGRAD if pair[1] == _extension.load("cpu").isa()]
    if not found:
        pytest.skip("this processor has no such convolutions")
    others = tuple(name for name in int8.engines() if name != "amx")  # With which none competes.
    monkeypatch.setattr(int8, "engines", lambda: others)
    name, run_engine, run = found[0][0], int8.run_engine, []

    def counted(engine, x, *args, **options):
        run.append(engine)
        if (engine == name) == (slow == "winograd"):
            time.sleep(0.02)
        return run_engine(engine, x, *args, **options)

    monkeypatch.setenv("VOVNET_FAST_TUNE", "1")
    monkeypatch.setattr(int8, "run_engine", counted)
    layer = conv_layer(48, 3, 40, 1)
    x = integers(0, 127, 1, 20, 21, 40, dtype=torch.uint8)
    assert_same_conv(int8.conv, x, layer, 127, pool=False)
    otherwise = int8.engines()[0]
    assert {*run} == {name, otherwise}
    assert {*run[-2:]} == {otherwise if slow == "winograd" else name}


@pytest.mark.parametrize("isa", sorted({isa for _, isa in WINOGRAD}))
def test_winograd_can_be_turned_off(monkeypatch, nothing_measured, isa):
    monkeypatch.setenv("VOVNET_FAST_TUNE", "0")
    chosen = []
    monkeypatch.setattr(int8, "run_engine", lambda engine, *_, **__: chosen.append(engine))
    layer, x = conv_layer(48, 3, 40, 1), torch.zeros(1, 40, 40, 40, dtype=torch.uint8)
    with instruction_set(isa):
        for side in ("4", "0"):
            monkeypatch.setenv("VOVNET_FAST_WINOGRAD", side)
            int8.conv(x, layer, x, levels=127)
        int8.conv(x[:, :3, :3], layer, x, levels=127)
        otherwise = int8.engines()[0]
    first = "winograd" if otherwise == "maddubs" else otherwise
    assert chosen == [first, otherwise, otherwise]


@pytest.mark.parametrize(("engine", "isa"), WORDS)
@pytest.mark.parametrize("wide", [False, True])
def test_conv_of_images(engine, isa, wide):
    """They have signs, and of a wide stem more than eight bits."""
    assert engine == int8.WORDS
    most, dtype = (wanted.WIDE, torch.int16) if wide else (wanted.LARGEST, torch.int8)
    with instruction_set(isa):
        for n, h, w, c_in, c_out, stride in [
            (1, 31, 27, 3, 64, 2), (2, 9, 9, 4, 16, 1), (1, 9, 8, 12, 40, 2), (1, 5, 6, 40, 16, 1)
        ]:  # fmt: skip
            # Of a wide stem all sums stay below 2^24.
            limit = min(wanted.WIDE_WEIGHT, wanted.WIDE_SUM // (9 * c_in * most)) if wide else 127
            layer = conv_layer(c_out, 3, c_in, stride, limit=limit, dtype=dtype)
            x = integers(-most, most, n, h, w, c_in, dtype=dtype)
            assert_same_conv(int8.conv, x, layer, 127)


@pytest.mark.parametrize("threads", [1, 3])
def test_conv_on_any_number_of_threads(threads):
    layer, before = conv_layer(48, 3, 32, 1), torch.get_num_threads()
    x = slot(integers(0, 127, 3, 40, 24, 32, dtype=torch.uint8))
    if not int8.engines():
        pytest.skip("this processor has no convolutions in eight bits")
    torch.set_num_threads(threads)
    try:
        assert_same_conv(int8.conv, x, layer, 127)
    finally:
        torch.set_num_threads(before)


CHANNELS = [16, 40, 67, 128]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("c", CHANNELS)
def test_depthwise(isa, c):
    with instruction_set(isa):
        for levels in LEVELS:
            for n, h, w, stride in [(2, 11, 14, 1), (2, 11, 14, 2), (1, 1, 1, 1), (1, 2, 1, 2)]:
                x = slot(integers(0, levels, n, h, w, c, dtype=torch.uint8))
                layer = QuantizedDepthwise(
                    integers(-127, 127, 3, 3, c, dtype=torch.int8),
                    torch.rand(c) / 500,
                    torch.randint(0, levels + 1, (c,), dtype=torch.uint8),
                    torch.ones(c),
                    torch.ones(c),
                )
                size = n, (h - 1) // stride + 1, (w - 1) // stride + 1, c
                (a, theirs), (b, ours) = poisoned(*size), poisoned(*size)
                wanted.depthwise(x, layer, theirs, levels=levels, stride=stride)
                int8.depthwise(x, layer, ours, levels=levels, stride=stride)
                assert torch.equal(a, b)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("c", CHANNELS)
@pytest.mark.parametrize("mode", ["ceil", "padded"])
def test_max_pool(isa, c, mode):
    x = slot(integers(0, 255, 2, 11, 14, c, dtype=torch.uint8))
    size = 2, *output_size(11, 14, mode), c
    (a, theirs), (b, ours) = poisoned(*size), poisoned(*size)
    with instruction_set(isa):
        wanted.max_pool(x, theirs, mode)
        int8.max_pool(x, ours, mode)
    assert torch.equal(a, b)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("c", CHANNELS)
@pytest.mark.parametrize("table", [False, True])
def test_gates(isa, c, table):
    layer = QuantizedGate(
        torch.randint(-3000, 3000, (c, c), dtype=torch.int16),
        torch.randint(-(10**6), 10**6, (c,), dtype=torch.int32),
        torch.rand(c) * (1e-5 if table else 1e-4),
        64,
        20000.0,
        "sigmoid" if table else "hard_sigmoid",
        torch.randint(0, 30000, (wanted.TABLE,), dtype=torch.int32) if table else None,
    )
    sums = torch.randint(0, 127 * 50, (2, 3, c), dtype=torch.int32)
    with instruction_set(isa):
        ours = int8.gates(sums, 150, layer)
    assert torch.equal(wanted.gates(sums, 150, layer), ours)
    assert len(ours.unique()) > 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("c", CHANNELS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("identity", [False, True])
def test_apply_gates(isa, c, gated, identity):
    size = 2, 11, 14, c
    z, x = (slot(integers(0, 255, *size, dtype=torch.uint8)) for _ in range(2))
    layer = QuantizedSum(12345.0, 23456.0, 15, 0.1)
    gates = integers(0, wanted.FACTOR, 2, c, dtype=torch.int32) if gated else None
    found = []
    with instruction_set(isa):
        for apply_gates in (wanted.apply_gates, int8.apply_gates):
            (buffer, out), feature = poisoned(*size), torch.full(size, float("nan"))
            options = dict(levels=255, feature=feature)
            apply_gates(z, gates, x if identity else None, layer, out, **options)
            found.append((buffer, feature))
    for theirs, ours in zip(*found):
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("wide", [False, True])
def test_images_of_any_layout(isa, wide):
    """Some are beyond the range; halves are rounded to even."""
    scale = 2.0**-9 if wide else 2.0**-6
    nchw = (torch.randint(-500, 500, (2, 3, 19, 301)) * scale * (5 if wide else 1) / 2).float()
    nhwc = nchw.permute(0, 2, 3, 1)
    for x in (nhwc, nhwc.contiguous(), nhwc[:, ::2, ::3], nhwc.contiguous()[..., 1:]):
        found = []
        for quantize in (wanted.quantize_image, int8.quantize_image):
            out = torch.full(x.shape, GUARD, dtype=wanted.image_dtype(wide))
            with instruction_set(isa):
                quantize(x, scale, out, wide=wide)
            found.append(out)
        assert torch.equal(*found)
        assert found[0].max() == (wanted.WIDE if wide else wanted.LARGEST)


def test_engines_say_what_they_take():
    if not int8.engines():
        pytest.skip("this processor has no convolutions in eight bits")
    layer = conv_layer(16, 3, 16, 1)
    x, out = torch.zeros(1, 4, 4, 16, dtype=torch.uint8), torch.zeros(1, 4, 4, 16).byte()
    with pytest.raises(ValueError, match=f'"{int8.engines()[0]}" is for steps, not for images'):
        int8.run_engine(int8.engines()[0], x.view(torch.int8), layer, out, levels=127)
    with pytest.raises(ValueError, match='no convolution engine in eight bits "tensor" runs on'):
        int8.run_engine("tensor", x, layer, out, levels=127)
    with pytest.raises(ValueError, match="levels must be from 1 to 255, got 256"):
        int8.conv(x, layer, out, levels=256)


def test_it_says_why_not():
    with instruction_set("baseline"):
        if not int8.engines():
            assert "no convolutions in eight bits" in int8.why_not(torch.device("cpu"))
    assert "on meta" in int8.why_not(torch.device("meta"))
