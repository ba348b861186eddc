"""What nvcc makes of csrc/cuda: registers, spills, and loads and stores of whole vectors."""

import concurrent.futures
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")

from native_build import architectures
from tests.csrc.cuda_on_cpu import kernel_files

ARCHITECTURES = [
    # Each takes half a minute of a core. These three have the instructions of 80.
    pytest.param(
        arch, id=arch.name, marks=[pytest.mark.slow] if arch.number in (86, 87, 89) else []
    )
    for arch in architectures.default(range(1000), "aarch64")
]
"""What an installation compiles for."""

MAX_REGISTERS = 128
"""Of a thread: launch bounds ask for two blocks of 256 threads on a processor of 65536."""

SUMS = ("GateSums", "BatchNormSums", "ChannelSums", "depthwise_weight_grad")
"""Kernels that store sums alone, and no vectors."""

VECTOR = re.compile(r", (?:8|4)(?:, [12])?>\(")
"""In a kernel's name: it has the form for vectors, of eight halves or four floats."""


class Kernel(NamedTuple):
    """What is known of a kernel.

    Attributes:
        name: demangled.
        stack, stores, loads: bytes that it keeps, and spills, in local memory.
        registers: of a thread.
        instructions: its machine code.
    """

    name: str
    stack: int
    stores: int
    loads: int
    registers: int
    instructions: str


def tool(name, *folders):
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        pytest.skip(f"there is no {name}")
    return found


def cuda_tool(name):
    """A tool of the toolkit, or one of those that Triton brings along."""
    folders = [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return tool(name, *folders)


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


_RESOURCES = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def compile_file(source, architecture, folder):
    """The kernels of a file; what ptxas says of them, and their machine code."""
    binary = folder / f"{source.stem}.cubin"
    target = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    options = ["-O3", "-std=c++17", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra"]
    said = run([cuda_tool("nvcc"), *options, *target, "-cubin", "-o", str(binary), str(source)])
    assert "warning" not in said, said
    assembly = run([cuda_tool("cuobjdump"), "-sass", str(binary)])
    parts = re.split(r"\n\s*Function : (\S+)", assembly)
    instructions = dict(zip(parts[1::2], parts[2::2], strict=True))
    found = {name: tuple(map(int, numbers)) for name, *numbers in _RESOURCES.findall(said)}
    assert found.keys() == instructions.keys()
    names = run([tool("c++filt"), *found]).splitlines() if found else []
    return [
        Kernel(name, *found[mangled], instructions[mangled])
        for name, mangled in zip(names, found, strict=True)
    ]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request, tmp_path_factory):
    number, name = request.param.number, request.param.name
    if f"sm_{number}" not in run([cuda_tool("nvcc"), "--list-gpu-code"]).split():
        pytest.skip(f"this nvcc does not know sm_{number}")
    folder = tmp_path_factory.mktemp(f"sm_{name}")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        files = pool.map(lambda path: compile_file(path, name, folder), kernel_files())
        return [kernel for file in files for kernel in file]


def test_no_kernel_spills_or_takes_too_many_registers(kernels):
    assert len(kernels) > 100
    for kernel in kernels:
        assert (kernel.stack, kernel.stores, kernel.loads) == (0, 0, 0), kernel.name
        assert kernel.registers <= MAX_REGISTERS, (kernel.name, kernel.registers)
        assert not re.search(r"\b(LDL|STL)\b", kernel.instructions), kernel.name


def test_vectors_are_loaded_and_stored_as_such(kernels):
    vectors = [kernel for kernel in kernels if VECTOR.search(kernel.name)]
    assert len(vectors) > 40
    for kernel in vectors:
        assert re.search(r"\bLDG\.E\S*\.128\b", kernel.instructions), kernel.name
        if not any(name in kernel.name for name in SUMS):
            assert re.search(r"\bSTG\.E\S*\.128\b", kernel.instructions), kernel.name


def test_loads_are_in_flight_together(kernels):
    """Those of several pixels are issued before the first of them is stored."""
    for kernel in kernels:
        if "Accumulate<" not in kernel.name or not VECTOR.search(kernel.name):
            continue
        first_store = kernel.instructions.index("STG.E")
        loads = kernel.instructions[:first_store].count("LDG.E")
        assert loads >= 12, (kernel.name, loads)  # Four pixels of three views.
