"""What runs a call: plain modules or an op, and on which backend. It is decided here alone.

A decision depends on the input (device, dtype, size, whether autograd takes part), on the
modules as they are, on the backend that was asked for, and on which functions have proved right
(:mod:`vovnet_fast.selfcheck`). What the modules are is kept until one of them changes
(:mod:`.structure`), and whether a backend can run and is right by :mod:`vovnet_fast.backends`
until the process ends: a call looks these up. Which engine computes a convolution is the backend's
own choice, kept by :mod:`vovnet_fast.tuning`. ``vovnet-fast explain`` prints decisions.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import backends, compat
from ..ops.conv import Kinds
from . import keeping
from .watchers import watching

CPU_PIXELS, CPU_PIXELS_TRAINING = 1600, 6400
"""Pixels of a map, N * H * W, from which ``auto`` runs a module as one op on a CPU: in fp32 without
gradients, and where gradients are needed, or norms take their statistics from the batch.

An op saves passes over activations, and pays with passes over weights and with Python. On two cores
of a Xeon the first blocks of the stages of V-39 and V-19-slim-dw broke even with plain modules
there, whatever their channels were; at a quarter of the pixels they took 1.1 to 1.4 times as long.
In half precision without gradients they were always faster. Networks that are frozen, or that keep
their weights packed (:mod:`.keeping`), make no such passes: this is not for them.
"""


class Decision(NamedTuple):
    """What runs a call.

    Attributes:
        op: an op of :mod:`vovnet_fast.ops` runs it; otherwise its modules do, on plain PyTorch.
        why: why nothing faster does, empty if there is nothing.
    """

    op: bool
    why: str = ""

    def __str__(self) -> str:
        return ("an op" if self.op else "modules") + (f": {self.why}" if self.why else "")


OP = Decision(True)
NO_BACKEND = Decision(False, "no backend for ops runs here")
SMALL = Decision(False, "on maps as small as these, plain modules are faster on a CPU")
NO_IMAGES = Decision(False, "statistics of no image are what PyTorch makes of them")
NOT_RIGHT = Decision(False, "no backend has proved right in all functions that it needs")
SMALL_AT_FIRST = Decision(
    True, "on maps as small as these, plain modules are faster until it has packed its weights"
)
GRADIENT = Decision(False, "autograd takes part: its blocks keep what their gradients need")


class Part(Protocol):
    """The stem or a block, as :class:`.fusing.Fusable` has it."""

    def structure(self) -> tuple[Kinds | None, str | None]:
        """Which kinds of layers it has, or why no op can take the place of its modules."""

    def needs(self, kinds: Kinds, *, backward: bool) -> tuple[str, ...]:
        """The functions of a backend that its op uses."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """All of them."""


class Network(Protocol):
    """The whole, as :class:`vovnet_fast.VoVNet` has it."""

    def why_not_one_op(self) -> str | None:
        """The reason why one op cannot take the place of its modules, or None."""

    def functions(self) -> tuple[str, ...]:
        """Those of a backend that its op uses."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """All of them."""


def of_part(part: Part, x: Tensor) -> Decision:
    """What runs the stem or a block on ``[N, C, H, W]``.

    Raises:
        BackendError: a fused backend was asked for by name and cannot; the message says why.
    """
    if not fused(x, ()):
        return NO_BACKEND
    watched = _watched(x)
    if watched is not None:
        return watched
    kinds, reason = part.structure()
    if kinds is None:
        assert reason is not None
        if backends.chosen() != "auto":
            raise backends.BackendError(reason)
        say_once(reason)
        return Decision(False, reason)
    gradient = needs_gradient(part, x)
    if kinds.batch and x.numel() == 0 and backends.chosen() == "auto":
        return NO_IMAGES
    # What has not four dimensions is refused by the op.
    if x.dim() == 4:
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        if faster_plain(x, pixels, batch=kinds.batch, gradient=gradient):
            return SMALL
    # Only what is really going to run is worth a check.
    return OP if fused(x, part.needs(kinds, backward=gradient)) else NOT_RIGHT


def of_function(x: Tensor, needs: tuple[str, ...]) -> Decision:
    """What runs what is no module, the pool: an op that uses some functions of a backend.

    Raises:
        BackendError: a fused backend was asked for by name and cannot; the message says why.
    """
    if not fused(x, needs):
        return NO_BACKEND
    return _watched(x) or OP


def of_frozen(x: Tensor, dtype: torch.dtype, needs: tuple[str, ...]) -> Decision:
    """Whether a frozen network runs on a backend; otherwise it is PyTorch's own functions.

    Args:
        x: the images.
        dtype: of activations.
        needs: functions of the backend that it uses.

    Raises:
        BackendError: a fused backend was asked for by name and cannot; the message says why.
    """
    watched = _watched(x, modules=False)
    return watched or (OP if backends.fused(x.device, dtype, needs) else NO_BACKEND)


def of_network(network: Network, x: Tensor) -> Decision:
    """Whether a network runs as one op on images, which keeps nothing and calls no module.

    Where it does not, each of its parts is decided by itself (:func:`of_part`).

    Raises:
        BackendError, ValueError: as :func:`vovnet_fast.backends.fused`.
    """
    if not fused(x, ()):
        return NO_BACKEND
    watched = _watched(x)
    if watched is not None:
        return watched
    if needs_gradient(network, x):
        return GRADIENT
    middle = x.shape[0] * x.shape[2] * x.shape[3] // 8**2  # Pixels of maps of stride 8.
    small = faster_plain(x, middle, batch=False, gradient=False)
    if small and not keeping.possible(x, compute_dtype(x)):
        return SMALL
    reason = network.why_not_one_op()
    if reason is not None:
        return Decision(False, reason)
    if not fused(x, network.functions()):
        return NOT_RIGHT
    return SMALL_AT_FIRST if small else OP


def _watched(x: Tensor, *, modules: bool = True) -> Decision | None:
    """That modules run because somebody is watching (:mod:`.watchers`), or None.

    Raises:
        BackendError: a fused backend was asked for by name, which they would not understand.
    """
    found = watching(x, modules=modules)
    if found is None:
        return None
    if backends.chosen() == "auto":
        return Decision(False, found.why)
    if found.knows_ops:
        return None
    raise backends.BackendError(
        f"{found.why}: with backend auto the modules run, on plain PyTorch; {backends.chosen()} "
        "was asked for"
    )


def say_once(reason: str) -> None:
    """Log that modules have changed, once for each kind of change: it costs time and memory."""
    where, _, what = reason.partition(": ")
    if not compat.is_compiling() and what not in _said:
        _said.add(what)
        _log.warning(
            "%s: %s. What it is part of runs as modules, on plain PyTorch, and so do others of "
            "which the same is true",
            where,
            what,
        )


_said: set[str] = set()
_log = logging.getLogger("vovnet_fast.network")


# --------------------------------------------------------------------------------------
# What it depends on
# --------------------------------------------------------------------------------------


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of activations: that of ``x``, or autocast's."""
    kind = x.device.type
    if kind == "meta":  # PyTorch refuses to say whether autocast is on there.
        return x.dtype
    cast = compat.autocast_dtype(kind)
    return x.dtype if cast is None or x.dtype == torch.float64 else cast


