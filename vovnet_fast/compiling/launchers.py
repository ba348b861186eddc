"""The C modules with which Triton talks to CUDA's driver, built where there may be none.

Triton compiles them when they are first needed and keeps them in its cache beside the
kernels: one for a device's properties, and before Triton 3.7 one more for each list of
argument types. They depend on the version of Python. A C compiler, Python's headers and the
driver's library are needed; a library that only has the names stands in for the last.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

LIBRARY = "libcuda.so.1"


class Module(NamedTuple):
    """A module of C, by the name that Triton imports it under, and its source."""

    name: str
    source: str


def utilities() -> Module:
    """The module that every process needs."""
    from triton.backends.nvidia import driver

    return Module("cuda_utils", Path(driver.dirname, "driver.c").read_text(encoding="utf-8"))


def of(compiled: Any) -> Module | None:
    """The module that launches a compiled kernel, where it is not the same for all."""
    from triton.backends.nvidia import driver

    make = getattr(driver, "make_launcher", None)
    if make is None:
        return None
    source = compiled.src
    tensors = getattr(compiled.metadata, "tensordesc_meta", None)
    return Module("__triton_launcher", make(source.constants, dict(source.signature), tensors))


def build(module: Module) -> None:
    """Compile a module into Triton's cache, if it is not there. It is not imported.

    Raises:
        RuntimeError: there is no C compiler.
        subprocess.CalledProcessError: the compiler refused.
    """
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    with _nothing_imported(), _library_folders(module.source) as folders:
        compile_module_from_src(
            src=module.source,
            name=module.name,
            library_dirs=[driver.libdevice_dir, *folders],
            include_dirs=driver.include_dirs,
            libraries=driver.libraries,
        )


@contextlib.contextmanager
def _nothing_imported() -> Iterator[None]:
    """Keep Triton from importing the module that it has compiled, which would need the driver."""
    from triton.runtime import build

    load = build._load_module_from_path
    build._load_module_from_path = lambda name, path: None
    try:
        yield
    finally:
        build._load_module_from_path = load


@contextlib.contextmanager
def _library_folders(source: str) -> Iterator[list[str]]:
    """Where the linker finds the driver's library, or one that only has its names."""
    from triton.backends.nvidia import driver

    try:
        found = driver.libcuda_dirs()
    except (AssertionError, OSError, subprocess.CalledProcessError):
        found = []
    if found:
        yield found
        return
    with tempfile.TemporaryDirectory() as folder:
        names = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\()", source)))
        path = Path(folder, "names.c")
        path.write_text("".join(f"void {name}(void) {{}}\n" for name in names), encoding="utf-8")
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise RuntimeError("there is no C compiler: install gcc, or name one in CC")
        # Named as the driver's: the linker notes that name, and drops what lends it no name.
        words = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", path.name, "-o", LIBRARY]
        subprocess.run(words, cwd=folder, check=True, capture_output=True)
        yield [folder]
