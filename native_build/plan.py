"""From the sources to the extension: what is compiled, and with which flags."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import ExecError, OptionError

from . import toolchain
from .architectures import Architecture, written
from .ninja import Step
from .toolchain import Compiler, Nvcc

SOURCES = Path("csrc")
ISAS = "VOVNET_FAST_BUILD_ISAS"

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_AVX512BF16 = (*_AVX512, "-mavx512bf16")
_INSTRUCTION_SETS = {
    "avx2": _AVX2,
    "avxvnni": (*_AVX2, "-mavxvnni"),
    "avx512": _AVX512,
    "avx512vnni": (*_AVX512, "-mavx512vnni"),
    "avx512bf16": _AVX512BF16,
    "amx": (*_AVX512BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}
"""Beyond what every processor has; on x86-64."""

_KERNELS = "_kernels.cpp"
"""The ending of the files that are compiled for every instruction set but those of `_ALONE`."""

_ALONE = {
    "_dpbf16_kernels.cpp": ("avx512bf16",),
    "_vnni_kernels.cpp": ("avxvnni", "avx512vnni"),
    "_amx_kernels.cpp": ("amx",),
}
"""Instruction sets that a few files are compiled for, by their endings."""

_HOPPER = "conv_sm90"
"""The folder of the files that nothing but sm_90a can run."""

# Vectors wider than the baseline's registers are passed between functions that are inlined.
_WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", *_WARNINGS)
# Machine code of several architectures is alike: compressed it is a fifth, and the driver unpacks
# what a file has when the first of its kernels is launched.
_CUDA_FLAGS = ("-O3", "-std=c++17", "-Xptxas", "-v", "-Xfatbin", "-compress-all")
_CUDA_HOST_FLAGS = ",".join(("-fPIC", "-fvisibility=hidden", *_WARNINGS))


@dataclass(frozen=True)
class Plan:
    """How the extension is built.

    Attributes:
        version: of the package.
        compiler: for C++.
        nvcc: for CUDA, or None: without its CUDA half.
        architectures: of GPUs, where there is nvcc.
        debug: keep symbols.
    """

    version: str
    compiler: Compiler
    nvcc: Nvcc | None
    architectures: tuple[Architecture, ...]
    debug: bool

    def steps(self, folder: Path, output: Path) -> list[Step]:
        """What has to be run, the linker at last.

        Args:
            folder: where objects go.
            output: the extension.
        """
        information = folder / "build_information.h"
        _write(information, self._information())
        compiling = [*self._cpp(folder, information), *self._cuda(folder)]
        output.parent.mkdir(parents=True, exist_ok=True)
        objects = tuple(step.output for step in compiling)
        return [*compiling, Step("link", output, objects, self._link(objects, output), "linking")]

    # ---- C++ ---------------------------------------------------------------------------

    def _instruction_sets(self) -> dict[str, tuple[str, ...]]:
        """Names and flags of what files of kernels are compiled for."""
        found: dict[str, tuple[str, ...]] = {"baseline": ()}
        for name in _wanted_instruction_sets():
            flags = _INSTRUCTION_SETS[name]
            if toolchain.accepts(self.compiler, flags):
                found[name] = flags
        return found

    def _flags(self) -> tuple[str, ...]:
        """What every C++ file is compiled with."""
        user = shlex.split(os.environ.get("CPPFLAGS", "") + " " + os.environ.get("CXXFLAGS", ""))
        debugging = ("-g",) if self.debug else ("-g0",)
        machine = toolchain.machine_flags()
        return (*_FLAGS, *self.compiler.openmp, *machine, *debugging, *user)

    def _cpp(self, folder: Path, information: Path) -> Iterator[Step]:
        sets = self._instruction_sets()
        words = [*self.compiler.command, *self._flags()]
        words += [f"-DVF_WITH_{name.upper()}=1" for name in sets if name != "baseline"]
        # These take longest, so they come first. They alone differ with CUDA.
        binding = [*words, *_includes(folder), *self._halves(), "-include", str(information)]
        for source in _files("*.cpp"):
            yield _compile(folder, source, binding, needs=(information,))
        for source in _files("cpu/*.cpp"):
            alone = [names for ending, names in _ALONE.items() if source.name.endswith(ending)]
            if alone:
                chosen = [name for name in alone[0] if name in sets]
            elif source.name.endswith(_KERNELS):
                chosen = [name for name in sets if not any(name in n for n in _ALONE.values())]
            else:
                yield _compile(folder, source, words)
                continue
            for name in chosen:
                yield _compile(folder, source, (*words, *sets[name], f"-DVF_ISA={name}"), name)

    def _halves(self) -> list[str]:
        """What tells the bindings which ops there are."""
        if self.nvcc is None:
            return []
        hopper = ["-DVOVNET_FAST_WITH_CONV_SM90=1"] if self._hopper() else []
        return ["-DVOVNET_FAST_WITH_CUDA=1", *hopper]

    # ---- CUDA --------------------------------------------------------------------------

    def _hopper(self) -> tuple[Architecture, ...]:
        """The architecture that runs the Hopper convolution, if it is one of those."""
        return tuple(a._replace(ptx=False) for a in self.architectures if a.name == "90a")

    def _cuda(self, folder: Path) -> Iterator[Step]:
        if self.nvcc is None:
            return
        words = [str(self.nvcc.path), *toolchain.host_compiler(self.compiler), *_CUDA_FLAGS]
        words += ["-Xcompiler", _CUDA_HOST_FLAGS]
        for source in _files("cuda/**/*.cu"):
            hopper = source.parent.name == _HOPPER
            chosen = self._hopper() if hopper else self.architectures
            if chosen:
                flags = [word for architecture in chosen for word in architecture.flags()]
                yield _compile(folder, source, (*words, *flags), written(chosen))

    # ---- The extension -----------------------------------------------------------------

    def _link(self, objects: Sequence[Path], output: Path) -> tuple[str, ...]:
        flags = toolchain.link_flags()
        if sys.platform == "linux":
            if self.nvcc is not None:
                # CUDA's runtime, linked statically, must not take the place of torch's own.
                flags.append("-Wl,--exclude-libs,ALL")
            if not self.debug:
                flags.append("-Wl,-s")
        flags += shlex.split(os.environ.get("LDFLAGS", ""))
        runtime = () if self.nvcc is None else self.nvcc.runtime
        return (*self.compiler.command, *flags, *map(str, objects), *runtime, "-o", str(output))

    def _information(self) -> str:
        """A header that tells the extension how it was built."""
        values = {
            "VERSION": self.version,
            "CXX": self.compiler.version,
            "FLAGS": shlex.join(self._flags()),
            "ISAS": " ".join(map(_name_of, self._instruction_sets())),
            "CUDA": "" if self.nvcc is None else self.nvcc.version,
            "ARCHS": written(self.architectures),
        }
        return "".join(
            f"#define VF_BUILD_{name} {json.dumps(value)}\n" for name, value in values.items()
        )


def _wanted_instruction_sets() -> list[str]:
    """Those beyond the baseline that the environment leaves; all of them by default.

    Raises:
        OptionError: there is none of that name.
    """
    names = list(_INSTRUCTION_SETS) if toolchain.machine() == "x86_64" else []
    words = re.split(r"[;,\s]+", os.environ.get(ISAS, "").strip(";, \t"))
    asked = [word for word in words if word]
    for word in asked:
        if word not in ("baseline", *names):
            raise OptionError(
                f"{ISAS}: there is no {word!r}; choose from baseline {' '.join(names)}"
            )
    return [name for name in names if name in asked or not asked]


def _name_of(isa: str) -> str:
    """What the extension calls it: csrc/cpu/dispatch.cpp."""
    return "neon" if isa == "baseline" and toolchain.machine() == "aarch64" else isa


def _files(*patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(SOURCES.glob(pattern))]


def _includes(folder: Path) -> list[str]:
    """Where headers of pybind11 and of Python are.

    Every isolated build has pybind11 in another place: from there everything that includes it
    would be compiled again. So its headers are copied into ``folder``, where they have changed.

    Raises:
        ExecError: there is no pybind11.
    """
    try:
        import pybind11
    except ImportError:
        raise ExecError(
            "pybind11, which is needed to build the extension, was not found: pip install pybind11"
        ) from None
    # Distributions keep it beside the headers of everything else.
    _mirror(Path(pybind11.get_include(), "pybind11"), folder / "include" / "pybind11")
    found = dict.fromkeys((str(folder / "include"), *toolchain.python_includes()))
    return [word for each in found for word in ("-isystem", each)]


def _mirror(source: Path, target: Path) -> None:
    """Make the headers below ``target`` those below ``source``; what is the same is not touched."""
    names = {path.relative_to(source) for path in source.rglob("*.h")}
    for name in sorted(names):
        _write(target / name, (source / name).read_text(encoding="utf-8"))
    for path in target.rglob("*.h"):
        if path.relative_to(target) not in names:
            path.unlink()


def _compile(
    folder: Path,
    source: Path,
    words: Sequence[str],
    variant: str = "",
    needs: tuple[Path, ...] = (),
) -> Step:
    output = folder / source.with_suffix(f".{variant.replace(' ', '_')}.o" if variant else ".o")
    what = f"compiling {source}" + (f" for {variant}" if variant else "")
    return Step("compile", output, (source,), tuple(words), what, needs)


def _write(path: Path, text: str) -> None:
    """Write a file, unless it says this already: what depends on it is compiled again."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