def fused(x: Tensor, needs: tuple[str, ...]) -> bool:
    """Whether ``x`` goes through ops that use some functions; see :func:`backends.fused`."""
    return backends.fused(x.device, compute_dtype(x), needs)


def needs_gradient(module: Part | Network | nn.Module, x: Tensor) -> bool:
    """Whether autograd will want something of ``module(x)``."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(parameter.requires_grad for parameter in module.parameters())


@contextlib.contextmanager
def on_maps_of_any_size() -> Iterator[None]:
    """Inside, in this thread, training runs as ops on small maps, too."""
    token = _any_size.set(True)
    try:
        yield
    finally:
        _any_size.reset(token)


_any_size: ContextVar[bool] = ContextVar("any_size", default=False)


def faster_plain(x: Tensor, pixels: int, *, batch: bool, gradient: bool) -> bool:
    """Whether ``auto`` leaves modules on a CPU to PyTorch, although an op could run them.

    Args:
        x: their input.
        pixels: of their maps, N * H * W (:data:`CPU_PIXELS`).
        batch: norms take statistics from the batch.
        gradient: what the op keeps for a backward pass will be needed.
    """
    dtype = compute_dtype(x)
    if backends.chosen() != "auto" or backends.select(x.device, dtype, ()) != "cpu":
        return False
    if gradient or batch:
        # torch.compile, which cannot trace a ContextVar, is told nothing by it.
        return pixels < CPU_PIXELS_TRAINING and (compat.is_compiling() or not _any_size.get())
    return dtype == torch.float32 and pixels < CPU_PIXELS
