"""What runs a call: plain modules or an op, and on which backend. It is decided here alone.

A decision depends on the input (device, dtype, size, whether autograd takes part), on the
modules as they are, on the backend that was asked for, and on which functions have proved right
(:mod:`vovnet_fast.selfcheck`). What the modules are is kept until one of them changes
(:mod:`.structure`), and whether a backend can run and is right by :mod:`vovnet_fast.backends`
until the process ends: a call looks these up. Which engine computes a convolution is the backend's
own choice, kept by :mod:`vovnet_fast.tuning`. ``vovnet-fast explain`` prints decisions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import backends
from ..ops.conv import Kinds

CPU_PIXELS, CPU_PIXELS_TRAINING = 1600, 6400
"""Pixels of a map, N * H * W, from which ``auto`` runs a module as one op on a CPU: in fp32 without
gradients, and where gradients are needed, or norms take their statistics from the batch.

An op saves passes over activations, and pays with passes over weights and with Python. On two cores
of a Xeon the first blocks of the stages of V-39 and V-19-slim-dw broke even with plain modules
there, whatever their channels were; at a quarter of the pixels they took 1.1 to 1.4 times as long.
In half precision without gradients they were always faster. Frozen networks have their weights
packed: this is not for them.
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
NOT_RIGHT = Decision(False, "no backend has proved right in all functions that it needs")
GRADIENT = Decision(False, "autograd takes part: its blocks keep what their gradients need")


class Part(Protocol):
    """The stem or a block, as :class:`.fusing.Fusable` has it."""

    def structure(self) -> tuple[Kinds, str | None]:
        """Which kinds of layers it has, and why no op can take the place of its modules."""

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
    gradient = needs_gradient(part, x)
    kinds, reason = part.structure()
    # What has not four dimensions is refused by the op.
    if x.dim() == 4:
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        if faster_plain(x, pixels, batch=kinds.batch, gradient=gradient):
            return SMALL
    if reason is not None:
        if backends.chosen() != "auto":
            raise backends.BackendError(reason)
        return Decision(False, reason)
    # Only what is really going to run is worth a check.
    return OP if fused(x, part.needs(kinds, backward=gradient)) else NOT_RIGHT


def of_network(network: Network, x: Tensor) -> Decision:
    """Whether a network runs as one op on images, which keeps nothing and calls no module.

    Where it does not, each of its parts is decided by itself (:func:`of_part`).

    Raises:
        BackendError, ValueError: as :func:`vovnet_fast.backends.fused`.
    """
    if not fused(x, ()):
        return NO_BACKEND
    if needs_gradient(network, x):
        return GRADIENT
    middle = x.shape[0] * x.shape[2] * x.shape[3] // 8**2  # Pixels of maps of stride 8.
    if faster_plain(x, middle, batch=False, gradient=False):
        return SMALL
    reason = network.why_not_one_op()
    if reason is not None:
        return Decision(False, reason)
    return OP if fused(x, network.functions()) else NOT_RIGHT


# --------------------------------------------------------------------------------------
# What it depends on
# --------------------------------------------------------------------------------------


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of activations: that of ``x``, or autocast's."""
    kind = x.device.type
    if kind == "meta":  # PyTorch refuses to say whether autocast is on there.
        return x.dtype
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def fused(x: Tensor, needs: tuple[str, ...]) -> bool:
    """Whether ``x`` goes through ops that use some functions; see :func:`backends.fused`."""
    return backends.fused(x.device, compute_dtype(x), needs)


def needs_gradient(module: Part | Network | nn.Module, x: Tensor) -> bool:
    """Whether autograd will want something of ``module(x)``."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(parameter.requires_grad for parameter in module.parameters())


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
        return pixels < CPU_PIXELS_TRAINING
    return dtype == torch.float32 and pixels < CPU_PIXELS
