"""A whole VoVNet: every block's input is written straight into its concat buffer.

The stem's last layer, a max pool, or the gate of the block before fills slot 0, so that
between the image and the features nothing is copied or concatenated.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .. import backends, compat
from ..compat import zip
from ..specs import FIRST_STAGE, NUM_STAGES, Pool, VoVNetSpec
from . import _checks, _library, chain, conv, flattening, osa
from ._checks import nchw, nhwc
from .conv import ConvParams, Kinds
from .max_pool import needs as pool_needs
from .max_pool import output_size as pooled_size
from .memory import Memory, Plan
from .osa import BlockParams


class NetworkParams(NamedTuple):
    """Parameters of a whole network.

    Attributes:
        spec: the architecture.
        encoded_spec: the same as :meth:`VoVNetSpec.encode` writes it.
        stem: its three layers.
        blocks: the OSA blocks in network order.
    """

    spec: VoVNetSpec
    encoded_spec: str
    stem: tuple[ConvParams, ...]
    blocks: tuple[BlockParams, ...]

    def convs(self) -> list[ConvParams]:
        """All convolution layers in the order in which they run."""
        return [*self.stem, *(layer for block in self.blocks for layer in block.convs())]

    def packed(self, dtype: torch.dtype) -> NetworkParams:
        """The same with weights as the backends take them, so that no call has to pack them."""
        layers = [conv.pack(layer, dtype) for layer in self.convs()]
        return rebuild(layers, self.fcs(), self.spec, self.encoded_spec)

    def fcs(self) -> list[Tensor]:
        """The gates' weights and biases in the order in which they run."""
        return [t for block in self.blocks for t in block.fcs()]


@functools.cache
def needs(spec: VoVNetSpec, *, backward: bool = False) -> tuple[str, ...]:
    """The functions of a backend that a network uses whose norms have fixed statistics.

    ``backward``: of its modules in training, see :meth:`Kinds.needs`; not of :func:`features`.
    """
    kinds = Kinds(depthwise=spec.depthwise, fixed=True, batch=False, shared=False)
    found = {*chain.needs(kinds, backward=backward), *pool_needs(backward=backward)}
    for block in spec.blocks():
        options = dict(gated=block.ese, identity=block.identity, backward=backward)
        found.update(osa.needs(kinds, **options))
    return tuple(sorted(found))


def features(x: Tensor, params: NetworkParams, out_features: tuple[str, ...]) -> list[Tensor]:
    """Features of a batch of images.

    Args:
        x: ``[N, C, H, W]`` in fp16, bf16, fp32 or fp64.
        params: of the network, in the dtype of ``x``.
        out_features: names, in network order (:class:`vovnet_fast.VoVNet`).

    Returns:
        one ``[N, C', H', W']`` tensor a name, ``channels_last``, each in memory of its own.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        NotImplementedError: a gradient is needed, or statistics of the batch: the modules of
            :mod:`vovnet_fast.network.layers` have both.
        BackendError: the backend that was asked for cannot run.
    """
    op = "features"
    _checks.activations(op, "x", x, params.stem[0].weight.shape[3])
    known = params.spec.feature_channels()
    if not out_features or [name for name in known if name in out_features] != [*out_features]:
        raise ValueError(
            f"{op}: out_features must be one or more of {', '.join(known)}, in this order, "
            f"got {out_features}"
        )
    check_size(params.spec, out_features, x.shape[2], x.shape[3])
    check_params(op, params, x)
    layers, fcs = params.convs(), params.fcs()
    *tensors, strides, epsilons, _ = flattening.flatten(op, layers)
    if not compat.is_compiling():
        _checks.notice_modes()
    every = [x, *(t for group in tensors for t in group), *fcs]
    _checks.transforms(op, *every)
    if _checks.needs_gradient(*every):
        raise NotImplementedError(
            f"{op} keeps nothing for a backward pass: call it under torch.no_grad() or "
            "torch.inference_mode(), or call the modules, which are differentiable"
        )
    if max(epsilons) >= 0:
        raise NotImplementedError(
            f"{op} takes batch norms with fixed statistics only: call eval() before fold(), or "
            "call the modules"
        )
    out: list[Tensor] = torch.ops.vovnet_fast.features(
        x, *tensors, strides, fcs, params.encoded_spec, ",".join(out_features)
    )
    return out


