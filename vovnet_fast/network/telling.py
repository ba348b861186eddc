"""What a module is told beside its input, past hooks and wrappers, which know `x` alone."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import compat


class Told(NamedTuple):
    """To a module that makes the input of others, where its modules run as one op.

    Attributes:
        width: :meth:`OSABlock.room` of the block that takes its output, 0 if none does.
        apart: its output before the last is a feature of the network: autograd must not see it
            depend on the last layer, whose parameters may then have no gradient at all.
    """

    width: int = 0
    apart: bool = False


_NOTHING = Told()


class _Telling(threading.local):
    def __init__(self) -> None:
        self.now: tuple[nn.Module, Told] | None = None


_telling = _Telling()


def call(module: nn.Module, x: Tensor, what: Told) -> Any:
    """``module(x)``, in which :func:`told` says ``what``, but for graphs of torch.compile."""
    if what == _NOTHING or compat.is_compiling():
        return module(x)
    before, _telling.now = _telling.now, (module, what)
    try:
        return module(x)
    finally:
        _telling.now = before


def told(module: nn.Module) -> Told:
    """What ``module`` was told by who calls it now."""
    if compat.is_compiling():
        return _NOTHING
    now = _telling.now
    return now[1] if now is not None and now[0] is module else _NOTHING
