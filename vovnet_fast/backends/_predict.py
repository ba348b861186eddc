"""Predicted times of every engine of a convolution, and which of them are worth measuring.

Those of Triton's configurations are :mod:`vovnet_fast.kernels.cost`'s. What is assumed of the
libraries is here. Triton is imported on first use.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .. import tuning
from . import conv_sm80, conv_sm80_input_grad, conv_sm90, cudnn_graph, depthwise_conv
from ._engines import ATEN

if TYPE_CHECKING:
    from ..kernels.cost import Layer, Prediction
    from ..kernels.device import Device, Precision

MEASURED = 3
"""Of Triton's configurations, at most so many are measured: the best by prediction."""

WORTH = 1.25
"""And no other one that is predicted to take longer than the best by more than this factor."""

_SM90 = (conv_sm90.SPLIT, conv_sm90.TURNS, conv_sm90.NAME)

LIBRARIES = (ATEN, cudnn_graph.NAME, conv_sm80.NAME, *_SM90)
"""How names of engines that are not Triton's begin. One of each kind is measured, its best."""

_DEPTHWISE = (depthwise_conv.NAME, depthwise_conv.SEPARATE)
"""Those of depthwise layers (:mod:`._predict_depthwise`)."""

CUDNN_EFFICIENCY = 0.75
"""Of the rate of products, by cuDNN's convolutions on full processors. Assumed."""

CUDNN_TILE = 128 * 64
"""Sums of a program of cuDNN's: with fewer programs than processors some idle. Assumed."""


# --------------------------------------------------------------------------------------
# The libraries
# --------------------------------------------------------------------------------------


