"""Normalisation layers by the names that configs use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .structure import computed_by

NormCfg = Mapping[str, Any]


@computed_by("eps")
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
