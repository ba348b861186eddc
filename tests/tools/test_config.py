"""``vovnet-fast doctor --config``: what stands around a backbone in a config and does not fit."""

import json

import pytest
import torch

pytest.importorskip("mmengine.config", exc_type=Exception)

from tests import straight_line
from tests.quantization import cases
from tests.tiny import TINY
from vovnet_fast import VoVNet, checkpoints
from vovnet_fast.tools import cli, config

NAME = "V-19-slim-dw-eSE"

BEVFORMER = """
custom_imports = dict(imports=["some.plugin", "vovnet_fast.mmdet"])
model = dict(
    type="BEVFormer",
    img_backbone=dict(
        type="VoVNetFast", spec_name="V-99-eSE", norm_eval=True, frozen_stages=-1, input_ch=3,
        out_features=("stage3", "stage4", "stage5"), with_cp=True,
    ),
    img_neck=dict(type="FPN", in_channels=IN_CHANNELS, out_channels=256, start_level=0, num_outs=4),
)
"""


@pytest.fixture(scope="module")
def net():
    return straight_line.build(NAME)


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "config.py").write_text(text)
        return tmp_path / "config.py"

    return write


def small(**around):
    """A config with a small backbone, and what is told of it."""
    backbone = around.pop("backbone", {})
    model = dict(img_backbone=dict(type="VoVNetFast", spec_name=NAME, **backbone))
    return f"model = {model!r}\n" + "".join(f"{k} = {v!r}\n" for k, v in around.items())


def wrong(findings):
    return [f for f in findings if f.wrong]


def test_the_channels_of_a_resnets_neck(write):
    """BEVFormer-small with its backbone replaced, and nothing else."""
    (found,) = wrong(config.examine(write(BEVFORMER.replace("IN_CHANNELS", "[512, 1024, 2048]"))))
    assert found.name == "model.img_neck"
    assert "in_channels=[512, 1024, 2048] are those of another backbone" in found.value
    assert "write in_channels=[512, 768, 1024]" in found.value
    path = write(BEVFORMER.replace("IN_CHANNELS", "[512, 768, 1024]"))
    backbone, neck = config.examine(path)
    assert "V-99-eSE: stage3, stage4, stage5 of strides 8, 16, 32" in backbone.value
    assert not backbone.wrong
    assert not neck.wrong


@pytest.mark.parametrize(
    ("neck", "words"),
    [
        ("dict(type='DilatedEncoder', in_channels=2048)", "write in_channels=512"),
        ("dict(type='DilatedEncoder', in_channels=512)", None),
        ("[dict(type='FPN', in_channels=[256, 512]), dict(type='BFP', in_channels=8)]", "112, 256"),
        ("[dict(type='FPN', in_channels=[112, 256, 384, 512])]", None),
        ("dict(type='Identity')", None),
    ],
)
def test_other_necks(write, neck, words):
    text = f"model = dict(backbone=dict(type='VoVNetFast', spec_name='{NAME}'), neck={neck})"
    found = wrong(config.examine(write(text)))
    assert len(found) == (words is not None)
    assert words is None or words in found[0].value


def test_what_cannot_be_built(write):
    for text, words in (
        (small(backbone=dict(out_features=("res5",))), "res5"),
        (small().replace(NAME, "V-40-eSE"), "V-40-eSE"),
        (small(backbone=dict(depth=50, out_indices=(3,))), "takes no 'depth'"),
        (small(backbone=dict(depth=50, out_indices=(3,))), "gives [512] channels"),
    ):
        (found,) = config.examine(write(text))
        assert found.wrong
        assert words in found.value


def test_files_that_fill_it(net, tmp_path, write):
    state = {f"img_backbone.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": {**state, "head.weight": torch.zeros(2)}}, tmp_path / "whole.pth")
    found = config.examine(write(small(load_from=str(tmp_path / "whole.pth"))))
    assert not wrong(found)
    assert (
        f"{len(state)} tensors are the backbone's, which fill all of it, 1 others"
        in found[-1].value
    )
    checkpoints.write(net.state_dict(), tmp_path / "bare.pth")
    init = dict(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "bare.pth")))
    found = config.examine(write(small(backbone=init)))
    assert not wrong(found)
    assert f"fills all {len(state)} tensors" in found[-1].value


