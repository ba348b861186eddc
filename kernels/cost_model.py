"""The time of a launch: what it does, how fast the device is, and what waits for what.

A program fills its pipeline, runs its steps, and stores. A step takes as long as what is
slowest of: the products, the copies from L2, shared memory's port, the instructions; and
no less than one program alone can do it in, which waits for its copies and at its
barriers. Programs that share a processor hide each other's waits. The device takes as
many programs at a time as registers and shared memory let be resident, in waves, the last
of which may be nearly empty and takes as long as one program does. Nothing is faster than
the memory traffic that is compulsory.

What is assumed is a named constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ._common import cdiv
from .conv_config import Kind
from .device import Device, Precision
from .resources import Resources

WEIGHT_GRAD: Literal["weight gradient"] = "weight gradient"

LAUNCH = 3e-6
"""Seconds from one kernel to the next of a stream. Assumed."""

COPY_LATENCY = 0.7e-6
"""Seconds until a copy from L2 has arrived. Assumed."""

START = 0.5e-6
"""Seconds of a program before its first copy: barriers, descriptors. Assumed."""

BARRIER = 60
"""Clocks that a program alone loses between steps, at its barriers. Assumed."""

SPILLS = 1.5
"""By this factor a program that spills registers takes longer. Assumed: it shall not be chosen."""

WARPGROUP = 4  # Warps.


@dataclass(frozen=True)
class Layer:
    """A convolution as its launcher sees it, or a gradient of one.

    Attributes:
        batch, height, width: of the output; a 1x1 convolution may see one row. Of a weight
            gradient, those of the output's gradient.
        c_in, c_out: channels of a product and of the result. An input gradient multiplies
            the convolution's output channels. A weight gradient has the convolution's own.
        kernel: 3 or 1.
        stride: 1 or 2.
        dtype: of the activations; int8 for bytes.
        tf32: fp32 products may be rounded to TF32.
        kind: of the epilogue, or ``weight gradient``.
        tma: whether bulk copies can take the tensors.
        transposed: the input gradient of a stride of 2.
        added, masked: channels of the activations that a gradient's epilogue reads. In eight bits
            the bytes a pixel of a feature that is written beside, or beyond those, activations.
    """

    batch: int
    height: int
    width: int
    c_in: int
    c_out: int
    kernel: int = 3
    stride: int = 1
    dtype: torch.dtype = torch.float16
    tf32: bool = False
    kind: Kind | Literal["weight gradient"] = "forward"
    tma: bool = True
    transposed: bool = False
    added: int = 0
    masked: int = 0

    @property
    def precision(self) -> Precision:
        """Which products it is made of."""
        if self.dtype.itemsize == 1:
            return "int8" if self.dtype == torch.int8 else "fp8"
        return "half" if self.dtype.itemsize == 2 else "tf32" if self.tf32 else "exact"

    @property
    def pixels(self) -> int:
        """Of the output, in all images."""
        return self.batch * self.height * self.width

    @property
    def input_pixels(self) -> int:
        """Of the input, in all images; for a stride of 2 up to a row and a column."""
        if self.transposed:
            return self.batch * cdiv(self.height, 2) * cdiv(self.width, 2)
        return self.pixels * self.stride**2

    @property
    def flop(self) -> float:
        """Two a multiply-add, without padding."""
        met = self.stride**2 if self.transposed else 1
        return 2 * self.pixels * self.c_out * self.c_in * self.kernel**2 / met

    @property
    def weight_elements(self) -> int:
        """Of the weights."""
        return self.c_in * self.c_out * self.kernel**2

    @property
    def activation_bytes(self) -> int:
        """Each activation once: read, and of a convolution written."""
        read = self.input_pixels * self.c_in + self.pixels * (self.added + self.masked)
        return (read + self.pixels * self.c_out) * self.dtype.itemsize


@dataclass(frozen=True)
class Work:
    """A launch in the terms of the model. Bytes, FLOP and instructions are of one program.

    Attributes:
        programs: of the launch.
        steps: of a program; the mean, where they differ.
        flop: of a step, in vain or not.
        copied: bytes a step from L2.
        shared: bytes a step through the shared memory's port.
        instructions: a step, of threads.
        last_instructions: of threads, for the epilogue.
        last_bytes: that the epilogue moves.
        stages: of the pipeline.
        compulsory: bytes that the launch moves at least.
        serial: a warpgroup's products wait for operands that go through registers.
        persistent: programs loop over tiles, as many of them as processors.
        turns: and multiply the next tile under the epilogue of this one: two parts of a program
            have every other tile.
    """

    programs: int
    steps: float
    flop: float
    copied: float
    shared: float
    instructions: float
    last_instructions: float
    last_bytes: float
    stages: int
    compulsory: float
    serial: bool = False
    persistent: bool = False
    turns: bool = False


@dataclass(frozen=True)
class Prediction:
    """Seconds of an engine on a layer, and what they are made of.

    Attributes:
        engine: its name.
        seconds: all of it.
        compute, dram, l2, shared, issue: what each of these alone would take, with all
            processors busy: products (those in vain too), memory, copies from L2, shared
            memory's port, instructions.
        idle: seconds beyond the longest of them: filling and draining, waits, the last wave.
        launch: seconds between kernels.
        programs: of the main launch; 0 where it is not ours.
        resident: of them on a processor.
        waves: programs over those resident on the whole device.
        resources: of a program, None where it is not ours.
    """

    engine: str
    seconds: float
    compute: float
    dram: float
    l2: float = 0.0
    shared: float = 0.0
    issue: float = 0.0
    idle: float = 0.0
    launch: float = LAUNCH
    programs: int = 0
    resident: int = 0
    waves: float = 0.0
    resources: Resources | None = None

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        names = ("compute", "dram", "l2", "shared", "issue", "idle", "launch")
        return max(names, key=lambda name: getattr(self, name))

    def __str__(self) -> str:
        parts = ("compute", "dram", "l2", "shared", "issue", "idle", "launch")
        text = ", ".join(f"{name} {getattr(self, name) * 1e6:.1f}" for name in parts)
        found = f"{self.engine}: {self.seconds * 1e6:.1f} us ({text}"
        if self.programs:
            found += f"; {self.programs} programs, {self.resident} a processor, {self.waves:.2f}"
            found += " waves"
        if self.resources is not None:
            found += f"; resources {self.resources.source}"
        return found + ")"


def predict_work(
    engine: str, work: Work, device: Device, precision: Precision, resources: Resources
) -> Prediction:
    """Time of a launch. A program that does not fit on a processor takes for ever."""
    resident = resources.resident(device.capability)
    if resident < 1:
        return Prediction(engine, float("inf"), 0.0, 0.0, resources=resources)
    flops = device.flops(precision) / device.processors

    def step(each: int, running: int) -> dict[str, float]:
        """Seconds of a processor for a step of ``each`` programs, of so many on the device."""
        return {
            "compute": each * work.flop / flops,
            "l2": max(each * work.copied / device.l2_port, running * work.copied / device.l2),
            "shared": each * work.shared / device.shared,
            "issue": each * work.instructions / device.lanes,
        }

    def last(each: int, running: int) -> float:
        """Seconds of a processor for the epilogues of ``each`` programs."""
        moved = max(each / device.l2_port, running / device.l2) * work.last_bytes
        return max(each * work.last_instructions / device.lanes, moved)

    def alone(running: int) -> float:
        """Seconds of one program's steps, with nothing to hide its waits."""
        parts = step(1, running)
        barrier = parts["compute"] + BARRIER / device.clock
        if work.serial:
            barrier += (parts["shared"] + parts["issue"]) / max(resources.warps / WARPGROUP, 1)
        waits = COPY_LATENCY / max(work.stages - 1, 1)
        return work.steps * max(*parts.values(), barrier, waits)

    def wave(running: int) -> float:
        """Seconds of the programs that share the fullest processor, from the first copy on."""
        each = cdiv(running, device.processors)
        busy = work.steps * max(step(each, running).values()) + last(each, running)
        return max(busy, alone(running) + last(1, running))

    fill = START + COPY_LATENCY
    if work.persistent:
        resident, capacity = 1, min(work.programs, device.processors)
        # The next tile is fetched under the epilogue of this one, but only in turns multiplied.
        products, epilogue = alone(capacity), last(1, capacity)
        each = products + epilogue
        between = max(products, each / 2) if work.turns else each
        seconds = fill + (cdiv(work.programs, capacity) - 1) * between + each
    else:
        capacity = resident * device.processors
        full, rest = divmod(work.programs, capacity)
        seconds = full * wave(capacity) + (wave(rest) if rest else 0.0)
        # Where a processor has other programs, they work while one fills its pipeline.
        seconds += fill * (cdiv(work.programs, capacity) if resident == 1 else 1)
    if resources.spilled:
        seconds *= SPILLS
    shares = work.programs * work.steps / device.processors
    parts = {name: shares * value for name, value in step(1, device.processors).items()}
    parts["dram"] = work.compulsory / device.dram
    seconds = max(seconds, *parts.values())
    return Prediction(
        engine,
        seconds + LAUNCH,
        **parts,
        idle=seconds - max(parts.values()),
        programs=work.programs,
        resident=resident,
        waves=work.programs / capacity,
        resources=resources,
    )
