"""The ONNX file of a network: which nodes it has, what onnxruntime makes of it, what is refused."""

import copy
import os
from dataclasses import replace

import pytest
import torch

from tests import straight_line
from tests.tiny import TINY
from vovnet_fast import BackendError, VoVNet, _optional, freeze, load_frozen, specs
from vovnet_fast.compat import zip
from vovnet_fast.deploy import export, onnx_check
from vovnet_fast.deploy.export import ExportError
from vovnet_fast.deploy.onnx_graph import Graph
from vovnet_fast.network.model import STAGE_NAMES

MISSING = [reason for p in ("onnx", "onnxruntime") if (reason := _optional.why_not(p)) is not None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"no export: {MISSING}")

FP32, FP16 = torch.float32, torch.float16
FREE = ("batch", "height", "width")
SIZE = (1, 64, 96)


def network(spec="detectron2", **options):
    torch.manual_seed(0)
    return straight_line.randomise(VoVNet(TINY.get(spec, spec), **options)).eval()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.onnx"


def session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def assert_same(path, model, size, tolerance, dtype=FP32):
    """What onnxruntime computes is what ``model`` does in fp32."""
    n, h, w = size
    image = torch.randn(n, model.input_ch, h, w).to(dtype)
    found = session(path).run(None, {"image": image.numpy()})
    for ours, theirs in zip(model(image.float()), found, strict=True):
        theirs = torch.from_numpy(theirs)
        assert (theirs.dtype, theirs.shape) == (dtype, ours.shape)
        assert (theirs.float() - ours).abs().max() <= tolerance * ours.abs().max()


# --------------------------------------------------------------------------------------
# The graph
# --------------------------------------------------------------------------------------


def expected_counts(spec, stages=4):
    """What the architecture says, up to the last of ``stages``."""
    blocks = [block for block in spec.blocks() if block.stage < 2 + stages]
    layers = sum(block.num_layers for block in blocks)
    others = len(blocks) + sum(block.reduction for block in blocks)  # 1x1 convolutions.
    gates = sum(block.ese for block in blocks)
    counts = {
        "Conv": 3 + layers + others + gates + (2 + layers if spec.depthwise else 0),
        "Relu": 3 + layers + others,
        "Concat": len(blocks),
        "GlobalAveragePool": gates,
        {"hard_sigmoid": "HardSigmoid", "sigmoid": "Sigmoid"}[spec.gate]: gates,
        "Mul": gates,
        "Add": sum(block.identity for block in blocks),
        "MaxPool": sum(spec.first_pooled_stage <= 2 + i for i in range(stages)),
    }
    return {kind: count for kind, count in counts.items() if count}


def graph_of(spec, out_features=STAGE_NAMES, dtype=FP32, io_dtype=FP32):
    """Of shapes alone: what nodes there are does not depend on values."""
    with torch.device("meta"), torch.no_grad():
        params = VoVNet(spec).eval().fold(FP32)
    return Graph(params, out_features, dtype, io_dtype)


def structure(spec):
    """What does not differ between architectures that differ in widths alone."""
    blocks = [(b.stage, b.num_layers, b.reduction, b.ese, b.identity) for b in spec.blocks()]
    return *blocks, spec.depthwise, spec.gate, spec.pool, spec.first_pooled_stage


STRUCTURES = {structure(spec): spec for spec in (*specs.SPECS.values(), *TINY.values())}


@pytest.mark.parametrize("spec", STRUCTURES.values(), ids=lambda spec: spec.name)
def test_a_node_for_each_thing_that_the_architecture_does_and_no_other(spec):
    graph = graph_of(spec)
    assert graph.counts() == expected_counts(spec)
    made = {"image", *graph.weights}
    for node in graph.nodes:  # In order, each value made once, each weight read once.
        assert set(node.inputs) <= made
        assert node.output not in made
        made.add(node.output)
    read = [name for node in graph.nodes for name in node.inputs]
    assert sorted(name for name in read if name in graph.weights) == sorted(graph.weights)
    assert {node.output for node in graph.nodes} - set(read) <= set(STAGE_NAMES)
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)


def test_counts_of_a_network_that_everybody_knows():
    """In figures, so that what counts above is counted once by hand: V-39 of CenterMask."""
    assert graph_of(specs.get("V-39-eSE")).counts() == {
        "Add": 2, "Concat": 6, "Conv": 45, "GlobalAveragePool": 6, "HardSigmoid": 6, "MaxPool": 3,
        "Mul": 6, "Relu": 39,
    }  # fmt: skip


