"""cuDNN's graph API as an engine: what it is told, when it is offered, and what it computes.

What it computes needs a GPU, the frontend and its cuDNN. What it is told is seen by a frontend
that only listens, and by the real one where it is installed.
"""

import contextlib
import dataclasses
import logging
import types

import pytest
import torch
import torch.nn.functional as F

from vovnet_fast import _optional, tuning
from vovnet_fast.arithmetic import fp8
from vovnet_fast.arithmetic.layers import QuantizedConv
from vovnet_fast.backends import cudnn_graph
from vovnet_fast.backends import triton as backend
from vovnet_fast.backends.triton import eight_bits as in_eight_bits
from vovnet_fast.compat import zip
from vovnet_fast.selfcheck import eight_bits
from vovnet_fast.selfcheck.calls import Layer as Layer3

CPU = torch.device("cpu")
GEOMETRIES = [(3, 1), (3, 2), (1, 1), (1, 2)]


@dataclasses.dataclass
class Layer:
    """Arguments of one call, and what it should compute."""

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    stride: int = 1
    relu: bool = True

    def tensors(self, out):
        return self.x, self.weight, self.scale, self.shift, out

    def options(self):
        return dict(stride=self.stride, relu=self.relu, tf32=self.x.dtype == torch.float32)

    def shape(self):
        height, width = ((side - 1) // self.stride + 1 for side in self.x.shape[1:3])
        return self.x.shape[0], height, width, self.weight.shape[0]

    def reference(self, dtype):
        """The same in plain torch, every step in ``dtype``."""
        x, weight = (t.to(dtype).permute(0, 3, 1, 2) for t in (self.x, self.weight))
        y = F.conv2d(x, weight, stride=self.stride, padding=weight.shape[2] // 2)
        y = y.permute(0, 2, 3, 1) * self.scale.to(dtype) + self.shift.to(dtype)
        return F.relu(y) if self.relu else y

    def engines(self, out):
        return cudnn_graph.engines(*self.tensors(out), **self.options())

    def run(self, engine, out):
        cudnn_graph.run(engine, *self.tensors(out), **self.options())


@pytest.fixture
def layer(embed, device):
    def layer(n, h, w, c_in, c_out, dtype, *, kernel=3, stride=1, crop=False, relu=True):
        x = torch.randn(n, h, w, c_in, dtype=torch.float64, device=device)
        weight = torch.randn(c_out, kernel, kernel, c_in, dtype=torch.float64, device=device)
        weight = (weight / (kernel * kernel * c_in) ** 0.5).to(dtype)
        scale = torch.rand(c_out, device=device) + 0.5
        shift = torch.randn(c_out, device=device)
        return Layer(embed(x, dtype, crop=crop), weight, scale, shift, stride, relu)

    return layer


@pytest.fixture(autouse=True)
def _nothing_remembered():
    cudnn_graph.plans.plans_for.cache_clear()
    yield
    cudnn_graph.plans.plans_for.cache_clear()


# --------------------------------------------------------------------------------------
# Whether it is there
# --------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """A frontend and a GPU, as far as :func:`why_not` can see; says how to make it worse."""
    monkeypatch.setattr(_optional, "why_not", lambda module: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)

    def installed(backend_version):
        frontend = types.SimpleNamespace(backend_version=backend_version)
        monkeypatch.setattr(cudnn_graph.installed, "frontend", lambda: frontend)

    cudnn_graph.installed._mismatch.cache_clear()
    installed(lambda: 92000)
    yield installed
    cudnn_graph.installed._mismatch.cache_clear()


def test_reasons_why_not(installed, monkeypatch):
    cuda = torch.device("cuda", 0)
    assert cudnn_graph.why_not(cuda) is None
    assert "these are on cpu" in cudnn_graph.why_not(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert "7.5 is below 8.0" in cudnn_graph.why_not(cuda)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no NVIDIA GPU" in cudnn_graph.why_not(cuda)
    with torch.backends.cudnn.flags(enabled=False):
        assert "enabled is off" in cudnn_graph.why_not(cuda)
    monkeypatch.setattr(_optional, "why_not", lambda module: f"{module} is not installed")
    assert "frontend: cudnn is not installed" in cudnn_graph.why_not(cuda)


def _no_library():
    raise RuntimeError("Unable to find symbol cudnnGetVersion")


@pytest.mark.parametrize(
    ("backend_version", "reason"),
    [
        (lambda: 90300, "cuDNN 90300 is older than 91000"),
        (lambda: 92800, "the frontend found cuDNN 92800, torch has 92000"),
        (_no_library, "does not load: Unable to find symbol"),
    ],
)
def test_a_frontend_that_does_not_fit(installed, backend_version, reason):
    installed(backend_version)
    assert reason in cudnn_graph.why_not(torch.device("cuda", 0))


def test_nothing_is_offered_where_it_is_missing(monkeypatch, layer, output):
    monkeypatch.setattr(_optional, "why_not", lambda module: f"{module} is not installed")
    case = layer(1, 5, 7, 16, 32, torch.float16)
    out = output(case.shape(), torch.float16).view
    assert case.engines(out) == []
    assert "not installed" in cudnn_graph.why_none(*case.tensors(out))


# --------------------------------------------------------------------------------------
# What it is told
# --------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Heard:
    """A tensor of a graph: what was said about it."""

    said: dict

    def __getattr__(self, name):
        def set_it(value):
            self.said[name.removeprefix("set_")] = value
            return self

        if not name.startswith("set_"):
            raise AttributeError(name)
        return set_it


class Graph:
    """Notes which operations it is given, offers plans, and runs none of them."""

    def __init__(self, frontend, **options):
        self.frontend, self.options = frontend, options
        self.inputs, self.operations = {}, []
        self.compiled, self.executed = [], []

    def tensor(self, **said):
        self.inputs[said["name"]] = Heard(said)
        return self.inputs[said["name"]]

    def _operation(self, kind, **arguments):
        self.operations.append((kind, arguments, Heard({})))
        return self.operations[-1][2]

    def __getattr__(self, name):
        if name not in ("conv_fprop", "scale", "bias", "relu", "add", "mul", "sub"):
            raise AttributeError(name)
        return lambda **arguments: self._operation(name, **arguments)

    def validate(self):
        self.frontend.graphs.append(self)

    def build_operation_graph(self):
        pass

    def create_execution_plans(self, modes):
        self.modes = modes
        if self.frontend.refusal is not None:
            raise self.frontend.cudnnGraphNotSupportedError(self.frontend.refusal)

    def deselect_numeric_notes(self, notes):
        self.notes = notes

    def get_execution_plan_count(self):
        return self.frontend.count

    def get_plan_name_at_index(self, index):
        return f"eng{index}"

    def build_plan_at_index(self, index):
        self.compiled.append(index)

    def get_workspace_size_plan_at_index(self, index):
        return 256 * index

    def execute_plan_at_index(self, pointers, workspace, index, handle):
        self.executed.append((pointers, workspace.numel(), index, handle))


class Frontend:
    """As much of the frontend as the engine uses."""

    class cudnnGraphNotSupportedError(Exception):
        pass

    data_type = types.SimpleNamespace(
        HALF="half", BFLOAT16="bf16", FLOAT="float", INT8="int8", INT32="int32", FP8_E4M3="e4m3"
    )
    heur_mode = types.SimpleNamespace(A="A", FALLBACK="fallback")
    numerical_note = types.SimpleNamespace(
        NONDETERMINISTIC="nondeterministic", REDUCED_PRECISION_REDUCTION="reduced"
    )

    def __init__(self):
        self.graphs, self.handles, self.streams = [], [], []
        self.refusal, self.broken, self.count = None, False, 7

    def pygraph(self, **options):
        return Graph(self, **options)

    def create_handle(self):
        if self.broken:
            raise RuntimeError("cudnnCreate failed")
        self.handles.append(f"handle {len(self.handles)}")
        return self.handles[-1]

    def set_stream(self, handle, stream):
        self.streams.append((handle, stream))


@pytest.fixture
def frontend(monkeypatch):
    """A listening frontend instead of the real one, on a machine that need not have a GPU."""
    frontend = Frontend()
    monkeypatch.setattr(cudnn_graph.installed, "frontend", lambda: frontend)
    monkeypatch.setattr(cudnn_graph.installed, "why_not", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    stream = types.SimpleNamespace(cuda_stream=17)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    cudnn_graph.plans._handle.cache_clear()
    yield frontend
    cudnn_graph.plans._handle.cache_clear()


def test_slots_are_described_by_their_strides(layer, output):
    case = layer(2, 9, 11, 24, 40, torch.float16, stride=2, crop=True)
    out = output(case.shape(), torch.float16, crop=True).view
    problem = cudnn_graph.describe(*case.tensors(out), **case.options())
    assert problem.x.dims == (2, 24, 9, 11)
    assert problem.x.strides == (11 * 13 * 56, 1, 13 * 56, 56)
    assert problem.weight.dims == (40, 24, 3, 3)
    assert problem.weight.strides == (9 * 24, 1, 3 * 24, 24)
    assert problem.out.dims == (2, 40, 5, 6)
    assert problem.out.strides == (7 * 8 * 72, 1, 8 * 72, 72)
    assert problem.x.span == 11 * 13 * 56 + 8 * 13 * 56 + 10 * 56 + 24
    assert (problem.stride, problem.padding, problem.aligned) == (2, 1, True)
    assert cudnn_graph.refusal(problem) is None


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((1, 1, 1, 8), (1, 1, 1, 1), (8, 1, 8, 8)),
        ((1, 1, 5, 8), (0, 3, 32, 1), (160, 1, 160, 32)),
        ((1, 5, 1, 8), (0, 32, 7, 1), (160, 1, 32, 8)),
        ((2, 1, 1, 8), (64, 3, 3, 1), (64, 1, 8, 8)),
        ((2, 2, 2, 1), (64, 32, 16, 5), (64, 1, 32, 16)),
    ],
)
def test_strides_of_single_elements_say_nothing(shape, strides, expected):
    view = torch.empty(400).as_strided(shape, strides)
    assert cudnn_graph.operand(view).strides == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype=torch.float64), "no plans for torch.float64"),
        (dict(dtype=torch.float32), "rounded to TF32"),
        (dict(aligned=False), "no multiple of 16 bytes"),
        (
            dict(x=cudnn_graph.Operand((2, 8, 4, 4), (0, 1, 32, 8))),
            r"x has strides \(0, 1, 32, 8\)",
        ),
        (
            dict(out=cudnn_graph.Operand((1, 8, 4, 4), (128, 16, 4, 1))),
            r"out has strides \(128, 16, 4, 1\)",
        ),
        (
            dict(out=cudnn_graph.Operand((2, 8, 4, 4), (2**31, 1, 32, 8))),
            f"out spans {2**31 + 128} elements",
        ),
    ],
)
def test_what_is_not_put_to_cudnn(change, reason, layer, output, frontend):
    case = layer(2, 4, 4, 8, 8, torch.float16)
    out = output(case.shape(), torch.float16).view
    problem = cudnn_graph.describe(*case.tensors(out), stride=1, relu=True, tf32=False)
    with pytest.raises(cudnn_graph.Refused, match=reason):
        cudnn_graph.Plans(dataclasses.replace(problem, **change))
    assert not frontend.graphs
    if change == dict(dtype=torch.float32):
        assert cudnn_graph.refusal(dataclasses.replace(problem, **change, tf32=True)) is None


