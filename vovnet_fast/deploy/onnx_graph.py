"""The ONNX graph of a folded network, made from its architecture: one node for each thing it does.

It is not traced. PyTorch has two exporters, which came, changed and went between its versions, and
what they leave depends on them: ``Constant``, ``Identity``, ``Shape`` and ``Cast`` nodes, names by
number, an opset of their own choosing that a converter then takes down. A VoVNet is data
(:mod:`vovnet_fast.specs`) and ten kinds of nodes, so that its graph is written down here as
:mod:`.folded` writes the network down: the same for every version of torch, byte for byte, with the
names of checkpoints, in the opset that is asked for.

==================================  ===========================================================
a layer                             ``Conv`` with a bias, ``Relu``; depthwise: ``Conv``, then these
the concat of a block               ``Concat``
the gate of a block                 ``GlobalAveragePool``, ``Conv``, ``HardSigmoid`` or ``Sigmoid``,
                                    ``Mul``
the identity of a block             ``Add``
the pool of a stage                 ``MaxPool``, in ceil mode where the network's is
the images and features             ``Cast``, where their dtype is another than that between them
==================================  ===========================================================

The gate is ``HardSigmoid``, whose slope and offset, 1/6 and 1/2, make it relu6(x + 3) / 6: TensorRT
reads it as one activation layer, where ``Add``, ``Clip`` and ``Div`` are three elementwise layers,
which it has to fuse again, and the ``Clip`` has inputs of its own. ``GlobalAveragePool`` it reads
as one reduction, with no axes among the inputs, which ``ReduceMean`` has since opset 18.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._version import __version__
from ..arithmetic import fp8
from ..compat import zip
from ..network.model import STAGE_NAMES
from ..ops import BlockParams, ConvParams, NetworkParams
from ..ops.features import sizes
from ..specs import FIRST_STAGE, BlockPlan, Gate, Pool, VoVNetSpec

IMAGE = "image"
"""Name of the input."""

AXES = ("batch", "height", "width")
"""What may be dynamic, in the order of a size."""

OLDEST_OPSET = 11
"""Of which ``Conv`` and ``MaxPool`` are what they have been since."""


class Node(NamedTuple):
    """A node, as ``onnx.helper.make_node`` takes it."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


