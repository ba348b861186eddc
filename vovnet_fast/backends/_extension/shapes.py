"""What both passes know of the extension's results: shapes, and codes of kinds."""

from __future__ import annotations

from ...specs import Pool

NORM_ROWS = 6
"""Rows of a batch norm: mean, rstd, scale, shift, variance, count."""

GATES = {"hard_sigmoid": 0, "sigmoid": 1}
PADDING = {"ceil": 0, "padded": 1}


def strided(height: int, width: int, stride: int) -> tuple[int, int]:
    """Size of the output of a 3x3 convolution, padded by one."""
    assert stride in (1, 2), f"no kernel with stride {stride}"
    return (height - 1) // stride + 1, (width - 1) // stride + 1


def pooled(height: int, width: int, mode: Pool) -> tuple[int, int]:
    """Size of the output of a max pool."""
    if mode == "padded":
        return (height - 1) // 2 + 1, (width - 1) // 2 + 1
    return height // 2, width // 2
