"""Everything that needs a GPU, in one command that ends in time: ``make gpu``.

``python benchmarks/gpu.py --out FOLDER --seconds 540`` proves, measures, runs compute-sanitizer
and tunes on the first NVIDIA GPU. Steps that prove most come first; each is a process of its own,
and one that fails, crashes, hangs or fills the disk costs its own results only. A step is begun
only if what it is expected to take is left. Kernels and the extension can be compiled beforehand
on another machine (``benchmarks/carry.py``).

The folder has at most eight files of at most 16 MiB: ``summary.md`` and ``summary.json``
(rewritten after every step), ``rows.json`` and ``tests.json`` (each measurement and each test, from
the moment it exists), ``log.txt`` (what the steps printed), ``networks.png``, ``tuning.json`` (the
engines that were measured), and ``rest.tar.xz``: JUnit's files, whole logs, the report with its
pictures. Attach it to an issue to tell us how the kernels do on your GPU.

``--rehearse`` walks through the same steps on a CPU, with next to nothing to do in each.

Exit status: 0, 1 if a step that is needed failed or ran out of time, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # As a script, it would only find what lies beside it.

from benchmarks.evidence.folder import Folder  # noqa: E402
from benchmarks.evidence.maker import PATIENT, Carried, Maker  # noqa: E402
from benchmarks.evidence.plan import plan  # noqa: E402
from benchmarks.evidence.runner import Run  # noqa: E402
from benchmarks.evidence.steps import Step  # noqa: E402


def _path(text: str) -> Path:
    """From where this command was called; the steps run elsewhere."""
    return Path(text).resolve()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu.py",
        description="Prove, measure and tune on a GPU, within a time, into one small folder.",
        epilog="Attach the folder to an issue to tell us how the kernels do on your GPU.",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="where the results go; {date}, {gpu} and {commit} in it are filled in",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="for everything together (default: 540, and an hour for a rehearsal)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="STEP",
        help="these steps, and the report: what an earlier run left out",
    )
    parser.add_argument(
        "--cache", type=_path, metavar="FILE", help="kernels that benchmarks/carry.py compiled"
    )
    parser.add_argument(
        "--wheel", type=_path, metavar="FILE", help="the extension that benchmarks/carry.py built"
    )
    parser.add_argument(
        "--commit", help="what the sources are, where they do not lie in a git checkout"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="walk through the steps on a CPU; measures nothing that counts",
    )
    return parser


def _provenance() -> dict[str, Any]:
    """What :mod:`vovnet_fast._provenance` says in another process.

    This one shall not hold a CUDA context.
    """
    code = (
        "import json, torch; from vovnet_fast import _provenance as provenance; "
        "device = torch.device('cuda' if torch.cuda.is_available() else 'cpu'); "
        "print(json.dumps(provenance.collect(device)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"torch cannot be asked about the GPU:\n{done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _chosen(steps: list[Step], only: list[str] | None) -> list[Step]:
    """The steps that were asked for, and those that close every run.

    Raises:
        ValueError: there is no step of that name.
    """
    unknown = set(only or ()) - {step.name for step in steps}
    if unknown:
        names = ", ".join(step.name for step in steps)
        missing = ", ".join(sorted(unknown))
        raise ValueError(f"--only: no step is called {missing}; there are {names}")
    return [step for step in steps if only is None or step.name in only or step.closing]


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python benchmarks/gpu.py``."""
    begin = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.commit:
        os.environ["VOVNET_FAST_COMMIT"] = options.commit  # The steps write it into their rows.
    try:
        provenance = _provenance()
    except (RuntimeError, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        return 2
    if "gpu" not in provenance and not options.rehearse:
        print(
            "torch sees no GPU, and everything here needs one: run this on a machine with an "
            "NVIDIA GPU, or try the steps with --rehearse",
            file=sys.stderr,
        )
        return 2
    if options.rehearse:
        provenance["rehearsal"] = "nothing was measured that counts, and nothing ran on a GPU"
    name = re.sub(r"[^a-z0-9]+", "-", provenance.get("gpu", "cpu").lower()).strip("-")
    date = provenance["date"].partition("T")[0]
    out = Path(options.out.format(date=date, gpu=name, commit=provenance["commit"])).resolve()
    seconds = options.seconds or (PATIENT if options.rehearse else 540.0)
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Folder(out, Path(scratch))
        make = Maker(folder, options.rehearse, Carried(options.cache, options.wheel))
        try:
            steps = _chosen(plan(make), options.only)
        except ValueError as error:
            parser.error(str(error))
        folder.create(provenance)
        seconds -= time.monotonic() - begin
        run = Run(folder, steps, seconds, provenance, notes=make.notes)
        good = run.all()
    print(f"\n{run.show()}\nresults in {out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
