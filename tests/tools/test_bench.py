"""``vovnet-fast bench`` without further words, and what it measures with."""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vovnet_fast import BackendError
from vovnet_fast import _provenance as provenance
from vovnet_fast.compat import zip
from vovnet_fast.tools import cli
from vovnet_fast.tools.bench import command, quick, rows, stopwatch
from vovnet_fast.tools.bench.stopwatch import (
    CONFIDENCE,
    Interval,
    Stopwatch,
    interleaved,
    ratio_interval,
    spread,
)
from vovnet_fast.tools.bench.training import TrainingStep

CPU = torch.device("cpu")


class Watch(Stopwatch):
    """A stopwatch whose time is what the call returns."""

    def __init__(self):
        super().__init__(CPU)
        self.chilled = 0

    def chill(self):
        self.chilled += 1

    def time(self, work):
        return work()


def noting(log, name, seconds=1.0):
    def work():
        log.append(name)
        return seconds

    return work


def test_rounds_run_everybody_in_turn():
    log = []
    works = {name: noting(log, name) for name in "abc"}
    watch = Watch()
    times = interleaved(works, 30, watch=watch, warm_up=3)
    assert {name: len(found) for name, found in times.items()} == dict(a=30, b=30, c=30)
    assert watch.chilled == len(log) == 99
    rounds = ["".join(log[i : i + 3]) for i in range(0, 99, 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert "".join(each[0] for each in rounds) == "abc" * 11
    assert {*rounds} == {"abc", "acb", "bac", "bca", "cab", "cba"}


def test_a_warm_call_follows_one_of_itself():
    log, watch = [], Watch()
    interleaved({name: noting(log, name) for name in "ab"}, 2, watch=watch, warm_up=0, cold=False)
    assert "".join(log) == "aabbbbaa"
    assert watch.chilled == 0


def test_seconds_end_the_rounds_but_not_before_the_fewest():
    def taking(seconds):
        return len(interleaved({"a": lambda: 1.0}, 50, watch=Watch(), seconds=seconds)["a"])

    assert taking(0.0) == 5
    assert taking(60.0) == 50
    with pytest.raises(ValueError, match="needs a call and a round, got 0 calls"):
        interleaved({}, 5, watch=Watch())


@pytest.mark.parametrize(("busy", "naps"), [(0, 1), (3, 4), (10**6, 50)])
def test_a_call_waits_for_threads_that_spin(monkeypatch, busy, naps):
    """As long as the process takes a processor's time while it sleeps; of those that never rest
    nobody waits for the end."""
    clock, slept = [0.0], []

    def sleep(seconds):
        clock[0] += 2 * seconds if len(slept) < busy else seconds / 100
        slept.append(seconds)

    monkeypatch.setattr(stopwatch.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(stopwatch.time, "sleep", sleep)
    for wait in (Stopwatch(CPU).chill, Stopwatch(CPU).rest):
        slept.clear()
        wait()
        assert len(slept) == naps


def test_a_stopwatch_on_this_cpu():
    import time

    watch = Stopwatch(CPU)
    assert watch.time(lambda: time.sleep(0.01)) >= 0.01
    assert watch.median(lambda: time.sleep(0.002), rounds=3) >= 0.002


def test_a_ratio_is_that_of_the_pairs():
    drift = [1.0, 1.1, 1.5, 3.0, 2.0, 1.2, 1.0, 1.6]
    ratio, low, high, _ = ratio_interval([2 * t for t in drift], drift)
    assert ratio == low == high == 2
    noisy = [t * (1.1 if i % 2 else 0.9) for i, t in enumerate(drift)]
    ratio, low, high, _ = ratio_interval([2 * t for t in drift], noisy)
    assert low < ratio < high
    assert low > 1.8
    assert high < 2.3


# Which of the sorted ratios are the ends, from tables of the sign test, and 1 - 2 P(B < k).
RANKS = {6: (1, 1 - 2 / 64), 8: (1, 1 - 2 / 256), 9: (2, 1 - 20 / 512), 10: (2, 1 - 22 / 1024)}


@pytest.mark.parametrize("pairs", RANKS)
def test_the_interval_lies_between_ratios(pairs):
    rank, confidence = RANKS[pairs]
    ratios = [1.0 + i for i in range(pairs)]
    shuffled = ratios[::2] + ratios[1::2][::-1]
    found = ratio_interval(shuffled, [1.0] * pairs)
    assert found == (statistics.median(ratios), rank, pairs + 1 - rank, confidence)
    assert found.confidence >= CONFIDENCE


@pytest.mark.parametrize(("pairs", "confidence"), [(1, 0), (2, 0.5), (5, 0.9375)])
def test_too_few_pairs_give_their_range(pairs, confidence):
    found = ratio_interval([1.0 + i for i in range(pairs)], [1.0] * pairs)
    assert found[1:] == (1.0, pairs, confidence)
    assert found.text().endswith(f" to {pairs:.2f}, {math.floor(100 * confidence)} %)")
    assert ratio_interval([1.0] * pairs, [1.0] * pairs, confidence=0.01).confidence >= 0


def test_any_confidence_can_be_asked_for():
    ratios = [1.0 + i for i in range(101)]
    narrow, wide = (ratio_interval(ratios, [1.0] * 101, confidence=c) for c in (0.5, 0.999))
    assert wide.low < narrow.low < narrow.ratio == wide.ratio == 51 < narrow.high < wide.high
    assert 0.5 <= narrow.confidence < 0.6
    assert 0.999 <= wide.confidence < 0.9995
    many = ratio_interval(ratios * 30, [1.0] * 3030)
    assert CONFIDENCE <= many.confidence < 0.953
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        ratio_interval([1.0], [1.0], confidence=95)


@pytest.mark.parametrize("pairs", [7, 10, 30])
@pytest.mark.parametrize("spread", ["normal", "log-normal"])
def test_the_interval_covers_the_true_median(spread, pairs):
    """At least as often as it says, however skewed the ratios are; a bootstrap's does not."""
    random = np.random.default_rng(0)
    times = random.normal(1, 0.1, (20_000, pairs))
    if spread == "log-normal":
        times = random.lognormal(0, 1.5, (20_000, pairs))
    found = [ratio_interval(draw.tolist(), [1.0] * pairs) for draw in times]
    covered = np.mean([interval.low <= 1 <= interval.high for interval in found])
    assert covered >= CONFIDENCE
    assert covered == pytest.approx(found[0].confidence, abs=0.005)


def test_an_interval_in_words():
    sure, unsure = Interval(1.254, 1.2, 1.31, 0.957), Interval(1.254, 1.2, 1.31, 0.9375)
    assert sure.text() == Interval(1.254, 1.2, 1.31).text() == "1.25 (1.20 to 1.31)"
    assert unsure.text() == "1.25 (1.20 to 1.31, 93 %)"
    assert unsure.text(0.9) == sure.text()
    assert Interval.of(sure.fields()) == sure
    assert "ratio_confidence" not in Interval(1, 1, 1).fields()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([1.0], [1.0, 2.0], "got 1 and 2"), ([], [], "got 0 and 0"), ([1.0], [0.0], "positive"),
     ([math.nan], [1.0], "finite")],
)  # fmt: skip
def test_what_is_no_pair(a, b, message):
    with pytest.raises(ValueError, match=message):
        ratio_interval(a, b)


def test_spread_is_in_ms():
    found = spread([i / 1e3 for i in range(11)])
    expected = dict(device_ms=5, device_ms_min=0, device_ms_p10=1, device_ms_p90=9)
    assert found == pytest.approx(expected)


# --------------------------------------------------------------------------------------
# Provenance
# --------------------------------------------------------------------------------------


def test_provenance_says_what_was_forced(monkeypatch):
    for name in provenance._FORCING:
        monkeypatch.delenv(name, raising=False)
    assert "forced" not in provenance.collect(CPU)
    monkeypatch.setenv("VOVNET_FAST_CPU_ISA", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert provenance.collect(CPU)["forced"] == "VOVNET_FAST_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2"


def test_provenance_says_what_but_not_who(monkeypatch):
    monkeypatch.delenv(provenance.COMMIT_ENVIRONMENT, raising=False)
    found = provenance.collect(CPU)
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert {"date", "commit", "dirty", "device", "cpu", "python", "vovnet_fast"} <= set(found)
    text = json.dumps(found)
    # By values of some length: a user may be called a.
    for secret in (platform.node(), str(Path.home()), str(Path.cwd()), sys.prefix):
        assert len(secret) < 4 or secret not in text


def test_sources(tmp_path, monkeypatch):
    monkeypatch.delenv(provenance.COMMIT_ENVIRONMENT, raising=False)
    git = ["git", "-c", "user.name=a", "-c", "user.email=b", "-C", str(tmp_path)]

    def run(*words):
        subprocess.run([*git, *words], check=True, capture_output=True)

    assert provenance.sources(tmp_path) == {"commit": "unknown", "dirty": None}
    run("init")
    (tmp_path / "other").write_text("")
    run("add", "other")
    run("commit", "-m", "somebody else's")
    assert provenance.sources(tmp_path)["commit"] == "unknown", "not the package's own checkout"
    (tmp_path / "vovnet_fast").mkdir()
    (tmp_path / "vovnet_fast/_version.py").write_text("")
    run("add", ".")
    run("commit", "-m", "ours")
    found = provenance.sources(tmp_path)
    assert len(found["commit"]) == 12
    assert found["dirty"] is False
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/new").write_text("")
    assert provenance.sources(tmp_path) == found, "results are no change of the sources"
    (tmp_path / "other").write_text("changed")
    assert provenance.sources(tmp_path) == found | {"dirty": True}
    monkeypatch.setenv(provenance.COMMIT_ENVIRONMENT, "abc")
    assert provenance.sources(tmp_path) == {"commit": "abc", "dirty": None}


def fake_gpu(monkeypatch, folder, printed, status=0):
    """A device, and an nvidia-smi that prints a line."""
    script = folder / "nvidia-smi"
    script.write_text(f"#!{sys.executable}\nprint({printed!r})\nraise SystemExit({status})\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    class Properties:
        name, major, minor, total_memory, multi_processor_count = "A GPU", 9, 0, 2**37, 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return torch.device("cuda", 0)


def test_provenance_of_a_gpu(tmp_path, monkeypatch):
    device = fake_gpu(monkeypatch, tmp_path, "580.1, 700.00 W, 1980 MHz, 3201 MHz")
    found = provenance.collect(device)
    assert found["gpu"] == "A GPU"
    assert found["capability"] == "9.0"
    assert found["memory_gib"] == 128
    assert (found["driver"], found["power_limit"]) == ("580.1", "700.00 W")


def test_clocks_of_a_gpu(tmp_path, monkeypatch):
    device = fake_gpu(monkeypatch, tmp_path, "1500 MHz, 3201 MHz, 41, [N/A]")
    clocks = provenance.Clocks(device, apart=0)
    fake_gpu(monkeypatch, tmp_path, "1980 MHz, 3201 MHz, 60, 512.50 W")
    clocks.see()
    fake_gpu(monkeypatch, tmp_path, "1700 MHz, 3201 MHz, 55, 400.00 W")
    found = clocks.summary()
    assert found["sm_mhz"] == dict(first=1500, last=1700, least=1500, most=1980)
    assert found["power_w"] == dict(first=512.5, last=400, least=400, most=512.5)
    fake_gpu(monkeypatch, tmp_path, "no devices were found", status=6)
    assert provenance.Clocks(device).summary() == {}


def test_clocks_are_not_read_all_the_time(monkeypatch):
    readings = iter(range(100))
    monkeypatch.setattr(provenance.Clocks, "_read", lambda self: [("load", next(readings))])
    clocks = provenance.Clocks(CPU, apart=60)
    for _ in range(5):
        clocks.see()
    assert clocks.summary() == {"load": dict(first=0, last=1, least=0, most=1)}


# --------------------------------------------------------------------------------------
# A table in a minute
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    seen = []
    options = quick.Options.here("V-19-slim-dw-eSE", (1, 64, 64), "fp32", seconds=0.0)
    found = quick.measure(options, lambda what, done: seen.append((what, done)))
    whats, parts = zip(*seen, strict=True)
    assert list(parts) == sorted(parts), "a bar does not go back"
    assert parts[0] >= 0
    assert parts[-1] == 1
    assert any("preparing" in what for what in whats)
    return found


def test_rows(found):
    assert {row["kind"] for row in found.rows} == {"inference", "training"}
    for kind in ("inference", "training"):
        providers = [row["provider"] for row in found.rows if row["kind"] == kind]
        assert providers[:2] == ["eager", "eager NCHW"]
    for row in found.rows:
        assert row["spec"] == "V-19-slim-dw-eSE"
        assert row["shape"] == "1x3x64x64"
        assert len(row["times"]) == quick.FEWEST
        assert row["ratio_low"] <= row["ratio_to_eager"] <= row["ratio_high"]
        assert row["ratio_confidence"] >= CONFIDENCE, "as many rounds as that takes"
        assert 0 < row["device_ms_min"] <= row["device_ms_p10"] <= row["device_ms"]
        assert 0 <= row["distance"] < 1e-3
        assert row["provider"] != "eager" or row["distance"] == 0
    assert all(parameter is not None for parameter in found.provenance.values())
    assert found.provenance["clocks"]


def test_rows_are_what_the_report_reads(found, tmp_path):
    path = tmp_path / "rows.json"
    found.write(path)
    [section] = rows.load([path])
    assert len(section.rows) == len(found.rows)
    assert section.unknown == 0
    assert section.device in (found.provenance.get("gpu"), section.device)
    assert {row.direction for row in section.rows} == {"forward", "step"}


def test_the_table(found, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    asked = []

    def measure(options, progress):
        asked.append(options)
        progress("inference: [eager]", 0.5)
        return found

    monkeypatch.setattr(quick, "measure", measure)
    words = ["--spec", "V-39-eSE", "--shape", "2x96x64", "--dtype", "bf16", "--no-train"]
    assert cli.main(["bench", *words, "--json", str(tmp_path / "rows.json")]) == 0
    [options] = asked
    assert (options.spec, options.shape, options.dtype) == ("V-39-eSE", (2, 96, 64), "bf16")
    assert (options.train, options.backend) == (False, "auto")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[1:])) <= 80
    assert "…" not in out
    for row in found.rows:
        assert row["provider"] in out
        assert f"{row['device_ms']:.4g}" in out
    assert rows.load([tmp_path / "rows.json"])[0].rows
    assert cli.main(["bench"]) == 0
    assert asked[-1].train
    assert asked[-1].spec == quick.SPEC


def test_a_busy_machine_is_said(found):
    clocks = found.provenance["clocks"]
    busy = found.provenance | {"cores": 2, "clocks": clocks | {"load": {"most": 7.5}}}
    text = command._found_caption(quick.Found(found.options, busy, found.rows))
    assert "Others were at work too: up to 7.5 processes for 2 cores." in text
    calm = found.provenance | {"cores": 2, "clocks": clocks | {"load": {"most": 2.1}}}
    assert "at work" not in command._found_caption(quick.Found(found.options, calm, found.rows))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--json", "--json needs a FILE"),
        ("--json no/such/folder/rows.json", "its folder does not exist"),
        ("--threads 0", "--threads must be at least 1, got 0"),
        ("--shape 800x1344", "is written NxHxW"),
        ("--spec V-38-eSE", "did you mean V-39-eSE"),
        ("--plan V-39-eSE 1x64x64 --train", "--train belongs to measuring"),
        ("--memory V-39-eSE 1x64x64 --spec V-39-eSE", "--spec belongs to measuring"),
        ("--measure", "--measure belongs to --memory, not to measuring"),
    ],
)
def test_the_command_refuses(words, message, capsys, monkeypatch):
    monkeypatch.setattr(quick, "measure", lambda *_: pytest.fail("it has begun"))
    assert cli.main(["bench", *words.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vovnet-fast bench: ")
    assert message in error


def test_who_computes_something_else_is_not_measured(monkeypatch):
    options = quick.Options.here("V-19-slim-dw-eSE", (1, 64, 64), "fp32", train=False, seconds=0)
    monkeypatch.setattr(quick, "_distance", lambda result, first: float("nan"))
    with pytest.raises(BackendError, match="eager computes something else than eager: in inf"):
        quick.measure(options)


def test_a_training_step_leaves_the_same_gradients_each_time():
    model = torch.nn.Conv2d(3, 4, 3)
    forward = model.forward
    model.forward = lambda x: (forward(x),)
    step = TrainingStep(model, (2, 8, 8), CPU)
    step()
    first = [parameter.grad.clone() for parameter in step.parameters]
    step()
    assert step.distance(first) == 0
    assert step.distance([2 * gradient for gradient in first]) == pytest.approx(0.5)
    assert all(gradient.abs().sum() > 0 for gradient in first)
    step.clear()
    assert all(parameter.grad is None for parameter in step.parameters)
