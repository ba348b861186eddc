"""Every op of csrc/cpu, called from C++ and compared with plain formulas in fp64.

Compiled for this machine it always runs. Where there is a cross-compiler for AArch64 and qemu
(Debian: apt install g++-aarch64-linux-gnu qemu-user), the same program runs there too, made as a
wheel's objects are; `make test-aarch64` does that, which takes minutes.
"""

import concurrent.futures
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")
pytest.importorskip("pybind11", reason="native_build takes it")

from native_build import plan, toolchain
from tests.csrc.cuda_on_cpu import compiler

ROOT = Path(__file__).resolve().parents[2]
DRIVER = sorted(Path(__file__).parent.glob("cpu_driver*.cpp"))
CROSS = "aarch64-linux-gnu-"


def tool(name):
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name}: apt install g++-aarch64-linux-gnu qemu-user")
    return found


def run(*words, cwd=ROOT):
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(map(str, words))}\n{done.stdout}{done.stderr}"
    return done.stdout


def steps(folder):
    """What compiles the CPU half for the environment as it is: all but its bindings."""
    planned = plan.Plan("1", toolchain.find_compiler(), None, (), debug=False)
    found = planned.steps(folder, folder / "unused")
    return [step for step in found if step.inputs[0].parts[:2] == ("csrc", "cpu")]


def compiled(found):
    """Carry out such steps; the objects."""
    for step in found:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        words = [(*step.words, "-c", step.inputs[0], "-o", step.output) for step in found]
        list(pool.map(lambda each: run(*each), words))
    return [step.output for step in found]


def linked(program, folder, objects, *options):
    """The driver, with these objects."""
    words = [program, "-O1", "-std=c++17", "-fopenmp", "-Wall", "-Wextra", "-Werror", *options]
    target = folder / "cpu_driver"
    run(*words, *DRIVER, *objects, "-o", target)
    return target


def installed():
    """What an installation has compiled from these sources for this machine, or nothing."""
    sources = [path for path in (ROOT / "csrc").glob("**/*") if path.is_file()]
    newest = max(path.stat().st_mtime for path in sources)
    for folder in sorted(ROOT.glob("build/temp.*/csrc/cpu")):
        needed = {path.stem for path in (ROOT / "csrc/cpu").glob("*.cpp")}
        found = {path: path.name.split(".")[0] for path in sorted(folder.glob("*.o"))}
        objects = [path for path, name in found.items() if name in needed]  # Others are older.
        # Not every compiler knows AVX512-BF16 and AMX.
        if {*found.values()} >= needed - {"conv_dpbf16_kernels", "conv_amx_kernels"} and min(
            path.stat().st_mtime for path in objects
        ) > newest:
            return objects
    return []


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The driver for this machine: with the baseline alone where nothing has been compiled."""
    program, folder = compiler(), tmp_path_factory.mktemp("native")
    objects = installed()
    if not objects:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setenv("VOVNET_FAST_BUILD_ISAS", "baseline")
            patch.setenv("CXXFLAGS", "-O1")  # Optimising would take most of the time.
            objects = compiled(steps(folder))
    return linked(program, folder, objects)


@pytest.fixture
def aarch64(monkeypatch):
    """The environment of a build for AArch64."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CXX", tool(f"{CROSS}g++"))
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "linux-aarch64")


def verdict(*words):
    """The exit status, all that was printed, and how much was compared, and was wrong."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # Other tests run beside it.
    words = [str(word) for word in words]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    counts = re.search(r"^compared (\d+), wrong (\d+)$", done.stdout, re.MULTILINE)
    assert counts, done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode, done.stdout, int(counts[1]), int(counts[2])


def test_every_op_is_right(native):
    status, said, compared, wrong = verdict(native)
    assert (status, wrong) == (0, 0), said[-3000:]
    assert compared > 3000


def test_the_driver_finds_what_is_wrong(native):
    status, _, compared, wrong = verdict(native, "--spoil")
    assert status == 1
    assert wrong == compared > 3000


def chosen(*words, isa):
    """The instruction set that the environment variable makes it choose, or why it cannot."""
    environment = {**os.environ, "VOVNET_FAST_CPU_ISA": isa}
    done = subprocess.run([*words, "--isa"], env=environment, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_baseline_is_everywhere(native):
    name = "neon" if toolchain.machine() == "aarch64" else "baseline"
    assert chosen(native, isa="baseline") == name
    assert f'has no instruction set "sse9": choose one of {name}' in chosen(native, isa="sse9")


@pytest.mark.slow
def test_every_op_is_right_on_aarch64(aarch64, tmp_path):
    emulator = tool("qemu-aarch64")
    objects = compiled(steps(tmp_path))
    # Statically: the emulated program then finds no library missing.
    driver = linked(tool(f"{CROSS}g++"), tmp_path, objects, "-static", "-Wl,--no-warnings")
    status, said, compared, wrong = verdict(emulator, driver)
    assert (status, wrong) == (0, 0), said[-3000:]
    assert compared > 4000  # With the convolutions.
    assert "instruction set neon, convolutions: fma\n" in said
    for name in ("", "baseline", "neon"):
        assert chosen(emulator, driver, isa=name) == "neon"
    assert chosen(emulator, driver, isa="avx2").endswith("choose one of neon")


def listed(program, path):
    """Instructions by function."""
    found = {}
    for line in run(program, "-dC", path).splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = found.setdefault(match[1], [])
        elif line.count("\t") >= 2:
            current.append(line.split("\t", 2)[2].replace("\t", " "))
    return found


def test_aarch64_convolves_by_vectors_in_registers(aarch64, tmp_path):
    """Its inner loop multiplies four numbers at a time, and keeps every sum where it is."""
    [step] = [step for step in steps(tmp_path) if step.inputs[0].stem == "conv_fma_kernels"]
    [path] = compiled([step])
    functions = listed(tool(f"{CROSS}objdump"), path)
    [name] = [name for name in functions if "multiply_pixels<" in name and ", 5, 1>" in name]
    code = functions[name]
    products = [i for i, words in enumerate(code) if re.match(r"fmla v\d+\.4s", words)]
    loop = code[products[0] : products[-1] + 1]
    assert len(products) == 4 * 4 * 5  # Channels that go in, vectors that come out, pixels.
    assert len(loop) <= 1.25 * len(products), loop
    assert not [words for words in loop if "[sp" in words]


def test_aarch64_converts_halves_by_instructions(aarch64, tmp_path):
    [step] = [step for step in steps(tmp_path) if step.inputs[0].stem == "max_pool_kernels"]
    [path] = compiled([step])
    code = [words for each in listed(tool(f"{CROSS}objdump"), path).values() for words in each]
    for words in ("fcvtl", "fcvtn"):
        assert any(line.startswith(words) for line in code), words
