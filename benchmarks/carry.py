"""Compile here what ``benchmarks/gpu.py`` needs on a machine with a GPU: ``make gpu-carry``.

``python benchmarks/carry.py --out FOLDER --arch sm_90`` leaves two files there, and needs no GPU:

* ``kernels.tar.xz``: Triton's kernels of the headline's networks, inference and training step,
  those that tuning measures, and those that compute-sanitizer watches;
* a wheel of this package whose extension has the CUDA half for that GPU, with a digest of its
  sources in its name.

It has to run under the Python, the Triton and the sources of that machine: what does not fit there
is not used. ``python benchmarks/gpu.py --cache FILE --wheel FILE`` takes them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # As a script, it would only find what lies beside it.

from benchmarks.evidence import carried  # noqa: E402

KERNELS = "kernels.tar.xz"


def compile_kernels(file: Path, arch: str) -> None:
    """Compile them on all cores, and pack them (:mod:`benchmarks.precompile`).

    Raises:
        subprocess.CalledProcessError: a kernel cannot be compiled.
    """
    _run([sys.executable, "benchmarks/precompile.py", "--arch", arch, "--out", str(file)])


def build_wheel(out: Path, arch: str) -> Path:
    """Build it, and put the digest of the sources into its name; others in the folder go.

    Raises:
        subprocess.CalledProcessError: it cannot be built.
    """
    digits, tag = arch.removeprefix("sm_"), carried.build_tag()
    variables = {
        "VOVNET_FAST_EXTENSION": "1",
        "VOVNET_FAST_CUDA": "1",
        "VOVNET_FAST_CUDA_ARCHS": f"{digits}a" if digits == "90" else digits,
        "VOVNET_FAST_BUILD_ISAS": "avx2",  # Of the CPU half, which is not what is measured.
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(ROOT)]
        _run(command, **variables)
        [built] = Path(folder).glob("*.whl")
        name, version, *tags = built.name.split("-")
        for old in out.glob(f"{name}-*.whl"):
            old.unlink()
        wheel = out / "-".join([name, version, tag, *tags])
        wheel.write_bytes(built.read_bytes())
    return wheel


def _run(command: Sequence[str], **variables: str) -> None:
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, **variables})


def make(out: Path, arch: str, wanted: Sequence[str]) -> Iterator[Path]:
    """Make what is wanted, ``kernels`` and ``wheel``."""
    out.mkdir(parents=True, exist_ok=True)
    if "kernels" in wanted:
        compile_kernels(out / KERNELS, arch)
        yield out / KERNELS
    if "wheel" in wanted:
        yield build_wheel(out, arch)


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python benchmarks/carry.py``."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/carry.py",
        description="Compile what benchmarks/gpu.py needs on another machine with a GPU.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for both files")
    parser.add_argument("--arch", default="sm_90", help="of that GPU (default: %(default)s)")
    parser.add_argument(
        "--only", choices=("kernels", "wheel"), help="one of the two (default: both)"
    )
    options = parser.parse_args(arguments)
    wanted = [options.only] if options.only else ["kernels", "wheel"]
    begin = time.monotonic()
    try:
        for path in make(options.out.resolve(), options.arch, wanted):
            size, seconds = path.stat().st_size / 1e6, time.monotonic() - begin
            print(f"{path}: {size:.1f} MB, after {seconds:.0f} s", flush=True)
    except subprocess.CalledProcessError as error:
        print(f"cannot make it: {' '.join(error.cmd[:6])} ended with {error.returncode}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
