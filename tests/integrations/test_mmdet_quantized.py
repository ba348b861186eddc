"""A backbone in eight bits in a detector of mmdet."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("mmcv.ops", exc_type=Exception)
pytest.importorskip("mmdet.registry", exc_type=Exception)

from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.runner import load_checkpoint, save_checkpoint

import vovnet_fast.mmdet
from tests import straight_line
from tests.quantization import cases
from tests.tiny import TINY
from vovnet_fast import checkpoints, freeze, load_quantized, quantize
from vovnet_fast.compat import zip

register_all_modules()

FEATURES = ("stage3", "stage5")


def detector(**backbone):
    """Untrained; built anew each time."""
    torch.manual_seed(1)
    spec, indices = TINY["detectron2"], [1, 3]
    channels = [spec.out_channels[i] for i in indices]
    return MODELS.build(
        dict(
            type="RetinaNet",
            data_preprocessor=dict(
                type="DetDataPreprocessor", mean=[128] * 3, std=[60] * 3, pad_size_divisor=32
            ),
            backbone=ConfigDict(out_indices=indices, spec_name=spec, norm_eval=True, **backbone),
            neck=dict(type="FPN", in_channels=channels, out_channels=8, num_outs=3),
            bbox_head=dict(
                type="RetinaHead", num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1,
                anchor_generator=dict(
                    type="AnchorGenerator", ratios=[1.0], octave_base_scale=4, scales_per_octave=1,
                    strides=[8, 32, 64],
                ),
                bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
            ),
            test_cfg=ConfigDict(
                nms_pre=50, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=5
            ),
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A detector, its checkpoint, and its backbone in eight bits."""
    folder = tmp_path_factory.mktemp("detector")
    original = detector(type="VoVNetFast")
    straight_line.randomise(original.backbone)
    torch.save({"state_dict": original.state_dict()}, folder / "detector.pth")
    images = (torch.randint(0, 256, (4, 3, 96, 128)) - 128) / 60  # As demo_mm_inputs are.
    quantized = quantize(original.backbone, [images], report=False, **cases.QUICK)
    quantized.save(folder / "int8.safetensors")
    return original, folder / "detector.pth", folder / "int8.safetensors", quantized


def predict(detector):
    inputs = demo_mm_inputs(2, [[3, 96, 128]] * 2, num_classes=3)
    with torch.no_grad():
        data = detector.data_preprocessor(inputs, False)
        return [sample.pred_instances for sample in detector(**data, mode="predict")]


def same(found, expected):
    return all(
        torch.equal(ours.bboxes, theirs.bboxes) and torch.equal(ours.scores, theirs.scores)
        for ours, theirs in zip(found, expected, strict=True)
    )


def test_a_detector_predicts_with_it(made, capsys):
    """From a config and the detector's own checkpoint, with not a word of keys that do not fit."""
    original, checkpoint, file, quantized = made
    found = detector(type="VoVNetFastQuantized", quantized=str(file), init_cfg=dict(type="any"))
    assert not same(predict(found), predict(original))  # Another neck, another head.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(found, str(checkpoint), strict=True, map_location="cpu")
    assert "match" not in "".join(capsys.readouterr())
    swapped = copy.deepcopy(original)
    swapped.backbone = quantized
    assert same(predict(found), predict(swapped))
    for ours, theirs in zip(predict(found), predict(original), strict=True):
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=0.1, atol=0.05)
    assert found.backbone.out_features == FEATURES
    assert not found.backbone.training


def test_its_own_state_dict_is_loaded(made, tmp_path):
    original, _, file, _ = made
    first = detector(type="VoVNetFastQuantized", quantized=str(file))
    state = first.state_dict()
    assert "backbone.weight_0" in state
    second = copy.deepcopy(first)
    second.backbone.bias_3.add_(1)
    assert not torch.equal(second.backbone.bias_3, first.backbone.bias_3)
    save_checkpoint({"state_dict": state}, str(tmp_path / "own.pth"))
    load_checkpoint(second, str(tmp_path / "own.pth"), strict=True, map_location="cpu")
    assert torch.equal(second.backbone.bias_3, first.backbone.bias_3)
    heads = {k: v for k, v in original.state_dict().items() if not k.startswith("backbone.")}
    assert not second.load_state_dict(heads).missing_keys  # It has a file of its own.


