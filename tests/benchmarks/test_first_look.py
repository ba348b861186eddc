"""benchmarks/first_look.py: what is wrong is found, and stops nothing else."""

import json
import types

import pytest
import torch

from benchmarks import first_look
from benchmarks.evidence import records
from tests.tiny import TINY
from vovnet_fast import backends

CPU = torch.device("cpu")


def test_a_kernel_that_leaves_an_element_out_is_wrong(monkeypatch):
    assert first_look.simplest("reference", CPU) == "as plain PyTorch, bit for bit"
    right = backends._module("reference").max_pool

    def short(x, out, *rest):
        right(x, out, *rest)
        out[-1, -1, -1, -1] = 0

    real, fine = backends._module, lambda device: None
    wrong = types.SimpleNamespace(max_pool=short, why_not=fine)
    monkeypatch.setattr(backends, "_module", lambda name: wrong if name == "cpu" else real(name))
    with pytest.raises(AssertionError, match="1 of 3920 differ"):
        first_look.simplest("cpu", CPU)


def test_a_network_may_be_twice_as_wrong_as_plain_pytorch(monkeypatch):
    exact = first_look.Exact.of(TINY["detectron2"], (1, 32, 32), CPU)
    assert first_look.network(exact, "reference", torch.float32).startswith("error ")
    eager = exact.error("reference", torch.float32)
    assert 0 < eager < 1e-5
    for factor in (1.9, 2.5):
        errors = {"reference": eager, "triton": factor * eager + 1e-7}
        monkeypatch.setattr(first_look.Exact, "error", lambda self, name, dtype, e=errors: e[name])
        if factor < 2:
            assert "eager's" in first_look.network(exact, "triton", torch.float32)
        else:
            with pytest.raises(AssertionError, match="twice eager's"):
                first_look.network(exact, "triton", torch.float32)


def test_each_check_stands_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(records.FOLDER, str(tmp_path))
    monkeypatch.setenv(records.STEP, "first look")
    records.tests(tmp_path).rewrite({"format": 1}, [])

    def missing():
        raise first_look.Missing("no such device")

    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    checks = first_look.Checks()
    checks("one", lambda: "well")
    checks("two", missing)
    checks("three", broken)
    checks("four", lambda: "well")
    assert checks.failed == 1
    found = json.loads((tmp_path / "tests.json").read_text())["tests"]
    ended = {e["test"]: (e["outcome"], e["why"]) for e in found if e["outcome"] != "began"}
    assert ended == {
        "one": ("passed", "well"),
        "two": ("skipped", "no such device"),
        "three": ("failed", "RuntimeError: an illegal memory access was encountered"),
        "four": ("passed", "well"),
    }
    assert [e["test"] for e in found if e["outcome"] == "began"] == list(ended)
    assert len(capsys.readouterr().out.splitlines()) == 4
