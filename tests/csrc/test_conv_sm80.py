"""The convolution for sm_80 and newer: its kernel thread for thread on the host, and on a GPU.

On the host (csrc/cuda_on_cpu) everything that test_cuda_kernels.py shows to be reported would be:
copies that are not waited for, barriers that are missing, shared memory that nobody has written.
What instructions cost, and whether they are encoded right, shows nowhere but on a GPU;
test_conv_sm80_code.py looks at what nvcc makes of the kernel.
"""

import functools
import os

import pytest
import torch
import torch.nn.functional as F

from tests.csrc import cuda_on_cpu, test_binding
from tests.extension_cases import require
from vovnet_fast.backends import _extension, conv_sm80, conv_sm80_grad, conv_sm80_input_grad

GUARD = 16
CHANNELS = [64, 80, 96, 112, 128, 160, 192, 224, 256]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HALF = torch.float16
NAN = float("nan")


# --------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------


def slot(shape, dtype, device, *, crop=False):
    """A NaN-filled buffer, and a view inside it that is surrounded by NaN on all sides."""
    n, h, w, c = shape
    edge = int(crop)
    size = (n, h + 2 * edge, w + 2 * edge, c + 2 * GUARD)
    buffer = torch.full(size, NAN, dtype=dtype, device=device)
    return buffer, buffer[:, edge : edge + h, edge : edge + w, GUARD : GUARD + c]


