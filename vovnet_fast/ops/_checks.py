"""The one boundary: arguments of users are checked here, in plain sentences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import backends

Result = TypeVar("Result")

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


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd has to remember what is computed from these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def in_given_dtypes(run: Callable[..., Result]) -> Callable[..., Result]:
    """Make autocast leave the tensors of a function alone, the first of which it is given.

    Ops decide about dtypes before they run; what autocast would cast once more on the way,
    a convolution of fp32 activations say, would no longer fit the rest.
    """

    @functools.wraps(run)
    def wrapped(x: Tensor, *args: Any) -> Result:
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return run(x, *args)
        with torch.autocast(kind, enabled=False):
            return run(x, *args)

    return wrapped


def traced(x: Tensor) -> bool:
    """Whether a graph is being made of what happens to ``x``, and only ops must happen to it."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)


def call(op: torch.library.CustomOpDef, choice: str, *args: Any) -> Any:
    """Run an op on the backend of ``choice``.

    Where only shapes matter torch.library would run the op's fake, which launches nothing.
    """
    if backends.sees_shapes_only(choice):
        return op._init_fn(*args)
    return getattr(torch.ops.vovnet_fast, op._name.removeprefix("vovnet_fast::"))(*args)


def batch_statistics(op: str, eps: float | None, group: str, values: int) -> None:
    """A batch norm that takes its statistics from the batch has a batch to take them from.

    Raises:
        ValueError: fewer than two values a channel.
    """
    if eps is not None and not group and values < 2:
        raise ValueError(
            f"{op}: a batch norm in training mode needs more than one value a channel, got "
            f"{values}: give a larger batch or image, or call eval()"
        )


def refuse_second_order(op: torch.library.CustomOpDef, name: str) -> None:
    """Make the derivative of a backward op an error that says what to do."""

    def backward(ctx, *_):
        raise NotImplementedError(
            f"vovnet_fast.ops.{name} has no second derivative: for create_graph=True use the "
            'reference backend, with vovnet_fast.use_backend("reference")'
        )

    op.register_autograd(backward)


def nhwc(x: Tensor) -> Tensor:
    """View as ``[N, H, W, C]`` with channel stride 1; a copy where the layout forbids it."""
    view = x.permute(0, 2, 3, 1)
    return view if x.shape[1] == 1 or view.stride(3) == 1 else view.contiguous()


def nchw(x: Tensor) -> Tensor:
    """View ``[N, H, W, C]`` as ``[N, C, H, W]``, which is then channels_last."""
    return x.permute(0, 3, 1, 2)
