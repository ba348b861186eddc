"""What goes wrong while the extension is built, shown on a small one, and what is said then."""

import shutil
import sys

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")

from native_build import toolchain
from tests.native_build.building import ROOT, doctor, install, pip_wheel, run
from vovnet_fast import __version__

for package in ("ninja", "pybind11"):
    pytest.importorskip(package, reason=f"building without pip takes {package}")

try:
    toolchain.find_compiler()
except toolchain.Missing as missing:
    pytest.skip(f"needs a C++ compiler: {missing}", allow_module_level=True)

_BINDINGS = """
#include <Python.h>
int answer();
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                   nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddStringConstant(module, "version", VF_BUILD_VERSION);
  PyModule_AddIntConstant(module, "answer", answer());
  return module;
}
"""


@pytest.fixture
def small(tmp_path):
    """The package with an extension of its own, which compiles in seconds."""
    folder = tmp_path / "small one"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("native_build", "vovnet_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    (folder / "csrc/cpu").mkdir(parents=True)
    (folder / "csrc/bindings.cpp").write_text(_BINDINGS)
    (folder / "csrc/cpu/answer.cpp").write_text("int answer() { return 42; }\n")
    return folder


def build(folder, *words, **changes):
    return run(sys.executable, "setup.py", "build_ext", "--inplace", *words, cwd=folder, **changes)


def test_a_path_with_a_blank(small):
    done = build(small)
    assert done.returncode == 0, done.stdout
    code = "import sys; sys.path.append('vovnet_fast'); import _C; print(_C.answer, _C.version)"
    assert run(sys.executable, "-c", code, cwd=small).stdout.split() == ["42", __version__]


def test_what_does_not_compile_is_an_error(small):
    (small / "csrc/cpu/answer.cpp").write_text("int answer() { return forty_two; }\n")
    done = build(small)
    assert done.returncode != 0
    assert "'forty_two' was not declared" in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("error: compiling csrc/cpu/answer.cpp failed; ")
    assert not list(small.glob("vovnet_fast/_C*"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"CXX": "nonesuch"}, "the C++ compiler does not work: nonesuch: No such file"),
        ({"CXX": "false"}, "the C++ compiler does not work: `false --version` fails"),
        ({"PATH": "/nowhere", "CXX": None}, "no C++ compiler was found (g++, c++, clang++)"),
    ],
)
def test_without_a_compiler_it_says_what_is_missing(small, changes, reason):
    done = build(small, **changes)
    assert done.returncode == 0, done.stdout
    assert f"vovnet_fast._C is not built, plain PyTorch and Triton do its work: {reason}" in (
        done.stdout
    )
    assert "apt install g++ python3-dev" in done.stdout
    assert not list(small.glob("vovnet_fast/_C*"))


@pytest.mark.parametrize("changes", [{"CXX": "nonesuch"}, {"VOVNET_FAST_EXTENSION": "0"}])
def test_without_the_extension_the_package_works(small, tmp_path, changes):
    wheel, said = pip_wheel(small, tmp_path, "--no-build-isolation", **changes)
    assert wheel.name == f"vovnet_fast-{__version__}-py3-none-any.whl"
    assert "vovnet_fast._C is not built" in said
    site = install(wheel, tmp_path / "site")
    found = doctor(site, "--no-self-test")
    assert "the extension vovnet_fast._C is not built" in found["extension"]["vovnet_fast._C"]
    assert found["backends"]["reference"] == "usable"
    assert found["backends"]["auto on cpu"] == "reference"
    code = "import torch, vovnet_fast as v; v.VoVNet('V-19-slim-dw-eSE')(torch.zeros(1, 3, 64, 64))"
    done = run(sys.executable, "-c", code, cwd=site, PYTHONPATH=site)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"VOVNET_FAST_CUDA": "1"}, "VOVNET_FAST_CUDA=1, but CUDA_HOME=/nowhere has no bin/nvcc"),
        ({"VOVNET_FAST_CUDA": "1", "CXX": "nonesuch"}, "VOVNET_FAST_CUDA=1, but the C++ compiler"),
        ({"VOVNET_FAST_EXTENSION": "1", "CXX": "nonesuch"}, "VOVNET_FAST_EXTENSION=1, but the C++"),
        ({"VOVNET_FAST_CUDA": "yes"}, "VOVNET_FAST_CUDA must be 0, 1 or unset, got 'yes'"),
        ({"VOVNET_FAST_EXTENSION": "2"}, "VOVNET_FAST_EXTENSION must be 0, 1 or unset, got '2'"),
        ({"VOVNET_FAST_BUILD_ISAS": "sse9"}, "VOVNET_FAST_BUILD_ISAS: there is no 'sse9'"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS must be a number from 1 on, got '0'"),
    ],
)
def test_what_cannot_be_done_is_an_error(small, changes, message):
    done = build(small, **changes)
    assert done.returncode != 0
    last = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert message in last[-1]


def _fake_nvcc(folder, version, works=True):
    """What looks like CUDA's toolkit."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *--version*) echo "release {version}, V{version}.1";;\n'
        "*--list-gpu-code*) printf 'sm_80\\nsm_90\\n';;\n"
        f"*) echo 'unsupported GNU version' >&2; exit {0 if works else 1};; esac\n"
    )
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("version", "reason"),
    [("11.8", "is of CUDA 11.8, too old"), ("12.4", "unsupported GNU version")],
)
def test_an_nvcc_that_does_not_work_is_left_out(small, tmp_path, version, reason):
    home = _fake_nvcc(tmp_path / "cuda", version, works=version == "11.8")
    done = build(small, CUDA_HOME=home)
    assert done.returncode == 0, done.stdout
    assert "built without its CUDA half: " in done.stdout
    assert reason in done.stdout
    done = build(small, CUDA_HOME=home, VOVNET_FAST_CUDA="1")
    assert done.returncode != 0
    assert "error: VOVNET_FAST_CUDA=1, but " in done.stdout
    assert reason in done.stdout


def test_wrong_architectures_are_an_error(small, tmp_path):
    home = _fake_nvcc(tmp_path / "cuda", "12.4")
    done = build(small, CUDA_HOME=home, VOVNET_FAST_CUDA_ARCHS="120")
    assert done.returncode != 0
    assert "error: VOVNET_FAST_CUDA_ARCHS: this nvcc does not know sm_120" in done.stdout
