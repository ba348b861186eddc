"""A VoVNet for inference: batch norms folded, weights packed, buffers planned.

>>> import torch, vovnet_fast
>>> model = vovnet_fast.VoVNet("V-19-slim-dw-eSE")
>>> stage2, stage3, stage4, stage5 = vovnet_fast.freeze(model)(torch.randn(1, 3, 224, 224))

In a detector: ``detector.backbone = vovnet_fast.freeze(detector.backbone)``.
"""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import nn

from .._dtypes import accumulator
from ..backends import BackendError
from ..network.model import VoVNet
from ..network.structure import has_hooks
from ..ops import BlockParams, ConvParams, NetworkParams, _checks
from ..replay.caches import KEPT_SHAPES
from .frozen import FrozenVoVNet

__all__ = ["KEPT_SHAPES", "FrozenVoVNet", "freeze"]


def freeze(
    model: VoVNet,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.channels_last,
    graph: bool = False,
    *,
    out_dtype: torch.dtype | None = None,
) -> FrozenVoVNet:
    """Make an inference module of a VoVNet, which is left as it is and shares no memory.

    Batch norms take their running statistics, whatever mode the model is in, and are
    folded in fp32 (fp64 for fp64).

    Args:
        model: any :class:`vovnet_fast.VoVNet`, with checkpoints already loaded.
        dtype: fp16, bf16, fp32 or fp64, of the weights and of all activations. That of
            the model by default.
        memory_format: of the returned features, ``torch.channels_last`` or
            ``torch.contiguous_format``. Computed is in channels_last always.
        graph: on NVIDIA GPUs, capture a CUDA graph for each input shape and replay it.
        out_dtype: of the returned features; ``dtype`` by default. The neck of a detector
            that stays in fp32 wants ``torch.float32``.

    Returns:
        a :class:`FrozenVoVNet` on the device of the model.

    Raises:
        TypeError: ``model`` is no VoVNet, or a dtype is not among those.
        ValueError: another memory format.
        BackendError: a part cannot be folded, such as a group norm, or is not what it was built
            as, or has hooks; the message names it.
    """
    require_model("freeze", model)
    first = model.first_weight
    dtype = dtype or (torch.float32 if first is None else first.dtype)
    out_dtype = out_dtype or dtype
    require_options("freeze", dtype, out_dtype, memory_format)
    with torch.inference_mode(False), torch.no_grad():
        params = folded(model, dtype)
        return FrozenVoVNet(params, model.out_features, memory_format, graph, out_dtype)


def require_model(what: str, model: VoVNet) -> None:
    """Refuse what is no network that can be folded, as :func:`freeze` says."""
    if not isinstance(model, VoVNet):
        raise TypeError(f"{what} takes a vovnet_fast.VoVNet, got {type(model).__name__}")
    reason = _why_other(model) or model.why_other()
    if reason is not None:
        raise BackendError(f"{what}: {reason}")


def require_options(
    what: str, dtype: torch.dtype, out_dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Refuse dtypes and layouts that no frozen network has, as :func:`freeze` says."""
    for name, value in (("dtype", dtype), ("out_dtype", out_dtype)):
        if value not in _checks.DTYPES:
            raise TypeError(
                f"{what}: {name} must be float16, bfloat16, float32 or float64, got {value}"
            )
    if memory_format not in (torch.channels_last, torch.contiguous_format):
        raise ValueError(
            f"{what}: memory_format must be torch.channels_last or torch.contiguous_format, "
            f"got {memory_format}"
        )


def _why_other(model: VoVNet) -> str | None:
    """Why calling the model does more or something else than the network computes, or None."""
    if type(model).forward is not VoVNet.forward or "forward" in model.__dict__:
        return f"this {type(model).__name__} has a forward of its own, which would not be called"
    if has_hooks(model):
        return (
            "the model has hooks, which would be lost: remove them, and register them with the "
            "module that is made of it"
        )
    return None


def folded(model: VoVNet, dtype: torch.dtype) -> NetworkParams:
    """The network as the ops take it: in fp32 and fp64 with all scales one.

    There they are folded into the weights. Half-precision weights would be rounded once
    more by that, which doubles the error of a network that was fp16 already: they keep
    their scale apart, in fp32.
    """
    # A twin whose modes can be changed. Its tensors are the model's: nothing is copied.
    tensors = chain(model.parameters(), model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    nn.Module.train(twin, False)  # Not VoVNet.train, which would freeze stages.
    exact = accumulator(dtype)
    if dtype != exact:
        return twin.fold(dtype).packed(dtype)
    own = dtype if model.first_weight is None else model.first_weight.dtype
    params = twin.fold(torch.promote_types(dtype, own))

    def fold(layer: ConvParams) -> ConvParams:
        weight = layer.weight * layer.scale[:, None, None, None]
        return layer._replace(weight=weight.to(dtype), scale=torch.ones_like(layer.scale))

    def fold_block(block: BlockParams) -> BlockParams:
        return block._replace(
            layers=tuple(fold(layer) for layer in block.layers),
            concat=fold(block.concat),
            reduction=None if block.reduction is None else fold(block.reduction),
        )

    return params._replace(
        stem=tuple(fold(layer) for layer in params.stem),
        blocks=tuple(fold_block(block) for block in params.blocks),
    )
