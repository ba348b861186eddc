"""How many FLOP the ops stand for, to ``torch.utils.flop_counter.FlopCounterMode``.

Two for a product and its sum, of convolutions and of the gates' fully connected layers, as it
counts them for PyTorch's own: norms, ReLU and pools count nothing. Its module takes half a second
to import, so that formulas are registered where it is there, at the first op that it sees.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..compat import zip
from .features import decode, sizes
from .osa.saving import RECOMPUTE

Shape = Sequence[int]


def _convs(x: Shape, weights: Sequence[Shape], strides: Sequence[int]) -> list[int]:
    """FLOP of every layer of a chain, and those of the 1x1 over the concat after it."""
    n, _, h, w = x
    found = []
    for (c_out, k, _, c_in), stride in zip(weights, strides, strict=True):
        h, w = (h - 1) // abs(stride) + 1, (w - 1) // abs(stride) + 1
        depthwise = 9 if stride < 0 else 0
        found.append(2 * n * h * w * c_in * (c_out * k * k + depthwise))
    return found


def _backward(layers: Sequence[int], needs: Sequence[bool]) -> int:
    """Of gradients: of every layer's weights, and of its input where something before needs it.

    ``needs`` begins with the input, and goes on with weights, scales and shifts of all layers.
    """
    n = len(layers)
    total = 0
    for i, flop in enumerate(layers):
        before = needs[0] or any(any(needs[1 + k * n : 1 + k * n + i]) for k in range(3))
        total += flop * (int(needs[1 + i]) + int(before))
    return total


def _gate(x: Shape, fcs: Sequence[Shape]) -> int:
    return 2 * x[0] * fcs[0][0] ** 2 if fcs else 0


def _conv_chain(
    x: Shape, weights: list[Shape], scales: Any, shifts: Any, depthwise: Any, strides: list[int],
    *_: Any, out_shape: Any = None,
) -> int:  # fmt: skip
    return sum(_convs(x, weights, strides))


def _conv_chain_backward(
    x: Shape, weights: list[Shape], scales: Any, shifts: Any, depthwise: Any, strides: list[int],
    *rest: Any, out_shape: Any = None,
) -> int:  # fmt: skip
    return _backward(_convs(x, weights, strides), rest[-1])


def _osa_block(
    x: Shape, weights: list[Shape], scales: Any, shifts: Any, depthwise: Any, strides: list[int],
    epsilons: Any, group: Any, fcs: list[Shape], *_: Any, out_shape: Any = None,
) -> int:  # fmt: skip
    return sum(_convs(x, weights, strides)) + _gate(x, fcs)


def _osa_block_backward(
    x: Shape, weights: list[Shape], scales: Any, shifts: Any, depthwise: Any, strides: list[int],
    epsilons: Any, group: Any, fcs: list[Shape], reduction: Any, gate: Any, identity: Any,
    keep: int, *rest: Any, out_shape: Any = None,
) -> int:  # fmt: skip
    layers, needs = _convs(x, weights, strides), rest[-1]
    again = sum(layers) + _gate(x, fcs) if keep == RECOMPUTE else 0
    before = any(needs[: -len(fcs)]) if fcs else False
    return again + _backward(layers, needs) + _gate(x, fcs) * (needs[-2] + before if fcs else 0)


def _ese(x: Shape, fc_weight: Shape, *_: Any, out_shape: Any = None) -> int:
    return _gate(x, [fc_weight])


def _ese_backward(
    dout: Shape, x: Shape, gates: Any, mean: Any, fc_weight: Shape, *_: Any, out_shape: Any = None
) -> int:
    return 2 * _gate(x, [fc_weight])


def _features(
    x: Shape, weights: list[Shape], scales: Any, shifts: Any, depthwise: Any, strides: list[int],
    fcs: list[Shape], spec: str, out_features: str, out_shape: Any = None,
) -> int:  # fmt: skip
    architecture = decode(spec)
    last, maps = out_features.split(",")[-1], sizes(architecture, x[2], x[3])
    stem = 2 if last == "stem_2" else 3
    total = sum(_convs(x, weights[:stem], strides[:stem]))
    first, gates = 3, iter(fcs[::2])
    for block in architecture.blocks():
        if not last.startswith("stage") or block.stage > int(last.removeprefix("stage")):
            break
        end = first + block.reduction + block.num_layers + 1
        image = (x[0], block.in_channels, *maps[f"stage{block.stage}"])
        gate = [next(gates)] if block.ese else []
        total += sum(_convs(image, weights[first:end], strides[first:end])) + _gate(image, gate)
        first = end
    return total


FORMULAS = {
    "conv_chain": _conv_chain,
    "conv_chain_backward": _conv_chain_backward,
    "osa_block": _osa_block,
    "osa_block_backward": _osa_block_backward,
    "ese": _ese,
    "ese_backward": _ese_backward,
    "features": _features,
}


def let_count() -> None:
    """Give the formulas to the counters that are looking, and to those that will be made."""
    counting: Any = sys.modules.get("torch.utils.flop_counter")
    if not hasattr(counting, "flop_registry"):  # torch 2.2 counts no ops but its own.
        return
    formulas = {getattr(torch.ops.vovnet_fast, name): f for name, f in FORMULAS.items()}
    if not formulas.keys() <= counting.flop_registry.keys():
        for op, formula in formulas.items():
            counting.register_flop_formula(op)(formula)
    for mode in _get_current_dispatch_mode_stack():
        # A counter copied what was registered when it was made.
        own = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if own is not None:
            for op in formulas:
                own.setdefault(op, counting.flop_registry[op])
