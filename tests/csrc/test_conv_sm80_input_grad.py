"""Input gradients with stride 2 and of images: the kernels on the host, and on a GPU."""

import pytest
import torch

from tests.csrc.test_conv_sm80 import DTYPES, HALF, NAN, slot, to_tf32
from tests.extension_cases import require
from vovnet_fast.backends import conv_sm80, conv_sm80_input_grad
from vovnet_fast.backends._extension import fields

TILES = [config.name for config in conv_sm80_input_grad.configs()]


class Gradient:
    """Tensors of one call, in slots, and what it should compute."""

    def __init__(self, n, h, w, c_in, c_out, *, stride=2, dtype=HALF, crop=False, device="cpu"):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(device)

        self.stride, self.randn, self.size = stride, randn, (n, h, w, c_in)
        shape = (n, (h - 1) // stride + 1, (w - 1) // stride + 1, c_out)
        _, self.g = slot(shape, dtype, device, crop=crop)
        self.g.copy_(randn(*shape))
        self.weight = (randn(c_out, 3, 3, c_in) / (9 * c_out / stride**2) ** 0.5).to(dtype)
        self.packed = self.weight.flip(1, 2).permute(3, 1, 2, 0).contiguous()
        self.buffer, self.out = slot(self.size, dtype, device, crop=crop)
        self.engines = TILES if c_in != 3 else [conv_sm80_input_grad.IMAGE]

    def beside(self, channels):
        """Another view of the input's pixels."""
        _, view = slot((*self.size[:3], channels), self.g.dtype, self.g.device)
        return view.copy_(self.randn(*view.shape))

    def exact(self):
        """In fp64, of operands rounded to TF32 where tensor cores multiply fp32."""
        g, weight = self.g, self.weight
        if g.dtype == torch.float32 and self.size[3] != 3:
            g, weight = to_tf32(g.contiguous()), to_tf32(weight)
        found, _, _ = torch.ops.aten.convolution_backward(
            g.double().permute(0, 3, 1, 2),
            torch.empty(self.size, dtype=torch.float64, device=g.device).permute(0, 3, 1, 2),
            weight.double().permute(0, 3, 1, 2), None, [self.stride] * 2, [1, 1], [1, 1], False,
            [0, 0], 1, [True, False, False],
        )  # fmt: skip
        return found.permute(0, 2, 3, 1)

    def run(self, engine, **options):
        self.buffer.fill_(NAN)
        conv_sm80_input_grad.run(
            engine, self.g, self.packed, self.out, stride=self.stride, **options
        )

    def check(self, exact):
        """One rounding of what is stored, and a few of sums; nothing else is written."""
        slack = 1e-3 if self.g.is_cuda else 2e-5
        error, size = (self.out.double() - exact).abs(), exact.abs()
        unit = torch.finfo(self.out.dtype).eps / 2
        excess = (error - unit * 1.01 * size - slack * size.clamp(min=1)).max().item()
        assert excess <= 0, f"error up to {error.max().item():.3g}, {excess:.3g} too much"
        self.out.fill_(NAN)
        assert self.buffer.isnan().all(), "it wrote outside its slot"


# --------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c_in", "stride"), [(64, 2), (3, 2), (3, 1)])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (9, 7), (8, 18), (17, 34), (3, 66)])
def test_odd_and_even_sizes(size, c_in, stride, device):
    """Pixels of the last line and column meet fewer taps, or the strip ends before them."""
    for crop in (False, True):  # Cropped rows do not follow each other.
        layer = Gradient(2, *size, c_in, 24, stride=stride, crop=crop, device=device)
        for engine in layer.engines:
            layer.run(engine)
            layer.check(layer.exact())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("c_in", "c_out"), [(8, 8), (64, 128), (72, 40), (136, 16), (3, 64)])
def test_every_number_of_channels(c_in, c_out, dtype, device):
    """Last steps of one unit to four, last tiles of a few channels; NaN beside every slot."""
    layer = Gradient(1, 6, 9, c_in, c_out, dtype=dtype, device=device)
    for engine in layer.engines:
        layer.run(engine)
        layer.check(layer.exact())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c_in", [72, 3])
