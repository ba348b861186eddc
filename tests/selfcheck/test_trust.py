"""What ``auto`` makes of the self-check: trust by function and dtype, remembered."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from tests.features import needs_looks
from tests.fused import needs_traces
from tests.stand_in import forget, stand_in
from tests.tiny import FIRST, TINY
from vovnet_fast import VoVNet, backends, selfcheck, tuning
from vovnet_fast.backends import _extension, reference
from vovnet_fast.compat import zip
from vovnet_fast.network.blocks import OSABlock
from vovnet_fast.ops.features import needs
from vovnet_fast.selfcheck import runner, sources

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
NEEDS = ("apply_gates", "gate_sums")


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
    return stand_in(monkeypatch)


@pytest.fixture
def checks(monkeypatch):
    """What was checked, in turn: the functions of a backend in a dtype."""
    ran, run = [], runner.run

    def watched(backend, device, dtypes, functions, *, slim, progress):
        assert slim
        ran.extend((backend, function, dtype) for dtype in dtypes for function in functions)
        return run(backend, device, dtypes, functions, slim=True, progress=False)

    monkeypatch.setattr(runner, "run", watched)
    return ran


def checked(functions, dtype, backend="fake"):
    return [(backend, function, dtype) for function in functions]


def double(z, gates, identity, out):
    """A wrong apply_gates."""
    reference.apply_gates(z, gates, identity, out)
    out.mul_(2)


def test_what_is_used_is_checked_once_and_the_rest_never(fake, checks, verified):
    assert backends.select(CPU, FP32, NEEDS) == "fake"
    assert backends.fused(CPU, FP32, NEEDS)
    assert backends.get(CPU, FP32, NEEDS) is fake
    assert checks == checked(NEEDS, FP32)
    assert backends.select(CPU, FP32, ("max_pool", "gate_sums")) == "fake"
    assert checks == checked((*NEEDS, "max_pool"), FP32)  # The other one is known.
    assert backends.select(CPU, BF16, ("max_pool",)) == "fake"
    expected = [*checked((*NEEDS, "max_pool"), FP32), *checked(["max_pool"], BF16)]
    assert checks == expected
    [(machine, found)] = json.loads(verified.read_text())["choices"].items()
    assert machine == tuning.machine(CPU)
    assert set(found.values()) == {"passed"}
    subjects = sorted(f"{b} {f} {str(d).removeprefix('torch.')} sources" for b, f, d in expected)
    assert [subject.rpartition(" ")[0] for subject in sorted(found)] == subjects
    forget()
    for dtype, needed in ((FP32, (*NEEDS, "max_pool")), (BF16, ("max_pool",))):
        assert backends.select(CPU, dtype, needed) == "fake"
    assert checks == expected


def test_who_needs_nothing_is_told_what_there_is(fake, checks):
    assert backends.select(CPU, FP32, ()) == "fake"
    fake.why_not = lambda device: "no such instructions"
    forget()
    assert backends.select(CPU, FP32, ()) == "reference"
    assert checks == []


def test_a_call_asks_one_dictionary(fake, checks, monkeypatch):
    backends.select(CPU, FP32, NEEDS)
    for name in ("remembered", "trusted"):
        monkeypatch.setattr(selfcheck, name, None)
    monkeypatch.setattr(backends, "why_not", None)
    assert backends.select(CPU, FP32, NEEDS) == "fake"


def test_another_machine_is_checked_again(fake, checks, monkeypatch):
    backends.select(CPU, FP32, NEEDS)
    monkeypatch.setattr(tuning, "machine", lambda device: "another driver")
    forget()
    assert backends.select(CPU, FP32, NEEDS) == "fake"
    assert len(checks) == 2 * len(NEEDS)


def test_only_what_computes_the_function_invalidates_its_verdict(
    fake, checks, monkeypatch, tmp_path
):
    """Sources in a copy of the package, one of which is edited."""
    shutil.copytree(sources._PACKAGE / "kernels", tmp_path / "kernels")
    monkeypatch.setattr(sources, "_PACKAGE", tmp_path)
    of = {"gates": "kernels.ese", "max_pool": "kernels.max_pool"}
    fake.sources = lambda function: (of[function],)

    def select():
        forget()
        checks.clear()
        assert backends.select(CPU, FP32, ("gates", "max_pool")) == "fake"
        return [function for _, function, _ in checks]

    def edit(name):
        path = tmp_path / "kernels" / f"{name}.py"
        path.write_text(path.read_text() + "# Edited.\n")

    assert select() == ["gates", "max_pool"]
    assert select() == []
    edit("ese")
    assert select() == ["gates"]
    edit("_common")  # Which both of them import.
    assert select() == ["gates", "max_pool"]
    (tmp_path / "README.md").write_text("Edited.")
    assert select() == []


def test_tf32_is_part_of_what_sums_products_in_fp32_on_a_gpu(fake, checks, monkeypatch, verified):
    gpu, allowed = torch.device("cuda", 0), [True]
    monkeypatch.setattr(backends, "CANDIDATES", {"cuda": ("fake",)})
    monkeypatch.setattr(tuning, "machine", lambda device: "a GPU")
    monkeypatch.setattr(tuning, "tf32_allowed", lambda: allowed[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ran = []
    monkeypatch.setattr(
        runner, "run", lambda b, d, dtypes, functions, **_: ran.append((dtypes, functions)) or []
    )
    for dtype in (FP32, BF16):
        backends.select(gpu, dtype, ("conv", "max_pool"))
    allowed[0] = False
    for dtype in (FP32, BF16):
        backends.select(gpu, dtype, ("conv", "max_pool"))
    assert ran == [
        ([FP32], ["conv", "max_pool"]),
        ([BF16], ["conv", "max_pool"]),
        ([FP32], ["conv"]),
    ]
    assert (
        sum(
            " with TF32 " in subject
            for subject in json.loads(verified.read_text())["choices"]["a GPU"]
        )
        == 1
    )


def test_a_function_that_fails_is_named_once_and_what_needs_it_runs_elsewhere(
    fake, checks, verified, caplog
):
    fake.apply_gates = double
    for _ in range(2):
        assert backends.select(CPU, FP32, NEEDS) == "reference"
        assert not backends.fused(CPU, FP32, NEEDS)
    assert backends.select(CPU, FP32, ("apply_gates", "max_pool")) == "reference"
    assert checks == checked(NEEDS, FP32)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "the fake backend fails its self-check on cpu; torch" in caplog.text
    assert "in float32 and is not used for what needs apply_gates" in caplog.text
    assert "3 of 4 checks failed" in caplog.text
    assert "apply_gates (2x5x7x128, gated, float32): error" in caplog.text
    assert "VOVNET_FAST_BACKEND=reference" in caplog.text
    assert backends.select(CPU, FP32, ("gate_sums",)) == "fake"  # It passed beside the other.
    assert len(checks) == 2
    assert len(json.loads(verified.read_text())["choices"][tuning.machine(CPU)]) == 1
    forget()
    fake.apply_gates = reference.apply_gates
    assert backends.select(CPU, FP32, NEEDS) == "fake"  # It is checked again by the next process.
    assert checks[2:] == checked(["apply_gates"], FP32)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 1, "choices": {"m": 1}}', '{"format": 9}']
)
def test_a_damaged_file_is_said_aloud_and_the_check_runs_again(
    fake, checks, verified, caplog, content
):
    verified.write_text(content)
    assert backends.select(CPU, FP32, ("gates",)) == "fake"
    assert f"ignoring the file {verified}" in caplog.text
    assert len(checks) == 1
    forget()  # It may be a newer version's file, which is left as it is.
    assert backends.select(CPU, FP32, ("gates",)) == "fake"
    assert len(checks) == 2
    assert verified.read_text() == content


def test_a_file_that_cannot_be_written_is_said_aloud(fake, checks, verified, caplog, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr(tuning.Table, "add", refuse)
    assert backends.select(CPU, FP32, ("gates",)) == "fake"
    assert f"cannot keep verdicts in {verified}: read-only" in caplog.text


def test_threads_wait_for_one_check(fake, checks):
    barrier, found = threading.Barrier(8), []

    def ask():
        barrier.wait()
        found.append(backends.select(CPU, FP32, NEEDS))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["fake"] * 8
    assert checks == checked(NEEDS, FP32)


def test_kernels_are_compiled_side_by_side_before_a_check_on_a_gpu(monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    from vovnet_fast.compiling import side_by_side, workers  # Before anything is patched.
    from vovnet_fast.kernels import _common

    done = []
    monkeypatch.setattr(tuning, "machine", lambda device: "a GPU")
    monkeypatch.setattr(_common, "interpreted", lambda: False)
    monkeypatch.setattr(_common, "target_of", lambda device: _common.Target())
    monkeypatch.setattr(
        side_by_side,
        "compile_launches",
        lambda launches, capability: done.extend(launch.kernel.fn.__name__ for launch in launches),
    )
    monkeypatch.setattr(runner, "run", lambda *_, **__: done.append("checked") or [])
    assert selfcheck.trusted("triton", torch.device("cuda", 0), BF16, ["max_pool"])
    assert done == ["max_pool_kernel", "max_pool_kernel", "checked"]
    monkeypatch.setenv(workers.ENVIRONMENT, "0")
    assert selfcheck.trusted("triton", torch.device("cuda", 0), FP32, ["max_pool"])
    assert done[3:] == ["checked"]


def test_nothing_is_checked_during_a_capture(fake, checks, monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "CANDIDATES", {"cuda": ("fake",)})
    monkeypatch.setattr(tuning, "machine", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(backends.BackendError, match="run the model once before the capture"):
        backends.select(gpu, BF16, NEEDS)
    with backends.use_backend("reference"):
        assert backends.select(gpu, BF16, NEEDS) == "reference"
    ran = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(runner, "run", lambda backend, device, *_, **__: ran.append(device) or [])
    assert backends.select(gpu, BF16, NEEDS) == "fake"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backends.select(gpu, BF16, NEEDS) == "fake"  # Now it is known.
    forget()
    assert backends.select(gpu, BF16, NEEDS) == "fake"  # From the file, too.
    with pytest.raises(backends.BackendError, match="in bfloat16 yet, of gates, which"):
        backends.select(gpu, BF16, ("gates",))
    assert ran == [gpu]


def test_what_is_not_checked_is_not_taken(fake, checks):
    for needed in (NEEDS, ()):
        assert backends.select(CPU, torch.float64, needed) == "reference"
        assert not backends.fused(CPU, torch.float64, needed)
    fake.why_not = lambda device: "no such instructions"
    assert backends.select(CPU, FP32, NEEDS) == "reference"
    assert checks == []


def test_the_next_candidate_has_its_turn(fake, checks, monkeypatch):
    second = stand_in(monkeypatch, "second")
    monkeypatch.setattr(backends, "CANDIDATES", {"cpu": ("fake", "second")})
    fake.apply_gates = double
    assert backends.get(CPU, FP32, NEEDS) is second
    assert checks == [*checked(NEEDS, FP32), *checked(NEEDS, FP32, "second")]
    assert backends.get(CPU, FP32, ("gate_sums",)) is fake


def test_auto_can_be_asked_for_and_tuning_has_no_say(fake, checks, monkeypatch):
    monkeypatch.setenv("VOVNET_FAST_BACKEND", "auto")
    monkeypatch.setenv("VOVNET_FAST_TUNE", "0")
    assert backends.chosen() == "auto"
    assert backends.select(CPU, FP32, NEEDS) == "fake"
    assert checks == checked(NEEDS, FP32)


def test_other_devices_have_the_reference(checks, monkeypatch):
    monkeypatch.setattr(backends, "CANDIDATES", {})
    assert backends.select(CPU, FP32, NEEDS) == "reference"
    assert not backends.fused(CPU, FP32, NEEDS)
    assert checks == []


# --------------------------------------------------------------------------------------
# Compilation and export
# --------------------------------------------------------------------------------------


@needs_traces
@pytest.mark.parametrize("right", [True, False])
def test_the_decision_is_made_before_a_graph_is_traced(fake, checks, right, caplog):
    """With real tensors, whether the first to ask is an eager call or torch.compile."""
    if not right:
        fake.apply_gates = double

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x):
        return x + 1 if backends.fused(x.device, x.dtype, NEEDS) else x - 1

    x = torch.zeros(3)
    assert f(x).tolist() == [1.0 if right else -1.0] * 3
    assert f(x.double()).tolist() == [-1.0] * 3
    with backends.use_backend("reference"):
        assert f(x).tolist() == [-1.0] * 3
    assert checks == checked(NEEDS, FP32)


@needs_traces
def test_a_network_compiles_without_a_graph_break(fake, checks):
    model = VoVNet(TINY["detectron2"], out_features=FIRST).eval()
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        with backends.use_backend("reference"):
            expected = model(x)
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    assert checks == checked(needs(model.spec), FP32)


@needs_traces
def test_a_training_step_compiles_without_a_graph_break(fake, checks):
    model = VoVNet(TINY["depthwise"], norm_eval=False).train()
    block = next(module for module in model.modules() if isinstance(module, OSABlock))
    step = torch.compile(block, fullgraph=True, backend="aot_eager")
    step(torch.randn(2, block.plan.in_channels, 8, 8)).sum().backward()
    assert checks == checked(block.needs(block.kinds, backward=True), FP32)


@needs_looks
@torch.no_grad()
def test_exported_graphs_are_those_of_plain_modules(fake, checks):
    model = VoVNet(TINY["detectron2"], out_features=FIRST).eval()
    x = torch.randn(1, 3, 64, 64)
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        assert "vovnet_fast." not in str(program.graph)
    assert "vovnet_fast::" not in str(torch.jit.trace(model, x, check_trace=False).inlined_graph)
    assert checks == []


# --------------------------------------------------------------------------------------
# The first step
# --------------------------------------------------------------------------------------

_STEP = """
import json, sys
import torch, vovnet_fast
rich = "rich" in sys.modules
from vovnet_fast.selfcheck import runner, sources
from tests.selfcheck.test_trust import step
print(json.dumps([step(), sources._read.cache_info().misses, rich]))
"""


def step():
    """A training step on maps that are large enough for ops; the cases that were run."""
    ran, run = [], runner._run_case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_run_case", lambda *args: ran.append(args[0].function) or run(*args))
        model = VoVNet(TINY["detectron2"], frozen_stages=-1).train()
        sum(feature.sum() for feature in model(torch.randn(1, 3, 320, 320))).backward()
    return ran


def test_the_first_step_in_a_new_process_on_a_warm_cache_checks_nothing(tmp_path):
    if _extension.why_not("cpu") is not None:
        pytest.skip(_extension.why_not("cpu"))
    needed = needs(TINY["detectron2"], backward=True)
    slim = [case.function for case in selfcheck.CASES if case.slim and case.function in needed]
    assert sorted(step()) == sorted(slim)
    environment = {**os.environ, "VOVNET_FAST_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _STEP], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    files = {path for function in needed for path in sources.files("cpu", function)}
    assert json.loads(done.stdout) == [[], len(files), False]
