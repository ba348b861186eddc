"""Finding the compilers, and finding out whether they work."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST_CUDA = (12, 0)


class Missing(Exception):
    """A tool is missing or does not work. The message says why, and how to get it."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that works.

    Attributes:
        command: its words.
        version: the first line that it prints about itself.
        openmp: what makes it compile for the OpenMP runtime that torch loads.
    """

    command: tuple[str, ...]
    version: str
    openmp: tuple[str, ...]


@dataclass(frozen=True)
class Nvcc:
    """CUDA's compiler.

    Attributes:
        path: where it is.
        version: as in 13.0.88.
        architectures: numbers of those that it knows, as 90.
        runtime: what links its runtime statically.
    """

    path: Path
    version: str
    architectures: frozenset[int]
    runtime: tuple[str, ...]


def run(words: Sequence[str | Path]) -> str:
    """What a command prints.

    Raises:
        Missing: it cannot be run, or fails; with what it says.
    """
    try:
        done = subprocess.run(
            [os.fspath(word) for word in words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            # Messages are searched for words.
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        raise Missing(f"{words[0]}: {error.strerror}") from error
    if done.returncode != 0:
        told = "\n  ".join(done.stdout.strip().splitlines()[-8:]) or f"status {done.returncode}"
        raise Missing(f"`{shlex.join(map(str, words))}` fails:\n  {told}")
    return done.stdout


# --------------------------------------------------------------------------------------
# C++
# --------------------------------------------------------------------------------------

_HOW_TO_GET_CXX = (
    "install a C++17 compiler with Python's headers (Debian, Ubuntu: apt install g++ python3-dev; "
    "Fedora: dnf install gcc-c++ python3-devel; conda: conda install gxx), or name one in CXX"
)

_CXX_TRIAL = """
#include <Python.h>
#include <vector>
template <class T> int size(const std::vector<T>& values) {
  if constexpr (sizeof(T) > 1) return static_cast<int>(values.size());
  return 0;
}
extern "C" int trial() { return size(std::vector<int>(3)) + PY_MAJOR_VERSION; }
"""


_MACROS = {"x86_64": "__x86_64__", "aarch64": "__aarch64__"}
"""By which a compiler tells what it compiles for."""


def machine() -> str:
    """The processor that is compiled for, as wheels name it on Linux: x86_64, aarch64.

    ``universal2`` on macOS is both. Others have their own names.
    """
    # Cross-compiling tools set _PYTHON_HOST_PLATFORM, which this follows, as the wheel's tag does.
    name = re.split(r"[-.]", sysconfig.get_platform())[-1]
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def machine_flags() -> list[str]:
    """What makes the compiler, and the linker, work for all that the wheel's tag says."""
    if sys.platform != "darwin":
        return []
    names = {"universal2": ("x86_64", "arm64"), "aarch64": ("arm64",)}
    return [word for name in names.get(machine(), (machine(),)) for word in ("-arch", name)]


def python_includes() -> list[str]:
    """The folders of Python.h and of what it includes."""
    return list(dict.fromkeys((sysconfig.get_path("include"), sysconfig.get_path("platinclude"))))


def find_compiler() -> Compiler:
    """The C++ compiler: ``CXX``, or what is on the path.

    Raises:
        Missing: there is none, or it cannot make an extension of Python.
    """
    if sys.platform == "win32":
        raise Missing("the extension is not made for Windows; use WSL")
    named = shlex.split(os.environ.get("CXX", ""))
    words = named or [next(filter(shutil.which, ("g++", "c++", "clang++")), "")]
    if not words[0]:
        raise Missing(f"no C++ compiler was found (g++, c++, clang++): {_HOW_TO_GET_CXX}")
    try:
        version = run([*words, "--version"]).strip().splitlines()[0]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "trial.cpp")
            source.write_text(_CXX_TRIAL, encoding="utf-8")
            folders = [word for include in python_includes() for word in ("-isystem", include)]
            flags = ["-std=c++17", "-fPIC", *machine_flags(), *folders]
            run([*words, *flags, "-c", source, "-o", f"{folder}/trial.o"])
            run([*words, *link_flags(), f"{folder}/trial.o", "-o", f"{folder}/trial.so"])
    except (Missing, IndexError) as error:
        raise Missing(
            f"the C++ compiler does not work: {error or 'it says no version'}\n{_HOW_TO_GET_CXX}"
        ) from error
    macros = run([*words, "-dM", "-E", "-x", "c++", os.devnull])
    _check_machine(" ".join(words), macros)
    return Compiler(tuple(words), version, _openmp(macros))


def _check_machine(compiler: str, macros: str) -> None:
    """A wheel with another processor's code would install, and not load.

    Raises:
        Missing: the compiler makes code for another processor than the wheel is for.
    """
    wanted = machine()
    if sys.platform == "darwin" or wanted not in _MACROS or sys.maxsize < 1 << 32:
        return  # It is told by machine_flags; it is not known here; tags say 32 bits by themselves.
    if f"#define {_MACROS[wanted]} " not in macros:
        made = next((name for name, macro in _MACROS.items() if macro in macros), "another one")
        raise Missing(
            f"the C++ compiler {compiler} makes code for {made}, and the wheel is for {wanted}: "
            "name another one in CXX, or, to compile for another machine, what Python calls that "
            "one in _PYTHON_HOST_PLATFORM, as in linux-aarch64"
        )


