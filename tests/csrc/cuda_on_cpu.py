"""Builds the kernels of csrc/cuda for the host: their grids then run on the CPU.

``csrc/cuda_on_cpu/cuda_on_cpu.h`` says what that is good for. The module it makes,
``_cuda_on_cpu``, has the functions of ``vovnet_fast._C.cuda``; it is never installed.
"""

import concurrent.futures
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
MODULE = "VOVNET_FAST_CUDA_ON_CPU"
"""Path of the kernels on the host, where they are built already: with sanitizers."""

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
_PRAGMAS = ("-Wno-unknown-pragmas",)  # nvcc's own: how to unroll.


def compiler():
    """The C++ compiler; skips the test where there is none, which in CI there must be."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if found is None or importlib.util.find_spec("pybind11") is None:
        reason = "running kernels on the host takes a C++ compiler and pybind11"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return found


def kernel_files():
    """The .cu files of memory-bound ops."""
    return sorted((CSRC / "cuda").glob("*.cu"))


def conv_files():
    """Those of convolutions for sm_80; that for Hopper has a simulator of its own."""
    folders = (CSRC / "cuda" / name for name in ("conv_sm80", "depthwise_conv"))
    return [path for folder in folders for path in sorted(folder.glob("*.cu"))]


def build(folder, once, flags=()):
    """Compile and link the kernels in ``folder``; returns the path of the module.

    Its bindings are compiled once, without ``flags``: tests/native_build/test_sanitizers.py has
    the same templates watched.
    """
    source = CSRC / "cuda_on_cpu" / "module.cpp"
    shared = once.folder("cuda_on_cpu_bindings", lambda folder: _compiled(source, folder))
    return _module(
        folder,
        "_cuda_on_cpu",
        [shared / f"{source.parent.name}_{source.name}.o"],
        [*kernel_files(), *conv_files()],
        flags,
    )


def built(once):
    """The module, which a session of tests builds once."""
    path = os.environ.get(MODULE)
    if path is None:
        folder = once.folder("cuda_on_cpu", lambda folder: build(folder, once))
        (path,) = folder.glob("_cuda_on_cpu.*")
    return load(path)


def on_host(call, device, fields):
    """Calls one of its functions, as :class:`._extension.Ops` wants it done."""
    assert device.type == "cpu"
    call(0, **fields)


def build_module(folder, name, bindings):
    """The same with other bindings, which define a module of that name, and kernels of theirs."""
    return _module(folder, name, [_compiled(bindings, folder)])


def _module(folder, name, objects, kernels=(), flags=()):
    own = (CSRC / "cuda_on_cpu" / name for name in ("cuda_on_cpu.cpp", "warps.cpp"))
    sources = (*kernels, *own)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects += pool.map(lambda source: _compiled(source, folder, "-O1", *flags), sources)
    module = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run([compiler(), *flags, "-shared", *map(str, objects), "-o", str(module)])
    return module


def _compiled(source, folder, *flags):
    """The object of a file. Bindings hold no kernel: there is nothing to optimise."""
    program, target = compiler(), folder / f"{source.parent.name}_{source.name}.o"
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    words = [*_FLAGS, *_PRAGMAS, "-O0", *flags, "-DVF_CUDA_ON_CPU", *includes]
    _run([program, *words, "-x", "c++", "-c", str(source), "-o", str(target)])
    return target


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


def load(path):
    """Import a module from where it was built."""
    spec = importlib.util.spec_from_file_location(Path(path).name.split(".")[0], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
