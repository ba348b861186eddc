import copy
import pickle

import pytest
import torch
from torch import nn

import vovnet_fast
from tests import straight_line
from tests.tiny import TINY
from vovnet_fast import VoVNet, specs
from vovnet_fast.compat import zip
from vovnet_fast.network.norms import FrozenBatchNorm2d

# Measured on the original code.
PARAMETERS = {
    "V-19-slim-dw-eSE": (1_384_752, 154),
    "V-19-dw-eSE": (5_518_080, 160),
    "V-19-slim-eSE": (2_653_136, 122),
    "V-19-eSE": (10_180_416, 122),
    "V-39-eSE": (25_184_128, 246),
    "V-57-eSE": (41_454_912, 360),
    "V-99-eSE": (69_523_520, 626),
}


@pytest.mark.parametrize("name", specs.names())
def test_equals_the_straight_line_network(name):
    """Same weights, same features: fp64, a batch, odd sizes, random statistics."""
    net = straight_line.build(name).double()
    with torch.device("meta"):  # Random weights of its own take nearly as long as the rest.
        model = VoVNet(name).double().eval()
    vovnet_fast.checkpoints.load(model.to_empty(device="cpu"), net.state_dict())
    x = torch.randn(2, 3, 33, 43, dtype=torch.float64)
    with torch.no_grad():
        for ours, theirs in zip(model(x), net(x), strict=True):
            assert theirs.std() > 0
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max())


@pytest.mark.parametrize("name", ["V-19-slim-dw-eSE", "ese_vovnet19b_slim", "vovnet-19-slim-dw1"])
def test_gradients_equal_the_straight_line_network(name):
    """Training-mode batch norm and every parameter's gradient, in fp64."""
    net = straight_line.build(name).double().train()
    model = VoVNet(name, norm_eval=False).double().train()
    vovnet_fast.checkpoints.load(model, net.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for network in (model, net):
        sum((f * f).mean() for f in network(x)).backward()
    spec = model.spec
    to = "native" if spec.dialect == "detectron2" else spec.dialect
    grads = vovnet_fast.checkpoints.convert(
        {k: p.grad for k, p in model.named_parameters()} | dict(model.named_buffers()), name, to
    )
    theirs = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
    assert theirs
    for key, grad in theirs.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-5, atol=1e-7 * grad.abs().max())
    for key, value in net.named_buffers():
        if key in grads:
            torch.testing.assert_close(grads[key], value)


@pytest.mark.parametrize("name", PARAMETERS)
def test_size_and_shapes(name):
    model = VoVNet(name).eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name][0]
    assert len(model.state_dict()) == PARAMETERS[name][1]
    with torch.no_grad():
        features = VoVNet(name, out_features=["stem", "stage2", "stage3", "stage4", "stage5"])(
            torch.randn(1, 3, 97, 131)
        )
    sizes = [tuple(f.shape[-2:]) for f in features]
    assert sizes == [(25, 33), (25, 33), (12, 16), (6, 8), (3, 4)]
    assert [f.shape[1] for f in features[1:]] == list(model.feature_channels)


