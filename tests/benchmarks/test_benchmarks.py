"""What the benchmarks measure, and what their rows say. How they time: test_timing.py."""

import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from benchmarks import op_rows, ops, parts, peers, runtimes, test_conv, test_ops
from benchmarks.ceilings import Ceilings
from benchmarks.networks import build, build_training, counted, fold_ahead, layers
from vovnet_fast import _optional, backends, specs, tuning, use_backend
from vovnet_fast.arithmetic import DTYPES, fp8
from vovnet_fast.backends import _extension, reference
from vovnet_fast.backends.cpu import convolution
from vovnet_fast.compat import zip
from vovnet_fast.tools.bench.rows import KINDS, load
from vovnet_fast.tools.bench.stopwatch import Stopwatch
from vovnet_fast.tools.bench.training import TrainingStep, image

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = peers.Case("V-19-slim-dw-eSE", (1, 64, 64), torch.float32, CPU)


@pytest.fixture
def watch():
    return Stopwatch(CPU)


# --------------------------------------------------------------------------------------
# Ops
# --------------------------------------------------------------------------------------


def _small_cases():
    found = list(ops.other_cases("V-39-eSE", (2, 64, 96), (2,)))
    found += ops.other_cases("V-19-slim-dw-eSE", (2, 64, 96), (2,))
    wanted = layers("V-39-eSE", (1, 32, 32))
    few = [name for name in wanted if "on 1x8x8" in name or "3>64" in name]
    return [*found, *ops.conv_cases({name: wanted[name] for name in few})]


@pytest.mark.parametrize("case", _small_cases(), ids=lambda case: case.name)
def test_a_backend_and_eager_do_the_same(case):
    """In fp32 on the reference, whose functions are held against fp64 elsewhere."""
    with torch.inference_mode():
        work = case.make(torch.float32, CPU)
        found, expected = work.ours(reference), work.eager()
        assert found.shape == expected.shape
        assert op_rows.check(found, expected, torch.float32) < 1e-5
        assert work.moved >= 4 * found.numel()
        with pytest.raises(AssertionError, match="from eager, at most"):
            op_rows.check(found + expected.abs().mean(), expected, torch.float32)


def test_the_layers_of_a_gpu_are_all_there(monkeypatch):
    """Counted on meta tensors: both sizes, each layer once, forward and backward."""
    monkeypatch.setattr(test_conv, "ON_GPU", True)
    found = test_conv._layers()
    first, second = (
        {name for name in found if f" {pixels}" in name} for pixels in ("1x200x336", "1x160x400")
    )
    assert {name.replace("1x200x336", "1x160x400") for name in first} == second
    assert {"3x3 128>128 on 1x200x336", "1x1 768>256 on 1x200x336 pool"} <= first
    cases = list(ops.conv_cases(found))
    assert len({case.name for case in cases}) == len(cases)
    images = sum(layer.weight[3] == 3 for layer in found.values())
    assert len(cases) == 3 * len(found) - images
    flop = {case.name: case.flop for case in cases}
    assert flop["3x3 128>128 on 1x200x336"] == 2 * 200 * 336 * 128 * 128 * 9
    others = list(ops.other_cases("V-39-eSE", (1, 640, 1600)))
    assert {case.shape for case in others if case.name.startswith("eSE")} == {
        (1, 256, 160, 400), (1, 512, 80, 200), (1, 768, 40, 100), (1, 1024, 20, 50),
    }  # fmt: skip


def test_engines(watch):
    """Those that do not run, and those that are wrong, are said; the fastest of the rest wins."""
    import time

    def run(engine):
        if engine == "broken":
            raise RuntimeError("out of registers")
        time.sleep({"slow": 5e-3}.get(engine, 0))

    def prepare():
        return lambda engine: "error 3, allowed 1" if engine == "wrong" else None

    def call():
        names = ["slow", "broken", "wrong", "fast"]
        return tuning.choose(CPU, "a problem", names, "slow", run, prepare=prepare)

    found, best = op_rows.engines(call, watch)
    assert best == "fast"
    assert found["slow"]["ms"] > 5
    assert "out of registers" in found["broken"]["error"]
    assert found["wrong"] == {"error": "error 3, allowed 1"}
    assert op_rows.engines(lambda: None, watch) is None
    with op_rows._choosing("fast"):
        assert call() == "fast"
    with op_rows._choosing("another layer's"):
        assert call() == "slow"


