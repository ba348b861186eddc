"""Other machines than this: what is compiled, with which flags, and what the wheel is called."""

import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")

from native_build import plan, toolchain

ROOT = Path(__file__).resolve().parents[2]
CROSS = "aarch64-linux-gnu-g++"
COMPILER = toolchain.Compiler(("c++",), "a compiler", ("-fopenmp",))


@pytest.fixture
def platform(monkeypatch):
    """Makes Python say that it is on another platform, with a compiler that accepts all flags."""

    def pretend(name, system="linux"):
        monkeypatch.setenv("_PYTHON_HOST_PLATFORM", name)
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(toolchain, "accepts", lambda compiler, flags: True)
        monkeypatch.setattr(plan, "_includes", lambda folder: [])
        monkeypatch.chdir(ROOT)

    return pretend


def steps(folder):
    """What would be run, and the header that tells how it was built."""
    found = plan.Plan("1", COMPILER, None, (), debug=False).steps(folder, folder / "x.so")
    return found, (folder / "build_information.h").read_text()


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("linux-x86_64", "x86_64"),
        ("linux-aarch64", "aarch64"),
        ("linux-ppc64le", "ppc64le"),
        ("linux-i686", "i686"),
        ("win-amd64", "x86_64"),
        ("win-arm64", "aarch64"),
        ("macosx-10.9-x86_64", "x86_64"),
        ("macosx-11.0-arm64", "aarch64"),
        ("macosx-10.13-universal2", "universal2"),
    ],
)
def test_the_machine_of_a_platform(name, machine, platform):
    platform(name)
    assert toolchain.machine() == machine


def test_the_machine_is_that_of_the_processor(monkeypatch):
    """Without the word of a cross-compiling tool."""
    monkeypatch.delenv("_PYTHON_HOST_PLATFORM", raising=False)
    told = os.uname()
    other = os.uname_result((*tuple(told)[:4], "aarch64"))
    monkeypatch.setattr(os, "uname", lambda: other)
    assert sysconfig.get_platform() == "linux-aarch64"
    assert toolchain.machine() == "aarch64"


@pytest.mark.parametrize("name", ["linux-aarch64", "linux-ppc64le", "linux-i686"])
def test_instruction_sets_of_x86_are_for_x86(name, platform, tmp_path):
    platform(name)
    found, information = steps(tmp_path)
    words = [word for step in found for word in step.words]
    assert not [word for word in words if word.startswith(("-m", "-DVF_WITH_"))]
    assert {word for word in words if word.startswith("-DVF_ISA=")} == {"-DVF_ISA=baseline"}
    assert not [step for step in found if "amx" in step.what]
    expected = "neon" if name == "linux-aarch64" else "baseline"
    assert f'#define VF_BUILD_ISAS "{expected}"\n' in information


def test_instruction_sets_of_x86(platform, tmp_path):
    platform("linux-x86_64")
    found, information = steps(tmp_path)
    words = {word for step in found for word in step.words}
    assert {"-mavx2", "-mavx512f", "-mamx-tile", "-DVF_WITH_AVX2=1"} <= words
    assert (
        '#define VF_BUILD_ISAS "baseline avx2 avxvnni avx512 avx512vnni avx512bf16 amx"\n'
        in information
    )


def test_an_instruction_set_of_another_machine_is_an_error(platform, tmp_path, monkeypatch):
    platform("linux-aarch64")
    monkeypatch.setenv("VOVNET_FAST_BUILD_ISAS", "avx2")
    with pytest.raises(plan.OptionError, match="there is no 'avx2'; choose from baseline"):
        steps(tmp_path)


@pytest.mark.parametrize(
    ("name", "system", "made_for"),
    [
        ("linux-aarch64", "linux", []),
        ("macosx-11.0-arm64", "darwin", ["arm64"]),
        ("macosx-10.9-x86_64", "darwin", ["x86_64"]),
        ("macosx-10.13-universal2", "darwin", ["x86_64", "arm64"]),
    ],
)
def test_macos_is_told_what_the_tag_says(name, system, made_for, platform, tmp_path):
    """A wheel for both processors holds the code of both."""
    platform(name, system)
    for step in steps(tmp_path)[0]:
        told = [step.words[i + 1] for i, word in enumerate(step.words) if word == "-arch"]
        assert told == made_for, step.what


def test_a_compiler_for_another_machine_is_refused(monkeypatch):
    """Its wheel would install, and not load."""
    try:
        toolchain.find_compiler()
    except toolchain.Missing as missing:
        pytest.skip(str(missing))
    here = toolchain.machine()
    other = "aarch64" if here == "x86_64" else "x86_64"
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", f"linux-{other}")
    expected = f"makes code for {here}, and the wheel is for {other}: name another one in CXX"
    with pytest.raises(toolchain.Missing, match=expected):
        toolchain.find_compiler()


_BINDINGS = """
#include <Python.h>
PyMODINIT_FUNC PyInit__C() { return nullptr; }
"""
_AARCH64 = 183  # e_machine of an ELF file.


def test_a_wheel_for_aarch64(tmp_path):
    """Its tag, and what is in it."""
    if shutil.which(CROSS) is None:
        pytest.skip(f"there is no {CROSS}: apt install g++-aarch64-linux-gnu")
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    for name in ("native_build", "vovnet_fast"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/bindings.cpp").write_text(_BINDINGS)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=tmp_path,
        env={**os.environ, "CXX": CROSS, "_PYTHON_HOST_PLATFORM": "linux-aarch64"}
        | {"VOVNET_FAST_CUDA": "0", "VOVNET_FAST_EXTENSION": "1", "CXXFLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    [wheel] = (tmp_path / "dist").glob("*.whl")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"vovnet_fast-.*-{python}-{python}-linux_aarch64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        [extension] = [n for n in archive.namelist() if re.match(r"vovnet_fast/_C\..*so$", n)]
        header = archive.read(extension)[:20]
    assert struct.unpack("<H", header[18:]) == (_AARCH64,)
