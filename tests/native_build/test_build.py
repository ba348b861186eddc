"""Building the extension: what is built where, and what is said where it cannot be.

The source distribution is built as pip builds it, in an environment of its own, which has
no torch. Compiling takes a minute or two, so builds share what they have compiled, and
what goes wrong is shown on a small extension.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")

from native_build import architectures, plan, toolchain
from native_build.architectures import Architecture
from tests import sanitize
from tests.features import require_pip
from vovnet_fast import __version__

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {75, 80, 86, 87, 89, 90, 100, 120}

for package in ("ninja", "pybind11"):
    pytest.importorskip(package, reason=f"building without pip takes {package}")

try:
    COMPILER = toolchain.find_compiler()
except toolchain.Missing as missing:
    pytest.skip(f"needs a C++ compiler: {missing}", allow_module_level=True)


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


# --------------------------------------------------------------------------------------
# The real sources
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    done = run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    archive = next(folder.glob("vovnet_fast-*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    for path in ROOT.glob("build/temp.*"):
        # What an installation has compiled is compiled again if a file differs, or is missing.
        shutil.copytree(path, unpacked / "build" / path.name, copy_function=shutil.copy2)
    return unpacked


@pytest.fixture(scope="session")
def cpu_build(sources, tmp_path_factory):
    """The wheel without CUDA, and what pip said."""
    return pip_wheel(sources, tmp_path_factory.mktemp("cpu"))


@pytest.fixture(scope="session")
def cpu_site(cpu_build, tmp_path_factory):
    return install(cpu_build[0], tmp_path_factory.mktemp("site") / "cpu")


@pytest.fixture(scope="session")
def cuda_site(sources, cpu_build, tmp_path_factory):
    """Installed with its CUDA half, and what pip said."""
    try:
        home = toolchain.find_nvcc().path.resolve().parents[1]
    except toolchain.Missing as missing:
        pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("cuda")
    changes = dict(VOVNET_FAST_CUDA="1", VOVNET_FAST_CUDA_ARCHS="9.0a", CUDA_HOME=None)
    if not shutil.which("nvcc"):
        changes["CUDA_HOME"] = home
    wheel, said = pip_wheel(sources, folder, **changes)
    return install(wheel, folder / "site"), said


def extension(site):
    return next((site / "vovnet_fast").glob("_C.*"))


def test_the_source_distribution_is_complete(sources):
    here = {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.is_file()}
    there = {str(p.relative_to(sources)) for p in sources.glob("csrc/**/*") if p.is_file()}
    assert there == {name for name in here if not name.startswith("csrc/cuda_on_cpu/")}
    assert (sources / "vovnet_fast/kernels/__init__.py").is_file()
    assert not list(sources.glob("**/*.so"))


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


def test_no_function_of_an_instruction_set_is_shared(sources, cpu_build):
    """The linker keeps one of those that several files have: the wrong one, on old processors."""
    objects = sorted(sources.glob("build/temp.*/csrc/cpu/*_kernels.avx*.o"))
    assert objects
    for path in objects:
        told = run("nm", "-C", "--defined-only", path, cwd=sources).stdout
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


def test_nothing_is_compiled_twice(sources, cpu_build, tmp_path):
    done = run(
        sys.executable, "setup.py", "build_ext", "-b", tmp_path, cwd=sources, VOVNET_FAST_CUDA="0"
    )
    assert done.returncode == 0, done.stdout
    # The bindings see pybind11 in another place than in pip's environment.
    assert set(re.findall(r"compiling (\S+)", done.stdout)) <= {"csrc/bindings.cpp"}


def test_with_nvcc_both_halves_are_built(cuda_site):
    site, said = cuda_site
    found = doctor(site, "--no-self-test")
    assert found["extension"]["CUDA half"].startswith("nvcc ")
    assert found["extension"]["GPU architectures"] == "90a"
    assert found["backends"]["cpu"] == "usable"
    assert "half" not in found["backends"]["cuda"]
    # The resources of every kernel are in the log.
    assert len(re.findall(r"Used \d+ registers", said)) >= 19
    told = run("readelf", "-d", extension(site), cwd=site).stdout
    assert not re.search("cudart|libcuda|torch|gomp", told)
    listed = run(_cuobjdump(), "--list-elf", extension(site), cwd=site).stdout
    # Some versions of cuobjdump leave the letter out.
    assert set(re.findall(r"sm_\d+", listed)) == {"sm_90"}


def _cuobjdump():
    triton = pytest.importorskip("triton", reason="Triton brings cuobjdump")
    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def test_the_op_tests_pass_under_sanitizers(tmp_path):
    """ASan and UBSan find nothing in the CPU half; what they do find ends the process."""
    sanitize.build(tmp_path)
    environment = sanitize.environment(tmp_path)
    code = (
        "import torch; from vovnet_fast.backends import _extension\n"
        "cpu = _extension.load('cpu')\n"
        "assert '-fsanitize=address' in _extension.build_info()['flags']\n"
        "x = torch.zeros({pixels} * 8); z = (x.data_ptr(), 0, 0, 8)\n"
        "cpu.apply_gates(1, z=z, out=z, identity=None, gates=None, n=1, "
        "height=1, width=5, c=8, dtype=2)"
    )
    for pixels, fails in ((5, False), (4, True)):
        words = [sys.executable, "-c", code.format(pixels=pixels)]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ("AddressSanitizer: heap-buffer-overflow" in done.stderr) == fails, done.stderr
        assert (done.returncode != 0) == fails
    assert sanitize.run("-k", "not environment", folder=tmp_path) == 0


# --------------------------------------------------------------------------------------
# What goes wrong, on a small extension
# --------------------------------------------------------------------------------------

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


# --------------------------------------------------------------------------------------
# Architectures
# --------------------------------------------------------------------------------------


def test_architectures_by_default():
    def written(known, machine="x86_64"):
        return architectures.written(architectures.default(known, machine))

    assert written(KNOWN) == "80 86 89 90a 100 120+PTX"
    assert written({80, 86, 89, 90}) == "80 86 89+PTX 90a"
    assert written(KNOWN, "aarch64") == "80 86 87 89 90a 100 120+PTX"
    assert written({80, 86, 87}, "aarch64") == "80 86 87+PTX"
    assert written({80, 87, 90}, "ppc64le") == "80+PTX 90a"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("90a", "90a"),
        ("8.0;9.0a+PTX", "80 90a+PTX"),
        ("sm_100, 80", "80 100"),
        ("12.0+ptx 8.6", "86 120+PTX"),
        ("80;8.0+PTX;80", "80+PTX"),
        ("10.0f;", "100f"),
    ],
)
def test_architectures_that_are_named(text, meant):
    assert architectures.written(architectures.parse(text, KNOWN)) == meant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hopper", "'hopper' is no architecture; write compute capabilities as in 80;90a"),
        ("8.0.1", "'8.0.1' is no architecture"),
        ("7.5", "the kernels need sm_80 (Ampere) or newer, got '7.5'"),
        ("9", "'9' is no architecture"),
        ("80a", "there is no sm_80a"),
        ("90f", "there is no sm_90f"),
        ("130", "this nvcc does not know sm_130, only sm_75, sm_80"),
    ],
)
def test_architectures_that_are_wrong(text, message):
    with pytest.raises(architectures.OptionError, match=re.escape(message)):
        architectures.parse(text, KNOWN)


def test_flags_of_an_architecture():
    assert Architecture(90, "a", ptx=True).flags() == [
        "-gencode", "arch=compute_90a,code=sm_90a",
        "-gencode", "arch=compute_90a,code=compute_90a",
    ]  # fmt: skip


def test_hopper_code_is_for_hopper_alone(monkeypatch):
    """A file of it is left out where sm_90a is, and never compiled for others."""
    nvcc = toolchain.Nvcc(Path("/nvcc"), "13.0.88", frozenset(KNOWN), ("-lcudart_static",))
    monkeypatch.chdir(ROOT)
    for text, expected in (("80;90a+PTX", ["sm_90a"]), ("80;90", [])):
        chosen = architectures.parse(text, KNOWN)
        steps = plan.Plan("1", COMPILER, nvcc, chosen, debug=False).steps
        monkeypatch.setattr(plan, "_write", lambda *args: None)
        commands = {step.what: step.words for step in steps(Path("o"), Path("build/x.so"))}
        hopper = [words for what, words in commands.items() if "conv_sm90" in what]
        assert [re.findall(r"code=(\w+)", " ".join(words)) for words in hopper] == (
            [expected] * len(hopper) if expected else []
        )
        bindings = next(words for what, words in commands.items() if "bindings" in what)
        assert ("-DVOVNET_FAST_WITH_CONV_SM90=1" in bindings) == bool(expected)
