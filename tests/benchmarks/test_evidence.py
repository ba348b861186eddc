"""What runs the steps of benchmarks/gpu.py: whatever a step does, it takes no result along."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.evidence.folder import FILES, Folder
from benchmarks.evidence.processes import KEPT, watch
from benchmarks.evidence.records import LIMIT, ROOT
from benchmarks.evidence.runner import Run
from benchmarks.evidence.steps import Step, by_tests

QUICK = [sys.executable, "-S", "-c"]
PATIENT = 300.0
"""Seconds for what ends by itself: however slow the machine is."""

MANY_TIMES = 10
"""As long as a step takes that records and ends is what one is given that never ends."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what a killed step leaves")


def step(name, code, limit=PATIENT, **options):
    return Step(name, f"shows {name}", [*QUICK, code], 0.0, limit, **options)


def recording(code):
    """Code of a step that keeps results, with the sink at hand."""
    return f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{IMPORTS}\n{code}"


IMPORTS = """
import ctypes, os, signal, time
from benchmarks.evidence.records import Sink
sink = Sink.here()
sink.ended("before", "passed", 0.1)
sink.row("a row", {"device_ms": 1.5})
sink.began("the test")
"""


def run(tmp_path, steps, seconds=PATIENT, grace=1.0):
    """Outcomes by name, after checking that the files say the same."""
    folder = Folder(tmp_path / "out", tmp_path / "scratch")
    folder.create({"commit": "abc"})
    runner = Run(folder, steps, seconds, {"commit": "abc"}, grace=grace)
    good = runner.all()
    files = {path.name for path in folder.out.iterdir()}
    assert files <= set(FILES)
    assert all(path.stat().st_size <= LIMIT for path in folder.out.iterdir())
    summary = json.loads((folder.out / "summary.json").read_text())
    assert summary["provenance"] == {"commit": "abc"}
    rows = {row["name"]: row for row in summary["steps"]}
    assert list(rows) == [step.name for step in steps]
    table = (folder.out / "summary.md").read_text()
    assert all(
        f"| {name} | shows {name} | {row['status']} |" in table for name, row in rows.items()
    )
    assert good == (not {"failed", "timed out"} & {row["status"] for row in rows.values()})
    return rows


def outcomes_of(tmp_path):
    """Outcomes by step and test."""
    entries = json.loads((tmp_path / "out" / "tests.json").read_text())["tests"]
    return {(entry["step"], entry["test"]): entry["outcome"] for entry in entries}


def alive(pid):
    """Whether a process is there and no zombie."""
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


# --------------------------------------------------------------------------------------
# Steps that go wrong
# --------------------------------------------------------------------------------------


def test_steps_that_go_wrong_cost_their_own_results_only(tmp_path):
    def unreadable():
        raise ValueError("no such row")

    rows = run(
        tmp_path,
        [
            step("fails", "raise SystemExit(3)"),
            step("crashes", "import os; print('before', flush=True); os.abort()"),
            Step("unknown", "shows unknown", ["/no/such/program"], 0.0, PATIENT),
            step("unreadable", "print(1)", finish=unreadable),
            step("absent", "print(1)", missing="there is no such tool"),
            step("works", "print('well')"),
        ],
    )
    assert {name: row["status"] for name, row in rows.items()} == {
        "fails": "failed", "crashes": "failed", "unknown": "failed", "unreadable": "failed",
        "absent": "missing", "works": "passed",
    }  # fmt: skip
    assert rows["fails"]["detail"].startswith("exit 3")
    assert rows["crashes"]["detail"] == f"died of signal {signal.SIGABRT.value}: before"
    assert "no such row" in rows["unreadable"]["detail"]
    assert rows["works"]["detail"] == "well"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert all(f"===== {name}: " in log for name in rows if name != "absent")


HOLDS_THE_LOCK = "ctypes.PyDLL(None).pause()"
"""Sleeps in C without giving the interpreter's lock back: no signal handler of Python runs."""


@pytest.fixture(scope="module")
def enough(tmp_path_factory):
    """Seconds in which a step has certainly begun, as measured here and now."""
    rows = run(tmp_path_factory.mktemp("unit"), [step("unit", recording(""))])
    return max(1.0, MANY_TIMES * rows["unit"]["seconds"])


def test_a_step_that_hangs_names_its_test_and_keeps_what_it_had(tmp_path, enough):
    """One that hears the interrupt ends by itself; one that sleeps in C is killed."""
    polite = "try:\n    time.sleep(3600)\nexcept KeyboardInterrupt:\n    print('written')"
    rows = run(
        tmp_path,
        [
            step("polite", recording(polite), enough),
            step("deaf", recording(HOLDS_THE_LOCK), enough),
            step("next", "print('well')"),
        ],
    )
    assert {row["status"] for row in rows.values()} == {"timed out", "passed"}
    for name in ("polite", "deaf"):
        assert rows[name]["status"] == "timed out"
        assert rows[name]["detail"].startswith("it was in the test; stopped at its limit")
        assert outcomes_of(tmp_path)[name, "before"] == "passed"
        assert outcomes_of(tmp_path)[name, "the test"] == "stopped"
    found = json.loads((tmp_path / "out" / "rows.json").read_text())["benchmarks"]
    assert [(row["step"], row["name"]) for row in found] == [
        ("polite", "a row"), ("deaf", "a row")
    ]  # fmt: skip
    assert "written" in (tmp_path / "out" / "log.txt").read_text()


