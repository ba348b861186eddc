import json
import logging
import threading

import pytest
import torch

from vovnet_fast import tuning

CPU = torch.device("cpu")
SECONDS = {"a": 3e-6, "b": 1e-6, "c": 2e-6}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VOVNET_FAST_TUNE", raising=False)
    tuning._table.cache_clear()
    yield tmp_path / "cache" / "tuning.json"
    tuning._table.cache_clear()


@pytest.fixture
def measurable(monkeypatch):
    """Let a CPU be measured: the selection does not depend on what is timed."""
    monkeypatch.setattr(tuning, "may_measure", lambda device: tuning.enabled())


def stopwatch(ran):
    """A timer that runs the work and then says what SECONDS has for it."""

    def timer(work):
        work()
        return SECONDS[ran[-1]]

    return timer


def choose(ran, problem="conv", candidates="abc", static="a", run=None):
    run = run or ran.append
    return tuning.choose(CPU, problem, list(candidates), static, run, stopwatch(ran))


def test_the_fastest_is_taken_measured_once_and_kept(measurable, cache):
    ran = []
    assert choose(ran) == "b"
    assert ran == ["a", "b", "c"]
    assert choose(ran) == "b"
    assert len(ran) == 3
    tuning._table.cache_clear()  # As in a new process.
    assert choose(ran) == "b"
    assert len(ran) == 3
    assert choose(ran, problem="another") == "b"
    assert len(ran) == 6
    content = json.loads(cache.read_text())
    assert content == {
        "format": 1,
        "choices": {tuning.machine(CPU): {"conv": "b", "another": "b"}},
    }
    assert [p.name for p in cache.parent.iterdir()] == ["tuning.json"]


def test_other_versions_measure_again(measurable, monkeypatch):
    ran = []
    choose(ran)
    monkeypatch.setattr(tuning, "machine", lambda device: "another driver")
    choose(ran)
    assert len(ran) == 6


def test_a_choice_that_is_no_candidate_any_more_is_measured_again(measurable):
    ran = []
    choose(ran)
    assert choose(ran, candidates="ac") == "c"
    assert choose(ran, candidates="ac") == "c"
    assert ran == ["a", "b", "c", "a", "c"]


def test_nothing_is_measured_without_a_gpu_or_when_told_not_to(monkeypatch):
    ran = []
    assert choose(ran) == "a"
    monkeypatch.setattr(tuning, "may_measure", lambda device: tuning.enabled())
    monkeypatch.setenv("VOVNET_FAST_TUNE", "0")
    assert choose(ran) == "a"
    assert ran == []
    tuning.table().add({tuning.machine(CPU): {"conv": "c"}})
    assert choose(ran) == "c"  # What is known is used all the same.
    monkeypatch.setenv("VOVNET_FAST_TUNE", "yes")
    with pytest.raises(ValueError, match="VOVNET_FAST_TUNE must be 0 or 1, got 'yes'"):
        choose(ran, problem="new")


def test_a_candidate_that_fails_is_left_out_and_named(measurable, caplog):
    ran = []

    def run(name):
        ran.append(name)
        if name == "b":
            raise RuntimeError("out of resources")

    assert choose(ran, run=run) == "c"
    assert "candidate b does not run and is left out: out of resources" in caplog.text
    with pytest.raises(RuntimeError, match="none of the candidates runs for all: b"):
        choose(ran, problem="all", candidates="b", run=run)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": 0, "choices": {}}', '{"format": 1, "choices": {"m": {"p": 1}}}'],
)
def test_a_damaged_file_is_ignored_aloud(measurable, cache, caplog, content):
    cache.parent.mkdir()
    cache.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert choose([]) == "b"
    assert "ignoring the tuning file" in caplog.text
    assert json.loads(cache.read_text())["choices"]


def test_a_folder_that_cannot_be_written_stops_nothing(measurable, cache, caplog):
    cache.parent.write_text("a file where the folder should be")
    ran = []
    assert choose(ran) == "b"
    assert choose(ran) == "b"
    assert len(ran) == 3
    assert "cannot keep tuning choices" in caplog.text


def test_processes_that_tune_side_by_side_lose_nothing(measurable, cache):
    one, other = tuning.Table(cache), tuning.Table(cache)
    assert one.get("m", "p") is other.get("m", "p") is None
    one.put("m", "p", "a")
    other.put("m", "q", "b")
    assert tuning.read(cache) == {"m": {"p": "a", "q": "b"}}
    threads = [threading.Thread(target=one.put, args=("m", str(i), "c")) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tuning.read(cache)["m"]) == 22


def test_tables_can_be_shipped(measurable, tmp_path):
    choose([])
    tuning.export(tuning.table().choices(), tmp_path / "h200.json")
    shipped = tuning.read(tmp_path / "h200.json")
    fresh = tuning.Table(tmp_path / "none" / "tuning.json")
    fresh.add(shipped)
    assert fresh.get(tuning.machine(CPU), "conv") == "b"
