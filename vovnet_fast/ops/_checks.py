"""The one boundary: arguments of users are checked here, in plain sentences."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def activations(op: str, name: str, x: Tensor, channels: int | None = None) -> None:
    """A ``[N, C, H, W]`` tensor of a supported dtype.

    Raises:
        ValueError: wrong rank or channels.
        TypeError: no supported dtype.
    """
    if x.ndim != 4:
        raise ValueError(f"{op}: {name} must be [N, C, H, W], got shape {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}"
        )
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{op}: {name} must have {channels} channels, got shape {list(x.shape)}")


def parameter(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A parameter of exactly this shape on the device of the activations.

    Raises:
        ValueError: another shape or device.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device} and the activations on {like.device}: move one"
        )


def no_gradient(op: str, *tensors: Tensor) -> None:
    """Nothing here needs a gradient, which would silently be lost.

    Raises:
        NotImplementedError: a tensor requires one and gradients are enabled.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise NotImplementedError(
            f"{op} has no backward pass yet: call it under torch.no_grad() or "
            "torch.inference_mode(), or use the modules of vovnet_fast, which are differentiable"
        )


def nhwc(x: Tensor) -> Tensor:
    """View as ``[N, H, W, C]`` with channel stride 1; a copy where the layout forbids it."""
    view = x.permute(0, 2, 3, 1)
    return view if x.shape[1] == 1 or view.stride(3) == 1 else view.contiguous()


def nchw(x: Tensor) -> Tensor:
    """View ``[N, H, W, C]`` as ``[N, C, H, W]``, which is then channels_last."""
    return x.permute(0, 3, 1, 2)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums, scales and shifts for activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
