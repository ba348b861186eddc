"""In which way a training step runs on a CPU: measured, remembered, and without a trace."""

import copy
import itertools
import json
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vovnet_fast
from tests.extension_cases import require
from vovnet_fast import reference, tuning
from vovnet_fast.backends import cpu
from vovnet_fast.network import decision, ways
from vovnet_fast.tuning import processor

SPEC = "V-19-slim-dw-eSE"


@pytest.fixture(autouse=True)
def _measuring(monkeypatch, tmp_path):
    require("cpu")
    torch.manual_seed(0)
    monkeypatch.setenv("VOVNET_FAST_TUNE", "1")
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(decision, "CPU_PIXELS_TRAINING", 0)  # Maps are small here.
    monkeypatch.setattr(processor, "ROUNDS", 1)
    monkeypatch.setattr(processor, "STEP_SECONDS", 0)
    monkeypatch.setattr(processor, "STEP_PATIENCE", 0.0)
    tuning._table.cache_clear()
    yield
    tuning._table.cache_clear()


@pytest.fixture
def steps(monkeypatch):
    """The ways that were tried, in their order."""
    found = []
    trial = ways._trial

    def note(network, x):
        run = trial(network, x)
        return lambda way: (found.append(way), run(way))

    monkeypatch.setattr(ways, "_trial", note)
    return found


@pytest.fixture
def slow(monkeypatch):
    """Makes a function take a second, by the clock that is measured with: it has no other hands."""
    now = [0.0]
    monkeypatch.setattr(processor.time, "perf_counter", lambda: now[0])

    def wait():
        now[0] += 1

    def slow(module, name):
        function = getattr(module, name)

        def slowly(*args, **kwargs):
            wait()
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, slowly)

    slow.wait = wait
    return slow


def images(size=32):
    return torch.randn(1, 3, size, size)


def train(model, x):
    features = model(x)
    sum(feature.sum() for feature in features).backward()
    return features


def ran_as_ops(model, x):
    names = {type(feature.grad_fn).__name__ for feature in model(x)}
    return names <= {"BlockBackward", "PermuteBackward0"}


def test_slow_ops_are_avoided(slow):
    slow(cpu, "conv_weight_grad")
    model, x = vovnet_fast.VoVNet(SPEC).train(), images()
    assert ways.choose(model, x) == ways.MODULES
    assert not ran_as_ops(model, x)


