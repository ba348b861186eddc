"""What several test files share is made once, whoever of them comes first."""

import subprocess
import sys
import types

import pytest

from tests.once import Once, root_of

WORKER = """
import sys, time
from pathlib import Path
from tests.once import Once

def make(folder):
    with open(folder.parent / "makers", "a") as file:
        file.write("one\\n")
    time.sleep(0.3)
    (folder / "text").write_text("whole")

print((Once(Path(sys.argv[1])).folder("shared", make) / "text").read_text())
"""


def test_processes_make_it_once_and_see_it_whole(tmp_path):
    words = [sys.executable, "-c", WORKER, str(tmp_path)]
    started = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in started] == ["whole\n"] * 3
    assert (tmp_path / "makers").read_text() == "one\n"


def test_what_fails_is_tried_again_from_nothing(tmp_path):
    once, found = Once(tmp_path), []

    def make(folder):
        found.append(list(folder.iterdir()))
        (folder / "half").touch()
        if len(found) == 1:
            raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        once.folder("shared", make)
    assert once.folder("shared", make) == once.folder("shared", make) == tmp_path / "shared"
    assert found == [[], []]


def test_other_names_are_other_folders(tmp_path):
    once = Once(tmp_path)
    paths = [once.folder(name, lambda folder: (folder / "x").touch()) for name in ("a", "b")]
    assert [path.name for path in paths if (path / "x").exists()] == ["a", "b"]


def test_workers_share_the_folder_of_their_session(tmp_path):
    factory = types.SimpleNamespace(getbasetemp=lambda: tmp_path / "popen-gw0")
    worker, alone = types.SimpleNamespace(workerinput={}), types.SimpleNamespace()
    assert root_of(worker, factory) == tmp_path
    assert root_of(alone, factory) == tmp_path / "popen-gw0"
