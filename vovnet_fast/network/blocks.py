"""OSA blocks and stages of them: they hold parameters under their published names, and run ops."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .. import compat, reference
from ..compat import zip
from ..ops import BlockParams, max_pool
from ..ops.conv import Kinds
from ..ops.max_pool import needs as pool_needs
from ..ops.max_pool import output_size as pooled_size
from ..ops.osa import needs as block_needs
from ..ops.osa import osa_block_with_statistics
from ..specs import BlockPlan, Gate, Pool
from . import structure
from .decision import compute_dtype, faster_plain, needs_gradient, of_function
from .fusing import Fusable, Geometry, Parts, conv_params, update_running_statistics
from .layers import ESE, ConvNormReLU
from .norms import NormCfg
from .structure import computed_by
from .telling import Told, call, told


@computed_by("plan")
class OSABlock(Fusable):
    """One-Shot Aggregation: L chained layers, one concat, a 1x1, eSE, identity add.

    Args:
        plan: widths and options of the block.
        gate: nonlinearity of the eSE gate.
        pointwise_bias: the 1x1 convolutions have a bias.
        norm_cfg: see :func:`build_norm`.
        with_cp: in training, keep only the block's input and compute the rest
            again in the backward pass. Running statistics are updated once.
    """

    def __init__(
        self,
        plan: BlockPlan,
        gate: Gate,
        pointwise_bias: bool,
        norm_cfg: NormCfg | None,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.with_cp = with_cp
        name, mid = plan.name, plan.mid_channels
        pointwise: dict[str, Any] = dict(kernel_size=1, bias=pointwise_bias, norm_cfg=norm_cfg)
        self.conv_reduction = (
            ConvNormReLU(f"{name}_reduction_0", plan.in_channels, mid, **pointwise)
            if plan.reduction
            else None
        )
        self.layers = nn.ModuleList(
            ConvNormReLU(
                f"{name}_{i}",
                mid if i > 0 or plan.depthwise else plan.in_channels,
                mid,
                depthwise=plan.depthwise,
                bias=plan.depthwise and pointwise_bias,
                norm_cfg=norm_cfg,
            )
            for i in range(plan.num_layers)
        )
        self.concat = ConvNormReLU(
            f"{name}_concat", plan.concat_channels, plan.out_channels, **pointwise
        )
        self.ese = ESE(plan.out_channels, gate) if plan.ese else None

    @compat.traced
    def forward(self, x: Tensor) -> Tensor:
        """``[N, C_in, H, W]`` to ``[N, C_out, H, W]``."""
        if self.decide(x).op:
            dtype = compute_dtype(x)
            y, statistics = osa_block_with_statistics(
                x.to(dtype),
                self.fold(dtype),
                recompute=self.with_cp and self.training,
                width=told(self).width,
            )
            update_running_statistics(list(self.conv_layers().values()), statistics)
            return y
        if self.with_cp and self.training and torch.is_grad_enabled():
            return checkpoint(
                self._aggregate,
                x,
                use_reentrant=False,
                preserve_rng_state=False,  # Nothing in a block draws random numbers.
                context_fn=lambda: (contextlib.nullcontext(), _spare_statistics(self)),
            )
        return self._aggregate(x)

    def room(self, x: Tensor, pixels: int) -> int:
        """Channels of the concat buffer in which the producer of its input should make it.

        Zero where that would keep the buffer alive longer than it is needed, or where the
        block will not run as an op on maps of so many pixels, N * H * W, that are made of ``x``.
        """
        kinds, _ = self.structure()
        if self.with_cp or kinds is None or kinds.batch:
            return 0
        gradient = needs_gradient(self, x)
        if faster_plain(x, pixels, batch=False, gradient=gradient):
            return 0
        return self.plan.concat_channels

    def why_other_layers(self) -> str | None:
        """See :class:`Fusable`."""
        plan, depthwise = self.plan, self.plan.depthwise
        mid, out = plan.mid_channels, plan.out_channels
        if type(self.layers) is not nn.ModuleList or len(self.layers) != plan.num_layers:
            return f"{plan.name}.layers: no longer an nn.ModuleList of {plan.num_layers}"
        first = mid if depthwise else plan.in_channels
        layers: list[tuple[str, Any, Geometry]] = [
            ("conv_reduction", self.conv_reduction, Geometry(plan.in_channels, mid, 1, False)),
            *(
                (f"layers.{i}", layer, Geometry(mid if i else first, mid, 3, depthwise))
                for i, layer in enumerate(self.layers)
            ),
            ("concat", self.concat, Geometry(plan.concat_channels, out, 1, False)),
        ]
        for name, layer, geometry in layers if plan.reduction else layers[1:]:
            reason = structure.why_other(layer, ConvNormReLU)
            if reason is not None:
                return f"{plan.name}.{name}: {reason}"
            reason = geometry.why_other(layer, layer.name)
            if reason is not None:
                return reason
        if not plan.reduction and self.conv_reduction is not None:
            return f"{plan.name}.conv_reduction: there was none"
        if self.ese is None:
            return None
        reason = structure.why_other(self.ese, ESE)
        if reason is not None:
            return f"{plan.name}.ese: {reason}"
        reason = structure.why_other(self.ese.fc, nn.Conv2d)
        reason = reason or structure.why_other_conv(self.ese.fc, (out, out, 1, 1), (1,))
        if reason is None and self.ese.fc.bias is None:
            reason = "the fused path knows it with a bias"
        return None if reason is None else f"{plan.name}.ese.fc: {reason}"

    def fold(self, dtype: torch.dtype) -> BlockParams:
        """Parameters of the ops for activations of ``dtype``, fixed norms folded."""
        params = iter(conv_params(list(self.conv_layers().values()), dtype))
        reduction = None if self.conv_reduction is None else next(params)
        layers = tuple(next(params) for _ in self.layers)
        return BlockParams(
            layers,
            next(params),
            reduction,
            None if self.ese is None else self.ese.fc.weight.flatten(1),
            None if self.ese is None else self.ese.fc.bias,
            "hard_sigmoid" if self.ese is None else self.ese.gate,
            self.plan.identity,
        )

    def conv_layers(self) -> dict[str, Parts]:
        """See :class:`Fusable`; the order is that of :meth:`BlockParams.convs`."""
        modules: list[Any] = [self.conv_reduction, *self.layers, self.concat]
        return {m.name: Parts.of(m, m.name) for m in modules if m is not None}

    def needs(self, kinds: Kinds, *, backward: bool) -> tuple[str, ...]:
        """See :class:`Fusable`."""
        gated, identity = self.ese is not None, self.plan.identity
        return block_needs(kinds, gated=gated, identity=identity, backward=backward)

    def _aggregate(self, x: Tensor) -> Tensor:
        return reference.osa_block(
            x,
            list(self.layers),
            self.concat,
            reduction=self.conv_reduction,
            ese=self.ese,
            identity=self.plan.identity,
        )


@contextlib.contextmanager
def _spare_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms update copies of their running statistics, thrown away at the end.

    Entered around the second forward pass of activation checkpointing, which
    would otherwise update running statistics a second time with the same batch.
    Copies, and not ``track_running_stats=False``: that pass must save the very
    tensors that the first one saved, and batch norm saves its statistics.
    """
    kept = [
        (m, name, buffer)
        for m in module.modules()
        if isinstance(m, _BatchNorm) and m.training
        for name, buffer in m._buffers.items()
        if buffer is not None
    ]
    for norm, name, buffer in kept:
        norm._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            norm._buffers[name] = buffer