class Nodes:
    """Nodes in the order in which they run, and what they read.

    Args:
        spec: the architecture.
        out_features: names of the features, which become those of the outputs.
        channels: of the images.
        io_dtype: of images and features.

    Attributes:
        nodes: in order.
        weights: by name, as ONNX lays them: ``[C_out, C_in, K, K]``.
    """

    def __init__(
        self,
        spec: VoVNetSpec,
        out_features: tuple[str, ...],
        channels: int,
        io_dtype: torch.dtype,
    ) -> None:
        self.nodes: list[Node] = []
        self.weights: dict[str, Tensor] = {}
        self.spec, self.out_features = spec, out_features
        self.channels, self.io_dtype = channels, io_dtype

    def counts(self) -> dict[str, int]:
        """How many nodes there are of each kind."""
        return dict(sorted(Counter(node.kind for node in self.nodes).items()))

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.weights.values())

    def add(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        """A node whose output is called as it is."""
        self.nodes.append(Node(kind, name, inputs, name, attributes))
        return name

    def add_conv(
        self, name: str, *inputs: str, kernel: list[int], stride: int = 1, group: int = 1
    ) -> str:
        """A convolution whose padding is half its kernel."""
        return self.add(
            "Conv", name, *inputs, kernel_shape=kernel, strides=[stride] * 2,
            pads=[k // 2 for k in kernel] * 2, dilations=[1, 1], group=group,
        )  # fmt: skip

    def add_max_pool(self, x: str, name: str, mode: Pool) -> str:
        """See :func:`vovnet_fast.reference.max_pool`."""
        if mode == "ceil":
            options: dict[str, Any] = dict(ceil_mode=1)
        else:
            options = dict(pads=[1, 1, 1, 1])
        return self.add("MaxPool", name, x, kernel_shape=[3, 3], strides=[2, 2], **options)

    def add_gate(self, x: str, name: str, kind: Gate) -> str:
        """Of logits."""
        if kind == "hard_sigmoid":
            return self.add("HardSigmoid", name, x, alpha=1 / 6, beta=0.5)
        return self.add("Sigmoid", name, x)


class Graph(Nodes):
    """That of a network in floating point.

    Args:
        params: of the network, with scales of one: they are in the weights.
        out_features: names of the features, which become those of the outputs.
        dtype: of weights and activations.
        io_dtype: of images and features.
    """

    def __init__(
        self,
        params: NetworkParams,
        out_features: tuple[str, ...],
        dtype: torch.dtype,
        io_dtype: torch.dtype,
    ) -> None:
        channels = params.stem[0].weight.shape[3]
        super().__init__(params.spec, out_features, channels, io_dtype)
        self.dtype = dtype
        self._network(params)

    # ----------------------------------------------------------------------------------
    # The network
    # ----------------------------------------------------------------------------------

    def _network(self, params: NetworkParams) -> None:
        spec, last = params.spec, self.out_features[-1]
        x = IMAGE
        if self.io_dtype != self.dtype:
            x = self._cast(IMAGE, f"{IMAGE}/inner", self.dtype)
        for name, layer in zip(("stem_1", "stem_2", "stem"), params.stem, strict=True):
            module = "stem.stem_3" if name == "stem" else f"stem.{name}"
            x = self._feature(name, self._conv_relu(x, module, layer))
            if name == last:
                return
        blocks = list(zip(spec.blocks(), params.blocks, strict=True))
        for number, name in enumerate(STAGE_NAMES, start=FIRST_STAGE):
            if number >= spec.first_pooled_stage:
                x = self.add_max_pool(x, f"{name}/pool", spec.pool)
            for plan, block in blocks:
                if plan.stage == number:
                    x = self._block(x, plan, block)
            x = self._feature(name, x)
            if name == last:
                return

    def _feature(self, name: str, x: str) -> str:
        """Let what was made last be the feature ``name``, if that is asked for."""
        if name not in self.out_features:
            return x
        if self.io_dtype != self.dtype:
            self._cast(x, name, self.io_dtype)
            return x
        self.nodes[-1] = self.nodes[-1]._replace(output=name)
        return name

    def _block(self, x: str, plan: BlockPlan, block: BlockParams) -> str:
        """See :func:`vovnet_fast.reference.osa_block`."""
        module = f"stage{plan.stage}.{plan.name}"
        slots, y = [x], x
        if block.reduction is not None:
            y = self._conv_relu(y, f"{module}.conv_reduction", block.reduction)
        for i, layer in enumerate(block.layers):
            y = self._conv_relu(y, f"{module}.layers.{i}", layer)
            slots.append(y)
        y = self.add("Concat", f"{module}/concat", *slots, axis=1)
        y = self._conv_relu(y, f"{module}.concat", block.concat)
        if block.fc_weight is not None and block.fc_bias is not None:
            gate = self.add("GlobalAveragePool", f"{module}.ese/pool", y)
            weight = block.fc_weight[:, :, None, None]
            gate = self._conv(gate, f"{module}.ese.fc", weight, block.fc_bias)
            gate = self.add_gate(gate, f"{module}.ese/gate", block.gate)
            y = self.add("Mul", f"{module}.ese/mul", y, gate)
        return self.add("Add", f"{module}/add", y, x) if block.identity else y

    def _conv_relu(self, x: str, module: str, layer: ConvParams) -> str:
        stride, weight = layer.stride, layer.weight.permute(0, 3, 1, 2)
        if layer.depthwise is not None:
            spatial = layer.depthwise.permute(2, 0, 1).unsqueeze(1)  # [C, 1, 3, 3]
            x = self._conv(x, f"{module}.dw_conv3x3", spatial, None, stride, spatial.shape[0])
            module, stride = f"{module}.pw_conv1x1", 1
        return self.add(
            "Relu", f"{module}/relu", self._conv(x, module, weight, layer.shift, stride)
        )

    # ----------------------------------------------------------------------------------
    # Nodes
    # ----------------------------------------------------------------------------------

    def _conv(
        self,
        x: str,
        module: str,
        weight: Tensor,
        bias: Tensor | None,
        stride: int = 1,
        group: int = 1,
    ) -> str:
        names = [f"{module}.weight"]
        self.weights[names[0]] = weight.to(self.dtype)
        if bias is not None:
            names.append(f"{module}.bias")
            self.weights[names[1]] = bias.to(self.dtype)
        kernel = list(weight.shape[2:])
        return self.add_conv(f"{module}/conv", x, *names, kernel=kernel, stride=stride, group=group)

    def _cast(self, x: str, output: str, dtype: torch.dtype) -> str:
        self.nodes.append(Node("Cast", f"{output}/cast", (x,), output, dict(to=dtype)))
        return output


def to_proto(graph: Nodes, size: tuple[int, int, int], dynamic: frozenset[str], opset: int) -> Any:
    """An ``onnx.ModelProto``.

    Args:
        graph: the network.
        size: N, H, W of the images.
        dynamic: which of :data:`AXES` are free, and then called by that name.
        opset: of ONNX's own domain.
    """
    import onnx
    from onnx import helper

    kinds = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16}
    io = kinds[graph.io_dtype]

    def node(of: Node) -> Any:
        attributes = {k: kinds.get(v, v) if k == "to" else v for k, v in of.attributes.items()}
        return helper.make_node(of.kind, of.inputs, [of.output], of.name, **attributes)

    image, *features = _dimensions(graph, size, dynamic)
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(
        helper.make_graph(
            [node(each) for each in graph.nodes],
            graph.spec.name,
            [helper.make_tensor_value_info(IMAGE, io, image)],
            [
                helper.make_tensor_value_info(name, io, dims)
                for name, dims in zip(graph.out_features, features, strict=True)
            ],
            [_initializer(name, weight) for name, weight in graph.weights.items()],
        ),
        producer_name="vovnet_fast",
        producer_version=__version__,
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
    )
    helper.set_model_props(model, {"spec": graph.spec.encode()})
    return model


def _initializer(name: str, weight: Tensor) -> Any:
    """A tensor; NumPy has no numbers of e4m3."""
    import onnx
    from onnx import helper, numpy_helper

    weight = weight.contiguous()
    if weight.dtype != fp8.ACTIVATION:
        return numpy_helper.from_array(weight.numpy(), name)
    data, kind = weight.view(torch.uint8).numpy().tobytes(), onnx.TensorProto.FLOAT8E4M3FN
    return helper.make_tensor(name, kind, list(weight.shape), data, raw=True)


def _dimensions(
    graph: Nodes, size: tuple[int, int, int], dynamic: frozenset[str]
) -> list[list[int | str]]:
    """Of the images, and of every feature: numbers, and names of what is free."""
    n, h, w = (axis if axis in dynamic else length for axis, length in zip(AXES, size, strict=True))
    found: list[list[int | str]] = [[n, graph.channels, h, w]]
    maps, channels = sizes(graph.spec, *size[1:]), graph.spec.feature_channels()
    for name in graph.out_features:
        rows: int | str = f"{name}_height" if "height" in dynamic else maps[name][0]
        columns: int | str = f"{name}_width" if "width" in dynamic else maps[name][1]
        found.append([n, channels[name], rows, columns])
    return found
