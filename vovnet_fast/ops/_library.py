"""Ops of ``torch.library``, and what autograd does with them.

``torch.library.custom_op`` does the same from torch 2.7 on (before, it does not know
``list[Tensor]``), in a third of the package's import time, and its ops import torch._dynamo
when they first run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..backends import _steps

NAMESPACE = "vovnet_fast"

_library = torch.library.Library(NAMESPACE, "DEF")

_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "list[Tensor]": "Tensor[]",
    "Sequence[Tensor | None]": "Tensor?[]",
    "list[int]": "SymInt[]",
    "list[float]": "float[]",
    "list[bool]": "bool[]",
    "int": "SymInt",
    "bool": "bool",
    "str": "str",
    "tuple[Tensor, Tensor, Tensor]": "(Tensor, Tensor, Tensor)",
}
"""Annotations as they are written, and the types of torch's schemas."""


class Op:
    """An op ``vovnet_fast::NAME``, without a derivative until it is given one.

    Args:
        name: of the op.
        run: computes it, on any device. Its annotations make the op's schema. Results share
            no memory with arguments or with each other.

    Attributes:
        name, run: as above.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.name, self.run = name, run
        types = [(k, _TYPES[v]) for k, v in run.__annotations__.items() if k != "return"]
        self._kinds = [kind for _, kind in types]
        self._returns = _TYPES[run.__annotations__["return"]]
        arguments = ", ".join(f"{kind} {argument}" for argument, kind in types)
        compat.define(_library, f"{name}({arguments}) -> {self._returns}")
        _library.impl(name, compat.hidden(run), "CompositeExplicitAutograd")
        self.register_autograd(_no_derivative)
        compat.register_autograd_kernel(_library, name, self._autograd)

    def __call__(self, *args: Any) -> Any:
        return getattr(getattr(torch.ops, NAMESPACE), self.name)(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Say what the op returns, without computing it; a decorator."""
        self.fake = fake
        compat.register_fake(_library, f"{NAMESPACE}::{self.name}", fake)
        return fake

    def register_vmap(self, rule: Callable[..., Any]) -> None:
        """As ``torch.library.register_vmap``."""
        compat.register_vmap(_library, f"{NAMESPACE}::{self.name}", rule)

    def register_autograd(
        self,
        backward: Callable[..., Any],
        setup_context: Callable[..., Any] = lambda ctx, inputs, output: None,
    ) -> None:
        """As ``torch.library.register_autograd``.

        ``backward(ctx, grads)`` gets the gradients of all results in a list, and returns one
        entry an argument: a list, or None, for a list of tensors.
        """
        self._backward, self._setup_context = backward, setup_context

    def _autograd(self, below: Callable[..., Any], *args: Any) -> Any:
        """What runs where autograd comes."""
        if torch.is_grad_enabled():
            tensors, counts = self._flatten(args)
            if any(t is not None and t.requires_grad for t in tensors):
                found = _Differentiable.apply(self, below, args, counts, *tensors)
                return self._restored(found)
        with torch._C._AutoDispatchBelowAutograd():
            return below(*args)

    def _restored(self, found: tuple[Tensor, ...]) -> Any:
        """Results as the schema has them."""
        if self._returns == "Tensor":
            return found[0]
        return list(found) if self._returns == "Tensor[]" else found

    def _flatten(self, args: Sequence[Any]) -> tuple[list[Tensor | None], list[int]]:
        """All tensors in order, and how many there are in each argument, -1 for one alone."""
        tensors: list[Tensor | None] = []
        counts = []
        for kind, arg in compat.zip(self._kinds, args, strict=True):
            if kind in ("Tensor[]", "Tensor?[]"):
                tensors += arg
                counts.append(len(arg))
            elif kind in ("Tensor", "Tensor?"):
                tensors.append(arg)
                counts.append(-1)
            else:
                counts.append(0)
        return tensors, counts


class _Differentiable(torch.autograd.Function):
    """An op whose arguments and results may be lists of tensors."""

    @staticmethod
    def forward(ctx, op, below, args, counts, *tensors):
        rest = iter(tensors)
        args = [_take(rest, count, arg) for arg, count in compat.zip(args, counts, strict=True)]
        with torch._C._AutoDispatchBelowAutograd(), _steps.forward():
            found = below(*args)
        ctx.op, ctx.op_counts = op, counts
        op._setup_context(ctx, args, found)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    @staticmethod
    def backward(ctx, *grads):
        found = ctx.op._backward(ctx, list(grads))
        flat: list[Tensor | None] = []
        for grad, count in compat.zip(found, ctx.op_counts, strict=True):
            if count == -1:
                flat.append(grad)
            else:
                flat += [None] * count if grad is None else grad
        return None, None, None, None, *flat


def _take(rest: Iterator[Any], count: int, arg: Any) -> Any:
    """An argument with its tensors, of which there are ``count``, taken from ``rest``."""
    if count == -1:
        return next(rest)
    return [next(rest) for _ in range(count)] if count else arg


def _no_derivative(ctx: Any, grads: Any) -> Any:
    raise NotImplementedError(f"{NAMESPACE}::{ctx.op.name} has no derivative")


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Make a function an :class:`Op`; a decorator."""
    return functools.partial(Op, name)
