"""The functions that ops say they use are those that they use."""

import functools

import pytest
import torch
import torch.distributed as dist

from tests.stand_in import FUNCTIONS, forget, stand_in
from tests.tiny import TINY
from vovnet_fast import VoVNet, compat, freeze, ops, selfcheck
from vovnet_fast.ops import chain, osa
from vovnet_fast.ops.conv import ConvParams, Kinds
from vovnet_fast.ops.features import needs

FP32 = torch.float32


class Watched:
    """A backend whose functions refuse to run where nobody asked for them before.

    Attributes:
        asked: the functions that were asked for.
        called: those that were called.
    """

    def __init__(self, module, monkeypatch):
        self.asked, self.called = set(), set()
        for name in FUNCTIONS:
            monkeypatch.setattr(module, name, self._watch(name, getattr(module, name)))
        monkeypatch.setattr(selfcheck, "remembered", self._remembered)

    def _watch(self, name, function):
        @functools.wraps(function)
        def watched(*args, **options):
            assert name in self.asked
            self.called.add(name)
            return function(*args, **options)

        return watched

    def _remembered(self, backend, device, dtype, functions):
        assert dtype == FP32
        self.asked.update(functions)
        return True

    def assert_true(self):
        """All of what was asked for was used. (That nothing else was is asserted at the call.)"""
        assert self.called == self.asked


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.delenv("VOVNET_FAST_BACKEND", raising=False)
    forget()
    yield Watched(stand_in(monkeypatch), monkeypatch)
    forget()


def image(**options):
    return torch.randn(2, 3, 64, 64, **options)


@pytest.mark.parametrize("dialect", TINY)
@torch.no_grad()
def test_of_networks_in_inference(dialect, watched):
    model = VoVNet(TINY[dialect]).eval()
    for network in (model, freeze(model)):
        forget()
        watched.asked.clear()
        watched.called.clear()
        network(image())
        watched.assert_true()
        assert watched.asked == set(needs(model.spec))


@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize("norm_eval", [False, True])
@pytest.mark.parametrize("dialect", TINY)
def test_of_networks_in_training(dialect, norm_eval, with_cp, watched):
    model = VoVNet(TINY[dialect], norm_eval=norm_eval, with_cp=with_cp, frozen_stages=-1).train()
    sum(feature.sum() for feature in model(image())).backward()
    watched.assert_true()
    assert ("conv" in watched.asked) == norm_eval
    assert ("conv_statistics" in watched.asked) == (not norm_eval)
    if norm_eval:
        assert watched.asked == set(needs(model.spec, backward=True))


def test_a_frozen_stage_asks_for_its_forward_pass_alone(watched):
    model = VoVNet(TINY["detectron2"], frozen_stages=1)
    model.train()
    model.stem(image())
    assert watched.asked == {"conv"}


def test_of_ops_that_stand_alone(watched):
    x = torch.randn(2, 16, 6, 5, requires_grad=True)
    ops.ese(x, torch.randn(16, 16), torch.randn(16), identity=x).sum().backward()
    ops.max_pool(x).sum().backward()
    watched.assert_true()


def test_of_statistics_that_processes_share(watched, tmp_path):
    """In a group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        vectors = torch.ones(8), torch.zeros(8)
        group = compat.group_name(dist.group.WORLD)
        layer = ConvParams(torch.randn(8, 3, 3, 16), *vectors, eps=1e-5, group=group)
        assert Kinds.of([layer]).shared
        x = torch.randn(2, 16, 6, 5, requires_grad=True)
        ops.conv_bn_relu(x, layer._replace(weight=layer.weight.requires_grad_())).sum().backward()
        watched.assert_true()
        assert "batch_norm_merge" in watched.asked
    finally:
        dist.destroy_process_group()


def test_every_function_is_asked_for_by_some_op():
    """No function of the backends goes unchecked because no set has it."""
    every = Kinds(depthwise=True, fixed=True, batch=True, shared=True)
    needed = {
        *osa.needs(every, gated=True, identity=True, backward=True),
        *chain.needs(every, backward=True),
        *needs(TINY["depthwise"], backward=True),
    }
    assert needed == set(FUNCTIONS)
