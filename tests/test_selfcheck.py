"""The self-check of backends, and what ``auto`` makes of it."""

import json
import math
import sys
import threading
import types

import pytest
import torch

from vovnet_fast import VoVNet, backends, selfcheck, tuning
from vovnet_fast.backends import reference

from .fused import needs_traces
from .tiny import TINY

CPU = torch.device("cpu")
FUNCTIONS = [
    name
    for name, value in vars(reference).items()
    if isinstance(value, types.FunctionType)
    and value.__module__ == reference.__name__
    and not name.startswith("_")
    and name != "why_not"
]


def forget():
    """As in a new process."""
    backends._decide.cache_clear()
    selfcheck._verdicts.clear()
    selfcheck._table.cache_clear()
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def verified(tmp_path, monkeypatch):
    """A cache of its own: the path of its verdicts."""
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("VOVNET_FAST_BACKEND", raising=False)
    forget()
    yield tmp_path / "verified.json"
    forget()


@pytest.fixture
def fake(monkeypatch):
    """A backend of the reference's functions that ``auto`` considers for CPUs."""
    module = types.ModuleType("vovnet_fast.backends.fake")
    module.why_not = lambda device: None
    for name in FUNCTIONS:
        setattr(module, name, getattr(reference, name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "fake"))
    monkeypatch.setattr(backends, "CANDIDATES", {"cpu": ("fake",)})
    return module


@pytest.fixture
def checks(monkeypatch):
    """The devices of the self-checks that ran. They take one function, to be quick."""
    ran, run = [], selfcheck.run

    def watched(backend, device, **options):
        ran.append((backend, str(device)))
        return run(backend, device, functions=["apply_gates"], **options)

    monkeypatch.setattr(selfcheck, "run", watched)
    return ran


def double(z, gates, identity, out):
    """A wrong apply_gates."""
    reference.apply_gates(z, gates, identity, out)
    out.mul_(2)


# --------------------------------------------------------------------------------------
# The check itself
# --------------------------------------------------------------------------------------


def test_every_function_is_checked_and_the_reference_passes():
    rows = selfcheck.run("reference", "cpu")
    assert {row.function for row in rows} == set(FUNCTIONS)
    assert {row.dtype for row in rows} == set(selfcheck.DTYPES)
    for row in rows:
        assert row.passed, row
        assert row.error <= row.allowed
        assert row.problem == ""


def only(backend, function, dtype=torch.float16):
    rows = selfcheck.run(backend, "cpu", [dtype], [function])
    assert {(row.function, row.dtype) for row in rows} == {(function, dtype)}
    return rows


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_that_does_nothing_is_found(fake, function):
    """Its outputs stay NaN, or are zero, or are not there at all."""

    def idle(*args, **options):
        found = getattr(reference, function)(*[_copy(a) for a in args], **_copies(options))
        if isinstance(found, tuple):
            return tuple(None if t is None else torch.zeros_like(t) for t in found)
        return None if found is None else torch.zeros_like(found)

    setattr(fake, function, idle)
    assert not any(row.passed for row in only("fake", function))


