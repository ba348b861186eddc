"""The extension's halves, for the CPU and for CUDA, with all functions of a backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .backward import Backward
from .forward import Forward
from .loading import load


def _threads(call: Callable[..., None], device: torch.device, given: dict[str, Any]) -> None:
    """Call a function of the CPU half on as many threads as torch uses."""
    assert device.type == "cpu", f"the extension's CPU half takes tensors on the CPU, not {device}"
    call(torch.get_num_threads(), **given)


def _stream(call: Callable[..., None], device: torch.device, given: dict[str, Any]) -> None:
    """Call a function of the CUDA half on torch's current stream."""
    assert device.type == "cuda", f"the extension's CUDA half takes tensors on a GPU, not {device}"
    with torch.cuda.device(device):
        call(torch.cuda.current_stream(device).cuda_stream, **given)


class Ops(Forward, Backward):
    """The functions of :mod:`vovnet_fast.backends` on a half of the extension."""


CPU = Ops(functools.partial(load, "cpu"), _threads)
CUDA = Ops(functools.partial(load, "cuda"), _stream)