def test_misaligned_pointers_are_noticed(layer, output):
    case = layer(1, 4, 4, 24, 8, torch.float16)
    out = output(case.shape(), torch.float16).view
    for position in range(5):
        tensors = list(case.tensors(out))
        storage = torch.zeros(9, dtype=tensors[position].dtype)
        tensors[position] = storage[1:2].view(1, 1, 1, 1)
        assert not cudnn_graph.describe(*tensors, **case.options()).aligned


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("kernel", "stride"), GEOMETRIES)
def test_the_graph(kernel, stride, relu, layer, output, frontend):
    case = layer(2, 9, 11, 24, 40, torch.bfloat16, kernel=kernel, stride=stride, relu=relu)
    out = output(case.shape(), torch.bfloat16).view
    assert case.engines(out) == ["cudnn-graph eng0", "cudnn-graph eng1", "cudnn-graph eng2"]
    [graph] = frontend.graphs
    assert graph.options == dict(
        io_data_type="bf16",
        intermediate_data_type="float",
        compute_data_type="float",
        handle="handle 0",
    )
    assert graph.modes == ["A", "fallback"]
    assert graph.notes == ["nondeterministic", "reduced"]
    vector = dict(dim=[1, 40, 1, 1], stride=[40, 1, 40, 40], data_type="float")
    assert {name: tensor.said for name, tensor in graph.inputs.items()} == {
        "x": dict(
            name="x",
            dim=[2, 24, 9, 11],
            stride=[99 * 56, 1, 11 * 56, 56],
            data_type="bf16",
        ),
        "weight": dict(
            name="weight",
            dim=[40, 24, kernel, kernel],
            stride=[kernel * kernel * 24, 1, kernel * 24, 24],
            data_type="bf16",
        ),
        "scale": dict(name="scale", **vector),
        "shift": dict(name="shift", **vector),
    }
    kinds, arguments, results = zip(*graph.operations, strict=True)
    assert kinds == ("conv_fprop", "scale", "bias", *(["relu"] if relu else []))
    inputs = graph.inputs
    pad = kernel // 2
    assert arguments[0] == dict(
        image=inputs["x"],
        weight=inputs["weight"],
        padding=[pad, pad],
        stride=[stride, stride],
        dilation=[1, 1],
    )
    assert arguments[1] == dict(input=results[0], scale=inputs["scale"])
    assert arguments[2] == dict(input=results[1], bias=inputs["shift"])
    assert not relu or arguments[3] == dict(input=results[2])
    _, height, width, _ = out.shape
    assert results[-1].said == dict(
        name="out",
        output=True,
        data_type="bf16",
        dim=[2, 40, height, width],
        stride=[height * width * 72, 1, width * 72, 72],
    )
    assert not any(result.said for result in results[:-1])


