"""Features that nobody uses, under DDP and checkpointing: gradients are eager's, None included."""

import contextlib
import itertools

import pytest
import torch
from torch import nn

from tests.fused import fused
from tests.processes import run_two
from tests.tiny import TINY
from vovnet_fast import VoVNet, use_backend
from vovnet_fast.compat import zip

FEATURES = ("stem_2", "stage3", "stage4", "stage5")
USED = {
    "a level that is left out": [("stage3", "stage4"), ("stage3", "stage4")],
    "the second stem layer alone": [("stem_2",), ("stem_2",)],
    "other levels on other ranks": [("stage3",), ("stage4", "stem_2")],
}


def _step(model, x, used):
    features = dict(zip(FEATURES, model(x), strict=True))
    sum((features[name] ** 2).mean() for name in used).backward()


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    found = {}
    cases = itertools.product(USED, (False, True), (fused, lambda: use_backend("reference")))
    for number, (name, with_cp, context) in enumerate(cases):
        torch.manual_seed(0)
        model = VoVNet(TINY["detectron2"], out_features=FEATURES, with_cp=with_cp).double().train()
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        torch.manual_seed(rank)
        with context():
            for _ in range(2):
                _step(wrapped, torch.randn(1, 3, 40, 40, dtype=torch.float64), USED[name][rank])
        found[name, with_cp, number % 2] = {k: p.grad for k, p in model.named_parameters()}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ddp_that_looks_for_unused_parameters(tmp_path):
    run_two(_worker, str(tmp_path))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, with_cp in itertools.product(USED, (False, True)):
            ours, eager = found[name, with_cp, 0], found[name, with_cp, 1]
            assert any(grad is None for grad in eager.values())
            for key, grad in eager.items():
                where = f"{name}, with_cp={with_cp}, rank {rank}: {key}"
                assert (ours[key] is None) == (grad is None), where
                if grad is not None:
                    torch.testing.assert_close(ours[key], grad, msg=lambda m, w=where: f"{w}: {m}")


@pytest.mark.parametrize("with_cp", [False, True])
def test_without_it_ddp_says_the_same_as_in_eager(with_cp, tmp_path):
    """That parameters had no gradient: not silence, and not zeros."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        for context in (fused(), use_backend("reference"), contextlib.nullcontext()):
            model = (
                VoVNet(TINY["detectron2"], out_features=FEATURES, with_cp=with_cp).double().train()
            )
            wrapped = nn.parallel.DistributedDataParallel(model)
            x = torch.randn(1, 3, 40, 40, dtype=torch.float64)
            with context:
                _step(wrapped, x, ("stage3",))
                with pytest.raises(RuntimeError, match="find_unused_parameters"):
                    _step(wrapped, x, ("stage3",))
    finally:
        torch.distributed.destroy_process_group()
