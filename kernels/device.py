"""What a GPU can do at most, as far as predictions need it.

Rates are those that a large matrix product and a large copy reach, measured where it says
so. Elsewhere they are :data:`REACHED` of NVIDIA's data sheet, which is assumed.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ._common import capability, planned_for, processors
from .resources import nearest

Precision = Literal["half", "tf32", "exact", "int8", "fp8"]

REACHED = 0.9
"""Of a data sheet's rates, by the best kernels. Assumed."""

_L2_PORT = 64  # Bytes a clock that a processor takes from L2, on all of these.
_SHARED_PORT = 128  # Bytes a clock between its shared memory and itself.
_LANES = 128  # Threads of which it issues an instruction in a clock: four warps.


@dataclass(frozen=True)
class Device:
    """Rates of a GPU. Units: FLOP, bytes, seconds.

    Attributes:
        name: of the card.
        capability: compute capability.
        processors: streaming multiprocessors.
        half, tf32, exact: FLOP/s of products in fp16 or bf16, in TF32, in fp32.
        int8, fp8: the same in eight bits, with sums in int32 and in fp32; 0 where there are none.
        dram: bytes/s of memory, read and written together.
        l2: bytes/s from L2 into all processors.
        l2_size: bytes of L2.
        clock: Hz under load.
        source: where the rates come from.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    half: float
    tf32: float
    exact: float
    dram: float
    l2: float
    l2_size: int
    clock: float
    source: str
    int8: float
    fp8: float

    def flops(self, precision: Precision) -> float:
        """FLOP/s of all processors together."""
        found: float = getattr(self, precision)
        return found

    @property
    def l2_port(self) -> float:
        """Bytes/s that one processor takes from L2 at most, however idle the others are."""
        return _L2_PORT * self.clock

    @property
    def shared(self) -> float:
        """Bytes/s of the shared memory of one processor."""
        return _SHARED_PORT * self.clock

    @property
    def lanes(self) -> float:
        """Instructions of threads that one processor issues in a second."""
        return _LANES * self.clock


_MEASURED = (
    "copy and bf16 matmul measured on one; L2: the middle of public microbenchmarks' 5.5 to "
    "7 TB/s; fp32, TF32: data sheet; eight bits: twice bf16"
)
_SHEET = "0.9 of the data sheet; L2 and clock assumed"

H100 = Device(
    "H100", (9, 0), 132, half=798e12, tf32=399e12, exact=60e12,
    dram=3.0e12, l2=6.25e12, l2_size=50 << 20, clock=1.7e9, source=_MEASURED,
    int8=1596e12, fp8=1596e12,
)  # fmt: skip
H200 = dataclasses.replace(
    H100, name="H200", half=790e12, tf32=395e12, dram=4.3e12, int8=1580e12, fp8=1580e12
)


def _sheet(
    name: str, number: tuple[int, int], count: int, half: float, exact: float, dram: float,
    l2: float, l2_mib: int, clock: float, int8: float, fp8: float,
) -> Device:  # fmt: skip
    """Products in TFLOP/s, without sparsity, memory and L2 in TB/s, as on the data sheet."""
    return Device(
        name, number, count, half * REACHED * 1e12, half / 2 * REACHED * 1e12,
        exact * REACHED * 1e12, dram * REACHED * 1e12, l2 * 1e12, l2_mib << 20, clock, _SHEET,
        int8 * REACHED * 1e12, fp8 * REACHED * 1e12,
    )  # fmt: skip


CARDS = (
    # A100: of the 5120 bytes a clock that NVIDIA's white paper gives its L2, two thirds.
    _sheet("A100", (8, 0), 108, 312, 19.5, 1.94, 4.7, 40, 1.4e9, 624, 0),
    _sheet("RTX 3090", (8, 6), 82, 71, 35.6, 0.936, 2.5, 6, 1.7e9, 284, 0),
    # Jetson AGX: its L2's rate is that of the RTX 3090, by processor and clock.
    _sheet("Orin", (8, 7), 16, 42.5, 5.3, 0.205, 0.37, 4, 1.3e9, 85, 0),
    _sheet("RTX 4090", (8, 9), 128, 165, 82.6, 1.008, 5.0, 72, 2.5e9, 661, 330),
    H100,
    H200,
    _sheet("B200", (10, 0), 148, 2250, 75, 8.0, 10.0, 126, 1.8e9, 4500, 4500),
    _sheet("RTX 5090", (12, 0), 170, 209, 104.8, 1.792, 6.0, 96, 2.4e9, 838, 419),
)


def known(name: str, capability: tuple[int, int]) -> Device:
    """The card of that name, or the one whose architecture is nearest."""
    family = nearest(capability, {card.capability for card in CARDS})
    found = [card for card in CARDS if card.capability == family]
    named = [card for card in found if card.name in name]
    return (named or found)[0]


def scaled(card: Device, count: int) -> Device:
    """The same with another number of processors, which share all but memory."""
    if count == card.processors:
        return card
    ratio = count / card.processors
    return dataclasses.replace(
        card,
        processors=count,
        half=card.half * ratio,
        tf32=card.tf32 * ratio,
        exact=card.exact * ratio,
        l2=card.l2 * ratio,
        int8=card.int8 * ratio,
        fp8=card.fp8 * ratio,
        source=f"{card.name}'s by the processor ({card.source})",
    )


def derive(properties: Any) -> Device:
    """From what torch says of a CUDA device: a known card, or the nearest one, scaled.

    Args:
        properties: of :func:`torch.cuda.get_device_properties`.
    """
    number = (properties.major, properties.minor)
    card = known(properties.name, number)
    count = properties.multi_processor_count
    if card.name in properties.name and count == card.processors:
        return card
    found = scaled(card, count)
    # Kilohertz, two transfers a clock, and bits: 0, or absent, where a driver hides them.
    rate = 2e3 * getattr(properties, "memory_clock_rate", 0)
    rate *= getattr(properties, "memory_bus_width", 0) / 8 * REACHED
    size = getattr(properties, "L2_cache_size", 0)
    return dataclasses.replace(
        found,
        name=properties.name,
        capability=number,
        dram=rate or found.dram,
        l2_size=size or found.l2_size,
    )


def of(device: torch.device) -> Device:
    """Rates of ``device``; for meta tensors of what ``planning_for`` names, by default an H100."""
    target = planned_for()
    gpu = device if device.type == "cuda" else target.gpu if device.type == "meta" else None
    if gpu is not None:
        return _of_gpu(gpu)
    return _of_card(target.name, capability(device), processors(device))


@functools.cache
def _of_gpu(device: torch.device) -> Device:
    return derive(torch.cuda.get_device_properties(device))


@functools.cache
def _of_card(name: str, number: tuple[int, int], count: int) -> Device:
    return scaled(known(name, number), count)
