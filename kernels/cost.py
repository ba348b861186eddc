"""How long a convolution will take in a configuration, predicted instead of measured.

A program fills its pipeline, runs its steps, and stores. A step takes as long as what is
slowest of: the products, the copies from L2, shared memory's port, the instructions; and
no less than one program alone can do it in, which waits for its copies and at its
barriers. Programs that share a processor hide each other's waits. The device takes as
many programs at a time as registers and shared memory let be resident, in waves, the last
of which may be nearly empty and takes as long as one program does. Nothing is faster than
the memory traffic that is compulsory.

What is assumed is a named constant. None of it has been held against a device yet;
``vovnet-fast tuning regret`` does that, once there are times.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from . import resources as resources_of
from ._common import accumulator, cdiv
from .conv_config import ConvConfig, Kind, candidates, programs
from .conv_weight_grad_config import WeightGradConfig, column_groups, split
from .conv_weight_grad_config import candidates as weight_grad_candidates
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

LOOP_INSTRUCTIONS = 110
"""A step of a warp on sm_90, whatever the tile: seen in the compiled loops, 97 to 158."""

COPY_INSTRUCTIONS = 15
"""For 16 bytes that a thread of the pointer form copies: addresses and masks. Seen there too."""

SPILLS = 1.5
"""By this factor a program that spills registers takes longer. Assumed: it shall not be chosen."""

EPILOGUE_INSTRUCTIONS = {"forward": 4, "statistics": 10, "gradient": 8, WEIGHT_GRAD: 2}
"""For one sum. From the compiled epilogues, roughly."""

TIE = 1.05
"""By a smaller factor predictions do not differ: they know no better."""

SIZES = (1 << 20, 1 << 16, 1 << 13, 1 << 11)
"""Pixels of the maps whose choices stand for all: from a batch's largest to one image's least."""

STEADY = 1.25
"""By this factor a configuration must be faster than the favourites before it: at one of
:data:`SIZES` to become one, and at a layer's size to be taken instead."""

FAVOUR = 2.0
"""By this factor any other must be faster than a favourite, to be taken in its place."""

_ASPECT = 0.6  # Height over width of their maps.


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
        dtype: of the activations.
        tf32: fp32 products may be rounded to TF32.
        kind: of the epilogue, or ``weight gradient``.
        tma: whether bulk copies can take the tensors.
        transposed: the input gradient of a stride of 2.
        added, masked: channels of the activations that a gradient's epilogue reads.
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


# --------------------------------------------------------------------------------------
# A launch
# --------------------------------------------------------------------------------------


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
            barrier += (parts["shared"] + parts["issue"]) / max(resources.warps / _WARPGROUP, 1)
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
        # The next tile is fetched under the epilogue of this one, but not multiplied.
        each = alone(capacity) + last(1, capacity)
        seconds = fill + cdiv(work.programs, capacity) * each
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


# --------------------------------------------------------------------------------------
# Configurations
# --------------------------------------------------------------------------------------

_WARPGROUP = 4  # Warps.
_MMA_ROWS = 64  # Of a warpgroup's product,
_MMA_COLUMNS = 256  # at most,
_MMA_BYTES = 32  # of each row and column of its operands.


