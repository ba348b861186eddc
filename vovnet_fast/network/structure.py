"""Answers about modules that are kept until one of the modules changes.

What is looked at is all that decisions depend on: which children there are and of which class,
hooks, modes, and whether norms have running statistics. Looking takes a tenth of the time of
finding the answer again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

Answer = TypeVar("Answer")

_Look = tuple[type, bool, int, bool, bool]


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to happen when ``module`` is called, which must then be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _look(module: nn.Module) -> _Look:
    return (
        module.__class__,
        module.training,
        len(module._modules),
        has_hooks(module),
        module._buffers.get("running_mean") is None,
    )


class _Known(Generic[Answer]):
    """An answer, and what was seen when it was given.

    It must not hold the module that it is about, which is the key that it is kept by.
    """

    __slots__ = ("_below", "_children", "_looks", "_parents", "answer")

    def __init__(self, root: nn.Module, answer: Answer) -> None:
        self.answer = answer
        self._children = list(root._modules.values())
        self._below = [module for module in root.modules() if module is not root]
        self._looks = [_look(module) for module in self._below]
        self._parents = [(m, list(m._modules.values())) for m in self._below if m._modules]

    def holds(self, root: nn.Module) -> bool:
        """Whether everything is as it was."""
        return (
            list(root._modules.values()) == self._children
            and all(list(m._modules.values()) == children for m, children in self._parents)
            and [_look(module) for module in self._below] == self._looks
        )


_known: WeakKeyDictionary[nn.Module, _Known[Any]] = WeakKeyDictionary()


def kept(root: nn.Module, find: Callable[[], Answer]) -> Answer:
    """What ``find()`` says, which has to depend on the modules below ``root`` alone.

    A root has one answer: it is always asked with the same ``find``. torch.compile traces
    ``find`` itself, and guards what it reads.
    """
    if torch.compiler.is_compiling():
        return find()
    known: _Known[Answer] | None = _known.get(root)
    if known is None or not known.holds(root):
        known = _known[root] = _Known(root, find())
    return known.answer
