"""The ONNX graph of a network in eight bits: that of :mod:`vovnet_fast.deploy.onnx_graph`, with
``QuantizeLinear`` and ``DequantizeLinear`` where numbers are rounded (QDQ).

Runtimes want one scale for a tensor of activations, one for each output channel of weights, and
zero points of zero. What this package has beyond that is written so that the integers stay the
same:

==========================  ===================================================================
a layer                     ``DequantizeLinear`` of the bytes and of the weights, ``Conv``,
                            ``Relu``, ``QuantizeLinear``
the slots of a concat       have a scale each, which the 1x1 has in its weights by input channel.
                            To the ``Concat`` each slot's bytes are dequantised by one common scale,
                            which is the scale of what that gives: bytes are copied
a depthwise layer           has a scale and a zero point for each channel. Its weights are given
                            scales such that all channels of its output have the same one; zero
                            points are a bias of it, and the ReLU after that cuts where bytes begin
the images                  ``QuantizeLinear``; of a wide stem none, its layer is in fp32
gate, identity              in fp32, by dequantised bytes and weights
==========================  ===================================================================

So sums are those of :mod:`vovnet_fast.arithmetic`. What is rounded differs where a runtime divides
by a scale and that multiplies, at ties: by one step. Gates differ by their rounding to 15 bits, and
images below their range by one step (-128).

Activations of 127 levels are int8, whose range ends where theirs does, as TensorRT wants them;
those of 255 are uint8, as ONNX Runtime wants them. In fp8 they are ``FLOAT8E4M3FN``, which has a
sign: nothing cuts what a depthwise convolution makes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arithmetic import fp8, int8
from ..arithmetic.layers import QuantizedConv, QuantizedNetwork
from ..compat import zip
from ..deploy.onnx_graph import IMAGE as INPUT
from ..deploy.onnx_graph import Nodes
from ..specs import BlockPlan, Pool
from .straight_through import dequantized
from .walking import DEPTHWISE, IMAGE, Walker, walk

OLDEST_OPSET = 13
"""The first whose weights have a scale for each channel."""

OLDEST_OPSET_OF_FP8 = 19
"""The first that has e4m3."""

MIDDLE = 128
"""What stands for zero where images are uint8."""


class Value(NamedTuple):
    """An activation.

    Attributes:
        name: see :mod:`.walking`.
        x: the tensor in fp32, before it is rounded.
        scale: the value of one step.
    """

    name: str
    x: str
    scale: float


def quantized(name: str) -> str:
    """The tensor of the bytes of an activation."""
    return f"{name}/quantized"


class QdqGraph(Nodes, Walker[Value]):
    """That of a network in int8 or fp8.

    Args:
        network: the network.
    """

    def __init__(self, network: QuantizedNetwork) -> None:
        channels = network.layers["stem_1"].weight.shape[3]
        super().__init__(network.spec, network.out_features, channels, torch.float32)
        self._network, self._whole = network, network.dtype == "int8"
        self._byte = torch.int8 if network.levels == int8.LARGEST else torch.uint8
        if not self._whole:
            assert fp8.ACTIVATION is not None
            self._byte = fp8.ACTIVATION
        self._made: set[str] = set()
        self._pools = 0
        image = Value(IMAGE, INPUT, network.scales[IMAGE])
        found = walk(self, network.spec, image, network.out_features)
        self._name_outputs([value.x for value in found])

    # ----------------------------------------------------------------------------------
    # The network
    # ----------------------------------------------------------------------------------

    def conv(self, name: str, inputs: list[Value], feature: bool) -> Value:
        layer = self._network.layers[name]
        if name == "stem_1" and self._network.wide_stem:
            y = self._in_fp32(name, inputs[0].x, *dequantized(layer), layer.stride)
        elif layer.depthwise is not None:
            y = self._layer(name, self._depthwise(name, inputs[0], layer), layer, 1)
        else:
            x = inputs[0] if len(inputs) == 1 else self._concat(name, inputs)
            y = self._layer(name, x, layer, layer.stride)
        return Value(name, self.add("Relu", name, y), layer.scale)

    def finish(self, plan: BlockPlan, z: Value, x: Value | None, feature: bool) -> Value:
        y = read = self._read(z)
        if plan.ese:
            gate, ese = self._network.gates[plan.name], f"{plan.name}_ese"
            hard = gate.kind == "hard_sigmoid"
            per_unit = gate.most / 6 if hard else int8.TABLE / (2 * int8.TABLE_REACH)
            # What is added to logits of integers is in their bias.
            added, per_unit = (3 if hard else int8.TABLE_REACH, per_unit) if self._whole else (0, 1)
            unit = gate.multiplier.double() / per_unit
            weight = gate.weight.double() * unit[:, None] * (gate.mean_scale / z.scale)
            bias = gate.bias.double() * unit - added
            mean = self.add("GlobalAveragePool", f"{ese}/pool", read)
            logits = self._in_fp32(ese, mean, weight[:, None, None], bias)
            y = self.add("Mul", f"{ese}/mul", read, self.add_gate(logits, f"{ese}/gate", gate.kind))
        if x is not None:
            y = self.add("Add", f"{plan.name}/add", y, self._read(x))
        return Value(plan.name, y, self._network.scales[plan.name])

    def pool(self, x: Value, mode: Pool) -> Value:
        self._pools += 1
        name = f"stage{self.spec.first_pooled_stage + self._pools - 1}/pool"
        return Value(name, self.add_max_pool(self._read(x), name, mode), x.scale)

    def _concat(self, name: str, slots: list[Value]) -> Value:
        """Bytes side by side: the scales of the slots are in the weights that read them."""
        scale = max(slot.scale for slot in slots)
        read = [
            self._dequantize(f"{name}/slot_{i}", self._quantize(slot), scale, self._zero(slot))
            for i, slot in enumerate(slots)
        ]
        slots_name = f"{name}/slots"
        return Value(slots_name, self.add("Concat", slots_name, *read, axis=1), scale)

    def _depthwise(self, name: str, source: Value, layer: QuantizedConv) -> Value:
        spatial = layer.depthwise
        assert spatial is not None
        scale = spatial.scale.max().item()
        scales = spatial.multiplier.double() * (scale / source.scale)
        kernel = spatial.weight.permute(2, 0, 1).unsqueeze(1)  # [C, 1, 3, 3]
        # Zero points as biases: the ReLU is the lower end of the range of the bytes.
        y = self._conv(
            f"{name}{DEPTHWISE}", source, kernel, scales, spatial.zero * scale, layer.stride
        )
        y = self.add("Relu", name + DEPTHWISE, y) if self._whole else y
        return Value(name + DEPTHWISE, y, scale)

    def _layer(self, name: str, x: Value, layer: QuantizedConv, stride: int) -> str:
        scales, bias = layer.unit.double() / x.scale, layer.bias.double() * layer.unit.double()
        return self._conv(name, x, layer.weight.permute(0, 3, 1, 2), scales, bias, stride)

    def _conv(
        self, name: str, x: Value, weight: Tensor, scales: Tensor, bias: Tensor, stride: int
    ) -> str:
        """``weight`` is ``[C_out, C_in, K, K]`` bytes, a depthwise one ``[C, 1, 3, 3]``."""
        zeros = f"zeros_{len(scales)}"
        self.weights.setdefault(zeros, torch.zeros(len(scales)).to(weight.dtype))
        group = len(weight) if name.endswith(DEPTHWISE) else 1
        dequantized = self.add(
            "DequantizeLinear",
            f"{name}.weight/dequantized",
            self._hold(f"{name}.weight", weight),
            self._hold(f"{name}.weight.scale", scales.float()),
            zeros,
            axis=0,
        )
        return self.add_conv(
            f"{name}/conv", self._read(x), dequantized, self._hold(f"{name}.bias", bias.float()),
            kernel=list(weight.shape[2:]), stride=stride, group=group,
        )  # fmt: skip

    def _in_fp32(self, name: str, x: str, weight: Tensor, bias: Tensor, stride: int = 1) -> str:
        """``weight`` is ``[C_out, K, K, C_in]``, or ``[C_out, 1, 1, C_in]``."""
        kernel = list(weight.shape[1:3])
        names = (
            self._hold(f"{name}.weight", weight.permute(0, 3, 1, 2).float()),
            self._hold(f"{name}.bias", bias.float()),
        )
        return self.add_conv(f"{name}/conv", x, *names, kernel=kernel, stride=stride)

    # ----------------------------------------------------------------------------------
    # Rounding
    # ----------------------------------------------------------------------------------

    def _read(self, value: Value) -> str:
        """What a layer reads: fp32 of bytes."""
        name = f"{value.name}/dequantized"
        if name not in self._made:
            self._dequantize(name, self._quantize(value), value.scale, self._zero(value))
        return name

    def _quantize(self, value: Value) -> str:
        name = quantized(value.name)
        if name not in self._made:
            self._made.add(name)
            scale = self._hold(f"{name}.scale", torch.tensor(value.scale, dtype=torch.float32))
            self.add("QuantizeLinear", name, value.x, scale, self._zero(value))
        return name

    def _dequantize(self, name: str, q: str, scale: float, zero: str) -> str:
        self._made.add(name)
        held = self._hold(f"{name}.scale", torch.tensor(scale, dtype=torch.float32))
        return self.add("DequantizeLinear", name, q, held, zero)

    def _zero(self, value: Value) -> str:
        """The zero point of activations. In uint8 that of images is in the middle."""
        signed = value.name == IMAGE and self._byte == torch.uint8
        name = "zero_of_images" if signed else "zero"
        self.weights.setdefault(name, torch.tensor(MIDDLE if signed else 0).to(self._byte))
        return name

    def _hold(self, name: str, tensor: Tensor) -> str:
        self.weights[name] = tensor.detach().cpu()
        return name

    def _name_outputs(self, features: list[str]) -> None:
        """Outputs are called as the features are."""
        names = dict(zip(features, self.out_features, strict=True))
        self.nodes = [
            node._replace(
                inputs=tuple(names.get(each, each) for each in node.inputs),
                output=names.get(node.output, node.output),
            )
            for node in self.nodes
        ]
