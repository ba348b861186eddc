"""The CPU half of the extension and the Triton kernels, in the interpreter, agree.

Both are held against the reference elsewhere, each with its own tolerance. Here they get
the same inputs, and may differ by the roundings of two ways to add up.
"""

import itertools

import pytest
import torch

from tests.extension_cases import Tensors, require
from vovnet_fast import selfcheck
from vovnet_fast.backends import cpu, triton

CPU = torch.device("cpu")
FUNCTIONS = sorted({case.function for case in selfcheck.CASES})


@pytest.fixture(autouse=True)
def _both():
    require("cpu")
    if torch.cuda.is_available():
        pytest.skip("Triton takes tensors on the CPU in its interpreter only")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@torch.no_grad()
def test_same_results(function, dtype):
    cases = [case for case in selfcheck.CASES if case.function == function and not case.slim]
    if function.startswith("conv"):
        cases = cases[-1:]  # The interpreter takes seconds for each.
    for case in cases:
        ours, theirs = (list(case.call(b, Tensors(dtype, dtype, CPU))) for b in (cpu, triton))
        for a, b in itertools.zip_longest(ours, theirs):
            assert a.dtype == b.dtype
            unit = torch.finfo(dtype).eps if a.is_floating_point() else 0
            # Low precision: a rounding between a convolution's sum and what follows it.
            limit = (16 if dtype == torch.float32 else 4) * unit * b.double().abs().max().item()
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=limit)
