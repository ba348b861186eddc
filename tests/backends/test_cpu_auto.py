"""What ``auto`` gives to the backend of the extension's CPU half, and what to plain PyTorch."""

import pytest
import torch

from tests.extension_cases import require
from tests.tiny import TINY
from vovnet_fast import VoVNet, backends, ops, selfcheck, specs
from vovnet_fast.backends import cpu
from vovnet_fast.network import decision
from vovnet_fast.network.blocks import OSABlock
from vovnet_fast.ops.features import needs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _built():
    require("cpu")
    torch.manual_seed(0)


def test_auto_takes_it_on_a_cpu(monkeypatch, tmp_path):
    monkeypatch.delenv("VOVNET_FAST_BACKEND", raising=False)
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    needed = needs(specs.get("V-39-eSE"))
    assert backends.select(CPU, torch.float32, needed) == "cpu"
    assert backends.select(CPU, torch.float64, needed) == "reference"


@pytest.mark.parametrize("norm_eval", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_auto_leaves_small_maps_to_plain_modules(norm_eval, compiled, monkeypatch, tmp_path):
    """There weights cost ops more than activations cost plain modules."""
    monkeypatch.setenv("VOVNET_FAST_BACKEND", "auto")
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    every = tuple({case.function for case in selfcheck.CASES})
    for dtype in (torch.float32, torch.bfloat16):
        assert backends.select(CPU, dtype, every) == "cpu"  # And its check is over.
    calls = []
    for name in ("conv", "conv_statistics"):
        function = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *a, _f=function, **k: (calls.append(1), _f(*a, **k))[1]
        )
    model = VoVNet(TINY["detectron2"], norm_eval=norm_eval, frozen_stages=-1).train()
    block = next(module for module in model.modules() if isinstance(module, OSABlock))
    torch.compiler.reset()
    run = torch.compile(block, backend="aot_eager") if compiled else block
    channels = block.layers[0].parts().conv.in_channels

    def ops_of(images, width, *, backend="auto", gradient=True, dtype=torch.float32):
        calls.clear()
        x = torch.randn(images, channels, 20, width)
        with (
            backends.use_backend(backend),
            torch.set_grad_enabled(gradient),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            assert run(x).dtype == dtype
        return len(calls)

    layers = len(block.conv_layers())
    for gradient in (True, False):
        least = decision.CPU_PIXELS_TRAINING
        if norm_eval and not gradient:
            least = decision.CPU_PIXELS
        assert ops_of(1, least // 20, gradient=gradient) == layers
        assert ops_of(1, least // 20 - 1, gradient=gradient) == 0
        assert ops_of(2, least // 20 - 1, gradient=gradient) == layers  # Of all images.
        assert ops_of(1, 7, gradient=gradient, backend="cpu") == layers
    assert ops_of(1, 7, dtype=torch.bfloat16) == 0
    alone = layers if norm_eval else 0
    assert ops_of(1, 7, dtype=torch.bfloat16, gradient=False) == alone
    block.requires_grad_(False)
    assert ops_of(1, 7, dtype=torch.bfloat16) == alone


def test_auto_runs_whole_networks_of_large_images_as_one_op(monkeypatch, tmp_path):
    """Where nothing is kept of their weights; tests/network/test_kept.py has what is."""
    monkeypatch.setenv("VOVNET_FAST_KEEP_WEIGHTS", "0")
    monkeypatch.setenv("VOVNET_FAST_BACKEND", "auto")
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    model, whole = VoVNet(TINY["detectron2"]).eval(), []
    features = ops.features
    monkeypatch.setattr(ops, "features", lambda *a: (whole.append(1), features(*a))[1])
    with torch.no_grad():
        model(torch.randn(1, 3, 312, 320))
        assert not whole
        model(torch.randn(1, 3, 320, 320))
        assert len(whole) == 1
        model.bfloat16()(torch.randn(1, 3, 40, 40).bfloat16())
        assert len(whole) == 2
