"""Scenes of real handwritten digits on real photographs, as a COCO dataset.

The digits are scikit-learn's copy of the UCI handwritten digits, the
photographs are those that scikit-image carries in its wheel, so that nothing is
downloaded. Training and validation share neither a digit image nor a
photograph.

    python demo/scenes.py --out data/digits

writes what configs/digits reads::

    data/digits/train.json          annotations, COCO instances format
    data/digits/train/000001.png    RGB, 8 bit
    data/digits/val.json
    data/digits/val/000001.png
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from skimage import color, data, io, transform, util
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CLASSES = tuple("0123456789")
"""Category names in COCO order; the category of digit d has id d + 1."""

SPLITS = ("train", "val")

# All are in scikit-image's wheel since 0.22. Those of printed text are left out, since
# digits that nobody annotated would be counted as false detections.
PHOTOGRAPHS = {
    "train": (
        "astronaut",
        "brick",
        "camera",
        "chelsea",
        "coffee",
        "grass",
        "hubble_deep_field",
        "immunohistochemistry",
        "moon",
        "retina",
    ),
    "val": ("coins", "gravel", "motorcycle", "rocket"),
}

DIGIT_SEED = 0
"""Which digit images are held out does not depend on the seed of the scenes, so
that a detector trained with any seed can be tested on any other's validation
scenes."""

HELD_OUT_DIGITS = 0.25
INK_THRESHOLD = 0.5
"""Opacity from which a pixel belongs to the digit, and its box must hold it."""

_MIN_CONTRAST = 0.3
_MAX_TILT = 10.0
_PLACING_TRIES = 60
_GAP = 2


@dataclass(frozen=True)
class SceneConfig:
    """What scenes look like.

    Attributes:
        size: side of the square image in pixels.
        digits: smallest and largest number of digits that are tried. A scene
            holds fewer where they would overlap, and never less than one.
        digit_size: smallest and largest height in pixels to which an 8x8 digit
            image is enlarged. The box is a little smaller: it is tight around
            the ink.

    Raises:
        ValueError: a range is empty, or the largest digit does not fit.
    """

    size: int = 128
    digits: tuple[int, int] = (2, 5)
    digit_size: tuple[int, int] = (28, 60)

    def __post_init__(self) -> None:
        if not 1 <= self.digits[0] <= self.digits[1]:
            raise ValueError(f"digits must be a range from 1 up, got {self.digits}")
        if not 8 <= self.digit_size[0] <= self.digit_size[1]:
            raise ValueError(f"digit_size must be a range from 8 pixels up, got {self.digit_size}")
        if self.size < 2 * self.digit_size[1]:
            raise ValueError(
                f"size must be at least twice the largest digit ({self.digit_size[1]} pixels), "
                f"got {self.size}"
            )


@dataclass(frozen=True)
class Sources:
    """The material of one split.

    Attributes:
        digits: ``[N, 8, 8]`` float64, ink from 0 to 1.
        labels: ``[N]`` int64, the digits' values.
        digit_ids: ``[N]`` int64, their positions in scikit-learn's data set.
        photographs: ``[H, W, 3]`` float32 images, 0 to 1, by name.
    """

    digits: np.ndarray
    labels: np.ndarray
    digit_ids: np.ndarray
    photographs: dict[str, np.ndarray]


@dataclass(frozen=True)
class Scene:
    """One image and what is on it.

    Attributes:
        image: ``[size, size, 3]`` uint8, RGB.
        boxes: ``[D, 4]`` int64, x, y, width and height in pixels.
        labels: ``[D]`` int64, 0 to 9.
        opacities: ``[size, size]`` float32 for each digit: the ink that was
            blended into the image.
        digit_ids: ``[D]`` int64, positions in scikit-learn's data set.
        photograph: name of the background.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    opacities: list[np.ndarray]
    digit_ids: np.ndarray
    photograph: str


