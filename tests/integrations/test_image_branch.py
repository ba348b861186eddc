"""PETR, StreamPETR, DETR3D and BEVFormer with ``VoVNetFast``, built and trained by their mmdet3d.

Runs beside mmdet3d 1.1 and newer, mmdet3d 1.0 on mmcv 1.x, or mmdet 3.x alone.
"""

import copy
import pickle

import pytest
import torch

pytest.importorskip("mmcv", exc_type=Exception)
pytest.importorskip("mmdet", exc_type=Exception)
pytest.importorskip("tests.integrations.image_branch", exc_type=Exception)

from tests import straight_line
from tests.integrations.image_branch import MODELS, OLD, WHICH, Config, scope, train
from vovnet_fast.checkpoints import CheckpointError
from vovnet_fast.compat import zip
from vovnet_fast.mmdet import VoVNetFast
from vovnet_fast.tools import cli, config

NAME = "V-19-slim-dw-eSE"
CHANNELS = {"stage2": 112, "stage3": 256, "stage4": 384, "stage5": 512}

# The image branches as they were published, with the names of their repositories and files.
FPN = dict(
    type="FPN", out_channels=256, start_level=0, add_extra_convs="on_output", num_outs=4,
    relu_before_extra_convs=True,
)  # fmt: skip
RESNET = dict(
    type="ResNet", depth=101, num_stages=4, frozen_stages=1, norm_eval=True, style="caffe",
    norm_cfg=dict(type="BN2d", requires_grad=False), stage_with_dcn=(False, False, True, True),
    dcn=dict(type="DCNv2", deform_groups=1, fallback_on_stride=False),
)  # fmt: skip
# megvii-research/PETR, projects/configs/petr/petr_vovnet_gridmask_p4_800x320.py; the same in
# exiawsh/StreamPETR, projects/configs/StreamPETR/stream_petr_vov_flash_800_bs2_seq_24e.py, and in
# open-mmlab/mmdetection3d, projects/PETR/configs/petr_vovnet_gridmask_p4_800x320.py.
PETR = dict(
    type="Petr3D",
    use_grid_mask=True,
    img_backbone=dict(
        type="VoVNetCP", spec_name="V-99-eSE", norm_eval=True, frozen_stages=-1, input_ch=3,
        out_features=("stage4", "stage5"),
    ),
    img_neck=dict(type="CPFPN", in_channels=[768, 1024], out_channels=256, num_outs=2),
)  # fmt: skip
# exiawsh/StreamPETR, projects/configs/RepDETR3D/repdetr3d_vov.py.
REPDETR3D = dict(
    PETR,
    img_backbone=dict(PETR["img_backbone"], out_features=("stage2", "stage3", "stage4", "stage5")),
    img_neck=dict(FPN, in_channels=[256, 512, 768, 1024], start_level=1),
)
# megvii-research/PETR, projects/configs/detr3d/detr3d_vovnet_gridmask.py, which gives a file of
# DD3D, ckpts/dd3d_det_final.pth, as load_from.
DETR3D = dict(
    type="Detr3D",
    use_grid_mask=True,
    img_backbone=dict(
        type="VoVNet", spec_name="V-99-eSE", norm_eval=True, frozen_stages=1, input_ch=3,
        out_features=["stage2", "stage3", "stage4", "stage5"],
    ),
    img_neck=dict(FPN, in_channels=[256, 512, 768, 1024]),
)  # fmt: skip
# fundamentalvision/BEVFormer, projects/configs/bevformer/bevformer_base.py and bevformer_small.py.
BEVFORMER_BASE = dict(
    type="BEVFormer",
    use_grid_mask=True,
    img_backbone=dict(RESNET, out_indices=(1, 2, 3)),
    img_neck=dict(FPN, in_channels=[512, 1024, 2048]),
)
BEVFORMER_SMALL = dict(
    BEVFORMER_BASE,
    img_backbone=dict(RESNET, out_indices=(3,), with_cp=True),
    img_neck=dict(FPN, in_channels=[2048], num_outs=1),
)


def swapped(published, **options):
    """The backbone is of another type; a ResNet's own arguments go, its general ones stay."""
    changed = copy.deepcopy(published)
    backbone = changed["img_backbone"]
    if backbone["type"] == "ResNet":
        for key in ("depth", "num_stages", "style", "dcn", "stage_with_dcn"):
            del backbone[key]
        backbone["spec_name"] = "V-99-eSE"
        levels = [list(CHANNELS)[i] for i in backbone["out_indices"]]
        wide = dict(zip(CHANNELS, (256, 512, 768, 1024), strict=True))
        changed["img_neck"]["in_channels"] = [wide[level] for level in levels]
    backbone["type"] = "VoVNetFast"
    backbone.update(options)
    return changed


def small(model):
    """The same with a backbone that tests have time for."""
    changed = copy.deepcopy(model)
    backbone = changed["img_backbone"]
    levels = backbone.get("out_features") or [list(CHANNELS)[i] for i in backbone["out_indices"]]
    backbone["spec_name"] = NAME
    changed["img_neck"].update(in_channels=[CHANNELS[name] for name in levels], out_channels=16)
    return changed