def to_tf32(values):
    """fp32 rounded to TF32, to nearest, ties away from zero."""
    return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Layer:
    """Tensors of one call, in slots, and what it should compute."""

    def __init__(self, n, h, w, c_in, c_out, *, kernel=3, stride=1, dtype=HALF, crop=False,
                 device="cpu"):  # fmt: skip
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(device)

        self.stride, self.randn = stride, randn
        _, self.x = slot((n, h, w, c_in), dtype, device, crop=crop)
        self.x.copy_(randn(n, h, w, c_in))
        self.weight = (randn(c_out, kernel, kernel, c_in) / (kernel * kernel * c_in) ** 0.5).to(
            dtype
        )
        self.scale, self.shift = randn(c_out), randn(c_out)
        self.size = (n, (h - 1) // stride + 1, (w - 1) // stride + 1, c_out)
        self.buffer, self.out = slot(self.size, dtype, device, crop=crop)

    def beside(self, channels):
        """Another view of the output's pixels."""
        _, view = slot((*self.size[:3], channels), self.x.dtype, self.x.device)
        return view.copy_(self.randn(*view.shape))

    def product(self):
        x, weight = self.x, self.weight
        if x.dtype == torch.float32:
            x, weight = to_tf32(x.contiguous()), to_tf32(weight)
        x, weight = (t.double().permute(0, 3, 1, 2) for t in (x, weight))
        y = F.conv2d(x, weight, padding=weight.shape[2] // 2, stride=self.stride)
        return y.permute(0, 2, 3, 1)

    def affine(self):
        return self.product() * self.scale.double() + self.shift.double()

    def run(self, config, **options):
        self.buffer.fill_(NAN)
        return conv_sm80.run(
            config.name, self.x, self.weight, self.out, stride=self.stride, **options
        )

    def check(self, exact):
        """One rounding of what is stored, and a few of sums; nothing else is written.

        Sums are those of fp32; tensor cores cut what they add, where fp32 rounds.
        """
        slack = 1e-3 if self.x.is_cuda else 2e-5
        error = (self.out.double() - exact).abs()
        unit = torch.finfo(self.out.dtype).eps / 2
        size = exact.abs()
        excess = (error - unit * 1.01 * size - slack * size.clamp(min=1)).max().item()
        assert excess <= 0, f"error up to {error.max().item():.3g}, {excess:.3g} too much"
        self.out.fill_(NAN)
        assert self.buffer.isnan().all(), "it wrote outside its slot"


def folded(layer, config, *, relu=True, pool=False):
    exact = layer.affine()
    exact = exact.relu() if relu else exact
    partials = layer.run(config, scale=layer.scale, shift=layer.shift, relu=relu, pool=pool)
    layer.check(exact)
    if pool:
        rtol = 1e-4 if layer.x.is_cuda else 1e-5
        sums = partials.double().sum(1)
        torch.testing.assert_close(sums, exact.sum((1, 2)), rtol=rtol, atol=1e-2)
    else:
        assert partials is None


def fits(layer, config, capability=(8, 0)):
    return config in conv_sm80.fitting(layer.out, layer.weight, layer.stride, capability, layer.x)


# --------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("c_out", CHANNELS)
def test_3x3_is_right(c_out, device):
    layer = Layer(1, 9, 11, 40, c_out, device=device)
    for config in conv_sm80.configs(c_out):
        folded(layer, config)


@pytest.mark.parametrize("c_out", [*CHANNELS, 384, 512])
def test_1x1_with_pool_partials_is_right(c_out, device):
    layer = Layer(2, 9, 17, 48, c_out, kernel=1, device=device)
    for config in conv_sm80.configs(c_out):
        folded(layer, config, pool=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c_in", [8, 16, 24, 72])
def test_every_number_of_input_channels(c_in, dtype, device):
    """Last steps of one unit to four; what lies beside a slot is NaN."""
    for kernel, stride in ((1, 1), (3, 1), (3, 2)):
        layer = Layer(1, 5, 7, c_in, 80, kernel=kernel, stride=stride, dtype=dtype, device=device)
        folded(layer, conv_sm80.Config(128, 80), pool=True)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (17, 9), (16, 33), (2, 40)])
def test_odd_sizes(size, kernel, stride, device):
    for crop in (False, True):  # Cropped rows do not follow each other.
        layer = Layer(2, *size, 16, 64, kernel=kernel, stride=stride, crop=crop, device=device)
        folded(layer, conv_sm80.Config(128, 64), pool=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_every_shape_of_tiles(stride, device):
    """Wide maps have flat tiles, high ones steep ones; the last of each is mostly outside."""
    for size in ((5, 65), (65, 5), (18, 18)):
        for config in (conv_sm80.Config(128, 64), conv_sm80.Config(256, 64)):
            layer = Layer(1, *size, 8, 64, stride=stride, device=device)
            if device.type == "cpu" or fits(layer, config, torch.cuda.get_device_capability()):
                folded(layer, config, pool=True)


def test_several_blocks_of_channels_share_a_tile(device):
    folded(Layer(2, 9, 9, 16, 320, device=device), conv_sm80.Config(128, 160), pool=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c_out", [8, 56, 88, 136])
def test_the_last_channels_may_be_a_part_of_a_tile(c_out, dtype, device):
    """NaN lies beside the slot, and what is added and masks ends there."""
    for kernel in (1, 3):
        layer = Layer(1, 5, 9, 24, c_out, kernel=kernel, dtype=dtype, device=device)
        add, mask = layer.beside(c_out), layer.beside(c_out)
        exact = (layer.product() + add.double()) * ~(mask <= 0)
        flat = layer.product().flatten(0, 2)
        for config in conv_sm80.configs(c_out):
            folded(layer, config, pool=True)
            layer.run(config, add=add, mask=mask)
            layer.check(exact)
            count, sums, _ = layer.run(config, statistics=True).double().unbind(1)
            assert torch.equal(count.sum(0), torch.full_like(count[0], len(flat)))
            torch.testing.assert_close(sums.sum(0), flat.sum(0), rtol=1e-4, atol=1e-2)


def test_without_relu(device):
    folded(Layer(1, 4, 8, 16, 80, device=device), conv_sm80.Config(128, 80), relu=False)


@pytest.mark.parametrize("kernel", [1, 3])
def test_nan_and_inf_go_where_they_go_in_torch_watched(kernel, device):
    layer = Layer(1, 8, 16, 16, 80, kernel=kernel, device=device)
    layer.x[0, 2, 3, 5], layer.x[0, 6, 9, 0] = NAN, float("inf")
    layer.run(conv_sm80.Config(128, 80), scale=layer.scale, shift=layer.shift, relu=True)
    exact = layer.affine().relu()
    assert torch.equal(layer.out.isnan(), exact.isnan())
    assert torch.equal(layer.out.isposinf(), exact.isposinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_those_of_every_tile(dtype, device):
    """With a mean that is large beside the deviations, and tiles that are mostly outside."""
    layer = Layer(2, 9, 21, 16, 96, dtype=dtype, device=device)
    layer.weight += 0.25
    layer.x += 4
    for config in conv_sm80.configs(96):
        partials = layer.run(config, statistics=True).double()
        exact = layer.product()
        layer.check(exact)
        count, sums, squares = partials.unbind(1)
        flat = exact.flatten(0, 2)
        assert torch.equal(count.sum(0), torch.full_like(count[0], len(flat)))
        mean = sums.sum(0) / len(flat)
        torch.testing.assert_close(mean, flat.mean(0), rtol=1e-5, atol=1e-5)
        between = (count * (sums / count - mean) ** 2).sum(0)
        expected = ((flat - flat.mean(0)) ** 2).sum(0)
        torch.testing.assert_close(squares.sum(0) + between, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("add_c", "mask_c"), [(0, 0), (112, 0), (24, 0), (0, 112), (40, 88)])
def test_what_is_added_and_what_masks(add_c, mask_c, dtype, device):
    layer = Layer(2, 5, 9, 24, 112, dtype=dtype, device=device)
    add, mask = layer.beside(add_c), layer.beside(mask_c)
    if mask_c:
        mask[0, 0, 0, :2] = torch.tensor([NAN, 0.0])
    given = dict(add=add if add_c else None, mask=mask if mask_c else None)
    exact = layer.product()
    exact[..., :add_c] += add.double()
    exact[..., 112 - mask_c :] *= ~(mask <= 0)
    for config in conv_sm80.configs(112):
        layer.run(config, **given)
        layer.check(exact)


def test_what_is_added_may_be_the_output_watched(device):
    layer = Layer(1, 5, 9, 24, 80, device=device)
    layer.buffer.fill_(NAN)
    start = layer.out.copy_(layer.randn(*layer.out.shape)).double()
    exact = layer.product() + start
    tensors = (layer.x, layer.weight, layer.out)
    conv_sm80.run("conv-sm80 128x80", *tensors, add=layer.out)
    layer.check(exact)


# --------------------------------------------------------------------------------------
# What the host sees
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_rings_hold_whatever_the_timing(kernel, stride, early, emulation):
    """More steps than any ring has stages, however late copies land, with both depths."""
    emulation.copies_land_early(early)
    layer = Layer(1, 9, 17, 200 if kernel == 1 else 104, 64, kernel=kernel, stride=stride)
    config = conv_sm80.Config(128, 64)
    for stages in (3, 4):
        launch = conv_sm80.plan(
            config, layer.x, layer.weight, layer.out, scale=layer.scale, shift=layer.shift,
            stride=stride,
        )  # fmt: skip
        layer.buffer.fill_(NAN)
        given = dict(launch.fields, stages=stages, pool_partials=None, statistics=None)
        emulation.conv_sm80(0, **given)
        layer.check(layer.affine())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_banks_never_conflict_and_products_are_not_padded(dtype, emulation):
    """Over the addresses of every ldmatrix and cp.async, of every form of tile."""
    size = 8 if dtype == torch.float32 else 16
    for c_out in (64, 80, 112):
        for kernel, stride, (h, w) in ((1, 1, (3, 50)), (3, 1, (6, 30)), (3, 2, (33, 9))):
            layer = Layer(1, h, w, size * 3, c_out, kernel=kernel, stride=stride, dtype=dtype)
            for config in conv_sm80.configs(c_out):
                launch = conv_sm80.plan(config, layer.x, layer.weight, layer.out, stride=stride)
                layer.run(config)
                counts = emulation.take_counts()
                assert min(counts["copies"], counts["matrices"]) > 0
                assert (counts["copy_conflicts"], counts["matrix_conflicts"]) == (0, 0)
                steps, tiles = kernel**2 * 3, launch.tiles
                assert counts["products"] == tiles * steps * config.pixels // 16 * c_out // 8
                given = launch.fields
                tile = given["tile_h"], given["tile_w"]
                expected = config.shared_bytes(tile, kernel, stride, given["stages"])
                assert counts["shared_bytes"] == expected


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(kernel=5), "kernel must be one of 1, 3, got 5"),
        (dict(kernel=1, stride=2, out_height=50, out_width=50), "a kernel of 1 has stride 1"),
        (dict(dtype=3), "dtype must be one of 0, 1, 2, got 3"),
        (dict(c_in=12), "must be multiples of 8, got 12"),
        (dict(stages=2), "stages must be one of 3, 4, got 2"),
        (dict(tile_w=4), "no tiles of 16 x 4 pixels"),
        (dict(tile_h=32), "no tiles of 32 x 8 pixels by 256 channels"),
        (dict(block_out=72), "no tiles"),
        (dict(x=(1 << 20, 1 << 20, 1 << 14, 68)), "multiples of 16 bytes"),
        (dict(out=((1 << 20) + 8, 1 << 20, 1 << 14, 256)), "multiples of 16 bytes"),
        (dict(scale=None), "scale must be given where shift is"),
        (dict(scale=None, shift=None, relu=1), "pool_partials and relu must be None and 0"),
        (dict(add_c=8), "add_c without add must be 0, got 8"),
        (dict(mask=(1 << 20, 1 << 20, 1 << 14, 256), mask_c=8), "None where scale is given"),
        (dict(statistics=1 << 20), "None where scale is given"),
        (dict(n=1 << 25), "2\\^30 tiles"),
    ],
)
def test_what_cannot_be_is_said(wrong, words, emulation):
    at = 1 << 20
    given = dict(
        x=(at, 1 << 20, 1 << 14, 64), out=(at, 1 << 20, 1 << 14, 256), weight=at, scale=at,
        shift=at, pool_partials=None, statistics=None, add=None, mask=None, n=1, height=100,
        width=100, out_height=100, out_width=100, c_in=64, c_out=256, add_c=0, mask_c=0, kernel=3,
        stride=1, tile_h=16, tile_w=8, block_out=256, stages=4, relu=0, dtype=0,
    )  # fmt: skip
    with pytest.raises((ValueError, OverflowError), match=words):
        emulation.conv_sm80(0, **{**given, **wrong})


def fuzz(path, last):
    """In a process of its own: the kernel on the host, called with spoilt fields."""
    file = os.open(last, os.O_WRONLY | os.O_CREAT)

    def note(text):
        os.pwrite(file, f"{text}\n".encode(), 0)

    half = cuda_on_cpu.load(path)
    spoiling = test_binding.Spoiling(half, 0, note, threads=False)
    _extension.CUDA = _extension.Ops(lambda: spoiling, cuda_on_cpu.on_host)
    for dtype in (torch.float16, torch.float32):
        for kernel, stride in ((1, 1), (3, 1), (3, 2)):
            layer = Layer(1, 3, 4, 8, 64, kernel=kernel, stride=stride, dtype=dtype)
            config = conv_sm80.Config(128, 64)
            layer.run(config, scale=layer.scale, shift=layer.shift, relu=True, pool=True)
            layer.run(config, statistics=True)
            layer.run(config, add=layer.beside(8), mask=layer.beside(16))
            conv_sm80_grad.run(layer.x, layer.beside(64), kernel, stride=stride)
            wide = Layer(2, 9, 33, 8, 64, kernel=kernel, stride=stride, dtype=dtype)  # In parts.
            conv_sm80_grad.run(wide.x, wide.beside(64), kernel, stride=stride)
        image = Layer(1, 3, 4, 3, 64, stride=2, dtype=dtype)
        image.run(conv_sm80.IMAGE_CONFIG, scale=image.scale, shift=image.shift, relu=True)
        image.run(conv_sm80.IMAGE_CONFIG, statistics=True)
        conv_sm80_grad.run(image.x, image.beside(64), 3, stride=2)
        for c_in, engine in ((8, "conv-sm80 128x64"), (3, conv_sm80_input_grad.IMAGE)):
            layer = Layer(1, 3, 4, c_in, 8, stride=2, dtype=dtype)
            packed = layer.weight.permute(3, 1, 2, 0).contiguous()
            beside = layer.randn(*layer.x.shape).to(dtype)
            for given in (dict(add=beside, mask=beside), {}):
                conv_sm80_input_grad.run(
                    engine, layer.beside(8), packed, layer.x, stride=2, **given
                )
    assert all(spoiling.words)
    names = ("conv_sm80", "conv_sm80_weight_grad", "conv_sm80_input_grad", "conv_sm80_image_grad")
    for name in names:
        assert spoiling.refused[name] > 100, spoiling.refused


def test_no_arguments_crash_it(emulation, tmp_path):
    last = tmp_path / "last"
    code = (
        f"from tests.csrc import test_conv_sm80 as t; t.fuzz({emulation.__file__!r}, {str(last)!r})"
    )
    said = test_binding.run_python(code)
    words = last.read_text()[:3000].splitlines()[:1] if last.exists() else ""
    assert said.returncode == 0, f"exit {said.returncode} of {words}\n{said.stderr[-3000:]}"


# --------------------------------------------------------------------------------------
# What is taken, and how
# --------------------------------------------------------------------------------------


def test_every_layer_has_tiles_that_fit_every_device():
    """At least one has room on the devices with the least shared memory, and channels are whole."""
    for c_out in (*CHANNELS, 320, 384, 448, 512, 768, 1024):
        for kernel, stride, (h, w) in (
            (3, 1, (25, 42)),
            (3, 1, (200, 336)),
            (3, 2, (9, 400)),
            (1, 1, (50, 84)),
        ):
            layer = Layer(1, h, w, 8, c_out, kernel=kernel, stride=stride)
            found = {
                capability: conv_sm80.fitting(layer.out, layer.weight, stride, capability)
                for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (13, 5))
            }
            for capability, configs in found.items():
                assert configs or (stride == 2 and c_out > 128), (c_out, kernel, stride, capability)
                assert all(c_out % config.block_out == 0 for config in configs)
            assert found[9, 0] == conv_sm80.configs(c_out) or stride == 2


