"""Everything that needs a GPU, in one command that ends in time: ``make gpu``.

``python benchmarks/gpu.py --out FOLDER`` tests the kernels on the device, measures, runs
compute-sanitizer, and leaves one folder of results. Each step is a process of its own with a
time limit of its own; one that fails, crashes or hangs costs its own results only. The most
valuable steps come first: what does not fit into ``--minutes`` is left out at the end.

The folder: ``summary.json`` and ``summary.md`` (rewritten after every step), ``log.txt``
(what the steps printed), ``junit_*.xml`` (the tests), ``benchmarks.json`` (the rows of
pytest-benchmark), ``tuning.json`` (the engines that were measured to be the fastest), and
``comparison.png`` and ``comparison.json`` of two trainings, where mmdet is installed.

Exit status: 0, 1 if a step failed or ran out of time, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED, TIMED_OUT, MISSING, LEFT_OUT, PENDING = (
    "passed", "failed", "timed out", "missing", "left out", "pending",
)  # fmt: skip

GRACE = 10.0
"""Seconds between the interrupt, upon which pytest writes its reports, and the kill."""

LEAST = 15.0
"""A step is not begun with fewer seconds left."""

_LOG_BYTES = 1 << 20  # Of each step: its beginning and its end.


@dataclass(frozen=True)
class Outcome:
    """What became of a step: its status, and a sentence about it."""

    status: str
    detail: str = ""


Reader = Callable[[int, str], Outcome]
"""Makes an outcome of the exit status and of what was printed."""


def by_exit_status(code: int, output: str) -> Outcome:
    """0 has passed; the last line that was printed is the detail."""
    lines = [line for line in output.strip().splitlines() if line.strip()]
    last = lines[-1].strip()[:300] if lines else ""
    return Outcome(PASSED if code == 0 else FAILED, last if code == 0 else f"exit {code}: {last}")


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: unique, one or two words.
        what: what it shows.
        command: words of the command, run in the root of the repository.
        limit: seconds.
        environment: variables besides those of this process.
        read: makes the outcome.
        finish: called after it, however it ended: collects what it wrote.
        missing: why it cannot run here; then it is reported and not run.
        reserve: seconds that the steps after it shall find left.
    """

    name: str
    what: str
    command: Sequence[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    read: Reader = by_exit_status
    finish: Callable[[], None] = lambda: None
    missing: str | None = None
    reserve: float = 0.0


@dataclass
class Result:
    """A row of the summary. Units: seconds."""

    name: str
    what: str
    command: str
    status: str = PENDING
    detail: str = ""
    seconds: float = 0.0
    limit: float = 0.0


class Run:
    """Runs steps one after the other, and keeps the summary.

    Args:
        out: the folder of results, which exists.
        steps: in order.
        seconds: for all of them together.
        provenance: what the summary says about machine and sources.
        grace: see :data:`GRACE`.

    Attributes:
        results: one for each step.
    """

    def __init__(
        self,
        out: Path,
        steps: Sequence[Step],
        seconds: float,
        provenance: dict[str, Any],
        *,
        grace: float = GRACE,
    ) -> None:
        self.out, self.steps, self.provenance, self.grace = out, steps, provenance, grace
        self.results = [Result(step.name, step.what, _shown(step.command)) for step in steps]
        self._end = time.monotonic() + seconds
        (out / "log.txt").write_text("")
        self._write()

    def all(self) -> bool:
        """Run every step; returns whether none failed or ran out of time."""
        for step, result in zip(self.steps, self.results, strict=True):
            self._one(step, result)
            self._write()
            print(f"{result.status:9} {result.seconds:5.0f} s  {step.name}: {result.detail}")
        return not any(result.status in (FAILED, TIMED_OUT) for result in self.results)

    def _one(self, step: Step, result: Result) -> None:
        if step.missing is not None:
            result.status, result.detail = MISSING, step.missing
            return
        left = self._end - time.monotonic() - self.grace - step.reserve
        result.limit = round(min(step.limit, left), 1)
        if left < min(LEAST, step.limit):
            result.status, result.detail = LEFT_OUT, f"{max(left, 0):.0f} s were left"
            return
        begin = time.monotonic()
        try:
            code, output = self._process(step, result.limit)
            outcome = step.read(1 if code is None else code, output)
            if code is None:
                outcome = Outcome(TIMED_OUT, f"stopped at its limit; {outcome.detail}")
        except Exception as error:  # Of a step that could not be started, or read.
            outcome, output = Outcome(FAILED, f"{type(error).__name__}: {error}"), ""
        try:
            step.finish()
        except Exception as error:
            outcome = Outcome(FAILED, f"{outcome.detail}; results unreadable: {error}")
        result.seconds = round(time.monotonic() - begin, 1)
        result.status, result.detail = outcome.status, _redact(outcome.detail)
        self._log(result, output)

    def _process(self, step: Step, limit: float) -> tuple[int | None, str]:
        """Exit status, None if it was stopped, and what it printed."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1",
            **step.environment,
        }
        with tempfile.TemporaryFile() as printed:  # Not a pipe, which orphans would keep open.
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            code: int | None = None
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(self.grace)
            finally:
                _end_group(process)
            printed.seek(0)
            return code, printed.read().decode(errors="replace")

    def _log(self, result: Result, output: str) -> None:
        if len(output) > _LOG_BYTES:
            half = _LOG_BYTES // 2
            output = (
                f"{output[:half]}\n[... {len(output) - 2 * half} left out ...]\n{output[-half:]}"
            )
        with (self.out / "log.txt").open("a") as log:
            log.write(f"\n===== {result.name}: {result.status}, {result.seconds} s\n")
            log.write(f"$ {result.command}\n{_redact(output)}\n")

    def _write(self) -> None:
        content = {
            "format": 1,
            "provenance": self.provenance,
            "steps": [asdict(result) for result in self.results],
        }
        part = self.out / "summary.json.part"
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.out / "summary.json")
        text = _markdown(self.provenance, self.results) + _networks(self.out / "benchmarks.json")
        (self.out / "summary.md").write_text(text)


def _end_group(process: subprocess.Popen) -> None:
    """Nothing that a step started outlives it: it would disturb the measurements."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _redact(text: str) -> str:
    """Without the folders of this machine."""
    for folder, short in ((str(ROOT), "."), (sys.prefix, "$PREFIX"), (str(Path.home()), "~")):
        if len(folder) > 1:
            text = text.replace(folder, short)
    return text


def _shown(command: Sequence[str]) -> str:
    words = ["python" if word == sys.executable else word for word in command]
    return _redact(" ".join(words))


def _markdown(provenance: dict[str, Any], results: Sequence[Result]) -> str:
    lines = ["# Checks with a GPU", ""]
    lines += [f"- {name}: {value}" for name, value in provenance.items()]
    lines += ["", "| step | what | status | seconds | detail |", "|---|---|---|---|---|"]
    for row in results:
        detail = row.detail.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {row.name} | {row.what} | {row.status} | {row.seconds:.0f} | {detail} |")
    return "\n".join(lines) + "\n"


_NETWORK_COLUMNS = {
    "ms": ("device_ms", "{:.2f}"),
    "eager's time : this": ("ratio_to_eager", "{:.2f}"),
    "peak MiB": ("peak_mib", "{:.0f}"),
    "this peak : eager's": ("peak_to_eager", "{:.2f}"),
    "kept MiB": ("kept_mib", "{:.0f}"),
    "distance": ("distance", "{:.1e}"),
}


def _networks(rows: Path) -> str:
    """A table of what was measured of whole networks, compared with eager of the same run."""
    if not rows.exists():
        return ""
    found = [row for row in json.loads(rows.read_text())["benchmarks"] if "ratio_to_eager" in row]
    if not found:
        return ""
    header = ["step", "network", "images", "provider", *_NETWORK_COLUMNS]
    lines = ["", "# Networks", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in found:
        cells = [row["step"], row["spec"], row["shape"], row["provider"]]
        cells += [
            shown.format(row[key]) if key in row else "" for key, shown in _NETWORK_COLUMNS.values()
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------
# Provenance
# --------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Versions and the device, as torch and nvidia-smi tell them."""
    import torch

    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": None,
        "gpu": None,
    }
    if importlib.util.find_spec("triton") is not None:
        import triton

        found["triton"] = triton.__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["processors"] = properties.multi_processor_count
        found["gpus"] = torch.cuda.device_count()
        found.update(_nvidia_smi())
    return found


def _nvidia_smi() -> dict[str, str]:
    """Driver, clocks in MHz, power limit in W and temperature of the first GPU; only read."""
    names = (
        "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
        "power.limit", "temperature.gpu",
    )  # fmt: skip
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (word.strip() for word in done.stdout.split(",")), strict=False))