def test_what_is_added_and_what_masks(c_in, dtype, device):
    layer = Gradient(2, 5, 8, c_in, 16, dtype=dtype, device=device)
    few = 8 if c_in > 3 else 1
    for add_c, mask_c in ((c_in, 0), (few, 0), (0, c_in), (few, c_in - few)):
        add, mask = layer.beside(add_c), layer.beside(mask_c)
        if mask_c:
            mask[0, 0, 0, :2] = torch.tensor([NAN, 0.0])[:mask_c]
        exact = layer.exact()
        exact[..., :add_c] += add.double()
        exact[..., c_in - mask_c :] *= ~(mask <= 0)
        for engine in layer.engines:
            layer.run(engine, add=add if add_c else None, mask=mask if mask_c else None)
            layer.check(exact)


@pytest.mark.parametrize("c_in", [64, 3])
def test_what_is_added_may_be_the_output_watched(c_in, device):
    layer = Gradient(1, 5, 7, c_in, 16, device=device)
    for engine in layer.engines:
        layer.buffer.fill_(NAN)
        start = layer.out.copy_(layer.randn(*layer.size)).double()
        given = dict(stride=2, add=layer.out)
        conv_sm80_input_grad.run(engine, layer.g, layer.packed, layer.out, **given)
        layer.check(layer.exact() + start)


@pytest.mark.parametrize("c_in", [64, 3])
def test_nan_and_inf_go_where_they_go_in_torch(c_in, device):
    layer = Gradient(1, 9, 12, c_in, 16, device=device)
    layer.g[0, 1, 2, 5], layer.g[0, 4, 5, 0] = NAN, float("inf")
    exact = layer.exact()
    for engine in layer.engines:
        layer.run(engine)
        assert torch.equal(layer.out.isnan(), exact.isnan())
        assert torch.equal(layer.out.isposinf(), exact.isposinf())


# --------------------------------------------------------------------------------------
# What the host sees
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rings_hold_whatever_the_timing(dtype, early, emulation):
    """More chunks than any ring has stages, of parities with one tap; no bank is met twice."""
    emulation.copies_land_early(early)
    layer = Gradient(1, 9, 21, 24, 104 if dtype == HALF else 88, dtype=dtype)
    g, out = layer.g, layer.out
    emulation.take_counts()
    for stages in (3, 4):
        for tile in ((16, 8), (8, 16), (4, 32), (32, 8), (16, 16), (8, 32)):
            layer.buffer.fill_(NAN)
            emulation.conv_sm80_input_grad(
                0, g=fields.view("g", g, g, *g.shape), out=fields.view("out", out, g, *out.shape),
                add=None, mask=None, weight=layer.packed.data_ptr(), n=1, height=9, width=21,
                out_height=5, out_width=11, c_in=24, c_out=g.shape[3], add_c=0, mask_c=0,
                tile_h=tile[0], tile_w=tile[1], stages=stages, dtype=fields.DTYPES[dtype],
            )  # fmt: skip
            layer.check(layer.exact())
            counts = emulation.take_counts()
            assert (counts["copy_conflicts"], counts["matrix_conflicts"]) == (0, 0)
            config = conv_sm80.Config(tile[0] * tile[1], 64)
            expected = conv_sm80_input_grad.shared_bytes(config, tile, stages)
            assert counts["shared_bytes"] == expected
            # Nine taps for four pixels, and none for others: 16 pixels by 8 channels a product.
            steps = -(-g.shape[3] * dtype.itemsize // 32)
            tiles = conv_sm80.tiles_of(5, 11, tile)
            assert counts["products"] == tiles * 9 * steps * config.pixels // 16 * 8


def test_every_device_has_room_and_large_ones_for_two():
    for config in conv_sm80_input_grad.configs():
        for size in ((1, 1), (200, 336), (7, 400), (400, 7)):
            tile = conv_sm80_input_grad.tile(config, *size)
            for capability in ((8, 0), (8, 6), (9, 0), (12, 0)):
                stages = conv_sm80_input_grad.depth(config, tile, capability)
                found = conv_sm80_input_grad.shared_bytes(config, tile, stages)
                blocks = 2 if capability in ((8, 0), (9, 0)) else 1
                assert blocks * found <= conv_sm80.room(capability)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(dtype=3), "dtype must be one of 0, 1, 2, got 3"),
        (dict(stages=2), "stages must be one of 3, 4, got 2"),
        (dict(out_height=4), "out_height must be 5, got 4"),
        (dict(c_in=12), "must be multiples of 8, got 12"),
        (dict(c_out=0), "c_out must be at least 1, got 0"),
        (dict(tile_w=4), "no tiles of 16 x 4 pixels"),
        (dict(tile_w=24), "no tiles of 16 x 24 pixels"),
        (dict(g=(1 << 20, 1 << 20, 1 << 14, 68)), "multiples of 16 bytes"),
        (dict(add_c=8), "add_c without add must be 0, got 8"),
        (dict(mask=(1 << 20, 1 << 20, 1 << 14, 128), mask_c=72), "mask_c must be at most 64"),
        (dict(n=1 << 28, g=(1 << 20, 8, 8, 8), out=(1 << 20, 8, 8, 8)), "2\\^30 tiles"),
    ],
)
def test_what_cannot_be_is_said(wrong, words, emulation):
    at = 1 << 20
    given = dict(
        g=(at, 1 << 20, 1 << 14, 64), out=(at, 1 << 20, 1 << 14, 64), add=None, mask=None,
        weight=at, n=1, height=10, width=10, out_height=5, out_width=5, c_in=64, c_out=64,
        add_c=0, mask_c=0, tile_h=16, tile_w=8, stages=3, dtype=0,
    )  # fmt: skip
    with pytest.raises((ValueError, OverflowError), match=words):
        emulation.conv_sm80_input_grad(0, **{**given, **wrong})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(dtype=3), "dtype must be one of 0, 1, 2, got 3"),
        (dict(stride=3), "stride must be one of 1, 2, got 3"),
        (dict(mask=(1 << 20, 1 << 20, 1 << 14, 4), mask_c=4), "mask_c must be at most 3, got 4"),
        (dict(c_out=12), "multiples of 16 bytes"),
        (dict(g=((1 << 20) + 2, 1 << 20, 1 << 14, 64)), "multiples of 16 bytes"),
        (dict(n=1 << 33, g=(1 << 20, 8, 8, 8), out=(1 << 20, 8, 8, 8)), "split the batch"),
    ],
)
def test_what_gradients_of_images_cannot_be_is_said(wrong, words, emulation):
    at = 1 << 20
    given = dict(
        g=(at, 1 << 20, 1 << 14, 64), out=(at, 300, 30, 3), add=None, mask=None, weight=at, n=1,
        height=10, width=10, out_height=5, out_width=5, c_out=64, add_c=0, mask_c=0, stride=2,
        dtype=0,
    )  # fmt: skip
    with pytest.raises((ValueError, OverflowError), match=words):
        emulation.conv_sm80_image_grad(0, **{**given, **wrong})