@pytest.mark.parametrize("last", range(1, 5))
def test_stages_after_the_last_feature_are_left_out(last):
    spec = TINY["timm"]
    graph = graph_of(spec, (f"stage{last + 1}",))
    assert graph.counts() == expected_counts(spec, last)
    assert graph_of(spec, ("stem_2",)).counts() == {"Conv": 2, "Relu": 2}


def test_casts_are_at_the_ends_and_nowhere_else():
    graph = graph_of(TINY["seed"], ("stem", "stage3"), FP16, FP32)
    casts = [(node.inputs, node.output) for node in graph.nodes if node.kind == "Cast"]
    assert [output for _, output in casts] == ["image/inner", "stem", "stage3"]
    assert casts[0][0] == ("image",)
    inner = {name for node in graph.nodes if node.kind != "Cast" for name in node.inputs}
    assert not inner & {"image", "stem", "stage3"}
    plain = graph_of(TINY["seed"], ("stem", "stage3"), FP16, FP16).counts()
    assert graph.counts() == {**plain, "Cast": 3}


# --------------------------------------------------------------------------------------
# The file
# --------------------------------------------------------------------------------------


@needs_onnx
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_onnxruntime_gives_the_features(name, dtype, path):
    """Whatever the size: pools in ceil mode end beyond the edge of some of these maps."""
    model = network(name)
    export.onnx(model, path, SIZE, dynamic=FREE, dtype=dtype)
    for size in (SIZE, (2, 35, 61), (3, 29, 30), (1, 47, 33)):
        assert_same(path, model, size, 1e-5 if dtype == FP32 else 3e-3, dtype)


@needs_onnx
def test_what_the_file_says(path):
    import onnx

    from vovnet_fast import __version__

    model = network("timm", out_features=("stem_2", "stem", "stage3", "stage5"), input_ch=4)
    report = export.onnx(model, path, (2, 64, 99), dtype=FP16, io_dtype=FP32)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)

    def dims(value):
        kind = value.type.tensor_type
        assert kind.elem_type == onnx.TensorProto.FLOAT
        return value.name, [d.dim_value for d in kind.shape.dim]

    assert [dims(value) for value in proto.graph.input] == [("image", [2, 4, 64, 99])]
    features = zip(model.out_features, model(torch.randn(2, 4, 64, 99)), strict=True)
    assert [dims(value) for value in proto.graph.output] == [
        (name, list(feature.shape)) for name, feature in features
    ]
    assert {w.data_type for w in proto.graph.initializer} == {onnx.TensorProto.FLOAT16}
    assert (proto.producer_name, proto.producer_version) == ("vovnet_fast", __version__)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 17)]
    assert proto.ir_version == 8  # What TensorRT 8.6 and onnxruntime 1.14 read.
    assert {p.key: p.value for p in proto.metadata_props} == {"spec": model.spec.encode()}
    assert (report.nbytes, report.opset) == (path.stat().st_size, 17)
    assert [check.feature for check in report.checks] == list(model.out_features)
    assert {check.size for check in report.checks} == {(2, 64, 99)}
    assert report.largest < 65504
    assert_same(path, model, (2, 64, 99), 3e-3)


@needs_onnx
@pytest.mark.parametrize("free", [("batch",), ("height",), ("width", "batch"), FREE], ids=str)
def test_what_is_free_has_a_name(free, path):
    import onnx

    report = export.onnx(network(), path, (3, 64, 96), dynamic=free)
    proto = onnx.load(path)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    }
    n, h, w = ((axis if axis in free else None) for axis in FREE)
    assert shapes["image"] == [n or 3, 3, h or 64, w or 96]
    rows, columns = h and "stage4_height", w and "stage4_width"
    assert shapes["stage4"] == [n or 3, 32, rows or 4, columns or 6]
    sizes = {check.size for check in report.checks}
    odd, smallest = (1 if n else 3, 33 if h else 64, 49 if w else 96), (29 if h else 64)
    last = (odd[0], smallest, 29 if w else 96)
    assert sizes == {(3, 64, 96), odd, last if h or w else odd}


@needs_onnx
def test_the_same_network_gives_the_same_bytes(path):
    model = network("depthwise")
    export.onnx(model, path, SIZE)
    first = path.read_bytes()
    export.onnx(copy.deepcopy(model), path, SIZE, check=False)
    assert path.read_bytes() == first


@needs_onnx
@pytest.mark.parametrize("opset", [11, 13, 21])
def test_opsets(opset, path):
    model = network("depthwise")
    assert export.onnx(model, path, SIZE, opset=opset).opset == opset
    assert_same(path, model, SIZE, 1e-5)


