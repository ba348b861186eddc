"""What is installed, what of it is used, and whether it computes right numbers.

:func:`examine` gathers what ``vovnet-fast doctor`` prints.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import _optional, backends, compat, selfcheck, tuning
from .._version import __version__
from ..backends import _cuda_conv, _extension, conv_sm90_fp8, depthwise_conv
from ..integrations import installed
from .config import examine as examine_config


class Fact(NamedTuple):
    """Something found out.

    Attributes:
        section: what it is about.
        name: what was looked at.
        value: what it is, in words.
    """

    section: str
    name: str
    value: str


class Check(NamedTuple):
    """What the self-test found for one function of a backend, in all dtypes and cases.

    Attributes:
        backend: its name.
        device: where it ran.
        function: of the backend.
        dtype: in which the error came closest to its limit, or went furthest beyond it.
        error: that error, against fp64; None where nothing came out.
        allowed: its limit; None where nothing came out.
        passed: whether all dtypes and cases are right.
        problem: what is wrong, or nothing.
    """

    backend: str
    device: str
    function: str
    dtype: str
    error: float | None
    allowed: float | None
    passed: bool
    problem: str

    def __str__(self) -> str:
        if not self.passed:
            return f"FAILED: {self.problem}"
        return f"error {self.error:.1e}, allowed {self.allowed:.1e} ({self.dtype})"


class Report(NamedTuple):
    """All that was found out.

    Attributes:
        facts: section by section.
        checks: of every function of every usable backend; none without a self-test.
        problems: what does not go together, and what to do about it.
    """

    facts: tuple[Fact, ...]
    checks: tuple[Check, ...]
    problems: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether everything that claims to be usable is right, and whether all goes together."""
        return all(check.passed for check in self.checks) and not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        by_section = itertools.groupby(self.facts, lambda fact: fact.section)
        return {
            "healthy": self.healthy,
            **{section: {f.name: f.value for f in facts} for section, facts in by_section},
            "problems": list(self.problems),
            "self-test": [check._asdict() for check in self.checks],
        }


def examine(*, self_test: bool = True, config: str | os.PathLike[str] | None = None) -> Report:
    """Look at everything.

    Args:
        config: a training config to look at too (:mod:`.config`).
        self_test: run every function of every backend that can run here; seconds on a CPU,
            minutes on a GPU for which nothing was compiled before.
    """
    sections = {
        "versions": _versions,
        "CUDA": _cuda,
        "extension": _built,
        "backends": _usable,
        "engines": _engines,
        "settings": _settings,
    }
    facts = tuple(fact for section, look in sections.items() for fact in _section(section, look()))
    problems = installed.problems()
    for finding in [] if config is None else examine_config(config):
        facts += (Fact("config", finding.name, finding.value),)
        if finding.wrong:
            problems.append(f"{finding.name}: {finding.value}")
    return Report(facts, tuple(_checks()) if self_test else (), tuple(problems))


_Found = Iterator[tuple[str, str]]
"""Names and values of facts."""


def _section(section: str, found: _Found) -> Iterator[Fact]:
    """Its facts, up to the first that cannot be found out: who asks has something broken."""
    try:
        for name, value in found:
            yield Fact(section, name, value)
    except Exception as error:
        yield Fact(section, "broken", f"{type(error).__name__}: {error}")


# --------------------------------------------------------------------------------------
# Versions
# --------------------------------------------------------------------------------------


def _versions() -> _Found:
    yield "vovnet_fast", f"{__version__} in {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield "torch", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads"
    yield "triton", _version("triton")
    for module in installed.MODULES:
        if module in ("mmdet", "mmcv") or installed.installed(module):
            operators = _mmcv_operators() if module == "mmcv" else ""
            yield module, _version(module) + operators


def _version(module: str) -> str:
    """The version of what brings a module, or the reason why that cannot be used."""
    reason = _optional.why_not(module)
    absent = f"{module} is not installed"
    if module in installed.MODULES and reason is not None and reason.startswith(absent):
        return f"{absent} ({installed.remedy(module)})"  # Beside what is there.
    if reason is not None:
        return reason
    names = _distributions().get(module, [])
    if not names:
        return "of unknown version"
    versions = [importlib.metadata.version(name) for name in names]
    first = versions[0] if names[0] == module else f"{versions[0]} ({names[0]})"
    return " and ".join([first, *(f"{v} ({n})" for n, v in zip(names[1:], versions[1:]))])


@functools.cache
def _distributions() -> dict[str, list[str]]:
    found = compat.packages_distributions()
    return {module: sorted(set(names)) for module, names in found.items()}


def _mmcv_operators() -> str:
    """Whether mmcv has its compiled operators: without them it installs, and detectors fail."""
    if _optional.why_not("mmcv") is not None:
        return ""
    reason = _optional.why_not("mmcv._ext")
    if reason is None:
        return ", with its operators"
    found = installed.installed("mmcv")
    onedl = all(it.onedl for it in found)
    remedy = "pip install --no-build-isolation onedl-mmcv, after torch"
    remedy = remedy if onedl else installed.remedy("mmcv._ext")
    return f", WITHOUT its operators: {reason} ({remedy})"


