"""Weight gradients of the convolution for sm_80 and newer: on the host, and on a GPU."""

import itertools

import pytest
import torch

from tests.csrc.test_conv_sm80 import DTYPES, NAN, Layer, to_tf32
from vovnet_fast.backends import conv_sm80, conv_sm80_grad
from vovnet_fast.backends._extension import fields

IMAGE = "image"
"""What stands for the kernel of a layer of images, of three channels."""

LAYERS = [(1, 1), (3, 1), (3, 2), (IMAGE, 1), (IMAGE, 2)]


def layer_of(form, *size, c_in, c_out, **options):
    """A layer of a form; one of images has three channels, whatever is asked for."""
    kernel, c_in = (3, 3) if form == IMAGE else (form, c_in)
    return Layer(*size, c_in, c_out, kernel=kernel, **options)


def weight_grad(layer, g):
    """What it should be, in fp64."""
    kernel, x = layer.weight.shape[1], layer.x
    if x.dtype == torch.float32:
        x, g = to_tf32(x.contiguous()), to_tf32(g.contiguous())
    _, exact, _ = torch.ops.aten.convolution_backward(
        g.double().permute(0, 3, 1, 2), x.double().permute(0, 3, 1, 2),
        layer.weight.double().permute(0, 3, 1, 2), None, [layer.stride] * 2, [kernel // 2] * 2,
        [1, 1], False, [0, 0], 1, [False, True, False],
    )  # fmt: skip
    return exact.permute(0, 2, 3, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("form", "stride"), LAYERS)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 9, 5), (1, 3, 37), (1, 12, 33)])
def test_weight_gradients_are_right(size, form, stride, dtype, device):
    """Whole and broken tiles of channels, one part and several, and NaN beside every slot."""
    for crop, (c_in, c_out) in ((False, (72, 8)), (True, (16, 80))):
        layer = layer_of(
            form, *size, c_in=c_in, c_out=c_out, stride=stride, dtype=dtype, crop=crop,
            device=device,
        )  # fmt: skip
        g, kernel = layer.beside(c_out), layer.weight.shape[1]
        found = conv_sm80_grad.run(layer.x, g, kernel, stride=stride)
        exact = weight_grad(layer, g)
        rtol = 1e-4 if device.type == "cuda" else 1e-5
        torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=rtol * 30)
        if size == (1, 12, 33):  # Some are in parts.
            assert torch.equal(conv_sm80_grad.run(layer.x, g, kernel, stride=stride), found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("form", "stride"), [(1, 1), (3, 2), (IMAGE, 2)])
def test_a_small_weight_gradient_watched(form, stride, dtype, device):
    layer = layer_of(form, 1, 3, 5, c_in=16, c_out=24, stride=stride, dtype=dtype, device=device)
    g, kernel = layer.beside(24), layer.weight.shape[1]
    found = conv_sm80_grad.run(layer.x, g, kernel, stride=stride)
    torch.testing.assert_close(found.double(), weight_grad(layer, g), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("form", "stride"), LAYERS)
def test_weight_gradients_whatever_the_timing(form, stride, dtype, early, emulation):
    """Every form of step and depth of the ring, parts of one step and more; no conflicts."""
    emulation.copies_land_early(early)
    layer = layer_of(form, 1, 5, 39, c_in=24, c_out=40, stride=stride, dtype=dtype, crop=True)
    g, itemsize = layer.beside(40), dtype.itemsize
    exact = weight_grad(layer, g)
    kernel, _, c_in = layer.weight.shape[1:]
    emulation.take_counts()
    for tile in conv_sm80_grad.shapes(form, stride, itemsize):
        for stages in (2, 3):
            steps = conv_sm80.tiles_of(*layer.size[1:3], tile)
            for parts in (1, min(3, steps)):
                out = torch.full((40, kernel, kernel, c_in), NAN)
                partials = torch.full((parts, *out.shape), NAN)
                emulation.conv_sm80_weight_grad(
                    0, x=fields.view("x", layer.x, layer.x, *layer.x.shape),
                    g=fields.view("g", g, g, *g.shape), partials=partials.data_ptr(),
                    out=out.data_ptr(), n=1, height=5, width=39, out_height=layer.size[1],
                    out_width=layer.size[2], c_in=c_in, c_out=40, parts=parts, kernel=kernel,
                    stride=stride, tile_h=tile[0], tile_w=tile[1], stages=stages,
                    dtype=fields.DTYPES[dtype],
                )  # fmt: skip
                torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=3e-4)
                counts = emulation.take_counts()
                conflicts = [v for name, v in counts.items() if name.endswith("conflicts")]
                assert not any(conflicts)
                # ldmatrix transposes halves alone: fp32 is loaded word by word.
                assert (counts["words"] > 0) == (counts["matrices"] == 0) == (itemsize == 4)
                size = conv_sm80_grad.stage_bytes(tile, form, stride, itemsize)
                assert counts["shared_bytes"] == stages * size
                assert counts["products"] % steps == 0