@needs_onnx
def test_frozen_networks(path, tmp_path):
    """In any dtype, and out of a file: the weights that it has, in the dtype that is asked for."""
    model = network("seed")
    for own, tolerance in (
        (FP32, 1e-5),
        (torch.float64, 1e-5),
        (FP16, 3e-3),
        (torch.bfloat16, 3e-2),
    ):
        freeze(model, own).save(tmp_path / "network.safetensors")
        for frozen in (freeze(model, own), load_frozen(tmp_path / "network.safetensors")):
            export.onnx(frozen, path, SIZE)
            assert_same(path, model, SIZE, tolerance)


@needs_onnx
def test_the_model_is_left_as_it_is(path):
    model = network(norm_eval=False).train().to(torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = export.onnx(model, path, SIZE)
    assert model.training
    assert model.stem.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert max(check.relative for check in report.checks) < 1e-5


# --------------------------------------------------------------------------------------
# The check
# --------------------------------------------------------------------------------------


def last(proto, kind, kernel=None):
    """The last node of a kind, and its attributes by name."""
    for node in reversed(proto.graph.node):
        attributes = {each.name: each for each in node.attribute}
        if node.op_type == kind and (not kernel or kernel in attributes["kernel_shape"].ints):
            return node, attributes
    raise AssertionError(kind)


def other_slope(proto):
    last(proto, "HardSigmoid")[1]["alpha"].f = 0.2


def other_pool(proto):
    last(proto, "MaxPool")[1]["ceil_mode"].i = 0


def other_padding(proto):
    last(proto, "Conv", 3)[1]["pads"].ints[:] = [0, 0, 2, 2]


def without_identity(proto):
    node, _ = last(proto, "Add")
    node.input[1] = node.input[0]


def other_slots(proto):
    node, _ = last(proto, "Concat")
    node.input[1], node.input[2] = node.input[2], node.input[1]


def scaled_weight(proto):
    from onnx import numpy_helper

    weight = next(w for w in proto.graph.initializer if w.name == "stage5.OSA5_2.concat.weight")
    changed = numpy_helper.to_array(weight) * 1.1
    weight.CopyFrom(numpy_helper.from_array(changed.astype(numpy_helper.to_array(weight).dtype)))
    weight.name = "stage5.OSA5_2.concat.weight"


def renamed_output(proto):
    proto.graph.output[-1].name = proto.graph.node[-1].output[0] = "stage6"


WRONG = {
    "the slope of the gate": other_slope,
    "the mode of a pool": other_pool,
    "the padding of a convolution": other_padding,
    "an identity": without_identity,
    "the order of a concat": other_slots,
    "a weight": scaled_weight,
    "a name": renamed_output,
}


@needs_onnx
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_a_file_that_computes_something_else_is_not_left_behind(kind, dtype, path, monkeypatch):
    to_proto = export.to_proto

    def wrong(*args):
        proto = to_proto(*args)
        WRONG[kind](proto)
        return proto

    monkeypatch.setattr(export, "to_proto", wrong)
    path.write_text("old")
    with pytest.raises(ExportError, match=r"is not in onnxruntime|onnxruntime .*cannot"):
        export.onnx(network(), path, (1, 64, 64), dtype=dtype)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]


@needs_onnx
def test_errors_that_rounding_makes_are_not_the_file_s(path, monkeypatch):
    """A network may amplify any of them; without their like in PyTorch it would be refused."""
    model = network()
    monkeypatch.setattr(onnx_check, "ALLOWED", {FP32: 1e-12, FP16: 1e-12})
    report = export.onnx(model, path, SIZE)
    assert all(1e-12 < check.relative <= check.allowed < 1e-5 for check in report.checks)
    report = export.onnx(model, path, SIZE, dtype=FP16)
    assert all(1e-5 < check.relative <= check.allowed < 1e-2 for check in report.checks)
    monkeypatch.setattr(onnx_check, "OWN", 0.0)
    with pytest.raises(ExportError, match="expected at most 1e-12"):
        export.onnx(model, path, SIZE)


@needs_onnx
def test_what_leaves_fp16_is_found_though_onnxruntime_does_not_show_it(path):
    """It computes in fp32 from node to node: all is finite there, and Inf on a GPU."""
    model, image = network(), torch.randn(SIZE[0], 3, *SIZE[1:], dtype=FP16)
    with torch.no_grad():
        for name in ("stem_1", "stem_2"):
            norm = getattr(model.stem, f"{name}/norm")
            norm.weight.mul_(400)
            norm.bias.mul_(400)
        getattr(model.stem, "stem_3/norm").running_var.fill_(1e10)
    export.onnx(model, path, SIZE)
    export.onnx(model, path, SIZE, dtype=FP16, check=False)
    found = session(path).run(None, {"image": image.numpy()})
    assert all(torch.from_numpy(feature).isfinite().all() for feature in found)
    path.unlink()
    with pytest.raises(ExportError, match=r"is \d.* in fp32, and fp16 ends at 65504: export in to"):
        export.onnx(model, path, SIZE, dtype=FP16)
    with torch.no_grad():
        getattr(model.stem, "stem_1/norm").weight.mul_(1e6)
    with pytest.raises(ExportError, match=r"stem_1\.weight, with its .* beyond torch\.float16"):
        export.onnx(model, path, SIZE, dtype=FP16)
    assert not path.exists()


