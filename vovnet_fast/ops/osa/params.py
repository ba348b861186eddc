"""A block's parameters, the slots of its concat buffer, what it asks of a backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...specs import Gate
from .. import conv
from ..conv import ConvParams, Kinds
from ..ese import check as check_ese
from ..memory import Memory


class BlockParams(NamedTuple):
    """Parameters of one OSA block.

    Attributes:
        layers: the L chained layers.
        concat: the 1x1 over the concat.
        reduction: a 1x1 before the first layer, or None.
        fc_weight, fc_bias: ``[C_out, C_out]`` and ``[C_out]`` of the eSE gate, or None.
        gate: its nonlinearity.
        identity: the block's input is added to its output.
    """

    layers: tuple[ConvParams, ...]
    concat: ConvParams
    reduction: ConvParams | None = None
    fc_weight: Tensor | None = None
    fc_bias: Tensor | None = None
    gate: Gate = "hard_sigmoid"
    identity: bool = False

    @property
    def in_channels(self) -> int:
        """Width of slot 0."""
        mid = self.layers[0].weight.shape[0]
        return self.concat.weight.shape[3] - len(self.layers) * mid

    @property
    def width(self) -> int:
        """Channels of the concat buffer."""
        return self.concat.weight.shape[3]

    @property
    def fixed(self) -> bool:
        """Whether all batch norms have fixed statistics."""
        return all(layer.eps is None for layer in self.convs())

    @property
    def plain(self) -> bool:
        """Whether the 1x1's output is the block's: no gate, no identity."""
        return self.fc_weight is None and not self.identity

    def convs(self) -> list[ConvParams]:
        """All convolution layers in the order in which they run."""
        first = [] if self.reduction is None else [self.reduction]
        return [*first, *self.layers, self.concat]

    def fcs(self) -> list[Tensor]:
        """Weight and bias of the gate, if there is one."""
        return [t for t in (self.fc_weight, self.fc_bias) if t is not None]

    def slots(self) -> list[slice]:
        """Channels of the layers' slots, 1 to L, in the concat buffer."""
        found, end = [], self.in_channels
        for layer in self.layers:
            found.append(slice(end, end + layer.weight.shape[0]))
            end = found[-1].stop
        return found


def new_buffer(
    memory: Memory, like: Tensor, size: tuple[int, int, int], params: BlockParams
) -> Tensor:
    """An uninitialised concat buffer for a block on maps of ``(N, H, W)``."""
    return memory.chained(like, *size, params.width)


def input_slot(buffer: Tensor, params: BlockParams) -> Tensor:
    """Slot 0, which the producer of the block's input fills."""
    return buffer[..., : params.in_channels]


_GATED = ("gates", "apply_gates")
_ADDED = ("apply_gates",)
_BACKWARD = ("apply_gates_backward",)
_GATED_BACKWARD = ("gate_sums", "gates_backward")


def needs(kinds: Kinds, *, gated: bool, identity: bool, backward: bool) -> tuple[str, ...]:
    """The functions of a backend that a block uses; see :meth:`Kinds.needs`.

    Args:
        kinds: of its layers.
        gated: it has an eSE gate.
        identity: its input is added to its output.
        backward: as there.
    """
    used = (
        (_GATED, gated),
        (_ADDED, identity and not gated),
        (_BACKWARD, backward),
        (_GATED_BACKWARD, backward and gated),
    )
    names = (name for names, needed in used if needed for name in names)
    return (*kinds.needs(backward=backward), *names)


def check(op: str, params: BlockParams, x: Tensor) -> None:
    """Refuse parameters that do not fit each other or the activations."""
    if not params.layers:
        raise ValueError(f"{op}: an OSA block needs at least one layer")
    channels = width = params.in_channels
    for layer in params.convs()[:-1]:
        conv.check(op, layer, x, width)
        width = layer.weight.shape[0]
        if layer.stride != 1:
            raise ValueError(f"{op}: layers of a block have stride 1, got {layer.stride}")
    conv.check(op, params.concat, x)
    c_out = params.concat.weight.shape[0]
    if (params.fc_weight is None) != (params.fc_bias is None):
        raise ValueError(f"{op}: give both fc_weight and fc_bias, or neither")
    if params.fc_weight is not None and params.fc_bias is not None:
        check_ese(op, params.fc_weight, params.fc_bias, params.gate, c_out, x)
    if params.identity and c_out != channels:
        raise ValueError(f"{op}: the identity add needs C_in == C_out, got {channels} and {c_out}")
