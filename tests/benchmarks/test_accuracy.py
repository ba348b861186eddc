"""python -m benchmarks.accuracy: average precisions of scenes drawn anew, and what is refused."""

import json

import numpy as np
import pytest

pytest.importorskip("pycocotools")

from benchmarks import accuracy

CLASSES = 3


def found_in(boxes, rng, spread):
    return [
        dict(
            image_id=image, category_id=kind, score=float(rng.uniform()),
            bbox=[x + rng.normal() * spread, y + rng.normal() * spread, size, size],
        )
        for image, kind, x, y, size in boxes
    ]  # fmt: skip


@pytest.fixture
def scenes(tmp_path):
    """Writes truth, and detections that lie beside it by chance; returns what makes scores."""
    rng = np.random.default_rng(0)
    boxes = [
        (image, int(rng.integers(CLASSES)) + 1, *rng.uniform(0, 60, 2), float(rng.uniform(8, 40)))
        for image in range(12)
        for _ in range(4)
    ]
    truth = dict(
        images=[dict(id=i, width=128, height=128) for i in range(12)],
        categories=[dict(id=k + 1, name=str(k)) for k in range(CLASSES)],
        annotations=[
            dict(id=n + 1, image_id=i, category_id=k, bbox=[x, y, s, s], area=s * s, iscrowd=0)
            for n, (i, k, x, y, s) in enumerate(boxes)
        ],
    )
    (tmp_path / "truth.json").write_text(json.dumps(truth))

    def scores(spread, part=1.0):
        detections = found_in(boxes[: int(len(boxes) * part)], rng, spread)
        (tmp_path / "found.json").write_text(json.dumps(detections))
        return accuracy.Scores(tmp_path / "truth.json", tmp_path / "found.json")

    return scores


def test_the_mean_is_that_of_coco(scenes, capsys):
    scores = scenes(2.0)
    evaluation = scores._eval
    evaluation.accumulate()
    evaluation.summarize()
    assert 0.1 < evaluation.stats[0] < 0.9
    for _ in range(2):
        assert scores.mean() == pytest.approx(tuple(evaluation.stats[:2]), abs=1e-12)


def test_a_scene_that_is_drawn_twice_counts_twice(scenes):
    scores = scenes(2.0)
    everything = np.arange(scores.images)
    assert scores.mean(np.repeat(everything, 2)) == pytest.approx(scores.mean(), abs=0.02)
    assert scores.mean(everything[:3]) != pytest.approx(scores.mean(everything[3:]))


def test_an_interval_holds_no_zero_where_one_is_better(scenes, monkeypatch):
    monkeypatch.setattr(accuracy, "RESAMPLES", 60)
    good, bad = scenes(0.5), scenes(6.0)
    low, high = accuracy.apart(bad, good)
    assert low < high < 0
    assert low < bad.mean()[0] - good.mean()[0] < high
    assert accuracy.apart(good, good) == (0.0, 0.0)


def test_who_finds_nothing_has_none(scenes):
    assert scenes(1.0, part=0.0).mean() == (0.0, 0.0)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no config\.py: give folders that demo/run\.py"
    ):
        accuracy.Detector(tmp_path)
