"""The pictures and tables of docs/architecture.md, made from the code.

``python -m benchmarks.architecture`` says whether the tables are what the code is, and fails if
not; ``--update`` writes tables and pictures anew. What a block launches is found out on meta
tensors: which place of which buffer a kernel reads and writes is in its launch. Who imports whom
is in the files.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vovnet_fast"
DOCS = ROOT / "docs"

SPEC, BLOCK, SHAPE = "V-39-eSE", "OSA4_2", (1, 320, 320)
"""The block of the picture: five layers, a gate and an identity; its input is a block's output."""

SLOT, GRADIENT = "slot", "gradient"
Z, DZ, DX, OUT = "1x1", "gradient of the 1x1", "gradient of the input", "output"


# --------------------------------------------------------------------------------------
# A block
# --------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A launch, as far as the activations of the block go.

    Attributes:
        kernel: its name.
        reads, writes: places, ``slot 2`` of the concat buffer, ``gradient 0-5`` for all slots of
            its gradient, or one of :data:`Z`, :data:`DZ`, :data:`DX` and :data:`OUT`.
    """

    kernel: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


class Block(NamedTuple):
    """What a block launches.

    Attributes:
        widths: channels of the slots.
        forward, backward: in order.
    """

    widths: tuple[int, ...]
    forward: list[Step]
    backward: list[Step]


class _Operand(NamedTuple):
    view: Tensor
    name: str
    written: bool

    @property
    def storage(self) -> int:
        return int(self.view.untyped_storage()._cdata)


class _Launch(NamedTuple):
    kernel: str
    operands: list[_Operand]

    @classmethod
    def of(cls, launch: Any, batch: int) -> _Launch:
        """Its activations: ``[N, H, W, C]`` views. A descriptor keeps its tensor as its base."""
        from vovnet_fast.tools.plan.launches import written

        tensors = {name: getattr(value, "base", value) for name, value in launch.args.items()}
        return cls(
            launch.kernel.fn.__name__,
            [
                _Operand(view, name, name in written(launch))
                for name, view in tensors.items()
                if isinstance(view, Tensor) and view.dim() == 4 and view.shape[0] == batch
            ],
        )


def block() -> Block:
    """What :data:`BLOCK` launches in a training step on a GPU with bulk copies."""
    from vovnet_fast import specs

    from .counts import training_step

    [plan] = [one for one in specs.get(SPEC).blocks() if one.name == BLOCK]
    widths = (plan.in_channels, *[plan.mid_channels] * plan.num_layers)
    step = training_step(SPEC, SHAPE)
    launches = [_Launch.of(launch, SHAPE[0]) for launch in step.launches]
    forward, backward = launches[: len(step.forward)], launches[len(step.forward) :]
    places = _places(widths, forward, backward)
    return Block(widths, _steps(widths, forward, places), _steps(widths, backward, places))


def _places(widths: tuple[int, ...], forward: list[_Launch], backward: list[_Launch]) -> dict:
    """What the block's storages hold."""
    total = sum(widths)

    def operands(launches: list[_Launch], written: bool) -> Iterator[tuple[_Launch, _Operand]]:
        for launch in launches:
            for operand in launch.operands:
                if operand.written == written:
                    yield launch, operand

    def is_slot(operand: _Operand) -> bool:
        return operand.view.stride(2) == total

    def output(launch: _Launch) -> int:
        return next(operand.storage for operand in launch.operands if operand.written)

    slots = next(o.storage for _, o in operands(forward, True) if is_slot(o))
    whole = next(
        launch for launch, o in operands(forward, False)
        if o.storage == slots and o.view.shape[3] == total
    )  # fmt: skip
    z = output(whole)
    out = next(output(launch) for launch, o in operands(forward, False) if o.storage == z)
    gradients = next(
        (launch, o.storage) for launch, o in operands(backward, True)
        if is_slot(o) and o.view.shape[3] == total
    )  # fmt: skip
    dz = next(o.storage for o in gradients[0].operands if o.name.startswith("x_"))
    last = [
        launch for launch, o in operands(backward, False)
        if o.storage == gradients[1] and o.name.startswith("x_")
    ][-1]  # fmt: skip
    return {slots: SLOT, z: Z, out: OUT, gradients[1]: GRADIENT, dz: DZ, output(last): DX}


def _steps(widths: tuple[int, ...], launches: list[_Launch], places: dict) -> list[Step]:
    """Those that touch the block's places; the output's readers are other blocks'."""
    begins = [sum(widths[:i]) for i in range(len(widths) + 1)]

    def place(operand: _Operand) -> str | None:
        name = places.get(operand.storage)
        if name not in (SLOT, GRADIENT):
            return name
        first = begins.index(operand.view.storage_offset() % begins[-1])
        last = begins.index(begins[first] + operand.view.shape[3]) - 1
        return f"{name} {first}" if first == last else f"{name} {first}-{last}"

    found = []
    for launch in launches:
        reads, writes = (
            tuple(dict.fromkeys(p for o in launch.operands if o.written == way and (p := place(o))))
            for way in (False, True)
        )
        if set(writes) - {DX} or set(reads) - {DX, OUT}:
            found.append(Step(launch.kernel, reads, writes))
    return found


