"""Which versions of Python, torch, Triton and NumPy this works with, found out on demand.

``python -m tests.matrix`` makes an environment each with uv, builds the extension's CPU half for
it, runs the tests marked ``versions`` (``--whole``: all that need no mmdet, file after file), and
prints a row of the table in docs/compatibility.md; ``--update`` writes them there. Minutes, and up
to 5 GB, each. How far it is goes to stderr.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"
WHOLE = (
    "ops", "network", "backends", "checkpoints", "deploy", "arithmetic", "quantization", "kernels",
    "tuning", "selfcheck",
)  # fmt: skip
TOOLS = ("pytest", "hypothesis", "setuptools>=77", "pybind11>=2.12", "ninja")


class Pair(NamedTuple):
    """An environment: a version of Python, and what is installed beside the package's own needs."""

    python: str
    packages: tuple[str, ...]


PAIRS = {
    "2.1": Pair("3.10", ("torch==2.1.2", "numpy<2")),
    "2.4": Pair("3.9", ("torch==2.4.1", "numpy<2.1")),
    "2.6": Pair("3.11", ("torch==2.6.0", "numpy<2")),
    # NumPy 2.5 makes no number of an array of one, as the interpreter of Triton before 3.6 asks.
    "2.8": Pair("3.12", ("torch==2.8.0", "numpy<2.4")),
    "2.11": Pair("3.12", ("torch==2.11.0", "triton==3.6.0")),
    "2.13": Pair("3.13", ("torch==2.13.0", "triton==3.7.1")),
    "newest": Pair("3.13", ("torch",)),
}

_VERSIONS = """
import platform, numpy, torch
try:
    import triton
    triton = triton.__version__
except Exception:
    triton = "none"
print(platform.python_version(), torch.__version__, triton, numpy.__version__, sep=" | ")
"""


def run(name: str, folder: Path, *, whole: bool, uv: str) -> str:
    """A row of the table.

    Raises:
        subprocess.CalledProcessError: the environment could not be made.
    """
    pair, home = PAIRS[name], folder / name
    python = str(home / "bin" / "python")
    if not (home / "made").exists():
        subprocess.run([uv, "venv", "-q", "--clear", "--python", pair.python, home], check=True)
        install = [uv, "pip", "install", "-q", "--python", python, "-r", "pyproject.toml"]
        subprocess.run([*install, *TOOLS, *pair.packages], cwd=ROOT, check=True)
        (home / "made").touch()
    environment = {**os.environ, "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    build = [python, "setup.py", "build_ext", "--inplace"]
    settings = {"VOVNET_FAST_CUDA": "0", "VOVNET_FAST_EXTENSION": "1"}
    subprocess.run(
        build, cwd=ROOT, env={**environment, **settings}, check=True, stdout=subprocess.DEVNULL
    )
    versions = subprocess.run(
        [python, "-c", _VERSIONS], check=True, capture_output=True, text=True
    ).stdout.strip()
    found: Counter[str] = Counter()
    for words in pieces(whole=whole):
        began = time.monotonic()
        done = subprocess.run(
            [python, "-m", "pytest", "-p", "no:cacheprovider", "-q", *words],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        counts = counted(done)
        if counts["failed"] or counts["errors"]:
            print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
        seconds = time.monotonic() - began
        print(f"{' '.join(words)}: {written(counts)}, {seconds:.0f} s", file=sys.stderr, flush=True)
        found += counts
    tests = "all that need no mmdet" if whole else "`versions`"
    return f"| {versions} | {tests} | {written(found)} | {commit()}, {datetime.date.today()} |"


def pieces(*, whole: bool) -> list[list[str]]:
    """What pytest is called with, one process each: a file that crashes takes no other with it."""
    if not whole:
        return [["-m", "versions"]]
    files = [
        file for folder in WHOLE for file in sorted((ROOT / "tests" / folder).glob("test_*.py"))
    ]
    return [[str(file.relative_to(ROOT))] for file in files]


def counted(done: subprocess.CompletedProcess[str]) -> Counter[str]:
    """How many tests failed, passed, were skipped or were errors, as is a pytest without an end."""
    last = (done.stdout.strip().splitlines() or [""])[-1]
    found = re.findall(r"(\d+) (failed|passed|skipped|error)", last)
    counts = Counter({kind.replace("error", "errors"): int(number) for number, kind in found})
    nothing_chosen = 5
    if done.returncode not in (0, nothing_chosen) and not (counts["failed"] or counts["errors"]):
        counts["errors"] += 1
    return counts


def written(counts: Counter[str]) -> str:
    """Counts as pytest writes them."""
    kinds = [kind for kind in ("failed", "passed", "skipped", "errors") if counts[kind]]
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds) or "no tests"


def commit() -> str:
    """Of the sources, with a star if they differ."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("*" if git("status", "--porcelain") else "")


def updated(document: str, rows: list[str]) -> str:
    """The document with these rows in the place of those of the same versions."""
    before, rest = document.split(BEGIN)
    table, after = rest.split(END)
    head, rule, *old = table.strip().splitlines()
    key = {row.rsplit("|", 4)[0] + row.rsplit("|", 4)[1] for row in rows}
    kept = [row for row in old if row.rsplit("|", 4)[0] + row.rsplit("|", 4)[1] not in key]
    every = sorted([*kept, *rows], key=lambda row: [*map(int, re.findall(r"\d+", row)[3:5])])
    return "\n".join([f"{before}{BEGIN}", head, rule, *every, f"{END}{after}"])


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python -m tests.matrix``."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-matrix")
    parser.add_argument("--uv", default="uv", help="the command uv")
    parser.add_argument("--whole", action="store_true", help="every test that needs no mmdet")
    parser.add_argument("--update", action="store_true", help=f"write into {TABLE.name}")
    options = parser.parse_args(arguments)
    unknown = sorted({*options.names} - {*PAIRS})
    if unknown:
        parser.error(f"no environment {', '.join(unknown)}: there are {', '.join(PAIRS)}")
    rows = []
    for name in options.names or PAIRS:
        rows.append(run(name, options.folder.absolute(), whole=options.whole, uv=options.uv))
        print(rows[-1], flush=True)
        if options.update:
            TABLE.write_text(updated(TABLE.read_text(), rows[-1:]))
    return 0 if all("failed" not in row and "error" not in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