def test_a_launch(layer, output, frontend):
    case = layer(1, 5, 7, 24, 40, torch.float16)
    out = output(case.shape(), torch.float16).view
    names = case.engines(out)
    for name in (names[1], names[0], names[1]):
        case.run(name, out)
    [graph] = frontend.graphs
    assert graph.compiled == [1, 0]
    pointers, workspace, index, handle = graph.executed[0]
    *_, (_, _, result) = graph.operations
    assert pointers == {
        graph.inputs["x"]: case.x.data_ptr(),
        graph.inputs["weight"]: case.weight.data_ptr(),
        graph.inputs["scale"]: case.scale.data_ptr(),
        graph.inputs["shift"]: case.shift.data_ptr(),
        result: out.data_ptr(),
    }
    assert (workspace, index, handle) == (256, 1, "handle 0")
    assert [launch[1:3] for launch in graph.executed[1:]] == [(0, 0), (256, 1)]
    assert set(frontend.streams) == {("handle 0", 17)}
    assert frontend.handles == ["handle 0"]
    case.run("cudnn-graph eng6", out)  # Ranked, if not on offer.
    assert graph.compiled == [1, 0, 6]
    with pytest.raises(cudnn_graph.Refused, match="does not offer cudnn-graph eng7"):
        case.run("cudnn-graph eng7", out)