# --------------------------------------------------------------------------------------
# The house
# --------------------------------------------------------------------------------------


class Room(NamedTuple):
    """A file or a folder right in the package.

    Attributes:
        name: of it.
        purpose: the first sentence of its docstring.
        imports: rooms that it imports, in functions too, but for annotations.
    """

    name: str
    purpose: str
    imports: frozenset[str]


def rooms() -> list[Room]:
    """All of them, by name."""
    found = []
    for path in sorted(PACKAGE.iterdir()):
        if path.name in ("__init__.py", "__pycache__") or not (
            path.is_dir() or path.suffix == ".py"
        ):
            continue
        files = sorted(path.rglob("*.py") if path.is_dir() else [path])
        if path.is_symlink():  # The kernels: rglob does not follow it.
            files = sorted(path.resolve().rglob("*.py"))
        first = (path / "__init__.py" if path.is_dir() else path).read_text()
        imports = {module.split(".")[1] for file in files for module, _ in imported(file, path)}
        found.append(Room(path.stem, _purpose(first), frozenset(imports - {path.stem})))
    return found


def _purpose(text: str) -> str:
    docstring = ast.get_docstring(ast.parse(text)) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def imported(file: Path, room: Path | None = None) -> Iterator[tuple[str, int]]:
    """Modules of the package that a file imports, and in which lines; but for annotations.

    Args:
        file: of the package.
        room: its file or folder in the package, if that is a symbolic link.
    """
    tree = ast.parse(file.read_text())
    unseen = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    if room is not None and room.is_symlink():
        file = room / file.relative_to(room.resolve())
    parts = ("vovnet_fast", *file.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(tree):
        if node in unseen or not isinstance(node, ast.ImportFrom):
            continue
        base = parts[: len(parts) - node.level] if node.level else ()
        module = ".".join((*base, *filter(None, [node.module])))
        if module.partition(".")[0] == "vovnet_fast":
            for name in node.names:
                yield f"{module}.{name.name}", node.lineno


def without_detours(found: list[Room]) -> dict[str, set[str]]:
    """What each room imports, but for what others that it imports reach as well."""
    direct = {room.name: set(room.imports) & {other.name for other in found} for room in found}

    def below(name: str) -> set[str]:
        return direct[name].union(*map(below, direct[name]))

    return {
        name: names - set().union(*(below(other) for other in names))
        for name, names in direct.items()
    }


def floors(found: list[Room]) -> list[list[Room]]:
    """Rooms by height: each stands above all that it imports, as low as it can.

    Raises:
        ValueError: rooms import each other in a ring.
    """
    by_name, height = {room.name: room for room in found}, {}
    while len(height) < len(found):
        ready = [
            room
            for room in found
            if room.name not in height and room.imports & set(by_name) <= set(height)
        ]
        if not ready:
            raise ValueError(f"a ring: {', '.join(sorted(set(by_name) - set(height)))}")
        for room in ready:
            below = [height[name] for name in room.imports & set(by_name)]
            height[room.name] = max(below, default=-1) + 1
    return [
        [room for room in found if height[room.name] == level]
        for level in range(max(height.values()) + 1)
    ]


# --------------------------------------------------------------------------------------
# The document
# --------------------------------------------------------------------------------------


def tables() -> dict[str, str]:
    """Markdown by the name of its place in the document."""
    found = block()
    return {
        "block forward": _launch_table(found.forward),
        "block backward": _launch_table(found.backward),
        "rooms": _room_table(rooms()),
    }


def _launch_table(steps: list[Step]) -> str:
    lines = ["| kernel | reads | writes |", "| --- | --- | --- |"]
    for step in steps:
        lines.append(f"| `{step.kernel}` | {', '.join(step.reads)} | {', '.join(step.writes)} |")
    return "\n".join(lines)


def _room_table(found: list[Room]) -> str:
    lines = ["| floor | room | what it is for |", "| ---: | --- | --- |"]
    levels = floors(found)
    for level in reversed(range(len(levels))):
        for room in levels[level]:
            folder = "" if (PACKAGE / f"{room.name}.py").exists() else "/"
            lines.append(f"| {level} | `{room.name}{folder}` | {room.purpose} |")
    return "\n".join(lines)


def filled(document: str, content: dict[str, str]) -> str:
    """The document with its tables, which stand between comments that name them.

    Raises:
        ValueError: a table has no place in the document.
    """
    for name, text in content.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if begin not in document or end not in document:
            raise ValueError(f"the document has no place for {name}: {begin.strip()}")
        before, rest = document.split(begin, 1)
        document = f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"
    return document


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python -m benchmarks.architecture``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.architecture", description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--update", action="store_true", help="write tables and pictures anew")
    options = parser.parse_args(arguments)
    file = DOCS / "architecture.md"
    document = file.read_text()
    new = filled(document, tables())
    if options.update:
        from . import plot_architecture

        file.write_text(new)
        for picture in (
            plot_architecture.block(block(), DOCS),
            plot_architecture.house(floors(rooms()), DOCS),
        ):
            print(picture)
        return 0
    if new != document:
        print(f"{file} is not what the code is: python -m benchmarks.architecture --update")
    return int(new != document)


if __name__ == "__main__":
    sys.exit(main())