@pytest.mark.parametrize(
    ("static", "expected"),
    [
        ("tma-128x64-k64", ["tma-128x64-k64", "aten", "conv-sm90 256x64", "pointer-128x64-k32"]),
        ("pointer-64x64-k32", ["pointer-64x64-k32", "aten", "conv-sm90 256x64", "tma-256x64-k64"]),
        ("of another layer", ["aten", "conv-sm90 256x64", "tma-256x64-k64", "pointer-128x64-k32"]),
    ],
)
def test_one_engine_of_each_form(static, expected):
    """The static choice, and beside it the others with the same tile where they have one."""
    names = ["aten", "conv-sm90 256x64", "tma-256x64-k64", "tma-128x64-k64"]
    names += ["pointer-128x64-k32", "pointer-64x64-k32"]
    assert op_rows.one_of_each_form(names, static) == expected


def test_all_candidates_for_hopper():
    """In every tile and cluster, beside cuDNN's and what is taken without measuring."""
    own = ["conv-sm90 256x64", "conv-sm90 256x64 cluster 2x1"]
    names = ["aten", *own, "conv-sm80 128x64", "tma-256x64-k64", "tma-128x64-k64"]
    found = op_rows.chosen(names, "tma-128x64-k64", op_rows.HOPPER)
    assert found == ["aten", *own, "tma-128x64-k64"]
    assert op_rows.chosen(names, "aten", op_rows.ALL) == names


def test_an_error_that_the_device_does_not_survive_ends_the_search(watch):
    def run(engine):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        op_rows.engines(lambda: tuning.choose(CPU, "p", ["a"], "a", run), watch)


# --------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------


def _trained_norms(model):
    """Statistics and parameters that folding cannot ignore."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.running_mean, norm.bias.data):
            tensor.normal_(0, 0.1)
        for tensor in (norm.running_var, norm.weight.data):
            tensor.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("spec", ["V-19-slim-dw-eSE", "vovnet-19-slim"])
def test_folding_ahead_changes_nothing(spec):
    images = image((1, 64, 64), torch.float32, CPU)
    with torch.inference_mode(), use_backend("reference"):
        model = _trained_norms(build(spec, torch.float32, CPU))
        expected = model(images)
        for found, feature in zip(fold_ahead(model)(images), expected, strict=True):
            assert ((found - feature).norm() / feature.norm()).item() < 1e-5


def test_peers_have_names_of_their_own():
    names = list(peers.PEERS)
    assert names[0] == "eager"
    assert all(" " not in name and "," not in name for name in names)
    rows = [(peer.provider, peer.backend) for peer in peers.PEERS.values()]
    assert len(set(rows)) == len(rows)
    assert all(peer.settings for peer in peers.PEERS.values())
    usable = {f"fused-{name}" for name in backends.NAMES if name != "reference"}
    assert usable <= set(names)
    assert peers.PEERS["fused-triton"].ours == "triton"
    assert peers.PEERS["folded"].ours is None


@pytest.mark.parametrize("name", ["eager-NCHW", "eager-AMP", "folded", "frozen", "onnxruntime"])
def test_peers_compute_what_eager_does(name):
    case = TINY._replace(dtype=torch.bfloat16) if name == "eager-AMP" else TINY
    if name == "onnxruntime":
        for package in ("onnxruntime", "onnx"):
            pytest.importorskip(package, exc_type=Exception)
    peer = peers.PEERS[name]
    with torch.inference_mode(), use_backend("reference"):
        expected = peers.EAGER.ready(case)(case.images())[-1].float()
        found = peer.ready(case)(peer.images(case.images()))[-1].float()
    limit = 1e-4 if case.dtype == torch.float32 else 0.05
    assert ((found - expected).norm() / expected.norm()).item() < limit


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("folded-graph", "CUDA graphs need an NVIDIA GPU"),
        ("compiled-max-autotune", "max-autotune is for GPUs"),
        ("eager-AMP", "nothing to cast to"),
        ("onnxruntime-CUDA", "measured on NVIDIA GPUs"),
        ("tensorrt", "measured on NVIDIA GPUs"),
        ("tensorrt-int8", "measured on NVIDIA GPUs"),
        ("tensorrt-fp8", "measured on NVIDIA GPUs"),
    ],
)
def test_missing_peers_say_why(name, why):
    with pytest.raises(peers.Missing, match=why):
        peers.PEERS[name].ready(TINY)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-int8", "tensorrt-fp8"])
def test_a_gpu_without_tensorrt_says_so(name):
    """Before anything is built for it."""
    reason = _optional.why_not("tensorrt")
    if reason is None:
        pytest.skip("TensorRT is here")
    with pytest.raises(peers.Missing, match="tensorrt is not installed"):
        peers.PEERS[name].ready(TINY._replace(device=torch.device("cuda", 0)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_tensorrt_is_given_in_eight_bits(dtype):
    """The network that ours runs, with every convolution but the gates' between Q and DQ."""
    onnx = pytest.importorskip("onnx")
    if dtype == "fp8" and fp8.why_not() is not None:
        pytest.skip(fp8.why_not())
    with runtimes.quantized_file(TINY, dtype) as path:
        proto = onnx.load(path)
        onnx.checker.check_model(proto, full_check=True)
    byte = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}[dtype]
    assert proto.opset_import[0].version == {"int8": 17, "fp8": 19}[dtype]
    assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [
        TINY.shape[0], 3, *TINY.shape[1:],
    ]  # fmt: skip
    assert [value.name for value in proto.graph.output] == list(runtimes.FEATURES)
    kinds = {each.name: each.data_type for each in proto.graph.initializer}
    made = {node.output[0]: node for node in proto.graph.node}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            assert kinds[node.input[2]] == byte
        if node.op_type == "Conv" and "_ese" not in node.name:
            read = [made[name] for name in node.input[:2]]
            assert [each.op_type for each in read] == ["DequantizeLinear"] * 2
            assert kinds[read[1].input[0]] == byte