def test_what_cudnn_refuses_is_not_offered(layer, output, frontend, caplog):
    frontend.refusal = "no engine for these strides"
    case = layer(1, 5, 7, 24, 40, torch.float16)
    out = output(case.shape(), torch.float16).view
    with caplog.at_level(logging.DEBUG, "vovnet_fast.cudnn_graph"):
        for _ in range(3):
            assert case.engines(out) == []
    [record] = caplog.records
    reason = "cuDNN refuses: no engine for these strides"
    assert reason in record.getMessage()
    assert cudnn_graph.why_none(*case.tensors(out), **case.options()) == reason
    with pytest.raises(cudnn_graph.Refused, match=reason):
        case.run("cudnn-graph eng0", out)


def test_a_cudnn_that_does_not_start_is_not_offered(layer, output, frontend):
    frontend.broken = True
    case = layer(1, 5, 7, 24, 40, torch.float16)
    out = output(case.shape(), torch.float16).view
    assert case.engines(out) == []
    reason = cudnn_graph.why_none(*case.tensors(out), **case.options())
    assert reason == "cuDNN refuses: cudnnCreate failed"


def test_during_a_capture_only_what_is_known_is_offered(layer, output, frontend, monkeypatch):
    known, new = (layer(1, 5, width, 24, 40, torch.float16) for width in (7, 8))
    out, other = (output(case.shape(), torch.float16).view for case in (known, new))
    names = known.engines(out)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert known.engines(out) == names
        assert new.engines(other) == []
        assert "being captured" in cudnn_graph.why_none(*new.tensors(other), **new.options())
        assert len(frontend.graphs) == 1
    assert new.engines(other) == names
    assert cudnn_graph.why_none(*new.tensors(other), **new.options()) is None


