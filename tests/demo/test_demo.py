"""The demo: its scenes, its pictures, its arguments, and a short run end to end."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for _package in ("mmdet", "sklearn", "rich", "matplotlib", "pycocotools"):
    pytest.importorskip(_package)
io = pytest.importorskip("skimage.io")

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "demo"
SEED = 3


@pytest.fixture(scope="module")
def demo():
    """Imports a module of the demo, whose files find each other in their own folder."""
    sys.path.insert(0, str(DEMO))
    yield importlib.import_module
    sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def scenes(demo):
    return demo("scenes")


@pytest.fixture(scope="module")
def dataset(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    scenes.write_split(folder, "train", 40, SEED)
    scenes.write_split(folder, "val", 40, SEED)
    return folder


@pytest.mark.parametrize("split", ["train", "val"])
def test_scenes_are_a_coco_dataset(dataset, split):
    from pycocotools.coco import COCO

    coco = COCO(str(dataset / f"{split}.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list("0123456789")
    assert len(coco.getImgIds()) == 40
    for image in coco.loadImgs(coco.getImgIds()):
        pixels = io.imread(dataset / split / image["file_name"])
        assert pixels.shape == (image["height"], image["width"], 3)
        assert pixels.dtype == np.uint8
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert annotations, "a scene without a digit"
        for annotation in annotations:
            x, y, w, h = annotation["bbox"]
            assert 0 <= x < x + w <= image["width"]
            assert 0 <= y < y + h <= image["height"]
            assert annotation["area"] == w * h
            assert annotation["iscrowd"] == 0
    ids = coco.getAnnIds()
    assert len(set(ids)) == len(ids)


def test_every_class_appears(dataset):
    for split in ("train", "val"):
        content = json.loads((dataset / f"{split}.json").read_text())
        found = {a["category_id"] for a in content["annotations"]}
        assert found == {c["id"] for c in content["categories"]}


def test_mmdet_reads_the_scenes(dataset, demo):
    from mmdet.datasets import CocoDataset

    reader = CocoDataset(
        ann_file="val.json",
        data_root=str(dataset),
        data_prefix=dict(img="val/"),
        metainfo=dict(classes=demo("scenes").CLASSES),
        test_mode=True,
        pipeline=[],
    )
    content = json.loads((dataset / "val.json").read_text())
    assert len(reader) == 40
    assert sum(len(reader.get_data_info(i)["instances"]) for i in range(40)) == len(
        content["annotations"]
    )


def test_boxes_are_tight_around_the_ink(scenes):
    sources = scenes.load_sources("train")
    for seed in range(30):
        scene = scenes.make_scene(np.random.default_rng(seed), sources, scenes.SceneConfig())
        for (x, y, w, h), opacity in zip(scene.boxes, scene.opacities, strict=True):
            ink = opacity > scenes.INK_THRESHOLD
            assert ink[y : y + h, x : x + w].sum() == ink.sum(), "ink outside the box"
            for edge in (ink[y, :], ink[y + h - 1, :], ink[:, x], ink[:, x + w - 1]):
                assert edge.any(), "a row or column of the box without ink"


def test_digits_do_not_overlap_and_are_of_one_colour(scenes):
    sources = scenes.load_sources("val")
    for seed in range(30):
        scene = scenes.make_scene(np.random.default_rng(seed), sources, scenes.SceneConfig())
        assert np.sum([o > 0 for o in scene.opacities], axis=0).max() == 1
        for (x, y, w, h), opacity in zip(scene.boxes, scene.opacities, strict=True):
            part = scene.image[y : y + h, x : x + w] @ [0.2126, 0.7152, 0.0722] / 255
            ink = opacity[y : y + h, x : x + w] > 0.99
            assert part[ink].std() < 0.02, "ink is not of one colour"


def test_ink_stands_out(scenes):
    rng = np.random.default_rng(0)
    weights = np.array([0.2126, 0.7152, 0.0722])
    for background in rng.random((200, 3)):
        ink = scenes._choose_ink(rng, background)
        assert abs(weights @ (ink - background)) >= 0.3


def test_splits_share_no_digit_and_no_photograph(scenes, dataset):
    digits, photographs = {}, {}
    for split in ("train", "val"):
        content = json.loads((dataset / f"{split}.json").read_text())
        digits[split] = {a["digit_id"] for a in content["annotations"]}
        photographs[split] = {i["photograph"] for i in content["images"]}
        sources = scenes.load_sources(split)
        assert digits[split] <= set(sources.digit_ids.tolist())
        assert photographs[split] <= set(sources.photographs)
    assert not digits["train"] & digits["val"]
    assert not photographs["train"] & photographs["val"]
    ids = [set(scenes.load_sources(split).digit_ids.tolist()) for split in ("train", "val")]
    assert not ids[0] & ids[1]


def test_no_image_is_in_both_splits_under_another_id(scenes):
    train, val = (scenes.load_sources(split) for split in ("train", "val"))
    seen = {digit.tobytes() for digit in train.digits}
    assert not [d for d in val.digits if d.tobytes() in seen]


def test_labels_are_those_of_the_digit_images(scenes, dataset):
    from sklearn.datasets import load_digits

    target = load_digits().target
    content = json.loads((dataset / "val.json").read_text())
    for annotation in content["annotations"]:
        assert annotation["category_id"] == target[annotation["digit_id"]] + 1


def test_same_seed_same_files(scenes, dataset, tmp_path):
    scenes.write_split(tmp_path, "train", 10, SEED)
    first = json.loads((tmp_path / "train.json").read_text())
    whole = json.loads((dataset / "train.json").read_text())
    assert first["images"] == whole["images"][:10]
    assert first["annotations"] == whole["annotations"][: len(first["annotations"])]
    for image in first["images"]:
        name = image["file_name"]
        assert (tmp_path / "train" / name).read_bytes() == (dataset / "train" / name).read_bytes()


def test_other_seed_other_scenes(scenes, dataset, tmp_path):
    scenes.write_split(tmp_path, "train", 10, SEED + 1)
    other = json.loads((tmp_path / "train.json").read_text())
    whole = json.loads((dataset / "train.json").read_text())
    assert other["annotations"] != whole["annotations"][: len(other["annotations"])]


def test_writing_again_leaves_nothing_of_the_first_time(scenes, tmp_path):
    scenes.write_split(tmp_path, "val", 5, SEED)
    scenes.write_split(tmp_path, "val", 2, SEED)
    assert sorted(p.name for p in (tmp_path / "val").iterdir()) == ["000001.png", "000002.png"]
    assert len(json.loads((tmp_path / "val.json").read_text())["images"]) == 2


def test_photographs_need_no_network(scenes, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a photograph is being downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for split in ("train", "val"):
        for name, image in scenes.load_sources(split).photographs.items():
            assert image.shape[2:] == (3,), name
            assert image.dtype == np.float32, name
            assert 0 <= image.min() < image.max() <= 1, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(digits=(0, 3)), "digits must be a range"),
        (dict(digits=(4, 3)), "digits must be a range"),
        (dict(digit_size=(4, 30)), "digit_size must be a range"),
        (dict(size=64), "twice the largest digit"),
    ],
)
def test_scene_config_refuses(scenes, options, message):
    with pytest.raises(ValueError, match=message):
        scenes.SceneConfig(**options)


@pytest.mark.parametrize(
    ("split", "count", "seed", "message"),
    [
        ("test", 1, 0, "split must be one of train, val, got 'test'"),
        ("val", 0, 0, "at least 1 scene"),
        ("val", 1, -1, "seed must not be negative"),
    ],
)
def test_write_split_refuses(scenes, tmp_path, split, count, seed, message):
    with pytest.raises(ValueError, match=message):
        scenes.write_split(tmp_path, split, count, seed)
    assert not list(tmp_path.iterdir())


def test_iou(demo):
    iou = demo("drawing").iou
    assert iou([0, 0, 4, 4], [0, 0, 4, 4]) == 1
    assert iou([0, 0, 4, 4], [2, 0, 4, 4]) == pytest.approx(1 / 3)
    assert iou([0, 0, 4, 4], [4, 4, 2, 2]) == 0


def test_only_the_best_detection_of_each_place_is_drawn(demo):
    drawing = demo("drawing")
    boxes = ([0, 0, 10, 10], [1, 0, 10, 10], [30, 30, 10, 10], [60, 60, 10, 10])
    scores = (0.5, 0.9, 0.6, 0.01)
    found = [dict(bbox=b, score=s) for b, s in zip(boxes, scores, strict=True)]
    assert drawing.best_of_each_place(found) == [found[1], found[2]]


def test_smooth(demo):
    smooth = demo("drawing").smooth
    assert smooth(np.array([1.0, 3.0, 5.0, 7.0]), window=2).tolist() == [1, 2, 4, 6]


def test_plain_progress_lines(demo):
    from io import StringIO

    from rich.console import Console

    display = demo("display")
    console = Console(file=StringIO(), width=40)
    with display.Display(console).phase("training", 100) as step:
        for _ in range(100):
            step("loss [1.0]")
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 1, "a phase of no time needs one line"
    assert lines[-1] == "training     100/100  loss [1.0]  ETA 0:00"
    assert display.format_seconds(247.2) == "4:07"


def test_config_follows_spec_and_iterations(demo, tmp_path):
    from vovnet_fast import specs

    training = demo("training")
    for spec in map(specs.get, specs.names()):
        cfg = training.make_config(spec, tmp_path, tmp_path, "cpu", 500, 7)
        assert cfg.model.backbone.spec_name == spec.name
        assert tuple(cfg.model.neck.in_channels) == spec.out_channels[1:]
    warmup, cosine = cfg.param_scheduler
    assert warmup.end == cosine.begin
    assert cosine.begin + cosine.T_max == cosine.end == cfg.train_cfg.max_iters == 500
    assert len(training.make_config(spec, tmp_path, tmp_path, "cpu", 1, 7).param_scheduler) == 1


def test_config_is_complete_for_mmdets_own_tools(demo):
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    cfg = Config.fromfile(demo("training").CONFIG_FILE)
    assert cfg.custom_imports.imports == ["vovnet_fast.mmdet"]
    init_default_scope(cfg.default_scope)
    assert type(MODELS.build(cfg.model).backbone).__name__ == "VoVNetFast"
    for key in ("train_dataloader", "val_dataloader", "test_dataloader", "test_evaluator"):
        assert key in cfg


def run_demo(*arguments: object) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(DEMO / "run.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A folder, the options that it was made with, and how that ended."""
    out = tmp_path_factory.mktemp("short") / "demo"
    options = ("--out", out, "--iterations", 3, "--train-scenes", 12, "--val-scenes", 13)
    return out, options, run_demo(*options, "--spec", "vovnet-19-slim-dw1")


