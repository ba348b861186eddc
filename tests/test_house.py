"""How the package is built: imports go one way, rooms stay small, and importing it costs little."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import architecture

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vovnet_fast"

FLOORS = (
    ("compat",),
    ("_version", "_dtypes", "_environment", "_files", "_optional", "_pages", "_processes", "specs"),
    ("_provenance", "reference"),
    ("arithmetic",),
    ("kernels",),
    ("aot", "compiling", "tuning"),
    ("selfcheck",),
    ("backends",),
    ("ops",),
    ("first_use", "replay"),
    ("network",),
    ("checkpoints",),
    ("deploy",),
    ("quantization",),
    ("integrations",),
    ("detectron2", "mmdet", "timm", "tools"),
)
"""Rooms of the package. One imports those of the floors below, and none beside or above it."""

LINES = 400
DATA = {"specs.py"}


def files() -> list[Path]:
    """All of it; the kernels lie behind a symbolic link, which rglob does not follow."""
    return sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")})


def test_every_room_is_on_a_floor():
    rooms = {file.relative_to(PACKAGE).with_suffix("").parts[0] for file in files()} - {"__init__"}
    assert rooms == {name for floor in FLOORS for name in floor}


def test_imports_go_one_way():
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    wrong = []
    for file in files():
        here = file.relative_to(PACKAGE).with_suffix("").parts[0]
        if here == "__init__":
            continue
        for module, line in architecture.imported(file):
            there = module.split(".")[1]
            if there != here and height[there] >= height[here]:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_the_document_is_what_the_code_is():
    pytest.importorskip("triton", minversion="3.6", reason="launches are planned with Triton")
    document = (ROOT / "docs" / "architecture.md").read_text()
    update = "python -m benchmarks.architecture --update"
    assert architecture.filled(document, architecture.tables()) == document, update


def test_paths_in_the_document_exist():
    """In code spans, and in links."""
    document = (ROOT / "docs" / "architecture.md").read_text()
    for path in re.findall(
        r"`((?:vovnet_fast|kernels|csrc|tests|benchmarks|configs)/[\w/.]*)`", document
    ):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!http)([^)]+)\)", document):
        assert (ROOT / "docs" / path).exists(), path


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_room_is_too_large(file):
    lines = len(file.read_text().splitlines())
    assert lines <= LINES or file.name in DATA, f"{lines} lines: split it along its sections"


def test_importing_it_imports_little():
    """Of what takes its time, and is needed later or never; 0.05 s are allowed beyond torch's."""
    code = (
        "import json, sys, torch; before = set(sys.modules); import vovnet_fast; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = set(json.loads(done.stdout))
    assert "vovnet_fast.network.model" in found
    foreign = {name.partition(".")[0] for name in found} - {"vovnet_fast"}
    assert not foreign
    late = ("checkpoints", "deploy", "integrations", "kernels", "selfcheck", "tools")
    assert not [name for name in found if name.split(".")[1:2] and name.split(".")[1] in late]
    assert "vovnet_fast.backends.triton" not in found
