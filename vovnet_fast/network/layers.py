"""Building blocks: they hold parameters under their published names, and run ops.

State-dict keys are those of ``vovnet-detectron2``, slashes included
(``stage2.OSA2_1.layers.0.OSA2_1_0/conv.weight``), so that a published file
loads as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .. import reference
from ..ops import BlockParams, ConvParams, max_pool
from ..ops.chain import conv_chain
from ..ops.chain import needs as chain_needs
from ..ops.conv import Kinds
from ..ops.max_pool import needs as pool_needs
from ..ops.max_pool import output_size as pooled_size
from ..ops.osa import needs as block_needs
from ..ops.osa import osa_block_with_statistics
from ..specs import BlockPlan, Gate, Pool
from .decision import compute_dtype, faster_plain, fused, needs_gradient
from .fusing import Fusable, Parts, conv_params, update_running_statistics
from .norms import NormCfg, build_norm


def _add_conv_norm_relu(
    owner: nn.Module,
    name: str,
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    depthwise: bool = False,
    bias: bool = False,
    norm_cfg: NormCfg | None = None,
) -> None:
    """Register the parts of one convolution layer on ``owner`` under their keys."""
    if depthwise:
        dw = nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False)
        owner.add_module(f"{name}/dw_conv3x3", dw)
        owner.add_module(f"{name}/pw_conv1x1", nn.Conv2d(in_channels, out_channels, 1, bias=bias))
        owner.add_module(f"{name}/pw_norm", build_norm(norm_cfg, out_channels))
    else:
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias
        )
        owner.add_module(f"{name}/conv", conv)
        owner.add_module(f"{name}/norm", build_norm(norm_cfg, out_channels))


def _run_conv_norm_relu(owner: nn.Module, name: str, x: Tensor) -> Tensor:
    """Run the layer ``name`` of ``owner`` on plain PyTorch."""
    parts = Parts.of(owner, name)
    return reference.conv_norm_relu(x, parts.convs(), parts.norm)


class ConvNormReLU(nn.Module):
    """Convolution, normalisation, ReLU, under the keys ``<name>/conv`` and ``<name>/norm``.

    Args:
        name: prefix of the children's names, e.g. ``OSA2_1_0``.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: 3 (padded by one) or 1.
        stride: of the convolution.
        depthwise: a depthwise 3x3 and a 1x1 instead, under ``<name>/dw_conv3x3``,
            ``<name>/pw_conv1x1`` and ``<name>/pw_norm``.
        bias: the convolution (the 1x1 of a depthwise pair) has a bias.
        norm_cfg: see :func:`build_norm`.
    """

    def __init__(self, name: str, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__()
        self.name = name
        _add_conv_norm_relu(self, name, in_channels, out_channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C_in, H, W]`` to ``[N, C_out, H', W']``."""
        return _run_conv_norm_relu(self, self.name, x)

    def parts(self) -> Parts:
        """Its modules."""
        return Parts.of(self, self.name)