def test_slow_modules_are_avoided(slow):
    slow(reference, "osa_block")
    model, x = vovnet_fast.VoVNet(SPEC).train(), images()
    assert ways.choose(model, x) == ways.OPS
    assert ran_as_ops(model, x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_slow_layout_is_avoided(monkeypatch, slow, layout):
    slow(cpu, "conv_weight_grad")
    model, x = vovnet_fast.VoVNet(SPEC).train(), images().to(memory_format=layout)

    run = vovnet_fast.VoVNet._run_modules

    def slowly(self, x):
        if ways._is_channels_last(x) == (layout == torch.channels_last):
            slow.wait()
        return run(self, x)

    monkeypatch.setattr(vovnet_fast.VoVNet, "_run_modules", slowly)
    assert ways.choose(model, x) == ways.OTHER_LAYOUT
    found = train(model, x)
    with vovnet_fast.use_backend("reference"):
        expected = model(x)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def turns(monkeypatch):
    """Measures candidates whose turns take what a function says, by a clock with no other hands."""
    now, calls = [0.0], []
    monkeypatch.setattr(processor.time, "perf_counter", lambda: now[0])

    def measure(names, takes, least_rounds=2, most_rounds=8, seconds=1.0, **options):
        def run(name):
            calls.append(name)
            now[0] += takes(name, calls.count(name))

        calls.clear()
        return processor._measure(names, run, least_rounds, most_rounds, seconds, **options)

    measure.calls = calls
    return measure


def test_short_steps_are_measured_for_longer(turns):
    slow = {"a": 3.0, "b": 2.5}
    for times, least, rounds in (
        (slow, 2, 3), (slow, 3, 4), ({"a": 0.1, "b": 0.09}, 2, 6), ({"a": 0.0}, 2, 9),
    ):  # fmt: skip
        found = turns([*times], lambda name, _, times=times: times[name], least_rounds=least)
        assert len(turns.calls) == len(times) * rounds
        assert {name: len(of) for name, of in found.items()} == dict.fromkeys(times, rounds - 1)
        assert {name: max(of) for name, of in found.items()} == pytest.approx(times)


def test_every_round_begins_with_another_one(turns):
    turns(["a", "b", "c"], lambda *_: 0.0, most_rounds=40)
    rounds = ["".join(turns.calls[i : i + 3]) for i in range(0, len(turns.calls), 3)]
    assert len(rounds) == 41
    assert [order[0] for order in rounds[:8]] == [*"aabcabca"]
    assert {*rounds} == {*map("".join, itertools.permutations("abc"))}  # None follows always.


def test_steps_follow_one_of_themselves_where_there_is_time(turns):
    """A step finds the memory that the last one has left: the second of two is what counts."""
    for time, again in ((0.1, True), (0.3, False)):
        taken = {"a": time, "b": time}
        # However short the time is after which no round is added.
        found = turns([*"ab"], lambda name, _, t=taken: t[name], 2, 3, 0.1, after_themselves=1.0)
        assert len(turns.calls) == 2 + 2 * (2 if again else 1) * len(found["a"])
        pairs = turns.calls[2:]
        assert (pairs[::2] == pairs[1::2]) == again
        assert found["a"] + found["b"] == pytest.approx([time] * 2 * len(found["a"]))


def test_who_was_far_behind_is_not_taken():
    """What it had few turns with says little: its rounds were slow for all."""
    found = {"plain": [9.0, 9.0, 1.0, 1.0], "ops": [8.0, 8.0, 0.9, 0.9], "late": [7.0, 7.0]}
    assert processor._best(found, "plain") == processor._best(found, None) == "ops"
    assert processor._best({"plain": [9.0], "ops": [5.0, 5.0]}, "plain") == "ops"


def test_what_is_far_behind_has_no_more_turns(turns):
    times = {"a": 0.01, "b": 0.012, "c": 0.02}
    for least in (2, 3):
        found = turns([*times], lambda name, _: times[name], least_rounds=least)
        assert {name: len(of) for name, of in found.items()} == {"a": 8, "b": 8, "c": least}


def test_a_moment_of_speed_decides_nothing(turns):
    def takes(name, turn):
        return {"a": 2.0, "b": 3.0}[name] / (4 if (name, turn) == ("b", 3) else 1)

    found = turns(["a", "b"], takes, seconds=30.0)
    assert processor._best(found, None) == processor._best(found, "b") == "a"


def test_the_favourite_gives_way_to_what_is_sure_to_be_faster():
    for time, best in ((0.99, "plain"), (0.96, "plain"), (0.94, "ops"), (1.01, "plain")):
        found = {"ops": [time, 2 * time, time], "plain": [1.0, 2.0, 1.0]}
        assert processor._best(found, "plain") == best
        assert processor._best(found, None) == ("ops" if time < 1 else "plain")
    # A machine that is slower in some rounds is slower for all; medians would be 1 and 2.
    found = {"ops": [1.0, 1.0, 2.0, 2.0, 1.0], "plain": [1.0, 1.0, 2.0, 2.0, 2.0]}
    assert processor._best(found, "plain") == "plain"
    assert processor._best({"ops": [1.0], "mixed": [0.9]}, "plain") == "mixed"  # It did not run.


def test_modules_are_taken_where_nothing_is_faster(monkeypatch, slow):
    """By a clock that stands still all ways take as long."""
    model, x = vovnet_fast.VoVNet(SPEC).train(), images()
    assert ways.choose(model, x) == ways.MODULES
    assert not ran_as_ops(model, x)


def test_ops_on_small_maps_have_their_turn(monkeypatch, slow):
    """What is measured for a size is not what a constant says of it."""
    monkeypatch.setattr(decision, "CPU_PIXELS_TRAINING", 10**9)
    slow(reference, "osa_block")
    model, x = vovnet_fast.VoVNet(SPEC).train(), images()
    assert ways.choose(model, x) == ways.OPS
    assert ran_as_ops(model, x)


@pytest.mark.parametrize("norm_eval", [False, True])
def test_measuring_leaves_no_trace(monkeypatch, steps, norm_eval):
    model = vovnet_fast.VoVNet(SPEC, norm_eval=norm_eval, frozen_stages=1).train()
    twin, x = copy.deepcopy(model), images(64)
    random = torch.get_rng_state()
    found = train(model, x)
    assert set(steps) == {*ways.CANDIDATES}
    assert torch.equal(random, torch.get_rng_state())
    # The same way without a measurement.
    chosen = ways.choose(model, x)
    monkeypatch.setenv("VOVNET_FAST_TUNE", "0")
    expected = ways.run(twin, x, chosen)
    sum(feature.sum() for feature in expected).backward()
    assert all(map(torch.equal, found, expected))
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers()):
        assert torch.equal(ours, theirs), name