def test_a_step_that_is_killed(tmp_path):
    rows = run(tmp_path, [step("killed", recording("os.kill(os.getpid(), signal.SIGKILL)"))])
    assert rows["killed"]["status"] == "failed"
    assert "it was in the test" in rows["killed"]["detail"]
    assert "died of signal 9" in rows["killed"]["detail"]
    assert outcomes_of(tmp_path) == {
        ("killed", "before"): "passed", ("killed", "the test"): "crashed"
    }  # fmt: skip


def test_a_step_that_prints_without_end(tmp_path, enough):
    """Its beginning and its end are kept, in memory that does not grow."""
    code = "import sys\nprint('begin')\nwhile True: sys.stdout.write('x' * 99 + '\\n')"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = run(tmp_path, [step("endless", code, enough), step("next", "print('well')")])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 16 * KEPT
    assert rows["endless"]["status"] == "timed out"
    assert rows["next"]["status"] == "passed"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert len(log) < LIMIT // 8
    assert log.index("begin") < log.index("bytes left out") < log.index("===== next")


DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print("left behind:", os.getpid(), flush=True)
        time.sleep(3600)
    os._exit(0)
os.wait()
time.sleep({seconds})
"""


@pytest.mark.parametrize("seconds", [0.5, 3600])
def test_a_step_that_leaves_a_child_behind(tmp_path, seconds, enough):
    """A daemon: it has left the group, and its parent is gone."""
    limit = PATIENT if seconds < 1 else enough
    run(tmp_path, [step("daemon", DAEMON.format(seconds=seconds), limit)])
    text = (tmp_path / "out" / "log.txt").read_text()
    pid = int(text.rpartition("left behind: ")[2].split()[0])
    assert not alive(pid)


def test_the_runner_is_killed(tmp_path):
    """Every line is in the folder that was there before, and no step goes on alone."""
    code = recording("print('here', os.getpid(), flush=True); time.sleep(3600)")
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks.evidence.folder import Folder
from benchmarks.evidence.runner import Run
from benchmarks.evidence.steps import Step
folder = Folder(Path({str(tmp_path / "out")!r}), Path({str(tmp_path / "scratch")!r}))
folder.create({{"commit": "abc"}})
steps = [Step("one", "shows one", [{sys.executable!r}, "-S", "-c", {code!r}], 0.0, {PATIENT})]
Run(folder, steps, {PATIENT}, {{"commit": "abc"}}).all()
"""
    runner = subprocess.Popen([sys.executable, "-S", "-c", script])
    log = tmp_path / "out" / "log.txt"
    end = time.monotonic() + PATIENT
    found = None
    while found is None and time.monotonic() < end:
        time.sleep(0.05)
        found = re.search(r"^here (\d+)\n", log.read_text(), re.M) if log.exists() else None
    runner.kill()
    runner.wait()
    pid = int(found[1])
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(pid)
    assert outcomes_of(tmp_path) == {("one", "before"): "passed", ("one", "the test"): "began"}
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert [row["name"] for row in rows["benchmarks"]] == ["a row"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["status"] for row in summary["steps"]] == ["running"]
    assert {path.name for path in (tmp_path / "out").iterdir()} <= set(FILES)


# --------------------------------------------------------------------------------------
# A full disk
# --------------------------------------------------------------------------------------

MANY = """
for i in range(300):
    sink.ended(f"test {i}", "passed", 0.1, "x" * 500)
"""


def test_a_file_that_cannot_grow(tmp_path):
    """A write that ends in the midst of an entry takes back what it had written."""
    full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))\n{MANY}"
    rows = run(tmp_path, [step("fills", recording(full)), step("next", recording(""))])
    assert rows["fills"]["status"] == "failed"  # It was in a test, and did not say how it ended.
    found = outcomes_of(tmp_path)
    count = sum(name == "fills" for name, _ in found)
    assert 50 < count < 200
    assert found["next", "before"] == "passed"
    assert "cannot keep a result" in (tmp_path / "out" / "log.txt").read_text()


