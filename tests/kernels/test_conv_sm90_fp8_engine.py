"""Triton's ops in fp8 offer the Hopper convolution where it can run, and run it when chosen."""

import pytest
import torch

from tests.kernels.test_eight_bits import numbers, quantized
from vovnet_fast import tuning
from vovnet_fast.arithmetic import fp8
from vovnet_fast.backends import conv_sm90, conv_sm90_fp8
from vovnet_fast.selfcheck import eight_bits as check

pytestmark = pytest.mark.skipif(fp8.why_not() is not None, reason=str(fp8.why_not()))
ENGINE = conv_sm90.configs(80, 3, 1)[0].name


@pytest.fixture
def asked(monkeypatch):
    """What was asked for to be chosen; its answer is the engine, where that is a candidate."""
    seen = []

    def choose(device, problem, candidates, static, run, *, prepare):
        seen.append((problem, candidates, prepare))
        return ENGINE if ENGINE in candidates else static

    monkeypatch.setattr(tuning, "choose", choose)
    return seen


@pytest.mark.parametrize("written", ["slot", "feature", "both"])
def test_it_is_a_candidate_where_it_is_on_offer(written, asked, monkeypatch, device):
    from vovnet_fast.backends.triton import fp8 as backend

    t, ran, right = numbers("fp8", device), [], [True]
    layer, x = quantized(t, 32, 80, 3, 1), t.activations(1, 5, 7, 32)
    out = None if written == "feature" else t.slot(1, 5, 7, 80)
    feature = None if written == "slot" else t.slot(1, 5, 7, 80, dtype=torch.float32)
    options = dict(levels=fp8.LARGEST, feature=feature, pool=out is not None)

    def run(engine, x, layer, out, *, feature, pool):
        ran.append(engine)
        sums = fp8.conv(x, layer, out, feature=feature, pool=pool)
        if not right[0]:
            found = next(view for view in (feature, out) if view is not None)
            found.copy_((found.float() * 1.5 + 1).to(found.dtype))
        return sums

    monkeypatch.setattr(conv_sm90_fp8, "run", run)
    backend.conv(x, layer, out, **options)
    assert not ran
    monkeypatch.setattr(conv_sm90_fp8, "engines", lambda *args, **kwargs: [ENGINE])
    backend.conv(x, layer, out, **options)
    assert ran == [ENGINE]
    (before, without, _), (after, with_it, prepare) = asked
    assert ENGINE not in without
    assert 0 < with_it[ENGINE] < 1, "seconds are predicted"
    assert with_it.likely[0] == ENGINE or ENGINE in with_it.likely
    # What was measured without it is not taken for an answer with it.
    assert before != after
    # It is held against the reference before it is timed.
    trial = prepare()
    assert trial(ENGINE) is None
    right[0] = False
    assert "apart, in fp8" in trial(ENGINE)


def test_nothing_is_offered_in_int8(asked, monkeypatch, device):
    from vovnet_fast.backends.triton import int8 as backend

    monkeypatch.setattr(conv_sm90_fp8, "why_not", lambda device: None)
    t = numbers("int8", device)
    backend.conv(t.activations(1, 5, 7, 32), quantized(t, 32, 80, 3, 1), t.slot(1, 5, 7, 80),
                 levels=127)  # fmt: skip
    [(problem, candidates, _)] = asked
    assert "conv-sm90" not in problem
    assert not [name for name in candidates if name.startswith("conv-sm90")]


def test_sums_of_what_is_stored_are_what_is_compared():
    """A step of one activation moves a small map's sum further than sums may be wrong."""
    out = torch.full((1, 2, 3, 64), 8.0).to(fp8.ACTIVATION)
    exact = check.pooled(out.float().sum((1, 2)).unsqueeze(1), out)
    moved = out.float()
    moved[0, 0, 0] = 9.0
    sums = moved.sum((1, 2)).unsqueeze(1)
    assert check.distance(check.pooled(sums, moved.to(fp8.ACTIVATION)), exact, "fp8") <= 1
    assert check.distance(sums.sum(1), out.float().sum((1, 2)), "fp8") > 1
    assert check.distance(check.pooled(sums, out), exact, "fp8") > 1
