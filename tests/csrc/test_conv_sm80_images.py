"""The first layer, of images with three channels: its kernel on the host, and on a GPU.

Its weight gradient is looked at in test_conv_sm80_weight_grad.py, the gradient of images in
test_conv_sm80_input_grad.py.
"""

import pytest
import torch

from tests.csrc.test_conv_sm80 import DTYPES, NAN, Layer, folded
from tests.extension_cases import require
from vovnet_fast.backends import conv_sm80

CONFIG = conv_sm80.IMAGE_CONFIG


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (17, 18), (16, 33), (3, 70)])
def test_odd_sizes(size, stride, dtype, device):
    """Beside the image, and beside the slot, is NaN; pixels may lie anywhere."""
    for crop in (False, True):
        layer = Layer(2, *size, 3, 64, stride=stride, dtype=dtype, crop=crop, device=device)
        folded(layer, CONFIG, pool=True)
        folded(layer, CONFIG, relu=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_images_that_are_no_whole_units_watched(dtype, device):
    """Three channels of a packed image, of four, and from an address that is not aligned."""
    layer = Layer(1, 7, 6, 3, 72, stride=2, dtype=dtype, device=device)
    values = layer.x.clone()
    for pixel, first in ((3, 0), (4, 0), (3, 1), (5, 2)):
        storage = torch.full((7 * 6 * pixel + first + 8,), NAN, dtype=dtype, device=device)
        strides = (7 * 6 * pixel, 6 * pixel, pixel, 1)
        layer.x = storage.as_strided(values.shape, strides, first).copy_(values)
        folded(layer, CONFIG)


@pytest.mark.parametrize("c_out", [8, 64, 80, 128])
def test_every_number_of_output_channels(c_out, device):
    folded(Layer(1, 9, 13, 3, c_out, stride=2, device=device), CONFIG, pool=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_those_of_every_tile(dtype, device):
    layer = Layer(2, 19, 41, 3, 72, stride=2, dtype=dtype, device=device)
    layer.x += 4
    count, sums, squares = layer.run(CONFIG, statistics=True).double().unbind(1)
    exact = layer.product()
    layer.check(exact)
    flat = exact.flatten(0, 2)
    assert torch.equal(count.sum(0), torch.full_like(count[0], len(flat)))
    mean = sums.sum(0) / len(flat)
    torch.testing.assert_close(mean, flat.mean(0), rtol=1e-4, atol=1e-4)
    between = (count * (sums / count - mean) ** 2).sum(0)
    expected = ((flat - flat.mean(0)) ** 2).sum(0)
    torch.testing.assert_close(squares.sum(0) + between, expected, rtol=1e-3, atol=1e-3)


def test_nan_and_inf_go_where_they_go_in_torch(device):
    layer = Layer(1, 8, 16, 3, 64, stride=2, device=device)
    layer.x[0, 2, 3, 1], layer.x[0, 6, 9, 0] = NAN, float("inf")
    layer.run(CONFIG, scale=layer.scale, shift=layer.shift, relu=True)
    exact = layer.affine().relu()
    assert torch.equal(layer.out.isnan(), exact.isnan())
    assert torch.equal(layer.out.isposinf(), exact.isposinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_banks_never_conflict_and_there_is_one_tap(dtype, emulation):
    layer = Layer(1, 21, 37, 3, 128, stride=2, dtype=dtype)
    layer.run(CONFIG)
    counts = emulation.take_counts()
    names = "copy_conflicts", "matrix_conflicts", "unit_conflicts"
    assert [counts[name] for name in names] == [0, 0, 0]
    tiles = conv_sm80.tiles_of(11, 19, CONFIG.tile(11, 19, 3)) * 2
    depth = 32 * dtype.itemsize // 32  # Of 32 channels, steps of a product.
    assert counts["products"] == tiles * depth * 128 // 16 * 64 // 8
    assert counts["shared_bytes"] == (128 + 64) * 32 * dtype.itemsize


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(block_out=128), "images have tiles of 128 pixels by 64 channels, got 16 x 8 by 128"),
        (dict(tile_h=32), "images have tiles of 128 pixels by 64 channels"),
        (dict(out=((1 << 20) + 8, 1 << 20, 1 << 14, 64)), "multiples of 16 bytes"),
        (dict(c_out=60), "must be multiples of 8, got 60"),
        (
            dict(scale=None, shift=None, add=(1 << 20, 1 << 20, 1 << 14, 64), add_c=8),
            "nothing is added to a convolution of images",
        ),
        (dict(n=1 << 25), "2\\^30 tiles"),
    ],
)
def test_what_cannot_be_is_said(wrong, words, emulation):
    at = 1 << 20
    given = dict(
        x=(at, 30000, 300, 3), out=(at, 1 << 20, 1 << 14, 64), weight=at, scale=at, shift=at,
        pool_partials=None, statistics=None, add=None, mask=None, n=1, height=100, width=100,
        out_height=100, out_width=100, c_in=3, c_out=64, add_c=0, mask_c=0, kernel=3, stride=1,
        tile_h=16, tile_w=8, block_out=64, stages=4, relu=0, dtype=0,
    )  # fmt: skip
    with pytest.raises((ValueError, OverflowError), match=words):
        emulation.conv_sm80(0, **{**given, **wrong})


def test_what_is_taken():
    layer = Layer(1, 5, 5, 3, 64)
    assert conv_sm80.layer_configs(layer.weight) == [CONFIG]
    assert conv_sm80.fitting(layer.out, layer.weight, 1, (8, 6), layer.x) == [CONFIG]
    assert conv_sm80.refusal(layer.x, layer.weight, layer.out) is None
    beside = layer.beside(64)
    assert "nothing is added" in conv_sm80.refusal(layer.x, layer.weight, layer.out, add=beside)
    narrow = Layer(1, 5, 5, 3, 60)
    assert "out has 60 channels" in conv_sm80.refusal(narrow.x, narrow.weight, narrow.out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_large_images_and_no_change_from_run_to_run(dtype):
    require("cuda")
    layer = Layer(4, 201, 336, 3, 64, stride=2, dtype=dtype, device="cuda")
    folded(layer, CONFIG, pool=True)
    first = layer.run(CONFIG, statistics=True)
    result = layer.out.clone()
    for _ in range(50):
        assert torch.equal(layer.run(CONFIG, statistics=True), first)
        assert torch.equal(layer.out, result)
