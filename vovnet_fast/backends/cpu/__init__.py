"""The backend of the extension's CPU half: the signatures of :mod:`vovnet_fast.backends`.

All run on torch's own threads (csrc/cpu). Convolutions and the gradients of their inputs are
:mod:`.convolution`'s, those of their weights :mod:`.weight_grad`'s, and depthwise layers
:mod:`.depthwise_layers`'s. Passes of training steps are recorded and repeated (:mod:`.repeats`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension
from . import convolution, depthwise_layers, repeats, weight_grad

_ops = _extension.CPU

_CONVOLUTIONS = ("conv", "conv_statistics", "conv_input_grad")


def why_not(device: torch.device | None) -> str | None:
    """The reason why it cannot run on ``device`` (None: on any device here)."""
    if device is not None and device.type != "cpu":
        return f"it needs tensors on the CPU, these are on {device}"
    return _extension.why_not("cpu")


def variant() -> str:
    """What it runs on here, of several possibilities."""
    return f"instruction set {_extension.load('cpu').isa()}"


def sources(function: str) -> tuple[str, ...]:
    """Modules of this package that compute a function."""
    own: tuple[str, ...] = ()
    if function in _CONVOLUTIONS:
        rooms = ("convolution", "packing", "scratch", "unpacked", "winograd")
        own = ("backends._steps", *(f"backends.cpu.{room}" for room in rooms))
    elif function == "depthwise":
        own = ("backends.cpu.depthwise_layers",)
    elif function == "conv_weight_grad":
        own = (
            "backends.cpu.convolution",
            "backends.cpu.scratch",
            "backends.cpu.unpacked",
            "backends.cpu.weight_grad",
        )
    return ("backends.cpu.__init__", *own, *_extension.SOURCES)


WEIGHTS_AS_THEY_ARE = True


def copy(x: Tensor, out: Tensor) -> None:
    """See :mod:`vovnet_fast.backends`."""
    _ops.epilogue(x, None, None, out, relu=False)


def depthwise_taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    taps = weight.new_empty(weight.shape, dtype=dtype)
    _ops.pack(weight[None], None, taps[None])
    return taps


conv = convolution.conv
conv_statistics = convolution.conv_statistics
conv_input_grad = convolution.conv_input_grad
conv_weight_grad = weight_grad.conv_weight_grad
normalize = _ops.normalize
batch_norm_merge = _ops.batch_norm_merge
batch_norm_finish = _ops.batch_norm_finish
batch_norm_sums = _ops.batch_norm_sums
batch_norm_input_grad = _ops.batch_norm_input_grad
depthwise_conv = depthwise_layers.depthwise_conv
depthwise_conv_statistics = depthwise_layers.depthwise_conv_statistics
depthwise = _ops.depthwise
depthwise_input_grad = _ops.depthwise_input_grad
depthwise_weight_grad = _ops.depthwise_weight_grad
gates = _ops.gates
gates_backward = _ops.gates_backward
gate_sums = _ops.gate_sums
apply_gates = _ops.apply_gates
apply_gates_backward = _ops.apply_gates_backward
max_pool = _ops.max_pool
max_pool_backward = _ops.max_pool_backward
repeat = repeats.repeat