def test_the_backend_offers_and_runs_it(layer, output, frontend, monkeypatch):
    """With the choice replaced by a preference for the last graph; never for a pooled layer."""
    offered = []

    def choose(device, problem, candidates, static, run, **options):
        offered.append((problem, [name for name in candidates if name.startswith("cudnn-graph")]))
        return offered[-1][1][-1] if offered[-1][1] else static

    monkeypatch.setattr(tuning, "choose", choose)
    case = layer(1, 5, 7, 24, 40, torch.float16)
    out = output(case.shape(), torch.float16).view
    assert backend.conv(*case.tensors(out), pool=False) is None
    [graph] = frontend.graphs
    assert [index for _, _, index, _ in graph.executed] == [2]
    assert out.isnan().all()  # Nothing else has written there.
    assert backend.conv(*case.tensors(out), pool=True) is not None
    assert len(graph.executed) == 1
    (problem, names), (pooled, none) = offered
    assert names == case.engines(out)
    assert problem.endswith(" and cudnn-graph")
    assert "cudnn-graph" not in pooled
    assert none == []


def test_the_real_frontend_accepts_the_description(layer, output):
    """Its own checks of the graph. All that comes after them asks the GPU."""
    reason = _optional.why_not("cudnn")
    if reason is not None:
        pytest.skip(reason)
    case = layer(2, 9, 11, 24, 40, torch.bfloat16, stride=2, crop=True)
    out = output(case.shape(), torch.bfloat16, crop=True).view
    problem = cudnn_graph.describe(*case.tensors(out), **case.options())
    try:
        graph = cudnn_graph.plans._build(cudnn_graph.installed.frontend(), problem).graph
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"it makes no graph without cuDNN or a GPU: {error}")
    try:
        graph.validate()
    except (ImportError, NotImplementedError) as error:
        pytest.skip(f"it checks no graph without a GPU: {error}")


# --------------------------------------------------------------------------------------
# Eight bits
# --------------------------------------------------------------------------------------

LARGEST = {"int8": 127, "fp8": fp8.LARGEST}
forms = pytest.mark.parametrize("form", eight_bits.FORMS.values())


@dataclasses.dataclass
class Bytes:
    """A convolution in eight bits, from a slot into a slot."""

    t: eight_bits.Numbers
    x: torch.Tensor
    layer: QuantizedConv
    out: torch.Tensor

    def options(self, **others):
        return dict(levels=self.t.levels, feature=None, pool=False) | others

    def engines(self, **others):
        return in_eight_bits.libraries(self.x, self.layer, self.out, **self.options(**others))

    def expected(self):
        out = torch.empty_like(self.out)
        self.t.ops.conv(self.x, self.layer, out, levels=self.t.levels)
        return out