def test_accuracy_in_fewer_bits(short_run, tmp_path, monkeypatch):
    """python -m benchmarks.accuracy, of what a demo has left."""
    from mmengine.config import Config

    from benchmarks import accuracy

    out, _, done = short_run
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "trained"
    shutil.copytree(out, folder)
    config = Config.fromfile(folder / "config.py")
    # After three iterations it is sure of nothing.
    config.model.test_cfg.score_thr = 0.0
    config.val_evaluator.ann_file = config.test_evaluator.ann_file = str(
        folder / "scenes" / "val.json"
    )
    config.dump(str(folder / "config.py"))
    for name, value in (("CALIBRATION", 1), ("UNSEEN", 1), ("RESAMPLES", 3)):
        monkeypatch.setattr(accuracy, name, value)
    monkeypatch.setattr(accuracy, "FORMATS", accuracy.FORMATS[:1] + accuracy.FORMATS[2:4])
    monkeypatch.setattr(accuracy, "EIGHT_BITS", accuracy.EIGHT_BITS[:2])
    monkeypatch.setattr(accuracy, "CHOICES", accuracy.CHOICES[:1])
    words = ["accuracy", str(folder), "--rounds", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "found" / "accuracy")])
    accuracy.main()

    rows = json.loads((tmp_path / "found" / "accuracy.json").read_text())["rows"]
    plain, bf16, int8, *choices = rows
    assert plain["least_sqnr_db"] > 90 > bf16["least_sqnr_db"] > int8["least_sqnr_db"] > 15
    assert [row["least_sqnr_db"] for row in choices] == sorted(
        row["least_sqnr_db"] for row in choices
    ), "255 levels are nearer than 127"
    assert plain["ratio_to_eager"] == 1.0
    for row in (bf16, int8):
        assert 0 < row["bbox_mAP"] <= row["bbox_mAP_50"] < 1
        assert row["mAP_minus_fp32"] == row["bbox_mAP"] - plain["bbox_mAP"]
        assert row["mAP_minus_low"] <= row["mAP_minus_high"]
    text = (tmp_path / "found" / "accuracy.md").read_text()
    assert "| bf16, frozen | 0." in text
    assert "| auto | " in text
    assert io.imread(tmp_path / "found" / "accuracy.png").std() > 0


