"""A variable that says what it may not is an error that names it, and none is ignored."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import TINY
from vovnet_fast import VoVNet, _environment, backends, freeze
from vovnet_fast._environment import PREFIX
from vovnet_fast.backends import _extension
from vovnet_fast.network import decision

WRONG = {
    "BACKEND": ["bogus", "CPU", "triton "],
    "CPU_ISA": ["bogus", "AVX2", "sse"],
    "CHECK": ["yes", "2"],
    "KEEP_WEIGHTS": ["no", "2"],
    "CONV_SM90": ["true", "-1"],
    "WINOGRAD": ["1", "off"],
    "TUNE": ["2", "none"],
    "TUNING_TABLE": ["/nowhere/table.json", "/"],
    "COMPILE_WORKERS": ["many", "-1", "1.5"],
    "COMPILE_LOG": ["/nowhere/log.jsonl"],
}


@pytest.fixture(autouse=True)
def _undecided(monkeypatch):
    backends._decide.cache_clear()
    monkeypatch.setattr(_environment, "_warned", set())
    monkeypatch.setattr(decision, "CPU_PIXELS", 0)
    yield
    backends._decide.cache_clear()


def test_all_that_can_be_wrong_is_tried():
    assert WRONG.keys() == _environment.VARIABLES.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_wrong_values_are_refused_by_a_forward_pass(name, value, monkeypatch):
    model, x = VoVNet(TINY["detectron2"]).eval(), torch.zeros(1, 3, 40, 40)
    frozen = freeze(model)
    monkeypatch.setenv(PREFIX + name, value)
    words = "unknown backend" if name == "BACKEND" else f"{PREFIX}{name} must be .*, got '{value}'"
    for run in (model, frozen):
        with torch.no_grad(), pytest.raises(ValueError, match=words):
            run(x)


@pytest.mark.parametrize("name", sorted(WRONG))
def test_empty_is_as_if_it_were_not_set(name, monkeypatch):
    monkeypatch.setenv(PREFIX + name, "")
    _environment.require()


def test_names_that_nobody_reads_are_said_once(monkeypatch, caplog):
    monkeypatch.setenv("VOVNET_FAST_BACKENDS", "cpu")
    monkeypatch.setenv("VOVNET_FAST_CUDA_ARCHS", "90a")
    _environment.require()
    _environment.require()
    [message] = caplog.messages
    assert message.endswith("VOVNET_FAST_BACKENDS is read by nobody: is VOVNET_FAST_BACKEND meant?")


@pytest.mark.skipif(_extension.build_info() is None, reason="the extension is not built")
def test_an_instruction_set_that_is_not_here_is_not_passed_over():
    """It is read when the extension is loaded, in a process of its own."""
    missing = [i for i in ("avx2", "avx512", "neon") if i not in _extension.load("cpu").isas()]
    if not missing:
        pytest.skip("this processor has all of them")
    code = (
        "import torch; from vovnet_fast import VoVNet; "
        "VoVNet('V-19-slim-dw-eSE').eval().requires_grad_(False)(torch.zeros(1, 3, 64, 64))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "VOVNET_FAST_CPU_ISA": missing[0]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"VOVNET_FAST_CPU_ISA={missing[0]}: this processor" in done.stderr.splitlines()[-1]


def test_every_variable_is_in_the_readme():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for name in _environment.VARIABLES:
        assert f"`{PREFIX}{name}`" in readme, name
