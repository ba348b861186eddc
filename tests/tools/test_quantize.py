"""``vovnet-fast quantize``: images of a folder in, a file out, or nothing."""

import argparse
import os

import pytest
import torch

from tests import straight_line
from tests.checkpoints.test_writing import largest_file
from tests.quantization import cases
from vovnet_fast import VoVNet, _optional, checkpoints, freeze, load_quantized
from vovnet_fast.tools import cli, images
from vovnet_fast.tools import quantize as command

PIL = pytest.importorskip("PIL.Image")

SMALL = "V-19-slim-dw-eSE"
QUICK = "--size 32x32 --count 2 --calibrator minmax --stem int8 --no-bias-correction"
OWN = "--mean 10,20,30 --std 40,50,60 --to-rgb"


def picture(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture
def folder(tmp_path):
    """Pictures, in folders below too, of several sizes and kinds, among other files."""
    where = tmp_path / "images"
    (where / "below").mkdir(parents=True)
    for i, (name, size) in enumerate(
        [("a.png", (33, 40)), ("b.PNG", (33, 40)), ("below/c.png", (50, 37)), ("d.jpeg", (64, 64))]
    ):
        PIL.fromarray(picture(*size, seed=i).numpy()).save(where / name)
    (where / "notes.txt").write_text("no picture")
    return where


@pytest.fixture
def out(tmp_path):
    return tmp_path / "network.safetensors"


@pytest.fixture
def asked(monkeypatch):
    """What ``quantize`` is asked for, and the images, without what takes its time."""
    found = {}

    class Quantized:
        dtype, levels, wide_stem = "int8", 127, False

        def save(self, path):
            path.write_bytes(b"x" * 1000)

        def report(self):
            from vovnet_fast.quantization.report import Report, Row

            return Report([Row("stage5", "feature", 30.04, 1.0, 0.0)])

    def note(model, batches, *args, **options):
        found.update(options, model=model, args=args, batches=list(batches), length=len(batches))
        return Quantized()

    monkeypatch.setattr(command, "quantize", note)
    return found


def run(source, out, folder, words=""):
    return cli.main(["quantize", str(source), str(out), "--images", str(folder), *words.split()])


def test_what_is_written_is_the_network(folder, out, tmp_path, capsys):
    """From a checkpoint of a detector, whose normalisation is asked for."""
    net = straight_line.build(SMALL)
    torch.save({f"img_backbone.{k}": v for k, v in net.state_dict().items()}, tmp_path / "a.pth")
    plot, drawn = tmp_path / "a.png", _optional.why_not("matplotlib") is None
    words = f"{QUICK} {OWN} --features stage2,stage3" + f" --report {plot}" * drawn
    assert run(tmp_path / "a.pth", out, folder, words) == 0
    loaded = load_quantized(out, spec=SMALL)
    assert (loaded.dtype, loaded.wide_stem) == ("int8", False)
    assert loaded.out_features == ("stage2", "stage3")
    said, warned = capsys.readouterr()
    for part in ("prefix img_backbone.", "2 of 4, 32x32", "RGB, mean 10,20,30, std 40,50,60"):
        assert part in said
    worst = min(loaded.report().features, key=lambda row: row.sqnr)
    assert said.splitlines()[-1] == (
        f"least SQNR {worst.sqnr:.1f} dB ({worst.name}), {out.stat().st_size / 1e6:.1f} MB in {out}"
    )
    assert "Images to calibrate on: 2." in warned
    if drawn:
        assert "OSA3_1_0/depthwise" in said
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_is_asked_for(folder, out, asked, capsys):
    words = (
        "--dtype fp8 --calibrator entropy --stem wide --equalize --no-bias-correction "
        "--percentile 99.5 --features stem,stage3"
    )
    if "fp8" not in cases.DTYPES:
        words = words.replace("fp8", "int8")
    assert run(SMALL, out, folder, words) == 0
    assert asked["args"] == (words.split()[1], "entropy")
    assert {name: asked[name] for name in ("levels", "stem", "equalize", "bias_correction")} == {
        "levels": None, "stem": "wide", "equalize": True, "bias_correction": False,
    }  # fmt: skip
    assert asked["percentile"] == 99.5
    assert asked["model"].out_features == ("stem", "stage3")
    assert not asked["model"].training
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("least SQNR 30.0 dB (stage5), 0.0 MB")
    )
    assert run(SMALL, out, folder, "--levels 255 --force") == 0
    assert asked["levels"] == 255


