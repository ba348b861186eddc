"""A job compiled and disassembled: registers, shared memory, and counts of instructions."""

from __future__ import annotations

import contextlib
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .job import Job, capability

if TYPE_CHECKING:
    from ..kernels._common import Launch

INSTRUCTIONS = {
    "HGMMA": r"\bHGMMA\b",  # Warpgroup MMA.
    "HGMMA(R)": r"\bHGMMA\S* R\d+, R\d+, gdesc",  # Of these, first operand from registers.
    "UTCHMMA": r"\bUTCHMMA\b",  # MMA of sm_100.
    "HMMA": r"\bHMMA\b",  # Warp MMA.
    "IGMMA": r"\bIGMMA\b",  # Warpgroup MMA of int8,
    "QGMMA": r"\bQGMMA\b",  # of fp8,
    "IGMMA(R)": r"\bIGMMA\S* R\d+, R\d+, gdesc",  # and of these as above.
    "QGMMA(R)": r"\bQGMMA\S* R\d+, R\d+, gdesc",
    "UTCIMMA": r"\bUTCIMMA\b",  # MMA of sm_100, of int8,
    "UTCQMMA": r"\bUTCQMMA\b",  # of fp8.
    "IMMA": r"\bIMMA\b",  # Warp MMA of int8,
    "QMMA": r"\bQMMA\b",  # of fp8.
    "UTMALDG": r"\bUTMALDG\b",  # Bulk copy to shared memory.
    "UTMASTG": r"\bUTMASTG\b",  # Bulk copy from shared memory.
    "LDGSTS": r"\bLDGSTS\b",  # cp.async.
    "LDSM": r"\bLDSM\b",  # Shared memory to registers, for an MMA operand.
    "STL": r"\bSTL\b",  # Store of a spilled register.
    "LDL": r"\bLDL\b",  # Load of a spilled register.
}
"""SASS instructions that are counted, by the pattern that finds them."""


@dataclass(frozen=True)
class Row:
    """What one compilation needs.

    Attributes:
        kernel, layer, config: as in :class:`Job`.
        arch: ``sm_80`` and so on.
        warps: warps a program.
        registers: registers a thread.
        spilled: bytes of local memory a thread, 0 where nothing spills.
        shared: bytes of shared memory a program.
        ctas: programs that fit on a processor at a time.
        instructions: counts of those of :data:`INSTRUCTIONS` that occur.
        essential: as in :class:`Job`.
        key: as :func:`key` makes it.
    """

    kernel: str
    layer: str
    config: str
    arch: str
    warps: int
    registers: int
    spilled: int
    shared: int
    ctas: int
    instructions: dict[str, int]
    essential: bool
    key: str


def compile_launch(launch: Launch, arch: str) -> Any:
    """Compile one launch plan for ``arch``; returns Triton's compiled kernel.

    Raises:
        RuntimeError: the process runs Triton's interpreter.
    """
    from ..kernels._variants import variant

    return variant(launch).compile(arch)


def key(job: Job, arch: str) -> str:
    """The same for jobs that compile to the same: source, specialisation, compiler."""
    import triton

    from ..kernels._variants import variant

    needed = variant(job.launch)
    parts = (triton.__version__, arch, needed.kernel.cache_key, needed.key)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _tool(name: str, *arguments: str) -> str:
    """Run one of the CUDA tools that come with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@contextlib.contextmanager
def _file(cubin: bytes) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:  # Windows opens no file twice.
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        yield str(path)


def _usage(name: str) -> tuple[int, int]:
    """Registers and bytes of stack a thread of a compiled kernel in a file."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", name))
    assert usage is not None, "cuobjdump printed no resource usage"
    return int(usage[1]), int(usage[2])


def disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers a thread, bytes of stack a thread, and SASS of a compiled kernel."""
    with _file(cubin) as name:
        return *_usage(name), _tool("nvdisasm", "-c", name)


def resources(job: Job, arch: str) -> tuple[int, int, int]:
    """Compile ``job``: registers and bytes spilled of a thread, bytes of shared memory."""
    compiled = compile_launch(job.launch, arch)
    with _file(compiled.asm["cubin"]) as name:
        return *_usage(name), compiled.metadata.shared


def _count(sass: str) -> dict[str, int]:
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTIONS.items()}
    return {name: count for name, count in counts.items() if count}


def compile_job(job: Job, arch: str) -> Row:
    """Compile ``job`` for ``arch`` and read what it needs."""
    return examine(job, arch)[0]


def examine(job: Job, arch: str) -> tuple[Row, str]:
    """Compile ``job`` for ``arch``; returns what it needs, and its SASS."""
    from ..kernels.resources import Resources

    compiled = compile_launch(job.launch, arch)
    registers, spilled, sass = disassemble(compiled.asm["cubin"])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    resident = Resources(warps, registers, shared).resident(capability(arch))
    row = Row(
        job.kernel, job.layer, job.config,
        arch, warps, registers, spilled, shared, resident, _count(sass), job.essential,
        key(job, arch),
    )  # fmt: skip
    return row, sass
