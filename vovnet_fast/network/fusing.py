"""From modules to ops: the parameters of the fused path, and which modules have them.

The modules of :mod:`vovnet_fast.network.layers` hold parameters under their published names. What
the ops take is made of them at every call, differentiably, so that optimisers, DDP and
FSDP see nothing but the modules' own parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._dtypes import accumulator
from ..compat import zip
from ..ops import ConvParams, batch_norm
from ..ops.batch_norm import FixedNorm
from ..ops.conv import Kinds, channels_last, depthwise_last
from . import decision, structure
from .decision import Decision
from .norms import FrozenBatchNorm2d
from .structure import has_hooks


class Parts(NamedTuple):
    """The modules of one convolution layer.

    They are looked up at every call: SyncBN conversion, FSDP and quantisation replace
    children, and must find their replacement used.
    """

    depthwise: Any
    conv: Any
    norm: Any

    @classmethod
    def of(cls, owner: nn.Module, name: str) -> Parts:
        """Those of the layer ``name`` of ``owner``."""
        parts: dict[str, Any] = owner._modules
        if f"{name}/conv" in parts:
            return cls(None, parts[f"{name}/conv"], parts[f"{name}/norm"])
        return cls(
            parts[f"{name}/dw_conv3x3"], parts[f"{name}/pw_conv1x1"], parts[f"{name}/pw_norm"]
        )

    def convs(self) -> list[Any]:
        """The convolutions in the order in which they run."""
        return [self.conv] if self.depthwise is None else [self.depthwise, self.conv]

    @property
    def batch(self) -> bool:
        """Whether the norm takes its statistics from the batch."""
        frozen = type(self.norm) is FrozenBatchNorm2d
        fixed = getattr(self.norm, "running_mean", None) is not None and not self.norm.training
        return not frozen and not fixed


_FUSED_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


class Geometry(NamedTuple):
    """What an op takes a layer to be.

    Attributes:
        in_channels, out_channels: of the layer.
        kernel: 3 or 1.
        depthwise: it is a depthwise 3x3, and then a 1x1.
        strides: those that it may have.
    """

    in_channels: int
    out_channels: int
    kernel: int
    depthwise: bool
    strides: tuple[int, ...] = (1,)

    def why_other(self, owner: nn.Module, name: str) -> str | None:
        """Why the layer ``name`` of ``owner`` is something else, or None."""
        c_in, c_out, k = self.in_channels, self.out_channels, self.kernel
        convs: tuple[tuple[str, tuple[int, ...], tuple[int, ...], int], ...]
        if self.depthwise:
            convs = (
                ("dw_conv3x3", (c_in, 1, 3, 3), self.strides, c_in),
                ("pw_conv1x1", (c_out, c_in, 1, 1), (1,), 1),
            )
        else:
            convs = (("conv", (c_out, c_in, k, k), self.strides, 1),)
        for suffix, shape, strides, groups in convs:
            conv: Any = owner._modules.get(f"{name}/{suffix}")
            reason = structure.why_other(conv, nn.Conv2d)
            reason = reason or structure.why_other_conv(conv, shape, strides, groups)
            if reason is None and suffix == "dw_conv3x3" and conv.bias is not None:
                reason = "the fused path knows no bias here"
            if reason is not None:
                return f"{name}/{suffix}: {reason}"
        suffix = "pw_norm" if self.depthwise else "norm"
        reason = structure.why_other(owner._modules.get(f"{name}/{suffix}"), *_FUSED_NORMS)
        return None if reason is None else f"{name}/{suffix}: {reason}"


class Fusable(nn.Module):
    """A module whose convolution layers can run as one op."""

    def conv_layers(self) -> dict[str, Parts]:
        """Its convolution layers by name, in the order in which they run.

        It is asked where :meth:`why_other_layers` has nothing to say.
        """
        raise NotImplementedError

    def why_other_layers(self) -> str | None:
        """Why its op computes something else than its modules, which have changed, or None."""
        raise NotImplementedError

    def needs(self, kinds: Kinds, *, backward: bool) -> tuple[str, ...]:
        """The functions of a backend that its op uses; see :meth:`Kinds.needs`."""
        raise NotImplementedError

    def decide(self, x: Tensor) -> Decision:
        """What runs it on ``x``.

        Raises:
            BackendError: a fused backend was asked for by name and cannot; the message says why.
        """
        return decision.of_part(self, x)

    @property
    def kinds(self) -> Kinds:
        """Which kinds of layers it has."""
        layers = list(self.conv_layers().values())
        batch = [parts.norm for parts in layers if parts.batch]
        return Kinds(
            any(parts.depthwise is not None for parts in layers),
            len(batch) < len(layers),
            len(batch) > 0,
            any(isinstance(norm, nn.SyncBatchNorm) for norm in batch),
        )

    def structure(self) -> tuple[Kinds | None, str | None]:
        """Its :attr:`kinds`, or the reason why no op can take the place of its parts."""
        return structure.kept(self, self._structure)

    def _structure(self) -> tuple[Kinds | None, str | None]:
        reason = self.why_not_fused()
        return (self.kinds, None) if reason is None else (None, reason)

    def why_not_fused(self) -> str | None:
        """That reason, found out. It begins with the module that it is about."""
        reason = self.why_other_layers()
        if reason is not None:
            return reason
        for name, child in self.named_modules():
            if name and has_hooks(child):
                return (
                    f"{name}: it has hooks, and the fused path does not run this module; remove "
                    "them, or use the reference backend"
                )
        return None


def conv_params(layers: Sequence[Parts], dtype: torch.dtype) -> list[ConvParams]:
    """Layers as the ops take them, for activations of ``dtype``. Differentiable."""
    high = accumulator(dtype)
    fixed = [
        FixedNorm(n.weight, n.bias, n.running_mean, n.running_var, n.eps, conv.bias)
        for _, conv, n in (parts for parts in layers if not parts.batch)
    ]
    folded = iter(batch_norm.fold(fixed, dtype) if fixed else [])
    found = []
    for parts in layers:
        depthwise, conv, norm = parts
        eps, group = None, ""
        if not parts.batch:
            scale, shift = next(folded)
        else:
            eps = norm.eps
            if isinstance(norm, nn.SyncBatchNorm) and norm.training:
                group = batch_norm.group_name(norm.process_group)
            channels = conv.weight.shape[0]
            scale, shift = (
                conv.weight.new_full((channels,), value, dtype=high) if t is None else t.to(high)
                for t, value in ((norm.weight, 1.0), (norm.bias, 0.0))
            )
            if conv.bias is not None:  # The mean takes it out again, and leaves a gradient of 0.
                shift = shift + 0.0 * conv.bias.to(high)
        found.append(
            ConvParams(
                channels_last(conv.weight),
                scale,
                shift,
                (conv if depthwise is None else depthwise).stride[0],
                None if depthwise is None else depthwise_last(depthwise.weight),
                eps,
                group,
            )
        )
    return found


@torch.no_grad()
def update_running_statistics(layers: Sequence[Parts], statistics: Sequence[Tensor]) -> None:
    """Let norms that took their statistics from the batch remember them, as PyTorch does."""
    batch = [parts for parts in layers if parts.batch]
    for parts, found in zip(batch, statistics, strict=True):
        _, conv, norm = parts
        if not norm.training or not norm.track_running_stats or norm.running_mean is None:
            continue
        factor: Any = norm.momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if factor is None:  # A cumulative average.
                factor = 1.0 / norm.num_batches_tracked.to(found.dtype)
        mean, variance = found[batch_norm.MEAN], found[batch_norm.VARIANCE]
        if conv.bias is not None:
            mean = mean + conv.bias.to(mean.dtype)
        for running, new in ((norm.running_mean, mean), (norm.running_var, variance)):
            running.copy_(torch.lerp(running.to(new.dtype), new, 0.0 if factor is None else factor))