def test_it_is_measured_once(steps, tmp_path):
    model = vovnet_fast.VoVNet(SPEC).train()
    train(model, images())
    number = len(steps)
    assert number == 4 * (1 + processor.LEAST_STEP_ROUNDS)
    for _ in range(2):
        train(model, images())
    train(vovnet_fast.VoVNet(SPEC).train(), images(34))  # Nearly the same size, another network.
    assert len(steps) == number
    tuning._table.cache_clear()  # As the next process finds it.
    train(model, images())
    assert len(steps) == number
    [choices] = json.loads((tmp_path / "tuning.json").read_text())["choices"].values()
    [problem] = (problem for problem in choices if problem.startswith("training step"))
    assert problem.startswith(f"training step of {SPEC}, 1024 pixels, contiguous, torch.float32")


def test_what_is_another_problem(steps):
    model = vovnet_fast.VoVNet(SPEC, norm_eval=False).train()
    problems = {ways._problem(model, images())}
    problems.add(ways._problem(model, images(64)))
    problems.add(ways._problem(model, images().to(memory_format=torch.channels_last)))
    with torch.autocast("cpu", torch.bfloat16):
        problems.add(ways._problem(model, images()))
    problems.add(ways._problem(model, images().requires_grad_()))
    problems.add(ways._problem(vovnet_fast.VoVNet(SPEC, norm_eval=True).train(), images()))
    problems.add(ways._problem(vovnet_fast.VoVNet(SPEC, frozen_stages=2).train(), images()))
    assert len(problems) == 7
    assert not steps


def test_large_images_are_measured_by_a_part():
    for shape in ((6, 3, 640, 1600), (1, 3, 4000, 40), (64, 3, 224, 224), (1, 3, 33, 35)):
        n, channels, height, width = ways._measured_size(torch.empty(shape, device="meta"))
        assert channels == 3
        assert 1 <= n <= shape[0]
        assert min(32, shape[2]) <= height <= shape[2]
        assert min(32, shape[3]) <= width <= shape[3]
        assert n * height * width <= ways.PIXELS


def test_nothing_is_measured_where_it_is_not_wanted(monkeypatch, steps):
    model, x = vovnet_fast.VoVNet(SPEC).train(), images()
    with torch.no_grad():
        model(x)
    for name in ("reference", "cpu"):
        with vovnet_fast.use_backend(name):
            train(model, x)
    hooked = vovnet_fast.VoVNet(SPEC).train()
    called = []
    hooked.stage3.register_forward_hook(lambda *_: called.append(1))
    train(hooked, x)
    assert len(called) == 1
    train(torch.nn.SyncBatchNorm.convert_sync_batchnorm(vovnet_fast.VoVNet(SPEC)).eval(), x)
    torch.use_deterministic_algorithms(True)
    try:
        train(model, x)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("VOVNET_FAST_TUNE", "0")
    train(model, x)
    assert not steps


def test_within_activation_checkpointing(monkeypatch, steps):
    """Its hooks see what the step saves, and nothing of what was tried."""
    model, x = vovnet_fast.VoVNet(SPEC).train(), images().requires_grad_()
    found = checkpoint(model, x, use_reentrant=False)
    sum(feature.sum() for feature in found).backward()
    assert steps
    gradient, x.grad = x.grad, None
    train(model, x)
    assert torch.equal(gradient, x.grad)