def test_half_precision_is_not_for_onnxruntime():
    with pytest.raises(peers.Missing, match="no convolutions in half"):
        peers.PEERS["onnxruntime"].ready(TINY._replace(dtype=torch.bfloat16))


LAYOUTS = {"compiled-folded": torch.channels_last, "compiled-folded-NCHW": torch.contiguous_format}


@pytest.mark.parametrize("name", LAYOUTS)
def test_inductor_is_given_both_layouts(name, monkeypatch):
    """Network and images alike; which is faster is for the measurement to say."""
    given = []

    def compiled(network, dynamic):
        given.append(next(m.weight for m in network.modules() if isinstance(m, nn.Conv2d)))
        return given.append

    monkeypatch.setattr(torch, "compile", compiled)
    peer = peers.PEERS[name]
    peer.ready(TINY)
    given.append(peer.images(TINY.images()))
    for tensor in given:
        assert tensor.is_contiguous(memory_format=LAYOUTS[name])
        assert tensor.is_contiguous() == (LAYOUTS[name] == torch.contiguous_format)
    assert len(given) == 3
    assert ("contiguous" in peer.settings) == (LAYOUTS[name] == torch.contiguous_format)


def test_launches_of_plain_pytorch_are_those_of_the_plan():
    pytest.importorskip("triton", minversion="3.6", reason="launches are planned with Triton")
    expected = counted(TINY.spec, TINY.shape, "fp32")["launches"]["eager"]
    for name in ("eager", "eager-NCHW"):
        peer = peers.PEERS[name]
        assert peer.launches(TINY, peer.ready(TINY)) == expected
    half = TINY._replace(dtype=torch.bfloat16)
    mixed = peers.PEERS["eager-AMP"]
    assert mixed.launches(half, mixed.ready(half)) > expected, "casts are launches too"
    for name in ("folded", "frozen"):
        peer = peers.PEERS[name]
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in TINY.network().modules())
        assert peer.launches(TINY, peer.ready(TINY)) == expected - norms
    captured = types.SimpleNamespace(captured=peers.EAGER.ready(TINY))
    assert peers.PEERS["folded-graph"].launches(TINY, captured) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_launches_of_the_extension_are_its_calls(dtype):
    if (reason := backends.why_not("cpu", CPU)) is not None:
        pytest.skip(reason)
    case = peers.Case("V-39-eSE", (1, 64, 64), dtype, CPU)
    # oneDNN's convolutions are ATen's, and a pass follows.
    conv = 2 if convolution.choose_engine(dtype) == convolution.ATEN else 1
    with torch.inference_mode():
        found = peers.PEERS["fused-cpu"].launches(case, None)
    assert found == _extension_launches(case.spec, conv)


def test_launches_of_the_extension_on_a_gpu_are_its_calls(monkeypatch):
    """With passes that do nothing: nobody looks at what is computed."""
    monkeypatch.setattr(_extension.CUDA, "_half", lambda: mock.MagicMock())
    monkeypatch.setattr(_extension.CUDA, "_launch", lambda *_: None)
    case = peers.Case("V-39-eSE", (1, 64, 64), torch.bfloat16, CPU)
    for name in ("fused-cuda", "fused-graph-cuda"):
        found = peers.PEERS[name].launches(case, None)
        assert found == _extension_launches(case.spec, 2)  # cuDNN's convolution, and a pass.


def _extension_launches(spec, conv):
    """Of a network whose blocks all have a gate, with so many launches for a convolution."""
    blocks = list(specs.get(spec).blocks())
    pools, gates = 3, 2 * len(blocks)
    return conv * (3 + sum(block.num_layers + 1 for block in blocks)) + pools + gates


