"""Plain PyTorch where nothing else is: without a compiler, Triton, fork and what is POSIX's alone.

tests/bare.py makes such a Python of the one that is here. Windows itself is not run.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import bare

ROOT = Path(__file__).resolve().parents[1]
STEPS = [name for name in bare.Steps.__dict__ if name[0] != "_" and name not in ("run", "command")]
FILES = [
    path
    for folder in ("vovnet_fast", "kernels", "native_build")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ROOT / "vovnet_fast" / "kernels" not in path.parents
]


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """What went wrong in each step, of a process of its own."""
    folder = tmp_path_factory.mktemp("bare")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bare", folder], cwd=ROOT, capture_output=True, text=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["step"] for line in lines] == STEPS, done.stderr
    return {line["step"]: line["problem"] for line in lines}


@pytest.mark.parametrize("step", STEPS)
def test_without_anything_that_windows_has_not(step, problems):
    assert problems[step] is None, problems[step]


def _without_encoding(tree):
    """Calls that read or write text in whatever encoding the system prefers."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        of_module = isinstance(node.func, ast.Attribute)
        words = [ast.unparse(word) for word in node.args]
        mode = words[1] if len(words) > 1 else "'r'"
        opens = (name == "open" and not of_module) or ast.unparse(node.func) == "os.fdopen"
        reads = of_module and name == "read_text" and not words  # Distributions take a name.
        if (opens and "b" not in mode) or reads or name == "write_text":
            yield node.lineno


def test_the_search_for_encodings_finds_them():
    wrong = "open(p)\nopen(p, 'w')\nos.fdopen(h, 'w')\np.read_text()\np.write_text(t)\n"
    assert list(_without_encoding(ast.parse(wrong))) == [1, 2, 3, 4, 5]
    right = "open(p, 'rb')\nos.open(p, 0)\np.read_text(encoding='utf-8')\nd.read_text('RECORD')\n"
    assert list(_without_encoding(ast.parse(right))) == []


def test_text_is_utf_8_everywhere():
    """Where none is named Windows has cp1252, and what others wrote is read as something else."""
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES
        for line in _without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set()


def test_no_file_has_a_name_that_windows_refuses():
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("needs a checkout")
    names = [name for name in done.stdout.split("\0") if name]
    lower = [name.lower() for name in names]
    assert not [name for name in names if set(name) & set('<>:"|?*\\')]
    assert sorted(set(lower)) == sorted(lower)
