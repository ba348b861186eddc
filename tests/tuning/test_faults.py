"""What page faults cost is no part of what a way of a training step takes."""

import mmap

import pytest
import torch

from vovnet_fast.tuning import faults, processor


def test_fresh_memory_is_counted():
    if faults.counter() is None:
        pytest.skip("nobody counts page faults here")
    before = faults.count()
    with mmap.mmap(-1, 8 << 20) as memory:
        memory[:] = bytes(8 << 20)
    assert faults.count() - before >= 4  # Of 2 MiB at most.


def test_what_one_costs():
    faults.seconds.cache_clear()
    assert 0 <= faults.seconds() < 1e-2
    assert faults.seconds() == faults.seconds()


def test_modes_of_the_caller_do_not_matter():
    faults.seconds.cache_clear()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert 0 <= faults.seconds() < 1e-2


@pytest.mark.parametrize(("cost", "best"), [(0.0, "ops"), (1e-6, "plain")])
def test_they_decide_nothing(monkeypatch, cost, best):
    """Of steps that differ in what the heap does, by a clock that has no other hands."""
    now, pages = [0.0], [0]
    takes = {"ops": (0.1, 0), "plain": (0.08, 30_000)}
    monkeypatch.setattr(processor.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(faults, "count", lambda: pages[0])
    monkeypatch.setattr(faults, "seconds", lambda: cost)

    def run(name):
        seconds, number = takes[name]
        now[0] += seconds + 1e-6 * number
        pages[0] += number

    found = processor._measure_steps([*takes], run)
    assert processor._best(found, None) == best
    expected = 0.11 if cost == 0 else 0.08
    assert found["plain"] == pytest.approx([expected] * len(found["plain"]))
