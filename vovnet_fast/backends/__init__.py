"""Who does the work: one module a backend, the same functions with the same signatures.

=================  ==========================================================
``reference``      plain PyTorch, any device
``triton``         the Triton kernels of :mod:`vovnet_fast.kernels`, NVIDIA GPUs
=================  ==========================================================

A backend asked for by name that cannot run is an error, never a silent fallback.

Every backend has these functions. Activations are ``[N, H, W, C]`` views with
channel stride 1, usually slots of a concat buffer; results are written into the
``out`` that is given, and nothing outside it:

``conv(x, weight, scale, shift, out, *, stride, relu, pool)``
    out = relu(conv(x, weight) * scale + shift), padded by K // 2. ``weight`` is
    ``[C_out, K, K, C_in]`` in the dtype of ``x``; ``scale`` and ``shift`` are
    ``[C_out]`` in fp32 (fp64 for fp64). With ``pool`` it returns partial sums of the
    output, ``[N, T, C_out]``, whose sum over T is the sum over the pixels.
``depthwise(x, weight, out, *, stride)``
    depthwise 3x3, ``weight`` is ``[3, 3, C]``.
``gates(partials, num_pixels, fc_weight, fc_bias, kind)``
    ``[N, C]`` gates of effective Squeeze-Excitation from ``conv``'s partial sums.
``apply_gates(z, gates, identity, out)``
    out = z * gates + identity; either of the two may be None.
``max_pool(x, out, mode)``
    3x3 max pool with stride 2.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator
from types import ModuleType

import torch

NAMES = ("reference", "triton")
ENVIRONMENT = "VOVNET_FAST_BACKEND"


class _Choice(threading.local):
    """What use_backend says in this thread. (torch.compile cannot trace a ContextVar.)"""

    name: str | None = None


_choice = _Choice()


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __name__)


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None if it can run here, or the reason why not."""
    return {name: why_not(name, None) for name in NAMES}


def why_not(name: str, device: torch.device | None) -> str | None:
    """The reason why a backend cannot run on ``device`` (None: on any device here).

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}: choose one of auto, {', '.join(NAMES)}")
    reason: str | None = _module(name).why_not(device)
    return reason


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of everything that runs inside the ``with`` statement.

    It holds in the thread that enters it, and takes precedence over the environment
    variable ``VOVNET_FAST_BACKEND``.

    Args:
        name: ``auto`` or one of :data:`NAMES`.

    Raises:
        ValueError: there is no backend of that name.
        BackendError: it cannot run on this machine.
    """
    if name != "auto":
        reason = why_not(name, None)
        if reason is not None:
            raise BackendError(f"the {name} backend cannot run: {reason}")
    before, _choice.name = _choice.name, name
    try:
        yield
    finally:
        _choice.name = before


def chosen() -> str:
    """What was asked for: ``auto`` or a backend's name."""
    return _choice.name or os.environ.get(ENVIRONMENT) or "auto"


def fused(device: torch.device) -> bool:
    """Whether tensors of ``device`` go through the ops, and not through plain modules.

    Raises:
        BackendError, ValueError: as :func:`select`.
    """
    if chosen() in ("auto", "reference"):
        return False
    if not torch.compiler.is_compiling():  # Then the op itself asks, when it runs.
        select(device)
    return True


def select(device: torch.device) -> str:
    """Name of the backend that works on tensors of ``device``.

    ``auto`` takes the reference. The Triton kernels have so far run in Triton's
    interpreter and been compiled, but not run on a GPU: until a GPU has verified
    them (``benchmarks/results/README.md``) they are taken only when asked for.

    Raises:
        BackendError: the backend that was asked for cannot run on ``device``.
        ValueError: ``VOVNET_FAST_BACKEND`` names no backend.
    """
    name = chosen()
    if name == "auto":
        return "reference"
    reason = why_not(name, device)
    if reason is not None:
        raise BackendError(f"the {name} backend cannot run on {device}: {reason}")
    return name


def get(device: torch.device) -> ModuleType:
    """Module of the backend that works on tensors of ``device``; see :func:`select`."""
    return _module(select(device))