class Stem(Fusable):
    """Three convolution layers that take an image to stride 4 (2 in the seed dialect).

    Their parts are registered flat, as published: ``stem.stem_1/conv.weight``.

    Args:
        input_ch: channels of the image.
        channels: output channels of the three layers.
        strides: their strides.
        depthwise: layers 2 and 3 are depthwise.
        pointwise_bias: the 1x1 of a depthwise layer has a bias.
        norm_cfg: see :func:`build_norm`.
    """

    def __init__(
        self,
        input_ch: int,
        channels: tuple[int, int, int],
        strides: tuple[int, int, int],
        depthwise: bool,
        pointwise_bias: bool,
        norm_cfg: NormCfg | None,
    ) -> None:
        super().__init__()
        in_channels = input_ch
        for i, (out_channels, stride) in enumerate(zip(channels, strides, strict=True), start=1):
            separable = depthwise and i > 1
            _add_conv_norm_relu(
                self,
                f"stem_{i}",
                in_channels,
                out_channels,
                stride=stride,
                depthwise=separable,
                bias=separable and pointwise_bias,
                norm_cfg=norm_cfg,
            )
            in_channels = out_channels

    @property
    def first_weight(self) -> Tensor:
        """Weight of the network's first convolution; its dtype and device are the network's."""
        first: Any = self._modules["stem_1/conv"]
        return first.weight

    def forward(self, x: Tensor, *, width: int = 0) -> tuple[Tensor, Tensor]:
        """``[N, C, H, W]`` to the outputs of the second and of the third layer.

        ``width`` is :attr:`OSABlock.room` of the block that takes the third, if one does.
        """
        if self.decide(x).op:
            layers = list(self.conv_layers().values())
            dtype = compute_dtype(x)
            outs, statistics = conv_chain(
                x.to(dtype), conv_params(layers, dtype), width=width, op="stem"
            )
            update_running_statistics(layers, statistics)
            return outs[1], outs[2]
        stem_2 = _run_conv_norm_relu(self, "stem_2", _run_conv_norm_relu(self, "stem_1", x))
        return stem_2, _run_conv_norm_relu(self, "stem_3", stem_2)

    def fold(self, dtype: torch.dtype) -> tuple[ConvParams, ...]:
        """Parameters of the ops for activations of ``dtype``, fixed norms folded."""
        return tuple(conv_params(list(self.conv_layers().values()), dtype))

    def conv_layers(self) -> dict[str, Parts]:
        """See :class:`Fusable`."""
        return {name: Parts.of(self, name) for name in ("stem_1", "stem_2", "stem_3")}

    def needs(self, kinds: Kinds, *, backward: bool) -> tuple[str, ...]:
        """See :class:`Fusable`."""
        return chain_needs(kinds, backward=backward)


class ESE(nn.Module):
    """Effective Squeeze-Excitation (arXiv:1911.06667, section 3.2).

    Args:
        channels: C.
        gate: ``hard_sigmoid`` or ``sigmoid``.
    """

    def __init__(self, channels: int, gate: Gate) -> None:
        super().__init__()
        self.gate: Gate = gate
        # A 1x1 convolution and not nn.Linear: published weights are [C, C, 1, 1].
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same."""
        assert self.fc.bias is not None
        return reference.ese(x, self.fc.weight, self.fc.bias, self.gate)

    def extra_repr(self) -> str:
        return f"gate={self.gate}"


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

    def forward(self, x: Tensor, *, width: int = 0) -> Tensor:
        """``[N, C_in, H, W]`` to ``[N, C_out, H, W]``.

        ``width`` is :attr:`room` of the block that takes the output, if one does.
        """
        if self.decide(x).op:
            dtype = compute_dtype(x)
            y, statistics = osa_block_with_statistics(
                x.to(dtype),
                self.fold(dtype),
                recompute=self.with_cp and self.training,
                width=width,
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
        gradient = needs_gradient(self, x)
        if self.with_cp or self.batch or faster_plain(x, pixels, batch=False, gradient=gradient):
            return 0
        return self.plan.concat_channels

    def why_not_fused(self) -> str | None:
        """The reason why no op can take the place of its parts, or None."""
        if self.ese is not None and type(self.ese.fc) is not nn.Conv2d:
            return f"ese.fc: the fused path knows nn.Conv2d, not {type(self.ese.fc).__name__}"
        return super().why_not_fused()

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

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C_in, H, W]`` to ``[N, C_out, H', W']``."""
        blocks = list(self.children())
        needs: tuple[str, ...] = ()
        n, _, height, width = x.shape
        if self.pool is not None:
            needs = pool_needs(backward=torch.is_grad_enabled() and x.requires_grad)
            height, width = pooled_size(height, width, self.pool)
        ops = fused(x, needs)
        rooms = [_room(b, x, n * height * width) if ops else 0 for b in [*blocks, None]]
        if self.pool is not None and ops:
            x = max_pool(x, self.pool, width=rooms[0])
        elif self.pool is not None:
            x = reference.max_pool(x, self.pool)
        for block, following in zip(blocks, rooms[1:], strict=True):
            room = following if isinstance(block, OSABlock) else 0
            x = block(x, width=room) if room else block(x)
        return x

    def room(self, x: Tensor, pixels: int) -> int:
        """:meth:`OSABlock.room` of the first block, zero behind a pool."""
        return 0 if self.pool is not None else _room(next(self.children()), x, pixels)

    def blocks(self) -> list[OSABlock]:
        """The OSA blocks in the order in which they run."""
        return [block for block in self.children() if isinstance(block, OSABlock)]

    def extra_repr(self) -> str:
        return f"pool={self.pool}"