def test_images_are_those_of_the_folder(folder, out, asked):
    """As they are: of one size together, by name, normalised as published backbones want it."""
    assert run(SMALL, out, folder, "--batch 3") == 0
    batches = asked["batches"]
    assert [list(batch.shape) for batch in batches] == [
        [2, 3, 33, 40], [1, 3, 50, 37], [1, 3, 64, 64],
    ]  # fmt: skip
    assert asked["length"] == 3  # Of the bar.
    mean = torch.tensor([103.53, 116.28, 123.675])
    for x, seed, size in ((batches[0][1], 1, (33, 40)), (batches[1][0], 2, (50, 37))):
        wanted = picture(*size, seed=seed).flip(2).float() - mean
        torch.testing.assert_close(x, wanted.permute(2, 0, 1))
    assert run(SMALL, out, folder, f"--force --batch 1 --count 3 {OWN}") == 0
    assert [list(batch.shape) for batch in asked["batches"]] == [
        [1, 3, 33, 40], [1, 3, 33, 40], [1, 3, 50, 37],
    ]  # fmt: skip
    wanted = (picture(33, 40).float() - torch.tensor([10.0, 20, 30])) / torch.tensor([40.0, 50, 60])
    torch.testing.assert_close(asked["batches"][0][0], wanted.permute(2, 0, 1))


def test_images_that_are_fitted(folder, out, asked):
    """Their sides stay in proportion, and zeros are what remains, after normalising."""
    assert run(SMALL, out, folder, f"--size 66x90 {OWN}") == 0
    (batch,) = asked["batches"]
    assert batch.shape == (4, 3, 66, 90)
    for image, width in zip(batch, (80, 80, 49, 66)):
        assert (image[..., width:] == 0).all()
        assert (image[..., width - 1] != 0).any()
    twice = torch.nn.functional.interpolate(
        picture(33, 40).permute(2, 0, 1)[None].float(), (66, 80), mode="bilinear", antialias=True
    )[0]
    wanted = (twice[0] - 10) / 40
    torch.testing.assert_close(batch[0, 0, :, :80], wanted, atol=1e-4, rtol=0)
    assert run(SMALL, out, folder, f"--size 32x32 --force {OWN}") == 0
    assert asked["batches"][0].shape == (4, 3, 32, 32)


def test_a_camera_s_word_for_up_and_pictures_without_colours(tmp_path):
    upright = picture(20, 30)
    exif = PIL.Exif()
    exif[0x0112] = 6  # To be turned by 90 degrees.
    PIL.fromarray(upright.numpy()).save(tmp_path / "turned.png", exif=exif)
    found = images.read(tmp_path / "turned.png")
    assert torch.equal(found, upright.permute(2, 0, 1).rot90(-1, (1, 2)))
    alpha = torch.cat([upright, torch.zeros_like(upright[..., :1])], 2)
    PIL.fromarray(alpha.numpy()).save(tmp_path / "alpha.png")
    assert torch.equal(images.read(tmp_path / "alpha.png"), upright.permute(2, 0, 1))
    PIL.fromarray(upright[..., 0].numpy()).save(tmp_path / "grey.png")
    assert torch.equal(
        images.read(tmp_path / "grey.png"), upright[..., :1].permute(2, 0, 1).expand(3, -1, -1)
    )


@pytest.mark.parametrize(("count", "names"), [(2, "ac"), (3, "abc"), (4, "abcd"), (9, "abcd")])
def test_few_are_spread_over_all(folder, count, names):
    (folder / "below" / "c.png").rename(folder / "c.png")
    args = argparse.Namespace(images=folder, count=count, size=None, batch=1)
    found = images.Images(args, VoVNet(SMALL), images.PRESETS["timm"])
    assert "".join(file.name[0] for file in found.files) == names
    assert (len(found.files), found.there) == (min(count, 4), 4)


