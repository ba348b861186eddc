"""Everything that is shipped for an architecture, compiled or known from an earlier run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from . import eight_bits
from .compiler import Row, compile_job, key
from .convolutions import conv_jobs
from .elementwise import backward_jobs, elementwise_jobs
from .job import ARCHITECTURES, Job


def jobs(arch: str) -> list[Job]:
    """Everything that is shipped for ``arch``, over the layers of the published networks.

    Of sm_89 that is fp8: all else is as for sm_80.
    """
    found = [*eight_bits.conv_jobs(arch), *eight_bits.elementwise_jobs(arch)]
    if arch == "sm_89":
        return found
    return [*conv_jobs(arch), *elementwise_jobs(), *backward_jobs(), *found]


def rows(
    arch: str, *, all_layers: bool = False, known: Mapping[str, Row] | None = None
) -> Iterator[Row]:
    """Compile what is shipped for ``arch``, one by one.

    Args:
        arch: one of :data:`ARCHITECTURES`.
        all_layers: every layer and dtype in every configuration. Otherwise every
            kernel in every configuration, with one layer each.
        known: rows by key, of what need not be compiled.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    for job in jobs(arch):
        if job.essential or all_layers:
            yield look_up(job, arch, known or {})


def look_up(job: Job, arch: str, known: Mapping[str, Row]) -> Row:
    """What ``job`` compiles to: compiled, if no known row is of the same key."""
    found = known.get(key(job, arch))
    if found is None:
        return compile_job(job, arch)
    return dataclasses.replace(
        found, kernel=job.kernel, layer=job.layer, config=job.config, essential=job.essential
    )


def read(file: Path) -> dict[str, Row]:
    """The rows that ``--json`` printed, by key.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is no row.
    """
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = Row(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}, line {number}, is no row of --json: {error}") from error
        found[row.key] = row
    return found