ALL = dict(map_location="cpu", weights_only=False)  # A trainer's own file, of this test.


def build(model):
    torch.manual_seed(3)
    model = copy.deepcopy(model)
    if not OLD and model["img_neck"]["type"] == "FPN":
        model["img_neck"]["type"] = "mmdet.FPN"  # As configs for mmdet3d 1.1 and newer write it.
    return MODELS.build(model)


@pytest.fixture(autouse=True)
def _scope():
    with scope():
        yield


@pytest.fixture(scope="module")
def net():
    return straight_line.build(NAME)


def same(module, net):
    state = net.state_dict()
    return all(
        torch.equal(v, state[k]) for k, v in module.state_dict().items() if "num_batches" not in k
    )


def features(detector):
    detector.eval()
    images = torch.randn(1, 6, 3, 64, 96, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return detector.extract_feat(images)


# --- Found, built and run -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["VoVNetFast", "mmdet.VoVNetFast"])
def test_found_from_mmdet3ds_scope(tmp_path, kind):
    model = small(swapped(PETR, type=kind))
    (tmp_path / "config.py").write_text(
        "default_scope = 'mmdet3d'\n"
        "custom_imports = dict(imports=['vovnet_fast.mmdet'], allow_failed_imports=False)\n"
        f"model = {model!r}\n"
    )
    read = Config.fromfile(str(tmp_path / "config.py"))
    assert type(MODELS.build(read.model).img_backbone) is VoVNetFast, WHICH


@pytest.mark.parametrize(
    ("published", "strides"),
    [
        (PETR, (16, 32)),
        (REPDETR3D, (8, 16, 32, 64)),
        (DETR3D, (4, 8, 16, 32)),
        (BEVFORMER_BASE, (8, 16, 32, 64)),
        (BEVFORMER_SMALL, (32,)),
    ],
)
def test_published_dictionaries_build_with_another_type(published, strides):
    """V-99 on six cameras of 640x1600, as shapes alone."""
    with torch.device("meta"):
        detector = build(swapped(published)).eval()
        found = detector.extract_feat(torch.zeros(1, 6, 3, 640, 1600))
    assert type(detector.img_backbone) is VoVNetFast
    assert detector.img_backbone.frozen_stages == published["img_backbone"]["frozen_stages"]
    assert [tuple(f.shape) for f in found] == [(6, 256, 640 // s, 1600 // s) for s in strides]


@pytest.mark.parametrize("published", [BEVFORMER_BASE, BEVFORMER_SMALL])
def test_bevformer_trains_with_it(tmp_path, published):
    detector = build(small(swapped(published, norm_cfg=None)))
    before = copy.deepcopy(detector.state_dict())
    train(detector, tmp_path / "run", 1)
    after = detector.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert all(value.isfinite().all() for value in after.values())
    convs = [key for key in after if key.startswith("img_backbone") and key.endswith("conv.weight")]
    frozen = ("img_backbone.stem.", "img_backbone.stage2.")
    assert {key for key in convs if not key.startswith(frozen)} <= changed
    assert not any(key.startswith(frozen) for key in changed)


# --- A training that VoVNetCP began ---------------------------------------------------------------


# Theirs freezes stages in train() alone, when mmengine's optimiser, which skips what is frozen, is
# there already: it has groups of parameters that ours has not, and weights alone can go on.
@pytest.mark.parametrize("published", [PETR, DETR3D] if OLD else [PETR])
def test_a_training_of_theirs_goes_on(tmp_path, published):
    theirs = build(small(published))
    train(theirs, tmp_path / "begun", 1)
    file = tmp_path / "begun" / "epoch_1.pth"
    keys = torch.load(file, **ALL)["state_dict"]
    assert "img_backbone.stage5.OSA5_1.ese.fc.bias" in keys

    loaded = build(small(swapped(published)))
    # Momentum is kept by the number of a parameter: the order must be the same.
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert set(loaded.state_dict()) == set(theirs.state_dict())
    loaded.load_state_dict(keys)
    for a, b in zip(features(loaded), features(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))

    again = build(small(published))
    train(again, tmp_path / "theirs", 2, resume=file)
    for with_cp in (False, True):
        ours = build(small(swapped(published, with_cp=with_cp)))
        train(ours, tmp_path / f"ours{with_cp}", 2, resume=file)
        moved = 0
        for (name, a), b in zip(ours.named_parameters(), again.parameters(), strict=True):
            step = float((b - keys[name]).detach().abs().max())
            moved += step > 0
            # AdamW's first steps are of one size, whatever the gradient, and small ones may turn.
            assert float((a - b).detach().abs().mean()) <= 0.05 * step, name
        assert moved > 50


def test_weights_of_theirs_go_on_with_frozen_stages(tmp_path):
    train(build(small(DETR3D)), tmp_path / "begun", 1)
    file = tmp_path / "begun" / "epoch_1.pth"
    state = torch.load(file, **ALL)["state_dict"]
    ours = build(small(swapped(DETR3D)))
    train(ours, tmp_path / "ours", 1, load_from=file)
    after = ours.state_dict()
    frozen = [k for k in after if k.startswith(("img_backbone.stem.", "img_backbone.stage2."))]
    assert len(frozen) > 20
    assert all(torch.equal(after[key], state[key]) for key in frozen)
    key = "img_backbone.stage5.OSA5_1.concat.OSA5_1_concat/conv.weight"
    assert 0 < float((after[key] - state[key]).abs().max()) < 1e-3


# --- What people reported -------------------------------------------------------------------------


@pytest.fixture
def dd3d(net, tmp_path):
    """Of DD3D: under backbone.bottom_up., in "model", with parts of a neck and a head."""
    state = {f"backbone.bottom_up.{k}": v for k, v in net.state_dict().items()}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    state["backbone.fpn_lateral5.weight"] = torch.zeros(256, 512, 1, 1)
    torch.save({"model": state, "iteration": 9, "optimizer": {}}, tmp_path / "dd3d.pth")
    return tmp_path / "dd3d.pth"


@pytest.fixture
def bare(net, tmp_path):
    """A backbone and nothing else."""
    torch.save({"state_dict": net.state_dict()}, tmp_path / "bare.pth")
    return tmp_path / "bare.pth"


@pytest.fixture
def arrays(net, tmp_path):
    """Of detectron2: a pickle of NumPy arrays."""
    content = {
        "model": {f"backbone.bottom_up.{k}": v.numpy() for k, v in net.state_dict().items()},
        "__author__": "somebody", "matching_heuristics": True,
    }  # fmt: skip
    (tmp_path / "final.pkl").write_bytes(pickle.dumps(content))
    return tmp_path / "final.pkl"


FILES = pytest.mark.parametrize("file", ["dd3d", "bare", "arrays"])


@FILES
def test_an_init_cfg_fills_the_backbone_from_any_of_them(tmp_path, net, request, file):
    """``frozen_stages=4``: what training leaves is what the file has."""
    path = str(request.getfixturevalue(file))
    init_cfg = dict(type="Pretrained", checkpoint=path)
    detector = build(small(swapped(DETR3D, init_cfg=init_cfg, frozen_stages=4)))
    train(detector, tmp_path / "run", 1)
    assert same(detector.img_backbone, net)


@pytest.mark.parametrize("file", ["dd3d", "bare"])
def test_a_load_from_that_leaves_the_backbone_is_an_error_with_a_remedy(
    tmp_path, net, request, capsys, file
):
    """mmcv 1.x and mmengine say so in a log at most, and mAP is 0."""
    path = request.getfixturevalue(file)
    model = small(swapped(DETR3D, frozen_stages=4))
    with pytest.raises(CheckpointError) as caught:
        train(build(model), tmp_path / "run", 1, load_from=path)
    said = str(caught.value)
    assert "the checkpoint holds nothing for the backbone V-19-slim-dw-eSE: of its" in said
    assert "no key like 'img_backbone.stem.stem_1/conv.weight'" in said
    assert "vovnet-fast convert FILE OUT.pth --add-prefix img_backbone." in said

    out = tmp_path / "converted.pth"
    words = ["convert", str(path), str(out), "--spec", NAME, "--add-prefix", "img_backbone."]
    assert cli.main(words) == 0
    detector = build(model)
    train(detector, tmp_path / "again", 1, load_from=out)
    assert same(detector.img_backbone, net)


@pytest.mark.parametrize(
    ("published", "channels"), [(BEVFORMER_BASE, "[512, 768, 1024]"), (BEVFORMER_SMALL, "[1024]")]
)
def test_a_resnets_own_arguments_are_told(published, channels):
    """Nothing is changed but the type."""
    backbone = dict(published["img_backbone"], type="VoVNetFast", spec_name="V-99-eSE")
    with pytest.raises(TypeError) as caught:
        build(dict(published, img_backbone=backbone))
    said = str(caught.value)
    assert "takes no 'depth', 'num_stages', 'style', 'stage_with_dcn', 'dcn'" in said
    assert f"V-99-eSE gives {channels} channels: write these as the neck's in_channels" in said
    with pytest.raises(TypeError, match=r"takes no 'frozen_stage': a slip of the pen, or"):
        build(small(swapped(PETR, frozen_stage=1)))


def test_a_resnets_channels_are_told(tmp_path):
    """BEVFormer-small with a V-99, and its neck as it was."""
    model = swapped(BEVFORMER_SMALL)
    right = copy.deepcopy(model["img_neck"]["in_channels"])
    model["img_neck"]["in_channels"] = BEVFORMER_SMALL["img_neck"]["in_channels"]
    path = tmp_path / "config.py"
    path.write_text(f"model = {model!r}\n")
    (told,) = [found for found in config.examine(path) if found.wrong]
    assert told.name == "model.img_neck"
    assert "in_channels=[2048] are those of another backbone" in told.value
    assert f"write in_channels={right}" in told.value
    assert right == [1024]