def test_short_run_writes_everything(short_run):
    out, options, done = short_run
    assert done.returncode == 0, done.stderr
    assert "mAP50" in done.stdout
    assert "detections.png" in done.stdout
    assert "training       3/3  loss" in done.stdout

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["spec"] == "vovnet-19-slim-dw1"
    assert metrics["iterations"] == 3
    assert 0 <= metrics["bbox_mAP_50"] <= 1
    assert sorted(metrics["AP50_by_class"]) == list("0123456789")
    assert math.isfinite(metrics["final_loss"])
    for name in ("detections.png", "loss_curve.png"):
        assert io.imread(out / name).std() > 0, name
    assert not list(out.rglob("*.partial"))
    _check_config_and_checkpoint(out)

    # A rerun replaces everything, and leaves what is not its own.
    (out / "notes.txt").write_text("mine")
    (out / "detections.png").write_text("old")
    again = run_demo(*options, "--seed", 1, "--amp")
    assert again.returncode == 0, again.stderr
    assert json.loads((out / "metrics.json").read_text())["seed"] == 1
    assert json.loads((out / "metrics.json").read_text())["amp"]
    assert io.imread(out / "detections.png").std() > 0
    assert len(list((out / "logs").glob("*/*.log"))) == 1
    assert (out / "notes.txt").read_text() == "mine"


