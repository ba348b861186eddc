"""``vovnet-fast export``: from what, and what it says where it cannot."""

import os

import pytest
import torch

from tests import straight_line
from tests.quantization import cases
from vovnet_fast import VoVNet, _optional, checkpoints, freeze
from vovnet_fast.compat import zip
from vovnet_fast.deploy import export
from vovnet_fast.tools import cli
from vovnet_fast.tools import export as command

MISSING = [reason for p in ("onnx", "onnxruntime") if (reason := _optional.why_not(p)) is not None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no export: {MISSING}")

SMALL = "V-19-slim-dw-eSE"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.onnx"


@pytest.fixture
def exported(monkeypatch):
    """The models that were exported, and what was made of them."""
    found, onnx = [], export.onnx

    def note(model, *args, **options):
        found.append((model, onnx(model, *args, **options)))
        return found[-1][1]

    monkeypatch.setattr(export, "onnx", note)
    return found


def run(source, path, words="--size 1x32x32"):
    return cli.main(["export", str(source), str(path), *words.split()])


LAYOUTS = {
    "detectron2": ("V-19-slim-dw-eSE", "img_backbone."),
    "timm": ("ese_vovnet19b_slim_dw", ""),
    "seed": ("vovnet-19-slim-dw1", "module."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_of_every_layout(layout, path, tmp_path, exported, capsys):
    name, prefix = LAYOUTS[layout]
    net = straight_line.build(name)
    torch.save({f"{prefix}{k}": v for k, v in net.state_dict().items()}, tmp_path / "file.pth")
    assert run(tmp_path / "file.pth", path, "--size 1x32x32 --features stage2,stage4") == 0
    ((model, report),) = exported
    assert (model.spec.name, model.out_features) == (name, ("stage2", "stage4"))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        mine, theirs = model.eval()(x), net(x)
    for ours, wanted in zip(mine, (theirs[-4], theirs[-2]), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    out = capsys.readouterr().out
    for words in (name, f"{report.nodes['Conv']} Conv", "onnxruntime against PyTorch", "stage4"):
        assert words in out
    assert path.stat().st_size == report.nbytes


def test_what_is_asked_for(path, exported, capsys):
    words = "--size 2x40x33 --dynamic batch,height --dtype fp16 --io fp32 --opset 16 --input-ch 1"
    assert run(SMALL, path, f"{words} --features stem,stage3") == 0
    ((model, report),) = exported
    assert (model.input_ch, model.out_features) == (1, ("stem", "stage3"))
    assert (report.opset, report.nodes["Cast"]) == (16, 3)
    assert report.checks[0].size == (2, 40, 33)
    out = capsys.readouterr().out
    for words in ("RANDOM weights", "fp16, fp32 outside", "batch,height", "fp16 ends at 65504"):
        assert words in out


def test_a_network_that_was_never_trained_is_the_same_each_time_and_tame(path):
    assert run(SMALL, path) == 0
    first = path.read_bytes()
    assert run(SMALL, path, "--size 1x32x32 --force") == 0
    assert path.read_bytes() == first


def test_a_frozen_network(path, tmp_path, exported, capsys):
    model = straight_line.randomise(VoVNet(SMALL, out_features=("stage2", "stage5")))
    freeze(model, torch.bfloat16).save(tmp_path / "frozen.safetensors")
    assert run(tmp_path / "frozen.safetensors", path, "--size 1x32x32 --no-check") == 0
    ((found, report),) = exported
    assert (found.spec, found.dtype, report.checks) == (model.spec, torch.bfloat16, ())
    out = capsys.readouterr().out
    assert "frozen in torch.bfloat16" in out
    assert "Not compared with PyTorch" in out
    for words in ("--features stage2", "--spec V-39-eSE"):
        assert run(tmp_path / "frozen.safetensors", path, f"--size 1x32x32 --force {words}") == 1
        assert f"{words.split()[0]} is about a checkpoint" in capsys.readouterr().err


def test_a_quantised_network(path, tmp_path, capsys):
    quantized = cases.quantized("depthwise", stem="int8")
    file = tmp_path / "int8.safetensors"
    quantized.save(file)
    assert run(file, path, "--size 2x64x65 --dynamic batch") == 0
    out = capsys.readouterr().out
    for words in ("tiny-depthwise, int8", "QuantizeLinear", "onnxruntime against the integers"):
        assert words in out
    assert "Given the same inputs no activation differs by more than" in " ".join(out.split())
    assert "1x65x65" not in out
    assert "1x64x65" in out
    assert run(file, path, "--size 2x64x65 --no-check --force") == 0
    assert "Not compared with the integers" in capsys.readouterr().out
    before = path.read_bytes()
    for words, message in (
        ("--features stage2", "--features is about a checkpoint, and"),
        ("--input-ch 3", "--input-ch is for a SPEC"),
        ("--dtype fp16", "--dtype and --io are of networks in floating point"),
        ("--io fp32", "--dtype and --io are of networks in floating point"),
        ("--opset 12", "opset must be 13 or newer"),
    ):
        assert run(file, path, f"--size 2x64x65 --force {words}") == 1
        assert message in capsys.readouterr().err
    assert path.read_bytes() == before
    if "fp8" in cases.DTYPES:
        cases.quantized("detectron2", "fp8").save(file)
        assert run(file, path, "--size 2x64x65 --force") == 0
        out = " ".join(capsys.readouterr().out.split())
        for words in ("fp8, fp32 outside", "19", "onnxruntime against numbers of e4m3"):
            assert words in out
        assert run(file, path, "--size 2x64x65 --force --opset 17") == 1
        assert "opset must be 19 or newer" in capsys.readouterr().err


BAD = {
    "no size": ("V-39-eSE {out} --size 640", "an input is written NxHxW"),
    "an axis": ("V-39-eSE {out} --size 1x64x64 --dynamic depth", "must be some of batch, height"),
    "an opset": ("V-39-eSE {out} --size 1x64x64 --opset 9", "opset must be 11 to"),
    "too small": (f"{SMALL} {{out}} --size 1x8x8", "an image of 8x8 is too small: stage5 of V-19"),
    "a dtype outside": ("V-39-eSE {out} --size 1x64x64 --io fp16", "io_dtype is torch.float16"),
    "features": (f"{SMALL} {{out}} --size 1x64x64 --features stage6", "out_features must name one"),
    "no features": (f"{SMALL} {{out}} --size 1x64x64 --features ,", "out_features must name one"),
    "an ending": ("V-39-eSE {dir}/a.txt --size 1x64x64", "OUT must end in .onnx, got"),
    "a file that is there": ("V-39-eSE {there} --size 1x64x64", "exists; --force replaces it"),
    "a folder": (f"{SMALL} {{dir}}/no/a.onnx --size 1x64x64", "there is no folder"),
    "a name": ("V-38-eSE {out} --size 1x64x64", "there is no file V-38-eSE, and unknown VoVNet"),
    "a spec's spec": ("V-39-eSE {out} --size 1x64x64 --spec V-19-eSE", "--spec is about a CHECKP"),
    "a spec's layout": ("V-39-eSE {out} --size 1x64x64 --from timm", "--from is about a CHECK"),
    "a file's channels": ("{there} {out} --size 1x64x64 --input-ch 3", "--input-ch is for a SPEC"),
    "no checkpoint": ("{there} {out} --size 1x64x64", "there.onnx"),
    "another network": ("{other} {out} --size 1x64x64", "no VoVNet backbone found"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_errors_are_one_line_and_leave_nothing(kind, path, tmp_path, capsys):
    words, message = BAD[kind]
    there, other = tmp_path / "there.onnx", tmp_path / "other.safetensors"
    there.write_text("old")
    checkpoints.write({"x": torch.ones(1)}, other)
    places = dict(out=path, dir=tmp_path, there=there, other=other)
    assert cli.main(["export", *words.format(**places).split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vovnet-fast export: ")
    assert message in error
    assert sorted(os.listdir(tmp_path)) == ["other.safetensors", "there.onnx"]
    assert there.read_text() == "old"


def test_a_file_that_fails_its_check_is_not_left(path, capsys, monkeypatch):
    monkeypatch.setattr("vovnet_fast.deploy.onnx_check.MOST", 0.0)
    monkeypatch.setattr("vovnet_fast.deploy.onnx_check.ALLOWED", dict.fromkeys(
        command.DTYPES.values(), 0.0
    ))  # fmt: skip
    assert run(SMALL, path) == 1
    assert "is not in onnxruntime what it is in PyTorch" in capsys.readouterr().err
    assert os.listdir(path.parent) == []


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["export", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for words in ("vovnet-fast export v99.pth v99.onnx --size 6x640x1600", "trtexec --onnx="):
        assert words in out
