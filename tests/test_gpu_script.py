"""benchmarks/gpu.py on a CPU: every step in a dry run, and steps that go wrong."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu

QUICK = [sys.executable, "-S", "-c"]


def step(name, code, limit=20.0, **options):
    return gpu.Step(name, f"shows {name}", [*QUICK, code], limit, **options)


def run(tmp_path, steps, seconds=60.0):
    """Outcomes by name, after checking that the files say the same."""
    runner = gpu.Run(tmp_path, steps, seconds, {"commit": "abc"}, grace=1.0)
    good = runner.all()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["provenance"] == {"commit": "abc"}
    rows = {row["name"]: row for row in summary["steps"]}
    assert list(rows) == [step.name for step in steps]
    table = (tmp_path / "summary.md").read_text()
    assert all(
        f"| {name} | shows {name} | {row['status']} |" in table for name, row in rows.items()
    )
    assert good == (not {"failed", "timed out"} & {row["status"] for row in rows.values()})
    return rows


@pytest.fixture
def without_gpu():
    if torch.cuda.is_available():
        pytest.skip("on a GPU: make gpu")


def script(*words):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, str(gpu.ROOT / "benchmarks" / "gpu.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_dry_run_walks_through_every_step(tmp_path, without_gpu):
    pytest.importorskip("triton")
    done = script("--out", f"{tmp_path}/{{gpu}}-{{commit}}", "--dry-run", "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "cpu-abc"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["provenance"]["torch"] == torch.__version__
    assert "nothing was measured" in summary["provenance"]["dry_run"]
    steps = {row["name"]: row for row in summary["steps"]}
    assert {"kernels", "compile", "inference", "gpu", "memcheck", "conv", "tuning"} == set(steps)
    assert {row["status"] for row in steps.values()} == {"passed"}
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "summary.json", "summary.md", "log.txt", "junit_kernels.xml", "junit_gpu.xml",
        "benchmarks.json", "tuning.json",
    }  # fmt: skip
    for path in folder.iterdir():
        text = path.read_text()
        assert str(gpu.ROOT) not in text
        assert "hostname" not in text
    rows = json.loads((folder / "benchmarks.json").read_text())["benchmarks"]
    assert {row["step"] for row in rows} == {"inference", "conv"}
    folded = next(row for row in rows if row.get("provider") == "folded")
    assert folded["ratio_to_eager"] > 0
    assert folded["distance"] < 1e-3


def test_without_a_gpu_it_says_so(tmp_path, without_gpu):
    done = script("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_steps_that_go_wrong_cost_their_own_results_only(tmp_path):
    def unreadable():
        raise ValueError("no such row")

    rows = run(
        tmp_path,
        [
            step("fails", "raise SystemExit(3)"),
            step("crashes", "import os; print('before', flush=True); os.abort()"),
            gpu.Step("unknown", "shows unknown", ["/no/such/program"], 20.0),
            step("unreadable", "print(1)", finish=unreadable),
            step("absent", "print(1)", missing="there is no such tool"),
            step("works", "print('well')"),
        ],
    )
    status = {name: row["status"] for name, row in rows.items()}
    assert status == {
        "fails": "failed", "crashes": "failed", "unknown": "failed", "unreadable": "failed",
        "absent": "missing", "works": "passed",
    }  # fmt: skip
    assert rows["fails"]["detail"].startswith("exit 3")
    assert "before" in rows["crashes"]["detail"]
    assert "no such row" in rows["unreadable"]["detail"]
    assert rows["works"]["detail"] == "well"
    log = (tmp_path / "log.txt").read_text()
    assert all(f"===== {name}: " in log for name in rows if name != "absent")


def test_the_time_limit_of_a_step(tmp_path):
    """One that listens to the interrupt writes its results; one that does not is killed."""
    polite = (
        "import time\ntry:\n    print('up', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('written', flush=True)"
    )
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    begin = time.monotonic()
    rows = run(tmp_path, [step("polite", polite, 2.0), step("deaf", deaf, 2.0), step("next", "")])
    assert time.monotonic() - begin < 20
    assert rows["polite"]["status"] == rows["deaf"]["status"] == "timed out"
    assert rows["next"]["status"] == "passed"
    assert "written" in (tmp_path / "log.txt").read_text()


def test_what_does_not_fit_is_left_out(tmp_path):
    rows = run(tmp_path, [step("long", "", 100.0, reserve=30.0), step("last", "", 5.0)], 40.0)
    assert rows["long"]["status"] == "left out"
    assert rows["last"]["status"] == "passed"


def test_the_summary_is_there_from_the_beginning(tmp_path):
    gpu.Run(tmp_path, [step("one", "")], 60.0, {})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["status"] for row in summary["steps"]] == ["pending"]


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
    assert gpu._by_sanitizer(code, output).status == status


def test_the_steps_on_a_gpu(tmp_path):
    """They cannot run here; their names, limits and what they select can be looked at."""
    steps = gpu.gpu_steps(gpu.Folder(tmp_path, tmp_path, dry=False))
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert names[0] == "kernels"
    assert names[-1] == "tuning"
    assert all(step.reserve for step in steps[2:-1] if step.name != "gpu")
