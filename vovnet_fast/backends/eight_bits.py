"""Whose ops in eight bits run a network: the extension's on a CPU, Triton's on a GPU, or nobody's.

In int8 all make the same integers. Those of Triton are trusted on a GPU once they have been held
against :mod:`vovnet_fast.arithmetic` there (:mod:`vovnet_fast.selfcheck.eight_bits`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Iterable
from types import ModuleType

import torch

from . import BackendError, _trusted

_ROOMS = {
    ("cpu", "int8"): ".cpu.int8",
    ("triton", "int8"): ".triton.int8",
    ("triton", "fp8"): ".triton.fp8",
}

_AUTOMATIC = {"cpu": "cpu", "cuda": "triton"}
"""Who is taken for devices of a type where nobody is asked for."""


def find(
    choice: str, device: torch.device, form: str, needs: Collection[str]
) -> tuple[ModuleType | None, str | None]:
    """A module of ops, or the reason why there is none.

    Args:
        choice: what was asked for: ``auto``, or the name of a backend.
        device: of the tensors.
        form: ``int8`` or ``fp8``.
        needs: the ops that will be used.

    Raises:
        BackendError: ``auto`` has yet to check ops while a CUDA graph is being captured.
    """
    name = _AUTOMATIC.get(device.type, "triton") if choice == "auto" else choice
    room = _ROOMS.get((name, form))
    if room is None:
        known = any(owner == name for owner, _ in _ROOMS)
        return None, f"it has no ops in {form if known else 'eight bits'} yet"
    ops = importlib.import_module(room, __package__)
    reason: str | None = ops.why_not(device)
    checked = choice == "auto" and name != "cpu" and reason is None
    if checked and not _trusted(f"triton.{form}", device, ops.ACTIVATION, tuple(needs)):
        reason = "it computes wrong numbers there"
    return (ops, None) if reason is None else (None, reason)


def require(choice: str, form: str, reason: str | None) -> None:
    """Raise :class:`BackendError` if a backend that was asked for by name cannot run."""
    if reason is not None and choice != "auto":
        raise BackendError(
            f"the {choice} backend cannot run a VoVNet in {form}: {reason}; use reference, or auto"
        )


def forget(tensors: Iterable[torch.Tensor]) -> None:
    """Drop what Triton's ops made of weights: after writes that nobody counts."""
    made = sys.modules.get(f"{__package__}.triton.eight_bits")
    if made is not None:
        made.forget(tensors)
