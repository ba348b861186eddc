"""Every different convolution layer of V-39 and V-99, forward and backward, on every engine.

``pytest benchmarks/test_conv.py --benchmark-only`` (``-m "slow or not slow"`` for torch.compile as
well). A layer is as the network asks for it: from a slot of a concat buffer into a slot, with
scale, shift and ReLU, and with the sums of eSE's pool where they are needed. A backend that
measures to choose among engines is measured on its fastest; ``extra_info["engines"]`` has all of
them, ms, or why one does not run. On a CPU there are a few layers, and one tiny one in Triton's
interpreter where that is on.
"""

import pytest
import torch

from .networks import layers
from .op_rows import interpreted, measure_op, providers, skip_unless_usable
from .ops import conv_cases

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SHAPES = ((1, 800, 1344), (1, 640, 1600))
FEW = ("3x3 3>64 on 1x160x160 stride 2", "3x3 128>128 on 1x40x40", "1x1 768>256 on 1x40x40 pool")
TINY = "3x3 64>64 on 1x8x8"


def _layers():
    if ON_GPU:
        return {
            name: layer
            for shape in SHAPES
            for spec in ("V-39-eSE", "V-99-eSE")
            for name, layer in layers(spec, shape).items()
        }
    found = layers("V-39-eSE", (1, 160, 160)) | layers("V-39-eSE", (1, 16, 16))
    return {name: found[name] for name in (*FEW, *([TINY] if interpreted() else []))}


CASES = {case.name: case for case in conv_cases(_layers())}


@pytest.mark.parametrize("provider", providers())
@pytest.mark.parametrize("name", CASES)
def test_conv(name, provider, benchmark, watch, device, ceilings, request):
    tiny = name.startswith(TINY)
    if provider != "triton" or not tiny:
        skip_unless_usable(provider, device)
    which = request.config.getoption("--engines")
    measure_op(CASES[name], provider, DTYPE, benchmark, watch, ceilings, quick=tiny, which=which)
