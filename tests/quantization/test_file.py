"""A quantised network that was written to a file and read again is the same network."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vovnet_fast
from tests.checkpoints.test_writing import largest_file
from tests.quantization import cases
from tests.tiny import TINY
from vovnet_fast import arithmetic, load_quantized
from vovnet_fast.network.filling import CheckpointError
from vovnet_fast.quantization import file as quantized_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.safetensors"


def rewrite(path, tensors=None, **fields):
    """The file with other tensors, or other fields of its header."""
    held = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[quantized_file.KIND.key])
    header.update(fields)
    for name in [name for name, value in header.items() if value is ...]:
        del header[name]
    held.update(tensors or {})
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(held, path, {quantized_file.KIND.key: json.dumps(header)})


def spec(**changes):
    return replace(TINY["detectron2"], **changes).encode()


def newer_spec():
    return json.dumps({**json.loads(spec()), "attention": True})


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", TINY)
def test_features_are_the_same_bit_for_bit(name, dtype, path):
    quantized, x = cases.quantized(name, dtype), cases.images(seed=3)
    quantized.save(path)
    loaded = load_quantized(path, spec=TINY[name])
    assert all(map(torch.equal, loaded(x), quantized(x)))
    assert loaded.state_dict().keys() == quantized.state_dict().keys()
    assert str(loaded.report()) == str(quantized.report())
    for attribute in (
        "spec", "out_features", "feature_channels", "feature_strides", "input_ch", "dtype",
        "levels", "wide_stem", "out_dtype", "memory_format",
    ):  # fmt: skip
        assert getattr(loaded, attribute) == getattr(quantized, attribute), attribute
    again = path.with_name("again.safetensors")
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_layers_are_described_as_they_were(path):
    for name in ("seed", "depthwise"):
        quantized = cases.quantized(name, "int8", stem="wide")
        quantized.save(path)
        found, wanted = load_quantized(path).network, quantized.network
        assert found.scales == wanted.scales
        assert found.sums == wanted.sums
        for key, layer in wanted.layers.items():
            other = found.layers[key]
            assert (layer.stride, layer.scale) == (other.stride, other.scale)
            assert torch.equal(layer.in_scales, other.in_scales)
            assert (layer.in_zeros is None) == (other.in_zeros is None)
        for key, gate in wanted.gates.items():
            assert (gate.mean_scale, gate.most) == found.gates[key][3:5]


def test_options_of_loading(path):
    cases.quantized().save(path)
    options = dict(memory_format=torch.contiguous_format, out_dtype=torch.float16)
    loaded = load_quantized(path, **options)
    assert all(y.dtype == torch.float16 and y.is_contiguous() for y in loaded(cases.images()))
    with pytest.raises(TypeError, match="load_quantized: out_dtype"):
        load_quantized(path, out_dtype=torch.int8)


def test_the_header_can_be_read_by_anybody(path):
    quantized = cases.quantized("seed", "int8", levels=255)
    quantized.save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["vovnet_fast.quantized"])
        assert file.get_tensor("weight_3").dtype == torch.int8
    assert header.pop("report")[0][:2] == ["image", "activation"]
    assert header == {
        "format": 1,
        "version": vovnet_fast.__version__,
        "arithmetic": arithmetic.VERSION,
        "spec": quantized.spec.encode(),
        "dialect": "seed",
        "dtype": "int8",
        "levels": 255,
        "wide_stem": quantized.wide_stem,
        "input_ch": 3,
        "out_features": ["stage2", "stage3", "stage4", "stage5"],
        "out_dtype": "float32",
        "memory_format": "channels_last",
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(format=2), "has format 2, where this one, .* knows 1"),
        (dict(arithmetic=99), "has arithmetic 99"),
        (dict(format="1"), "no number of a format"),
        (dict(levels=128), "no int8 of 128 levels"),
        (dict(dtype="int4"), "no int4"),
        (dict(dialect="timm"), "its dialect is timm"),
        (dict(spec="{}"), "its architecture is none"),
        (dict(out_features=["stage3", "stage2"]), "in this order"),
        (dict(out_dtype="int8"), "one of float"),
        (dict(input_ch=0), "0 channels"),
        (dict(input_ch=4), r"tensors that differ: weight_0"),
        (dict(spec=spec(layers_per_block=10**9)), r"there are \d+ tensors, .* more were expected"),
        (dict(spec=spec(blocks_per_stage=(1, 2, 1, 10**9))), "or such depth"),
        (dict(spec=newer_spec(), version="9.1"), r"written by vovnet_fast 9\.1 .*'attention'"),
        (dict(spec=newer_spec()), "its architecture is none"),
        (dict(wide_stem=7), "other fields"),
        (dict(report=[["image", "activation", 1, 2]]), "a row"),
        (dict(levels=...), "other fields"),
    ],
)
def test_headers_that_say_something_else(fields, words, path):
    cases.quantized("detectron2", "int8", stem="wide").save(path)
    rewrite(path, **fields)
    with pytest.raises(CheckpointError, match=words):
        load_quantized(path)


def test_the_file_of_another_network(path):
    cases.quantized().save(path)
    with pytest.raises(CheckpointError, match=r"holds tiny-detectron2 .* expected V-39-eSE"):
        load_quantized(path, spec="V-39-eSE")
    rewrite(path, spec=TINY["depthwise"].encode(), dialect=TINY["depthwise"].dialect)
    with pytest.raises(CheckpointError, match="does not hold tiny-depthwise"):
        load_quantized(path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight_3": None}, "1 tensors missing: weight_3"),
        ({"more": torch.ones(1)}, "1 tensors without a place: more"),
        ({"bias_0": torch.ones(8)}, r"bias_0 is \[8\] in torch.float32, expected"),
        ({"unit_0": torch.full((8,), float("nan"))}, "out of range: unit_0"),
        ({"multiplier_0": torch.zeros(8)}, "out of range: multiplier_0"),
        ({"weight_1": torch.full((8, 3, 3, 8), -128, dtype=torch.int8)}, "out of range: weight_1"),
    ],
)
def test_tensors_that_no_network_has(tensors, words, path):
    cases.quantized().save(path)
    rewrite(path, tensors)
    with pytest.raises(CheckpointError, match=words):
        load_quantized(path)


def test_other_files(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="no quantised network at"):
        load_quantized(path)
    with pytest.raises(CheckpointError, match="a folder, pipe or device"):
        load_quantized(tmp_path)
    vovnet_fast.freeze(cases.model()).save(path)
    with pytest.raises(CheckpointError, match=r"a frozen network, which vovnet_fast.load_frozen"):
        load_quantized(path)
    cases.quantized().save(path)
    with pytest.raises(CheckpointError, match="no frozen network"):
        vovnet_fast.load_frozen(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot read"):
        load_quantized(path)
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        cases.quantized().save(tmp_path / "network.pt")


def test_it_is_written_whole_or_not_at_all(path):
    cases.quantized().save(path)
    before = path.read_bytes()
    with largest_file(4096), pytest.raises(OSError, match="what was there is as it was"):
        cases.quantized("depthwise").save(path)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    broken = vovnet_fast.quantize(cases.model(), [cases.images()], report=False, **cases.QUICK)
    broken.unit_2[0] = float("inf")
    with pytest.raises(CheckpointError, match="out of range: unit_2"):
        broken.save(path)
    with pytest.raises(CheckpointError, match="meta device"):
        broken.to("meta").save(path)
    assert path.read_bytes() == before
