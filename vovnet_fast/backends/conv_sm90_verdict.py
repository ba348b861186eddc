"""Whether the Hopper convolution has passed its trials on this machine: known, or found out now.

It is tried once (:mod:`.conv_sm90_trial`), in a process of its own (:mod:`._apart`). What comes of
that is kept beside the other verdicts, for this machine and these sources: a failure as well, which
may take a minute to be told from patience. Where it could not be tried nothing is kept: the next
process tries.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import torch

from .. import selfcheck, tuning
from . import _apart

_PASSED = "passed"
_ENGINE = "conv-sm90"
IN_FP8 = f"{_ENGINE} in fp8"
"""What that of networks in fp8 is called, whose kernels are others."""

_TRIALS = {_ENGINE: "conv_sm90_trial", IN_FP8: "conv_sm90_fp8_trial"}
_SETTING = "VOVNET_FAST_CONV_SM90"

_log = logging.getLogger("vovnet_fast.selfcheck")
_lock = threading.Lock()
_known: dict[tuple[str, str], str | None] = {}
"""By machine and engine: why it is not on offer, or None."""


def why_not(device: torch.device, engine: str = _ENGINE) -> str | None:
    """The reason why it is not on offer on a GPU that it is for, or None; said once.

    ``engine`` may be :data:`IN_FP8`.

    To find it out may take half a minute.
    """
    machine = tuning.machine(device)
    subject = machine, engine
    if subject in _known:
        return _known[subject]
    with _lock:  # Threads that ask at the same time wait for one answer.
        if subject not in _known:
            verdict = selfcheck.verdicts().get(machine, _subject(engine))
            if verdict is None and torch.cuda.is_current_stream_capturing():
                return "it has not been tried here yet, which is not done during a capture"
            reason = _reason(verdict) if verdict else _find_out(device, machine, engine)
            if reason is not None:
                _log.warning(
                    "the hand-written convolution for Hopper, %s, is left out on %s: %s. %s=1 "
                    "takes it all the same, 0 does not ask.", engine, machine, reason, _SETTING,
                )  # fmt: skip
            _known[subject] = reason
        return _known[subject]


def _subject(engine: str) -> str:
    """What a verdict is about."""
    return f"{engine} apart sources {selfcheck.digest(_TRIALS[engine], engine)}"


def _reason(verdict: str) -> str | None:
    """Of a verdict that is kept."""
    if verdict == _PASSED:
        return None
    where = selfcheck.verdicts().path or "memory"
    return f"it has failed its trials: {verdict} (kept in {where}; please report this)"


def _find_out(device: torch.device, machine: str, engine: str) -> str | None:
    reason = _obstacle()
    if reason is not None:
        return f"it was not tried: {reason}"
    _log.info("trying %s on %s, once, in a process of its own", engine, machine)
    index = torch.cuda.current_device() if device.index is None else device.index
    given = {"index": index, "machine": machine}
    outcome = _apart.attempt(f"{__package__}.{_TRIALS[engine]}", given)
    _log.info("%s on %s: %s, %s", engine, machine, *outcome)
    if outcome.kind == "unable":
        return f"it could not be tried: {outcome.words}"
    verdict = _PASSED if outcome.kind == "passed" else outcome.words
    _keep(machine, engine, verdict)
    return _reason(verdict)


def _keep(machine: str, engine: str, verdict: str) -> None:
    found = {machine: {_subject(engine): tuning.Choice(verdict)}}
    selfcheck.verdicts().keep(found, "verdicts")


def _obstacle() -> str | None:
    """Why it must not be tried, or None: clients of an MPS server go down with one that faults."""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps"
    if (Path(folder) / "control").exists():
        return f"an MPS server is running ({folder}), whose clients go down with one that faults"
    return None
