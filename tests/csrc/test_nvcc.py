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
pytest.importorskip("pybind11", reason="native_build takes it")

from native_build import architectures
from tests.csrc.cuda_on_cpu import kernel_files
from tests.native_build.building import cuda_build

ARCHITECTURES = [
    # Each takes a quarter of a minute of a core. These three have the instructions of 80.
    pytest.param(
        arch, id=arch.name, marks=[pytest.mark.slow] if arch.number in (86, 87, 89) else []
    )
    for arch in architectures.default(range(1000), "aarch64")
]
"""What an installation compiles for."""

SAME_PTX = {86: 80, 87: 80, 89: 80, 120: 100}
"""Architectures whose PTX is that of another one, which takes two thirds of compiling."""

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


_OPTIONS = ["-O3", "-std=c++17", "-Xcompiler", "-Wall,-Wextra"]


def ptx(once, number):
    """The PTX of all files for an architecture, by the name of the file."""

    def make(folder):
        def compiled(source):
            words = [*_OPTIONS, f"-arch=compute_{number}", "-ptx", str(source)]
            said = run([cuda_tool("nvcc"), *words, "-o", str(folder / f"{source.stem}.ptx")])
            assert "warning" not in said, said

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compiled, kernel_files()))

    folder = once.folder(f"ptx_{number}", make)
    return {source.name: folder / f"{source.stem}.ptx" for source in kernel_files()}


def assemble(once, architecture, folder):
    """What ptxas says of every file, and the machine code that it makes of it."""

    def assembled(path):
        binary = folder / f"{path.stem}.cubin"
        words = ["-Xptxas", "-v", f"-arch=sm_{architecture.name}", "-cubin"]
        return run([cuda_tool("nvcc"), *words, "-o", str(binary), str(path)]), binary

    sources = ptx(once, SAME_PTX.get(architecture.number, architecture.number))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(assembled, sources.values()))


def installed(once):
    """The same of the extension as it is built for sm_90a."""
    built = cuda_build(once)
    names = [source.name for source in kernel_files()]
    assert set(names) <= built.objects.keys()
    return [(built.said[name], built.objects[name]) for name in names]


def kernels_of(said, binary):
    """The kernels of a file, from what ptxas says and from the machine code."""
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
def kernels(request, once, tmp_path_factory):
    chosen = request.param
    if f"sm_{chosen.number}" not in run([cuda_tool("nvcc"), "--list-gpu-code"]).split():
        pytest.skip(f"this nvcc does not know sm_{chosen.number}")
    if chosen.name == "90a":
        files = installed(once)
    else:
        files = assemble(once, chosen, tmp_path_factory.mktemp(f"sm_{chosen.name}"))
    return [kernel for file in files for kernel in kernels_of(*file)]


@pytest.mark.slow
@pytest.mark.parametrize("number", SAME_PTX)
def test_ptx_is_that_of_another_architecture(number, once):
    for name, path in ptx(once, number).items():
        own, other = (
            re.sub(r"^\.target sm_\d+$", "", text.read_text(), flags=re.MULTILINE)
            for text in (path, ptx(once, SAME_PTX[number])[name])
        )
        assert own == other, name


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