# --------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------

BAD = {
    "a module": (dict(model=torch.nn.ReLU()), TypeError, "takes a vovnet_fast.VoVNet or .*, got R"),
    "a size of two": (dict(size=(64, 64)), ValueError, "size must be N, H, W"),
    "a size of nothing": (dict(size=(1, 0, 64)), ValueError, "size must be N, H, W"),
    "half a pixel": (dict(size=(1, 64.5, 64)), ValueError, "size must be N, H, W"),
    "too small": (dict(size=(1, 64, 20)), ValueError, "an image of 64x20 is too small: stage5"),
    "an axis": (dict(dynamic=("depth",)), ValueError, "must be some of batch, height, width, got"),
    "a string": (dict(dynamic="batch"), ValueError, "must be some of batch, height, width, got"),
    "bf16": (dict(dtype=torch.bfloat16), TypeError, r"dtype must be torch\.float32 or torch\.flo"),
    "fp64 outside": (dict(io_dtype=torch.float64), TypeError, "io_dtype must be torch.float32"),
    "fp16 outside alone": (dict(io_dtype=FP16), ValueError, "io_dtype is torch.float16 and dtype"),
    "an old opset": (dict(opset=10), ValueError, "opset must be 11 to .*, got 10"),
    "an opset to come": (dict(opset=1000), ValueError, "opset must be 11 to .*, got 1000"),
    "no opset": (dict(opset="17"), ValueError, "opset must be 11 to .*, got '17'"),
}


@needs_onnx
@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments(kind, path):
    change, error, message = BAD[kind]
    arguments = dict(model=network(), path=path, size=SIZE)
    with pytest.raises(error, match=message):
        export.onnx(**{**arguments, **change})
    assert not path.exists()


@needs_onnx
def test_networks_that_cannot_be_exported(path, monkeypatch):
    with pytest.raises(BackendError, match=r"freeze: .*the fused path knows"):
        export.onnx(VoVNet(TINY["timm"], norm_cfg=dict(type="GN", num_groups=2)), path, SIZE)
    model = network()
    with torch.no_grad():
        model.stage4.OSA4_1.ese.fc.bias[3] = torch.nan
    with pytest.raises(ExportError, match=r"stage4\.OSA4_1\.ese\.fc\.bias holds NaN or Inf"):
        export.onnx(model, path, SIZE, check=False)
    frozen = freeze(network())
    frozen.weight_3 = frozen.weight_3[:1]
    with pytest.raises(ValueError, match="the buffer weight_3 must be"):
        export.onnx(frozen, path, SIZE)
    monkeypatch.setattr(export, "LARGEST", 1000)
    with pytest.raises(ExportError, match=r"take 0\.00 GiB in torch\.float16, and an ONNX file en"):
        export.onnx(network(), path, SIZE, dtype=FP16)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export.onnx(network(), path.parent / "no" / "network.onnx", SIZE)
    assert os.listdir(path.parent) == []


def test_more_than_2_gib_are_refused_before_they_are_written():
    graph = graph_of(replace(TINY["timm"], mid_channels=(8192,) * 4, out_channels=(8192,) * 4))
    assert graph.nbytes > export.LARGEST
    with pytest.raises(ExportError, match=r"GiB in torch.float32, and an ONNX file ends at 2 GiB"):
        export._require_weights(None, graph)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_package_that_is_missing_is_named_with_the_remedy(package, path, monkeypatch):
    there = _optional.why_not
    monkeypatch.setattr(
        _optional, "why_not", lambda name: "it is not here" if name == package else there(name)
    )
    if package == "onnxruntime" and there("onnx") is not None:
        pytest.skip("onnx is missing too")
    with pytest.raises(ExportError, match=f"an export to ONNX needs {package}: it is not here"):
        export.onnx(network(), path, SIZE)
    assert _optional._REMEDIES[package] == 'pip install "vovnet-fast[onnx]"'
    if package == "onnxruntime":  # Which only compares.
        assert export.onnx(network(), path, SIZE, check=False).checks == ()
