"""The op tests of the extension's CPU half, on a build that ASan and UBSan watch.

    python -m tests.sanitize [words for pytest]

The build goes into ``build/sanitize``, with a copy of the package and of the tests, and is
not installed. It has one instruction set, this machine's own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "sanitize"
CXX = os.environ.get("CXX", "g++")

# What -fsanitize=undefined leaves out is asked for, too. Types of Python's objects, which
# "vptr" would look at, are not in the extension.
_CHECKS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr"
_FLAGS = f"-O0 -march=native {_CHECKS} -fno-sanitize-recover=all -fno-omit-frame-pointer"


def build(folder=FOLDER):
    """Build the extension and lay the package and its tests around it."""
    words = ["build", "--debug", "--build-lib", folder, "--build-temp", folder / "objects"]
    environment = {
        **os.environ,
        "VOVNET_FAST_EXTENSION": "1",
        "VOVNET_FAST_CUDA": "0",
        "VOVNET_FAST_BUILD_ISAS": "baseline",
        "CXX": CXX,
        "CXXFLAGS": _FLAGS,
        "LDFLAGS": "-fsanitize=address,undefined",
    }
    subprocess.run([sys.executable, "setup.py", *words], cwd=ROOT, env=environment, check=True)
    shutil.copytree(ROOT / "tests", folder / "tests", dirs_exist_ok=True)


def environment(folder=FOLDER):
    """For processes that use it."""
    return {
        **os.environ,
        # Python has no sanitizers, so their runtimes come first; and libstdc++, whose exceptions
        # they look for when they start.
        "LD_PRELOAD": " ".join(map(_library, ("libasan.so", "libubsan.so", "libstdc++.so"))),
        # Python and torch keep memory until the process ends.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
    }


def _library(name):
    words = [*CXX.split(), f"-print-file-name={name}"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def run(*words, folder=FOLDER):
    """Run tests with it; the exit status of pytest."""
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", folder]
    files = [f"tests/backends/test_cpu_{name}.py" for name in ("backend", "fingerprint")]
    command += ["-q", "-p", "no:cacheprovider", *words, *files]
    return subprocess.run(command, cwd=folder, env=environment(folder)).returncode


if __name__ == "__main__":
    build()
    sys.exit(run(*sys.argv[1:]))
