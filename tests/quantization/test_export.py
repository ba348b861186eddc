"""The ONNX file of a network in int8: its nodes, and that they compute the integers."""

import os
from dataclasses import replace

import pytest
import torch

import vovnet_fast
from tests.quantization import cases
from tests.quantization.cases import sqnr
from tests.tiny import TINY
from vovnet_fast import _optional
from vovnet_fast.compat import zip
from vovnet_fast.deploy.onnx_check import ExportError, session
from vovnet_fast.quantization import export, onnx_check
from vovnet_fast.quantization.onnx_graph import QdqGraph, quantized

MISSING = [reason for p in ("onnx", "onnxruntime") if (reason := _optional.why_not(p)) is not None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"no export: {MISSING}")

needs_fp8 = pytest.mark.skipif("fp8" not in cases.DTYPES, reason="this torch has no e4m3")

SIZE = (2, 64, 65)
FREE = ("batch", "height", "width")


def network(name="detectron2", levels=127, stem="int8", **options):
    return cases.quantized(name, "int8", levels=levels, stem=stem, **options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.onnx"


# --------------------------------------------------------------------------------------
# The graph
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["int8", "wide"])
@pytest.mark.parametrize("name", TINY)
def test_nodes_are_what_the_architecture_does_and_rounds(name, stem):
    spec, graph = TINY[name], QdqGraph(network(name, stem=stem).network)
    blocks = list(spec.blocks())
    layers = 3 + sum(block.num_layers + 1 + block.reduction for block in blocks)
    apart = 2 + sum(block.num_layers for block in blocks) if spec.depthwise else 0
    gates, identities = sum(b.ese for b in blocks), sum(b.identity for b in blocks)
    ends = sum(block.ese or block.identity for block in blocks)
    pools = sum(spec.first_pooled_stage <= stage for stage in (2, 3, 4, 5))
    slots = sum(1 + block.num_layers for block in blocks)
    counts = graph.counts()
    assert {kind: n for kind, n in counts.items() if "Linear" not in kind} == {
        kind: n
        for kind, n in {
            "Add": identities, "Concat": len(blocks), "Conv": layers + apart + gates,
            "GlobalAveragePool": gates, "MaxPool": pools, "Mul": gates, "Relu": layers + apart,
            {"hard_sigmoid": "HardSigmoid", "sigmoid": "Sigmoid"}[spec.gate]: gates,
        }.items()
        if n
    }  # fmt: skip
    # All that is made is rounded once, but the last feature; images are, but for a wide stem.
    made = layers + apart + ends + pools + len(blocks)
    assert counts["QuantizeLinear"] == made - 1 + (stem == "int8")
    weights = layers + apart - (stem == "wide")
    # Each is read once, slots by the concat too; but slots alone are read by nobody else.
    names = {node.name for node in graph.nodes if node.kind == "DequantizeLinear"}
    assert sum(each.endswith(".weight/dequantized") for each in names) == weights
    assert sum("/slot_" in each for each in names) == slots


@pytest.mark.parametrize("stem", ["int8", "wide"])
@pytest.mark.parametrize("levels", [127, 255])
def test_what_tensors_are_of(levels, stem):
    graph = QdqGraph(network("depthwise", levels=levels, stem=stem).network)
    made = {"image", *graph.weights}
    for node in graph.nodes:  # In order, and each value once.
        assert set(node.inputs) <= made
        assert node.output not in made
        made.add(node.output)
    read = {name for node in graph.nodes for name in node.inputs}
    assert set(graph.weights) <= read
    assert {node.output for node in graph.nodes} - read <= set(graph.out_features)
    byte = {127: torch.int8, 255: torch.uint8}[levels]
    for node in graph.nodes:
        if node.kind == "QuantizeLinear":
            zero = graph.weights[node.inputs[2]]
            assert (zero.dtype, zero.shape) == (byte, ())
            assert zero == (128 if node.inputs[0] == "image" and levels == 255 else 0)
        if node.kind == "Conv" and "depthwise" not in node.name and "ese" not in node.name:
            (weight,) = [n for n in graph.nodes if n.output == node.inputs[1]] or [None]
            assert (weight is None) == (stem == "wide" and node.name == "stem_1/conv")
    for name, tensor in graph.weights.items():
        if name.endswith(".weight.scale"):
            assert tensor.shape == graph.weights[name[: -len(".scale")]].shape[:1]


def test_counts_of_a_network_that_everybody_knows():
    """In figures: V-39 of CenterMask, which nobody has to calibrate for that."""
    spec = replace(
        TINY["detectron2"], name="thin-39", layers_per_block=5, blocks_per_stage=(1, 1, 2, 2)
    )
    model = vovnet_fast.VoVNet(spec).eval()
    made = vovnet_fast.quantize(
        model, [cases.images(2)], stem="int8", report=False, bias_correction=False, **cases.QUICK
    )
    assert QdqGraph(made.network).counts() == {
        "Add": 2, "Concat": 6, "Conv": 45, "DequantizeLinear": 123, "GlobalAveragePool": 6,
        "HardSigmoid": 6, "MaxPool": 3, "Mul": 6, "QuantizeLinear": 54, "Relu": 39,
    }  # fmt: skip


