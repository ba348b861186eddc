"""int8 and fp8 as calibrators and layers see them: what a scale is, and what values become."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..arithmetic import DTYPES, LEVELS, fp8, int8
from .ranges import Range, Rounding
from .walking import DEPTHWISE, IMAGE

DEAD = 2.0**-24
"""The value of one step of an activation that calibration has seen nothing but zeros of. As small
as this because weights take it up: a larger one would leave others of their row fewer digits."""


class Format(NamedTuple):
    """How a network is quantised.

    Attributes:
        dtype: ``int8`` or ``fp8``.
        levels: the largest activation of int8, 127 or 255; 448 in fp8.
        wide_stem: see :class:`vovnet_fast.arithmetic.layers.QuantizedNetwork`.
    """

    dtype: str
    levels: int
    wide_stem: bool = False

    @property
    def ops(self) -> ModuleType:
        """Its ops by plain PyTorch."""
        return int8 if self.dtype == "int8" else fp8

    @property
    def image_limit(self) -> int:
        """The largest magnitude of a quantised image."""
        if self.dtype == "fp8":
            return fp8.LARGEST
        return int8.WIDE if self.wide_stem else int8.LARGEST

    @property
    def mean_scale(self) -> int:
        """Steps of an eSE's mean for one step of activations."""
        return 1 if self.dtype == "fp8" else 2 ** (int8.MEAN_BITS - self.levels.bit_length())

    def scale(self, name: str, reached: Range) -> Tensor:
        """``[G]`` fp64: the value of one step of an activation, :data:`DEAD` where it is zero."""
        if name == IMAGE:
            steps = torch.maximum(-reached.low, reached.high) / self.image_limit
        elif self.dtype == "fp8":
            steps = torch.maximum(-reached.low, reached.high) / fp8.LARGEST
        else:
            steps = (reached.high - reached.low) / self.levels
        return torch.where(steps > 0, steps, torch.full_like(steps, DEAD))

    def zero(self, name: str, reached: Range) -> Tensor:
        """``[G]`` uint8: the zero point, which only outputs of depthwise convolutions have."""
        if self.dtype == "fp8" or not name.endswith(DEPTHWISE):
            return torch.zeros_like(reached.low, dtype=torch.uint8)
        return (-reached.low / self.scale(name, reached)).round().to(torch.uint8)

    def rounding(self, name: str) -> Rounding:
        """What values of an activation become."""

        def rounded(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
            reached = Range(low, high)
            scale = self.scale(name, reached)
            if self.dtype == "fp8":
                return fp8.to_e4m3((x / scale).float()).double() * scale
            zero = self.zero(name, reached).to(x.dtype)
            limits = (-self.image_limit, self.image_limit) if name == IMAGE else (0, self.levels)
            return (((x / scale).round() + zero).clamp(*limits) - zero) * scale

        return rounded


def require(dtype: str, levels: int | None) -> Format:
    """A format by what the caller asked for.

    Raises:
        ValueError: there is no such dtype, or no such number of levels.
        RuntimeError: this torch cannot emulate fp8.
    """
    if dtype not in DTYPES:
        raise ValueError(f"quantize: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "fp8":
        reason = fp8.why_not()
        if reason is not None:
            raise RuntimeError(f"quantize: fp8 is not to be had: {reason}")
        if levels is not None:
            raise ValueError(f"quantize: levels are those of int8, and dtype is fp8: got {levels}")
        return Format("fp8", fp8.LARGEST)
    if levels is not None and (type(levels) is not int or levels not in LEVELS):
        raise ValueError(
            f"quantize: levels must be one of {', '.join(map(str, LEVELS))}, got {levels!r}"
        )
    return Format("int8", LEVELS[0] if levels is None else levels)
