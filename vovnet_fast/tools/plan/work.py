"""What a launch has to do, the sum of many by kind, and the time that a device needs at least."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

H200_TFLOPS = 790.0
"""Measured bf16 matrix multiplication rate of an H200, in 1e12 FLOP/s."""

H200_TBS = 4.3
"""Measured copy bandwidth of an H200, read and written, in 1e12 bytes/s."""

POINTWISE = "gate + identity"
ESE_POOL = "eSE pool + FC"
POOL = "max pool"
DEPTHWISE = "depthwise 3x3"
ESE_BACKWARD = "eSE backward"
STATISTICS = "batch statistics"
NORM_BACKWARD = "batch norm backward"
KINDS = (
    "conv 3x3",
    "conv 1x1",
    DEPTHWISE,
    "batch norm",
    "scale, shift, ReLU",
    "ReLU",
    "cat",
    ESE_POOL,
    POINTWISE,
    POOL,
)
"""Order of the rows; kinds that are not here come last, in the order in which they ran."""


@dataclass(frozen=True)
class Work:
    """What one launch has to do: its kind, FLOP, and bytes read and written."""

    kind: str
    flop: int
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Rates:
    """What a device can do at most.

    Attributes:
        tflops: matrix multiplication in the dtype of the activations, 1e12 FLOP/s.
        tbs: memory traffic, read and written together, 1e12 bytes/s.

    Raises:
        ValueError: a rate is not positive and finite.
    """

    tflops: float = H200_TFLOPS
    tbs: float = H200_TBS

    def __post_init__(self) -> None:
        for name, rate in (("matrix rate", self.tflops), ("bandwidth", self.tbs)):
            if not 0 < rate < math.inf:
                raise ValueError(f"the {name} must be positive and finite, got {rate}")

    def floor(self, work: Work) -> float:
        """Seconds below which ``work`` cannot be done."""
        moved = work.bytes_read + work.bytes_written
        return max(work.flop / self.tflops, moved / self.tbs) * 1e-12


@dataclass(frozen=True)
class Row:
    """All launches of one kind.

    Attributes:
        kind: in words.
        launches: how many.
        flop: their FLOP.
        bytes_read: bytes they read.
        bytes_written: bytes they write.
        floor_seconds: sum over them of the longer of arithmetic and traffic.
    """

    kind: str
    launches: int
    flop: int
    bytes_read: int
    bytes_written: int
    floor_seconds: float

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Tally:
    """A forward pass on one path: a row a kind of launch."""

    rows: tuple[Row, ...]

    @property
    def total(self) -> Row:
        """The sum of all rows."""
        names = ("launches", "flop", "bytes_read", "bytes_written", "floor_seconds")
        return Row("total", *(sum(getattr(row, name) for row in self.rows) for name in names))


def tally(works: Iterable[Work], rates: Rates) -> Tally:
    """Add up by kind."""
    groups: dict[str, list[Work]] = {kind: [] for kind in KINDS}
    for work in works:
        groups.setdefault(work.kind, []).append(work)
    return Tally(
        tuple(
            Row(
                kind,
                len(group),
                sum(work.flop for work in group),
                sum(work.bytes_read for work in group),
                sum(work.bytes_written for work in group),
                sum(rates.floor(work) for work in group),
            )
            for kind, group in groups.items()
            if group
        )
    )


def bytes_of(operands: Iterable[Any]) -> int:
    """Bytes of the tensors among ``operands``; one that is passed twice counts once."""
    tensors = {id(value): value for value in operands if isinstance(value, Tensor)}
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
