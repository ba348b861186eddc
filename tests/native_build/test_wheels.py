"""The source distribution, and the wheel that pip makes of it where there is no nvcc.

It is built as pip builds it, in an environment of its own, which has no torch.
"""

import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")

from native_build import toolchain
from tests.native_build.building import (
    ROOT,
    doctor,
    extension,
    install,
    pip_wheel,
    run,
    sources,
)
from vovnet_fast import __version__

for package in ("ninja", "pybind11"):
    pytest.importorskip(package, reason=f"building without pip takes {package}")

try:
    COMPILER = toolchain.find_compiler()
except toolchain.Missing as missing:
    pytest.skip(f"needs a C++ compiler: {missing}", allow_module_level=True)


@pytest.fixture(scope="module")
def unpacked(once, tmp_path_factory):
    """The source distribution."""
    return sources(once, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def cpu_build(unpacked, tmp_path_factory):
    """The wheel without CUDA, and what pip said."""
    return pip_wheel(unpacked, tmp_path_factory.mktemp("cpu"))


@pytest.fixture(scope="module")
def cpu_site(cpu_build, tmp_path_factory):
    return install(cpu_build[0], tmp_path_factory.mktemp("site") / "cpu")


def test_the_source_distribution_is_complete(unpacked):
    here = {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.is_file()}
    there = {str(p.relative_to(unpacked)) for p in unpacked.glob("csrc/**/*") if p.is_file()}
    assert there == {name for name in here if not name.startswith("csrc/cuda_on_cpu/")}
    assert (unpacked / "vovnet_fast/kernels/__init__.py").is_file()
    assert not list(unpacked.glob("**/*.so"))


def test_without_nvcc_the_cpu_half_is_built(cpu_build, cpu_site):
    wheel, said = cpu_build
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"vovnet_fast-{__version__}-{python}-{python}-")
    assert "built without its CUDA half: CUDA_HOME=/nowhere has no bin/nvcc" in said
    assert not re.findall(r"csrc/.*warning: .*", said)

    found = doctor(cpu_site)  # With its self-test.
    built = found["extension"]
    assert built["vovnet_fast._C"].startswith(f"{__version__}, {cpu_site}")
    assert built["compiler"] == COMPILER.version
    assert "-O3" in built["flags"]
    assert "baseline" in built["instruction sets"]
    assert built["CUDA half"] == "not built"
    assert found["backends"]["cpu"] == "usable"
    assert "was built without its cuda half" in found["backends"]["cuda"]
    checks = [check for check in found["self-test"] if check["backend"] == "cpu"]
    assert len(checks) >= 19
    assert all(check["passed"] for check in checks)


def test_the_extension_needs_nothing_of_torch(cpu_site):
    told = run("readelf", "-d", extension(cpu_site), cwd=cpu_site).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", told))
    assert needed <= {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64"}
    told = run("nm", "-D", "--defined-only", extension(cpu_site), cwd=cpu_site).stdout
    # Templates of the standard library may be shared between modules.
    own = [line.split()[2] for line in told.splitlines() if line.split()[1] not in "WVu"]
    assert own == ["PyInit__C"]


def test_no_function_of_an_instruction_set_is_shared(unpacked, cpu_build):
    """The linker keeps one of those that several files have: the wrong one, on old processors."""
    objects = sorted(unpacked.glob("build/temp.*/csrc/cpu/*_kernels.avx*.o"))
    assert objects
    for path in objects:
        told = run("nm", "-C", "--defined-only", path, cwd=unpacked).stdout
        lines = [line.split(maxsplit=2) for line in told.splitlines()]
        shared = [words[2] for words in lines if words[1] in "WVu"]
        isa = path.name.split(".")[1]
        apart = (f"::{isa}::", "DW.ref.")  # The latter are addresses, for exceptions.
        assert [name for name in shared if not any(x in name for x in apart)] == [], path.name


def test_it_shares_the_threads_of_torch(cpu_site):
    """One OpenMP runtime in the process, with as many threads as torch is told to use."""
    code = (
        "import os, sys, torch; torch.set_num_threads(2)\n"
        "from vovnet_fast.backends import cpu\n"
        "def threads(): return len(os.listdir('/proc/self/task'))\n"
        "x = torch.ones(1, 256, 256, 64); out = torch.empty_like(x)\n"
        "torch.add(x, x, out=out)\n"
        "before = threads(); cpu.apply_gates(x, None, x, out); after = threads()\n"
        "runtimes = {l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.split('/')[-1]}\n"
        "print(before, after, *runtimes)"
    )
    done = run(sys.executable, "-c", code, cwd=cpu_site, PYTHONPATH=cpu_site, OMP_NUM_THREADS=None)
    before, after, *runtimes = done.stdout.split()
    assert before == after, done.stdout
    assert len(runtimes) == 1, done.stdout


@pytest.fixture
def venv(tmp_path):
    """A virtual environment: gone after the test, unlike other folders of it."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.7.1", "2.13.0", "2.14.1"])
def test_one_wheel_serves_every_version_of_torch(cpu_build, venv, version):
    """Gigabytes, where pip finds no build of that torch for CPUs (PIP_EXTRA_INDEX_URL)."""
    python = venv / "bin" / "python"
    words = [python, "-m", "pip", "install", f"torch=={version}", cpu_build[0]]
    # On a path that leads here pip would find the package installed already.
    done = run(*words, cwd=venv, PYTHONPATH=None)
    assert done.returncode == 0, done.stdout[-3000:]
    found = doctor(venv, python=python)
    assert found["versions"]["torch"].startswith(version)
    assert found["backends"]["cpu"] == "usable"


def test_nothing_is_compiled_twice(unpacked, cpu_build, tmp_path):
    done = run(
        sys.executable, "setup.py", "build_ext", "-b", tmp_path, cwd=unpacked, VOVNET_FAST_CUDA="0"
    )
    assert done.returncode == 0, done.stdout
    # Not even what sees pybind11 in another place than in pip's environment.
    assert re.findall(r"compiling (\S+)", done.stdout) == []
