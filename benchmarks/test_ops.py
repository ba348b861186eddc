"""eSE, batch norm, max pool and depthwise convolutions, forward and backward, by every provider.

``pytest benchmarks/test_ops.py --benchmark-only`` (``-m "slow or not slow"`` for torch.compile as
well). bf16 at the sizes of V-39 and V-19-slim-dw at 800x1344 and 640x1600 on a GPU, one small
size in fp32 on a CPU.
"""

import pytest
import torch

from .op_rows import measure_op, providers, skip_unless_usable
from .ops import STAGES, other_cases

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SHAPES = ((1, 800, 1344), (1, 640, 1600)) if ON_GPU else ((1, 160, 160),)
SPECS = ("V-39-eSE", "V-19-slim-dw-eSE")

CASES = {
    case.name: case
    for shape in SHAPES
    for spec in SPECS
    for case in other_cases(spec, shape, STAGES if ON_GPU else (2,))
}


@pytest.mark.parametrize("provider", providers())
@pytest.mark.parametrize("name", CASES)
def test_op(name, provider, benchmark, watch, device, ceilings):
    skip_unless_usable(provider, device)
    measure_op(CASES[name], provider, DTYPE, benchmark, watch, ceilings)
