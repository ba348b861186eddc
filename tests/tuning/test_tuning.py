import json
import logging
import multiprocessing
import threading

import pytest
import torch

from vovnet_fast import _files, compat, tuning
from vovnet_fast.tuning import Candidates, Choice

CPU = torch.device("cpu")
SECONDS = {"a": 3e-6, "b": 1e-6, "c": 2e-6}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path / "cache"))
    for name in ("VOVNET_FAST_TUNE", "VOVNET_FAST_TUNING_TABLE"):
        monkeypatch.delenv(name, raising=False)
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


def choose(ran, problem="conv", candidates="abc", static="a", run=None, prepare=None):
    run = run or ran.append
    return tuning.choose(CPU, problem, list(candidates), static, run, stopwatch(ran), prepare)


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
    found = {"choice": "b", "seconds": SECONDS, "layer": {}}
    assert content == {
        "format": 2,
        "choices": {tuning.machine(CPU): {"conv": found, "another": found}},
    }
    assert [p.name for p in cache.parent.iterdir()] == ["tuning.json"]


def test_measuring_is_announced_once(measurable, cache, caplog):
    """It takes minutes, in which nothing else would tell the user what goes on."""
    tuning._announce.cache_clear()
    choose([])
    choose([], problem="another")
    [message] = caplog.messages
    assert "takes minutes" in message
    assert str(cache) in message
    assert "VOVNET_FAST_TUNE=0" in message


def test_other_versions_measure_again(measurable, monkeypatch):
    ran = []
    choose(ran)
    monkeypatch.setattr(tuning, "machine", lambda device: "another driver")
    choose(ran)
    assert len(ran) == 6


def test_a_choice_that_cannot_take_these_tensors_stays_for_others(measurable):
    """Problems are families of sizes: measuring anew would alternate between two of them."""
    ran = []
    assert choose(ran) == "b"
    assert choose(ran, candidates="ac", static="a") == "a"
    assert choose(ran) == "b"
    assert ran == ["a", "b", "c"]


def test_nothing_is_measured_without_a_gpu_or_when_told_not_to(monkeypatch):
    ran = []
    assert choose(ran) == "a"
    monkeypatch.setattr(tuning, "may_measure", lambda device: tuning.enabled())
    monkeypatch.setenv("VOVNET_FAST_TUNE", "0")
    assert choose(ran) == "a"
    assert ran == []
    tuning.table().put(tuning.machine(CPU), "conv", "c")
    assert choose(ran) == "c"  # What is known is used all the same.
    monkeypatch.setenv("VOVNET_FAST_TUNE", "yes")
    with pytest.raises(ValueError, match="VOVNET_FAST_TUNE must be 0, 1 or all, got 'yes'"):
        choose(ran, problem="new")


def test_a_candidate_that_fails_is_left_out_and_named(measurable, caplog):
    ran = []

    def run(name):
        ran.append(name)
        if name == "b":
            raise RuntimeError("out of resources")

    assert choose(ran, run=run) == "c"
    assert "candidate b does not run and is left out: out of resources" in caplog.text
    with pytest.raises(RuntimeError, match="runs and is right for all: b; VOVNET_FAST_BACKEND=ref"):
        choose(ran, problem="all", candidates="b", run=run)


def test_a_candidate_that_is_wrong_is_never_timed(measurable, caplog):
    """Nor one whose trial fails. Trials come before anything is timed, and only once."""
    events = []

    def prepare():
        events.append("prepare")

        def trial(name):
            assert compat.autocast_dtype("cpu") is None
            events.append(f"try {name}")
            if name == "c":
                raise RuntimeError("out of resources")
            return "error 0.5, allowed 0.001" if name == "b" else None

        return trial

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choose(events, prepare=prepare) == "a"
    assert events == ["prepare", "try a", "try b", "try c", "a"]
    assert "candidate b is wrong and is left out, conv: error 0.5, allowed 0.001" in caplog.text
    assert "candidate c does not run and is left out: out of resources" in caplog.text
    assert choose(events, prepare=prepare) == "a"
    assert len(events) == 5
    with pytest.raises(RuntimeError, match="runs and is right for new: b, c"):
        choose(events, problem="new", candidates="bc", prepare=prepare)


LIKELY = Candidates({"a": 1e-6, "b": 2e-6, "c": 3e-6}, ("a", "c"), {"c_in": 64})


def predicted(ran, found=LIKELY, **options):
    run = options.pop("run", ran.append)
    return tuning.choose(CPU, "conv", found, "a", run, stopwatch(ran), **options)


def test_the_likely_ones_alone_are_measured(measurable):
    ran = []
    assert predicted(ran) == "c"
    assert ran == ["a", "c"]
    [kept] = tuning.table().choices()[tuning.machine(CPU)].values()
    assert kept == Choice("c", {"a": 3e-6, "c": 2e-6}, {"c_in": 64})


def test_all_are_measured_when_told_to(measurable, monkeypatch):
    monkeypatch.setenv("VOVNET_FAST_TUNE", "all")
    ran = []
    assert predicted(ran) == "b"
    assert ran == ["a", "b", "c"]
    assert tuning.measured(LIKELY) == ["a", "b", "c"]


def test_others_have_their_turn_where_none_of_the_likely_ones_is_right(measurable, caplog):
    ran = []
    assert predicted(ran, prepare=lambda: lambda name: None if name == "b" else "wrong") == "b"
    assert ran == ["b"]
    assert "candidate a is wrong" in caplog.text


