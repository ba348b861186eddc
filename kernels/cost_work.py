"""The work of a configuration of a layer, in the terms of :mod:`.cost_model`, and its time."""

from __future__ import annotations

import dataclasses

from . import resources as resources_of
from ._common import accumulator, cdiv
from .conv_config import ConvConfig, programs
from .conv_weight_grad_config import WeightGradConfig, column_groups, split
from .cost_model import LAUNCH, WARPGROUP, WEIGHT_GRAD, Layer, Prediction, Work, predict_work
from .device import Device, Precision
from .resources import Resources

LOOP_INSTRUCTIONS = 110
"""A step of a warp on sm_90, whatever the tile: seen in the compiled loops, 97 to 158."""

COPY_INSTRUCTIONS = 15
"""For 16 bytes that a thread of the pointer form copies: addresses and masks. Seen there too."""

EPILOGUE_INSTRUCTIONS = {"forward": 4, "statistics": 10, "gradient": 8, WEIGHT_GRAD: 2}
"""For one sum. From the compiled epilogues, roughly."""

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
        shares = max(warps // WARPGROUP // blocks, 1)
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
    size = 16 * 8 * {"half": 16, "int8": 32, "fp8": 32}.get(precision, 8)
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
    """Time of a layer in a configuration of :func:`.cost_choices.configurations`.

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