def load_sources(split: str) -> Sources:
    """Read the digit images and the photographs of a split.

    Args:
        split: ``train`` or ``val``.

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    digits = load_digits()
    parts = train_test_split(
        np.arange(len(digits.target)),
        test_size=HELD_OUT_DIGITS,
        random_state=DIGIT_SEED,
        stratify=digits.target,
    )
    ids = np.sort(parts[SPLITS.index(split)])
    return Sources(
        digits=digits.images[ids] / 16.0,
        labels=digits.target[ids].astype(np.int64),
        digit_ids=ids.astype(np.int64),
        photographs={name: _load_photograph(name) for name in PHOTOGRAPHS[split]},
    )


def _load_photograph(name: str) -> np.ndarray:
    # The stereo pair is the one photograph whose function returns several arrays.
    image = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    image = util.img_as_float32(image)
    return color.gray2rgb(image) if image.ndim == 2 else image[..., :3]


def make_scene(rng: np.random.Generator, sources: Sources, config: SceneConfig) -> Scene:
    """Draw digits on a region of a photograph.

    Args:
        rng: decides everything; the same state makes the same scene.
        sources: digits and photographs to choose from.
        config: what the scene looks like.
    """
    names = sorted(sources.photographs)
    photograph = names[rng.integers(len(names))]
    image = _cut_background(rng, sources.photographs[photograph], config.size)
    boxes: list[tuple[int, int, int, int]] = []
    opacities, chosen = [], []
    for _ in range(rng.integers(config.digits[0], config.digits[1] + 1)):
        index = int(rng.integers(len(sources.labels)))
        ink = _render_digit(rng, sources.digits[index], config.digit_size)
        place = _find_place(rng, ink.shape, boxes, config.size)
        if place is None:
            continue
        y, x = place
        opacity = np.zeros((config.size, config.size), np.float32)
        opacity[y : y + ink.shape[0], x : x + ink.shape[1]] = ink
        background = image[y : y + ink.shape[0], x : x + ink.shape[1]].mean(axis=(0, 1))
        alpha = opacity[..., None]
        image = image * (1 - alpha) + _choose_ink(rng, background) * alpha
        boxes.append(_tight_box(opacity))
        opacities.append(opacity)
        chosen.append(index)
    return Scene(
        image=(image.clip(0, 1) * 255 + 0.5).astype(np.uint8),
        boxes=np.array(boxes, np.int64),
        labels=sources.labels[chosen],
        opacities=opacities,
        digit_ids=sources.digit_ids[chosen],
        photograph=photograph,
    )


def _cut_background(rng: np.random.Generator, photograph: np.ndarray, size: int) -> np.ndarray:
    """A random square of a photograph at ``[size, size, 3]``, sometimes mirrored."""
    shortest = min(photograph.shape[:2])
    side = int(rng.integers(min(size, shortest), min(3 * size, shortest) + 1))
    y = int(rng.integers(photograph.shape[0] - side + 1))
    x = int(rng.integers(photograph.shape[1] - side + 1))
    square = photograph[y : y + side, x : x + side]
    if rng.random() < 0.5:
        square = square[:, ::-1]
    return transform.resize(square, (size, size, 3), order=1, anti_aliasing=side > size)


def _render_digit(
    rng: np.random.Generator, digit: np.ndarray, sizes: tuple[int, int]
) -> np.ndarray:
    """Enlarge and tilt an 8x8 digit, ``[h, w]`` float32 opacity from 0 to 1, cut to its ink."""
    height = int(rng.integers(sizes[0], sizes[1] + 1))
    width = max(8, round(height * rng.uniform(0.8, 1.1)))
    # A margin, so that the tilt pushes no ink out and strokes at the edge stay round.
    ink = transform.resize(np.pad(digit, 1), (height * 10 // 8, width * 10 // 8), order=3)
    ink = transform.rotate(ink, rng.uniform(-_MAX_TILT, _MAX_TILT), resize=True, order=1)
    # 8x8 pixels enlarged are a blur; a steep ramp around half ink gives back strokes.
    ink = ((ink - 0.35) / 0.3).clip(0, 1).astype(np.float32)
    x, y, w, h = _tight_box(ink, threshold=0.0)
    return ink[y : y + h, x : x + w]


def _find_place(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    boxes: list[tuple[int, int, int, int]],
    size: int,
) -> tuple[int, int] | None:
    """Top left corner (y, x) where a digit overlaps none of the boxes, or None."""
    height, width = shape
    for _ in range(_PLACING_TRIES):
        y = int(rng.integers(size - height + 1))
        x = int(rng.integers(size - width + 1))
        if all(
            x + width + _GAP <= bx
            or bx + bw + _GAP <= x
            or y + height + _GAP <= by
            or by + bh + _GAP <= y
            for bx, by, bw, bh in boxes
        ):
            return y, x
    return None


def _choose_ink(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """A random colour, ``[3]`` float, whose lightness stands out from the background's."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    while True:  # More than a sixth of all colours stand out from any background.
        ink = rng.random(3)
        if abs(float(weights @ (ink - background))) >= _MIN_CONTRAST:
            return ink


