"""A report says how far each activation is from the network in fp32."""

import math
import sys

import pytest
import torch

import vovnet_fast
from tests.quantization import cases
from tests.quantization.cases import sqnr
from vovnet_fast import _optional
from vovnet_fast.quantization.report import Report, Row


def test_its_features_are_those_that_are_returned():
    model, x = cases.model("depthwise"), cases.images()
    report = vovnet_fast.quantize(model, [x], **cases.QUICK).report()
    quantized = vovnet_fast.quantize(model, [x], report=False, **cases.QUICK)
    with torch.no_grad():
        wanted = dict(zip(model.out_features, map(sqnr, quantized(x), model(x))))
    found = {row.name: row.sqnr for row in report.rows if row.kind == "feature"}
    assert found == pytest.approx(wanted, abs=0.01)
    assert report.least == min(found.values())
    names = [row.name for row in report.rows]
    assert names[:4] == ["image", "stem_1", "stem_2/depthwise", "stem_2"]
    assert names[-5:] == ["OSA5_2", "stage2", "stage3", "stage4", "stage5"]
    assert report.rows[0].largest == pytest.approx(x.abs().max().item())


def test_what_is_cut_is_counted():
    x = cases.images(4)
    options = dict(calibrator="percentile", percentile=90)
    cut, whole = (
        vovnet_fast.quantize(cases.model(), [x], stem="int8", bias_correction=False, **each)
        for each in (options, dict(calibrator="minmax"))
    )
    rows = {row.name: row for row in cut.report().rows}
    assert rows["stem_1"].cut == pytest.approx(0.1, abs=0.02)
    assert rows["image"].cut == 0
    assert {row.name: row for row in whole.report().rows}["stem_1"].cut < 1e-3
    assert cut.report().least < whole.report().least
    assert cut.report().worst(3)[0].sqnr == min(
        row.sqnr for row in cut.report().rows if row.kind == "activation"
    )


def test_the_table():
    rows = [
        Row("image", "activation", math.inf, 2.0, 0.0),
        Row("stem_1", "activation", 31.26, 5.0, 0.0125),
        Row("stage5", "feature", 28.04, 7.0, 0.0),
    ]
    text = str(Report(rows))
    assert "31.3" in text
    assert "1.250%" in text
    assert "least SQNR of a feature: 28.0 dB" in text


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    cases.quantized().report().plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _optional.why_not.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="needs matplotlib"):
            cases.quantized().report().plot(tmp_path / "report.png")
    finally:
        _optional.why_not.cache_clear()
    assert not list(tmp_path.iterdir())


def test_none_was_measured():
    quantized = vovnet_fast.quantize(cases.model(), [cases.images()], report=False, **cases.QUICK)
    with pytest.raises(ValueError, match="nothing was measured of this tiny-detectron2 in int8"):
        quantized.report()
