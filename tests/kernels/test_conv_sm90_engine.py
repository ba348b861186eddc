"""The Triton backend offers the Hopper convolution where it can run, and runs it when chosen."""

import pytest
import torch

from vovnet_fast import tuning
from vovnet_fast.backends import conv_sm90
from vovnet_fast.backends import triton as backend


@pytest.mark.parametrize("pool", [False, True])
def test_it_is_a_candidate_where_it_is_on_offer(pool, monkeypatch, device):
    x = torch.randn(1, 5, 5, 16, device=device).half()
    weight = torch.randn(80, 3, 3, 16, device=device).half()
    scale, shift = torch.rand(2, 80, device=device)
    out = x.new_empty(1, 5, 5, 80)
    engine, seen, ran = conv_sm90.configs(80)[0].name, [], []

    def choose(device, problem, candidates, static, run, **options):
        seen.append((problem, candidates))
        return engine if engine in candidates else static

    def run(name, *tensors, relu, pool):
        ran.append((name, pool))

    monkeypatch.setattr(tuning, "choose", choose)
    monkeypatch.setattr(conv_sm90, "run", run)
    backend.conv(x, weight, scale, shift, out, pool=pool)
    monkeypatch.setattr(conv_sm90, "engines", lambda *args, **kwargs: [engine])
    backend.conv(x, weight, scale, shift, out, pool=pool)
    (before, without), (after, with_it) = seen
    assert engine not in without
    assert engine in with_it
    # What was measured without it is not taken for an answer with it.
    assert before != after
    assert ran == [(engine, pool)]


def test_it_is_a_candidate_for_gradients_of_inputs(monkeypatch, device):
    g, add, mask = torch.randn(3, 1, 5, 5, 80, device=device).half()
    weight = torch.randn(80, 3, 3, 80, device=device).half()
    out = torch.empty_like(g)
    engine, seen, ran = conv_sm90.configs(80)[0].name, [], []

    def choose(device, problem, candidates, static, run, **options):
        seen.append((problem, candidates))
        return engine if engine in candidates else static

    def engines(g, packed, out, *, stride=1, add=None, mask=None):
        assert packed.shape == (80, 3, 3, 80)
        return [engine]

    def run(name, g, packed, scale, shift, out, **options):
        ran.append((name, scale, shift, sorted(options)))

    monkeypatch.setattr(tuning, "choose", choose)
    monkeypatch.setattr(conv_sm90, "run", run)
    backend.conv_input_grad(g, weight, None, out, add=add, mask=mask)
    monkeypatch.setattr(conv_sm90, "engines", engines)
    backend.conv_input_grad(g, weight, None, out, add=add, mask=mask)
    (before, without), (after, with_it) = seen
    assert engine not in without
    assert engine in with_it
    assert before != after
    assert ran == [(engine, None, None, ["add", "mask"])]