def through_shared(rows: int, columns: int, depth: int, warps: int, warpgroups: bool) -> int:
    """Bytes that products of rows x columns read from shared memory, ``depth`` bytes deep.

    A warpgroup reads 64 rows and its columns for each of its products, however many others
    read the same; warps of older devices share a tile as squarely as they can.
    """
    if warpgroups:
        blocks = cdiv(rows, _MMA_ROWS)
        shares = max(warps // _WARPGROUP // blocks, 1)
        each = min(cdiv(columns, shares), _MMA_COLUMNS)
        products = blocks * cdiv(columns, each)
        return products * (_MMA_ROWS + each) * _MMA_BYTES * cdiv(depth, _MMA_BYTES)
    splits = ((1 << i, warps >> i) for i in range(warps.bit_length()))
    return warps * depth * min(cdiv(rows, a) + cdiv(columns, b) for a, b in splits)


def _instructions(
    rows: int, columns: int, depth: int, *, threads: int, device: Device, form: str,
    precision: Precision, copied: int,
) -> float:  # fmt: skip
    """Of the threads of a program for a step, ``depth`` elements deep."""
    multiply_adds = rows * columns * depth
    vectors = copied / 16 * COPY_INSTRUCTIONS if form == "pointer" else 0.0
    if precision == "exact":
        return 1.5 * multiply_adds + vectors  # One load of operands for two products.
    if device.capability >= (9, 0):
        return LOOP_INSTRUCTIONS * threads + vectors
    # A warp's instruction multiplies 16 x 8 x 16 halves, and needs 3 / 8 of a load.
    size = 16 * 8 * (16 if precision == "half" else 8)
    return multiply_adds / size * 32 * 1.375 + vectors


def _conv_work(config: ConvConfig, layer: Layer, device: Device) -> Work:
    itemsize, block = layer.dtype.itemsize, sum(config.block_out)
    size = (layer.height, layer.width)
    count = programs(config, layer.c_out, layer.batch, size)
    chunks = cdiv(layer.c_in, config.block_k)
    taps: float = layer.kernel**2
    if layer.transposed:
        # Each of the four parities of the pixels has its own programs, and share of the taps.
        half = (cdiv(layer.height, 2), cdiv(layer.width, 2))
        count = 4 * programs(config, layer.c_out, layer.batch, half)
        taps /= 4
    elif config.form == "pointer" and layer.c_in < config.block_k:
        # A step runs across taps.
        chunks, taps = cdiv(layer.kernel**2 * layer.c_in, config.block_k), 1
    copied = (config.pixels + block) * config.block_k * itemsize
    depth = config.block_k * itemsize
    # Of channel-major products the channels are the rows.
    rows, columns = (block, config.pixels) if config.form == "tma" else (config.pixels, block)
    warpgroups = device.capability >= (9, 0) and layer.precision != "exact"
    sums = config.pixels * block
    beside = sum(c > 0 for c in (layer.added, layer.masked))
    tiles = count // cdiv(layer.c_out, block)
    # The 1x1 of a block leaves partial sums for a pool; where one does not, they are little.
    left = {"statistics": 3, "forward": int(layer.kernel == 1)}.get(layer.kind, 0)
    partials = left * tiles * layer.c_out * accumulator(layer.dtype).itemsize
    weights = layer.weight_elements * itemsize
    compulsory = layer.activation_bytes + weights + partials
    compulsory += 2 * layer.c_out * accumulator(layer.dtype).itemsize * (layer.kind == "forward")
    return Work(
        programs=count,
        steps=taps * chunks,
        flop=2 * sums * config.block_k,
        copied=copied,
        shared=through_shared(rows, columns, depth, config.num_warps, warpgroups) + copied,
        instructions=_instructions(
            rows, columns, config.block_k, threads=32 * config.num_warps, device=device,
            form=config.form, precision=layer.precision, copied=copied,
        ),
        last_instructions=sums * EPILOGUE_INSTRUCTIONS[layer.kind],
        last_bytes=sums * itemsize * (1 + beside),
        stages=config.num_stages,
        compulsory=compulsory + _weights_again(layer, count, device) * weights,
        serial=config.form == "pointer" and warpgroups,
        persistent=config.persistent,
    )  # fmt: skip


def _weights_again(layer: Layer, count: int, device: Device) -> int:
    """How often weights are fetched from memory once more: L2 keeps what a wave reads, or not."""
    waves = cdiv(count, device.processors)
    inputs = layer.input_pixels * layer.c_in * layer.dtype.itemsize / waves
    weights = layer.weight_elements * layer.dtype.itemsize
    return waves - 1 if weights + inputs > device.l2_size and weights * 2 > device.l2_size else 0


def _weight_grad_work(config: WeightGradConfig, layer: Layer, device: Device) -> tuple[Work, float]:
    """The main launch, and the bytes of its finish."""
    itemsize, block = layer.dtype.itemsize, sum(config.block_out)
    high = accumulator(layer.dtype).itemsize
    if config.form == "tma":
        steps = layer.batch * layer.height * cdiv(layer.width, config.pixels)
    else:
        steps = layer.batch * cdiv(layer.height * layer.width, config.pixels)
    splits, each = split(
        config, layer.c_in, layer.c_out, layer.kernel,
        steps=steps, processors=device.processors, itemsize=high,
    )  # fmt: skip
    columns = column_groups(config, layer.c_in, layer.kernel)
    count = (columns + 1) * cdiv(layer.c_out, block) * splits
    rows = config.columns * config.groups
    copied = (rows + block) * config.pixels * itemsize
    warpgroups = device.capability >= (9, 0) and layer.precision != "exact"
    depth = config.pixels * itemsize
    partials = splits * (layer.weight_elements + layer.c_out) * high
    # The programs past the last column multiply nothing: they pass over the gradient.
    work = Work(
        programs=count,
        steps=each,
        flop=2 * rows * block * config.pixels * columns / (columns + 1),
        copied=copied,
        shared=through_shared(rows, block, depth, config.num_warps, warpgroups) + copied,
        instructions=_instructions(
            rows, block, config.pixels, threads=32 * config.num_warps, device=device,
            form=config.form, precision=layer.precision, copied=copied,
        ),
        last_instructions=rows * block * EPILOGUE_INSTRUCTIONS[WEIGHT_GRAD],
        last_bytes=rows * block * high,
        stages=config.num_stages,
        compulsory=layer.activation_bytes + partials,
        serial=config.form == "pointer" and warpgroups,
    )  # fmt: skip
    return work, partials + layer.weight_elements * high


def predict(
    config: ConvConfig | WeightGradConfig,
    layer: Layer,
    device: Device,
    resources: Resources | None = None,
) -> Prediction:
    """Time of a layer in a configuration of :func:`configurations`.

    Args:
        config: of it.
        layer: the layer.
        device: rates of the GPU.
        resources: of a program; by default those of :func:`.resources.of`.
    """
    resources = resources or resources_of.of(
        config, device.capability, kind=layer.kind, kernel=layer.kernel, precision=layer.precision
    )
    if isinstance(config, ConvConfig):
        work = _conv_work(config, layer, device)
        return predict_work(config.name, work, device, layer.precision, resources)
    work, finished = _weight_grad_work(config, layer, device)
    found = predict_work(config.name, work, device, layer.precision, resources)
    finish = finished / device.dram
    return dataclasses.replace(
        found,
        seconds=found.seconds + finish + LAUNCH,
        dram=found.dram + finish,
        launch=2 * LAUNCH,
    )


# --------------------------------------------------------------------------------------
# Choices
# --------------------------------------------------------------------------------------


@functools.cache  # Asked for at every launch.
def configurations(layer: Layer, capability: tuple[int, int]) -> tuple[Any, ...]:
    """The shipped configurations that can compute a layer, in one order for all layers."""
    options: dict[str, Any] = dict(
        kernel=layer.kernel, dtype=layer.dtype, tf32=layer.tf32, tma=layer.tma
    )
    if layer.kind == WEIGHT_GRAD:
        return tuple(weight_grad_candidates(capability, layer.c_in, layer.c_out, **options))
    options["kind"] = layer.kind
    return tuple(candidates(capability, layer.c_in, layer.c_out, **options))


@functools.lru_cache(256)  # What is made of them is kept, which is less.
def predictions(layer: Layer, device: Device) -> tuple[Prediction, ...]:
    """Of all :func:`configurations`, in their order."""
    return tuple(predict(c, layer, device) for c in configurations(layer, device.capability))


def _canonical(config: ConvConfig | WeightGradConfig) -> tuple[Any, ...]:
    """Sorts configurations by how many layers and sizes they are good for, the most first."""
    pixels = config.pixels if isinstance(config, ConvConfig) else _MIDDLE
    persistent = isinstance(config, ConvConfig) and config.persistent
    distance = abs(math.log2(pixels / _MIDDLE))
    return persistent, config.form == "pointer", distance, -sum(config.block_out)


_MIDDLE = 128  # Pixels of a tile.


def _tied(seconds: Sequence[float], factor: float, order: Callable[[int], Any]) -> list[int]:
    """Positions of what takes up to ``factor`` as long as the best, in some order; the others."""
    limit = min(seconds) * factor
    tied = [i for i, one in enumerate(seconds) if one <= limit]
    others = [i for i, one in enumerate(seconds) if one > limit]
    return sorted(tied, key=order) + sorted(others, key=lambda i: seconds[i])


def _sized(layer: Layer, pixels: int) -> Layer:
    """The same layer of one image of so many pixels."""
    height = 1 if layer.height == 1 else round((pixels * _ASPECT) ** 0.5)
    return dataclasses.replace(layer, batch=1, height=height, width=round(pixels / height))


@functools.cache
def _favourites(layer: Layer, device: Device) -> tuple[int, ...]:
    """Positions in :func:`configurations` of a few that are good for all :data:`SIZES`."""
    shipped = configurations(layer, device.capability)
    found: list[int] = []
    for pixels in SIZES:
        sized = _sized(layer, pixels)
        seconds = [predict(config, sized, device).seconds for config in shipped]
        if not found or min(seconds[i] for i in found) > STEADY * min(seconds):
            found.append(_tied(seconds, TIE, lambda i: (*_canonical(shipped[i]), i))[0])
    return tuple(found)


@functools.cache
def ranked(layer: Layer, device: Device) -> tuple[int, ...]:
    """Positions in :func:`configurations`, the best by prediction for the layer's size first.

    A few that are good for all sizes are favoured, the first of them most, so that images of
    many sizes share compiled kernels.
    """
    favourites = _favourites(_sized(layer, SIZES[0]), device)
    seconds = [one.seconds for one in predictions(layer, device)]
    favoured = [favourites[i] for i in _tied([seconds[i] for i in favourites], STEADY, lambda i: i)]
    others = sorted(set(range(len(seconds))) - set(favourites), key=lambda i: (seconds[i], i))
    faster = [i for i in others if FAVOUR * seconds[i] < seconds[favoured[0]]]
    return (*faster, *favoured, *others[len(faster) :])


def static_choice(layer: Layer, device: Device) -> Any:
    """The configuration that is taken where nothing was measured.

    It is that of the very size, although measured choices are remembered by sizes up to a power
    of two (:func:`vovnet_fast.backends._engines.problem`): the last wave of a small image may be
    a third of its time, and what is good for one size of such a family may be half as
    fast for another. What that costs in kernels, :data:`STEADY` and :data:`FAVOUR` keep small.
    """
    return configurations(layer, device.capability)[ranked(layer, device)[0]]


def choices(layer: Layer, device: Device) -> tuple[list[Any], Any]:
    """All :func:`configurations` of a layer, and the :func:`static_choice`."""
    return list(configurations(layer, device.capability)), static_choice(layer, device)
