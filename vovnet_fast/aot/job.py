"""One kernel to compile: a launch that was planned, and its name in tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..kernels._common import Launch

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")


@dataclass(frozen=True)
class Job:
    """One kernel to compile.

    Attributes:
        kernel: name of the operation.
        layer: the representative shape, in words.
        config: name of the configuration.
        launch: what to compile.
        essential: one of the jobs that together show every kernel and configuration once.
    """

    kernel: str
    layer: str
    config: str
    launch: Launch
    essential: bool = True


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A tensor that has a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def capability(arch: str) -> tuple[int, int]:
    """``(9, 0)`` for ``sm_90``."""
    number = int(arch.removeprefix("sm_"))
    return number // 10, number % 10
