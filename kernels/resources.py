"""Registers and shared memory of the compiled convolutions, and how many fit on a processor.

The tables in ``resources/`` are the compiler's word, a file an architecture, written by
``python -m vovnet_fast.aot --resources``. They hold the half precisions, where choices
matter most. What they lack is estimated, and says so: a choice never needs a compiler.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._common import cdiv
from .conv_config import ConvConfig
from .conv_weight_grad_config import WeightGradConfig

FOLDER = Path(__file__).parent / "resources"

MAX_REGISTERS = 255
"""Of a thread; beyond, they spill."""

_REGISTERS = 1 << 16  # Of a processor.
_REGISTERS_AT_A_TIME = 8  # A thread's come by so many.
_SHARED_RESERVED = 1 << 10  # Bytes a resident program, by the driver.
_LANES = 32


@dataclass(frozen=True)
class Limits:
    """What a processor has room for: bytes of shared memory, threads, programs."""

    shared: int
    threads: int
    programs: int


# NVIDIA's CUDA programming guide, technical specifications by compute capability.
_LIMITS = {
    (8, 0): Limits(164 << 10, 2048, 32),
    (8, 6): Limits(100 << 10, 1536, 16),
    (8, 7): Limits(164 << 10, 1536, 16),
    (8, 9): Limits(100 << 10, 1536, 24),
    (9, 0): Limits(228 << 10, 2048, 32),
    (10, 0): Limits(228 << 10, 2048, 32),
    (12, 0): Limits(100 << 10, 1536, 24),
}


def nearest(capability: tuple[int, int], known: Any) -> tuple[int, int]:
    """Of the ``known`` compute capabilities the newest that is no newer, or the oldest."""
    return max((k for k in known if k <= capability), default=min(known))


@dataclass(frozen=True)
class Resources:
    """What a compiled program takes.

    Attributes:
        warps: of a program.
        registers: of a thread.
        shared: bytes of shared memory of a program.
        spilled: bytes of local memory of a thread.
        source: ``compiled for sm_90``, or ``estimated``.
    """

    warps: int
    registers: int
    shared: int
    spilled: int = 0
    source: str = "estimated"

    def resident(self, capability: tuple[int, int]) -> int:
        """Programs that fit on a processor at a time; 0 where not even one does."""
        limits = _LIMITS[nearest(capability, _LIMITS)]
        each = cdiv(self.registers, _REGISTERS_AT_A_TIME) * _REGISTERS_AT_A_TIME
        return min(
            _REGISTERS // (each * _LANES * self.warps),
            limits.shared // (self.shared + _SHARED_RESERVED),
            limits.threads // (_LANES * self.warps),
            limits.programs,
        )


def row(kind: str, kernel: int, precision: str) -> str:
    """Under which name a table has the configurations of a kind of launch."""
    return f"{kind} {kernel}x{kernel} {precision}"


@functools.cache
def tables() -> dict[tuple[int, int], dict[str, Any]]:
    """Content of the tables by compute capability: ``triton``, and ``programs`` by :func:`row`.

    There a configuration's name stands for its registers, bytes of shared memory and bytes
    spilled.
    """
    found = {}
    for file in sorted(FOLDER.glob("sm_*.json")):
        number = int(file.stem.removeprefix("sm_"))
        found[number // 10, number % 10] = json.loads(file.read_text(encoding="utf-8"))
    return found


def of(
    config: ConvConfig | WeightGradConfig,
    capability: tuple[int, int],
    *,
    kind: str,
    kernel: int,
    precision: str,
) -> Resources:
    """What a configuration takes, by the nearest table, or an estimate.

    Args:
        config: of a convolution or of a weight gradient.
        capability: of the device.
        kind: of the epilogue, or ``weight gradient``.
        kernel: 3 or 1.
        precision: ``half``, ``tf32``, ``exact``, ``int8`` or ``fp8``.
    """
    known = tables()
    # Bulk copies, and with them all names of the tma form, begin with sm_90.
    with_table = nearest(capability, known) if known else None
    if with_table is not None:
        programs = known[with_table]["programs"].get(row(kind, kernel, precision), {})
        if config.name in programs:
            registers, shared, spilled = programs[config.name]
            source = f"compiled for sm_{with_table[0]}{with_table[1]}"
            return Resources(config.num_warps, registers, shared, spilled, source)
    return estimate(config, capability, kind=kind, precision=precision)


_BESIDE_SUMS = {"tma": 32, "pointer": 80}
"""Registers of a thread that hold no sum: addresses, and operands on their way. Seen in tables."""

_OF_STATISTICS = 1.5
"""What the statistics of the tma form add to the registers of its sums. Seen in the tables."""


def estimate(
    config: ConvConfig | WeightGradConfig,
    capability: tuple[int, int],
    *,
    kind: str,
    precision: str,
) -> Resources:
    """From the sums that a thread holds, and the tiles that the pipeline does."""
    itemsize = {"half": 2, "int8": 1, "fp8": 1}.get(precision, 4)
    channels = sum(config.block_out)
    if isinstance(config, ConvConfig):
        rows, depth = config.pixels, config.block_k
        stored = rows * channels * itemsize if config.persistent else 0
    else:
        rows, depth, stored = config.columns * config.groups, config.pixels, 0
    sums = rows * channels // (_LANES * config.num_warps)
    if kind == "statistics" and config.form == "tma":
        sums = int(sums * _OF_STATISTICS)
    # Before sm_90 the stage that is multiplied is in registers.
    stages = config.num_stages - (capability < (9, 0))
    shared = stages * (rows + channels) * depth * itemsize + stored
    registers = min(sums + _BESIDE_SUMS[config.form], MAX_REGISTERS)
    return Resources(config.num_warps, registers, shared)
