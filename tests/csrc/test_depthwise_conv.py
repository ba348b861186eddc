"""A depthwise 3x3 and its 1x1 in one kernel: thread for thread on the host, and on a GPU.

What the host shows and what it cannot is said in test_conv_sm80.py, whose tiles, products and
epilogues these are; test_depthwise_conv_code.py looks at what nvcc makes of the kernel.
"""

import os

import pytest
import torch

from tests.csrc import cuda_on_cpu, test_binding
from tests.csrc.test_conv_sm80 import DTYPES, HALF, NAN, slot, to_tf32
from tests.extension_cases import require
from vovnet_fast import specs
from vovnet_fast.backends import _extension, conv_sm80
from vovnet_fast.backends import depthwise_conv as fused

CHANNELS = [64, 80, 96, 112, 128, 160, 192, 224, 256]
CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (13, 5)]


# --------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------


class Pair:
    """Tensors of one call, in slots, and what it should compute."""

    def __init__(self, n, h, w, c_in, c_out, *, stride=1, dtype=HALF, crop=False, device="cpu"):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(device)

        self.stride = stride
        _, self.x = slot((n, h, w, c_in), dtype, device, crop=crop)
        self.x.copy_(randn(n, h, w, c_in))
        self.taps = (randn(3, 3, c_in) / 3).to(dtype)
        self.weight = (randn(c_out, 1, 1, c_in) / c_in**0.5).to(dtype)
        self.scale, self.shift = randn(c_out), randn(c_out)
        self.size = (n, (h - 1) // stride + 1, (w - 1) // stride + 1, c_out)
        self.buffer, self.out = slot(self.size, dtype, device, crop=crop)

    def between(self):
        """What the depthwise convolution makes, rounded to what is multiplied.

        Products of halves are exact in fp32, and sums are in the kernel's order: on the host
        there is no other rounding.
        """
        _, h, w, _ = self.size
        x = torch.nn.functional.pad(self.x.float(), (0, 0, 1, 1, 1, 1))
        found = torch.zeros(*self.size[:3], x.shape[3], device=x.device)
        for column in range(3):
            for line in range(3):
                rows = slice(line, line + (h - 1) * self.stride + 1, self.stride)
                columns = slice(column, column + (w - 1) * self.stride + 1, self.stride)
                found += x[:, rows, columns] * self.taps[line, column].float()
        return to_tf32(found) if self.x.dtype == torch.float32 else found.to(self.x.dtype)

    def product(self):
        weight = self.weight.flatten(1)
        weight = to_tf32(weight) if weight.dtype == torch.float32 else weight
        return self.between().double() @ weight.double().T

    def affine(self):
        return self.product() * self.scale.double() + self.shift.double()

    def run(self, config, **options):
        self.buffer.fill_(NAN)
        tensors = (self.x, self.taps, self.weight, self.out)
        return fused.run(config.name, *tensors, stride=self.stride, **options)

    def check(self, exact):
        """One rounding of what is stored, and a few of sums; nothing else is written."""
        slack = 1e-3 if self.x.is_cuda else 2e-5
        error = (self.out.double() - exact).abs()
        unit = torch.finfo(self.out.dtype).eps / 2
        size = exact.abs()
        excess = (error - unit * 1.01 * size - slack * size.clamp(min=1)).max().item()
        assert excess <= 0, f"error up to {error.max().item():.3g}, {excess:.3g} too much"
        self.out.fill_(NAN)
        assert self.buffer.isnan().all(), "it wrote outside its slot"


def folded(pair, config, *, relu=True, pool=False):
    exact = pair.affine()
    exact = exact.relu() if relu else exact
    partials = pair.run(config, scale=pair.scale, shift=pair.shift, relu=relu, pool=pool)
    pair.check(exact)
    if pool:
        rtol = 1e-4 if pair.x.is_cuda else 1e-5
        sums = partials.double().sum(1)
        torch.testing.assert_close(sums, exact.sum((1, 2)), rtol=rtol, atol=1e-2)
    else:
        assert partials is None


def on(device):
    return (8, 0) if device.type == "cpu" else torch.cuda.get_device_capability()


# --------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("c_out", [*CHANNELS, 320])
def test_every_width(c_out, device):
    """Of the output; with 320, tiles of the same pixels make the depthwise part again."""
    for stride in (1, 2):
        pair = Pair(1, 9, 11, 40, c_out, stride=stride, device=device)
        for config in fused.fitting(pair.out, stride, on(device)):
            folded(pair, config, pool=stride == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c_in", [8, 16, 24, 72])
def test_every_number_of_input_channels(c_in, dtype, device):
    """Last steps of one unit to four; what lies beside a slot is NaN."""
    for stride in (1, 2):
        pair = Pair(1, 5, 7, c_in, 80, stride=stride, dtype=dtype, device=device)
        folded(pair, fused.Config(80), pool=True)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (17, 9), (16, 33), (2, 40)])
