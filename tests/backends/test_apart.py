"""Trials in a process of their own: whatever becomes of it, who asked gets an answer in time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vovnet_fast import _processes
from vovnet_fast.backends import _apart

CHILD = """
import json, os, sys, time

def main():
    given = json.load(sys.stdin)
    for line in given["says"]:
        print(line if isinstance(line, str) else json.dumps(line), flush=True)
    print(given.get("prints", ""), file=sys.stderr, flush=True)
    if given["then"] == "hangs":
        open(given["file"], "w").write(str(os.getpid()))
        time.sleep(600)
    if given["then"] == "aborts":
        os.abort()
    sys.exit(given.get("status", 0))
"""
"""A process that says and does what it is told, without the seconds of importing torch."""


@pytest.fixture
def child(tmp_path, monkeypatch):
    (tmp_path / "told_what_to_do.py").write_text(CHILD)
    monkeypatch.syspath_prepend(str(tmp_path))

    def attempt(then, *says, start=60.0, step=60.0, **others):
        given = dict(then=then, says=says, file=str(tmp_path / "pid"), **others)
        return _apart.attempt("told_what_to_do", given, start=start, step=step)

    attempt.pid = tmp_path / "pid"
    return attempt


def test_what_passes(child):
    says = ["begin", "one"], ["begin", "two"], ["passed", "2 trials"]
    assert child("ends", *says) == ("passed", "2 trials")
    assert child("ends", ["begin", "one"], ["failed", "error 3, at one"]).kind == "failed"
    # What comes after the verdict is nobody's matter: not even that it hangs.
    begin = time.monotonic()
    assert child("hangs", *says).kind == "passed"
    assert time.monotonic() - begin < 30


def test_what_hangs_is_ended(child):
    found = child("hangs", ["begin", "one"], ["begin", "two"], step=1.0)
    assert found == ("failed", "it hangs, 1 s without an end, at two")
    pid = int(child.pid.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_crashes(child):
    found = child("aborts", ["begin", "one"], prints="double free")
    assert found.kind == "failed"
    assert "it crashes, status -6 (double free" in found.words
    assert found.words.endswith("at one")
    # Whoever ends without a verdict has not passed.
    assert child("ends", ["begin", "one"]).kind == "failed"


def test_what_never_begins_says_nothing_of_what_is_tried(child):
    assert child("hangs", start=1.0) == (
        "unable",
        "the process to try it in has not begun in 1 s",
    )
    found = child("ends", status=3, prints="No module named torch")
    assert found.kind == "unable"
    assert "status 3 (No module named torch)" in found.words
    assert child("ends", "Usage: frozen-app [options]").kind == "unable"
    assert child("ends", ["unable", "all GPUs are taken"]) == ("unable", "all GPUs are taken")


@pytest.mark.parametrize("executable", ["", None, "/nowhere/python"])
def test_programs_without_an_interpreter(executable, child, monkeypatch):
    monkeypatch.setattr(sys, "executable", executable)
    found = child("ends", ["passed", ""])
    assert found.kind == "unable"
    assert "no process could be started" in found.words


def test_a_frozen_program_does_not_start_itself(child, monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert child("ends", ["passed", ""]).kind == "unable"


def series(*trials):
    said = []
    return _apart._series(iter(trials), said.append), said


def test_a_series_ends_with_the_first_that_is_wrong():
    def fine():
        return None

    def broken():
        raise RuntimeError("an illegal memory access")

    assert series(("one", fine), ("two", fine)) == (("passed", "2 trials"), ["one", "two"])
    wrong = ("two", lambda: "error 3, allowed 1")
    assert series(("one", fine), wrong, ("three", fine)) == (
        ("failed", "error 3, allowed 1, at two"),
        ["one", "two"],
    )
    found, _ = series(("one", broken))
    assert found == ("failed", "RuntimeError: an illegal memory access, at one")


def test_what_prevents_a_series_is_no_failure_of_what_is_tried():
    def full():
        raise _apart.Unable("there is no memory")

    assert series(("one", full))[0] == ("unable", "there is no memory")

    def prepared():
        yield "one", lambda: None
        raise MemoryError("of the reference")

    found = _apart._series(prepared(), lambda words: None)
    assert found == ("unable", "MemoryError: of the reference")


SERVED = """
import os
from vovnet_fast.backends import _apart

def trials(given):
    os.write(1, b"a library prints\\n")
    for i in range(given["count"]):
        yield f"trial {i}", lambda: None

def main():
    _apart.serve(trials)
"""


def test_a_process_that_serves(tmp_path, monkeypatch):
    """The real one, with torch: what libraries print does not come between."""
    (tmp_path / "serves_trials.py").write_text(SERVED)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert _apart.attempt("serves_trials", {"count": 3}) == ("passed", "3 trials")


@pytest.mark.skipif(sys.platform != "linux", reason="ends with its parent on Linux alone")
def test_it_ends_with_the_process_that_asked(tmp_path):
    """However that one ends."""
    (tmp_path / "stays.py").write_text(
        "import os, time\nfrom vovnet_fast import _processes\n"
        "def main():\n    _processes.begin()\n    print(os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
    )
    code = (
        "import subprocess, sys, os, signal; sys.path.insert(0, sys.argv[1]); "
        "from vovnet_fast import _processes; "
        "p = subprocess.Popen(_processes.command('stays', 'main'), stdout=subprocess.PIPE); "
        "print(int(p.stdout.readline()), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":  # Nobody has asked for its status.
            return
        time.sleep(0.1)
    pytest.fail("it goes on")


def test_words_that_start_an_interpreter():
    words = _processes.command("some.module", "main")
    assert words[0] == sys.executable
    assert "import some.module as m; m.main()" in words[2]
    assert os.getcwd() in json.loads(words[3]) or "" not in sys.path