def test_names_tell_the_tiles():
    names = [config.name for config in conv_sm80.configs(224)]
    assert names == ["conv-sm80 256x112", "conv-sm80 128x224", "conv-sm80 128x112"]
    assert [c.name for c in conv_sm80.configs(80)] == ["conv-sm80 256x80", "conv-sm80 128x80"]
    assert all(conv_sm80.named(config.name) == config for config in conv_sm80.configs(224))
    with pytest.raises(ValueError, match="no tiles are called 'conv-sm80 256x224'"):
        conv_sm80.named("conv-sm80 256x224")


def test_channels_that_no_block_divides_have_the_fewest_in_vain():
    """Those of concat buffers: of V-19-slim, V-39 and V-99, and of a network with 56 channels."""
    for c_out, blocks in (
        (352, {128, 192}),
        (2144, {80}),
        (1312, {112, 224}),
        (56, {64}),
        (8, {64}),
    ):
        found = conv_sm80.configs(c_out)
        assert {config.block_out for config in found} == blocks
        assert {config.pixels for config in found} == {128, 256}


def test_tiles_follow_the_image():
    config = conv_sm80.Config(256, 80)
    assert config.tile(200, 336, 3) == (16, 16)
    assert config.tile(32, 8, 3) == (32, 8)
    assert config.tile(1, 67200, 1) == (1, 256)