# --------------------------------------------------------------------------------------
# The file
# --------------------------------------------------------------------------------------


@needs_onnx
@pytest.mark.parametrize("levels", [127, 255])
@pytest.mark.parametrize("stem", ["int8", "wide"])
@pytest.mark.parametrize("name", TINY)
def test_onnxruntime_computes_the_integers(name, stem, levels, path):
    """On other images than those of the check, and of other sizes."""
    made = network(name, levels, stem)
    report = export.onnx(made, path, SIZE, dynamic=FREE)
    assert report.steps <= (1 if stem == "int8" else 2)
    for n, h, w in ((1, 40, 48), (2, 61, 35)):
        x = cases.images(n, height=h, width=w, seed=11)
        found = session(str(path), optimised=False).run(None, {"image": x.numpy()})
        with torch.no_grad():
            exact, wanted = cases.model(name)(x), made(x)
        for ours, theirs, fp32 in zip(wanted, map(torch.from_numpy, found), exact, strict=True):
            assert (theirs.dtype, theirs.shape) == (torch.float32, ours.shape)
            # Images that are not rounded are as another rounding of everything.
            assert sqnr(theirs, ours) > (38 if stem == "int8" else 20)
            assert sqnr(theirs, fp32) > sqnr(ours, fp32) - 3


@needs_onnx
@needs_fp8
@pytest.mark.parametrize("stem", ["int8", "wide"])
@pytest.mark.parametrize("name", TINY)
def test_onnxruntime_computes_fp8(name, stem, path):
    """By fp32 convolutions of what is rounded to e4m3."""
    import onnx

    made = cases.quantized(name, "fp8", stem=stem)
    report = export.onnx(made, path, SIZE, dynamic=FREE)
    assert (report.opset, report.steps <= 1) == (19, True)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    kinds = {each.name: each.data_type for each in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert kinds[node.input[2]] == onnx.TensorProto.FLOAT8E4M3FN
    weights = {n: k for n, k in kinds.items() if n.endswith(".weight") and "_ese" not in n}
    assert {n for n, k in weights.items() if k != onnx.TensorProto.FLOAT8E4M3FN} == (
        {"stem_1.weight"} if stem == "wide" else set()
    )
    x = cases.images(2, height=61, width=35, seed=11)
    found = session(str(path), optimised=False).run(None, {"image": x.numpy()})
    with torch.no_grad():
        exact, wanted = cases.model(name)(x), made(x)
    for ours, theirs, fp32 in zip(wanted, map(torch.from_numpy, found), exact, strict=True):
        assert sqnr(theirs, ours) > 25
        assert sqnr(theirs, fp32) > sqnr(ours, fp32) - 1


@needs_onnx
def test_the_bytes_between_the_layers_are_the_same(path):
    made = network("detectron2")
    export.onnx(made, path, SIZE, check=False)
    comparison = onnx_check.Comparison(
        made, QdqGraph(made.network), str(path), 17, lambda text: None
    )
    steps = comparison.layer_by_layer()
    names = made.architecture.names()
    last = names.features["stage5"]
    assert set(steps) == {*names.activations(), *made.out_features} - {last}
    exact = [name for name in names.layers if steps[name] == 0]
    assert len(exact) >= len(names.layers) - 2  # But for ties.


@needs_onnx
def test_what_the_file_says(path):
    import onnx

    made = network("timm", levels=255)
    report = export.onnx(made, path, (2, 64, 99))
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    image = proto.graph.input[0]
    assert (image.name, [d.dim_value for d in image.type.tensor_type.shape.dim]) == (
        "image", [2, 3, 64, 99],
    )  # fmt: skip
    assert [value.name for value in proto.graph.output] == list(made.out_features)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 17)]
    assert (report.nbytes, report.nodes["Concat"]) == (path.stat().st_size, 6)
    assert [check.feature for check in report.checks] == list(made.out_features)
    first = path.read_bytes()
    export.onnx(made, path, (2, 64, 99), check=False)
    assert path.read_bytes() == first
    assert path.stat().st_size < 2.2 * sum(
        layer.weight.numel() for layer in made.network.layers.values()
    ) + 150_000  # fmt: skip


@needs_onnx
@pytest.mark.parametrize("out_features", [("stem_2",), ("stem", "stage3")])
def test_any_features(out_features, path):
    model = cases.model("seed", out_features=out_features)
    made = vovnet_fast.quantize(model, [cases.images(6)], stem="int8", report=False, **cases.QUICK)
    report = export.onnx(made, path, SIZE)
    assert [check.feature for check in report.checks] == list(out_features)


@needs_onnx
def test_openvino_computes_the_integers(path):
    """By its own int8 convolutions."""
    openvino = pytest.importorskip("openvino")
    made = network("depthwise")
    export.onnx(made, path, (2, 96, 128))
    x = cases.images(2, height=96, width=128, seed=11)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    found = compiled(x.numpy())
    for name, ours in zip(made.out_features, made(x), strict=True):
        assert sqnr(torch.from_numpy(found[name]), ours) > 30


