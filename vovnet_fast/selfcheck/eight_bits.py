"""The ops in eight bits of a backend, held against :mod:`vovnet_fast.arithmetic`.

In int8 every number must be the same. In fp8, whose sums are in fp32 here and exact there,
activations may be a step of e4m3 apart, and anything that is small beside the largest value by
:data:`SLACK`: tensor cores of Ada and Hopper keep some 14 bits of what they sum at once.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import tuning
from ..arithmetic import LEVELS, fp8, int8
from ..compat import zip
from .calls import Layer, backend_module, words
from .eight_bit_calls import (
    ByteSlot,
    Numbers,
    apply_gates,
    conv,
    depthwise,
    gates,
    max_pool,
    pooled,
    quantize_image,
)
from .runner import Row, run_apart

if TYPE_CHECKING:
    from ..kernels._common import Launch

__all__ = [
    "CASES",
    "FORMS",
    "SLACK",
    "ByteSlot",
    "Numbers",
    "distance",
    "launches",
    "pooled",
    "rank",
    "run",
]

SLACK = 2.0**-10
"""Of the largest value: by as much any number of fp8 may be wrong."""


class EightBitCase(NamedTuple):
    """One call of a function.

    Attributes:
        function: its name.
        words: shapes and options.
        call: makes arguments, calls it, and returns everything that it computes.
        levels: of int8, which of them.
    """

    function: str
    words: str
    call: Callable[..., Iterator[Tensor]]
    levels: tuple[int, ...] = (LEVELS[0],)


def _case(
    call: Callable[..., Iterator[Tensor]],
    *,
    levels: tuple[int, ...] = LEVELS[:1],
    **options: object,
) -> EightBitCase:
    text = ", ".join(
        words(value) if isinstance(value, tuple) and name == "shape" else f"{name} {value}"
        for name, value in options.items()
        if value is not False
    )
    return EightBitCase(call.__name__, text, functools.partial(call, **options), levels)


_MAP, _WIDTH = (2, 5, 7, 64), (1, 6, 5, 40)
"""Slots that consist of vectors of 16 bytes, and others."""

CASES: tuple[EightBitCase, ...] = (
    *(_case(quantize_image, wide=wide) for wide in (False, True)),
    *(
        _case(conv, layer=Layer(3, 3, 64, (2, 11, 9), 2), written="slot", wide=wide)
        for wide in (False, True)
    ),
    _case(conv, layer=Layer(3, 64, 64, (2, 9, 7)), written="slot", levels=LEVELS),
    _case(conv, layer=Layer(3, 64, 128, (1, 11, 8), 2), written="both", levels=LEVELS),
    _case(conv, layer=Layer(3, 80, 96, (1, 5, 11)), written="feature"),
    _case(conv, layer=Layer(1, 384, 256, (2, 5, 7)), written="both", levels=LEVELS),
    _case(conv, layer=Layer(1, 200, 56, (1, 6, 5)), written="both"),
    *(_case(depthwise, shape=_MAP, stride=stride, levels=LEVELS) for stride in (1, 2)),
    _case(depthwise, shape=_WIDTH, stride=1),
    *(_case(max_pool, shape=shape, mode="ceil") for shape in (_MAP, _WIDTH)),
    _case(max_pool, shape=_MAP, mode="padded"),
    *(
        _case(gates, channels=c, kind=kind)
        for c, kind in ((128, "hard_sigmoid"), (112, "sigmoid"), (56, "hard_sigmoid"))
    ),
    _case(apply_gates, shape=_MAP, gated=True, added=True, written="slot", levels=LEVELS),
    _case(apply_gates, shape=_MAP, gated=True, added=False, written="feature"),
    _case(apply_gates, shape=_WIDTH, gated=False, added=True, written="both"),
)
"""Everything that is checked."""

FORMS = {int8.ACTIVATION: "int8", **({fp8.ACTIVATION: "fp8"} if fp8.ACTIVATION else {})}
"""Of activations, by dtype."""


def run(
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
    functions: Collection[str] | None = None,
    *,
    slack: float = SLACK,
) -> list[Row]:
    """Check a backend.

    Args:
        backend: its name, such as ``triton.int8``.
        device: where it is to be checked.
        dtype: of the activations, one of :data:`FORMS`.
        functions: only these; all by default.
        slack: of the largest value, by which numbers of fp8 may be wrong.

    Returns:
        a row for every case. What cannot run has a row as well.
    """
    form, place = FORMS[dtype], torch.device(device)
    rows: list[Row] = []

    def work() -> None:
        with torch.no_grad(), tuning.static_choices():
            for case, levels in _selected(functions, form):
                rows.append(_run_case(case, backend, form, levels, place, dtype, slack))

    run_apart(work)
    return rows


def launches(
    functions: Collection[str], dtype: torch.dtype, device: torch.device | str
) -> list[Launch]:
    """The launches of Triton kernels that the check of these functions makes.

    See :func:`.trust.launches`.

    Raises:
        ValueError: there is no function of that name.
        ImportError: Triton is not installed.
    """
    from ..kernels._common import recording

    form, place = FORMS[dtype], torch.device(device)
    found: list[Launch] = []

    def work() -> None:
        ops = backend_module(f"triton.{form}")
        with torch.no_grad(), tuning.static_choices(), recording() as recorded:
            for case, levels in _selected(functions, form):
                for _ in case.call(ops, Numbers(form, place, levels)):
                    pass
        found.extend(recorded)

    run_apart(functools.partial(contextvars.copy_context().run, work))
    return found


def _selected(functions: Collection[str] | None, form: str) -> Iterator[tuple[EightBitCase, int]]:
    """Cases of some functions, each with the largest activations that it is checked for."""
    unknown = set(functions or ()) - {case.function for case in CASES}
    if unknown:
        raise ValueError(f"no function is called {', '.join(sorted(unknown))}")
    for case in CASES:
        if functions is None or case.function in functions:
            for levels in case.levels if form == "int8" else (fp8.LARGEST,):
                yield case, levels


def _run_case(
    case: EightBitCase, backend: str, form: str, levels: int, device: torch.device,
    dtype: torch.dtype, slack: float,
) -> Row:  # fmt: skip
    words = case.words if levels == LEVELS[0] else f"{case.words}, {levels} levels"

    def failed(problem: str) -> Row:
        return Row(case.function, dtype, words, math.nan, math.nan, False, problem)

    numbers, theirs = (Numbers(form, device, levels) for _ in range(2))
    try:
        wanted = list(case.call(theirs.ops, theirs))
        found = list(case.call(backend_module(backend), numbers))
        for ours, exact in itertools.zip_longest(found, wanted):
            if ours is None or exact is None or ours.shape != exact.shape:
                return failed(f"its outputs are {[list(out.shape) for out in found]}")
        errors = [distance(a, b, form, slack) for a, b in zip(found, wanted, strict=True)]
        if not numbers.untouched():
            return failed("it wrote outside its slot")
    except Exception as exception:  # Whatever it is, the backend is not to be used.
        return failed(f"{type(exception).__name__}: {exception}")
    error, allowed = max(errors), 0.0 if form == "int8" else 1.0
    return Row(case.function, dtype, words, error, allowed, error <= allowed)


def distance(found: Tensor, wanted: Tensor, form: str, slack: float = SLACK) -> float:
    """How far numbers are apart: in int8 the largest difference, in fp8 that of e4m3 in steps, and
    of others as a multiple of ``slack``. At most 1 is right there, and 0 in int8."""
    if found.dtype != wanted.dtype:
        return math.inf
    apart = (found.double() - wanted.double()).abs()
    if form == "int8":
        return apart.max().item()
    allowed = slack * wanted.double().abs().max()
    if found.dtype == torch.float32:
        return (apart.max() / allowed.clamp_min(1e-30)).item()
    steps = (rank(found) - rank(wanted)).abs()
    return torch.where(apart <= allowed, 0, steps).max().item()


def rank(x: Tensor) -> Tensor:
    """Numbers of e4m3 counted from zero."""
    bits = x.contiguous().view(torch.uint8).to(torch.int32)
    return torch.where(bits >= 128, 128 - bits, bits)