def in_bytes(form, device, *, c_in=64, c_out=80, kernel=3, stride=1, size=(2, 9, 11), levels=None):
    """Sums on either side of what saturates, and, of the first channels, halves: ties."""
    t = eight_bits.Numbers(form, device, levels or LARGEST[form])
    shape = Layer3(kernel, c_in, c_out, size, stride)
    x = t.activations(*size, c_in)
    weight, multiplier = t.weight(c_out, kernel, kernel, c_in), t.factors(c_out, kernel**2 * c_in)
    weight[:8] = 0
    weight[:8, kernel // 2, kernel // 2, 0] = 1
    bias, multiplier[:8] = t.bias(c_out), 0.5
    bias[:8] = 0
    layer = QuantizedConv(
        weight, bias, multiplier, t.floats(c_out), stride, None, t.floats(c_in), None, 1.0
    )
    return Bytes(t, x, layer, t.slot(*shape.output, c_out))


def evaluated(graph, case):
    """What the operations of a graph compute in the dtypes that it declares. What becomes a byte
    is cut off, and not rounded."""
    layer = case.layer
    values = {
        graph.inputs["x"]: case.x, graph.inputs["weight"]: layer.weight,
        graph.inputs["scale"]: layer.multiplier, graph.inputs["shift"]: layer.bias.float(),
    }  # fmt: skip
    if "nearest" in graph.inputs:
        values[graph.inputs["nearest"]] = torch.tensor(cudnn_graph.NEAREST)

    def single(argument):
        return values[argument].to(torch.float32)

    for kind, given, result in graph.operations:
        if kind == "conv_fprop":
            x, weight = (values[given[n]].double().permute(0, 3, 1, 2) for n in ("image", "weight"))
            exact = F.conv2d(x, weight, stride=given["stride"], padding=given["padding"])
            dtype = {"int32": torch.int32}.get(given.get("compute_data_type"), torch.float32)
            assert result.said.get("data_type", "float") in ("int32", "float")
            found = exact.permute(0, 2, 3, 1).to(dtype)
        elif kind == "relu":
            found = single(given["input"]).clamp(given["lower_clip"], given["upper_clip"])
        else:
            operation = getattr(torch, kind)
            found = operation(single(given["a"]), single(given["b"]))
        values[result] = found
    return found.to(case.out.dtype)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
@forms
def test_the_graph_in_eight_bits_computes_what_the_arithmetic_says(form, kernel, stride, frontend):
    case = in_bytes(form, CPU, kernel=kernel, stride=stride)
    assert case.engines() == ["cudnn-graph eng0", "cudnn-graph eng1", "cudnn-graph eng2"]
    [graph] = frontend.graphs
    kind = {"int8": "int8", "fp8": "e4m3"}[form]
    assert (graph.options["io_data_type"], graph.options["compute_data_type"]) == (kind, "float")
    assert graph.notes == ["nondeterministic", "reduced"]
    found, expected = evaluated(graph, case), case.expected()
    assert eight_bits.distance(found, expected, form) <= (form == "fp8")
    assert len(expected.float().unique()) > 20
    if form == "int8":
        halves = case.x[..., 0][..., None] % 2 == 1
        assert halves.any(), "there are ties"
    said = graph.operations[-1][2].said
    _, height, width, channels = case.out.shape
    step = case.out.stride(2)
    assert said == dict(
        name="out", output=True, data_type=kind, dim=[2, channels, height, width],
        stride=[height * width * step, 1, width * step, step],
    )  # fmt: skip


@forms
def test_a_launch_in_eight_bits(form, frontend):
    case = in_bytes(form, CPU)
    name = case.engines()[1]
    in_eight_bits.run_engine(name, case.x, case.layer, case.out, **case.options())
    [graph] = frontend.graphs
    pointers, _, index, _ = graph.executed[0]
    assert index == 1
    named = {n: pointers[heard] for n, heard in graph.inputs.items()}
    assert named["x"] == case.x.data_ptr()
    assert named["weight"] == case.layer.weight.data_ptr()
    assert named["scale"] == case.layer.multiplier.data_ptr()
    assert pointers[graph.operations[-1][2]] == case.out.data_ptr()
    assert len(pointers) == len(graph.inputs) + 1 == {"int8": 6, "fp8": 5}[form]
    if form == "int8":
        plans = cudnn_graph.plans.plans_for(
            cudnn_graph.describe(
                *in_eight_bits._of_graph(case.x, case.layer, case.out),
                stride=1, relu=True, tf32=False, levels=127,
            )
        )  # fmt: skip
        assert named["nearest"] == plans._nearest.data_ptr()
        assert plans._nearest.tolist() == [1.5 * 2**23]
    else:
        assert named["shift"] == case.layer.bias.data_ptr()


def test_what_is_not_put_to_cudnn_in_eight_bits(frontend):
    feature = torch.empty(0)
    case = in_bytes("int8", CPU)
    assert not case.engines(feature=feature)
    assert not case.engines(pool=True)
    assert not in_bytes("int8", CPU, levels=255).engines()
    assert not in_bytes("int8", CPU, c_in=24).engines()
    assert not in_bytes("int8", CPU, c_out=56).engines()
    wide = case.layer._replace(weight=case.layer.weight.to(torch.int16))
    assert not dataclasses.replace(case, layer=wide).engines()
    with torch.inference_mode():
        frozen = case.layer._replace(weight=case.layer.weight.clone())
        assert not dataclasses.replace(case, layer=frozen).engines()
    assert not frontend.graphs
    assert case.engines()
    case.layer.bias[3] = -(2**24)  # The verdict is that of another bias.
    assert not case.engines()


@pytest.mark.parametrize("largest", [2**24, 2**24 - 1])
def test_sums_that_fp32_does_not_hold(largest, frontend):
    case = in_bytes("int8", CPU)
    case.layer.weight.zero_()
    case.layer.weight[1] = -1
    case.layer.bias.zero_()
    case.layer.bias[1] = 127 * case.layer.weight[1].numel() - largest
    assert bool(case.engines()) == (largest < 2**24)


def test_in_a_capture_nothing_new_is_found_out(frontend, monkeypatch):
    known, new = (in_bytes("int8", CPU) for _ in range(2))
    assert known.engines()
    capturing = []
    monkeypatch.setattr(in_eight_bits, "_capturing", lambda tensor: not capturing)
    assert known.engines()
    assert not new.engines(), "its weights are not known"
    sums = in_eight_bits._kept(new.layer.weight, in_eight_bits._sums)
    assert in_eight_bits._kept(new.layer.weight, in_eight_bits._sums) is not sums
    capturing.append("no more")
    kept = in_eight_bits._kept(new.layer.weight, in_eight_bits._sums)
    assert in_eight_bits._kept(new.layer.weight, in_eight_bits._sums) is kept
    assert torch.equal(kept, sums)


@forms
def test_the_backend_offers_and_runs_it_in_eight_bits(form, frontend, monkeypatch):
    """And knows how long it takes, by prediction."""
    offered = []

    def choose(device, problem, candidates, static, run, **options):
        offered.append((problem, [name for name in candidates if name.startswith("cudnn-graph")]))
        offered[-1] += (candidates,)
        return offered[-1][1][-1] if offered[-1][1] else static

    monkeypatch.setattr(tuning, "choose", choose)
    case = in_bytes(form, CPU)
    untouched = case.out.clone()
    assert in_eight_bits.conv(case.x, case.layer, case.out, levels=case.t.levels) is None
    [graph] = frontend.graphs
    assert [index for _, _, index, _ in graph.executed] == [2]
    assert torch.equal(case.out.view(torch.uint8), untouched.view(torch.uint8))
    problem, names, candidates = offered[0]
    assert names == case.engines()
    assert problem.endswith(" and cudnn-graph")
    assert set(names) & set(candidates.likely) == {names[0]}
    assert 0 < candidates[names[0]] < 1e-3


@forms
def test_the_real_frontend_accepts_the_description_in_eight_bits(form):
    """Its own checks of the graph. All that comes after them asks the GPU."""
    reason = _optional.why_not("cudnn")
    if reason is not None:
        pytest.skip(reason)
    case = in_bytes(form, CPU, stride=2)
    problem = cudnn_graph.describe(
        *in_eight_bits._of_graph(case.x, case.layer, case.out),
        stride=2, relu=True, tf32=False, levels=case.t.levels,
    )  # fmt: skip
    try:
        graph = cudnn_graph.plans._build(cudnn_graph.installed.frontend(), problem).graph
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"it makes no graph without cuDNN or a GPU: {error}")
    try:
        graph.validate()
    except (ImportError, NotImplementedError) as error:
        pytest.skip(f"it checks no graph without a GPU: {error}")


