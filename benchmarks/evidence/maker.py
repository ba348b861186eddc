"""Makes the steps of :mod:`.plan`: the words of their commands, and how their outcomes are read."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

from .carried import COMPILE_LOG, kernels, wheel_problem
from .folder import Folder
from .runner import clocks
from .steps import MISSING, PASSED, Outcome, Step, by_exit_status, by_sanitizer, by_tests

PATIENT = 3600.0
"""Limit of a rehearsed step, in seconds: no test may depend on a processor's speed."""

REPORT = "report.md"
ONLY_ON_GPU = "it needs an NVIDIA GPU"


class Carried(NamedTuple):
    """What was compiled on another machine; None where nothing was.

    Attributes:
        cache: packed, of Triton's kernels.
        wheel: of this package, with the CUDA half.
    """

    cache: Path | None = None
    wheel: Path | None = None

    @property
    def fits(self) -> bool:
        """The wheel's extension is this machine's."""
        return self.wheel is not None and wheel_problem(self.wheel) is None


def installed(name: str) -> bool:
    """Whether a package can be found."""
    return importlib.util.find_spec(name) is not None


def _capability() -> str | None:
    """What the first GPU is called by nvcc, such as ``90a``."""
    words = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = done.stdout.strip().replace(".", "") if done.returncode == 0 else ""
    if not found.isdecimal():
        return None
    return f"{found}a" if found == "90" else found


def _sanitizer() -> str | None:
    beside = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{beside}/bin:/usr/local/cuda/bin"
    )


Rehearsed = Union[Sequence[str], str]
"""Words in place of those for a GPU, or the reason why there is nothing to rehearse."""


