"""Whether the tensors of a state dict can become a network's, found out before the first copy.

PyTorch copies what fits as it goes and reports the rest afterwards: the network is then half
loaded. It also converts whatever can be converted, integers and complex numbers among it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from .norms import FrozenBatchNorm2d

COUNTER = "num_batches_tracked"  # A step count, no weight; frozen norms do not have it.

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_KNOWN_LOADERS = (
    nn.Module._load_from_state_dict,
    _NormBase._load_from_state_dict,
    FrozenBatchNorm2d._load_from_state_dict,
)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written, or does not fit the architecture."""


class AllOrNothing(nn.Module):
    """A module that a state dict fills completely or not at all."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, *args, **kwargs):
        """As PyTorch's, but names, shapes and what the tensors are are looked at first.

        Raises:
            CheckpointError: a ``RuntimeError``, as PyTorch's is; nothing was copied before it.
        """
        if strict and isinstance(state_dict, Mapping):
            require_keys(self, state_dict)
        return super().load_state_dict(state_dict, strict, *args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs) -> None:
        # Where it is a part of something too; its own parts come after it.
        assign = local_metadata.get("assign_to_params_buffers", False)
        require_fit(self, state_dict, prefix, assign=assign)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)


def require_names(state_dict: Mapping[Any, Any]) -> None:
    """
    Raises:
        CheckpointError: a key is no string.
    """
    for key in state_dict:
        if not isinstance(key, str):
            raise CheckpointError(
                f"the key {key!r} is no string but {type(key).__name__}: a state dict has tensors "
                "by name. Save the state_dict() of a module, not its list of parameters or an "
                "optimizer's state"
            )


def why_not_plain(value: object) -> str | None:
    """Why ``value`` is no tensor of as many numbers as its shape says, or None."""
    if not isinstance(value, Tensor):
        return (
            f"is no tensor but {type(value).__name__}: the file was not written by torch.save of "
            "a state dict"
        )
    if value.is_nested:
        return "is a nested tensor, expected a plain one: unbind() it, and save what it holds"
    if value.is_quantized:
        return f"is quantised ({value.dtype}), expected a plain tensor: dequantize() it first"
    if value.layout != torch.strided:
        return f"is {value.layout}, expected {torch.strided}: to_dense() it first"
    return None


def why_not(value: object, own: Tensor, *, assign: bool = False) -> str | None:
    """Why ``value`` cannot become what ``own`` is in a network, its shape aside, or None.

    Args:
        value: out of a state dict.
        own: the parameter or the buffer.
        assign: it is to take the place of ``own``, with its own dtype and device.
    """
    reason = why_not_plain(value)
    if reason is not None or not isinstance(value, Tensor):
        return reason
    if value.is_meta and not assign:
        return (
            "is on the meta device, and has a shape but no values: save the state dict of a model "
            "that has been filled"
        )
    if own.is_floating_point():
        if value.dtype not in WEIGHT_DTYPES:
            known = ", ".join(str(dtype) for dtype in WEIGHT_DTYPES)
            return (
                f"is {value.dtype}, expected one of {known}: these are no weights as they were "
                "trained. Dequantise them with their scales, or take the original file"
            )
        if not assign:
            lost = overflows(value, own.dtype)
            if lost:
                return (
                    f"holds {lost} values that are finite in {value.dtype} and infinite in "
                    f"{own.dtype}, which the network has: convert the network to a wider dtype, "
                    "or look into the file, whose training may have diverged"
                )
    elif value.dtype == torch.bool or value.is_complex() or value.dtype.itemsize < 2:
        return f"is {value.dtype}, expected {own.dtype}, a number of steps"
    return None


def overflows(value: Tensor, dtype: torch.dtype) -> int:
    """How many finite values become infinite in ``dtype``; 0 where values cannot be seen."""
    if torch.finfo(value.dtype).max <= torch.finfo(dtype).max:
        return 0
    lost = (value.isfinite() & ~value.to(dtype).isfinite()).sum()
    return 0 if lost.is_meta or isinstance(lost, FakeTensor) else int(lost)


def fits(value: Tensor, own: Tensor) -> bool:
    """Whether the shapes are the same; a scalar of before PyTorch 0.4 has one axis."""
    return value.shape == own.shape or (own.ndim == 0 and value.ndim == 1 and len(value) > 0)


def require_fit(
    module: nn.Module, state_dict: Mapping[Any, Any], prefix: str = "", *, assign: bool = False
) -> None:
    """Look at everything that a state dict would copy into a module, before anything is copied.

    Args:
        module: what is to be filled.
        state_dict: tensors by name, those of other modules too.
        prefix: of the module's own.
        assign: tensors are not copied but take the place of the module's.

    Raises:
        CheckpointError: loading would fail midway, or change values without a word.
    """
    require_names(state_dict)
    # Not its state_dict(): that may run hooks of wrappers inside, which talk to other processes.
    own: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    own.update(module.named_buffers(remove_duplicate=False))
    problems = []
    for key, there in own.items():
        if prefix + key in state_dict and not is_lazy(there):
            reason = _why_not_copied(state_dict[prefix + key], there, assign)
            if reason is not None:
                problems.append(f"{prefix + key!r} {reason}")
    _refuse(module, problems)


def _why_not_copied(value: object, own: Tensor, assign: bool) -> str | None:
    assign = assign or own.is_meta  # To which nothing is copied; PyTorch warns of it.
    reason = why_not(value, own, assign=assign)
    if reason is not None or not isinstance(value, Tensor):
        return reason
    if not fits(value, own):
        return f"is {list(value.shape)}, expected {list(own.shape)}"
    return None if assign or (_plain(value) and _plain(own)) else _why_not_tried(value, own)


def require_keys(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Compare names before anything is copied, as a strict load does after it.

    Where a part of the module reads other names than it writes, that is left to PyTorch.

    Raises:
        CheckpointError: there are names too few or too many.
    """
    require_names(state_dict)
    if not all(_reads_what_it_writes(part) for part in module.modules() if part is not module):
        return
    own, versions = module.state_dict(keep_vars=True), getattr(state_dict, "_metadata", None) or {}
    missing = [key for key in own if key not in state_dict]
    # Norms of before PyTorch 0.4.1 did not count, and go on with what they have.
    missing = [
        key
        for key in missing
        if not key.endswith(COUNTER)
        or (versions.get(key.rpartition(".")[0], {}).get("version") or 1) >= 2
    ]
    unexpected = [key for key in state_dict if key not in own and not key.endswith(COUNTER)]
    problems = []
    for what, keys in (("Missing", missing), ("Unexpected", unexpected)):
        if keys:  # In PyTorch's words, which people search for.
            shown = ", ".join(f'"{key}"' for key in keys[:4]) + (", ..." if len(keys) > 4 else "")
            problems.append(f"{len(keys)} {what} key(s) in state_dict: {shown}")
    _refuse(
        module,
        problems,
        ". vovnet_fast.checkpoints.load reads every published layout, and says which architecture "
        "a file fits",
    )


def _refuse(module: nn.Module, problems: list[str], remedy: str = "") -> None:
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(
            f"the state dict does not fit {type(module).__name__}, of which nothing was changed: "
            + "; ".join(problems[:4])
            + more
            + remedy
        )


def _reads_what_it_writes(module: nn.Module) -> bool:
    return (
        not module._load_state_dict_pre_hooks
        and type(module)._load_from_state_dict in _KNOWN_LOADERS
    )


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor)


def _why_not_tried(value: Tensor, own: Tensor) -> str | None:
    """Of subclasses only they themselves know whether one can be copied into another."""
    try:
        with torch.no_grad():
            torch.empty_like(own).copy_(value)
    except Exception as error:
        return (
            f"is {type(value).__name__} and cannot be copied to {type(own).__name__} ({error}): "
            "load before sharding or quantising, or with what shards the tensors too, as "
            "torch.distributed.checkpoint.state_dict.set_model_state_dict does"
        )
    return None
