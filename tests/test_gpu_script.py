"""benchmarks/gpu.py on a CPU: every step in a dry run, and steps that go wrong."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch

from benchmarks import gpu, steps

UNRESERVED = ("gpu", "hopper", "gradients")
"""Steps that may take what is left: what comes after them is worth less."""

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
    pytest.importorskip("triton", minversion="3.6")
    pytest.importorskip("pytest_benchmark")
    done = script("--out", f"{tmp_path}/{{gpu}}-{{commit}}", "--dry-run", "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "cpu-abc"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["provenance"]["torch"] == torch.__version__
    assert "nothing was measured" in summary["provenance"]["dry_run"]
    steps = {row["name"]: row for row in summary["steps"]}
    assert list(steps) == [
        "kernels", "compile", "inference", "gpu", "memcheck", "conv", "training", "tuning",
        "trainings", "report",
    ]  # fmt: skip
    comparison = steps.pop("trainings")
    assert comparison["status"] == ("passed" if find_spec("mmdet") else "missing")
    assert {row["status"] for row in steps.values()} == {"passed"}
    files = {path.name for path in folder.iterdir()}
    pictures = {name for name in files if name.endswith(".png")}
    assert bool(pictures) == bool(find_spec("matplotlib"))
    assert files == {
        "summary.json", "summary.md", "log.txt", "junit_kernels.xml", "junit_gpu.xml",
        "benchmarks.json", "tuning.json", "report.md",
    } | pictures  # fmt: skip
    drawn = "with its pictures" if pictures else "without pictures, as matplotlib is not installed"
    assert steps["report"]["detail"] == f"report.md, {drawn}"
    assert "[report.md](report.md)" in (folder / "summary.md").read_text()
    assert all(f"]({name})" in (folder / "report.md").read_text() for name in pictures)
    for path in folder.iterdir():
        content = path.read_bytes()
        assert str(gpu.ROOT).encode() not in content
        assert b"hostname" not in content
    rows = json.loads((folder / "benchmarks.json").read_text())["benchmarks"]
    assert {row["step"] for row in rows} == {"inference", "conv", "training"}
    folded = next(row for row in rows if row.get("provider") == "folded")
    assert folded["ratio_to_eager"] > 0
    assert folded["distance"] < 1e-3
    trained = {row["provider"]: row for row in rows if row["step"] == "training"}
    assert set(trained) == {"eager", "checkpoint", "folding"}
    assert all(row["ratio_to_eager"] > 0 for row in trained.values())
    assert trained["eager"]["distance"] == trained["checkpoint"]["distance"] == 0
    assert 0 < trained["folding"]["distance"] < 0.1
    table = (folder / "summary.md").read_text()
    assert all(f"| training | {spec_and_shape(row)} |" in table for row in trained.values())


def spec_and_shape(row):
    return f"{row['spec']} | {row['shape']} | {row['provider']}"


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
    assert names[-3:] == ["tuning", "trainings", "report"]
    assert all(step.reserve for step in steps[2:-1] if step.name not in UNRESERVED)
    assert [step.name for step in steps if step.optional] == ["report"]
    assert names.index("compile training") < min(
        i for i, name in enumerate(names) if name.startswith("training ")
    )


def test_the_table_of_networks(tmp_path):
    rows = tmp_path / "benchmarks.json"
    assert steps.networks(rows) == ""
    measured = dict(step="training", spec="V-39-eSE", shape="2x3x8x8", provider="fused")
    measured |= dict(device_ms=1.234, ratio_to_eager=2.0, peak_mib=100.4, peak_to_eager=0.5)
    rows.write_text(json.dumps({"benchmarks": [{"step": "conv"}, measured]}))
    assert steps.networks(rows).splitlines()[-1] == (
        "| training | V-39-eSE | 2x3x8x8 | fused | 1.23 | 2.00 | 100 | 0.50 |  |  |"
    )


def test_trainings_leave_their_results(tmp_path):
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    for folder in (out, scratch / "comparison"):
        folder.mkdir(parents=True)
    step = gpu.Folder(out, scratch, dry=False).comparison(60)
    step.finish()
    assert not list(out.iterdir()), "a comparison that never ran has no results"
    (scratch / "comparison" / "metrics.json").write_text("{}")
    (scratch / "comparison" / "comparison.png").write_bytes(b"png")
    step.finish()
    assert {path.name for path in out.iterdir()} == {"comparison.json", "comparison.png"}


def test_the_report_costs_no_run(tmp_path, monkeypatch):
    """Not when there are no rows, not when it cannot be made of them, not when it hangs."""
    folder = gpu.Folder(tmp_path, tmp_path, dry=True)
    empty = gpu.Run(tmp_path, [folder.report(60)], 60.0, {})
    assert empty.all()
    assert empty.results[0].status == "missing"
    assert "[report.md]" not in (tmp_path / "summary.md").read_text()
    (tmp_path / "benchmarks.json").write_text('{"benchmarks": [{"kind": "conv"}]}')
    [failed, hung] = [
        gpu.Run(tmp_path, [step], 60.0, {}, grace=1.0)
        for step in (
            folder.report(60),
            step("report", "import time; time.sleep(60)", 1.0, optional=True),
        )
    ]
    assert failed.all()
    assert failed.results[0].status == "failed"
    assert "none of the 1 rows" in failed.results[0].detail
    assert hung.all()
    assert hung.results[0].status == "timed out"
    (tmp_path / "report.md").write_text("# Benchmarks")
    monkeypatch.setattr(gpu, "_installed", lambda name: False)
    outcome = folder.report(60).read(0, "")
    assert outcome.status == "passed"
    assert "matplotlib is not installed" in outcome.detail