class Maker:
    """Makes steps.

    Args:
        folder: of the results.
        rehearsal: on a CPU, with next to nothing to do.
        carried: what was compiled before.
    """

    def __init__(self, folder: Folder, rehearsal: bool, carried: Carried | None = None) -> None:
        self.folder, self.rehearsal, self.carried = folder, rehearsal, carried or Carried()
        self.log = folder.scratch / "kernels.jsonl"
        self.environment = {
            "VOVNET_FAST_CACHE": str(folder.scratch / "cache"),
            "VOVNET_FAST_TUNE": "0",  # Unless a step is there for it.
            "TRITON_CACHE_DIR": str(folder.scratch / "triton"),
            COMPILE_LOG: str(self.log),
        }
        if rehearsal:
            self.environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    def step(
        self,
        name: str,
        what: str,
        estimate: float,
        limit: float,
        command: Sequence[str],
        *,
        rehearsed: Rehearsed,
        variables: dict[str, str] | None = None,
        **options: Any,
    ) -> Step:
        """A process: python with ``command``, in a rehearsal with ``rehearsed``."""
        words = command
        if self.rehearsal:
            estimate, limit = 0.0, PATIENT
            if isinstance(rehearsed, str):
                options["missing"] = rehearsed
            else:
                words = rehearsed
        environment = self.environment | (variables or {})
        return Step(
            name, what, [sys.executable, *words], estimate, limit, environment=environment,
            **options,
        )  # fmt: skip

    def tests(
        self, name: str, what: str, estimate: float, limit: float, *words: str, rehearsed: Rehearsed
    ) -> Step:
        """A run of pytest on all cores, compiled on the device."""
        own = self._pytest(name)
        parallel = []
        if installed("xdist"):
            parallel = ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
        if installed("pytest_timeout"):
            parallel += ["--timeout=90", "--timeout-method=thread"]  # A kernel that hangs.
        return self.step(
            name, what, estimate, limit, [*own, *words, *parallel],
            rehearsed=rehearsed if isinstance(rehearsed, str) else [*own, *rehearsed],
            kind="tests", read=by_tests,
        )  # fmt: skip

    def benchmark(
        self, name: str, what: str, estimate: float, limit: float, *words: str,
        rehearsed: Rehearsed, **options: Any,
    ) -> Step:  # fmt: skip
        """A run of pytest-benchmark."""
        written = self.folder.scratch / f"{_file(name)}.json"
        own = self._pytest(name)
        own += ["-p", "no:xdist", "--benchmark-only", f"--benchmark-json={written}"]
        if not installed("pytest_benchmark"):
            options["missing"] = "pytest-benchmark is not installed"
        return self.step(
            name, what, estimate, limit, [*own, *words],
            rehearsed=rehearsed if isinstance(rehearsed, str) else [*own, *rehearsed],
            kind="benchmark", read=by_tests,
            finish=lambda: clocks(self.folder, name, written), **options,
        )  # fmt: skip

    def _pytest(self, name: str) -> list[str]:
        report = self.folder.rest / f"junit_{_file(name)}.xml"
        return [
            "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
            "-p", "benchmarks.evidence.recorder", "-p", "benchmarks.lost_device",
            f"--junitxml={report}",
        ]  # fmt: skip

    # ---- What was carried --------------------------------------------------------------

    def cache(self) -> Step:
        """Kernels that were compiled elsewhere."""
        packed, options = self.carried.cache, {}
        if packed is None:
            options["missing"] = "no --cache was given: kernels are compiled as they are met"
        words = ["-m", "benchmarks.evidence.carried", "cache", str(packed)]
        return self.step(
            "carried kernels", "kernels that were compiled elsewhere", 10.0, 60.0, words,
            rehearsed=words, optional=True, **options,
        )  # fmt: skip

    def extension(self) -> Step:
        """The extension with its CUDA half for this device, beside the sources."""
        wheel = self.carried.wheel
        variables = {"VOVNET_FAST_EXTENSION": "1", "VOVNET_FAST_CUDA": "1"}
        missing = [name for name in ("ninja", "pybind11") if not installed(name)]
        options = {}
        if missing and not self.carried.fits:
            options["missing"] = f"{' and '.join(missing)} cannot be imported"
        if not self.rehearsal and (capability := _capability()):
            variables["VOVNET_FAST_CUDA_ARCHS"] = capability  # All GPUs would take minutes.
        words = ["-m", "benchmarks.evidence.carried", "extension", *([str(wheel)] if wheel else [])]
        return self.step(
            "extension", "the C++ extension with its CUDA half",
            8.0 if self.carried.fits else 90.0, 180.0, words,
            rehearsed=words if self.carried.fits else "nothing is built without a GPU to build for",
            variables=variables, **options,
        )  # fmt: skip

    # ---- Others ------------------------------------------------------------------------

    def sanitizer(self, tool: str) -> Step:
        """compute-sanitizer over a few forms of every kernel."""
        found = _sanitizer()
        missing = None if found else "compute-sanitizer was not found"
        command = [
            found or "compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=_kernel",
            "--target-processes", "application-only", "--error-exitcode", "9",
            "--print-limit", "20", sys.executable, "-m", "benchmarks.sanitize", "--few",
        ]  # fmt: skip
        return Step(
            tool, f"compute-sanitizer, {tool}", command, 30.0, 75.0, "sanitizer",
            self.environment, by_sanitizer, missing=ONLY_ON_GPU if self.rehearsal else missing,
        )  # fmt: skip

    def trainings(self) -> Step:
        """Two trainings of the demo's detector, on plain PyTorch and on the fused path."""
        out = self.folder.rest / "trainings"
        words = [
            "demo/compare.py", "--out", str(out), "--iterations", "300", "--train-scenes", "600",
            "--val-scenes", "100", "--amp",
        ]  # fmt: skip
        options = {} if installed("mmdet") else {"missing": "mmdet is not installed"}
        return self.step(
            "trainings", "the demo's detector, trained twice", 90.0, 150.0, words,
            rehearsed=["demo/compare.py", "--help"], optional=True, **options,
        )  # fmt: skip

    def report(self) -> Step:
        """Tables and pictures of all rows. They can be made later too: a run is good without."""
        rows, out = self.folder.out / "rows.json", self.folder.rest / "report"
        title = "Benchmarks of a rehearsal" if self.rehearsal else "Benchmarks on a GPU"
        words = ["-m", "vovnet_fast.tools.cli", "bench", "report", str(rows), "-o", str(out)]
        words += ["--title", title]

        def read(code: int, output: str, tests: Any) -> Outcome:
            if not self.folder.rows.read()[1]:
                return Outcome(MISSING, "no benchmark has left rows")
            if code != 0 or not (out / REPORT).exists():
                return by_exit_status(code or 1, output)
            drawn = "with its pictures"
            if not installed("matplotlib"):
                drawn = "without pictures, as matplotlib is not installed"
            return Outcome(PASSED, f"{REPORT} in the archive, {drawn}")

        return self.step(
            "report", "tables and pictures of what was measured", 15.0, 40.0, words,
            rehearsed=words, read=read, optional=True, closing=True,
            finish=lambda: self.folder.picture(out / "models.png"),
        )  # fmt: skip

    def notes(self) -> list[str]:
        """Lines for the summary."""
        return [text] if (text := kernels(self.log)) else []


def _file(name: str) -> str:
    return name.replace(" ", "_")
