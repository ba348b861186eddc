"""Whole networks in int8 and fp8 on Triton's kernels against plain PyTorch, and who is trusted."""

import copy

import pytest
import torch

from tests.quantization import cases
from vovnet_fast import selfcheck, use_backend
from vovnet_fast.backends import BackendError, eight_bits
from vovnet_fast.backends.triton import int8 as of_int8
from vovnet_fast.quantization import QuantizedVoVNet

NAMES = ("detectron2", "depthwise", "seed", "torchhub")


def features(quantized: QuantizedVoVNet, x, backend="triton"):
    with use_backend(backend):
        return quantized(x)


@pytest.fixture(params=cases.DTYPES)
def form(request, device):
    if device.type == "cuda":
        reason = eight_bits.find("triton", device, request.param, ())[1]
        if reason is not None:
            pytest.skip(reason)
    return request.param


def on(device, *args, **options):
    return copy.deepcopy(cases.quantized(*args, **options)).to(device)


def assert_right(quantized, x, least_sqnr=40.0):
    """Bit for bit in int8. In fp8 roundings that fall otherwise are carried on."""
    theirs, ours = features(quantized, x, "reference"), features(quantized, x)
    assert len(theirs) == len(ours)
    for wanted, found in zip(theirs, ours, strict=True):
        if quantized.dtype == "int8":
            assert torch.equal(found, wanted)
        else:
            assert cases.sqnr(found, wanted) > least_sqnr


@pytest.mark.parametrize("name", NAMES)
def test_features(name, form, device):
    quantized = on(device, name, form)
    for seed in range(2):  # The second time memory is there.
        assert_right(quantized, cases.images(1, height=33, width=40, seed=seed).to(device))


@pytest.mark.parametrize("stem", ["int8", "wide"])
def test_stems_and_levels(stem, device):
    quantized = on(device, "detectron2", stem=stem, levels=255)
    x = cases.images(1, height=33, width=40).to(device, memory_format=torch.channels_last)
    assert_right(quantized, x)


def test_weights_may_change(device):
    """What is made of them for 255 levels, sums of an output channel's, is made again."""
    quantized = on(device, levels=255)
    x = cases.images(1, height=33, width=40).to(device)
    assert_right(quantized, x)
    quantized.weight_1.neg_()
    assert_right(quantized, x)
    quantized.weight_1.data[:] = 3  # Nobody counts this.
    quantized.refresh()
    assert_right(quantized, x)


def test_no_image(device):
    found = features(on(device), torch.zeros(0, 3, 33, 40, device=device))
    assert all(feature.shape[0] == 0 for feature in found)


def test_who_is_trusted(device, monkeypatch, tmp_path, caplog):
    """Ops that agree with the reference are remembered, and a broken one is said aloud."""
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    asked = "triton.int8", device, of_int8.ACTIVATION
    assert selfcheck.trusted(*asked, ("quantize_image",))
    assert selfcheck.remembered(*asked, ("quantize_image",))
    assert "triton.int8 quantize_image uint8" in (tmp_path / "verified.json").read_text()
    monkeypatch.setattr(of_int8, "max_pool", lambda x, out, mode: out.zero_())
    assert not selfcheck.trusted(*asked, ("max_pool",))
    assert "the triton.int8 backend fails its self-check" in caplog.text


def test_a_backend_that_has_no_such_ops(device):
    with pytest.raises(BackendError, match="it has no ops in eight bits yet; use reference"):
        eight_bits.require("cuda", "int8", eight_bits.find("cuda", device, "int8", ())[1])