BAD = {
    "an ending": ("{small} {dir}/a.pth --images {images}", "OUT must end in .safetensors, got"),
    "a file that is there": ("{small} {there} --images {images}", "exists; --force replaces it"),
    "no folder to write in": ("{small} {dir}/no/a.safetensors --images {images}", "no folder"),
    "no folder": ("{small} {out} --images {dir}/none", "there is no folder"),
    "no folder but a file": ("{small} {out} --images {there}", "is no folder: --images takes one"),
    "no images": ("{small} {out} --images {empty}", "there are no images in"),
    "a broken one": ("{small} {out} --images {broken}", "broken/b.png cannot be read as an image"),
    "a cut one": ("{small} {out} --images {cut}", "a.jpg cannot be read as an image: "),
    "16 bits": ("{small} {out} --images {deep}", "its pixels are of mode I"),
    "constant ones": ("{small} {out} --images {flat} --size 32x32", "all images are "),
    "too small ones": ("{small} {out} --images {images} --size 8x8", "a.png: an image of 8x8 is"),
    "a size": ("{small} {out} --images {images} --size 640", "--size is written HxW"),
    "a count": ("{small} {out} --images {images} --count 0", "--count must be at least 1"),
    "a batch": ("{small} {out} --images {images} --batch -1", "--batch must be at least 1"),
    "a mean alone": ("{small} {out} --images {images} --mean 1,2,3", "belong together: give all"),
    "two numbers": ("{small} {out} --images {images} --mean 1,2 --std 1,2,3 --to-rgb", "--mean mu"),
    "words": ("{small} {out} --images {images} --mean 1,2,3 --std a,b,c --to-rgb", "--std must be"),
    "NaN": ("{small} {out} --images {images} --mean 1,2,nan --std 1,2,3 --to-rgb", "--mean must b"),
    "no spread": (
        "{small} {out} --images {images} --mean 1,2,3 --std 1,0,3 --to-rgb", "must be above zero"
    ),
    "of pixels to 1": (
        "{small} {out} --images {images} --mean 0.4,0.4,0.4 --std 0.2,0.2,0.2 --to-rgb",
        "multiply both by 255",
    ),
    "a detector's checkpoint": ("{detector} {out} --images {images}", "which normalisation? "),
    "a dialect": ("vovnet-39 {out} --images {images}", "of the dialect seed none is known"),
    "channels": ("{small} {out} --images {images} --input-ch 4", "takes images of 4 channels"),
    "levels of fp8": ("{small} {out} --images {images} --dtype fp8 --levels 127", ""),
    "a percentile": ("{small} {out} --images {images} --percentile 3", "percentile must be above"),
    "a frozen network": ("{frozen} {out} --images {images}", "holds a frozen network, whose wei"),
    "a quantised one": ("{quantized} {out} --images {images}", "holds a quantised network, whose"),
    "a name": ("V-38-eSE {out} --images {images}", "there is no file V-38-eSE, and unknown VoVNet"),
    "a picture's ending": ("{small} {out} --images {images} --report a.jpg", "PNG must end in .p"),
    "a device": ("{small} {out} --images {images} --device gpu9", "--device gpu9: "),
    "features": ("{small} {out} --images {images} --features stage6", "out_features must name one"),
}  # fmt: skip


@pytest.fixture
def places(folder, out, tmp_path):
    for name in ("empty", "broken", "cut", "deep", "flat"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty" / "a.gif").write_bytes(b"GIF89a")
    good = PIL.fromarray(picture(64, 64).numpy())
    good.save(tmp_path / "broken" / "a.png")
    (tmp_path / "broken" / "b.png").write_text("no picture")
    good.save(tmp_path / "cut" / "a.jpg")
    whole = (tmp_path / "cut" / "a.jpg").read_bytes()
    (tmp_path / "cut" / "a.jpg").write_bytes(whole[: len(whole) // 2])
    deep = picture(64, 64)[..., 0].numpy().astype("uint16")
    PIL.fromarray(deep).save(tmp_path / "deep" / "a.png")
    PIL.new("RGB", (32, 32), (7, 7, 7)).save(tmp_path / "flat" / "a.png")
    model = VoVNet(SMALL)
    freeze(model).save(tmp_path / "frozen.safetensors")
    cases.quantized().save(tmp_path / "quantized.safetensors")
    inside = {f"backbone.bottom_up.{k}": v for k, v in model.state_dict().items()}
    checkpoints.write(inside, tmp_path / "detector.safetensors")
    (tmp_path / "there.safetensors").write_text("old")
    return {
        **{name: tmp_path / name for name in ("empty", "broken", "cut", "deep", "flat")},
        **{n: tmp_path / f"{n}.safetensors" for n in ("frozen", "quantized", "detector", "there")},
        "images": folder, "out": out, "dir": tmp_path, "small": SMALL,
    }  # fmt: skip


def test_errors_are_one_line_and_leave_nothing(places, tmp_path, capsys, monkeypatch):
    """All together: what they are about takes longer to make than to refuse."""
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    for kind, (words, message) in BAD.items():
        flat = "--calibrator minmax --stem int8 --no-bias-correction" if "{flat}" in words else ""
        argv = ["quantize", *words.format(**places).split(), *flat.split()]
        if "levels" in kind and "fp8" not in cases.DTYPES:
            continue
        assert cli.main(argv) == 1, kind
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error, (kind, error)
        assert "vovnet-fast quantize: " in error or "bars" in error
        assert sorted(os.listdir(tmp_path)) == before, kind
        assert places["there"].read_text() == "old"


def test_a_full_disk_leaves_what_was_there(places, capsys):
    out = places["there"]
    with largest_file(4096):
        assert run(SMALL, out, places["images"], f"{QUICK} --force") == 1
    assert "what was there is as it was" in capsys.readouterr().err
    assert out.read_text() == "old"


def test_packages_that_are_missing_are_named(folder, out, capsys, monkeypatch):
    there = _optional.why_not
    for package in ("PIL", "matplotlib"):
        monkeypatch.setattr(
            _optional, "why_not", lambda n, p=package: "it is not here" if n == p else there(n)
        )
        assert run(SMALL, out, folder, f"--report {out.with_suffix('.png')}") == 1
        assert "it is not here" in capsys.readouterr().err
    assert _optional.remedy("PIL") == "pip install pillow"
    assert not out.exists()


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["quantize", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in ("vovnet-fast quantize petr_v99.pth", "--no-to-rgb", "load_quantized"):
        assert words in said
