"""Building blocks: they hold parameters under their published names, and run ops.

State-dict keys are those of ``vovnet-detectron2``, slashes included
(``stage2.OSA2_1.layers.0.OSA2_1_0/conv.weight``), so that a published file
loads as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from . import reference
from .backends import BackendError
from .ops import BlockParams, ConvParams, fold
from .specs import BlockPlan, Gate, Pool

NormCfg = Mapping[str, Any]


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose statistics and affine terms are constants.

    All four tensors are buffers, as in detectron2: no gradient, no update, the
    same result in training and evaluation. State-dict keys are those of
    ``nn.BatchNorm2d`` without ``num_batches_tracked``.

    Args:
        num_features: number of channels.
        eps: added to the variance.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``[N, C, H, W]``."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # A file written with nn.BatchNorm2d counts batches; here nothing does.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


_NORMS = {
    "BN": nn.BatchNorm2d,
    "BN2d": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": nn.GroupNorm,
}


def build_norm(norm_cfg: NormCfg | None, channels: int) -> nn.Module:
    """Make the normalisation layer that an mmdet-style config describes.

    Args:
        norm_cfg: ``dict(type='BN' | 'SyncBN' | 'FrozenBN' | 'GN', ...)``. The
            other entries go to the layer; ``requires_grad=False`` makes its
            affine parameters constants. ``None`` means ``dict(type='BN')``.
            ``GN`` has 32 groups unless ``num_groups`` says otherwise.
        channels: number of channels.

    Raises:
        ValueError: unknown type, or a group count that does not divide ``channels``.
        TypeError: an entry that the layer does not take.
    """
    cfg: dict[str, Any] = dict(norm_cfg) if norm_cfg is not None else {"type": "BN"}
    kind = cfg.pop("type", None)
    requires_grad = cfg.pop("requires_grad", True)
    if kind not in _NORMS:
        raise ValueError(
            f"norm_cfg: type must be one of {', '.join(_NORMS)}, got {kind!r} in {norm_cfg!r}"
        )
    if kind == "GN":
        groups = cfg.pop("num_groups", 32)
        if channels % groups:
            raise ValueError(
                f"norm_cfg: GN with num_groups={groups} does not divide a layer of {channels} "
                "channels; choose a num_groups that divides every width of the spec "
                "(16 divides all published ones but 56, 8 divides all)"
            )
        norm: nn.Module = nn.GroupNorm(groups, channels, **cfg)
    else:
        norm = _NORMS[kind](channels, **cfg)
    for parameter in norm.parameters():
        parameter.requires_grad = requires_grad
    return norm


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
    """Run the layer ``name`` of ``owner``.

    The parts are looked up at every call: SyncBN conversion, FSDP and
    quantisation replace children, and must find their replacement used.
    """
    parts: dict[str, Any] = owner._modules
    if f"{name}/conv" in parts:
        return reference.conv_norm_relu(x, (parts[f"{name}/conv"],), parts[f"{name}/norm"])
    convs = (parts[f"{name}/dw_conv3x3"], parts[f"{name}/pw_conv1x1"])
    return reference.conv_norm_relu(x, convs, parts[f"{name}/pw_norm"])


def _fold_conv_norm(owner: nn.Module, name: str, dtype: torch.dtype) -> ConvParams:
    """The layer ``name`` of ``owner`` as the fused path takes it.

    Raises:
        BackendError: a part is no plain convolution, or its norm has no fixed statistics.
    """
    parts: dict[str, Any] = owner._modules
    depthwise = parts.get(f"{name}/dw_conv3x3")
    conv = parts[f"{name}/conv" if depthwise is None else f"{name}/pw_conv1x1"]
    norm = parts[f"{name}/norm" if depthwise is None else f"{name}/pw_norm"]
    for part in (conv,) if depthwise is None else (depthwise, conv):
        if type(part) is not nn.Conv2d:
            raise BackendError(f"{name}: the fused path knows nn.Conv2d, not {type(part).__name__}")
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
    if type(norm) not in kinds or norm.running_mean is None:
        raise BackendError(
            f"{name}: the fused path knows batch norms with running statistics, not {norm}"
        )
    if norm.training and type(norm) is not FrozenBatchNorm2d:
        raise BackendError(
            f"{name}: its batch norm is in training mode; the fused path has no batch statistics "
            "yet: call eval(), or set norm_eval=True"
        )
    return fold(
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        stride=(conv if depthwise is None else depthwise).stride[0],
        depthwise=None if depthwise is None else depthwise.weight,
        dtype=dtype,
    )


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

    def fold(self, dtype: torch.dtype) -> ConvParams:
        """Parameters of the fused path for activations of ``dtype``.

        Raises:
            BackendError: the layer cannot be folded; the message says why.
        """
        return _fold_conv_norm(self, self.name, dtype)


class Stem(nn.Module):
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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, C, H, W]`` to the outputs of the second and of the third layer."""
        stem_2 = _run_conv_norm_relu(self, "stem_2", _run_conv_norm_relu(self, "stem_1", x))
        return stem_2, _run_conv_norm_relu(self, "stem_3", stem_2)

    def fold(self, dtype: torch.dtype) -> tuple[ConvParams, ...]:
        """Parameters of the fused path for activations of ``dtype``.

        Raises:
            BackendError: a layer cannot be folded; the message says why.
        """
        names = ("stem_1", "stem_2", "stem_3")
        return tuple(_fold_conv_norm(self, name, dtype) for name in names)


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


class OSABlock(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C_in, H, W]`` to ``[N, C_out, H, W]``."""
        if self.with_cp and self.training and torch.is_grad_enabled():
            return checkpoint(
                self._aggregate,
                x,
                use_reentrant=False,
                preserve_rng_state=False,  # Nothing in a block draws random numbers.
                context_fn=lambda: (contextlib.nullcontext(), _spare_statistics(self)),
            )
        return self._aggregate(x)

    def fold(self, dtype: torch.dtype) -> BlockParams:
        """Parameters of the fused path for activations of ``dtype``.

        Raises:
            BackendError: a layer cannot be folded; the message says why.
        """
        layers: Any = self.layers
        return BlockParams(
            tuple(layer.fold(dtype) for layer in layers),
            self.concat.fold(dtype),
            None if self.conv_reduction is None else self.conv_reduction.fold(dtype),
            None if self.ese is None else self.ese.fc.weight.flatten(1),
            None if self.ese is None else self.ese.fc.bias,
            "hard_sigmoid" if self.ese is None else self.ese.gate,
            self.plan.identity,
        )

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
        if self.pool is not None:
            x = reference.max_pool(x, self.pool)
        for block in self.children():
            x = block(x)
        return x

    def blocks(self) -> list[OSABlock]:
        """The OSA blocks in the order in which they run."""
        return [block for block in self.children() if isinstance(block, OSABlock)]

    def extra_repr(self) -> str:
        return f"pool={self.pool}"