def test_odd_sizes(size, stride, device):
    for crop in (False, True):  # Cropped rows do not follow each other.
        pair = Pair(2, *size, 16, 64, stride=stride, crop=crop, device=device)
        folded(pair, fused.Config(64), pool=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_every_shape_of_tiles(stride, device):
    """Wide maps have flat tiles, high ones steep ones; the last of each is mostly outside."""
    tiles = set()
    for size in ((5, 65), (65, 5), (18, 18), (3, 31), (33, 7)):
        pair = Pair(1, *size, 8, 64, stride=stride, device=device)
        tiles.add(fused.Config(64).tile(*pair.size[1:3], stride))
        folded(pair, fused.Config(64), pool=True)
    assert tiles == {(16, 8), (8, 16), (4, 32)}


def test_without_relu(device):
    folded(Pair(1, 4, 8, 16, 80, device=device), fused.Config(80), relu=False)


@pytest.mark.parametrize("stride", [1, 2])
def test_nan_and_inf_go_where_they_go_in_torch_watched(stride, device):
    pair = Pair(1, 9, 17, 40, 80, stride=stride, device=device)
    pair.x[0, 2, 3, 5], pair.x[0, 6, 9, 0] = NAN, float("inf")
    pair.run(fused.Config(80), scale=pair.scale, shift=pair.shift, relu=True)
    exact = pair.affine().relu()
    assert exact.isnan().any()
    assert torch.equal(pair.out.isnan(), exact.isnan())
    assert torch.equal(pair.out.isposinf(), exact.isposinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_statistics_are_those_of_every_tile(stride, dtype, device):
    """With a mean that is large beside the deviations, and tiles that are mostly outside."""
    pair = Pair(2, 9, 21, 16, 96, stride=stride, dtype=dtype, device=device)
    pair.weight += 0.25
    pair.taps += 0.25
    pair.x += 4
    partials = pair.run(fused.Config(96), statistics=True).double()
    exact = pair.product()
    pair.check(exact)
    count, sums, squares = partials.unbind(1)
    flat = exact.flatten(0, 2)
    assert torch.equal(count.sum(0), torch.full_like(count[0], len(flat)))
    mean = sums.sum(0) / len(flat)
    torch.testing.assert_close(mean, flat.mean(0), rtol=1e-5, atol=1e-5)
    between = (count * (sums / count - mean) ** 2).sum(0)
    expected = ((flat - flat.mean(0)) ** 2).sum(0)
    torch.testing.assert_close(squares.sum(0) + between, expected, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------
# What the host sees
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("stride", [1, 2])
def test_rings_hold_whatever_the_timing(stride, early, emulation):
    """More steps than any ring has stages, however late copies land, with both depths."""
    emulation.copies_land_early(early)
    pair = Pair(1, 9, 17, 168, 64, stride=stride)
    exact = pair.affine()
    launch = fused.plan(
        fused.Config(64), pair.x, pair.taps, pair.weight, pair.out, scale=pair.scale,
        shift=pair.shift, stride=stride,
    )  # fmt: skip
    for stages in (2, 3):
        pair.buffer.fill_(NAN)
        given = dict(launch.fields, stages=stages, pool_partials=None, statistics=None)
        emulation.depthwise_conv(0, **given)
        pair.check(exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_banks_never_conflict_and_products_are_not_padded(dtype, emulation):
    """Over the addresses of every ldmatrix, cp.async, load and store of shared memory."""
    size = 8 if dtype == torch.float32 else 16
    for c_out in (64, 80, 224):
        for stride, (h, w) in ((1, (6, 30)), (1, (16, 8)), (2, (33, 9)), (2, (7, 60))):
            pair = Pair(1, h, w, size * 3, c_out, stride=stride, dtype=dtype)
            config = fused.fitting(pair.out, stride, (8, 0))[0]
            launch = fused.plan(
                config, pair.x, pair.taps, pair.weight, pair.out, stride=stride
            )  # fmt: skip
            pair.run(config)
            counts = emulation.take_counts()
            assert min(counts["copies"], counts["matrices"], counts["units"]) > 0
            names = ("copy_conflicts", "matrix_conflicts", "unit_conflicts")
            assert [counts[name] for name in names] == [0, 0, 0]
            assert counts["products"] == launch.tiles * 3 * 128 // 16 * c_out // 8
            # Of a run: the taps, three columns of its lines, and two pixels that are stored. Of
            # the second chunk two units of four.
            runs = 64 * (4 + 2) * launch.tiles
            assert counts["units"] == runs * (9 + 3 * (4 if stride == 1 else 5) + 2)
            given = launch.fields
            tile = given["tile_h"], given["tile_w"]
            assert counts["shared_bytes"] == config.shared_bytes(tile, stride, given["stages"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(stride=3), "stride must be one of 1, 2, got 3"),
        (dict(dtype=3), "dtype must be one of 0, 1, 2, got 3"),
        (dict(c_in=12), "must be multiples of 8, got 12"),
        (dict(stages=4), "stages must be one of 2, 3, got 4"),
        (dict(tile_w=4), "no tiles of 16 x 4 pixels"),
        (dict(tile_h=1, tile_w=128), "no tiles of 1 x 128 pixels"),
        (dict(block_out=72), "no tiles of 16 x 8 pixels by 72 channels"),
        (dict(c_out=200), "for 200 output channels"),
        (dict(x=(1 << 20, 1 << 20, 1 << 14, 68)), "multiples of 16 bytes"),
        (dict(out=((1 << 20) + 8, 1 << 20, 1 << 14, 224)), "multiples of 16 bytes"),
        (dict(taps=(1 << 20) + 8), "address of taps must be a multiple of 16"),
        (dict(weight=(1 << 20) + 8), "multiples of 16 bytes"),
        (dict(scale=None), "scale must be given where shift is"),
        (dict(scale=None, shift=None, relu=1), "pool_partials and relu must be None and 0"),
        (dict(statistics=1 << 20), "None where scale is given"),
        (dict(n=1 << 25), "2\\^30 tiles"),
        (dict(out_height=99), "out_height must be 100, got 99"),
    ],
)
def test_what_cannot_be_is_said(wrong, words, emulation):
    at = 1 << 20
    given = dict(
        x=(at, 1 << 20, 1 << 14, 64), out=(at, 1 << 20, 1 << 14, 224), taps=at, weight=at,
        scale=at, shift=at, pool_partials=None, statistics=None, n=1, height=100, width=100,
        out_height=100, out_width=100, c_in=64, c_out=224, stride=1, tile_h=16, tile_w=8,
        block_out=224, stages=2, relu=0, dtype=0,
    )  # fmt: skip
    with pytest.raises((ValueError, OverflowError), match=words):
        emulation.depthwise_conv(0, **{**given, **wrong})


def fuzz(path, last):
    """In a process of its own: the kernel on the host, called with spoilt fields."""
    file = os.open(last, os.O_WRONLY | os.O_CREAT)

    def note(text):
        os.pwrite(file, f"{text}\n".encode(), 0)

    half = cuda_on_cpu.load(path)
    spoiling = test_binding.Spoiling(half, 0, note, threads=False)
    _extension.CUDA = _extension.Ops(lambda: spoiling, cuda_on_cpu.on_host)
    for dtype in (torch.float16, torch.float32):
        for stride in (1, 2):
            pair = Pair(1, 3, 4, 8, 64, stride=stride, dtype=dtype)
            config = fused.Config(64)
            pair.run(config, scale=pair.scale, shift=pair.shift, relu=True, pool=True)
            pair.run(config, statistics=True)
    assert all(spoiling.words)
    assert spoiling.refused["depthwise_conv"] > 100, spoiling.refused


def test_no_arguments_crash_it(emulation, tmp_path):
    last = tmp_path / "last"
    module = "test_depthwise_conv"
    code = f"from tests.csrc import {module} as t; t.fuzz({emulation.__file__!r}, {str(last)!r})"
    said = test_binding.run_python(code)
    words = last.read_text()[:3000].splitlines()[:1] if last.exists() else ""
    assert said.returncode == 0, f"exit {said.returncode} of {words}\n{said.stderr[-3000:]}"


# --------------------------------------------------------------------------------------
# What is taken, and how
# --------------------------------------------------------------------------------------


def depthwise_layers():
    """Channels and stride of every depthwise layer of a published architecture."""
    found = set()
    for spec in map(specs.get, specs.names()):
        if not spec.depthwise:
            continue
        stem = spec.stem_channels
        found |= {(*stem[i : i + 2], spec.stem_strides[i + 1]) for i in range(2)}
        found |= {(plan.mid_channels,) * 2 + (1,) for plan in spec.blocks()}
    return sorted(found)


def test_every_layer_of_a_network_fits_every_device():
    layers = depthwise_layers()
    assert (64, 64, 2) in layers
    assert (224, 224, 1) in layers
    for c_in, c_out, stride in layers:
        for size in ((200, 336), (7, 9), (25, 42)):
            pair = Pair(1, *size, c_in, c_out, stride=stride)
            tensors = (pair.x, pair.taps, pair.weight, pair.out)
            assert fused.refusal(*tensors, stride=stride) is None
            for capability in CAPABILITIES:
                configs = fused.fitting(pair.out, stride, capability)
                assert configs, (c_in, c_out, stride, capability)
                for config in configs:
                    tile = config.tile(*pair.size[1:3], stride)
                    stages = config.stages(tile, stride, capability)
                    assert c_out % config.block_out == 0
                    used = config.shared_bytes(tile, stride, stages)
                    assert used <= conv_sm80.room(capability)


def test_two_blocks_share_a_processor_where_registers_allow():
    for capability, kibibytes in (((8, 0), 164), ((9, 0), 228)):
        for block_out in (64, 80, 96, 112, 128):
            config = fused.Config(block_out)
            tile = config.tile(200, 336, 1)
            stages = config.stages(tile, 1, capability)
            assert 2 * (config.shared_bytes(tile, 1, stages) + 1024) <= kibibytes << 10
    assert fused.Config(64).stages((8, 16), 1, (8, 6)) == 2
    assert fused.Config(224).stages((8, 16), 1, (8, 0)) == 3


def test_names_tell_the_tiles():
    names = [config.name for config in fused.configs(224)]
    assert names == ["depthwise-conv 128x224", "depthwise-conv 128x112"]
    assert [c.name for c in fused.configs(80)] == ["depthwise-conv 128x80"]
    assert fused.configs(72) == []


def test_refusals_name_what_is_wrong():
    def refused(*shape, stride=1, **options):
        pair = Pair(*shape, stride=stride, **options)
        return fused.refusal(pair.x, pair.taps, pair.weight, pair.out, stride=stride)

    assert refused(1, 5, 5, 16, 80) is None
    assert refused(1, 5, 5, 4, 80, dtype=torch.float32) is None
    assert "float64" in refused(1, 5, 5, 16, 80, dtype=torch.float64)
    assert "72 output channels" in refused(1, 5, 5, 16, 72)
    assert "x has 12 channels" in refused(1, 5, 5, 12, 80)
    pair = Pair(1, 5, 5, 16, 80)
    tensors = dict(x=pair.x, taps=pair.taps, weight=pair.weight, out=pair.out, stride=1)
    moved = torch.empty(pair.taps.numel() + 8, dtype=HALF)[1:-7].view_as(pair.taps)
    assert "taps does not start" in fused.refusal(**{**tensors, "taps": moved})
    wide = torch.empty(80, 3, 3, 16, dtype=HALF)
    assert "not by a 3x3" in fused.refusal(**{**tensors, "weight": wide})
    assert "out does not start" in fused.refusal(**{**tensors, "out": pair.buffer[..., 4:84]})


def test_it_says_why_it_is_not_offered(device):
    pair = Pair(1, 5, 5, 16, 80)
    if device.type == "cpu":
        assert "needs tensors on an NVIDIA GPU" in fused.why_not(torch.device("cpu"))
        assert fused.engines(pair.x, pair.taps, pair.weight, pair.out, stride=1) == []


# --------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_gpu_large_layers_and_no_change_from_run_to_run(stride, dtype):
    """Many blocks and launches in a row: a race would show as a difference some time."""
    require("cuda")
    for channels in (64, 128, 224):
        pair = Pair(4, 50, 84, channels, channels, stride=stride, dtype=dtype, device="cuda")
        for config in fused.fitting(pair.out, stride, torch.cuda.get_device_capability()):
            folded(pair, config, pool=True)
            first = pair.run(config, statistics=True)
            result = pair.out.clone()
            for _ in range(50):
                assert torch.equal(pair.run(config, statistics=True), first)
                assert torch.equal(pair.out, result)
