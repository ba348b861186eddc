"""Small networks with norms as training leaves them, and images for them."""

import functools

import torch
from torch import nn

import vovnet_fast
from tests import straight_line
from tests.tiny import TINY
from vovnet_fast import VoVNet
from vovnet_fast.arithmetic import fp8
from vovnet_fast.quantization import FineTuning, QuantizedVoVNet, fine_tuning

DTYPES = ("int8", "fp8") if fp8.why_not() is None else ("int8",)

QUICK = {"calibrator": "minmax"}
"""What takes the least time, where the calibrator is of no matter."""


def images(count=2, channels=3, height=40, width=48, seed=0):
    """Smooth ones: of white noise convolutions make next to nothing but noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, height + 4, width + 4, generator=generator)
    return nn.functional.avg_pool2d(x, 5, 1) * 5 + 0.5


def model(name="detectron2", **options) -> VoVNet:
    """With random statistics of norms."""
    torch.manual_seed(0)
    return straight_line.randomise(VoVNet(TINY.get(name, name), **options)).eval()


@functools.cache
def quantized(name="detectron2", dtype="int8", **options) -> QuantizedVoVNet:
    """Nobody may change it."""
    return vovnet_fast.quantize(model(name), [images(6)], dtype, **{**QUICK, **options})


def trainable(name="detectron2", dtype="int8", **options) -> FineTuning:
    return fine_tuning(model(name), [images(6)], dtype, **{**QUICK, "stem": "int8", **options})


def sqnr(found, wanted) -> float:
    """In dB."""
    noise = (found.double() - wanted.double()).square().sum()
    return float(10 * (wanted.double().square().sum() / noise).log10())
