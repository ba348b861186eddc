"""One compiled kernel serves all sizes, and is told nothing about addresses that is not so."""

import pytest
import torch

from vovnet_fast.kernels import conv, conv_weight_grad, ese, max_pool
from vovnet_fast.kernels._any_size import vector
from vovnet_fast.kernels._variants import variant
from vovnet_fast.kernels.conv_config import ConvConfig
from vovnet_fast.kernels.conv_weight_grad_config import WeightGradConfig


def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


def slot(n, height, width, channels, *, first=0, more=64):
    return meta(n, height, width, first + channels + more)[..., first : first + channels]


@pytest.mark.parametrize(
    ("view", "dtype", "size"),
    [
        (lambda x: x, torch.float16, 8),
        (lambda x: x, torch.float32, 4),
        (lambda x: x, torch.float64, 2),
        (lambda x: x[..., 8:24], torch.float16, 8),
        (lambda x: x[..., 4:20], torch.float16, 1),  # Its address.
        (lambda x: x[..., 4:20], torch.float32, 4),
        (lambda x: x[..., :20], torch.float16, 1),  # Its channels.
        (lambda x: x.as_strided((2, 3, 5, 16), (10**3, 180, 36, 1)), torch.float16, 1),
        (lambda x: x.as_strided((2, 3, 5, 16), (10**3, 164, 32, 1)), torch.float16, 1),
        (lambda x: x.as_strided((2, 3, 5, 16), (1004, 160, 32, 1)), torch.float16, 1),
        # Nothing is ever that stride away from the only image, row and column.
        (lambda x: x.as_strided((1, 1, 1, 16), (5, 3, 7, 1)), torch.float16, 8),
        (lambda x: x[:1, :1, :1, :16].expand(2, 3, 5, 16), torch.float16, 8),
    ],
)
def test_vectors_are_what_everything_is_a_multiple_of(view, dtype, size):
    found = view(meta(2, 3, 5, 32, dtype=dtype))
    assert vector(found) == size
    assert vector(meta(2, 3, 5, 16, dtype=dtype), found) == size


def key(launch):
    return variant(launch).key


def convolution(n, height, width, c_in, c_out, kernel, **layout):
    x, out = slot(n, height, width, c_in), slot(n, height, width, c_out, **layout)
    weight, vectors = meta(c_out, kernel, kernel, c_in), meta(2, c_out, dtype=torch.float32)
    tile = (16, 16) if kernel == 3 else (1, 256)
    config = ConvConfig("tma", *tile, (128, 64), 64, 8, 3)
    return conv.plan(x, weight, *vectors, out, config=config)


@pytest.mark.parametrize("kernel", [3, 1])
def test_convolutions_share_a_kernel(kernel):
    first = convolution(1, 200, 336, 512, 192, kernel)
    for other in ((1, 208, 321, 192, 192, kernel), (16, 160, 400, 768, 384, kernel)):
        assert key(convolution(*other)) == key(first)


def test_passes_share_a_kernel():
    gates = [
        ese.plan_apply(z := slot(n, h, w, c), meta(n, c, dtype=torch.float32), None, z)
        for n, h, w, c in ((1, 16, 16, 256), (2, 25, 42, 512), (8, 1, 1, 1024), (1, 17, 1, 128))
    ]
    pools = [
        max_pool.plan(slot(n, 2 * h, 2 * w, c), slot(n, h, w, c), "ceil")
        for n, h, w, c in ((1, 16, 16, 256), (3, 25, 42, 512), (1, 1, 1, 128))
    ]
    for launches in (gates, pools):
        assert len({key(launch) for launch in launches}) == 1


def test_weight_gradients_share_a_kernel():
    config = WeightGradConfig("tma", 128, 1, (128, 64), 64, 8, 3)
    launches = [
        conv_weight_grad.plan(slot(n, h, w, c_in), slot(n, h, w, 192), 3, config=config)[0]
        for n, h, w, c_in in ((1, 16, 128, 512), (2, 25, 84, 192), (6, 1, 1, 768))
    ]
    assert len({key(launch) for launch in launches}) == 1


def test_what_is_not_aligned_takes_another():
    aligned, not_aligned = (
        ese.plan_apply(z, None, None, slot(1, 9, 9, 64, first=first))
        for z, first in ((slot(1, 9, 9, 64), 8), (slot(1, 9, 9, 64), 4))
    )
    assert aligned.constants["VECTOR"] == 8
    assert not_aligned.constants["VECTOR"] == 1
    assert key(aligned) != key(not_aligned)