def sources() -> dict[str, Any]:
    """The commit, and whether the tree has changes; ``unknown`` outside a git checkout."""
    try:
        git = functools.partial(
            subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        )
        commit = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changes = git(["git", "status", "--porcelain", "--", ":!benchmarks/results"]).stdout
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": None}
    return {"commit": commit, "dirty": bool(changes.strip())}


# --------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _sanitizer() -> str | None:
    beside = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{beside}/bin:/usr/local/cuda/bin"
    )


def _by_junit(report: Path) -> Reader:
    """The counts of a JUnit report, and the first tests that failed."""

    def read(code: int, output: str) -> Outcome:
        if not report.exists():
            return by_exit_status(code or 1, output)
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
        count = {
            name: sum(int(suite.get(name, 0)) for suite in suites)
            for name in ("tests", "failures", "errors", "skipped")
        }
        bad = count["failures"] + count["errors"]
        good = count["tests"] - bad - count["skipped"]
        detail = f"{good} passed, {bad} failed, {count['skipped']} skipped"
        names = [
            f"{case.get('name')}"
            for suite in suites
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        if names:
            detail += f": {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        # 5: no test was selected.
        return Outcome(PASSED if code in (0, 5) and not bad else FAILED, detail)

    return read


def _by_sanitizer(code: int, output: str) -> Outcome:
    """Errors that the sanitizer counted; a device that it refuses is not our failure."""
    summaries = re.findall(r"=+ (.*SUMMARY: .*)", output)
    if not summaries:
        if "not supported" in output:
            return Outcome(MISSING, "compute-sanitizer does not support this device here")
        return by_exit_status(code or 1, output)
    clean = code == 0 and re.search(r"SUMMARY: 0 (errors|hazards)", summaries[-1]) is not None
    return Outcome(PASSED if clean else FAILED, summaries[-1].strip())


class Folder:
    """The folder of results and the scratch folder beside it: what steps write, and where.

    Args:
        out: the results.
        scratch: for what is read and thrown away.
        dry: on a CPU, with next to nothing to do.
    """

    def __init__(self, out: Path, scratch: Path, dry: bool) -> None:
        self.out, self.scratch, self.dry = out, scratch, dry
        self.python = sys.executable
        self.environment = {"VOVNET_FAST_CACHE": str(scratch / "cache")}
        if dry:
            self.environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    def tests(self, name: str, what: str, limit: float, *words: str) -> Step:
        """A run of pytest, compiled on the device; nothing is tuned unless a test asks for it."""
        report = self.out / f"junit_{name}.xml"
        command = [
            self.python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
            "-p", "benchmarks.lost_device", f"--junitxml={report}", *words,
        ]  # fmt: skip
        if _installed("xdist") and not self.dry:
            command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
        if _installed("pytest_timeout"):
            command += ["--timeout=90", "--timeout-method=thread"]  # A kernel that hangs.
        variables = {"VOVNET_FAST_TUNE": "0"} | ({} if self.dry else self.environment)

        def finish() -> None:
            if report.exists():
                text = re.sub(r' hostname="[^"]*"', "", report.read_text())
                report.write_text(_redact(text))

        return Step(name, what, command, limit, variables, _by_junit(report), finish)

    def benchmark(self, name: str, what: str, limit: float, *words: str, **options: Any) -> Step:
        """A run of pytest-benchmark, whose rows are added to ``benchmarks.json``."""
        rows = self.scratch / f"{name.replace(' ', '_')}.json"
        report = self.scratch / f"{name.replace(' ', '_')}.xml"
        command = [
            self.python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
            "-p", "benchmarks.lost_device", "-p", "no:xdist", "--benchmark-only",
            f"--benchmark-json={rows}", f"--junitxml={report}", *words,
        ]  # fmt: skip
        missing = None if _installed("pytest_benchmark") else "pytest-benchmark is not installed"
        return Step(
            name, what, command, limit, self.environment, _by_junit(report),
            lambda: self._add_rows(name, rows), missing, **options,
        )  # fmt: skip

    def _add_rows(self, step: str, rows: Path) -> None:
        if not rows.exists() or not rows.read_text().strip():
            return
        merged = self.out / "benchmarks.json"
        kept = json.loads(merged.read_text())["benchmarks"] if merged.exists() else []
        for row in json.loads(rows.read_text())["benchmarks"]:
            stats = {
                key: row["stats"][key]
                for key in ("min", "max", "mean", "stddev", "median", "rounds")
            }
            kept.append({"step": step, "name": row["name"], "stats": stats, **row["extra_info"]})
        merged.write_text(json.dumps({"format": 1, "benchmarks": kept}, indent=1) + "\n")

    def sanitizer(self, tool: str, limit: float, **options: Any) -> Step:
        """compute-sanitizer over every kernel; in a dry run the kernels alone."""
        found = _sanitizer()
        script = [self.python, "-m", "benchmarks.sanitize"]
        what = f"compute-sanitizer, {tool}"
        if self.dry:
            return Step(tool, what, script, limit, self.environment, **options)
        command = [
            found or "compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=_kernel",
            "--target-processes", "application-only", "--error-exitcode", "9",
            "--print-limit", "20", *script,
        ]  # fmt: skip
        missing = None if found else "compute-sanitizer was not found"
        return Step(
            tool, what, command, limit, self.environment, _by_sanitizer,
            missing=missing, **options,
        )  # fmt: skip

    def tuning(self, limit: float) -> Step:
        """What was measured on the way, as ``vovnet_fast.tuning`` reads it."""
        code = (
            "import sys; from pathlib import Path; from vovnet_fast import tuning; "
            "found = tuning.table().choices(); tuning.export(found, Path(sys.argv[1])); "
            "print(sum(map(len, found.values())), 'choices')"
        )
        command = [self.python, "-c", code, str(self.out / "tuning.json")]
        what = "the engines that were measured to be fastest"

        def finish() -> None:
            with contextlib.suppress(FileNotFoundError):
                (self.out / "tuning.json").chmod(0o644)  # It was made as a temporary file.

        return Step("tuning", what, command, limit, self.environment, finish=finish)

    def comparison(self, limit: float, *words: str) -> Step:
        """Two trainings of the demo's detector, on plain PyTorch and on the fused path."""
        out = self.scratch / "comparison"
        command = [self.python, "demo/compare.py", "--out", str(out), *words]
        missing = None if _installed("mmdet") else "mmdet is not installed"

        def finish() -> None:
            for name, target in (("comparison.png", ".png"), ("metrics.json", ".json")):
                if (out / name).exists():
                    shutil.copy(out / name, self.out / f"comparison{target}")

        return Step(
            "trainings", "the demo's detector, trained twice", command, limit, self.environment,
            finish=finish, missing=missing,
        )  # fmt: skip


def gpu_steps(folder: Folder) -> list[Step]:
    """All steps, the most valuable first."""
    cases = "benchmarks/test_inference.py"

    def inference(name: str, limit: float, selected: str, *words: str, **options: Any) -> Step:
        what = f"inference, {name}"
        return folder.benchmark(name, what, limit, cases, "-k", selected, *words, **options)

    def training(name: str, limit: float, selected: str, *words: str) -> Step:
        what, file = f"training steps, {name}", "benchmarks/test_training.py"
        return folder.benchmark(
            f"training {name}", what, limit, file, "-k", selected, *words, reserve=last
        )

    precompile = [folder.python, "-m", "benchmarks.precompile"]
    trained = [*precompile, "--training", "--spec", "V-39-eSE", "V-99-eSE"]
    last = 15.0  # For the export.
    return [
        folder.tests("kernels", "the kernels on the device", 150, "tests/kernels"),
        Step("compile", "kernels of the benchmarks", precompile, 90, folder.environment),
        inference("V-39 800x1344", 45, "V-39-eSE and 800x1344", reserve=last),
        inference("V-99 800x1344", 45, "V-99-eSE and 800x1344", reserve=last),
        Step(
            "compile training", "kernels of the training steps", trained, 90, folder.environment,
            reserve=last,
        ),
        training("V-99 640x1600", 60, "V-99-eSE and 640x1600"),
        training("V-39 800x1344", 45, "V-39-eSE and 800x1344"),
        folder.tests(
            "gpu", "graphs, streams and frozen networks", 75,
            "tests", "--ignore=tests/kernels", "--continue-on-collection-errors", "-m", "gpu",
        ),
        folder.sanitizer("memcheck", 60, reserve=last),
        folder.benchmark(
            "conv", "every layer on every engine", 75, "benchmarks/test_conv.py", reserve=last
        ),
        folder.tests(
            "gradients", "gradients of all architectures", 90,
            "tests/kernels/test_device.py", "-m", "slow",
        ),
        training("others", 90, "(V-39-eSE and 640x1600) or (V-99-eSE and 800x1344)"),
        inference("V-39 others", 45, "V-39-eSE and not 800x1344", reserve=last),
        inference("V-99 others", 60, "V-99-eSE and not 800x1344", reserve=last),
        inference("V-19", 60, "V-19-slim-dw-eSE", reserve=last),
        folder.sanitizer("racecheck", 60, reserve=last),
        folder.sanitizer("initcheck", 45, reserve=last),
        inference(
            "compiled", 180, "V-39-eSE and 800x1344 and (eager or compiled)",
            "-m", "slow or not slow", reserve=last,
        ),
        training(
            "compiled", 180, "V-39-eSE and 800x1344 and compiled", "-m", "slow or not slow"
        ),
        folder.tuning(30),
        folder.comparison(
            120, "--iterations", "300", "--train-scenes", "600", "--val-scenes", "100", "--amp"
        ),
    ]  # fmt: skip


def dry_steps(folder: Folder) -> list[Step]:
    """The same steps with next to nothing to do, on a CPU and in Triton's interpreter."""
    compiling = [
        folder.python,
        "-m",
        "benchmarks.precompile",
        "--list",
        "--spec",
        "V-19-slim-dw-eSE",
    ]
    cases = "benchmarks/test_inference.py"
    return [
        folder.tests("kernels", "the kernels", 60, "tests/kernels/test_max_pool.py", "-k", "empty"),
        Step("compile", "kernels of the benchmarks", compiling, 60, folder.environment),
        folder.benchmark("inference", "inference", 60, cases, "-k", "eager or folded"),
        folder.tests("gpu", "tests with a GPU", 60, "tests/test_freeze_gpu.py", "-m", "gpu"),
        folder.sanitizer("memcheck", 60),
        folder.benchmark("conv", "one layer on every engine", 60, "benchmarks/test_conv.py"),
        folder.benchmark("training", "training steps", 60, "benchmarks/test_training.py"),
        folder.tuning(30),
        folder.comparison(60, "--help"),
    ]


# --------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu.py", description="Test and measure on a GPU."
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="where the results go; {date}, {gpu} and {commit} in it are filled in",
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="for everything together (default: %(default)g)"
    )
    parser.add_argument(
        "--commit", help="what the sources are, where they do not lie in a git checkout"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="walk through the steps on a CPU; measures nothing"
    )
    return parser