def _cudnn(layer: Layer, device: Device) -> float:
    """Seconds of the arithmetic of cuDNN's convolution."""
    from ..kernels.cost import WEIGHT_GRAD

    results = layer.weight_elements if layer.kind == WEIGHT_GRAD else layer.pixels * layer.c_out
    # The sum over pixels of a weight gradient is split among programs.
    programs = device.processors if layer.kind == WEIGHT_GRAD else -(-results // CUDNN_TILE)
    busy = min(programs / device.processors, 1.0)
    return layer.flop / (CUDNN_EFFICIENCY * device.flops(layer.precision) * busy)


def _aten(layer: Layer, device: Device) -> Prediction:
    """A slot is copied together, convolved, and the result passes into its slot."""
    from ..kernels.cost import LAUNCH, WEIGHT_GRAD, Prediction

    itemsize = layer.dtype.itemsize
    read = layer.input_pixels * layer.c_in * itemsize
    written = layer.pixels * layer.c_out * itemsize
    weights = layer.weight_elements * itemsize
    if layer.kind == WEIGHT_GRAD:
        # Both operands are widened to fp32 first, and sums of the gradient are a pass.
        wide = 4 / itemsize
        convolved = dataclasses.replace(layer, dtype=torch.float32, tf32=itemsize == 2)
        passes = (1 + wide) * (read + written) + written
        moved, launches = wide * (read + written) + 4 * layer.weight_elements, 5
        passes += 8 * layer.weight_elements
    else:
        beside = layer.activation_bytes - read - written
        convolved, launches = layer, 3
        passes = 2 * read + 2 * written + beside
        moved = read + weights + written
    compute = _cudnn(convolved, device)
    main = max(compute, moved / device.dram)
    return Prediction(
        ATEN,
        main + passes / device.dram + launches * LAUNCH,
        compute=compute,
        dram=(moved + passes) / device.dram,
        launch=launches * LAUNCH,
    )


def _graph(name: str, layer: Layer, device: Device) -> Prediction:
    """One kernel from slot to slot."""
    from ..kernels.cost import LAUNCH, Prediction

    compute = _cudnn(layer, device)
    moved = layer.activation_bytes + layer.weight_elements * layer.dtype.itemsize
    dram = moved / device.dram
    return Prediction(name, max(compute, dram) + LAUNCH, compute=compute, dram=dram)


_MEETINGS = 2e-6  # Seconds in which CTAs wait for each other over 128 pixels. Assumed.

_STRIP_STAGES = 4  # Of the rings of strips and weights: what shared memory has room for.


def _sm90(name: str, layer: Layer, device: Device) -> Prediction:
    """A step is a column of taps: one strip of pixels, and the weights of its taps."""
    from ..kernels._common import cdiv
    from ..kernels.cost import Work, predict_work, through_shared
    from ..kernels.resources import Resources

    itemsize = layer.dtype.itemsize
    config = conv_sm90.config_of(name, layer.c_out, layer.kernel, itemsize)
    assert config is not None, name
    tile_h, tile_w = config.tile(layer.height, layer.width, layer.kernel)
    across = cdiv(layer.height, tile_h) * cdiv(layer.width, tile_w)
    chunks = cdiv(layer.c_in, conv_sm90.chunk(itemsize))
    chunk = cdiv(layer.c_in, chunks)  # In the mean: of the last one there may be less.
    strip = (tile_h + layer.kernel - 1) * tile_w * chunk * itemsize
    weight = layer.kernel * config.block_out * chunk * itemsize
    # CTAs of a cluster each fetch a part of what they share.
    copied = strip // config.cluster[1] + weight // config.cluster[0]
    sums = config.pixels * config.block_out
    read = through_shared(config.pixels, config.block_out, chunk * itemsize, 8, warpgroups=True)
    weights = layer.weight_elements * itemsize
    parts, terms = config.parts, layer.kernel**2 * chunks
    # Every sum is written to shared memory once, and read once, by one of the CTAs that share it.
    handed = 2 * 4 * sums if parts > 1 else 0
    feature = (layer.added + layer.masked) / layer.c_out if itemsize == 1 else 0
    work = Work(
        programs=layer.batch * across * cdiv(layer.c_out, config.block_out) * parts,
        steps=cdiv(terms, parts) / layer.kernel,
        flop=2 * sums * chunk * layer.kernel,
        copied=copied,
        shared=strip + weight + layer.kernel * read,
        # A warpgroup of its own copies. In fp8 products of a tap are added to sums by instructions.
        instructions=sums * layer.kernel if itemsize == 1 else 0,
        last_instructions=sums * 4 if parts == 1 else sums * (3 + 4 / parts),
        last_bytes=sums * (itemsize + feature) / parts + handed,
        stages=_STRIP_STAGES,
        compulsory=layer.activation_bytes + weights,
        persistent=True,
        turns=config.turns,
    )
    # Its shared memory is all that a processor has.
    whole = Resources(warps=12, registers=168, shared=227 << 10)
    found = predict_work(name, work, device, layer.precision, whole)
    if parts == 1:
        return found
    return dataclasses.replace(found, seconds=found.seconds + _MEETINGS * config.pixels / 128)


SM80_SHARE = 0.6
"""Of the rate of products of Hopper and Blackwell's servers that mma.sync reaches. Assumed."""

_SM80_COPY_INSTRUCTIONS = 12  # For 16 bytes: addresses and masks. From the compiled loops, roughly.


_SM80_GATHER_INSTRUCTIONS = 8  # For a number of a patch of an image. Roughly as well.


def _sm80_names(layer: Layer) -> list[str]:
    """Of its engines those for a layer."""
    if layer.c_out == conv_sm80.IMAGE_CHANNELS:
        return [conv_sm80_input_grad.IMAGE]
    if layer.transposed:
        return [config.name for config in conv_sm80_input_grad.configs()]
    if _of_images(layer):
        return [conv_sm80.IMAGE_CONFIG.name]
    return [config.name for config in conv_sm80.configs(layer.c_out)]


def _of_images(layer: Layer) -> bool:
    return layer.kernel == 3 and layer.c_in == conv_sm80.IMAGE_CHANNELS


def _sm80(name: str, layer: Layer, device: Device) -> Prediction:
    """A step is a tap of 64 bytes of channels; the strip is fetched with every ninth.

    Of an input gradient with stride 2 a tile has two taps and a quarter, in the mean. Of images
    there is one tap, whose channels are a patch.
    """
    from ..kernels._common import cdiv
    from ..kernels.cost import LAUNCH, Prediction, Work, predict_work
    from ..kernels.resources import Resources

    itemsize = layer.dtype.itemsize
    if name == conv_sm80_input_grad.IMAGE:
        compute, dram = layer.flop / device.exact, layer.activation_bytes / device.dram
        return Prediction(name, max(compute, dram) + LAUNCH, compute=compute, dram=dram)
    config = conv_sm80.named(name)
    kernel, stride, c_in, copy = layer.kernel, layer.stride, layer.c_in, _SM80_COPY_INSTRUCTIONS
    height, width, launches, taps = layer.height, layer.width, layer.batch, float(kernel**2)
    if layer.transposed:
        height, width, launches, taps = cdiv(height, 2), cdiv(width, 2), 4 * launches, taps / 4
        kernel, stride = 2, 1
    elif _of_images(layer):
        kernel, stride, taps, c_in = 1, 1, 1.0, 32
        copy = _SM80_GATHER_INSTRUCTIONS * 16 // itemsize
    tile = config.tile(height, width, kernel, stride)
    tiles, row = launches * conv_sm80.tiles_of(height, width, tile), conv_sm80.ROW_BYTES
    strip = conv_sm80.strip_rows(tile, kernel, stride) * row
    copied = round(strip / taps) + config.block_out * row
    sums = config.pixels * config.block_out
    # Four warps share the pixels of a tile, and two its channels.
    read = (2 * config.pixels + 4 * config.block_out) * row
    products = sums * (row // itemsize) / (16 * 8 * 32 / itemsize) * 32  # Of a thread, each.
    share = SM80_SHARE if device.capability[0] in (9, 10) else 1.0
    weights = layer.weight_elements * itemsize
    left = {"statistics": 3, "forward": int(kernel == 1)}.get(layer.kind, 0)
    beside = sum(c > 0 for c in (layer.added, layer.masked))
    work = Work(
        programs=tiles * cdiv(layer.c_out, config.block_out),
        steps=taps * cdiv(c_in * itemsize, row),
        flop=round(2 * sums * row // itemsize / share),
        copied=copied,
        shared=copied + read,
        instructions=1.5 * products + copied / 16 * copy,
        last_instructions=sums * (10 if layer.kind == "statistics" else 6),
        last_bytes=sums * itemsize * (1 + beside),
        stages=conv_sm80.STAGES[0],
        compulsory=layer.activation_bytes + weights + 4 * left * tiles * layer.c_out,
    )
    if layer.transposed:
        depth = conv_sm80_input_grad.depth(config, tile, device.capability)
        shared = conv_sm80_input_grad.shared_bytes(config, tile, depth)
    else:
        stages = config.stages(tile, kernel, stride, device.capability) or conv_sm80.STAGES[-1]
        shared = config.shared_bytes(tile, kernel, stride, stages)
    registers = 128 if sums <= 64 * 32 * conv_sm80.WARPS else 255
    resources = Resources(warps=conv_sm80.WARPS, registers=registers, shared=shared)
    return predict_work(name, work, device, sm80_precision(layer), resources)


def sm80_precision(layer: Layer) -> Precision:
    """It multiplies fp32 as TF32 alone."""
    return "half" if layer.dtype.itemsize == 2 else "tf32"


def library(name: str, layer: Layer, device: Device) -> Prediction:
    """Time of an engine that is not a configuration of Triton's."""
    if name == ATEN:
        return _aten(layer, device)
    kinds = {cudnn_graph.NAME: _graph, conv_sm80.NAME: _sm80, **dict.fromkeys(_SM90, _sm90)}
    return kinds[family(name)](name, layer, device)


# --------------------------------------------------------------------------------------
# All of them
# --------------------------------------------------------------------------------------


def family(name: str) -> str:
    """Which of :data:`LIBRARIES`, or engines of depthwise layers, it belongs to, or ``triton``."""
    known = (*LIBRARIES, *_DEPTHWISE)
    return next((found for found in known if name.startswith(found)), "triton")


@functools.lru_cache(256)
def order(layer: Layer, device: Device) -> dict[str, Prediction]:
    """Triton's configurations by name; that which is taken without measuring comes first."""
    from ..kernels import cost

    found = cost.predictions(layer, device)
    return {found[i].engine: found[i] for i in cost.ranked(layer, device)}


def predict(names: Iterable[str], layer: Layer, device: Device) -> dict[str, Prediction]:
    """By name, in the order given; without those that are not shipped any more."""
    own = order(layer, device)
    found = {}
    for name in names:
        if name in own:
            found[name] = own[name]
        elif family(name) != "triton" and _has_tiles(name, layer):
            found[name] = library(name, layer, device)
    return found


def _has_tiles(name: str, layer: Layer) -> bool:
    """Whether an engine of ours has the tiles of its name for the layer."""
    kind = family(name)
    if kind == conv_sm80.NAME:
        return name in _sm80_names(layer)
    if kind in _SM90:
        itemsize = layer.dtype.itemsize
        return conv_sm90.config_of(name, layer.c_out, layer.kernel, itemsize) is not None
    return True


def likely(predicted: dict[str, Prediction], layer: Layer, device: Device) -> list[str]:
    """Which engines are worth measuring, in the order of ``predicted``.

    Of Triton's configurations that which is taken without measuring, and with it the best
    :data:`MEASURED`, if they are within :data:`WORTH`; of every library the best.
    """
    own = [name for name in order(layer, device) if name in predicted]
    limit = WORTH * min((predicted[name].seconds for name in own), default=0.0)
    fastest = sorted(own[1:], key=lambda name: predicted[name].seconds)[: MEASURED - 1]
    found = {name for name in fastest if predicted[name].seconds <= limit} | {*own[:1]}
    for kind in LIBRARIES:
        of_kind = [name for name in predicted if family(name) == kind]
        # cuDNN ranks its own plans, and to the model they are all the same.
        found.update(sorted(of_kind, key=lambda name: predicted[name].seconds)[:1])
    return [name for name in predicted if name in found]


@functools.lru_cache(1 << 13)  # Asked for at every launch; a hundred sizes of a network.
def _candidates(layer: Layer, device: Device, libraries: tuple[str, ...]) -> tuning.Candidates:
    from ..kernels import cost

    own = (config.name for config in cost.configurations(layer, device.capability))
    predicted = predict((*libraries, *own), layer, device)
    return tuning.Candidates(
        {name: found.seconds for name, found in predicted.items()},
        tuple(likely(predicted, layer, device)),
        describe(layer, device),
    )


def candidates(layer: Layer, on: torch.device, *libraries: str) -> tuning.Candidates:
    """The named engines of libraries and all of Triton's configurations, for the tuner."""
    from ..kernels import device

    return _candidates(layer, device.of(on), libraries)


def layer(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    stride: int,
    tf32: bool,
    **others: Any,
) -> Layer:
    """A convolution of views without Triton's kernels; ``others``: fields of the layer."""
    from ..kernels.cost import Layer

    c_out, kernel, _, c_in = weight.shape
    n, height, width, _ = out.shape
    size = (1, height * width) if kernel == 1 else (height, width)
    return Layer(
        n, *size, c_in, c_out, kernel=kernel, stride=stride, dtype=x.dtype, tf32=tf32, tma=False,
        **others,
    )  # fmt: skip


@functools.lru_cache(1 << 13)
def _of_libraries(layer: Layer, device: Device, names: tuple[str, ...]) -> tuning.Candidates:
    seconds = {name: library(name, layer, device).seconds for name in names}
    kinds = {family(name): name for name in sorted(names, key=lambda n: seconds[n], reverse=True)}
    likely = tuple(name for name in names if name in kinds.values())
    return tuning.Candidates(seconds, likely, describe(layer, device))


def of_libraries(layer: Layer, on: torch.device, *names: str) -> tuning.Candidates:
    """Engines that are not Triton's alone, for the tuner; of each kind the best is measured."""
    from ..kernels import device

    return _of_libraries(layer, device.of(on), names)


# --------------------------------------------------------------------------------------
# Layers in files
# --------------------------------------------------------------------------------------


def describe(layer: Layer, device: Device) -> dict[str, Any]:
    """What a prediction was made for, as JSON can hold it; :func:`recall` reads it."""
    fields = dataclasses.asdict(layer) | {"dtype": str(layer.dtype).removeprefix("torch.")}
    return fields | {
        "device": device.name,
        "capability": list(device.capability),
        "processors": device.processors,
    }


def recall(described: Mapping[str, Any]) -> tuple[Layer, Device]:
    """The layer and the device that :func:`describe` wrote down, with today's rates.

    Raises:
        ValueError: it is not such a description.
    """
    from ..kernels import cost, device

    fields = dict(described)
    try:
        card = device.known(fields.pop("device"), tuple(fields.pop("capability")))
        card = device.scaled(card, fields.pop("processors"))
        dtype = getattr(torch, fields.pop("dtype"))
        return cost.Layer(**fields, dtype=dtype), card
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no layer and device: {dict(described)} ({error})") from error