def _copy(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def _copies(options):
    return {name: _copy(value) for name, value in options.items()}


@pytest.mark.parametrize("dtype", selfcheck.DTYPES, ids=str)
def test_an_error_of_a_few_roundings_is_found(fake, dtype):
    def inexact(x, weight, out, *, stride):
        reference.depthwise(x, weight, out, stride=stride)
        out.mul_(1 + 16 * torch.finfo(dtype).eps)

    fake.depthwise = inexact
    for row in only("fake", "depthwise", dtype):
        assert not row.passed
        assert row.allowed < row.error < 20 * row.allowed
        assert f"error {row.error:.3g}, allowed {row.allowed:.3g}" in str(row)


def test_a_write_beside_the_slot_is_found(fake):
    def spill(z, gates, identity, out):
        reference.apply_gates(z, gates, identity, out)
        n, h, w, c = out.shape
        out.as_strided((n, h, w, c + 1), out.stride())[..., c] = 0

    fake.apply_gates = spill
    for row in only("fake", "apply_gates"):
        assert (row.passed, row.problem) == (False, "it wrote outside its slot")


def test_a_read_beside_the_slot_is_found(fake):
    def stray(z, gates, identity, out):
        reference.apply_gates(z, gates, identity, out)
        n, h, w, c = z.shape
        out[0, 0, 0, 0] += z.as_strided((n, h, w, c + 1), z.stride())[0, 0, 0, c]

    fake.apply_gates = stray
    for row in only("fake", "apply_gates"):
        assert not row.passed
        assert row.error == math.inf


def test_what_cannot_run_has_a_row_as_well(fake):
    def refuse(*args):
        raise RuntimeError("out of registers")

    fake.gate_sums = refuse
    del fake.normalize
    fake.depthwise_weight_grad = lambda x, g, *, stride: x[0]
    rows = selfcheck.run("fake", "cpu", [torch.float32])
    problems = {row.function: row.problem for row in rows if not row.passed}
    assert problems == {
        "gate_sums": "RuntimeError: out of registers",
        "normalize": "AttributeError: module 'vovnet_fast.backends.fake' has no attribute "
        "'normalize'",
        "depthwise_weight_grad": "its outputs are [[5, 7, 48]]",
    }
    with pytest.raises(ValueError, match="no function is called convolve"):
        selfcheck.run("fake", "cpu", functions=["convolve"])


def test_surroundings_of_the_caller_change_nothing():
    functions = ["conv", "max_pool"]
    expected = selfcheck.run("reference", "cpu", functions=functions)
    state = torch.get_rng_state()
    with (
        torch.device("meta"),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        assert selfcheck.run("reference", "cpu", functions=functions) == expected
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------
# Trust
# --------------------------------------------------------------------------------------


def test_a_backend_that_passes_is_remembered(fake, checks, verified):
    assert backends.select(CPU) == "fake"
    assert backends.fused(CPU, torch.float16)
    assert backends.get(CPU) is fake
    assert checks == [("fake", "cpu")]
    content = json.loads(verified.read_text())["choices"]
    [(subject, verdict)] = content[tuning.machine(CPU)].items()
    assert subject.startswith("fake of vovnet_fast 0.")
    assert verdict == "passed"
    forget()
    assert backends.select(CPU) == "fake"
    assert len(checks) == 1


def test_another_machine_or_other_sources_are_checked_again(fake, checks, monkeypatch):
    for name, value in (
        ("tuning.machine", lambda device: "another driver"),
        ("selfcheck._sources", lambda: "other"),
        ("selfcheck.__version__", "99"),
    ):
        backends.select(CPU)
        count = len(checks)
        monkeypatch.setattr(f"vovnet_fast.{name}", value)
        forget()
        assert backends.select(CPU) == "fake"
        assert len(checks) == count + 1, name


def test_a_backend_that_fails_is_named_once_and_not_taken(fake, checks, verified, caplog):
    fake.apply_gates = double
    for _ in range(2):
        assert backends.select(CPU) == "reference"
        assert not backends.fused(CPU)
    assert len(checks) == len(caplog.records) == 1
    assert "the fake backend fails its self-check on cpu; torch" in caplog.text
    assert "9 of 9 checks failed" in caplog.text
    assert "apply_gates (2x5x7x48, gates and identity, float16): error" in caplog.text
    assert "VOVNET_FAST_BACKEND=reference" in caplog.text
    assert not verified.exists()
    forget()
    fake.apply_gates = reference.apply_gates
    assert backends.select(CPU) == "fake"  # It is checked again by the next process.


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1, "choices": {"m": 1}}'])
def test_a_damaged_file_is_said_aloud_and_the_check_runs_again(
    fake, checks, verified, caplog, content
):
    verified.write_text(content)
    assert backends.select(CPU) == "fake"
    assert f"ignoring the file {verified}" in caplog.text
    assert len(checks) == 1
    forget()
    assert backends.select(CPU) == "fake"
    assert len(checks) == 1


def test_threads_wait_for_one_check(fake, checks):
    barrier, found = threading.Barrier(8), []

    def ask():
        barrier.wait()
        found.append(backends.select(CPU))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["fake"] * 8
    assert len(checks) == 1


def test_nothing_is_checked_during_a_capture(fake, checks, monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "CANDIDATES", {"cuda": ("fake",)})
    monkeypatch.setattr(tuning, "machine", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(backends.BackendError, match="run the model once before the capture"):
        backends.select(gpu)
    with backends.use_backend("reference"):
        assert backends.select(gpu) == "reference"
    assert checks == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(selfcheck, "run", lambda backend, device, **_: checks.append(device) or [])
    assert backends.select(gpu) == "fake"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backends.select(gpu) == "fake"  # Now it is known.
    forget()
    assert backends.select(gpu) == "fake"  # From the file, too.
    assert checks == [gpu]


def test_what_is_not_checked_is_not_taken(fake, checks):
    assert backends.select(CPU, torch.float64) == "reference"
    assert not backends.fused(CPU, torch.float64)
    fake.why_not = lambda device: "no such instructions"
    assert backends.select(CPU) == "reference"
    assert checks == []
    backends._decide.cache_clear()
    fake.why_not = lambda device: None
    assert backends.get(CPU, torch.float32) is fake


def test_the_next_candidate_has_its_turn(fake, checks, monkeypatch):
    second = types.ModuleType("vovnet_fast.backends.second")
    vars(second).update({k: v for k, v in vars(fake).items() if not k.startswith("__")})
    monkeypatch.setitem(sys.modules, second.__name__, second)
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "second"))
    monkeypatch.setattr(backends, "CANDIDATES", {"cpu": ("fake", "second")})
    fake.apply_gates = double
    assert backends.select(CPU) == "second"
    assert [name for name, _ in checks] == ["fake", "second"]