def _tight_box(opacity: np.ndarray, threshold: float = INK_THRESHOLD) -> tuple[int, int, int, int]:
    """x, y, width, height of the smallest box around all pixels above the threshold."""
    rows = np.flatnonzero((opacity > threshold).any(axis=1))
    columns = np.flatnonzero((opacity > threshold).any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def write_split(
    folder: Path,
    split: str,
    count: int,
    seed: int,
    config: SceneConfig | None = None,
    on_scene: Callable[[], None] | None = None,
) -> Path:
    """Write the images and the annotations of a split.

    Args:
        folder: the dataset's folder, made where it is missing. What it held of
            this split is removed first.
        split: ``train`` or ``val``.
        count: number of scenes.
        seed: the same seed writes the same files. Scene i does not depend on
            ``count``.
        config: what scenes look like; None is ``SceneConfig()``.
        on_scene: called after each scene, for a progress display.

    Returns:
        Path of the annotation file, which is written last.

    Raises:
        ValueError: unknown split, ``count`` below 1 or negative ``seed``.
    """
    if count < 1:
        raise ValueError(f"a split needs at least 1 scene, got {count}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    config = config or SceneConfig()
    sources = load_sources(split)
    annotation_file = folder / f"{split}.json"
    annotation_file.unlink(missing_ok=True)
    shutil.rmtree(folder / split, ignore_errors=True)
    (folder / split).mkdir(parents=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for index in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        scene = make_scene(rng, sources, config)
        image = _image_entry(index + 1, scene)
        io.imsave(folder / split / image["file_name"], scene.image, check_contrast=False)
        images.append(image)
        annotations += _annotation_entries(index + 1, len(annotations) + 1, scene)
        if on_scene:
            on_scene()
    content = {
        "info": {"description": f"handwritten digits on photographs, {split}, seed {seed}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    annotation_file.write_text(json.dumps(content))
    return annotation_file


def _image_entry(image_id: int, scene: Scene) -> dict:
    return {
        "id": image_id,
        "file_name": f"{image_id:06d}.png",
        "height": scene.image.shape[0],
        "width": scene.image.shape[1],
        "photograph": scene.photograph,
    }


def _annotation_entries(image_id: int, first_id: int, scene: Scene) -> list[dict]:
    return [
        {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": int(label) + 1,
            "bbox": [int(v) for v in box],
            "area": int(box[2] * box[3]),
            "iscrowd": 0,
            "digit_id": int(digit_id),
        }
        for i, (box, label, digit_id) in enumerate(
            zip(scene.boxes, scene.labels, scene.digit_ids, strict=True)
        )
    ]


def main(argv: list[str] | None = None) -> None:
    """Write both splits; the command line of this file."""
    parser = argparse.ArgumentParser(
        prog="demo/scenes.py",
        description="Write scenes of handwritten digits on photographs as a COCO dataset.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/digits"), help="folder (default: %(default)s)"
    )
    parser.add_argument("--train", type=int, default=2000, help="scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=200, help="scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    for split, count in (("train", args.train), ("val", args.val)):
        try:
            print(write_split(args.out, split, count, args.seed))
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