# --------------------------------------------------------------------------------------
# What it computes
# --------------------------------------------------------------------------------------

_MISSING = cudnn_graph.why_not(torch.device("cuda", 0))


def on_gpu(test):
    skip = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))
    return pytest.mark.gpu(skip(test))


def offered(case, out):
    """The engines; for layers of this library there are always some."""
    names = case.engines(out)
    assert names, cudnn_graph.why_none(*case.tensors(out), **case.options())
    return names


def check(case, output, assert_accurate, *, crop=False):
    """Every engine, into a poisoned slot: values and guard bands."""
    dtype = case.x.dtype
    out = output(case.shape(), dtype, crop=crop)
    exact, eager = case.reference(torch.float64), case.reference(dtype)
    for name in offered(case, out.view):
        out.view.fill_(float("nan"))
        case.run(name, out.view)
        assert_accurate(out.view, eager, exact)
        out.assert_guards_untouched()


@on_gpu
@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("kernel", "stride"), GEOMETRIES)
def test_slot_to_slot(kernel, stride, kind, crop, layer, output, assert_accurate):
    case = layer(2, 19, 22, 64, 80, kind, kernel=kernel, stride=stride, crop=crop)
    check(case, output, assert_accurate, crop=crop)


@on_gpu
@pytest.mark.parametrize("size", [(1, 1), (1, 23), (17, 1)])
def test_odd_sizes(size, layer, output, assert_accurate):
    check(layer(2, *size, 32, 48, torch.float16), output, assert_accurate)


@on_gpu
@pytest.mark.parametrize(("c_in", "c_out"), [(24, 40), (160, 224), (768, 8)])
def test_channel_tails(c_in, c_out, layer, output, assert_accurate):
    check(layer(1, 9, 11, c_in, c_out, torch.float16), output, assert_accurate)


@on_gpu
def test_without_relu(layer, output, assert_accurate):
    case = layer(1, 9, 11, 32, 48, torch.float16, relu=False)
    check(case, output, assert_accurate)
    assert case.reference(torch.float64).min() < 0


