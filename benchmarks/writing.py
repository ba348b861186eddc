"""How runs on a CPU begin, and their files of rows, written as these are found: hours of rounds may
yet be interrupted."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from vovnet_fast import _provenance as provenance
from vovnet_fast.tools.bench import heap


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """Set the threads of a run on a CPU, and its heap; returns where and with what it is made.

    Args:
        options: with ``threads`` and ``rounds``.
    """
    torch.set_num_threads(options.threads)
    return {
        **provenance.collect(torch.device("cpu")),
        "heap": heap.keep(),
        "threads": options.threads,
        "rounds": options.rounds,
    }


def write(
    out: Path | None,
    about: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    text: str,
) -> None:
    """Write ``out.json`` and ``out.md``, in place of those of fewer rows.

    Args:
        out: the files, without their endings, or None for none.
        about: where and with what.
        rows: so far.
        text: the same in Markdown.
    """
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"provenance": about, "rows": list(rows)}, indent=1)
    for ending, lines in ((".json", content), (".md", text)):
        # The name may have dots, and what is there stays until the new one is whole.
        path = out.with_name(out.name + ending)
        new = out.with_name(out.name + ending + ".new")
        new.write_text(lines + "\n", encoding="utf-8")
        new.replace(path)
