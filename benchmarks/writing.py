"""Files of rows, written as they are found: hours of rounds may yet be interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


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