def test_auto_can_be_asked_for_and_tuning_has_no_say(fake, checks, monkeypatch):
    monkeypatch.setenv("VOVNET_FAST_BACKEND", "auto")
    monkeypatch.setenv("VOVNET_FAST_TUNE", "0")
    assert backends.chosen() == "auto"
    assert backends.select(CPU) == "fake"
    assert len(checks) == 1


def test_other_devices_have_the_reference(checks, monkeypatch):
    monkeypatch.setattr(backends, "CANDIDATES", {})
    assert backends.select(CPU) == "reference"
    assert not backends.fused(CPU)
    assert checks == []


# --------------------------------------------------------------------------------------
# Compilation and export
# --------------------------------------------------------------------------------------


@pytest.mark.versions
@needs_traces
@pytest.mark.parametrize("right", [True, False])
def test_the_decision_is_made_before_a_graph_is_traced(fake, checks, right, caplog):
    """With real tensors, whether the first to ask is an eager call or torch.compile."""
    if not right:
        fake.apply_gates = double

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x):
        return x + 1 if backends.fused(x.device, x.dtype) else x - 1

    x = torch.zeros(3)
    assert f(x).tolist() == [1.0 if right else -1.0] * 3
    assert f(x.double()).tolist() == [-1.0] * 3
    with backends.use_backend("reference"):
        assert f(x).tolist() == [-1.0] * 3
    assert checks == [("fake", "cpu")]


@needs_traces
def test_a_network_compiles_without_a_graph_break(fake, checks, monkeypatch):
    model, x = VoVNet(TINY["detectron2"]).eval(), torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        with backends.use_backend("reference"):
            expected = model(x)
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    assert checks == [("fake", "cpu")]


@pytest.mark.versions
@torch.no_grad()
def test_exported_graphs_are_those_of_plain_modules(fake, checks):
    model, x = VoVNet(TINY["detectron2"]).eval(), torch.randn(1, 3, 64, 64)
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        assert "vovnet_fast." not in str(program.graph)
    assert "vovnet_fast::" not in str(torch.jit.trace(model, x, check_trace=False).inlined_graph)
    assert checks == []