def test_names_of_format_1_are_read(cache):
    cache.parent.mkdir()
    cache.write_text(json.dumps({"format": 1, "choices": {tuning.machine(CPU): {"conv": "c"}}}))
    assert choose([]) == "c"
    tuning.table().put(tuning.machine(CPU), "pool", "a")
    content = {"format": 2, "choices": {tuning.machine(CPU): {"conv": "c", "pool": "a"}}}
    assert json.loads(cache.read_text()) == content


def test_static_choices_know_and_measure_nothing(measurable):
    ran = []
    choose(ran)
    with tuning.static_choices():
        assert choose(ran) == choose(ran, problem="new") == "a"
        in_another_thread = []
        thread = threading.Thread(target=lambda: in_another_thread.append(choose(ran)))
        thread.start()
        thread.join()
    assert in_another_thread == ["b"]
    assert choose(ran) == "b"
    assert len(ran) == 3


def test_tf32_is_read_where_torch_keeps_it(monkeypatch):
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    try:
        cudnn.allow_tf32 = True
        assert tuning.tf32_allowed() is True
        cudnn.allow_tf32 = False
        assert tuning.tf32_allowed() is False
    finally:
        cudnn.allow_tf32 = before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch has no such setting")
def test_tf32_may_be_said_for_convolutions_alone():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "ieee"
        assert tuning.tf32_allowed() is False
    finally:
        conv.fp32_precision = before
    assert tuning.tf32_allowed() is (before == "tf32")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 0, "choices": {}}',
        '{"format": 1, "choices": {"m": {"p": 1}}}',
        '{"format": 2, "choices": {"m": {"p": {"choice": "a", "seconds": {"a": "fast"}}}}}',
    ],
)
def test_a_damaged_file_is_ignored_aloud(measurable, cache, caplog, content):
    cache.parent.mkdir()
    cache.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert choose([]) == "b"
        assert choose([], problem="another") == "b"
    assert "ignoring the file" in caplog.text
    assert caplog.text.count("is left as it is") == 1
    assert cache.read_text() == content  # It may be a newer version's.


def test_a_folder_that_cannot_be_written_stops_nothing(measurable, cache, caplog):
    cache.parent.write_text("a file where the folder should be")
    ran = []
    assert choose(ran) == "b"
    assert choose(ran) == "b"
    assert len(ran) == 3
    assert "cannot keep choices" in caplog.text


def test_tables_of_one_file_lose_nothing(measurable, cache):
    one, other = tuning.Table(cache), tuning.Table(cache)
    assert one.get("m", "p") is other.get("m", "p") is None
    one.put("m", "p", "a")
    other.put("m", "q", "b")
    assert tuning.read(cache) == {"m": {"p": Choice("a"), "q": Choice("b")}}
    threads = [threading.Thread(target=one.put, args=("m", str(i), "c")) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tuning.read(cache)["m"]) == 22


def _put_many(path, process, barrier):
    table = tuning.Table(path)
    barrier.wait()
    for i in range(25):
        table.put(f"machine {process}", str(i), "a")


@pytest.mark.skipif(_files.fcntl is None, reason="no locks on this system")
def test_processes_that_write_at_the_same_time_lose_nothing(cache):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_put_many, args=(cache, i, barrier)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert {machine: len(found) for machine, found in tuning.read(cache).items()} == {
        "machine 0": 25,
        "machine 1": 25,
    }


def test_tables_can_be_shipped(measurable, cache, tmp_path):
    choose([])
    tuning.export(tuning.table().choices(), tmp_path / "h200.json")
    shipped = tuning.load(tmp_path / "h200.json")
    fresh = tuning.Table(tmp_path / "new" / "tuning.json")
    fresh.put(tuning.machine(CPU), "another", "a")
    fresh.add(shipped)
    assert fresh.get(tuning.machine(CPU), "conv") == "b"
    fresh.add({tuning.machine(CPU): {"conv": Choice("c")}})
    assert fresh.get(tuning.machine(CPU), "conv") == "b"  # What is known stays.
    assert tuning.read(fresh.path)[tuning.machine(CPU)]["conv"].seconds == SECONDS
    fresh.add({tuning.machine(CPU): {"conv": Choice("c")}}, replace=True)
    assert tuning.read(fresh.path) == {
        tuning.machine(CPU): {"another": Choice("a"), "conv": Choice("c")}
    }


def test_a_table_may_lie_beneath_the_users_own(measurable, cache, tmp_path, monkeypatch):
    beneath = tmp_path / "h200.json"
    tuning.export({tuning.machine(CPU): {"conv": Choice("c"), "pool": Choice("c")}}, beneath)
    monkeypatch.setenv("VOVNET_FAST_TUNING_TABLE", str(beneath))
    ran = []
    assert choose(ran) == "c"
    assert ran == []
    tuning.table().put(tuning.machine(CPU), "conv", "a")
    assert choose(ran) == "a"
    assert choose(ran, problem="pool") == "c"
    own = {"conv": Choice("a")}
    assert tuning.read(cache) == {tuning.machine(CPU): own}  # Not what lies beneath.
    assert tuning.table().choices() == {tuning.machine(CPU): own | {"pool": Choice("c")}}


@pytest.mark.parametrize("content", [None, "[]"])
def test_a_table_that_is_named_and_cannot_be_read_is_an_error(tmp_path, monkeypatch, content):
    path = tmp_path / "h200.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("VOVNET_FAST_TUNING_TABLE", str(path))
    with pytest.raises(ValueError, match=r"VOVNET_FAST_TUNING_TABLE=.*h200.json cannot be read"):
        choose([])
