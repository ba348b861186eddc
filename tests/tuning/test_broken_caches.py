"""No state of the cache's folder raises out of what uses it, or keeps it waiting for ever."""

import contextlib
import errno
import fcntl
import json
import os
import time

import pytest
import torch

from vovnet_fast import _files, tuning
from vovnet_fast.tools import cli

CPU = torch.device("cpu")
NEWER = json.dumps({"format": 3, "choices": {"m": {"p": ["of", "a", "newer", "version"]}}})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VOVNET_FAST_TUNING_TABLE", raising=False)
    monkeypatch.setattr(_files, "LOCK_SECONDS", 0.05)
    tuning._table.cache_clear()
    tuning._say_that_nothing_is_kept.cache_clear()
    (tmp_path / "cache").mkdir()
    yield tmp_path / "cache" / "tuning.json"
    tuning._table.cache_clear()


def loops(path):
    path.symlink_to(path.name)


STATES = {
    "nested": lambda path: path.write_text("[" * 200_000),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a huge number": lambda path: path.write_text("9" * 10_000),
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "a loop of links": loops,
    "newer": lambda path: path.write_text(NEWER),
    "half a file": lambda path: path.write_text('{"format": 2, "choi'),
}


@pytest.mark.parametrize("state", STATES)
def test_a_broken_file_is_skipped_once_aloud_and_left_alone(cache, caplog, state):
    STATES[state](cache)
    before = os.lstat(cache)
    table = tuning.table()
    for problem in ("p", "q"):
        assert table.get("m", problem) is None
        table.put("m", problem, "a")
        assert table.get("m", problem) == "a"
    after = os.lstat(cache)
    assert (after.st_ino, after.st_size, after.st_mode) == (
        before.st_ino,
        before.st_size,
        before.st_mode,
    )
    assert len([text for text in caplog.messages if "ignoring" in text]) == 1
    assert len([text for text in caplog.messages if "cannot keep choices" in text]) == 1


@pytest.mark.parametrize("content", [NEWER, "half a f"])
def test_an_import_leaves_a_file_alone_that_it_does_not_understand(
    cache, tmp_path, capsys, content
):
    cache.write_text(content)
    tuning.export({"m": {"p": tuning.Choice("a")}}, tmp_path / "table.json")
    assert cli.main(["tuning", "import", str(tmp_path / "table.json")]) != 0
    assert "left as it is" in capsys.readouterr().err
    assert cache.read_text() == content


def test_a_lock_whose_holder_is_stopped_is_waited_for_once(cache, caplog):
    holder = os.open(cache.parent, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        table, begin = tuning.table(), time.monotonic()
        for problem in "pqrstuvw":
            table.put("m", problem, "a")
        assert time.monotonic() - begin < 2
        assert [table.get("m", problem) for problem in "pw"] == ["a", "a"]
    finally:
        os.close(holder)
    [message] = caplog.messages
    assert "another process has held the lock" in message


def test_without_a_home_choices_are_kept_in_memory(monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("VOVNET_FAST_CACHE")
    monkeypatch.setattr(tuning.Path, "home", no_home)
    tuning._table.cache_clear()
    table = tuning.table()
    table.put("m", "p", "a")
    assert table.get("m", "p") == "a"
    assert tuning.kept_in("verified.json") is None
    [message] = caplog.messages
    assert "set VOVNET_FAST_CACHE" in message


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("step", ["open", "replace", "fsync", "write_text", "mkdir"])
def test_a_step_of_writing_that_fails_leaves_the_file_as_it_was(
    cache, monkeypatch, caplog, step, code
):
    tuning.table().put("m", "known", "b")
    before = cache.read_bytes()
    caplog.clear()
    place = tuning.Path if step in ("write_text", "mkdir") else os

    def fails(*_, **__):
        raise OSError(code, os.strerror(code))

    table = tuning.table()
    with monkeypatch.context() as patch:
        patch.setattr(place, step, fails)
        table.put("m", "new", "a")
        table.put("m", "newer", "a")
    assert table.get("m", "new") == table.get("m", "newer") == "a"
    assert cache.read_bytes() == before
    with contextlib.suppress(FileNotFoundError):
        assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    assert len(caplog.messages) == 1
