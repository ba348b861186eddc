"""The commands of setuptools that build the extension."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import OptionError

from . import architectures, ninja, toolchain
from .architectures import Architecture
from .plan import SOURCES, Plan
from .toolchain import Compiler, Missing, Nvcc

NAME = "vovnet_fast._C"
EXTENSION, CUDA = "VOVNET_FAST_EXTENSION", "VOVNET_FAST_CUDA"

_MODES = {"": None, "0": False, "1": True}


def options() -> dict[str, Any]:
    """What ``setup`` is to be called with.

    Without an extension to build there is none for setuptools either, and the wheel is one for
    every machine.

    Raises:
        SystemExit: the extension has to be built, and cannot be.
    """
    compiler, reason = None, ""
    if _mode(EXTENSION) is False:
        reason = f"{EXTENSION}=0"
    else:
        try:
            compiler = toolchain.find_compiler()
        except Missing as missing:
            required = [variable for variable in (EXTENSION, CUDA) if _mode(variable)]
            if required:
                raise SystemExit(f"error: {required[0]}=1, but {missing}") from missing
            reason = str(missing)
    command = type("build_ext", (BuildExtension,), {"compiler_found": compiler, "reason": reason})
    return {
        "ext_modules": []
        if compiler is None
        else [Extension(NAME, [str(SOURCES / "bindings.cpp")])],
        "cmdclass": {"build": Build, "build_ext": command},
    }


def _mode(variable: str) -> bool | None:
    """Whether something is to be built; None: if it can be.

    Raises:
        SystemExit: the environment variable says something else than 0 or 1.
    """
    value = os.environ.get(variable, "")
    if value not in _MODES:
        raise SystemExit(f"error: {variable} must be 0, 1 or unset, got {value!r}")
    return _MODES[value]


class Build(build):
    """Asks for the extension also where there is none, to hear why."""

    sub_commands = [
        (name, None if name == "build_ext" else predicate) for name, predicate in build.sub_commands
    ]


class BuildExtension(build_ext):
    """Builds the extension with ninja.

    Attributes:
        compiler_found: the C++ compiler, or None.
        reason: why there is none.
    """

    compiler_found: Compiler | None
    reason: str

    def run(self) -> None:
        if self.compiler_found is None:
            self._say(f"{NAME} is not built, plain PyTorch and Triton do its work: {self.reason}")
            return
        super().run()

    def build_extension(self, ext: Extension) -> None:
        assert self.compiler_found is not None
        nvcc, chosen = self._cuda(self.compiler_found)
        version = self.distribution.get_version()
        plan = Plan(version, self.compiler_found, nvcc, chosen, bool(self.debug))
        folder, output = self._objects(), Path(self.get_ext_fullpath(ext.name))
        ninja.build(plan.steps(folder, output), folder)

    def _objects(self) -> Path:
        """Where objects are kept. Editable installs would throw theirs away."""
        if not self.editable_mode:
            return Path(self.build_temp)
        return Path("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def _cuda(self, compiler: Compiler) -> tuple[Nvcc | None, tuple[Architecture, ...]]:
        """nvcc and the architectures to compile for; None and nothing without a CUDA half.

        Raises:
            OptionError: it has to be built, and cannot be.
        """
        wanted = _mode(CUDA)
        if wanted is False:
            self._say(f"{NAME} is built without its CUDA half: {CUDA}=0")
            return None, ()
        try:
            nvcc = toolchain.find_nvcc()
            chosen = _architectures(nvcc)
            flags = [word for architecture in chosen for word in architecture.flags()]
            toolchain.check_nvcc(nvcc, compiler, flags)
        except Missing as missing:
            if wanted:
                raise OptionError(f"{CUDA}=1, but {missing}") from missing
            self._say(f"{NAME} is built without its CUDA half: {missing}")
            return None, ()
        return nvcc, chosen

    def _say(self, text: str) -> None:
        """Tell what pip shows with -v."""
        print(f"warning: {text}", flush=True)


def _architectures(nvcc: Nvcc) -> tuple[Architecture, ...]:
    text = os.environ.get(architectures.ENVIRONMENT, "")
    if text.strip():
        return architectures.parse(text, nvcc.architectures)
    return architectures.default(nvcc.architectures, toolchain.machine())
