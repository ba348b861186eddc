"""``vovnet-fast explain`` says what really runs."""

import json

import pytest
import torch

import vovnet_fast
from tests.extension_cases import require
from vovnet_fast import backends, tuning
from vovnet_fast.compat import zip
from vovnet_fast.network import decision
from vovnet_fast.tools import cli
from vovnet_fast.tools.explain import NETWORK, _kinds, explain

SPEC = "V-19-slim-dw-eSE"


@pytest.mark.parametrize("batch_norm", [False, True], ids=["fixed norms", "norms of the batch"])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", [(1, 96, 96), (1, 256, 384)], ids=["small", "large"])
def test_it_says_what_runs(shape, train, batch_norm, monkeypatch):
    """As a network of real tensors decides, wherever ops run; the first call aside."""
    rows = explain(SPEC, shape, train=train, batch_norm=batch_norm)
    assert rows[0].part == NETWORK
    ran = []

    def note(of):
        def decide(part, x):
            found = of(part, x)
            ran.append((found, tuple(x.shape)))
            return found

        return decide

    for name in ("of_network", "of_part"):
        monkeypatch.setattr(decision, name, note(getattr(decision, name)))
    model = vovnet_fast.VoVNet(SPEC, norm_eval=not batch_norm).train(train)
    x = torch.randn(shape[0], 3, *shape[1:])
    with torch.set_grad_enabled(train):
        if not train:  # It says what runs once weights have been packed, at the second call.
            model(x)
            ran.clear()
        model(x)
    assert [(row.op, row.input) for row in rows] == [(found.op, size) for found, size in ran]
    for row, (found, _) in zip(rows, ran, strict=True):
        assert found.why in ("", row.why) or found == decision.NO_BACKEND


def test_why_not():
    with backends.use_backend("reference"):
        whys = {row.why for row in explain("V-39-eSE", (1, 64, 64))}
    assert whys == {"the reference backend was asked for"}
    [why] = {row.why for row in explain("V-39-eSE", (1, 64, 64), device="meta")}
    assert why == "there are no kernels for devices of type meta"


@pytest.mark.parametrize("options", [[], ["--train"]], ids=" ".join)
def test_it_tells_of_other_ways_to_train(capsys, options):
    require("cpu")
    assert cli.main(["explain", SPEC, "1x64x64", "--device", "cpu", *options]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "measured in four ways: ops, ops on large maps, which this is, modules, "
        "and modules in the other layout" in said
    ) == (options == ["--train"])


def test_the_command(capsys):
    require("cpu")
    assert cli.main(["explain", SPEC, "2x256x320", "--train", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["part"] for row in rows][:3] == [NETWORK, "stem", "OSA2_1"]
    assert rows[2]["input"] == [2, 64, 64, 80]
    assert cli.main(["explain", SPEC, "2x256x320", "--train"]) == 0
    out = capsys.readouterr().out
    assert "OSA5_1" in out
    assert "autograd takes part" in out
    assert "choices of engines are known for this machine" in out


DEPTHWISE = ("depthwise-conv 128x224", "depthwise-conv 128x64")


def test_it_counts_choices_by_their_kind():
    names = ("conv-sm80 256x64", "conv-sm80 128x80", "tma-128x64-k64", "aten", "conv-sm80 128x64")
    known = {str(i): tuning.Choice(name) for i, name in enumerate(names)}
    assert _kinds(known) == ": 3 conv-sm80, 1 triton, 1 aten"
    known = {str(i): tuning.Choice(name) for i, name in enumerate(("separate", *DEPTHWISE))}
    assert _kinds(known) == ": 2 depthwise-conv, 1 separate"
    assert _kinds({}) == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["V-38-eSE", "1x64x64"], "did you mean V-39-eSE"),
        (["V-39-eSE", "1x64"], "1x64"),
        (["V-39-eSE", "1x4x4"], "too small"),
        (["V-39-eSE", "1x64x64", "--device", "toaster"], "--device toaster"),
    ],
)
def test_what_is_refused(words, message, capsys):
    assert cli.main(["explain", *words]) == 1
    assert message in capsys.readouterr().err