def test_files_that_do_not(net, tmp_path, write):
    bare, dd3d, other = (tmp_path / f"{name}.pth" for name in ("bare", "dd3d", "other"))
    checkpoints.write(net.state_dict(), bare)
    content = {f"backbone.bottom_up.{k}": v for k, v in net.state_dict().items()}
    torch.save({"model": content, "iteration": 1}, dd3d)
    checkpoints.write(straight_line.build("V-19-slim-eSE").state_dict(), other)
    cases = [
        (dict(load_from=str(bare)), f"of {NAME}, whose names begin with ''"),
        (dict(load_from=str(dd3d)), f"of {NAME}, whose names begin with 'backbone.bottom_up.'"),
        (dict(load_from=str(tmp_path / "none.pth")), "no checkpoint at"),
        (dict(backbone=dict(pretrained=str(other))), "It fits V-19-slim-eSE"),
        (dict(backbone=dict(pretrained=str(tmp_path / "none.pth"))), "no checkpoint at"),
    ]
    for options, words in cases:
        (found,) = wrong(config.examine(write(small(**options))))
        assert words in found.value
    # With weights of its own the backbone keeps those, which is said.
    options = dict(backbone=dict(pretrained=str(bare)), load_from=str(dd3d))
    found = config.examine(write(small(**options)))
    assert not wrong(found)
    assert "It keeps the weights that it has" in found[-1].value


def test_a_backbone_in_eight_bits(write, tmp_path):
    """Its neck, and whether the detector's checkpoint is of the backbone that was quantised."""
    cases.quantized().save(tmp_path / "int8.safetensors")
    torch.manual_seed(1)
    other = straight_line.randomise(VoVNet(TINY["detectron2"]))
    for model, file in ((cases.model(), "same.pth"), (other, "other.pth")):
        state = {f"backbone.{k}": v for k, v in model.state_dict().items()}
        torch.save(state, tmp_path / file)
    backbone = dict(
        type="VoVNetFastQuantized", quantized=str(tmp_path / "int8.safetensors"),
        init_cfg=dict(type="Pretrained", checkpoint="not looked at"),
    )  # fmt: skip
    for channels, load_from, words in (
        ([16, 24, 32, 40], "same.pth", None),
        ([16, 24, 32, 40], "other.pth", "point elsewhere"),
        ([256, 512, 1024, 2048], "same.pth", r"write in_channels=[16, 24, 32, 40]"),
    ):
        model = dict(backbone=backbone, neck=dict(type="FPN", in_channels=channels))
        text = f"model = {model!r}\nload_from = {str(tmp_path / load_from)!r}\n"
        found = config.examine(write(text))
        assert [words in f.value for f in wrong(found)] == ([] if words is None else [True])
        assert "tiny-detectron2" in found[0].value
    assert any("the one that was quantised" in f.value for f in found)
    backbone["quantized"] = str(tmp_path / "none.safetensors")
    (found,) = config.examine(write(f"model = dict(backbone={backbone!r})"))
    assert found.wrong
    assert "no quantised network at" in found.value


def test_the_command(write, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = BEVFORMER.replace("IN_CHANNELS", "[512, 1024, 2048]").replace("V-99-eSE", NAME)
    path = write(text)
    words = ["doctor", "--no-self-test", "--config", str(path)]
    assert cli.main(words) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "This does not go together: model.img_neck: in_channels=[512, 1024, 2048]" in said
    assert cli.main([*words, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["model.img_neck"].startswith("in_channels=[512, 1024, 2048]")
    assert len(found["problems"]) == 1


def test_what_is_no_config(tmp_path, write, capsys):
    assert cli.main(["doctor", "--config", str(tmp_path / "none.py")]) == 1
    assert "no config at" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no dict of type VoVNetFast"):
        config.examine(write("model = dict(backbone=dict(type='ResNet'))"))
    with pytest.raises(ValueError, match="cannot read the config"):
        config.examine(write("model = dict("))