# --------------------------------------------------------------------------------------
# The check
# --------------------------------------------------------------------------------------


def initializer(proto, name):
    return next(each for each in proto.graph.initializer if each.name == name)


def change(proto, name, function):
    from onnx import numpy_helper

    held = initializer(proto, name)
    old = numpy_helper.to_array(held)
    held.CopyFrom(numpy_helper.from_array(function(old.copy()).astype(old.dtype), name))


def node(proto, kind, where=-1):
    return [each for each in proto.graph.node if each.op_type == kind][where]


def attribute(proto, kind, name):
    return next(each for each in node(proto, kind).attribute if each.name == name)


def other_slots(proto):
    concat = node(proto, "Concat")
    concat.input[1], concat.input[2] = concat.input[2], concat.input[1]


def one_weight(proto):
    def raised(weight):
        weight[0, 0, 1, 1] = -127 if weight[0, 0, 1, 1] > 0 else 127
        return weight

    change(proto, "stem_2.weight", raised)


WRONG = {
    "a slot's scale": lambda p: change(p, "OSA5_2_concat/slot_1.scale", lambda x: x * 1.05),
    "a scale": lambda p: change(p, quantized("OSA4_1_0") + ".scale", lambda x: x * 1.05),
    "scales of weights": lambda p: change(p, "stem_3.weight.scale", lambda x: x * 1.05),
    "a weight": one_weight,
    "biases": lambda p: change(p, "OSA5_1_0.bias", lambda x: x + 3 * abs(x).max()),
    "the order of slots": other_slots,
    "the slope of the gate": lambda p: setattr(attribute(p, "HardSigmoid", "alpha"), "f", 0.25),
    "the mode of a pool": lambda p: setattr(attribute(p, "MaxPool", "ceil_mode"), "i", 0),
    "an identity": lambda p: p.graph.node[-1].input.__setitem__(1, p.graph.node[-1].input[0]),
    "a name": lambda p: setattr(p.graph.output[-1], "name", "stage6"),
}


WRONG_IN_FP8 = ("a slot's scale", "scales of weights", "biases", "the slope of the gate")
IN_BOTH = [("int8", kind) for kind in WRONG]
IN_BOTH += [pytest.param("fp8", kind, marks=needs_fp8) for kind in WRONG_IN_FP8]


@needs_onnx
@pytest.mark.parametrize(("form", "kind"), IN_BOTH)
def test_a_file_that_computes_something_else_is_not_left_behind(form, kind, path, monkeypatch):
    to_proto = export.to_proto

    def wrong(*args):
        proto = to_proto(*args)
        WRONG[kind](proto)
        return proto

    for module in (export, onnx_check):
        monkeypatch.setattr(module, "to_proto", wrong)
    monkeypatch.setattr("onnx.checker.check_model", lambda proto: None)
    path.write_text("old")
    made = network() if form == "int8" else cases.quantized("detectron2", form, stem="int8")
    with pytest.raises(ExportError, match=r"is not in onnxruntime|onnxruntime .*cannot"):
        export.onnx(made, path, (1, 64, 64))
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]


# --------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------

BAD = {
    "a model": (dict(network=cases.model), TypeError, "got VoVNet: vovnet_fast.deploy.export.onnx"),
    "a size": (dict(size=(64, 64)), ValueError, "size must be N, H, W"),
    "too small": (dict(size=(1, 64, 20)), ValueError, "an image of 64x20 is too small: stage5"),
    "an axis": (dict(dynamic=("depth",)), ValueError, "must be some of batch, height, width, got"),
    "an old opset": (dict(opset=12), ValueError, "opset must be 13 or newer for a network in int8"),
    "an opset to come": (dict(opset=1000), ValueError, "opset must be 11 to .*, got 1000"),
    "no folder": (dict(path="/no/such/a.onnx"), FileNotFoundError, "there is no folder"),
}


@needs_onnx
@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments(kind, path):
    change, error, message = BAD[kind]
    arguments = {**dict(network=network, path=path, size=SIZE), **change}
    arguments["network"] = arguments["network"]()
    with pytest.raises(error, match=message):
        export.onnx(**arguments)
    assert not path.exists()


@needs_onnx
@needs_fp8
def test_an_opset_that_has_no_fp8(path):
    made = cases.quantized("detectron2", "fp8")
    with pytest.raises(ValueError, match="opset must be 19 or newer for a network in fp8, which"):
        export.onnx(made, path, SIZE, opset=18)
    assert not path.exists()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_package_that_is_missing_is_named(package, path, monkeypatch):
    there = _optional.why_not
    monkeypatch.setattr(
        _optional, "why_not", lambda name: "it is not here" if name == package else there(name)
    )
    if package == "onnxruntime" and there("onnx") is not None:
        pytest.skip("onnx is missing too")
    with pytest.raises(ExportError, match=f"an export to ONNX needs {package}: it is not here"):
        export.onnx(network(), path, SIZE)
    if package == "onnxruntime":  # Which only compares.
        assert export.onnx(network(), path, SIZE, check=False).checks == ()
