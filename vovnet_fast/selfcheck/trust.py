"""Which functions of a backend are known to be right on a machine, and finding it out."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from .. import tuning
from . import eight_bits, runner, sources
from .calls import backend_module
from .cases import PRODUCTS

if TYPE_CHECKING:
    from ..kernels._common import Launch

_PASSED = "passed"
_log = logging.getLogger("vovnet_fast.selfcheck")
_lock = threading.Lock()


class _Key(NamedTuple):
    """What a verdict is about."""

    machine: str
    subject: str


_verdicts: dict[_Key, bool] = {}
"""What this process knows."""


def remembered(
    backend: str, device: torch.device, dtype: torch.dtype, functions: Iterable[str]
) -> bool | None:
    """Whether all of these functions passed on this machine; None where it is not known."""
    found = {_known(_key(backend, device, dtype, function)) for function in functions}
    return False if False in found else None if None in found else True


def trusted(
    backend: str, device: torch.device, dtype: torch.dtype, functions: Collection[str]
) -> bool:
    """Whether functions compute right numbers on ``device``: remembered, or found out now.

    Those that are not known are checked, the others are not. A failure is said aloud, once in
    a process.

    Args:
        backend: its name.
        device: where they are to run.
        dtype: of the activations, one of :data:`.runner.DTYPES` or of :data:`.eight_bits.FORMS`.
        functions: of the backend.
    """
    with _lock:  # Threads that ask at the same time wait for one answer.
        keys = {function: _key(backend, device, dtype, function) for function in functions}
        known = {function: _known(key) for function, key in keys.items()}
        if False in known.values():
            return False
        unknown = [function for function, verdict in known.items() if verdict is None]
        if not unknown:
            return True
        failed = _find_out(backend, device, dtype, unknown)
        _verdicts.update((keys[function], function not in failed) for function in unknown)
        if passed := [keys[function] for function in unknown if function not in failed]:
            _keep(passed)
        return not failed


def _known(key: _Key) -> bool | None:
    verdict = _verdicts.get(key)
    if verdict is None and verdicts().get(*key) == _PASSED:
        verdict = _verdicts[key] = True
    return verdict


def _find_out(
    backend: str, device: torch.device, dtype: torch.dtype, functions: Collection[str]
) -> set[str]:
    """Run the slim check; returns the functions that failed it."""
    machine, names = tuning.machine(device), ", ".join(functions)
    name = str(dtype).removeprefix("torch.")
    _log.info("checking %s of the %s backend in %s on %s, once", names, backend, name, machine)
    compiles = device.type == "cuda"
    if compiles and backend.partition(".")[0] == "triton":
        _compile(functions, dtype, device)
    if dtype in eight_bits.FORMS:
        rows = eight_bits.run(backend, device, dtype, functions)
    else:
        rows = runner.run(backend, device, [dtype], functions, slim=True, progress=compiles)
    failures = [row for row in rows if not row.passed]
    failed = {row.function for row in failures}
    if failures:
        _log.warning(
            "the %s backend fails its self-check on %s in %s and is not used for what needs %s; "
            "%d of %d checks failed, the first of them:\n  %s\nPlease report this. "
            "VOVNET_FAST_BACKEND=reference chooses plain PyTorch without a check.",
            backend,
            machine,
            name,
            ", ".join(sorted(failed)),
            len(failures),
            len(rows),
            "\n  ".join(map(str, failures[:5])),
        )
    return failed


def launches(
    functions: Collection[str], dtype: torch.dtype, device: torch.device | str
) -> list[Launch]:
    """The launches of Triton kernels that the check of these functions makes.

    Planned on tensors of ``device``, which may be ``meta``, and not run: whoever compiles them
    beforehand spares the check from compiling them one after the other.

    Args:
        functions: of Triton's backend.
        dtype: of the activations, as in :func:`trusted`.
        device: of the tensors.

    Raises:
        ValueError: there is no function of that name.
        ImportError: Triton is not installed.
    """
    room = eight_bits if dtype in eight_bits.FORMS else runner
    return room.launches(functions, dtype, device)


def _compile(functions: Collection[str], dtype: torch.dtype, device: torch.device) -> None:
    """Compile what the check will launch on a GPU on all cores.

    For a network that has been done before; its blocks and the ops are used alone, too.

    Raises:
        ValueError: ``VOVNET_FAST_COMPILE_WORKERS`` is no number.
    """
    from ..compiling import side_by_side, workers
    from ..kernels._common import interpreted, planning_for, target_of

    if interpreted() or workers.count() == 0:
        return
    try:
        target = target_of(device)
        with planning_for(target):
            found = launches(functions, dtype, "meta")
        side_by_side.compile_launches(found, target.capability)
    except Exception as error:
        side_by_side.say_once(f"{type(error).__name__}: {error}")


def _keep(keys: Iterable[_Key]) -> None:
    """Remember in the file that these passed; only warn, once, where it cannot be written."""
    passed: tuning.Choices = {}
    for machine, subject in keys:
        passed.setdefault(machine, {})[subject] = tuning.Choice(_PASSED)
    verdicts().keep(passed, "verdicts")


def _key(backend: str, device: torch.device, dtype: torch.dtype, function: str) -> _Key:
    words = [backend, function, str(dtype).removeprefix("torch.")]
    if function in PRODUCTS and dtype == torch.float32 and runner.uses_tf32(device):
        words.append("with TF32")
    variant = getattr(backend_module(backend), "variant", None)
    if variant is not None:
        words.append(f"on {variant()}")
    words.append(f"sources {sources.digest(backend, function)}")
    return _Key(tuning.machine(device), " ".join(words))


def verdicts() -> tuning.Table:
    """What has passed on which machine, in memory and in ``verified.json``."""
    return _table(tuning.kept_in("verified.json"))


@functools.cache
def _table(path: Path | None) -> tuning.Table:
    return tuning.Table(path)