@pytest.mark.parametrize("form", [3, IMAGE])
def test_nan_stays_where_it_is(form, device):
    """In the filters of its channel of g; in x, in the taps that meet it and in all filters."""
    layer = layer_of(form, 1, 6, 7, c_in=16, c_out=24, device=device)
    g = layer.beside(24)
    g[0, 2, 3, 5] = NAN
    found = conv_sm80_grad.run(layer.x, g, 3)
    assert torch.equal(found.isnan().any((1, 2, 3)), torch.arange(24, device=device) == 5)
    g.nan_to_num_()
    layer.x[0, 0, 0, 1] = NAN
    found = conv_sm80_grad.run(layer.x, g, 3)
    assert torch.equal(found.isnan(), weight_grad(layer, g).isnan())
    assert found.isnan().any()


def test_fp32_that_may_not_be_rounded_is_refused(monkeypatch):
    layer = Layer(1, 5, 5, 16, 24, dtype=torch.float32)
    g = layer.beside(24)
    assert conv_sm80_grad.refusal(layer.x, g, 3) is None
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert "may not be rounded to TF32" in conv_sm80_grad.refusal(layer.x, g, 3)
    assert "float64" in conv_sm80_grad.refusal(layer.x.double(), g.double(), 3)


def test_steps_follow_the_map_and_two_fit_every_device():
    assert conv_sm80_grad.shapes(3, 1) == conv_sm80_grad.shapes(1, 1) == [(4, 16), (2, 32), (1, 64)]
    assert conv_sm80_grad.shapes(3, 2) == [(4, 16), (2, 32)]
    for stride in (1, 2):
        assert conv_sm80_grad.shapes(IMAGE, stride) == [(4, 16), (2, 32), (1, 64)]
        assert conv_sm80_grad.shapes(IMAGE, stride, 4) == [(4, 8), (2, 16), (1, 32)]
    assert conv_sm80_grad.shapes(3, 1, 4) == [(4, 8), (2, 16), (1, 32)]
    assert conv_sm80_grad.shapes(3, 2, 4) == [(4, 8), (2, 16)]
    assert conv_sm80_grad._shape(25, 42, 3, 1) == (4, 16)
    assert conv_sm80_grad._shape(1, 1050, 1, 1) == (1, 64)
    for capability in ((8, 0), (8, 6), (9, 0), (12, 0)):
        for form, stride, size in itertools.product((1, 3, IMAGE), (1, 2), (2, 4)):
            for tile in conv_sm80_grad.shapes(form, stride, size):
                stages = conv_sm80_grad._stages(tile, form, stride, capability, size)
                found = stages * conv_sm80_grad.stage_bytes(tile, form, stride, size)
                assert found <= conv_sm80.room(capability)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(dtype=3), "dtype must be one of 0, 1, 2, got 3"),
        (dict(dtype=2), "no steps of 4 x 16 pixels"),
        (dict(dtype=2, tile_w=8, c_out=66), "multiples of 4, got 64 and 66"),
        (dict(c_in=3, g=((1 << 20) + 2, 1 << 20, 1 << 14, 64)), "multiples of 16 bytes"),
        (dict(stages=4), "stages must be one of 2, 3, got 4"),
        (dict(parts=0), "parts must be at least 1, got 0"),
        (dict(parts=99), "there are 1 steps, for 99 parts"),
        (dict(c_in=12), "must be multiples of 8, got 12 and 64"),
        (dict(tile_w=8), "no steps of 4 x 8 pixels"),
        (dict(x=(1 << 20, 1 << 20, 1 << 14, 68)), "multiples of 16 bytes"),
        (dict(n=0), "n, height and width must be at least 1, got 0"),
    ],
)
def test_what_weight_gradients_cannot_be_is_said(wrong, words, emulation):
    at = 1 << 20
    given = dict(
        x=(at, 1 << 20, 1 << 14, 64), g=(at, 1 << 20, 1 << 14, 64), partials=at, out=at, n=1,
        height=4, width=16, out_height=4, out_width=16, c_in=64, c_out=64, parts=1, kernel=3,
        stride=1, tile_h=4, tile_w=16, stages=3, dtype=0,
    )  # fmt: skip
    with pytest.raises((ValueError, OverflowError), match=words):
        emulation.conv_sm80_weight_grad(0, **{**given, **wrong})
