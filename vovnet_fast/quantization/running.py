"""A quantised network from slot to slot, by the ops of whoever has them."""

from __future__ import annotations

from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from ..arithmetic import int8
from ..arithmetic.layers import QuantizedNetwork
from ..compat import zip
from ..network.model import STAGE_NAMES
from ..ops.max_pool import output_size as pooled_size
from ..ops.memory import Memory, Plan
from ..specs import FIRST_STAGE, BlockPlan
from .walking import IMAGE, STEM, is_plain, layer_names


def run(
    ops: ModuleType, x: Tensor, network: QuantizedNetwork, memory: Memory | None = None
) -> list[Tensor]:
    """Features of a batch of images.

    Every activation is a byte in a buffer that :mod:`vovnet_fast.ops.memory` can plan: slot 0 of
    a concat buffer is filled by what makes the block's input. Features are fp32, in memory of their
    own, written from the accumulators; what is also another layer's input is written twice, once
    rounded.

    Args:
        ops: a module with the functions of :mod:`vovnet_fast.arithmetic.int8`.
        x: ``[N, H, W, C]`` view of fp32 images.
        network: what to run.
        memory: where tensors come from, new memory by default.

    Returns:
        an ``[N, H', W', C']`` fp32 tensor for each of the network's features.
    """
    return _Run(ops, network, Memory() if memory is None else memory).features(x)


def plan(
    shape: tuple[int, int, int, int], network: QuantizedNetwork, ops: ModuleType = int8
) -> dict[str, int]:
    """What an :class:`~vovnet_fast.ops.memory.Arena` of bytes needs for images of ``[N, C, H, W]``.

    ``ops`` says what activations and images are, and runs nothing.
    """
    n, c, h, w = shape
    memory = Plan()
    idle = cast(ModuleType, _Idle(ops))
    run(idle, torch.empty(n, h, w, c, device="meta"), network, memory)
    return memory.sizes


class _Idle:
    """Ops of tensors without memory, which compute nothing."""

    def __init__(self, ops: ModuleType) -> None:
        self.ACTIVATION, self.image_dtype = ops.ACTIVATION, ops.image_dtype

    @staticmethod
    def conv(x: Tensor, *_: object, pool: bool = False, **options: object) -> Tensor | None:
        return x if pool else None

    @staticmethod
    def _nothing(*_: object, **options: object) -> None:
        """One of the other ops."""

    quantize_image = depthwise = max_pool = gates = apply_gates = _nothing