def test_native_keys_are_detectron2s():
    for name, (net_class, numbers) in straight_line.BUILDERS.items():
        if name in straight_line.DETECTRON2:
            with torch.device("meta"):
                theirs, ours = net_class(*numbers).state_dict(), VoVNet(name).state_dict()
            assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_out_features_and_strides():
    model = VoVNet(TINY["detectron2"], out_features=("stage5", "stem_2", "stage3")).eval()
    assert model.out_features == ("stem_2", "stage3", "stage5")
    assert model.feature_channels == (8, 24, 40)
    assert model.feature_strides == (2, 8, 32)
    x = torch.randn(1, 3, 64, 96)
    features = model(x)
    assert isinstance(features, tuple)
    for feature, c, s in zip(features, model.feature_channels, model.feature_strides, strict=True):
        assert feature.shape == (1, c, 64 // s, 96 // s)
    by_index = VoVNet(TINY["detectron2"], out_indices=(0, 3)).eval()
    assert by_index.out_features == ("stage2", "stage5")
    by_index.load_state_dict(model.state_dict())
    torch.testing.assert_close(by_index(x)[1], features[2])


def test_stages_behind_the_last_feature_are_not_run():
    model = VoVNet(TINY["detectron2"], out_features=("stage3",)).eval()
    ran = []
    for name in ("stage3", "stage4", "stage5"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: ran.append(name))
    model(torch.randn(1, 3, 8, 8))  # Too small for stage 5, and large enough for stage 3.
    assert ran == ["stage3"]


@pytest.mark.parametrize("frozen", range(-1, 5))
def test_frozen_stages(frozen):
    model = VoVNet(TINY["detectron2"], frozen_stages=frozen, norm_eval=False)
    names = ["stem", "stage2", "stage3", "stage4", "stage5"]
    for _ in range(2):
        model.train()
        for i, name in enumerate(names):
            part = getattr(model, name)
            assert all(p.requires_grad == (i > frozen) for p in part.parameters())
            assert all(m.training == (i > frozen) for m in part.modules())
    before = copy.deepcopy(model.state_dict())
    out = model(torch.randn(2, 3, 64, 64))
    if frozen < 4:
        sum(f.sum() for f in out).backward()
    for key, value in model.state_dict().items():
        if "running" in key:
            changed = not torch.equal(value, before[key])
            assert changed == (names.index(key.split(".")[0]) > frozen), key


def test_norm_eval():
    model = VoVNet(TINY["detectron2"], norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert model.training
    assert norms
    assert not any(m.training for m in norms)
    assert all(p.requires_grad for p in model.parameters())
    model = VoVNet(TINY["detectron2"], norm_eval=False).train()
    assert all(m.training for m in model.modules())
    model.eval()
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("norm_cfg", "kind", "trainable"),
    [
        (None, nn.BatchNorm2d, True),
        (dict(type="BN", requires_grad=False), nn.BatchNorm2d, False),
        (dict(type="BN", eps=1e-3, momentum=0.03), nn.BatchNorm2d, True),
        (dict(type="SyncBN", requires_grad=True), nn.SyncBatchNorm, True),
        (dict(type="FrozenBN"), FrozenBatchNorm2d, False),
        (dict(type="GN", num_groups=4), nn.GroupNorm, True),
    ],
)
def test_norm_cfg(norm_cfg, kind, trainable):
    model = VoVNet(TINY["depthwise"], norm_cfg=norm_cfg, norm_eval=False).train()
    norms = [m for n, m in model.named_modules() if n.endswith("norm")]
    assert len(norms) == 3 + 6 * 4 - sum(not b.reduction for b in TINY["depthwise"].blocks())
    assert {type(m) for m in norms} == {kind}
    affine = [p for n, p in model.named_parameters() if "norm." in n]
    assert all(p.requires_grad == trainable for p in affine)
    assert len(affine) == (0 if kind is FrozenBatchNorm2d else 2 * len(norms))
    if norm_cfg and "eps" in norm_cfg:
        assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.03)}
    out = model(torch.randn(2, 3, 64, 64))
    assert all(f.isfinite().all() for f in out)


def test_frozen_norm_equals_batch_norm_in_eval():
    plain = straight_line.randomise(VoVNet(TINY["detectron2"])).eval()
    frozen = VoVNet(TINY["detectron2"], norm_cfg=dict(type="FrozenBN")).train()
    frozen.load_state_dict(plain.state_dict())  # num_batches_tracked is dropped.
    x = torch.randn(2, 3, 40, 56)
    before = copy.deepcopy(frozen.state_dict())
    for a, b in zip(frozen(x), plain(x), strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())


def test_initialisation_follows_the_dialect():
    torch.manual_seed(0)
    for name, fan in (("V-19-eSE", 0), ("ese_vovnet19b_slim", 1), ("vovnet-19", 1)):
        model = VoVNet(name)
        conv = model.stage3._modules["OSA3_1"].layers[0]._modules["OSA3_1_0/conv"]
        fans = (conv.in_channels * 9, conv.out_channels * 9)
        assert conv.weight.std().item() == pytest.approx((2 / fans[fan]) ** 0.5, rel=0.02)
        bias = model.stage3._modules["OSA3_1"].ese.fc.bias
        assert (bias.abs().max() == 0) == (model.spec.dialect == "seed")


def test_other_input_channels_and_dtypes():
    model = VoVNet(TINY["timm"], input_ch=6).to(torch.bfloat16).eval()
    out = model(torch.randn(1, 6, 33, 47, dtype=torch.bfloat16))
    assert all(f.dtype == torch.bfloat16 for f in out)
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(1, 6, 33, 47))[0].isfinite().all()