# --------------------------------------------------------------------------------------
# CUDA
# --------------------------------------------------------------------------------------


def _cuda() -> _Found:
    yield "driver", _driver()
    yield "toolkit", _toolkit()
    yield "cuDNN frontend", _version("cudnn")
    if not torch.cuda.is_available():
        yield "GPU", "torch sees none"
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        yield f"GPU {index}", f"{found.name}, capability {found.major}.{found.minor}, {memory}"
    yield "cuDNN", str(torch.backends.cudnn.version())


def _driver() -> str:
    """The NVIDIA driver's version, and the newest CUDA that it can run."""
    try:
        version = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return "none (libcuda.so.1 was not found)"
    number = _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    cuda = f"up to CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return ", ".join([*number.split()[:1], cuda])


def _toolkit() -> str:
    """nvcc, which builds the extension's CUDA half."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=os.pathsep.join((f"{home}/bin", os.environ.get("PATH", ""))))
    if nvcc is None:
        return "none (nvcc was not found; only building the extension needs it)"
    match = re.search(r"V(\d[\d.]+)", _printed(nvcc, "--version"))
    return f"{match[1] if match else 'of unknown version'} ({nvcc})"


def _printed(*words: str) -> str:
    """What a program prints, or nothing where it cannot run."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


# --------------------------------------------------------------------------------------
# The extension and the backends
# --------------------------------------------------------------------------------------


def _built() -> _Found:
    found = _extension.build_info()
    if found is None:
        yield "vovnet_fast._C", str(_extension.why_not("cpu"))
        return
    yield "vovnet_fast._C", f"{found['version'] or 'of unknown version'}, {_extension_file()}"
    yield "compiler", found["compiler"]
    yield "flags", found["flags"] or "not recorded"
    used = _extension.load("cpu").isa()
    yield "instruction sets", f"{found['isas'] or 'not recorded'}; this process uses {used}"
    yield "CUDA half", f"nvcc {found['cuda']}" if found["cuda"] else "not built"
    if found["cuda"]:
        yield "GPU architectures", found["archs"]


def _extension_file() -> str:
    spec = importlib.util.find_spec(_extension.loading.NAME)
    return str(spec.origin) if spec else ""


def _usable() -> _Found:
    for name, reason in backends.available_backends().items():
        yield name, "usable" if reason is None else f"not usable: {reason}"
    for device in _devices():
        yield f"auto on {device}", _automatic(device)


def _engines() -> _Found:
    """The convolutions of the extension's CUDA half, which are chosen by measurement."""
    for name, reason in _cuda_conv.offered(torch.device("cuda")).items():
        others = {depthwise_conv.NAME: "separate passes", conv_sm90_fp8.IN_FP8: "Triton's"}
        beside = others.get(name, "cuDNN")
        yield name, f"not considered: {reason}" if reason else f"considered beside {beside}"


def _devices() -> list[torch.device]:
    """The kinds of device here."""
    cuda = [torch.device("cuda", 0)] if torch.cuda.is_available() else []
    return [torch.device("cpu"), *cuda]


def _automatic(device: torch.device) -> str:
    """What is taken on a device unless something is asked for by name."""
    for name in backends.CANDIDATES.get(device.type, ()):
        if backends.why_not(name, device) is None:
            functions = {case.function for case in selfcheck.CASES}
            passed = [
                selfcheck.remembered(name, device, dtype, [function])
                for function, dtype in itertools.product(functions, selfcheck.DTYPES)
            ]
            if all(passed):
                return name
            return (
                f"{name}: each function once it has passed its check in a dtype, which "
                f"{sum(map(bool, passed))} of {len(passed)} have; others are checked when needed"
            )
    return "reference"


def _settings() -> _Found:
    for name in sorted(os.environ):
        if name.startswith("VOVNET_FAST_"):
            yield name, os.environ[name]
    choices = tuning.table().choices()
    count = sum(map(len, choices.values()))
    where = tuning.table().path or "memory alone"
    yield "tuning", f"{count} choices of {len(choices)} machine(s) in {where}"


# --------------------------------------------------------------------------------------
# The self-test
# --------------------------------------------------------------------------------------


def _checks() -> Iterator[Check]:
    for device, name in itertools.product(_devices(), backends.NAMES):
        if backends.why_not(name, device) is not None:
            continue
        rows = selfcheck.run(name, device, progress=sys.stderr.isatty())
        for function in dict.fromkeys(row.function for row in rows):
            yield _worst(name, device, [row for row in rows if row.function == function])


def _worst(backend: str, device: torch.device, rows: Sequence[selfcheck.Row]) -> Check:
    """The row that failed, or came closest to it."""
    row = max(rows, key=lambda row: (not row.passed, _fraction(row)))
    error, allowed = (None if math.isnan(x) else x for x in (row.error, row.allowed))
    dtype = str(row.dtype).removeprefix("torch.")
    problem = "" if row.passed else str(row)
    return Check(backend, str(device), row.function, dtype, error, allowed, row.passed, problem)


def _fraction(row: selfcheck.Row) -> float:
    """The error as a part of what is allowed."""
    if math.isnan(row.error):
        return math.inf
    return row.error / row.allowed if row.allowed else 0.0
