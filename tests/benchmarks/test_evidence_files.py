"""The files that a run of benchmarks/gpu.py leaves: whole after each entry, and never large."""

import json
import os
import subprocess
import sys
import tarfile

import pytest

from benchmarks.evidence import records
from benchmarks.evidence.folder import ARCHIVE, Folder, Log
from benchmarks.evidence.processes import Printed
from benchmarks.evidence.records import ROOT, Records, Sink
from benchmarks.evidence.steps import by_sanitizer, by_tests

QUICK = [sys.executable, "-S", "-c"]


@pytest.fixture
def file(tmp_path):
    found = Records(tmp_path / "tests.json", "tests")
    found.rewrite({"format": 1}, [])
    return found


def test_entries_are_there_one_by_one(file):
    assert json.loads(file.path.read_text()) == {"format": 1, "tests": []}
    for count in range(1, 4):
        file.append({"test": f"number {count}"})
        assert len(json.loads(file.path.read_text())["tests"]) == count
    with file.edited() as (head, entries):
        head["more"] = True
        del entries[0]
    assert json.loads(file.path.read_text()) == {
        "format": 1, "more": True, "tests": [{"test": "number 2"}, {"test": "number 3"}]
    }  # fmt: skip


def test_several_processes_append_to_one_file(file):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks.evidence.records import Records
file = Records(Path({str(file.path)!r}), "tests")
for i in range(100):
    file.append({{"test": f"{{sys.argv[1]}} {{i}}"}}, sync=False)
"""
    processes = [subprocess.Popen([*QUICK, code, str(i)]) for i in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    found = [entry["test"] for entry in json.loads(file.path.read_text())["tests"]]
    assert sorted(found) == sorted(f"{p} {i}" for p in range(4) for i in range(100))


@pytest.mark.parametrize("damage", [b'{"test": "hal', b"", b",\n{}\n"])
def test_a_damaged_end_costs_the_damaged_entry_only(file, damage):
    file.append({"test": "first"})
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[: -len(records._TAIL)] + (b",\n" if damage else b"") + damage)
    file.append({"test": "second"})
    found = json.loads(file.path.read_text())["tests"]
    assert [entry["test"] for entry in found if entry] == ["first", "second"]


def test_a_file_that_would_be_too_large_loses_its_middle(file, monkeypatch):
    monkeypatch.setattr(records, "LIMIT", 4000)
    for i in range(200):
        file.append({"test": f"number {i}"}, sync=False)
        assert file.path.stat().st_size <= 4000
    found = json.loads(file.path.read_text())["tests"]
    assert found[0] == {"test": "number 0"}
    assert found[-1] == {"test": "number 199"}
    assert any("left out" in entry.get("note", "") for entry in found)


def test_outside_of_a_run_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.delenv(records.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    Sink.here().ended("a test", "passed", 1.0)
    assert not list(tmp_path.iterdir())


def test_printed_keeps_both_ends():
    lines = []
    printed = Printed(lines.append, kept=100)
    for i in range(1000):
        printed.feed(f"line {i}\n".encode())
    printed.feed(b"unfinished")
    printed.flush()
    assert printed.text().startswith("line 0\nline 1\n")
    assert printed.text().endswith("line 999\nunfinished")
    assert f"[... {printed.count - 100} bytes left out ...]" in printed.text()
    assert "".join(lines).splitlines()[-1] == "unfinished"


def test_the_log_has_room_for_every_step(tmp_path):
    log = Log(tmp_path / "log.txt", limit=50_000, each=4000)
    for i in range(20):
        log.begin(f"step {i}", "a command")
        log.live(text := "".join(f"{i}: line {n}\n" for n in range(1000)))
        log.end(f"step {i}", "passed", text)
    assert log._path.stat().st_size <= 50_000
    text = log._path.read_text()
    assert all(f"===== step {i}: passed" in text for i in range(20))
    assert "0: line 0\n" in text
    assert "0: line 999\n" in text


def test_the_archive_names_no_machine(tmp_path):
    folder = Folder(tmp_path / "out", tmp_path / "scratch")
    folder.create({})
    (folder.rest / "junit.xml").write_text(f'<suite hostname="mine" file="{ROOT}/tests"/>')
    assert folder.pack() == []
    with tarfile.open(folder.out / ARCHIVE) as archive:
        assert archive.extractfile("junit.xml").read() == b'<suite file="./tests"/>'


def test_what_is_too_large_for_the_archive_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.evidence.folder.LIMIT", 50_000)
    folder = Folder(tmp_path / "out", tmp_path / "scratch")
    folder.create({})
    (folder.rest / "small.txt").write_text("small")
    (folder.rest / "large.bin").write_bytes(os.urandom(100_000))
    assert folder.pack() == ["large.bin"]
    with tarfile.open(folder.out / ARCHIVE) as archive:
        assert archive.getnames() == ["small.txt"]


# --------------------------------------------------------------------------------------
# Outcomes
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "output", "status"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "passed"),
        (9, "========= ERROR SUMMARY: 3 errors", "failed"),
        (0, "===== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed"),
        (1, "========= Error: Device not supported", "missing"),
        (0, "nothing that it should print", "failed"),
    ],
)
def test_what_the_sanitizer_says(code, output, status):
    assert by_sanitizer(code, output).status == status


@pytest.mark.parametrize(
    ("code", "outcomes", "status", "detail"),
    [
        (0, ["passed", "skipped"], "passed", "1 passed, 0 failed, 1 skipped"),
        (1, ["passed", "failed"], "failed", "1 passed, 1 failed, 0 skipped: test_1"),
        (1, ["error"], "failed", "0 passed, 1 failed, 0 skipped: test_0"),
        (5, [], "passed", "no tests"),
        (4, [], "failed", "exit 4: usage"),
        (1, ["passed"], "failed", "1 passed, 0 failed, 0 skipped; exit 1: usage"),
    ],
)
def test_what_the_tests_say(code, outcomes, status, detail):
    tests = [{"test": f"file.py::test_{i}", "outcome": o} for i, o in enumerate(outcomes)]
    outcome = by_tests(code, "usage", tests)
    assert (outcome.status, outcome.detail) == (status, detail)
