"""Building the package as people do, and asking what was built.

What tests of it share. Compiling takes minutes, so they start from what an installation has
compiled, and what several of them look at is built once (:class:`tests.once.Once`).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

from native_build import toolchain
from tests.features import require_pip

ROOT = Path(__file__).resolve().parents[2]


def environment(**changes):
    """This one without what tells how to build, and with changes; None takes one out."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VOVNET_FAST_")}
    changed = {**kept, "CUDA_HOME": "/nowhere", "LC_ALL": "C", **changes}
    return {k: str(v) for k, v in changed.items() if v is not None}


def run(*words, cwd, **changes):
    """What a command prints, and whether it fails."""
    return subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pip_wheel(source, folder, *options, **changes):
    require_pip()
    done = run(
        sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", *options, "-w", folder, source,
        cwd=folder, **changes,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    return next(folder.glob("*.whl")), done.stdout


def install(wheel, folder):
    """A folder to import the package of a wheel from."""
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wheel]
    subprocess.run(words, check=True)
    return folder


def doctor(site, *options, python=sys.executable):
    """What the doctor says of an installed package, checked to be that one."""
    words = [python, "-m", "vovnet_fast.tools.cli", "doctor", "--json", *options]
    done = run(*words, cwd=site, PYTHONPATH=site, VOVNET_FAST_CACHE=site / "cache")
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert str(site) in found["versions"]["vovnet_fast"]
    return found


def unpack(folder):
    """Unpack the source distribution into ``folder/sources``, with what an installation compiled.

    That is compiled again if a file differs, or is missing.
    """
    done = run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    archive = next(folder.glob("vovnet_fast-*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    os.rename(unpacked, folder / "sources")
    for path in ROOT.glob("build/temp.*"):
        shutil.copytree(path, folder / "sources" / "build" / path.name)


def sources(once, folder):
    """A copy of them, to build in."""
    shutil.copytree(once.folder("sdist", unpack) / "sources", folder / "sources")
    return folder / "sources"


def extension(site):
    return next((site / "vovnet_fast").glob("_C.*"))


class CudaBuild(NamedTuple):
    """The wheel with both halves, for sm_90a, and how it was built.

    Of the convolution for sm_80 it has a few tiles: compiling all of them takes a minute.

    Attributes:
        site: a folder to import the package from.
        objects: of csrc/cuda, by the path of their source below it, as ``conv_sm90/float16.cu``.
        said: what nvcc printed about each source, by the same.
    """

    site: Path
    objects: dict[str, Path]
    said: dict[str, str]


_LOGGED = re.compile(r"^\[\d+/\d+\] (?:compiling csrc/cuda/(\S+) for .*|.*)$", re.MULTILINE)


def cuda_build(once):
    """Build it, or find it built; skips where there is no nvcc."""
    try:
        home = toolchain.find_nvcc().path.resolve().parents[1]
    except toolchain.Missing as missing:
        pytest.skip(str(missing))

    def make(folder):
        changes = dict(VOVNET_FAST_CUDA="1", VOVNET_FAST_CUDA_ARCHS="9.0a", CUDA_HOME=None)
        changes["NVCC_APPEND_FLAGS"] = "-DVF_CONV_SM80_FEW"
        if not shutil.which("nvcc"):
            changes["CUDA_HOME"] = home
        # test_wheels.py shows that an isolated build works.
        copy = sources(once, folder)
        for path in copy.glob("build/temp.*/csrc/cuda"):
            shutil.rmtree(path)  # Nothing would be said of what is compiled already.
        wheel, _ = pip_wheel(copy, folder, "--no-build-isolation", **changes)
        install(wheel, folder / "site")

    folder = once.folder("cuda_build", make)
    (objects,) = folder.glob(f"sources/build/temp.*-{sys.implementation.cache_tag}")
    _, *parts = _LOGGED.split((objects / "build.log").read_text())
    said = {name: text for name, text in zip(parts[::2], parts[1::2]) if name}
    paths = {name: objects / "csrc/cuda" / Path(name).with_suffix(".90a.o") for name in said}
    return CudaBuild(folder / "site", paths, said)
