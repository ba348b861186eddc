"""Runs cases on a backend, and holds what comes out against the reference."""

from __future__ import annotations

import contextvars
import functools
import itertools
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import tuning
from ..compat import zip
from .calls import backend_module, reference
from .cases import CASES, Case
from .tensors import Tensors, largest

if TYPE_CHECKING:
    from ..kernels._common import Launch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_FP64 = 1e-12  # A rounding of the sums that take the place of exact ones.

_Item = TypeVar("_Item")


class Row(NamedTuple):
    """What came out for one function, in one dtype and one case.

    Attributes:
        function: of the backend.
        dtype: of the activations.
        case: shapes and options in words.
        error: largest error of the output that came closest to its limit, or went
            furthest beyond it; NaN where there is none.
        allowed: that limit.
        passed: whether all outputs are right.
        problem: what went wrong besides the numbers, or nothing.
    """

    function: str
    dtype: torch.dtype
    case: str
    error: float
    allowed: float
    passed: bool
    problem: str = ""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        found = self.problem or f"error {self.error:.3g}, allowed {self.allowed:.3g}"
        return f"{self.function} ({self.case}, {dtype}): {found}"


def run(
    backend: str,
    device: torch.device | str,
    dtypes: Sequence[torch.dtype] = DTYPES,
    functions: Collection[str] | None = None,
    *,
    slim: bool = False,
    progress: bool = False,
) -> list[Row]:
    """Check a backend; a matter of minutes on a GPU for which nothing was compiled before.

    Args:
        backend: its name.
        device: where it is to be checked.
        dtypes: of the activations.
        functions: only these; all by default.
        slim: only the cases of the slim check (:mod:`.cases`).
        progress: show a bar on stderr.

    Returns:
        a row for every case and dtype. What cannot run has a row as well.

    Raises:
        ValueError: there is no function of that name.
    """
    wanted = list(itertools.product(_select(functions, slim=slim), dtypes))
    device = torch.device(device)
    rows: list[Row] = []

    def work() -> None:
        with torch.no_grad(), tuning.static_choices():
            words = f"vovnet_fast checks its {backend} kernels on {device}, once"
            for case, dtype in _shown(wanted, words) if progress else wanted:
                rows.append(_run_case(case, backend, dtype, device))

    run_apart(work)
    return rows


def launches(
    functions: Collection[str], dtype: torch.dtype, device: torch.device | str
) -> list[Launch]:
    """The launches of Triton kernels that the slim check of these functions makes.

    See :func:`.trust.launches`.

    Raises:
        ValueError: there is no function of that name.
        ImportError: Triton is not installed.
    """
    from ..kernels._common import recording

    device = torch.device(device)
    found: list[Launch] = []

    def work() -> None:
        with torch.no_grad(), tuning.static_choices(), recording() as recorded:
            for case in _select(functions, slim=True):
                for _ in case.call(backend_module("triton"), Tensors(dtype, dtype, device)):
                    pass
        found.extend(recorded)

    # What the caller plans for is a context variable, and not one of torch's.
    run_apart(functools.partial(contextvars.copy_context().run, work))
    return found


def _select(functions: Collection[str] | None, *, slim: bool) -> list[Case]:
    """The cases of some functions."""
    unknown = set(functions or ()) - {case.function for case in CASES}
    if unknown:
        raise ValueError(f"no function is called {', '.join(sorted(unknown))}")
    level = [case for case in CASES if case.slim or not slim]
    return [case for case in level if functions is None or case.function in functions]


def _shown(items: Iterable[_Item], words: str) -> Iterator[_Item]:
    """The items, with a bar on stderr."""
    # Importing the package must not import what draws.
    from rich.console import Console
    from rich.progress import track

    return iter(track(list(items), words, console=Console(stderr=True)))


def run_apart(work: Callable[[], None]) -> None:
    """Run in a thread of its own.

    It knows nothing of the caller's autocast, inference mode, dispatch modes and default
    device, all of which would change what is computed.
    """
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded, name="vovnet_fast self-check")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _run_case(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> Row:
    def failed(problem: str) -> Row:
        return Row(case.function, dtype, case.words, math.nan, math.nan, False, problem)

    tf32 = case.products and dtype == torch.float32 and uses_tf32(device)
    tensors = Tensors(dtype, dtype, device)
    try:
        exact = list(case.call(reference(), Tensors(dtype, torch.float64, device)))
        eager = list(case.call(reference(), Tensors(dtype, dtype, device, cut=tf32)))
        found = list(case.call(backend_module(backend), tensors))
        if [out.shape for out in found] != [out.shape for out in exact]:
            return failed(f"its outputs are {[list(out.shape) for out in found]}")
        limits = list(map(limit, eager, exact, itertools.repeat(tf32)))
        errors = [largest(a.double() - b) for a, b in zip(found, exact, strict=True)]
        if not tensors.untouched():
            return failed("it wrote outside its slot")
    except Exception as exception:  # Whatever it is, the backend is not to be used.
        return failed(f"{type(exception).__name__}: {exception}")
    error, allowed = max(zip(errors, limits, strict=True), key=_excess)
    return Row(case.function, dtype, case.words, error, allowed, _excess((error, allowed)) <= 1)


def uses_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and tuning.tf32_allowed()


def limit(eager: Tensor, exact: Tensor, tf32: bool) -> float:
    """Twice the error of eager, and one rounding of the largest value; in fp32 a few.

    What is in fp32 was mostly summed in it, in an order of each backend's own.
    """
    unit = 0.0
    if tf32:  # It has the precision of fp16.
        unit = torch.finfo(torch.float16).eps
    elif eager.is_floating_point():
        unit = torch.finfo(eager.dtype).eps * (4 if eager.dtype == torch.float32 else 1)
    return 2 * largest(eager.double() - exact) + max(unit, _FP64) * largest(exact)


def _excess(pair: tuple[float, float]) -> float:
    """An error as a fraction of its limit. Where both are zero, it is kept."""
    error, allowed = pair
    return error / allowed if allowed > 0 else (0.0 if error == 0 else math.inf)