def test_refusals_name_what_is_wrong():
    def refused(*shape, **options):
        layer = Layer(*shape, **options)
        return conv_sm80.refusal(layer.x, layer.weight, layer.out, stride=layer.stride)

    assert refused(1, 5, 5, 16, 80) is None
    assert refused(1, 5, 5, 4, 80, dtype=torch.float32) is None
    assert "float64" in refused(1, 5, 5, 16, 80, dtype=torch.float64)
    assert "kernel 1 with stride 2" in refused(1, 5, 5, 16, 80, kernel=1, stride=2)
    assert "out has 76 channels" in refused(1, 5, 5, 16, 76)
    assert "x has 12 channels" in refused(1, 5, 5, 12, 80)
    layer = Layer(2, 5, 5, 16, 80)
    check = functools.partial(conv_sm80.refusal, layer.x, layer.weight, layer.out)
    assert "x does not start" in conv_sm80.refusal(
        layer.x[..., 4:12], layer.weight[..., :8], layer.out
    )
    flat = torch.empty(layer.weight.numel() + 8, dtype=HALF)[1:-7]
    assert "weight does not start" in conv_sm80.refusal(
        layer.x, flat.view_as(layer.weight), layer.out
    )
    assert "add has 12 channels" in check(add=layer.beside(12))
    assert "mask does not start" in check(mask=layer.beside(24)[..., 4:12])


def test_it_says_why_it_is_not_offered(device):
    layer = Layer(1, 5, 5, 16, 80)
    if device.type == "cpu":
        assert "needs tensors on an NVIDIA GPU" in conv_sm80.why_not(torch.device("cpu"))
        assert conv_sm80.engines(layer.x, layer.weight, layer.out) == []


# --------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_gpu_large_layers_and_no_change_from_run_to_run(kernel, stride, dtype):
    """Many blocks and launches in a row: a race would show as a difference some time."""
    require("cuda")
    for c_in, c_out in ((64, 80), (160, 160), (256, 256)):
        layer = Layer(
            4, 50, 84, c_in, c_out, kernel=kernel, stride=stride, dtype=dtype, device="cuda"
        )
        for config in conv_sm80.configs(c_out):
            if not fits(layer, config, torch.cuda.get_device_capability()):
                continue
            folded(layer, config, pool=True)
            first = layer.run(config, statistics=True)
            result = layer.out.clone()
            for _ in range(50):
                assert torch.equal(layer.run(config, statistics=True), first)
                assert torch.equal(layer.out, result)
