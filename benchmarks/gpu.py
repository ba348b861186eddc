"""Everything that needs a GPU, in one command that ends in time: ``make gpu``.

``python benchmarks/gpu.py --out FOLDER`` tests the kernels on the device, measures, runs
compute-sanitizer, and leaves one folder of results. Each step is a process of its own with a
time limit of its own; one that fails, crashes or hangs costs its own results only. The most
valuable steps come first: what does not fit into ``--minutes`` is left out at the end.

The folder: ``summary.json`` and ``summary.md`` (rewritten after every step), ``log.txt``
(what the steps printed), ``junit_*.xml`` (the tests), ``benchmarks.json`` (the rows of
pytest-benchmark), ``tuning.json`` (the engines that were measured to be the fastest),
``comparison.png`` and ``comparison.json`` of two trainings, where mmdet is installed, and
``report.md`` with pictures of the rows, where matplotlib is.

Exit status: 0, 1 if a step other than the report failed or ran out of time, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # As a script, it would only find what lies beside it.

from benchmarks.steps import (  # noqa: E402
    FAILED,
    LEAST,
    MISSING,
    PASSED,
    REPORT,
    Outcome,
    Reader,
    Run,
    Step,
    by_exit_status,
    redact,
)

# --------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------


def _installed(name: str) -> bool:
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
                report.write_text(redact(text))

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

    def extension(self, limit: float, **options: Any) -> Step:
        """The package's extension with its CUDA half for this device, beside the sources."""
        command = [self.python, "setup.py", "-q", "build_ext", "--inplace"]
        missing = [name for name in ("ninja", "pybind11") if not _installed(name)]
        variables = {"VOVNET_FAST_EXTENSION": "1", "VOVNET_FAST_CUDA": "1"}
        if capability := _capability():  # Not known: for all GPUs, which takes minutes.
            variables["VOVNET_FAST_CUDA_ARCHS"] = capability
        return Step(
            "extension", "the C++ extension builds here", command, limit, variables,
            missing=f"{' and '.join(missing)} cannot be imported" if missing else None, **options,
        )  # fmt: skip

    def _add_rows(self, step: str, rows: Path) -> None:
        if not rows.exists() or not rows.read_text().strip():
            return
        merged, found = self.out / "benchmarks.json", json.loads(rows.read_text())
        content: dict[str, Any] = {"format": 1, **found["machine_info"], "clocks": {}}
        content |= {"left_out": [], "benchmarks": []}
        if merged.exists():
            content = json.loads(merged.read_text())
        # Of the provenance, the clocks alone are another step's.
        content["clocks"][step] = found["machine_info"]["provenance"]["clocks"]
        content["left_out"] += found["left_out"]
        kept = content["benchmarks"]
        for row in found["benchmarks"]:
            stats = {
                key: row["stats"][key]
                for key in ("min", "max", "mean", "stddev", "median", "rounds")
            }
            kept.append({"step": step, "name": row["name"], "stats": stats, **row["extra_info"]})
        merged.write_text(redact(json.dumps(content, indent=1)) + "\n")

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

    def tuning(self, limit: float, **options: Any) -> Step:
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

        return Step("tuning", what, command, limit, self.environment, finish=finish, **options)

    def comparison(self, limit: float, *words: str, **options: Any) -> Step:
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
            finish=finish, missing=missing, **options,
        )  # fmt: skip

    def report(self, limit: float) -> Step:
        """Tables and pictures of all rows. They can be made later too: a run is good without."""
        rows, written = self.out / "benchmarks.json", self.out / REPORT
        command = [
            self.python, "-m", "vovnet_fast.cli", "bench", "report", str(rows), "-o", str(self.out),
            "--title", "Benchmarks on a GPU" if not self.dry else "Benchmarks of a dry run",
        ]  # fmt: skip

        def read(code: int, output: str) -> Outcome:
            if not rows.exists():
                return Outcome(MISSING, "no benchmark has left rows")
            if code != 0 or not written.exists():
                return by_exit_status(code or 1, output)
            drawn = "with its pictures"
            if not _installed("matplotlib"):
                drawn = "without pictures, as matplotlib is not installed"
            return Outcome(PASSED, f"{REPORT}, {drawn}")

        return Step(
            "report", "tables and pictures of what was measured", command, limit, self.environment,
            read, optional=True,
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
    last = 15.0 + LEAST  # For the export, and for the report.
    maps = "400x672 or 200x336 or 100x168 or 50x84 or 25x42"  # Those of 800x1344.
    return [
        folder.tests("kernels", "the kernels on the device", 150, "tests/kernels"),
        Step("compile", "kernels of the benchmarks", precompile, 90, folder.environment),
        folder.extension(120, reserve=last),
        inference("V-39 800x1344", 60, "V-39-eSE and 1x3x800x1344", reserve=last),
        inference("V-99 800x1344", 60, "V-99-eSE and 1x3x800x1344", reserve=last),
        Step(
            "compile training", "kernels of the training steps", trained, 90, folder.environment,
            reserve=last,
        ),
        training("V-99 640x1600", 75, "V-99-eSE and 640x1600 and not NCHW"),
        training("V-39 800x1344", 60, "V-39-eSE and 800x1344 and not NCHW"),
        folder.tests(
            "gpu", "graphs, streams and frozen networks", 75,
            "tests", "--ignore=tests/kernels", "--ignore=tests/test_conv_sm90.py",
            "--continue-on-collection-errors", "-m", "gpu",
        ),
        folder.sanitizer("memcheck", 60, reserve=last),
        # By itself: a kernel of its kind that is wrong may never end.
        folder.tests(
            "hopper", "the hand-written convolution", 60, "tests/test_conv_sm90.py", "-m", "gpu"
        ),
        folder.benchmark(
            "conv", "every layer on every engine", 75, "benchmarks/test_ceilings.py",
            "benchmarks/test_conv.py", "-k", f"ceiling or (triton and not gradient and ({maps}))",
            reserve=last,
        ),
        folder.tests(
            "gradients", "gradients of all architectures", 90,
            "tests/kernels/test_device.py", "-m", "slow",
        ),
        training(
            "others", 90,
            "((V-39-eSE and 640x1600) or (V-99-eSE and 800x1344)) and not NCHW",
        ),
        inference("V-39 others", 60, "V-39-eSE and not 1x3x800x1344", reserve=last),
        inference("V-99 others", 60, "V-99-eSE and not 1x3x800x1344", reserve=last),
        inference("V-19", 60, "V-19-slim-dw-eSE", reserve=last),
        folder.benchmark(
            "blocks", "OSA blocks and other operations", 90, "benchmarks/test_ceilings.py",
            "benchmarks/test_blocks.py", "benchmarks/test_ops.py", "-k",
            f"ceiling or ((eager or triton or cuda) and ({maps}))", reserve=last,
        ),
        folder.sanitizer("racecheck", 60, reserve=last),
        folder.sanitizer("initcheck", 45, reserve=last),
        inference(
            "compiled", 180, "V-39-eSE and 1x3x800x1344 and (eager or compiled)",
            "-m", "slow or not slow", reserve=last,
        ),
        training(
            "compiled", 180, "V-39-eSE and 800x1344 and compiled", "-m", "slow or not slow"
        ),
        folder.tuning(30, reserve=LEAST),
        folder.comparison(
            120, "--iterations", "300", "--train-scenes", "600", "--val-scenes", "100", "--amp",
            reserve=LEAST,
        ),
        folder.report(30),
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
        folder.benchmark("inference", "inference", 60, cases, "-k", "1x3x128x128 and folded"),
        folder.tests("gpu", "tests with a GPU", 60, "tests/test_freeze_gpu.py", "-m", "gpu"),
        folder.sanitizer("memcheck", 60),
        folder.benchmark(
            "conv",
            "one layer on every engine",
            60,
            "benchmarks/test_conv.py",
            "-k",
            "not gradient and ((40x40 and eager) or (8x8 and triton))",
        ),
        folder.benchmark(
            "training",
            "training steps",
            60,
            "benchmarks/test_training.py",
            "-k",
            "V-19-slim-dw and not NCHW and not fused",
        ),
        folder.tuning(30),
        folder.comparison(60, "--help"),
        folder.report(60),
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


def _provenance() -> dict[str, Any]:
    """What :mod:`vovnet_fast.bench.provenance` says in another process.

    This one shall not hold a CUDA context.
    """
    code = (
        "import json, torch; from vovnet_fast.bench import provenance; "
        "device = torch.device('cuda' if torch.cuda.is_available() else 'cpu'); "
        "print(json.dumps(provenance.collect(device)))"
    )
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
    if options.commit:
        os.environ["VOVNET_FAST_COMMIT"] = options.commit  # The steps write it into their rows.
    try:
        provenance = _provenance()
    except (RuntimeError, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        return 2
    if "gpu" not in provenance and not options.dry_run:
        print(
            "torch sees no GPU, and everything here needs one: run this on a machine with an "
            "NVIDIA GPU, or try the steps with --dry-run",
            file=sys.stderr,
        )
        return 2
    if options.dry_run:
        provenance["dry_run"] = "nothing was measured, and nothing ran on a GPU"
    name = re.sub(r"[^a-z0-9]+", "-", provenance.get("gpu", "cpu").lower()).strip("-")
    date = provenance["date"].partition("T")[0]
    folder = options.out.format(date=date, gpu=name, commit=provenance["commit"])
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
