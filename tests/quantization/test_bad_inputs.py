"""What cannot be quantised is refused by name, with nothing half-made."""

import pytest
import torch

import vovnet_fast
from tests.quantization import cases
from vovnet_fast import VoVNet
from vovnet_fast.arithmetic import fp8
from vovnet_fast.backends import BackendError
from vovnet_fast.network.norms import FrozenBatchNorm2d
from vovnet_fast.quantization import building, fine_tuning


def with_value(x, value):
    x = x.clone()
    x[0, 0, 0, 0] = value
    return x


GOOD = cases.images()


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        ([], ValueError, "there are no images"),
        ([GOOD[:0]], ValueError, "there are no images"),
        (iter(()), ValueError, "there are no images"),
        (None, TypeError, "images must be an iterable .* got NoneType"),
        ([[1, 2]], TypeError, "batch 0 of the images must be a tensor"),
        ([(GOOD, 3)], TypeError, "got tuple: of a data loader's pairs take the images"),
        ([GOOD[0]], ValueError, r"must be \[N, 3, H, W\], got \[3, 40, 48\]"),
        ([GOOD, GOOD[:, :1]], ValueError, r"batch 1 of the images must be \[N, 3, H, W\]"),
        ([(GOOD * 50).to(torch.uint8)], TypeError, "normalised as in training, got torch.uint8"),
        ([with_value(GOOD, float("nan"))], ValueError, "batch 0 of the images holds NaN or Inf"),
        ([*[GOOD] * 5, with_value(GOOD, float("-inf"))], ValueError, "batch 5 .* NaN or Inf"),
        ([torch.zeros(2, 3, 40, 40)], ValueError, "all images are 0 throughout"),
        ([torch.full((1, 3, 40, 40), 2.5)] * 2, ValueError, "all images are 2.5 throughout"),
        (
            [torch.tensor([1.0, -2.0, 1.0])[:, None, None].expand(2, 3, 40, 40)],
            ValueError,
            "all images are 1, -2 throughout",
        ),
        ([GOOD[..., :4, :4]], ValueError, "too small"),
        ([GOOD * 5e37], ValueError, "holds NaN or Inf on these images in fp32"),
    ],
)
def test_images(images, error, words):
    for make in (vovnet_fast.quantize, fine_tuning):
        with pytest.raises(error, match=words):
            make(cases.model(), images)


def test_one_image_and_images_of_several_sizes_are_enough():
    quantized = vovnet_fast.quantize(cases.model(), GOOD[:1])
    assert quantized.report().least > 20
    sizes = (cases.images(1, height=h, width=50) for h in (48, 64, 40))
    assert vovnet_fast.quantize(cases.model(), sizes).report().least > 20


def test_images_of_other_dtypes():
    model, x = cases.model().half(), GOOD.half()
    found, wanted = (vovnet_fast.quantize(model, [y], report=False) for y in (x, x.double()))
    assert all(map(torch.equal, found(x), wanted(x)))


def test_activations_beyond_fp16_are_none_of_a_quantised_network():
    """Of a network in fp16 they would be: what is measured is measured in fp32."""
    model = cases.model().half()
    x = GOOD.half() * 3000
    with torch.no_grad():
        wanted = cases.model()(x.float())
    assert max(y.max() for y in wanted) > 2000
    quantized = vovnet_fast.quantize(model, [x])
    assert quantized.report().least > 10
    assert all(y.isfinite().all() for y in quantized(x))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(dtype="int4"), ValueError, "dtype must be one of int8, fp8, got 'int4'"),
        (dict(dtype=torch.int8), ValueError, "dtype must be one of int8, fp8"),
        (
            dict(calibrator="max"),
            ValueError,
            "calibrator must be one of auto, minmax, perc",
        ),
        (dict(levels=128), ValueError, "levels must be one of 127, 255, got 128"),
        (dict(levels=True), ValueError, "levels must be one of"),
        (dict(dtype="fp8", levels=127), ValueError, "levels are those of int8"),
        (dict(percentile=10), ValueError, "percentile must be above 50"),
        (dict(percentile=101), ValueError, "percentile must be above 50"),
        (dict(stem="fp32"), ValueError, "stem must be one of auto, int8, wide"),
    ],
)
def test_options(options, error, words):
    if options.get("dtype") == "fp8" and "fp8" not in cases.DTYPES:
        pytest.skip("this torch has no fp8")
    for make in (vovnet_fast.quantize, fine_tuning):
        with pytest.raises(error, match=words):
            make(cases.model(), [GOOD], **options)
    with pytest.raises(ValueError, match="memory_format must be"):
        vovnet_fast.quantize(cases.model(), [GOOD], memory_format=torch.preserve_format)


def test_networks():
    model = cases.model()
    with pytest.raises(ValueError, match=r"training mode.*call eval\(\) first"):
        vovnet_fast.quantize(cases.model().train(), [GOOD])
    for other in (vovnet_fast.freeze(model), cases.quantized()):
        with pytest.raises(TypeError, match=rf"a {type(other).__name__}.*it was made of"):
            vovnet_fast.quantize(other, [GOOD])
    with pytest.raises(TypeError, match=r"quantize takes a vovnet_fast.VoVNet, got Identity"):
        vovnet_fast.quantize(torch.nn.Identity(), [GOOD])
    group_norms = VoVNet(model.spec, norm_cfg=dict(type="GN", num_groups=8)).eval()
    with pytest.raises(BackendError, match=r"quantize: .*GroupNorm"):
        vovnet_fast.quantize(group_norms, [GOOD])
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(BackendError, match="quantize: the model has hooks"):
        vovnet_fast.quantize(model, [GOOD])


def test_weights_that_are_not_finite():
    model = cases.model()
    getattr(model.stage3.OSA3_1.concat, "OSA3_1_concat/norm").running_var[0] = float("nan")
    with pytest.raises(ValueError, match="weights of OSA3_1_concat hold NaN or Inf"):
        vovnet_fast.quantize(model, [GOOD])
    model = cases.model()
    model.stage2.OSA2_1.ese.fc.weight.data[0] = float("inf")
    with pytest.raises(ValueError, match="eSE weights of OSA2_1 hold NaN or Inf"):
        vovnet_fast.quantize(model, [GOOD])


def test_a_sum_with_no_room():
    weight, bias = torch.ones(1, 20_000), torch.zeros(1)
    with pytest.raises(ValueError, match=r"stem_1 sums 20000 products .* stem='int8'"):
        building._unit("stem_1", weight, bias, 1023, 2047, 2**24)
    assert building._unit("x", weight, bias, 127, 127, 2**31 - 1).isfinite().all()


def test_a_torch_without_e4m3(monkeypatch):
    monkeypatch.setattr(fp8, "ACTIVATION", None)
    with pytest.raises(RuntimeError, match=r"fp8 is not to be had: torch .* has no float8_e4m3fn"):
        vovnet_fast.quantize(cases.model(), [GOOD], "fp8")


def test_frozen_norms_are_folded_as_others():
    torch.manual_seed(0)
    model = VoVNet(cases.model().spec, norm_cfg=dict(type="FrozenBN")).eval()
    assert any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    assert vovnet_fast.quantize(model, [GOOD]).report().least > 15