def _ask_environment() -> dict[str, Any]:
    """:func:`environment` of another process: this one shall not hold a CUDA context."""
    code = "import json; from benchmarks import gpu; print(json.dumps(gpu.environment()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"torch cannot be asked about the GPU:\n{done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python benchmarks/gpu.py``."""
    begin = time.monotonic()
    options = _parser().parse_args(arguments)
    now = datetime.datetime.now(datetime.timezone.utc)
    provenance = {"date": now.isoformat(timespec="seconds"), **sources()}
    provenance |= {"commit": options.commit} if options.commit else {}
    try:
        provenance |= _ask_environment()
    except (RuntimeError, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        return 2
    if provenance["gpu"] is None and not options.dry_run:
        print(
            "torch sees no GPU, and everything here needs one: run this on a machine with an "
            "NVIDIA GPU, or try the steps with --dry-run",
            file=sys.stderr,
        )
        return 2
    if options.dry_run:
        provenance["dry_run"] = "nothing was measured, and nothing ran on a GPU"
    name = re.sub(r"[^a-z0-9]+", "-", (provenance["gpu"] or "cpu").lower()).strip("-")
    folder = options.out.format(date=now.date(), gpu=name, commit=provenance["commit"])
    out = Path(folder).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        files = Folder(out, Path(scratch), options.dry_run)
        steps = dry_steps(files) if options.dry_run else gpu_steps(files)
        seconds = 60 * options.minutes - (time.monotonic() - begin)
        good = Run(out, steps, seconds, provenance).all()
    print(f"results in {folder}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
