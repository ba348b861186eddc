"""What a torch or an environment lacks that tests ask for: they skip there, and say so."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from vovnet_fast import compat


def _convolves(dtype):
    try:
        F.conv2d(torch.ones(1, 1, 3, 3, dtype=dtype), torch.ones(1, 1, 3, 3, dtype=dtype))
    except RuntimeError:
        return False
    return True


CONVOLVES_HALF = _convolves(torch.float16)
"""Whether plain PyTorch convolves fp16 on a CPU, which is what ours is compared with there."""

needs_half = pytest.mark.skipif(
    not CONVOLVES_HALF,
    reason=f"torch {torch.__version__} convolves no fp16 on a CPU to compare with",
)
HALF = pytest.param(torch.float16, marks=needs_half)


def require_half(dtype, device):
    """Skip a test that has plain PyTorch convolve or pool in a dtype, where it cannot."""
    if dtype == torch.float16 and torch.device(device).type == "cpu" and not CONVOLVES_HALF:
        pytest.skip(f"torch {torch.__version__} convolves no fp16 on a CPU to compare with")


def compared(dtypes):
    """Those of ``dtypes`` in which plain PyTorch convolves on a CPU."""
    return tuple(dtype for dtype in dtypes if dtype != torch.float16 or CONVOLVES_HALF)


def marked(dtypes):
    """``dtypes`` as parameters of a test, which skips for others."""
    return [HALF if dtype == torch.float16 else dtype for dtype in dtypes]


needs_looks = pytest.mark.skipif(
    not compat.TRACES,
    reason=f"torch.compile and torch.export of {torch.__version__} look into no network",
)


def require_pip():
    """Skip a test that builds or installs by pip, which is not imported: it loads distutils."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip, as those that uv makes")
