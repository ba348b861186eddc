import json

import pytest
import torch

from tests import straight_line
from vovnet_fast import _optional
from vovnet_fast.tools import cli

SMALL = "ese_vovnet19b_slim_dw"
needs_timm = pytest.mark.skipif(
    _optional.why_not("timm") is not None, reason=str(_optional.why_not("timm"))
)


@pytest.fixture
def files(tmp_path):
    """An image, and weights of a classifier under timm's names."""
    image = pytest.importorskip("PIL.Image").new("RGB", (300, 260), (200, 30, 60))
    image.save(tmp_path / "red.png")
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


@pytest.fixture
def weights(files):
    import timm

    net = straight_line.randomise(timm.create_model(SMALL)).eval()
    torch.save(net.state_dict(), files / "weights.pth")
    return net


@needs_timm
@pytest.mark.versions
@pytest.mark.parametrize("name", [SMALL, f"{SMALL}_fast.untrained"])
def test_the_likeliest_are_timms(name, files, weights, capsys):
    import PIL.Image
    import timm.data

    words = ["classify", name, str(files / "red.png"), "--weights", str(files / "weights.pth")]
    assert cli.main([*words, "--top", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(weights))
    with torch.no_grad():
        expected = weights(transform(PIL.Image.open(files / "red.png"))[None]).softmax(1).topk(3)
    assert [guess["number"] for guess in found] == expected.indices[0].tolist()
    assert [g["probability"] for g in found] == pytest.approx(expected.values[0].tolist(), rel=1e-3)
    assert all(guess["words"] for guess in found)
    assert cli.main(words) == 0
    assert f" {found[0]['number']} " in capsys.readouterr().out


@needs_timm
@pytest.mark.versions
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{name} {dir}/text.png --weights {dir}/weights.pth", "text.png is no image"),
        ("{name} {dir}/none.png --weights {dir}/weights.pth", "No such file"),
        ("{name} {dir}/red.png", "timm has no weights of ese_vovnet19b_slim_dw: give a file"),
        ("resnet50 {dir}/red.png", "timm has no VoVNet 'resnet50'; known are ese_vovnet19b"),
        ("ese_vovnet19b_dw {dir}/red.png --weights {dir}/weights.pth", "shapes differ"),
        ("{name} {dir}/red.png --top 0", "top must be at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("weights")
def test_errors_are_one_line(words, message, files, capsys):
    assert cli.main(["classify", *words.format(name=SMALL, dir=files).split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vovnet-fast classify: ")
    assert message in error


def test_without_timm(monkeypatch, capsys):
    monkeypatch.setattr(_optional, "why_not", lambda name: f"{name} is not installed")
    assert cli.main(["classify", SMALL, "cat.jpg"]) == 1
    assert "vovnet-fast classify: timm is not installed" in capsys.readouterr().err
