"""The self-check of the Triton backend: in the interpreter, or on a GPU."""

import dataclasses
import importlib
import threading
from pathlib import Path

import pytest
import torch

from tests.extension_cases import require
from vovnet_fast import selfcheck, specs, tuning
from vovnet_fast.backends import triton as backend
from vovnet_fast.backends.triton.choosing import load_kernels
from vovnet_fast.first_use.rehearsal import Setting
from vovnet_fast.kernels import _common
from vovnet_fast.kernels._variants import variant
from vovnet_fast.ops.features import needs
from vovnet_fast.selfcheck import eight_bits, runner, sources
from vovnet_fast.selfcheck.calls import backend_module
from vovnet_fast.tools.compile.needed import Run, plan

FUNCTIONS = sorted({case.function for case in selfcheck.CASES})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_passes(function, device):
    """On a GPU. The interpreter is slow, and has its own way with bf16: each case once."""
    if device.type == "cuda":
        rows = selfcheck.run("triton", device, functions=[function])
    else:
        rows = selfcheck.run("triton", device, [torch.float16], [function], slim=True)
        with pytest.MonkeyPatch.context() as patch:
            rest = [case for case in selfcheck.CASES if not case.slim]
            patch.setattr(runner, "CASES", rest)
            rows += selfcheck.run("triton", device, [torch.float32], [function])
    assert {row.case for row in rows} == {
        c.words for c in selfcheck.CASES if c.function == function
    }
    for row in rows:
        assert row.passed, row


@pytest.mark.parametrize("function", ["depthwise", "gate_sums"])
def test_a_broken_kernel_is_found_and_named(function, device, monkeypatch):
    """Its launches leave out the last program."""
    run = _common.Launch.run

    def short(launch, device):
        first = max(launch.grid[0] - 1, 1)
        smaller = (first, *launch.grid[1:])
        run(dataclasses.replace(launch, grid=smaller), device)

    right = getattr(backend, function)

    def broken(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(_common.Launch, "run", short)
            return right(*args, **options)

    monkeypatch.setattr(backend, function, broken)
    rows = selfcheck.run("triton", device, [torch.float16], [function, "apply_gates"])
    assert {row.function for row in rows if not row.passed} == {function}
    assert {row.function for row in rows if row.passed} == {"apply_gates"}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_launches_are_planned_for_every_case_of_the_slim_check(function):
    slim = [case for case in selfcheck.CASES if case.slim and case.function == function]
    found = selfcheck.launches([function], torch.bfloat16, "meta")
    assert len(found) >= len(slim)
    with pytest.raises(ValueError, match="no function is called convolve"):
        selfcheck.launches(["convolve"], torch.bfloat16, "meta")


@pytest.mark.parametrize("dtype", eight_bits.FORMS)
def test_launches_are_planned_for_the_check_of_eight_bits(dtype, device, monkeypatch):
    """On tensors without memory the same as those of the check itself."""
    name, ran = f"triton.{eight_bits.FORMS[dtype]}", set()
    if device.type == "cuda" and backend_module(name).why_not(device) is not None:
        pytest.skip(backend_module(name).why_not(device))
    run = _common.Launch.run

    def noting(launch, device):
        ran.add(variant(launch).key)
        run(launch, device)

    with monkeypatch.context() as patch:
        patch.setattr(_common.Launch, "run", noting)
        rows = eight_bits.run(name, device, dtype)
    assert not [row for row in rows if not row.passed]
    target = _common.Target(_common.capability(device), _common.processors(device))
    with _common.planning_for(target):
        meta = selfcheck.launches({row.function for row in rows}, dtype, "meta")
    assert {variant(launch).key for launch in meta} == ran
    with pytest.raises(ValueError, match="no function is called convolve"):
        selfcheck.launches(["convolve"], dtype, "meta")


@pytest.mark.parametrize("name", ["triton", "cpu"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_computes_a_function_is_what_runs(function, name):
    """Verdicts are forgotten when it is edited, and no verdict of another function is."""
    if name == "cpu":
        require("cpu")
    # What is imported does not count as run.
    load_kernels()
    importlib.import_module(f"vovnet_fast.backends.{name}")
    ran = set()
    threading.setprofile(lambda frame, *_: ran.add(frame.f_code.co_filename))
    try:
        if name == "triton":
            found = selfcheck.launches([function], torch.float16, "meta")
            ran.update(launch.kernel.fn.__code__.co_filename for launch in found)
        else:
            selfcheck.run(name, "cpu", [torch.float32], [function], slim=True)
    finally:
        threading.setprofile(None)
    files = {path.resolve() for path in sources.files(name, function)}
    package = Path(sources.__file__).parents[1]
    folders = [(package / folder).resolve() for folder in ("backends", "kernels")]
    ours = {
        path for path in map(Path, ran) if any(path.resolve().is_relative_to(f) for f in folders)
    }
    # What they are held against, and what offers or ranks engines and computes nothing here.
    others = {"reference", "_predict", "conv_sm90", "cudnn_graph"}
    counted = {path for path in ours if others.isdisjoint((path.stem, path.parent.name))}
    assert {path.resolve() for path in counted} <= files
    assert Path(backend.__file__).parent in {path.parent for path in ours} or name == "cpu"


def test_kernels_of_other_functions_do_not_count():
    def using(module):
        return {f for f in FUNCTIONS if module in {p.stem for p in sources.files("triton", f)}}

    backward = {"gates_backward", "gate_sums", "apply_gates_backward"}
    assert using("ese_backward") == backward
    assert using("ese") == {"gates", "apply_gates", *backward}
    assert using("max_pool") == {"max_pool", "max_pool_backward"}
    assert using("conv_weight_grad") == {"conv_weight_grad"}
    assert using("_common") == set(FUNCTIONS)


@pytest.mark.parametrize(("measured", "most"), [(True, 3), (False, 5)])
def test_the_slim_check_needs_few_kernels_that_a_network_does_not_need(measured, most):
    """Of V-99 in inference, with what tuning measures, and with static choices alone."""
    setting = Setting(planning=tuning.Planning(measured=measured))
    run = plan(Run("V-99-eSE", (6, 640, 1600)), setting)
    assert run.functions == set(needs(specs.get("V-99-eSE")))
    launched = {variant(launch).key for launch in run.launches}
    checked = {
        variant(launch).key for launch in selfcheck.launches(run.functions, torch.bfloat16, "meta")
    }
    assert len(checked - launched) <= most
    assert len(checked) <= 12
