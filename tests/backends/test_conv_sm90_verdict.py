"""The Hopper convolution is on offer where its trials passed, and nowhere for any other reason.

The processes are real, and the file; of the GPU there are words alone.
"""

import json
import logging

import pytest
import torch

from tests.backends.test_apart import CHILD
from vovnet_fast import selfcheck, tuning
from vovnet_fast.arithmetic import fp8
from vovnet_fast.backends import (
    _apart,
    conv_sm90,
    conv_sm90_fp8,
    conv_sm90_fp8_trial,
    conv_sm90_trial,
    conv_sm90_verdict,
)

MACHINE = "NVIDIA H100 sm_90; driver 580.1; torch 2.13.0"
GPU = torch.device("cuda", 0)


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """Sets what the process that tries does, and counts how often it is asked."""
    (tmp_path / "tries_nothing.py").write_text(
        CHILD.replace("json.load(sys.stdin)", "json.load(sys.stdin) and json.load(open(PLAN))")
        + f"PLAN = {str(tmp_path / 'plan')!r}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "mps"))
    monkeypatch.delenv(conv_sm90.ENVIRONMENT, raising=False)
    monkeypatch.setattr(tuning, "machine", lambda device: MACHINE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked = []
    attempt = _apart.attempt

    def counted(module, given):
        assert module == conv_sm90_trial.__name__
        assert given == {"index": 0, "machine": MACHINE}
        asked.append(module)
        return attempt("tries_nothing", given, step=1.0)

    monkeypatch.setattr(_apart, "attempt", counted)

    def does(then, *says):
        plan = dict(then=then, says=says, file=str(tmp_path / "pid"))
        (tmp_path / "plan").write_text(json.dumps(plan))
        forget()
        return asked

    yield does
    forget()


def forget():
    """As a new process knows nothing but the file."""
    conv_sm90_verdict._known.clear()
    selfcheck.trust._table.cache_clear()


def kept():
    """What the file says of the convolution."""
    found = selfcheck.verdicts().choices().get(MACHINE, {})
    return [choice.name for subject, choice in found.items() if subject.startswith("conv-sm90")]


def test_it_is_tried_once(trial):
    asked = trial("ends", ["begin", "one"], ["passed", "1 trials"])
    assert conv_sm90_verdict.why_not(GPU) is None
    assert conv_sm90_verdict.why_not(GPU) is None
    assert kept() == ["passed"]
    forget()
    assert conv_sm90_verdict.why_not(GPU) is None
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("then", "says", "words"),
    [
        ("hangs", ["begin", "turns 128x96, 3x3"], "it hangs, 1 s without an end, at turns 128x96"),
        ("aborts", ["begin", "128x96"], "it crashes, status -6"),
        ("ends", ["failed", "error 3, allowed 1, at 128x96"], "error 3, allowed 1, at 128x96"),
    ],
)
def test_what_fails_is_left_out_and_said(then, says, words, trial, caplog):
    asked = trial(then, says)
    for _ in range(2):
        found = conv_sm90_verdict.why_not(GPU)
        assert words in found
        assert "verified.json" in found
    [said] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert words in said.getMessage()
    assert f"{conv_sm90.ENVIRONMENT}=1" in said.getMessage()
    # A new process does not wait for it again, and says so once more.
    forget()
    caplog.clear()
    assert words in conv_sm90_verdict.why_not(GPU)
    assert words in caplog.text
    assert len(asked) == 1


def test_other_sources_or_another_machine_are_tried_again(trial, monkeypatch):
    asked = trial("ends", ["failed", "error 3"])
    assert conv_sm90_verdict.why_not(GPU) is not None
    trial("ends", ["passed", "1 trials"])
    assert conv_sm90_verdict.why_not(GPU) is not None
    forget()
    monkeypatch.setattr(selfcheck, "digest", lambda backend, function: "of another extension")
    assert conv_sm90_verdict.why_not(GPU) is None
    assert sorted(kept()) == ["error 3", "passed"]
    assert len(asked) == 2


def test_where_it_cannot_be_tried_nothing_is_kept(trial, caplog):
    asked = trial("ends", ["unable", "CUDA error: all CUDA-capable devices are busy"])
    assert "it could not be tried: CUDA error: all" in conv_sm90_verdict.why_not(GPU)
    assert conv_sm90_verdict.why_not(GPU) is not None
    assert len(asked) == 1  # By this process.
    assert "devices are busy" in caplog.text
    assert kept() == []
    trial("ends", ["passed", "1 trials"])
    assert conv_sm90_verdict.why_not(GPU) is None


def test_it_is_not_tried_beside_clients_of_a_server(trial, tmp_path):
    asked = trial("ends", ["passed", "1 trials"])
    (tmp_path / "mps").mkdir()
    (tmp_path / "mps" / "control").touch()
    assert "an MPS server is running" in conv_sm90_verdict.why_not(GPU)
    assert not asked
    assert kept() == []


def test_it_is_not_tried_during_a_capture(trial, monkeypatch):
    asked = trial("ends", ["passed", "1 trials"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "during a capture" in conv_sm90_verdict.why_not(GPU)
    assert not asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert conv_sm90_verdict.why_not(GPU) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert conv_sm90_verdict.why_not(GPU) is None


@pytest.fixture
def hopper(monkeypatch):
    """As if there were one, with the kernels: sets the verdict, and counts who asks for it."""
    asked = []

    def verdict(reason):
        monkeypatch.setattr(
            conv_sm90_verdict, "why_not", lambda device, engine: asked.append(engine) or reason
        )
        return asked

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(conv_sm90, "missing", lambda function: None)
    monkeypatch.delenv(conv_sm90.ENVIRONMENT, raising=False)
    return verdict


def test_the_verdict_decides_unless_the_environment_does(hopper, monkeypatch):
    asked = hopper("it hangs")
    assert conv_sm90.why_not(GPU) == "it hangs"
    monkeypatch.setenv(conv_sm90.ENVIRONMENT, "1")
    assert conv_sm90.why_not(GPU) is None
    assert len(asked) == 1
    hopper(None)
    monkeypatch.setenv(conv_sm90.ENVIRONMENT, "0")
    assert conv_sm90.why_not(GPU) == "VOVNET_FAST_CONV_SM90 is 0"
    assert len(asked) == 1
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv(conv_sm90.ENVIRONMENT)
        else:
            monkeypatch.setenv(conv_sm90.ENVIRONMENT, unset)
        assert conv_sm90.why_not(GPU) is None
    assert len(asked) == 3
    monkeypatch.setenv(conv_sm90.ENVIRONMENT, "yes")
    with pytest.raises(ValueError, match="must be one of 0, 1, got 'yes'"):
        conv_sm90.why_not(GPU)


@pytest.mark.skipif(fp8.why_not() is not None, reason=str(fp8.why_not()))
def test_that_in_fp8_asks_for_its_own_verdict(hopper, monkeypatch):
    wanted = hopper(None)
    monkeypatch.setattr(conv_sm90, "missing", lambda function: f"no {function}")
    assert conv_sm90_fp8.why_not(GPU) == "no conv_sm90_fp8"
    monkeypatch.setattr(conv_sm90, "missing", lambda function: None)
    assert conv_sm90_fp8.why_not(GPU) is conv_sm90.why_not(GPU) is None
    assert wanted == ["conv-sm90 in fp8", "conv-sm90"]


def test_that_in_fp8_has_trials_of_its_own(trial, monkeypatch):
    asked = []

    def attempt(module, given):
        asked.append(module)
        wrong = module.endswith("fp8_trial")
        return _apart.Outcome(*(("failed", "error 3") if wrong else ("passed", "1 trials")))

    monkeypatch.setattr(_apart, "attempt", attempt)
    for _ in range(2):
        assert conv_sm90_verdict.why_not(GPU) is None
        assert "error 3" in conv_sm90_verdict.why_not(GPU, conv_sm90_fp8.IN_FP8)
    assert asked == [conv_sm90_trial.__name__, conv_sm90_fp8_trial.__name__]
    monkeypatch.setattr(conv_sm90, "missing", lambda function: f"no {function}")
    with pytest.raises(_apart.Unable, match="no conv_sm90_fp8"):
        next(conv_sm90_fp8_trial.trials({"index": 0, "machine": MACHINE}))


def test_nothing_is_tried_where_it_cannot_run_anyway(hopper, monkeypatch):
    asked = hopper(None)
    assert "these are on cpu" in conv_sm90.why_not(torch.device("cpu"))
    monkeypatch.setattr(conv_sm90, "missing", lambda function: "built without sm_90a")
    assert conv_sm90.why_not(GPU) == "built without sm_90a"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "8.0 is not 9.0" in conv_sm90.why_not(GPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA GPU" in conv_sm90.why_not(GPU)
    assert not asked


def test_a_process_without_that_gpu_is_unable(monkeypatch):
    given = {"index": 0, "machine": MACHINE}
    monkeypatch.setattr(conv_sm90, "missing", lambda function: "the extension is not built")
    with pytest.raises(_apart.Unable, match="is not built"):
        next(conv_sm90_trial.trials(given))
    monkeypatch.setattr(conv_sm90, "missing", lambda function: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(_apart.Unable, match="sees no GPU 0"):
        next(conv_sm90_trial.trials(given))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(tuning, "machine", lambda device: "NVIDIA A100")
    with pytest.raises(_apart.Unable, match="sees NVIDIA A100, not NVIDIA H100"):
        next(conv_sm90_trial.trials(given))


def test_a_verdict_depends_on_the_kernels_and_on_what_launches_them():
    files = {path.name for path in selfcheck.sources.files("conv_sm90_trial", "conv-sm90")}
    assert {"conv_sm90.py", "conv_sm90_tiles.py", "conv_sm90_trial.py"} <= files
    extension = conv_sm90_verdict.Path(conv_sm90.__file__).parents[1].glob("_C.*")
    assert {path.name for path in extension} <= files
