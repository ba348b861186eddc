"""The engines of the extension's CPU half, on all instruction sets that there are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from vovnet_fast.backends import _extension

DTYPES = {
    "fma": (torch.float32, torch.float16, torch.bfloat16),
    "dpbf16": (torch.bfloat16,),
    "amx": (torch.bfloat16,),
}
"""What each takes."""


@contextlib.contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    """Have an instruction set in use."""
    extension = _extension.load("cpu")
    best = extension.isa()
    extension.use_isa(isa)
    try:
        yield
    finally:
        extension.use_isa(best)


def engine_combinations(function: str) -> list[tuple[str, str]]:
    """Engines, as a function of the extension names them, with the instruction sets they run on."""
    if _extension.why_not("cpu") is not None:
        return [("fma", "baseline")]  # For tests that then skip.
    extension = _extension.load("cpu")
    found = []
    for isa in extension.isas():
        with instruction_set(isa):
            found += [(engine, isa) for engine in getattr(extension, function)()]
    return found
