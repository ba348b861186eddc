"""python -m benchmarks.eight_bits: what its rows say, and who is missing."""

import logging

import pytest

from benchmarks import eight_bits, int8_peers
from benchmarks.peer import Missing

SPEC, SIZE = "V-19-slim-dw-eSE", 64


def test_rows(monkeypatch):
    def nobody(network, images):
        assert [tuple(x.shape) for x in images] == [(2, 3, SIZE, SIZE)] * 4
        raise Missing("it is not here")

    peers = (*int8_peers.PEERS[:2], int8_peers.Int8Peer("nobody", "int8", "", nobody))
    monkeypatch.setattr(eight_bits, "PEERS", peers)
    found = eight_bits.measure(SPEC, SIZE, 3, ["ours", "nobody"])
    ours, more, missing = found
    assert (ours["ratio_to_ours"], ours["precision"]) == (1.0, "int8")
    assert 15 < ours["least_sqnr_db"] < more["least_sqnr_db"] - 1, "255 levels are nearer than 127"
    assert ours["ms"] > 0
    assert missing["missing"] == "it is not here"
    text = "\n".join(eight_bits._table(SPEC, SIZE, found))
    assert "| nobody | int8 | it is not here |" in text
    assert "| ours | int8, 255 levels | vovnet_fast.quantize(levels=255) |" in text


@pytest.mark.parametrize("make", [int8_peers._onnxruntime, int8_peers._onnxruntime_int8])
def test_onnxruntime_makes_the_same_features(make):
    pytest.importorskip("onnxruntime")
    network = eight_bits.build(SPEC, eight_bits.torch.float32, eight_bits.CPU)
    images, level = eight_bits.smooth(2, SIZE, 1), logging.getLogger().level
    with eight_bits.torch.no_grad():
        wanted, model = network(images[:1]), make(network, [images])
    assert logging.getLogger().level == level, "what others log is not this benchmark's to choose"
    found = model(images[:1])
    assert min(map(eight_bits._sqnr, found, [y.double() for y in wanted])) > 10