def check_params(op: str, params: NetworkParams, x: Tensor) -> None:
    """Refuse parameters that do not fit each other or the images.

    Raises:
        ValueError, TypeError: one does not; the message names it.
    """
    for layer in params.stem:
        conv.check(op, layer, x)
    for block in params.blocks:
        osa.check(op, block, x)


def sizes(spec: VoVNetSpec, height: int, width: int) -> dict[str, tuple[int, int]]:
    """Height and width of every feature of an image, by name in network order.

    Zero where a pool in ceil mode is given a map of one pixel: the image is too small.
    """
    found = {}
    for name, stride in zip(("stem_1", "stem_2", "stem"), spec.stem_strides, strict=True):
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
        if name != "stem_1":  # It is no feature.
            found[name] = (height, width)
    for number in range(FIRST_STAGE, FIRST_STAGE + NUM_STAGES):
        if _pools(spec, number):
            height, width = pooled_size(height, width, spec.pool)
        found[f"stage{number}"] = (height, width)
    return found


def check_size(spec: VoVNetSpec, out_features: tuple[str, ...], height: int, width: int) -> None:
    """Refuse images of which a feature would have no pixel.

    Raises:
        ValueError: the image is too small for the deepest of ``out_features``.
    """
    last = out_features[-1]
    if min(sizes(spec, height, width)[last]) < 1:
        raise ValueError(
            f"an image of {height}x{width} is too small: {last} of {spec.name} would have no "
            "pixel; pad the image, or ask for fewer features"
        )


class _Idle:
    """A backend that does nothing, for what only looks at shapes."""

    @staticmethod
    def conv(*_: object, **options: object) -> None: ...

    depthwise = apply_gates = max_pool = conv


def plan(
    shape: tuple[int, int, int, int],
    params: NetworkParams,
    out_features: tuple[str, ...],
) -> dict[str, int]:
    """What an :class:`~vovnet_fast.ops.memory.Arena` needs for images of ``[N, C, H, W]``.

    Returns:
        elements by role. ``image`` is room for the image itself, converted.
    """
    n, c, h, w = shape
    memory = Plan()
    image = memory.scratch("image", torch.empty(0, device="meta"), n, h, w, c)
    run(cast(ModuleType, _Idle), image, params, out_features, memory)
    return memory.sizes


def run(
    backend: ModuleType,
    x: Tensor,
    params: NetworkParams,
    out_features: tuple[str, ...],
    memory: Memory | None = None,
) -> list[Tensor]:
    """Run a network on an ``[N, H, W, C]`` view; returns such views.

    ``memory`` is where its tensors come from, new memory by default.
    """
    memory = Memory() if memory is None else memory
    spec = params.spec
    found: dict[str, Tensor] = {}
    buffer = None  # The first block's, once its slot 0 is filled.
    for name, layer in zip(("stem_1", "stem_2", "stem"), params.stem, strict=True):
        if len(found) == len(out_features):
            break
        size = (x.shape[0], *conv.output_size(x.shape[1], x.shape[2], layer))
        if name == "stem" and name not in out_features and not _pools(spec, FIRST_STAGE):
            buffer = osa.new_buffer(memory, x, size, params.blocks[0])
            out = osa.input_slot(buffer, params.blocks[0])
        else:
            empty = memory.feature if name in out_features else memory.chained
            out = empty(x, *size, layer.weight.shape[0])
        conv.run(backend, x, layer, out, memory)
        x = out
        if name in out_features:
            found[name] = x

    rest = iter(params.blocks)
    for i in range(NUM_STAGES):
        if len(found) == len(out_features):
            break
        stage = [next(rest) for _ in range(spec.blocks_per_stage[i])]
        mode = spec.pool if _pools(spec, FIRST_STAGE + i) else None
        name = f"stage{FIRST_STAGE + i}"
        kept = name in out_features
        x = _run_stage(backend, x, buffer if i == 0 else None, stage, mode, kept, memory)
        if kept:
            found[name] = x
    return [found[name] for name in out_features]