@pytest.mark.parametrize("spec", TINY.values(), ids=list(TINY))
def test_layouts_views_and_empty_batches(spec):
    """Results do not depend on how the input lies in memory."""
    model = straight_line.randomise(VoVNet(spec)).double().eval()
    x = torch.randn(2, 3, 45, 58, dtype=torch.float64)
    expected = model(x)
    wide = torch.randn(2, 5, 50, 60, dtype=torch.float64)
    wide[:, 1:4, 2:47, 1:59] = x
    for same in (
        x.to(memory_format=torch.channels_last),
        wide[:, 1:4, 2:47, 1:59],
        x.flip(3).flip(3),
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        for a, b in zip(model(same), expected, strict=True):
            torch.testing.assert_close(a, b)
    one_by_one = zip(model(x[:1]), model(x[1:]), strict=True)
    for (a, b), whole in zip(one_by_one, expected, strict=True):
        torch.testing.assert_close(torch.cat([a, b]), whole)
    assert [f.shape[0] for f in model(x[:0])] == [0, 0, 0, 0]


def test_nan_and_inf_reach_the_output():
    model = VoVNet(TINY["detectron2"]).eval()
    x = torch.zeros(2, 3, 64, 64)
    x[1, 0, 5, 5] = float("nan")
    for feature in model(x):
        assert feature[0].isfinite().all()
        assert feature[1].isnan().any()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"3 dimensions: \[3, 64, 64\]"),
        ((1, 64, 64, 3), r"permute\(0, 3, 1, 2\)"),
        ((1, 4, 64, 64), "built for 3 input channels"),
        (
            (1, 3, 28, 64),
            "28x64 is too small: stage5 of tiny-detectron2 would have no pixel; pad",
        ),
        ((1, 3, 64, 1), "too small"),
    ],
)
def test_bad_images_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        VoVNet(TINY["detectron2"])(torch.zeros(shape))


def test_smallest_image():
    model = VoVNet(TINY["detectron2"]).eval()
    assert model(torch.zeros(1, 3, 29, 29))[-1].shape[-2:] == (1, 1)
    seed = VoVNet(TINY["seed"]).eval()
    assert seed(torch.zeros(1, 3, 1, 1))[-1].shape[-2:] == (1, 1)


def test_wrong_dtype_is_refused():
    with pytest.raises(TypeError, match=r"torch\.float64.*torch\.float32.*autocast"):
        VoVNet(TINY["detectron2"])(torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        VoVNet(TINY["detectron2"])(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(out_features=("stage1",)), "out_features must name.*stem_2, stem, stage2"),
        (dict(out_features=()), "one or more"),
        (dict(out_features=("stage2", "stage2")), "each once"),
        (dict(out_features="stage2"), r"write \('stage2',\)"),
        (dict(out_indices=(1, 2, 3, 4)), "timm counts"),
        (dict(out_indices=(0,), out_features=("stage2",)), "give one of the two"),
        (dict(frozen_stages=5), "frozen_stages must be -1"),
        (dict(input_ch=0), "input_ch"),
        (dict(norm_cfg=dict(type="LN")), "BN, BN2d, SyncBN, FrozenBN, GN, got 'LN'"),
        (
            dict(spec_name="V-19-slim-eSE", norm_cfg=dict(type="GN")),
            "num_groups=32 does not divide",
        ),
        (dict(spec_name="V-57-eSE", model_name="vovnet-39"), "different architectures"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VoVNet(**arguments)


def test_model_name():
    assert VoVNet(model_name="vovnet-19-slim-dw1").spec.dialect == "seed"
    assert VoVNet("vovnet-19-slim-dw1", model_name="vovnet-19-slim-dw1").spec.dialect == "seed"


def test_copies_and_pickles():
    model = straight_line.randomise(VoVNet(TINY["seed"], frozen_stages=1)).eval()
    x = torch.randn(1, 3, 40, 40)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x))
        assert other.train().stage2.training is False


def test_on_the_meta_device_there_is_nothing_to_initialise(monkeypatch):
    """torch's normal_ imports its compiler there, and takes milliseconds for each layer."""

    def draw(tensor, *args, **options):
        assert not tensor.is_meta
        return tensor

    monkeypatch.setattr("torch.nn.init.kaiming_normal_", draw)
    VoVNet(TINY["detectron2"])
    with torch.device("meta"):
        model = VoVNet(TINY["detectron2"])
    monkeypatch.undo()
    model.to_empty(device="cpu").reset_parameters()
    assert model.stem.get_parameter("stem_1/conv.weight").std() > 0