def test_hooks_on_what_is_saved_see_the_step_alone(monkeypatch, steps, tmp_path):
    """Those of an older torch as well, which does not say that there are some."""
    model, x, seen, numbers = vovnet_fast.VoVNet(SPEC).train(), images(), [], []

    def note(saved):
        seen.append(saved.shape)
        return saved

    def step(*, trials):
        tuning._table.cache_clear()
        monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path / str(len(numbers))))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            features = model(x)
        sum(feature.sum() for feature in features).backward()
        numbers.append(len(seen))
        seen.clear()
        assert bool(steps) == trials
        steps.clear()

    monkeypatch.setattr(ways, "CANDIDATES", (ways.MIXED,))
    step(trials=True)
    top = "_top_saved_tensors_default_hooks"
    monkeypatch.delattr(torch._C._autograd, top, raising=False)
    step(trials=True)
    monkeypatch.setenv("VOVNET_FAST_TUNE", "0")
    step(trials=False)
    assert numbers[0] == numbers[1] == numbers[2] > 0


def test_where_there_must_be_no_such_hooks(steps):
    model = vovnet_fast.VoVNet(SPEC).train()
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        train(model, images())
    assert set(steps) == {*ways.CANDIDATES}


def test_function_modes_see_the_step_alone(monkeypatch, steps):
    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(function)
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(ways, "CANDIDATES", (ways.MIXED,))
    model, names, numbers = vovnet_fast.VoVNet(SPEC).train(), [], []
    for _ in range(2):
        with Seen():
            model(images())
        numbers.append(names.count(torch.nn.functional.batch_norm))
        names.clear()
    assert steps
    assert numbers[0] == numbers[1]


def test_it_is_tried_where_it_will_run(steps, monkeypatch):
    """In this thread: beside a second set of OpenMP threads the order is another one."""
    threads = []
    monkeypatch.setattr(ways, "run", lambda *args: threads.append(threading.get_ident()) or [])
    monkeypatch.setattr(torch.autograd, "backward", lambda *args: None)
    ways.choose(vovnet_fast.VoVNet(SPEC).train(), images())
    assert set(threads) == {threading.get_ident()}


def test_weights_are_cast_in_every_trial(monkeypatch, steps):
    """As they are in every step, although the caller's autocast is still open."""
    model = vovnet_fast.VoVNet(SPEC).train()
    monkeypatch.setattr(ways, "CANDIDATES", (ways.MODULES,))
    casts = []
    run = ways.run

    def count(network, x, way):
        with torch.profiler.profile() as profile:
            found = run(network, x, way)
        casts.append(sum(event.name == "aten::_to_copy" for event in profile.events()))
        return found

    monkeypatch.setattr(ways, "run", count)
    with torch.autocast("cpu", torch.bfloat16):
        ways.choose(model, images())
    assert len(casts) == 1 + processor.LEAST_STEP_ROUNDS
    assert len(set(casts)) == 1
    assert casts[0] > 0


def test_under_autocast(steps):
    model, x = vovnet_fast.VoVNet(SPEC).train(), images()
    with torch.autocast("cpu", torch.bfloat16):
        features = train(model, x)
    assert steps
    assert {feature.dtype for feature in features} == {torch.bfloat16}


def test_a_network_that_cannot_be_copied_trains(caplog):
    """As where a sharding has put views in the place of parameters."""
    model = vovnet_fast.VoVNet(SPEC).train()
    conv = model.stage3.OSA3_1.layers[0]._modules["OSA3_1_0/pw_conv1x1"]
    weight = torch.nn.Parameter(conv.weight.detach())
    del conv.weight
    conv.weight = weight * 1.0  # Deep copies are refused: it is no leaf.
    train(model, images())
    assert weight.grad is not None
    assert "not measured, and ops on large maps is taken" in caplog.text


def test_a_candidate_that_fails_is_left_out(monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise RuntimeError("not today")

    monkeypatch.setattr(reference, "osa_block", refuse)
    model, x = vovnet_fast.VoVNet(SPEC).train(), images()
    assert ways.choose(model, x) in (ways.OPS, ways.MIXED)
    assert "candidate modules does not run and is left out: not today" in caplog.text
