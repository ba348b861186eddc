"""How the benchmarks time and compare, and what they hold rows against."""

import numpy as np
import pytest
import torch

from benchmarks.ceilings import COPY, Ceilings, multiplies_bf16
from benchmarks.timing import FEWEST, ROUNDS, burst, measure, warm_ms
from vovnet_fast.compat import zip
from vovnet_fast.tools.bench.stopwatch import CONFIDENCE, Stopwatch, ratio_interval

CPU = torch.device("cpu")


@pytest.fixture
def watch():
    return Stopwatch(CPU)


class Benchmark:
    """pytest-benchmark's fixture, as far as a row needs it."""

    def __init__(self):
        self.extra_info, self.rounds = {}, 0

    def pedantic(self, work, setup, rounds):
        self.rounds = rounds
        for _ in range(rounds):
            setup()
            work()


class Clock(Stopwatch):
    """A stopwatch on a machine that becomes slower and slower: calls take what they say."""

    def __init__(self):
        super().__init__(CPU)
        self.calls, self.slowness = [], 1.0

    def time(self, work):
        name, seconds = work()
        self.calls.append(name)
        self.slowness *= 1.01
        return seconds * self.slowness


# --------------------------------------------------------------------------------------
# Timing
# --------------------------------------------------------------------------------------


def test_a_round_has_both_in_changing_order():
    benchmark, clock = Benchmark(), Clock()
    found = measure(benchmark, clock, lambda: ("new", 1.0), lambda: ("eager", 2.0), seconds=1e9)
    assert benchmark.rounds == ROUNDS == len(found.times) == len(found.baseline)
    rounds = [clock.calls[-2 * ROUNDS :][2 * i : 2 * i + 2] for i in range(ROUNDS)]
    assert {tuple(r) for r in rounds} == {("eager", "new"), ("new", "eager")}
    assert [r[0] for r in rounds[:4]] == ["eager", "new"] * 2
    row = benchmark.extra_info
    # The machine became a third slower, and the ratio stays what it was.
    assert row["device_ms_p90"] > 1.2 * row["device_ms_min"]
    assert row["ratio_low"] <= 2.0 <= row["ratio_high"]
    assert 0.95 <= row["ratio_confidence"] < 0.96
    assert row["ratio_to_eager"] == pytest.approx(2.0, rel=0.011)
    assert row["eager_ms"] == pytest.approx(2 * row["device_ms"], rel=0.05)
    assert row["device_ms_min"] < row["device_ms_p10"] < row["device_ms"] < row["device_ms_p90"]


def test_warm_calls_follow_one_of_themselves():
    """Whichever comes first in a round."""
    log = []

    def noting(name):
        return lambda: log.append(name) or (name, 1.0)

    measure(Benchmark(), Clock(), noting("new"), noting("eager"), seconds=0, warm=True)
    rounds = ["".join(each[0] for each in log[i : i + 4]) for i in range(0, len(log), 4)]
    assert set(rounds[-FEWEST:]) == {"nnee", "eenn"}


def test_slow_calls_get_fewer_rounds():
    benchmark = Benchmark()
    measure(benchmark, Clock(), lambda: ("new", 1.0), lambda: ("eager", 2.0), seconds=0)
    assert benchmark.rounds == FEWEST


def test_without_a_baseline_there_is_no_ratio(watch):
    benchmark = Benchmark()
    found = measure(benchmark, watch, lambda: None, seconds=0)
    assert found.baseline == []
    assert set(benchmark.extra_info) == {f"device_ms{s}" for s in ("", "_min", "_p10", "_p90")}


@pytest.mark.parametrize("rounds", [FEWEST, ROUNDS])
def test_the_interval_covers_the_truth(rounds):
    """Of 300 measurements on a drifting machine with outliers, as many as it says."""
    random = np.random.default_rng(0)
    covered = wide = 0

    def noise():
        outliers = (random.random(rounds) < 0.1) * random.exponential(0.5, rounds)
        return np.exp(random.normal(0, 0.1, rounds) + outliers)

    for _ in range(300):
        drift = 1 + np.abs(np.cumsum(random.normal(0, 0.1, rounds)))
        a, b = 1.25 * drift * noise(), drift * noise()
        _, low, high, _ = ratio_interval(a.tolist(), b.tolist())
        covered += low <= 1.25 <= high
        wide += low <= 1.0
    assert covered / 300 >= CONFIDENCE
    assert rounds < ROUNDS or wide < 30, "so wide that it says nothing"


def test_warm_and_queued_calls(watch):
    calls = []
    assert warm_ms(watch, lambda: calls.append(1), seconds=0) > 0
    count = len(calls)
    assert burst(watch, lambda: calls.append(1), calls=3, rounds=2) > 0
    assert len(calls) - count == 9  # A warm-up, and two rounds.


# --------------------------------------------------------------------------------------
# Ceilings
# --------------------------------------------------------------------------------------


def test_ceilings(watch):
    ceilings = Ceilings(watch, side=64, copied=2**16)
    half = ["bfloat16"] if multiplies_bf16() else []
    assert Ceilings.names(CPU) == [COPY, *half, "float32"]
    copy, matmul = ceilings[COPY], ceilings["float32"]
    assert copy.rates() == {"gbs": 2 * 2**16 / min(copy.times) / 1e9}
    assert matmul.rates()["tflops"] == 2 * 64**3 / min(matmul.times) / 1e12
    assert ceilings[COPY].times is copy.times, "measured once"
    # A call that does twice what the multiplication does, in the same time.
    row = ceilings.fractions(4 * 64**3, 2**16, min(matmul.times), torch.float32)
    assert row["of_matmul"] == pytest.approx(2)
    assert row["of_copy"] == pytest.approx(min(copy.times) / min(matmul.times) / 2)
    assert "of_matmul" not in ceilings.fractions(1, 1, 1.0, torch.float16)


@pytest.mark.parametrize(
    ("seconds", "words"), [((2.0, 1.0), "a 1x1 convolution"), ((1.0, 2.0), "")]
)
def test_the_faster_of_two_libraries_is_the_ceiling(seconds, words, monkeypatch):
    ceilings = Ceilings(Clock(), side=32, copied=2**10)
    make = ceilings._make

    def timed(name, device):
        found = make(name, device)
        assert len(found) == 1 if name == COPY else len(found) == 2
        for way in found:
            way.work()  # It runs.
        return [
            way._replace(work=lambda t=t: ("it", t)) for way, t in zip(found, seconds, strict=False)
        ]

    monkeypatch.setattr(ceilings, "_make", timed)
    assert ceilings["float32"].name == ", ".join(
        filter(None, ["32x32 times 32x32 in float32", words])
    )