def test_a_full_disk(tmp_path):
    """A real one, small: what was kept before is kept, and what comes after too."""
    words = ["unshare", "--mount", "--map-root-user"]
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m none {disk}"
    if not shutil.which("unshare") or subprocess.run([*words, "sh", "-c", mount]).returncode:
        pytest.skip("no file system can be mounted here")
    fill = "open(os.environ['TMPDIR'] + '/large', 'wb').write(b'x' * 2**22)"
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import tests.benchmarks.test_evidence as t
from pathlib import Path
rows = t.run(Path({str(disk)!r}), [
    t.step("before", t.recording("")),
    t.step("fills", t.recording({fill!r})),
    t.step("after", t.recording("")),
])
print({{name: row["status"] for name, row in rows.items()}})
print(t.outcomes_of(Path({str(disk)!r})))
"""
    done = subprocess.run(
        [*words, "sh", "-c", f"{mount} && exec \"$0\" -c \"$1\"", sys.executable, script],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    statuses, found = map(eval, done.stdout.strip().splitlines()[-2:])
    assert statuses["fills"] == "failed"
    assert {found[name, "before"] for name in statuses} == {"passed"}


# --------------------------------------------------------------------------------------
# The time
# --------------------------------------------------------------------------------------


def timed(name, estimate, **options):
    return Step(name, f"shows {name}", [*QUICK, ""], estimate, PATIENT, **options)


def test_what_does_not_fit_is_left_out(tmp_path):
    rows = run(
        tmp_path,
        [timed("long", 200.0), timed("short", 0.0), timed("last", 150.0, closing=True)],
        seconds=220.0,
    )
    assert rows["long"]["status"] == "left out"
    assert "takes about 200 s" in rows["long"]["detail"]
    assert rows["short"]["status"] == rows["last"]["status"] == "passed"


def test_a_step_changes_what_is_expected_of_its_kind(tmp_path):
    """Twice as slow as estimated, but no more than three times is believed."""
    folder = Folder(tmp_path / "out", tmp_path / "scratch")
    folder.create({})
    steps = [timed("one", 10.0, kind="tests"), timed("two", 100.0, kind="tests")]
    runner = Run(folder, steps, 150.0, {})
    for seconds, pace in ((20.0, 2.0), (1.0, 0.5), (500.0, 3.0)):
        runner.results[0].seconds = seconds
        runner._pace(steps[0], runner.results[0])
        assert runner._paces == {"tests": pace}
    runner._one(steps[1], runner.results[1])
    assert runner.results[1].status == "left out"
    assert "takes about 300 s" in runner.results[1].detail


def test_the_summary_is_there_from_the_beginning(tmp_path):
    folder = Folder(tmp_path / "out", tmp_path / "scratch")
    folder.create({})
    Run(folder, [step("one", "")], PATIENT, {})
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["status"] for row in summary["steps"]] == ["pending"]


def test_nothing_waits_for_what_sigkill_does_not_end(monkeypatch):
    """As a process whose driver hangs; here it is only said to be there."""
    monkeypatch.setattr("benchmarks.evidence.processes._PATIENCE", 0.2)
    monkeypatch.setattr("benchmarks.evidence.processes._marked", lambda token: [])
    monkeypatch.setattr(subprocess.Popen, "poll", lambda self: None)
    words = [*QUICK, "import time; time.sleep(3600)"]
    environment = dict(os.environ)
    ended = watch(words, folder=ROOT, environment=environment, limit=0.1, grace=0.1)
    assert ended.code is None
    assert len(ended.survivors) == 1


# --------------------------------------------------------------------------------------
# Tests
# --------------------------------------------------------------------------------------

SUITE = """
import ctypes, os, pytest
def test_good(): pass
def test_bad(): assert 1 == 2
def test_skipped(): pytest.skip("no such thing")
@pytest.fixture
def broken(): raise OSError("no such device")
def test_error(broken): pass
def test_row(benchmark):
    benchmark.extra_info["device_ms"] = 2.5
    benchmark.pedantic(lambda: None, rounds=3)
def test_last(): os._exit(7)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_the_plugin_of_pytest(tmp_path, workers, monkeypatch):
    """Also in a worker of pytest-xdist, and of a test that ends its process."""
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # What this test runs in is not what it runs.
    pytest.importorskip("xdist")
    pytest.importorskip("pytest_benchmark")
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    words = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(workers),
        "-p", "benchmarks.evidence.recorder", "-c", os.devnull, f"--rootdir={tmp_path}",
    ]  # fmt: skip
    words += [str(suite), "-k", "not row" if workers else ""]
    step = Step("suite", "shows suite", words, 0.0, PATIENT, read=by_tests)
    rows = run(tmp_path, [step])
    assert rows["suite"]["status"] == "failed"
    found = {
        test.rpartition("::")[2]: outcome for (_, test), outcome in outcomes_of(tmp_path).items()
    }
    assert found.pop("test_row", "passed") == "passed"
    assert found == {
        "test_good": "passed", "test_bad": "failed", "test_skipped": "skipped",
        "test_error": "error", "test_last": "crashed",
    }  # fmt: skip
    assert "it was in" in rows["suite"]["detail"]
    entries = json.loads((tmp_path / "out" / "tests.json").read_text())["tests"]
    why = {entry["test"].rpartition("::")[2]: entry.get("why", "") for entry in entries}
    assert "assert 1 == 2" in why["test_bad"]
    assert why["test_skipped"] == "no such thing"
    kept = json.loads((tmp_path / "out" / "rows.json").read_text())["benchmarks"]
    assert [(row["name"], row["device_ms"], row["stats"]["rounds"]) for row in kept] == (
        [] if workers else [("test_row", 2.5, 3)]
    )
