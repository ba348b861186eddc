"""Where a measurement comes from: sources, machine, versions, clocks.

Nothing that names a person or a machine is in it: no host name, user, folder or serial number.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .compat import zip

COMMIT_ENVIRONMENT = "VOVNET_FAST_COMMIT"
"""Names the commit of sources that do not lie in a git checkout."""

_LIBRARIES = {
    "triton": "triton",
    "numpy": "numpy",
    "timm": "timm",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "cudnn_frontend": "nvidia-cudnn-frontend",
    "mmcv": "onedl-mmcv",
    "mmdet": "onedl-mmdetection",
}
"""What peers and kernels come from, by the name of the distribution."""

_INSTRUCTION_SETS = re.compile(r"(avx|avx2|avx512\w+|avx_vnni|amx_\w+|fma|f16c|asimd|sve2?|bf16)")
_ABOUT_GPU = {
    "driver": "driver_version",
    "power_limit": "power.limit",
    "max_sm_clock": "clocks.max.sm",
    "max_memory_clock": "clocks.max.mem",
}
_FORCING = (
    *(f"VOVNET_FAST_{name}" for name in ("BACKEND", "CPU_ISA", "KEEP_WEIGHTS", "TUNE", "WINOGRAD")),
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "OMP_NUM_THREADS",
)
"""Variables that decide what runs, and hold no paths."""

_READINGS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
}


def collect(device: torch.device, folder: Path | None = None) -> dict[str, Any]:
    """Everything that can be said before a measurement, by short names.

    Args:
        device: where it runs.
        folder: the git checkout of the sources; that of this package by default.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "date": now.isoformat(timespec="seconds"),
        **sources(folder),
        "device": device.type,
        **(_gpu(device) if device.type == "cuda" else {}),
        **_cpu(),
        **versions(),
        **_flags(),
        **_forced(),
    }


def _forced() -> dict[str, str]:
    """What the environment has forced upon a measurement, if anything."""
    found = " ".join(f"{name}={os.environ[name]}" for name in _FORCING if os.environ.get(name))
    return {"forced": found} if found else {}


def sources(folder: Path | None = None) -> dict[str, Any]:
    """The commit, and whether the tree has changes besides results; ``unknown`` outside git."""
    folder = folder or Path(__file__).resolve().parents[1]
    given = os.environ.get(COMMIT_ENVIRONMENT)
    if given:
        return {"commit": given, "dirty": None}
    try:
        git = functools.partial(
            subprocess.run, cwd=folder, capture_output=True, text=True, check=True, timeout=20
        )
        # An installed package may lie inside somebody else's checkout.
        git(["git", "ls-files", "--error-unmatch", "vovnet_fast/_version.py"])
        commit = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changes = git(["git", "status", "--porcelain", "--", ":!benchmarks/results"]).stdout
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": None}
    return {"commit": commit, "dirty": bool(changes.strip())}


def versions() -> dict[str, str]:
    """Of Python, of this package, and of what it is measured with and against."""
    found: dict[str, Any] = {
        "vovnet_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    for name, distribution in _LIBRARIES.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(distribution)
    return {name: str(version) for name, version in found.items() if version is not None}


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "gpus": torch.cuda.device_count(),
    }
    told = _nvidia_smi(device, tuple(_ABOUT_GPU.values()))
    return found | {name: told[key] for name, key in _ABOUT_GPU.items() if key in told}


def _nvidia_smi(device: torch.device, names: tuple[str, ...]) -> dict[str, str]:
    """What nvidia-smi says of a device; only read, and empty where there is no nvidia-smi."""
    # CUDA's numbers are not nvidia-smi's where some devices are hidden.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    number = f"GPU-{uuid}" if uuid is not None else str(device.index or 0)
    query = f"--query-gpu={','.join(names)}"
    command = ["nvidia-smi", "-i", number, query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    words = [word.strip() for word in done.stdout.split(",")]
    return dict(zip(names, words, strict=False))


def _cpu() -> dict[str, Any]:
    """The processor, as far as the system tells, and how much of it torch uses."""
    told = _cpuinfo()
    model = next((told[key][0] for key in ("model name", "Model") if key in told), "")
    flags = " ".join(told.get("flags", told.get("Features", [""]))[:1]).split()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": " ".join(flag for flag in flags if _INSTRUCTION_SETS.fullmatch(flag)),
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpuinfo() -> dict[str, list[str]]:
    """Fields of /proc/cpuinfo, a value for each processor; empty elsewhere than on Linux."""
    found: dict[str, list[str]] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, colon, value = line.partition(":")
            if colon:
                found.setdefault(key.strip(), []).append(value.strip())
    return found


def _flags() -> dict[str, Any]:
    """Settings of torch that change speed."""
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


class Clocks:
    """Clocks, and what explains them, as seen now and then during a measurement.

    Args:
        device: whose. On a CPU also how busy the machine is with everything.
        apart: seconds between readings, which take a tenth of one on a GPU.
    """

    def __init__(self, device: torch.device, apart: float = 3.0) -> None:
        self.device, self.apart = device, apart
        self._seen: dict[str, list[float]] = {}
        self._last = -math.inf
        self.see()

    def see(self) -> None:
        """Take a reading, unless there has just been one."""
        if time.monotonic() - self._last < self.apart:
            return
        for name, value in self._read():
            self._seen.setdefault(name, []).append(value)
        self._last = time.monotonic()

    def summary(self) -> dict[str, dict[str, float]]:
        """First, last (taken now), least and most; the units are in the names."""
        self._last = -math.inf
        self.see()
        return {
            name: {
                "first": values[0],
                "last": values[-1],
                "least": min(values),
                "most": max(values),
            }
            for name, values in self._seen.items()
        }

    def _read(self) -> Iterator[tuple[str, float]]:
        if self.device.type == "cuda":
            told = _nvidia_smi(self.device, tuple(_READINGS.values()))
            for name, key in _READINGS.items():
                number = re.match(r"[\d.]+", told.get(key, ""))
                if number is not None:  # Not "[N/A]".
                    yield name, float(number[0])
            return
        megahertz = [float(value) for value in _cpuinfo().get("cpu MHz", [])]
        if megahertz:
            yield "cpu_mhz", round(statistics.median(megahertz), 1)
        if hasattr(os, "getloadavg"):  # Windows has none.
            with contextlib.suppress(OSError):
                yield "load", round(os.getloadavg()[0], 2)
