"""The backend of Triton kernels: the signatures of :mod:`vovnet_fast.backends`.

Runs on NVIDIA GPUs of compute capability 8.0 and newer, and, for tests, on CPU
tensors in Triton's interpreter (``TRITON_INTERPRET=1``).

===============================  =========================================================
:mod:`.convolution`              convolutions: on which engine, and on one
:mod:`.convolution_gradients`    their gradients, likewise
:mod:`.passes`                   all the other functions
:mod:`.choosing`                 the kernels, and the choice among them and libraries
:mod:`.int8`, :mod:`.fp8`        the ops of :mod:`vovnet_fast.arithmetic`, by :mod:`.eight_bits`
===============================  =========================================================
"""

from __future__ import annotations

import torch

from ... import _optional
from .._engines import ATEN
from .convolution import (
    choose_engine,
    choose_statistics_engine,
    conv,
    conv_statistics,
    run_engine,
    run_statistics_engine,
)
from .convolution_gradients import (
    choose_input_grad_engine,
    choose_weight_grad_engine,
    conv_input_grad,
    conv_weight_grad,
    run_input_grad_engine,
    run_weight_grad_engine,
)
from .passes import (
    apply_gates,
    apply_gates_backward,
    batch_norm_finish,
    batch_norm_input_grad,
    batch_norm_merge,
    batch_norm_sums,
    depthwise,
    depthwise_input_grad,
    depthwise_weight_grad,
    gate_sums,
    gates,
    gates_backward,
    max_pool,
    max_pool_backward,
    normalize,
)

__all__ = [
    "ATEN",
    "MIN_CAPABILITY",
    "apply_gates",
    "apply_gates_backward",
    "batch_norm_finish",
    "batch_norm_input_grad",
    "batch_norm_merge",
    "batch_norm_sums",
    "choose_engine",
    "choose_input_grad_engine",
    "choose_statistics_engine",
    "choose_weight_grad_engine",
    "conv",
    "conv_input_grad",
    "conv_statistics",
    "conv_weight_grad",
    "depthwise",
    "depthwise_input_grad",
    "depthwise_weight_grad",
    "gate_sums",
    "gates",
    "gates_backward",
    "max_pool",
    "max_pool_backward",
    "normalize",
    "run_engine",
    "run_input_grad_engine",
    "run_statistics_engine",
    "run_weight_grad_engine",
    "sources",
    "why_not",
]

MIN_CAPABILITY = (8, 0)


_SOURCES = {
    "conv": "kernels.conv kernels.epilogue",
    "conv_statistics": "kernels.conv kernels.epilogue",
    "conv_input_grad": "kernels.accumulate kernels.conv kernels.pack",
    "conv_weight_grad": "kernels.conv_weight_grad",
    "normalize": "kernels.epilogue",
    "batch_norm_merge": "kernels.batch_norm",
    "batch_norm_finish": "kernels.batch_norm",
    "batch_norm_sums": "kernels.batch_norm_backward",
    "batch_norm_input_grad": "kernels.batch_norm_backward",
    "depthwise": "kernels.depthwise",
    "depthwise_input_grad": "kernels.depthwise",
    "depthwise_weight_grad": "kernels.depthwise",
    "gates": "kernels.ese",
    "gates_backward": "kernels.ese_backward",
    "gate_sums": "kernels.ese_backward",
    "apply_gates": "kernels.ese",
    "apply_gates_backward": "kernels.ese_backward",
    "max_pool": "kernels.max_pool",
    "max_pool_backward": "kernels.max_pool",
}

_ROOMS = {
    "conv": "convolution",
    "conv_statistics": "convolution",
    "conv_input_grad": "convolution_gradients",
    "conv_weight_grad": "convolution_gradients",
}
"""Where a function is that is not in :mod:`.passes`."""


def sources(function: str) -> tuple[str, ...]:
    """Modules of this package that compute a function with static choices.

    What kernels import from each other is not named (:mod:`vovnet_fast.selfcheck.sources`), nor
    what only offers and ranks engines.
    """
    rooms = ("choosing", _ROOMS.get(function, "passes"))
    own = (f"backends.triton.{room}" for room in rooms)
    return (*own, "backends._engines", *_SOURCES[function].split())


def why_not(device: torch.device | None) -> str | None:
    """The reason why the kernels cannot run on ``device`` (None: on any device here)."""
    reason = _optional.why_not("triton")
    if reason is not None:
        return reason
    from ...kernels._common import interpreted

    if interpreted():
        return None
    if device is not None and device.type != "cuda":
        return f"it needs tensors on an NVIDIA GPU, these are on {device}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch sees no NVIDIA GPU"
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        return f"compute capability {found[0]}.{found[1]} is below 8.0 (Ampere)"
    return None