def _openmp(macros: str) -> tuple[str, ...]:
    """GCC's runtime is the one that torch brings. That of Clang would be a second one, and
    csrc/cpu/threads.cpp finds the one that is there."""
    return ("-fopenmp-simd",) if "__clang__" in macros else ("-fopenmp",)


def link_flags() -> list[str]:
    """What makes a module that finds Python, and the OpenMP runtime, in the process."""
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup", *machine_flags()]
    return ["-shared"]


def accepts(compiler: Compiler, flags: Sequence[str]) -> bool:
    """Whether the compiler knows all of these flags."""
    try:
        run([*compiler.command, *flags, "-x", "c++", "-c", os.devnull, "-o", os.devnull])
    except Missing:
        return False
    return True


# --------------------------------------------------------------------------------------
# CUDA
# --------------------------------------------------------------------------------------

_HOW_TO_GET_NVCC = (
    "install the CUDA toolkit, 12.0 or newer (the packages nvcc, cudart-dev and cccl are enough), "
    "and put nvcc on the PATH or its folder into CUDA_HOME"
)

_CUDA_TRIAL = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdexcept>
__global__ void fill(float* out) { out[threadIdx.x] = __bfloat162float(__float2bfloat16_rn(1)); }
void trial(float* out) {
  fill<<<1, 32>>>(out);
  if (cudaGetLastError() != cudaSuccess) throw std::runtime_error("trial");
}
"""


def find_nvcc() -> Nvcc:
    """nvcc: from ``CUDA_HOME`` if that is set, or from where it usually is.

    Raises:
        Missing: there is none, or it is too old.
    """
    path = next(filter(os.path.isfile, _nvcc_paths()), None)
    if path is None:
        home = os.environ.get("CUDA_HOME")
        where = f"CUDA_HOME={home} has no bin/nvcc" if home else "nvcc was not found"
        raise Missing(f"{where}: {_HOW_TO_GET_NVCC}")
    match = re.search(r"release (\d+)\.(\d+), V([\d.]+)", run([path, "--version"]))
    if match is None:
        raise Missing(f"{path} --version says no version: {_HOW_TO_GET_NVCC}")
    if (int(match[1]), int(match[2])) < OLDEST_CUDA:
        raise Missing(f"{path} is of CUDA {match[1]}.{match[2]}, too old: {_HOW_TO_GET_NVCC}")
    listed = re.findall(r"^sm_(\d+)$", run([path, "--list-gpu-code"]), re.MULTILINE)
    return Nvcc(path, match[3], frozenset(map(int, listed)), _runtime(path))


def _runtime(nvcc: Path) -> tuple[str, ...]:
    """What nvcc itself would link with: toolkits keep it in different folders."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cu")
        source.touch()
        told = run([nvcc, "--dryrun", source, "-o", f"{folder}/trial"])
    match = re.search(r"^#\$ LIBRARIES=(.*)$", told, re.MULTILINE)
    folders = shlex.split(match[1]) if match else []
    top = nvcc.resolve().parents[1]  # Where packages of PyPI have them.
    return (*folders, f"-L{top / 'lib'}", "-lcudart_static", "-lrt", "-lpthread", "-ldl")


def _nvcc_paths() -> Iterator[Path]:
    home = os.environ.get("CUDA_HOME")
    if home:
        yield Path(home, "bin", "nvcc")
        return
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    yield Path("/usr/local/cuda/bin/nvcc")
    packages = importlib.util.find_spec("nvidia")  # Of nvidia-cuda-nvcc on PyPI.
    for folder in (packages and packages.submodule_search_locations) or ():
        yield from sorted(Path(folder).glob("*/bin/nvcc"), reverse=True)


def check_nvcc(nvcc: Nvcc, compiler: Compiler, flags: Sequence[str]) -> None:
    """Compile a small kernel and link it.

    Args:
        nvcc: to be checked.
        compiler: what compiles its host code.
        flags: architectures.

    Raises:
        Missing: that fails, as it does without CUDA's headers, or with a C++ compiler that is
            too new for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cu")
        source.write_text(_CUDA_TRIAL, encoding="utf-8")
        words = [str(nvcc.path), *host_compiler(compiler), "-std=c++17", "-Xcompiler", "-fPIC"]
        try:
            run([*words, *flags, "-c", source, "-o", f"{folder}/trial.o"])
            linking = [*link_flags(), f"{folder}/trial.o", *nvcc.runtime]
            run([*compiler.command, *linking, "-o", f"{folder}/trial.so"])
        except Missing as error:
            raise Missing(f"nvcc does not work: {error}\n{_HOW_TO_GET_NVCC}") from error


def host_compiler(compiler: Compiler) -> list[str]:
    """What tells nvcc which C++ compiler to use. It takes a program, without ccache or flags."""
    program = [word for word in compiler.command if not word.startswith("-")][-1]
    return ["-ccbin", shutil.which(program) or program]
