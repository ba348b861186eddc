"""The tables of registers and shared memory that choices are made from, written anew.

``python -m vovnet_fast.aot --resources`` compiles every configuration of the convolutions
in half precision and in eight bits once an architecture, and writes ``kernels/resources/``.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import compiler
from .convolutions import conv_jobs
from .eight_bits import conv_jobs as eight_bit_conv_jobs
from .job import Job, capability

ARCHITECTURES = ("sm_80", "sm_90")
"""Others take the table of the nearest of these."""

PRECISIONS = {"float16": "half", "int8": "int8", "fp8": "fp8"}
"""What the tables hold, by what a job's layer says: fp32 is estimated, and fp8 on sm_89. The two
half precisions compile to the same."""


def key(job: Job) -> tuple[str, str] | None:
    """(row, configuration) that a job is the compiler's word for; None if it is for none."""
    from ..kernels.resources import row

    words = job.layer.partition(",")[0].split()
    if job.kernel not in _KINDS or words[-1] not in PRECISIONS:
        return None
    constants = job.launch.constants
    kind = _KINDS[job.kernel]
    if not kind:
        kind = "gradient" if constants["ADD"] or constants["MASK"] else "forward"
    return row(kind, constants["KERNEL"], PRECISIONS[words[-1]]), job.config


_KINDS = {
    "conv": "forward",
    "conv eight bits": "forward",
    "conv statistics": "statistics",
    "conv input gradient": "",  # Without anything added or masked it is a forward one.
    "conv weight gradient": "weight gradient",
}


def jobs(arch: str) -> Iterator[tuple[tuple[str, str], Job]]:
    """The first job for each configuration of each row."""
    seen = set()
    for job in itertools.chain(conv_jobs(arch), eight_bit_conv_jobs(arch)):
        found = key(job)
        if found is not None and found not in seen:
            seen.add(found)
            yield found, job


def is_stale(job: Job, row: compiler.Row) -> bool:
    """Whether what a job was compiled to fits on a processor in other numbers than its table says.

    A few registers more or less, which change nothing, are no reason to write tables anew.
    False for a job that another one of its name stands for there, and for another Triton's.
    """
    import triton

    from ..kernels.resources import Resources, tables

    number = capability(row.arch)
    known = tables().get(number, {"triton": ""})
    name = key(job)
    if known["triton"] != triton.__version__ or name is None or layers(row.arch)[name] != job.layer:
        return False
    registers, shared, spilled = known["programs"].get(name[0], {}).get(name[1], (0, 0, -1))
    resident = Resources(row.warps, registers, shared).resident(number) if registers else 0
    return (resident, spilled) != (row.ctas, row.spilled)


@functools.cache
def layers(arch: str) -> dict[tuple[str, str], str]:
    """On which layer each configuration of each row is compiled for the table."""
    return {name: job.layer for name, job in jobs(arch)}


def _compile(arch: str, share: int, of: int) -> list[tuple[tuple[str, str], list[int]]]:
    """Every ``of``-th job: registers, bytes of shared memory, bytes spilled."""
    found = []
    for number, (name, job) in enumerate(jobs(arch)):
        if number % of == share:
            registers, spilled, shared = compiler.resources(job, arch)
            found.append((name, [registers, shared, spilled]))
    return found


def table(arch: str, workers: int | None = None) -> dict[str, Any]:
    """Compile what a table holds, in several processes."""
    import triton

    count = workers or os.cpu_count() or 1
    programs: dict[str, dict[str, list[int]]] = {}
    # A forked process would share Triton's threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
        for share in pool.map(functools.partial(_compile, arch, of=count), range(count)):
            for (row, config), needed in share:
                programs.setdefault(row, {})[config] = needed
    return {"triton": triton.__version__, "programs": programs}


def write(folder: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> list[Path]:
    """Write the tables of some architectures into a folder; returns the files."""
    files = []
    for arch in architectures:
        content = table(arch)
        rows = ",\n".join(
            f"  {json.dumps(name)}: {{\n{_lines(found)}\n  }}"
            for name, found in sorted(content["programs"].items())
        )
        version = json.dumps(content["triton"])
        file = folder / f"{arch}.json"
        text = f'{{\n "triton": {version},\n "programs": {{\n{rows}\n }}\n}}\n'
        file.write_text(text, encoding="utf-8")
        files.append(file)
    return files


def _lines(found: dict[str, list[int]]) -> str:
    """One configuration a line, so that a reviewer sees which has changed."""
    return ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(found.items()))