def _pools(spec: VoVNetSpec, stage: int) -> bool:
    return stage >= spec.first_pooled_stage


def _run_stage(
    backend: ModuleType,
    x: Tensor,
    buffer: Tensor | None,
    blocks: list[BlockParams],
    mode: Pool | None,
    kept: bool,
    memory: Memory,
) -> Tensor:
    """Run a stage. ``buffer`` already holds ``x`` in slot 0, or is None.

    ``kept`` says that the result is returned to the caller.
    """
    if buffer is None:
        size = x.shape[1], x.shape[2]
        size = size if mode is None else pooled_size(*size, mode)
        buffer = osa.new_buffer(memory, x, (x.shape[0], *size), blocks[0])
        slot = osa.input_slot(buffer, blocks[0])
        if mode is None:
            slot.copy_(x)  # The stem is a feature as well, which must own its memory.
        else:
            backend.max_pool(x, slot, mode)
    n, h, w, _ = buffer.shape
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if following is None:
            empty = memory.feature if kept else memory.chained
            out = empty(buffer, n, h, w, block.concat.weight.shape[0])
            osa.run(backend, buffer, block, out, memory)
            return out
        new = osa.new_buffer(memory, buffer, (n, h, w), following)
        osa.run(backend, buffer, block, osa.input_slot(new, following), memory)
        buffer = new
    raise AssertionError("a stage has at least one block")


# --------------------------------------------------------------------------------------
# torch.library
# --------------------------------------------------------------------------------------


decode = functools.cache(VoVNetSpec.decode)
"""As :meth:`VoVNetSpec.decode`, but an architecture once."""


def rebuild(
    layers: list[ConvParams], fcs: list[Tensor], spec: VoVNetSpec, encoded_spec: str
) -> NetworkParams:
    """The inverse of :meth:`NetworkParams.convs` and :meth:`NetworkParams.fcs`."""
    rest, gates = iter(layers), iter(fcs)
    stem = tuple(next(rest) for _ in range(3))
    blocks = []
    for plan in spec.blocks():
        reduction = next(rest) if plan.reduction else None
        chained = tuple(next(rest) for _ in range(plan.num_layers))
        blocks.append(
            BlockParams(
                chained,
                next(rest),
                reduction,
                next(gates) if plan.ese else None,
                next(gates) if plan.ese else None,
                spec.gate,
                plan.identity,
            )
        )
    return NetworkParams(spec, encoded_spec, stem, tuple(blocks))


@_library.op("features")
@_checks.in_given_dtypes
def _features(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    depthwise: list[Tensor],
    strides: list[int],
    fcs: list[Tensor],
    spec: str,
    out_features: str,
) -> list[Tensor]:
    layers = flattening.unflatten(weights, scales, shifts, depthwise, strides)
    params = rebuild(layers, fcs, decode(spec), spec)
    backend = backends.get(x.device, x.dtype, needs(params.spec))
    found = run(backend, nhwc(x), params, tuple(out_features.split(",")))
    return [nchw(feature) for feature in found]


@_features.register_fake
def _(x, weights, scales, shifts, depthwise, strides, fcs, spec, out_features):
    architecture, wanted = decode(spec), out_features.split(",")
    n, _, h, w = x.shape
    channels, maps = architecture.feature_channels(), sizes(architecture, h, w)
    return [nchw(x.new_empty(n, *maps[name], channels[name])) for name in wanted]
