"""demo/compare.py: what it refuses, what it draws, and two short trainings side by side."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

for _package in ("mmdet", "sklearn", "rich", "matplotlib", "pycocotools"):
    pytest.importorskip(_package)
io = pytest.importorskip("skimage.io")

from tests.fused import fused  # noqa: E402

DEMO = Path(__file__).parents[2] / "demo"


@pytest.fixture(scope="module")
def demo():
    """Imports a module of the demo, whose files find each other in their own folder."""
    sys.path.insert(0, str(DEMO))
    yield importlib.import_module
    sys.path.remove(str(DEMO))


def curves(count=300):
    random, n = np.random.default_rng(0), np.arange(count)
    curve = 0.3 + 1.5 * np.exp(-n / 80)
    return {name: curve + random.normal(0, 0.02, count) for name in ("reference", "triton")}


def test_two_curves_and_their_precisions_are_drawn(demo, tmp_path):
    drawing = demo("drawing")
    metrics = {
        name: dict(bbox_mAP=value, bbox_mAP_50=0.9, bbox_mAP_75=0.0)
        for name, value in (("reference", 0.61), ("triton", 0.62))
    }
    for width, losses in enumerate((curves(), curves(2))):
        target = tmp_path / f"{width}.png"
        drawing.draw_comparison(losses, metrics, target, "RetinaNet " * 30)
        pixels = io.imread(target)[..., :3].reshape(-1, 3)
        for color in (drawing.BLACK, drawing.VERMILION):
            wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(pixels.astype(int) - wanted).max(1) < 24).sum() > 100
    assert not list(tmp_path.glob("*.partial"))


def test_distances_of_curves(demo):
    distances = demo("compare").distances
    curve = np.linspace(2.0, 1.0, 100)
    found = distances(curve, curve)
    assert found == dict(first_loss_distances=[0.0] * 5, smoothed_loss_distance=0)
    late = curve.copy()
    late[50:] += 1
    found = distances(curve, late)
    assert found["first_loss_distances"] == [0.0] * 5
    assert found["smoothed_loss_distance"] > 0.1
    early = curve.copy()
    early[3] *= 1.5
    assert distances(curve, early)["first_loss_distances"] == pytest.approx([0, 0, 0, 0.5, 0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "--backend triton cannot train on --device cpu: "),
        (["--device", "cpu", "--backend", "reference"], "is what the other one is compared with"),
        (["--device", "cpu", "--backend", "magic"], "--backend: unknown backend 'magic'"),
        (["--spec", "V-38-eSE", "--device", "cpu"], "unknown VoVNet 'V-38-eSE': did you mean"),
    ],
)
def test_it_refuses(demo, tmp_path, capsys, words, message):
    out = tmp_path / "new"
    assert demo("compare").main(["--out", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("demo/compare.py: ")
    assert message in error
    assert not out.exists()


def test_it_refuses_the_interpreter(demo, tmp_path, capsys, monkeypatch):
    """Where the kernels could run on a CPU, after a fashion."""
    monkeypatch.setattr("vovnet_fast.backends.why_not", lambda *_: None)
    assert demo("compare").main(["--out", str(tmp_path / "new"), "--device", "cpu"]) == 2
    assert "a training would take weeks" in capsys.readouterr().err


def test_two_trainings_side_by_side(demo, tmp_path, capsys, monkeypatch):
    """The second one runs as ops, on the reference: losses agree from the first on."""
    compare, used = demo("compare"), []
    spec = demo("run").check(demo("run").parse_arguments(["--spec", "V-19-slim-dw-eSE"]))
    monkeypatch.setattr(compare, "check", lambda args: spec)

    @contextlib.contextmanager
    def use_backend(name):
        used.append(name)
        with fused() if name == "triton" else contextlib.nullcontext():
            yield

    monkeypatch.setattr("vovnet_fast.use_backend", use_backend)
    out = tmp_path / "compare"
    words = ["--iterations", "3", "--train-scenes", "12", "--val-scenes", "4", "--device", "cpu"]
    assert compare.main(["--out", str(out), *words]) == 0
    assert used == ["reference", "triton"]
    report = json.loads((out / "metrics.json").read_text())
    forward, *trained = report["first_loss_distances"]
    assert forward < 1e-5
    assert len(trained) == 2
    assert max(trained) < 0.02
    assert list(report["backends"]) == used
    for name, row in report["backends"].items():
        assert 0 <= row["bbox_mAP"] <= 1
        assert row["peak_bytes"] is None
        assert (out / name / "checkpoint.pth").exists()
    first, second = report["backends"].values()
    assert first["final_loss"] != second["final_loss"], "the same path ran twice"
    assert io.imread(out / "comparison.png").std() > 0
    assert "the first losses differ by" in capsys.readouterr().out