def test_what_launches_cannot_be_counted():
    for name, peer in peers.PEERS.items():
        alone = ("compiled", "onnx", "openvino", "tensorrt", "fused-int8-cpu")
        assert bool(peer.opaque) == name.startswith(alone)
    with pytest.raises(peers.Missing, match="kernels of its own"):
        peers.PEERS["compiled"].launches(TINY, None)


def test_a_training_step_of_channels_in_front():
    steps = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        model = build_training(TINY.spec, CPU).to(memory_format=memory_format)
        with use_backend("reference"):
            steps.append(TrainingStep(model, TINY.shape, CPU))
            steps[-1]()
    gradients = [p.grad for p in steps[0].parameters]
    assert 0 <= steps[1].distance(gradients) < 1e-3


# --------------------------------------------------------------------------------------
# Parts of a block
# --------------------------------------------------------------------------------------


def test_parts_of_eager_and_of_a_backend(watch):
    x = torch.randn(1, 8, 16, 16)
    weight, wide = torch.randn(8, 8, 3, 3), torch.randn(8, 16, 1, 1)

    def work():
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        return torch.nn.functional.conv2d(torch.cat([x, y.relu()], 1), wide)

    found = parts.of_eager(watch, work)
    assert set(found) == {"conv 3x3", "ReLU", "cat", "conv 1x1"}
    assert all(ms > 0 for ms in found.values())
    work = functools.partial(_gate, torch.rand(1, 8, 8, 16))
    found = parts.of_backend(watch, work, reference)
    assert set(found) == {"eSE pool + FC", "gate + identity"}


def _gate(z, backend):
    weight, bias = torch.eye(16), torch.zeros(16)
    gates, _ = backend.gates(z.sum((1, 2))[:, None], 64, weight, bias, "hard_sigmoid")
    backend.apply_gates(z, gates, None, torch.empty_like(z))


# --------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What a small part of the suites writes."""
    pytest.importorskip("pytest_benchmark")
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    selected = (
        "1x3x128x128 and folded",
        "depthwise and eager and not gradient",
        "ceiling",
        "OSA and backward and eager",
        "training and V-19 and folding",
    )
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
        "benchmarks", "--ignore=benchmarks/test_detector.py", "--benchmark-only",
        f"--benchmark-json={path}", "-k", " or ".join(f"({words})" for words in selected),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return path


def test_rows_have_their_fields(written):
    content = json.loads(written.read_text())
    rows = [row["extra_info"] for row in content["benchmarks"]]
    always = {"kind", "name", "provider", "dtype", "device_ms", "device_ms_min"}
    compared = {"ratio_to_eager", "ratio_low", "ratio_high", "distance", "settings", "pass"}
    compared.add("ratio_confidence")
    of_kind = {
        "ceiling": {"gbs", "flop", "bytes"},
        "op": {"flop", "bytes", "tflops", "gbs", "of_copy", "of_matmul", "warm_ms", "shape"},
        "block": {"flop", "bytes", "tflops", "gbs", "of_copy", "warm_ms", "parts", "shape"},
        "inference": {"spec", "shape", "images_per_s", "launches"},
        "training": {"spec", "shape", "images_per_s"},
    }
    assert {row["kind"] for row in rows} == set(of_kind)
    for row in rows:
        missing = (always | of_kind[row["kind"]]) - set(row)
        missing |= set() if row["kind"] == "ceiling" else compared - set(row)
        assert not missing, f"{row['kind']} {row['name']}: {missing}"
        assert row["kind"] in KINDS
    eager = [row for row in rows if row["provider"] == "eager"]
    assert {row["kind"] for row in eager} == {"op", "block"}
    assert all(row["distance"] == 0 and row["backend"] is None for row in eager)
    parts = next(row["parts"] for row in rows if row["kind"] == "block")
    assert max(parts, key=parts.get) == "conv 3x3"
    shapes = {row["shape"] for row in rows if row["kind"] == "inference"}
    assert shapes == {"1x3x128x128"}


def test_the_report_reads_all_rows(written):
    [section] = load([written])
    assert section.unknown == 0
    assert section.replaced == 0
    assert [row.provider for row in section.of("inference", "training")] == ["folded", "folding"]
    assert {row.direction for row in section.of("block")} == {"backward"}
    assert {row.direction for row in section.of("training")} == {"step"}
    assert len(section.of("ceiling")) == len(Ceilings.names(CPU))


def test_what_a_cpu_is_given_is_small():
    """All of it runs in minutes."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU")
    cases = [*test_conv.CASES.values(), *test_ops.CASES.values()]
    assert 10 < len(cases) < 40
    assert max(case.flop for case in cases) < 2e9