class _Run:
    def __init__(self, ops: ModuleType, network: QuantizedNetwork, memory: Memory) -> None:
        self._ops, self._network, self._memory = ops, network, memory
        self._found: list[Tensor] = []
        self._like: Tensor  # Whose dtype and device new activations have.

    def features(self, x: Tensor) -> list[Tensor]:
        network, ops = self._network, self._ops
        self._memory.begin()
        self._like = x.new_empty(0, dtype=ops.ACTIVATION)
        image = self._image(x)
        ops.quantize_image(x, network.scales[IMAGE], image, wide=network.wide_stem)
        plans = list(network.spec.blocks())
        out: Tensor | None = image
        buffer: Tensor | None = None
        for name, feature in STEM.items():
            assert out is not None
            layer = network.layers[name]
            n, h, w, _ = out.shape
            size = n, (h - 1) // layer.stride + 1, (w - 1) // layer.stride + 1
            x = out
            out, buffer = self._target(name, feature, size, plans[0] if name == "stem_3" else None)
            self._conv(x, name, out, self._feature(feature, size, layer.weight.shape[0]))
            if out is None:
                return self._found
        for plan, following in zip(plans, [*plans[1:], None], strict=True):
            assert out is not None
            if buffer is None:
                buffer = self._pooled(out, plan)
            size = buffer.shape[0], buffer.shape[1], buffer.shape[2]
            ends = following is None or following.stage != plan.stage
            name = STAGE_NAMES[plan.stage - FIRST_STAGE] if ends else ""
            out, new = self._target(layer_names(plan)[-1], name, size, following)
            self._block(plan, buffer, out, self._feature(name, size, plan.out_channels))
            if out is None:
                return self._found
            buffer = new
        raise AssertionError("the last feature is no later than the last block")

    def _target(
        self, name: str, feature: str, size: tuple[int, int, int], following: BlockPlan | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Where a layer writes bytes, and the concat buffer that this is slot 0 of.

        Nowhere, if it makes the last feature: that is fp32.
        """
        wanted = self._network.out_features
        if feature in wanted and len(self._found) == len(wanted) - 1:
            return None, None
        channels = self._network.layers[name].weight.shape[0]
        if following is not None and not self._pools(following):
            buffer = self._buffer(size, following)
            return buffer[..., :channels], buffer
        return self._memory.chained(self._like, *size, channels), None

    def _feature(self, name: str, size: tuple[int, int, int], channels: int) -> Tensor | None:
        if name not in self._network.out_features:
            return None
        # Not Memory.feature, after which the chain would begin anew: here it goes on.
        self._found.append(self._like.new_empty(*size, channels, dtype=torch.float32))
        return self._found[-1]

    def _image(self, x: Tensor) -> Tensor:
        """Room for a quantised image, whose numbers may be wider than a byte."""
        dtype, (n, h, w, c) = self._ops.image_dtype(self._network.wide_stem), x.shape
        room = self._memory.scratch("image", self._like, n, h, w, c * dtype.itemsize)
        with torch.inference_mode(room.is_inference()):  # Elsewhere torch 2.1 makes no such view.
            return room.view(dtype)

    def _pools(self, plan: BlockPlan) -> bool:
        """Whether a pool comes before a block."""
        return plan.index == 1 and plan.stage >= self._network.spec.first_pooled_stage

    def _buffer(self, size: tuple[int, int, int], plan: BlockPlan) -> Tensor:
        return self._memory.chained(self._like, *size, plan.concat_channels)

    def _pooled(self, x: Tensor, plan: BlockPlan) -> Tensor:
        """A concat buffer with slot 0 filled by the pool before a block."""
        mode = self._network.spec.pool
        size = x.shape[0], *pooled_size(x.shape[1], x.shape[2], mode)
        buffer = self._buffer(size, plan)
        self._ops.max_pool(x, buffer[..., : plan.in_channels], mode)
        return buffer

    def _conv(
        self,
        x: Tensor,
        name: str,
        out: Tensor | None,
        feature: Tensor | None = None,
        *,
        pool: bool = False,
    ) -> Tensor | None:
        """A layer, with what depthwise convolution comes before it."""
        ops, layer, levels = self._ops, self._network.layers[name], self._network.levels
        if layer.depthwise is not None:
            target = feature if out is None else out
            assert target is not None
            spatial = self._memory.scratch(
                "depthwise", self._like, *target.shape[:3], layer.weight.shape[3]
            )
            ops.depthwise(x, layer.depthwise, spatial, levels=levels, stride=layer.stride)
            x = spatial
        sums: Tensor | None = ops.conv(x, layer, out, levels=levels, feature=feature, pool=pool)
        return sums

    def _block(
        self, plan: BlockPlan, buffer: Tensor, out: Tensor | None, feature: Tensor | None
    ) -> None:
        """An OSA block whose slot 0 is filled; see :func:`vovnet_fast.reference.osa_block`."""
        n, h, w, _ = buffer.shape
        y = x = buffer[..., : plan.in_channels]
        *names, concat = layer_names(plan)
        if plan.reduction:
            name = names.pop(0)
            y = self._memory.scratch("reduction", self._like, n, h, w, plan.mid_channels)
            self._conv(x, name, y)
        end = plan.in_channels
        for name in names:
            slot = buffer[..., end : end + plan.mid_channels]
            self._conv(y, name, slot)
            y, end = slot, end + plan.mid_channels
        if is_plain(plan):
            self._conv(buffer, concat, out, feature)
            return
        z = self._memory.scratch("concat", self._like, n, h, w, plan.out_channels)
        sums = self._conv(buffer, concat, z, pool=plan.ese)
        gates = None
        if sums is not None:
            gates = self._ops.gates(sums, h * w, self._network.gates[plan.name])
        self._ops.apply_gates(
            z, gates, x if plan.identity else None, self._network.sums[plan.name], out,
            levels=self._network.levels, feature=feature,
        )  # fmt: skip
