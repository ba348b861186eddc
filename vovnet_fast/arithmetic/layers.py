"""What the ops of a quantised network are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..specs import Gate, VoVNetSpec


class QuantizedDepthwise(NamedTuple):
    """A depthwise 3x3, which has neither bias nor ReLU: its output has a zero point.

    The 1x1 after it has no padding, so that zero points are a constant of its bias; and its
    weights take up a scale for each channel.

    Attributes:
        weight: ``[3, 3, C]`` int8 (e4m3).
        multiplier: ``[C]`` fp32, ``unit / scale``.
        zero: ``[C]`` uint8, the byte that stands for zero. Zeros in fp8, which is signed.
        unit: ``[C]`` fp32, the value of one unit of the accumulator.
        scale: ``[C]`` fp32, the value of one step of the output.
    """

    weight: Tensor
    multiplier: Tensor
    zero: Tensor
    unit: Tensor
    scale: Tensor


class QuantizedConv(NamedTuple):
    """A convolution and its ReLU.

    A kernel needs the first three and, for features, ``unit``; the rest says what the numbers mean.

    Attributes:
        weight: ``[C_out, K, K, C_in]`` int8 (e4m3), K = 1 or 3, padding K // 2. Of a wide stem's
            first layer int16 (fp32), whose images are int16 (fp32).
        bias: ``[C_out]`` int32 (fp32), in units of the accumulator, zero points taken off.
        multiplier: ``[C_out]`` fp32, ``unit / scale``.
        unit: ``[C_out]`` fp32, the value of one unit of the accumulator.
        stride: of the convolution, or of the depthwise one before it.
        depthwise: a depthwise 3x3 that comes first, or None.
        in_scales: ``[C_in]`` fp32, the value of a step of each input channel: for a 1x1 over the
            concat those of its slots.
        in_zeros: ``[C_in]`` uint8, the zero points of the input, or None for zeros.
        scale: the value of one step of the output.
    """

    weight: Tensor
    bias: Tensor
    multiplier: Tensor
    unit: Tensor
    stride: int
    depthwise: QuantizedDepthwise | None
    in_scales: Tensor
    in_zeros: Tensor | None
    scale: float


class QuantizedGate(NamedTuple):
    """The fully connected layer of an eSE, and its gate.

    ``hard_sigmoid``: ``clamp(float32(acc) * multiplier, 0, most)``, rounded, with the 3 of
    relu6(x + 3) / 6 in the bias. ``sigmoid``: ``table[clamp(float32(acc) * multiplier, 0, 2047)]``,
    the index rounded, with :data:`TABLE_REACH` in the bias.

    Attributes:
        weight: ``[C, C]`` int16 (fp32 in fp8).
        bias: ``[C]`` int32 (fp32), in units of the accumulator.
        multiplier: ``[C]`` fp32.
        mean_scale: steps of the mean for one step of activations (1 in fp8).
        most: the gate 1: ``s_z / s_out * 2**shift``, rounded (not in fp8).
        kind: of the gate.
        table: ``[2048]`` int32, the gates of a ``sigmoid`` by logit; None else, and in fp8.
    """

    weight: Tensor
    bias: Tensor
    multiplier: Tensor
    mean_scale: int
    most: float
    kind: Gate
    table: Tensor | None


class QuantizedSum(NamedTuple):
    """The end of a block: ``out = (z * gate + x * identity) * 2**-shift``.

    In int8 both factors are integers below 2**15, so that the sum is below 2**24, exact in int32
    and in fp32 alike, fused or not.

    Attributes:
        gate: of a block without an eSE, ``s_z / s_out * 2**shift``; of others not read.
        identity: ``s_x / s_out * 2**shift``, 0 where there is no identity.
        shift: binary digits behind the point (0 in fp8).
        scale: s_out, the value of one step of the output.
    """

    gate: float
    identity: float
    shift: int
    scale: float


@dataclass(frozen=True)
class QuantizedNetwork:
    """A quantised network, as far as its features need it.

    Attributes:
        spec: the architecture.
        dtype: ``int8`` or ``fp8``.
        levels: the largest activation of int8, 127 or 255; 448 in fp8.
        wide_stem: images and the weights of the first layer are int16 (fp32 in fp8) and not int8.
        out_features: names of the features, in network order.
        layers: convolutions by name, in the order in which they run; see
            :func:`vovnet_fast.quantization.walking.walk`.
        gates: by the name of the block.
        sums: by the name of the block, of those that end in a gate or an identity.
        scales: the value of one step of each activation: ``image``, layers, and blocks with a sum.
    """

    spec: VoVNetSpec
    dtype: str
    levels: int
    wide_stem: bool
    out_features: tuple[str, ...]
    layers: dict[str, QuantizedConv]
    gates: dict[str, QuantizedGate]
    sums: dict[str, QuantizedSum]
    scales: dict[str, float]
