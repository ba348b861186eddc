"""``python -m vovnet_fast.aot``: a table of what the Triton kernels compile to."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from . import resources
from .compiler import Row
from .job import ARCHITECTURES
from .shipped import read, rows


def _print_table(table: Iterable[Row], arch: str) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table(title=f"Triton kernels for {arch}")
    for heading in ("kernel", "layer", "configuration"):
        view.add_column(heading, no_wrap=True)
    for heading in ("warps", "registers", "spilled B", "shared B", "CTAs/SM"):
        view.add_column(heading, justify="right")
    view.add_column("instructions")
    for row in table:
        numbers = (row.warps, row.registers, row.spilled, row.shared, row.ctas)
        counts = " ".join(f"{name}:{count}" for name, count in row.instructions.items())
        view.add_row(row.kernel, row.layer, row.config, *map(str, numbers), counts)
    # A pipe has no width to fit into.
    Console(width=None if sys.stdout.isatty() else 200).print(view)


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python -m vovnet_fast.aot``."""
    parser = argparse.ArgumentParser(
        prog="python -m vovnet_fast.aot", description="Compile the Triton kernels without a GPU."
    )
    parser.add_argument("--arch", choices=ARCHITECTURES, default="sm_90")
    parser.add_argument("--all", action="store_true", help="every layer and dtype, not one each")
    parser.add_argument("--json", action="store_true", help="print JSON, one row a line")
    parser.add_argument(
        "--known", metavar="FILE", type=Path,
        help="rows of an earlier --json: what they are of is not compiled again",
    )  # fmt: skip
    parser.add_argument(
        "--resources", action="store_true", help="write the tables that choices are made from"
    )
    options = parser.parse_args(arguments)
    if options.resources:
        from ..kernels.resources import FOLDER

        for file in resources.write(FOLDER):
            print(file)
        return 0
    known = None
    if options.known is not None:
        try:
            known = read(options.known)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    table = rows(options.arch, all_layers=options.all, known=known)
    if options.json:
        for row in table:
            print(json.dumps(dataclasses.asdict(row)), flush=True)
    else:
        _print_table(table, options.arch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