def test_refusals_name_what_is_wrong(monkeypatch):
    def refused(layer, stride=2, **options):
        return conv_sm80_input_grad.refusal(
            layer.g, layer.packed, layer.out, stride=stride, **options
        )

    single = Gradient(1, 5, 5, 16, 8, dtype=torch.float32)
    image = Gradient(1, 5, 5, 3, 8, dtype=torch.float32)
    assert refused(Gradient(1, 5, 5, 16, 8)) is refused(single) is refused(image) is None
    assert "float64" in refused(Gradient(1, 5, 5, 16, 8, dtype=torch.float64))
    assert "no kernel 3 with stride 1" in refused(Gradient(1, 5, 5, 16, 8), stride=1)
    assert "out has 12 channels" in refused(Gradient(1, 5, 5, 12, 8))
    assert "g has 12 channels" in refused(Gradient(1, 5, 5, 3, 12))
    layer = Gradient(1, 5, 5, 16, 8)
    assert "mask does not start" in refused(layer, mask=layer.beside(16)[..., 4:12])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert "may not be rounded to TF32" in refused(single)
    assert refused(image) is None  # Its products are not.


# --------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_large_layers_and_no_change_from_run_to_run(dtype):
    """Many blocks and launches in a row: a race would show as a difference some time."""
    require("cuda")
    for c_in, c_out in ((64, 128), (128, 64), (3, 64)):
        layer = Gradient(4, 101, 168, c_in, c_out, dtype=dtype, device="cuda")
        for engine in layer.engines:
            layer.run(engine)
            result = layer.out.clone()
            layer.check(layer.exact())
            for _ in range(50):
                layer.run(engine)
                assert torch.equal(layer.out, result)