def _room(block: nn.Module | None, x: Tensor, pixels: int) -> int:
    """:meth:`OSABlock.room`, zero for none and for what has taken the place of a block."""
    return block.room(x, pixels) if isinstance(block, OSABlock) else 0


@computed_by("pool")
class OSAStage(nn.Module):
    """A max pool (except in the first stages of some dialects) and a row of OSA blocks.

    Args:
        blocks: the blocks, which become children named by their plan.
        pool: mode of the max pool, or None for no pool.
    """

    def __init__(self, blocks: list[OSABlock], pool: Pool | None) -> None:
        super().__init__()
        self.pool: Pool | None = pool
        for block in blocks:
            self.add_module(block.plan.name, block)

    @compat.traced
    def forward(self, x: Tensor) -> Tensor:
        """``[N, C_in, H, W]`` to ``[N, C_out, H', W']``."""
        blocks = list(self.children())
        needs: tuple[str, ...] = ()
        n, _, height, width = x.shape
        if self.pool is not None:
            needs = pool_needs(backward=torch.is_grad_enabled() and x.requires_grad)
            height, width = pooled_size(height, width, self.pool)
        ops = of_function(x, needs).op
        rooms = [_room(b, x, n * height * width) if ops else 0 for b in [*blocks, None]]
        if self.pool is not None and ops:
            x = max_pool(x, self.pool, width=rooms[0])
        elif self.pool is not None:
            x = reference.max_pool(x, self.pool)
        for block, following in zip(blocks, rooms[1:], strict=True):
            x = call(block, x, Told(following))
        return x

    def room(self, x: Tensor, pixels: int) -> int:
        """:meth:`OSABlock.room` of the first block, zero behind a pool."""
        return 0 if self.pool is not None else _room(next(self.children()), x, pixels)

    def blocks(self) -> list[OSABlock]:
        """The OSA blocks in the order in which they run."""
        return [block for block in self.children() if isinstance(block, OSABlock)]

    def extra_repr(self) -> str:
        return f"pool={self.pool}"