@on_gpu
def test_slots_of_one_buffer(layer, assert_accurate, device):
    case = layer(2, 5, 19, 32, 48, torch.float16)
    buffer = torch.full((2, 5, 19, 96), float("nan"), dtype=torch.float16, device=device)
    buffer[..., :32] = case.x
    case.x, out = buffer[..., :32], buffer[..., 32:80]
    for name in offered(case, out):
        out.fill_(float("nan"))
        case.run(name, out)
        assert_accurate(out, case.reference(torch.float16), case.reference(torch.float64))
        assert buffer[..., 80:].isnan().all()


@on_gpu
def test_nan_and_inf(layer, output, assert_same_nonfinite):
    case = layer(1, 9, 19, 24, 40, torch.float16)
    case.x[0, 1, 1, 5] = float("nan")
    case.x[0, 7, 17, 23] = float("inf")
    case.x[0, 4, 9, 0] = float("-inf")
    out = output(case.shape(), torch.float16)
    for name in offered(case, out.view):
        out.view.zero_()
        case.run(name, out.view)
        assert_same_nonfinite(out.view, case.reference(torch.float64))


@on_gpu
def test_overflow_to_infinity(layer, output):
    case = layer(1, 9, 11, 24, 40, torch.float16)
    case.scale.fill_(1e6)
    out = output(case.shape(), torch.float16)
    expected = case.reference(torch.float64) > 65520
    assert expected.any()
    for name in offered(case, out.view):
        case.run(name, out.view)
        assert torch.equal(out.view.isinf(), expected)


@on_gpu
def test_the_same_bits_every_time(layer, output):
    case = layer(2, 50, 84, 128, 128, torch.bfloat16)
    out = output(case.shape(), torch.bfloat16).view
    for name in offered(case, out):
        case.run(name, out)
        expected = out.clone()
        for _ in range(5):
            case.run(name, out)
            assert torch.equal(out, expected)


@on_gpu
def test_it_follows_the_current_stream(layer, output):
    """The input is written late, on a side stream: who runs on another one reads zeros."""
    case = layer(1, 19, 22, 64, 80, torch.float16)
    out = output(case.shape(), torch.float16).view
    name = offered(case, out)[0]
    case.run(name, out)
    expected, values = out.clone(), case.x.clone()
    case.x.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # Clock cycles: about a tenth of a second.
        case.x.copy_(values)
        case.run(name, out)
    side.synchronize()
    assert torch.equal(out, expected)


@on_gpu
def test_a_captured_graph_equals_eager_launches(layer, output):
    case = layer(1, 19, 22, 64, 80, torch.float16)
    out = output(case.shape(), torch.float16).view
    for name in offered(case, out):
        case.run(name, out)  # It is compiled before the capture.
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            assert name in case.engines(out)
            case.run(name, out)
        for _ in range(2):
            case.x.normal_()
            case.run(name, out)
            expected = out.clone()
            out.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, expected)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device(layer, output, assert_accurate):
    case = layer(1, 19, 22, 64, 80, torch.float16)
    exact, eager = case.reference(torch.float64), case.reference(torch.float16)
    other = Layer(*(t.to("cuda:1") for t in (case.x, case.weight, case.scale, case.shift)))
    out = torch.empty(case.shape(), dtype=torch.float16, device="cuda:1")
    with torch.cuda.device(0):
        other.run(offered(other, out)[0], out)
        assert torch.cuda.current_device() == 0
    assert_accurate(out.to(exact.device), eager, exact)


@on_gpu
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
@forms
def test_eight_bits_from_slot_to_slot(form, kernel, stride, device):
    """In int8 bit for bit. cuDNN may have no plan for a format on an older GPU."""
    case = in_bytes(form, device, kernel=kernel, stride=stride, c_out=128)
    names = case.engines()
    if not names:
        problem = cudnn_graph.describe(
            *in_eight_bits._of_graph(case.x, case.layer, case.out),
            stride=stride, relu=True, tf32=False, levels=case.t.levels,
        )  # fmt: skip
        pytest.skip(str(cudnn_graph.plans.plans_for(problem)))
    expected = case.expected()
    for name in names:
        case.t.slots[-1].clear()
        in_eight_bits.run_engine(name, case.x, case.layer, case.out, **case.options())
        assert eight_bits.distance(case.out, expected, form) <= (form == "fp8"), name
        assert case.t.slots[-1].untouched()
