"""The one boundary: arguments of users are checked here, in plain sentences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends, compat
from ..compat import zip
from ._library import Op

Result = TypeVar("Result")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def activations(op: str, name: str, x: Tensor, channels: int | None = None) -> None:
    """A ``[N, C, H, W]`` tensor of a supported dtype.

    Raises:
        ValueError: wrong rank or channels.
        TypeError: no tensor, a sparse one, or no supported dtype.
    """
    tensor(f"{op}: {name}", x)
    if x.ndim != 4:
        raise ValueError(f"{op}: {name} must be [N, C, H, W], got shape {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}"
        )
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{op}: {name} must have {channels} channels, got shape {list(x.shape)}")


def tensor(what: str, x: Any) -> None:
    """A tensor whose elements all lie in memory.

    Raises:
        TypeError: something else.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{what} must be a tensor [N, C, H, W], got {type(x).__name__}: torch.as_tensor or "
            "torch.stack makes one of numbers, arrays or images"
        )
    if x.layout != torch.strided:
        raise TypeError(
            f"{what} must be a dense tensor, got a sparse one ({x.layout}): call to_dense() first"
        )


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
        if compat.autocast_dtype(kind) is None:
            return run(x, *args)
        with torch.autocast(kind, enabled=False):
            return run(x, *args)

    return wrapped


def traced(x: Tensor) -> bool:
    """Whether somebody follows what happens to ``x``, and only ops must happen to it.

    That is a graph that is being made, a subclass of ``Tensor``, or a dispatch mode.
    """
    if compat.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return True
    if backends.sees_shapes_only(backends.chosen()):
        return False
    return torch.jit.is_tracing() or notice_modes()


on_modes: list[Callable[[], None]] = []
"""Called when an op is run under a dispatch mode: a counter of FLOP may be one."""


def notice_modes() -> bool:
    """Whether there is a dispatch mode; then :data:`on_modes` are called."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    for notice in on_modes:
        notice()
    return True


def transforms(op: str, *tensors: Tensor | None) -> None:
    """Refuse what a kernel would drop without a word.

    Raises:
        NotImplementedError: a transform of ``torch.func`` is active, or one of ``tensors`` has a
            tangent of forward-mode AD.
    """
    if compat.is_compiling():
        return
    dual = forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )
    if dual or torch._C._are_functorch_transforms_active():
        what = "forward-mode AD" if dual else "transforms of torch.func"
        raise NotImplementedError(
            f"vovnet_fast.ops.{op} has no rule for {what}: call the modules of a VoVNet, or the "
            "functions of vovnet_fast.reference, which have"
        )


def call(op: Op, choice: str, *args: Any) -> Any:
    """Run an op on the backend of ``choice``, in a backward pass.

    Where only shapes matter torch.library would run the op's fake, which launches nothing. Where
    nobody is there to see the op, its way to what computes takes as long as a small convolution.
    """
    if backends.sees_shapes_only(choice) or _unseen(args):
        return op.run(*args)
    return op(*args)


def _unseen(args: Sequence[Any]) -> bool:
    """Whether nothing but what an op computes comes of calling it with these arguments."""
    return (
        not torch.is_grad_enabled()
        and not compat.is_compiling()
        and not torch.autograd._profiler_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(
            type(t) in _PLAIN
            for arg in args
            for t in (arg if isinstance(arg, (list, tuple)) else (arg,))
            if isinstance(t, Tensor)
        )
    )


_PLAIN = (Tensor, torch.nn.Parameter)


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


def for_each_gradient(
    compute: Callable[..., Sequence[Tensor | None]], *douts: Tensor | None
) -> Sequence[Tensor | None]:
    """``compute(*douts)``, where douts may be many in one, and then one call for each.

    ``torch.autograd.grad(..., is_grads_batched=True)`` runs a backward pass once, on tensors
    that stand for a batch of gradients each.
    """
    batched = compat.is_batched
    if not any(dout is not None and batched(dout) for dout in douts):
        return compute(*douts)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    whole = [
        # Of a tensor without that dimension it makes a view that repeats, of some size.
        dout if dout is None or not batched(dout) else torch._remove_batch_dim(dout, level, 1, 0)
        for dout in douts
    ]
    sizes = {
        t.shape[0]
        for t, dout in zip(whole, douts, strict=True)
        if t is not None and dout is not None and batched(dout)
    }
    each = [
        compute(
            *(
                t[i] if t is not None and dout is not None and batched(dout) else t
                for t, dout in zip(whole, douts, strict=True)
            )
        )
        for i in range(max(sizes))
    ]
    return [
        None if same[0] is None else torch._add_batch_dim(torch.stack(same), 0, level)
        for same in zip(*each, strict=True)
    ]


def backward_op(op: Op, name: str) -> None:
    """Make the derivative of a backward op an error that says what to do, and vmap a loop."""

    def backward(ctx, *_):
        raise NotImplementedError(
            f"vovnet_fast.ops.{name} has no second derivative: for create_graph=True use the "
            'reference backend, with vovnet_fast.use_backend("reference")'
        )

    op.register_autograd(backward)

    def loop(info, in_dims, *args):
        each = [op(*_select(args, in_dims, i)) for i in range(info.batch_size)]
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        found = [torch.stack(same) for same in zip(*each, strict=True)]
        kind = type(each[0])  # A list or a tuple, as the op's schema has it.
        return kind(found), kind([0] * len(found))

    op.register_vmap(loop)


def _select(args: Any, dims: Any, i: int) -> Any:
    """Arguments of one of the calls that a vmap stands for."""
    if isinstance(args, (tuple, list)):
        if not isinstance(dims, (tuple, list)):
            dims = [dims] * len(args)
        return type(args)(_select(a, d, i) for a, d in zip(args, dims, strict=True))
    return args if dims is None else args.select(dims, i)


def nhwc(x: Tensor) -> Tensor:
    """View as ``[N, H, W, C]`` with channel stride 1; a copy where the layout forbids it."""
    view = x.permute(0, 2, 3, 1)
    return view if x.shape[1] == 1 or view.stride(3) == 1 else view.contiguous()


def nchw(x: Tensor) -> Tensor:
    """View ``[N, H, W, C]`` as ``[N, C, H, W]``, which is then channels_last."""
    return x.permute(0, 3, 1, 2)