def test_another_backbone_in_the_checkpoint_is_refused(made):
    original, _, file, _ = made
    found = detector(type="VoVNetFastQuantized", quantized=str(file))
    other = copy.deepcopy(original)
    with torch.no_grad():  # Turned by its norm it is the same.
        block = other.backbone.stage5.OSA5_2.concat
        getattr(block, "OSA5_2_concat/conv").weight.neg_()
    with pytest.raises(
        checkpoints.CheckpointError, match=r"OSA5_2_concat point elsewhere \(cosine"
    ):
        found.load_state_dict(other.state_dict())
    with torch.no_grad():
        getattr(block, "OSA5_2_concat/norm").weight.neg_()
    found.load_state_dict(other.state_dict())
    state = other.state_dict()
    for key, words in (("missing", "is not there"), ("shape", r"is \[7, 7\]")):
        name = "backbone.stage5.OSA5_2.concat.OSA5_2_concat/conv.weight"
        changed = {k: v for k, v in state.items() if k != name}
        if key == "shape":
            changed[name] = torch.zeros(7, 7)
        with pytest.raises(checkpoints.CheckpointError, match=f"another than the tiny.*{words}"):
            found.load_state_dict(changed)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", TINY)
def test_rounding_is_not_taken_for_other_weights(name, dtype, tmp_path):
    """Nor is equalisation; weights of the same distribution are."""
    model = cases.model(name)
    made = quantize(
        model, [cases.images(4)], dtype, equalize=True, report=False, stem="int8", **cases.QUICK
    )
    made.save(tmp_path / "a.safetensors")
    backbone = vovnet_fast.mmdet.VoVNetFastQuantized(tmp_path / "a.safetensors", init_cfg=None)
    backbone.require_same(model.state_dict(), "")
    torch.manual_seed(5)
    with pytest.raises(checkpoints.CheckpointError, match="point elsewhere"):
        backbone.require_same(
            straight_line.randomise(vovnet_fast.VoVNet(TINY[name])).state_dict(), ""
        )


def test_it_cannot_be_trained(made):
    original, _, file, _ = made
    found = detector(type="VoVNetFastQuantized", quantized=str(file))
    with pytest.raises(RuntimeError, match=r"cannot be trained: it has no gradients\. Train with"):
        found.train()
    found.eval()
    swapped = copy.deepcopy(original)
    swapped.backbone = load_quantized(file)
    swapped.train()  # The way that the message names.


BAD = {
    "no file": (dict(quantized="/none.safetensors"), FileNotFoundError, "no quantised network at"),
    "a frozen one": (dict(quantized="{frozen}"), checkpoints.CheckpointError, "holds a frozen"),
    "another spec": (dict(spec_name="V-39-eSE"), checkpoints.CheckpointError, "holds tiny"),
    "another model_name": (
        dict(spec_name=None, model_name="vovnet-39"), checkpoints.CheckpointError, "expected vov",
    ),
    "no spec": (dict(spec_name="V-38"), vovnet_fast.specs.UnknownSpecError, "V-38"),
    "other indices": (
        dict(out_indices=(0, 1, 2, 3)), ValueError, "features stage3, stage5, and stage2, s",
    ),
    "other features": (
        dict(out_indices=None, out_features=["stage4"]), ValueError, "again with --features stage4",
    ),
    "no features": (dict(out_indices=(7,)), ValueError, "out_indices counts the stages"),
    "channels": (dict(input_ch=4), ValueError, "for images of 3 channels, and input_ch=4"),
    "a slip": (dict(deph=50), TypeError, "VoVNetFastQuantized takes no 'deph'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments(made, tmp_path, kind):
    change, error, message = BAD[kind]
    freeze(made[0].backbone).save(tmp_path / "frozen.safetensors")
    options = dict(
        type="VoVNetFastQuantized", quantized=str(made[2]), out_indices=(1, 3),
        spec_name=TINY["detectron2"],
    )  # fmt: skip
    options.update(change)
    options["quantized"] = options["quantized"].format(frozen=tmp_path / "frozen.safetensors")
    with pytest.raises(error, match=message):
        MODELS.build(options)