def _check_config_and_checkpoint(out: Path) -> None:
    """The written config builds the network that the written weights fill."""
    import torch
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    cfg = Config.fromfile(out / "config.py")
    init_default_scope("mmdet")
    state = torch.load(out / "checkpoint.pth", weights_only=False)["state_dict"]
    MODELS.build(cfg.model).load_state_dict(state, strict=True)
    assert all(torch.isfinite(value).all() for value in state.values())


def test_main_refuses_bad_arguments(demo, tmp_path, capsys):
    main = demo("run").main
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    for arguments, message in (
        (["--spec", "V-38-eSE"], "unknown VoVNet 'V-38-eSE': did you mean"),
        (["--out", str(foreign)], "holds files that this demo did not write"),
        (["--out", str(foreign / "thesis.tex")], "is a file"),
    ):
        assert main(["--out", str(tmp_path / "new"), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert (foreign / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "new").exists()


def test_main_refuses_cuda_without_a_gpu(demo, tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert demo("run").main(["--out", str(tmp_path / "new"), "--device", "cuda"]) == 2
    assert "finds no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "0"], "--iterations: must be a whole number from 1"),
        (["--iterations", "many"], "got 'many'"),
        (["--val-scenes=-3"], "--val-scenes: must be a whole number from 1"),
        (["--seed=-1"], "--seed: must be a whole number from 0"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_parser_refuses(demo, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        demo("run").main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
