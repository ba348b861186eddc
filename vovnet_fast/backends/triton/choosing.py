"""The kernels, on first use, and the choice among them and the engines of libraries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ... import tuning
from .._predict import candidates


@functools.cache
def load_kernels() -> Any:
    """The kernels, imported on first use: importing the package never needs Triton."""
    from ... import kernels
    from ...kernels import (  # noqa: F401
        accumulate,
        batch_norm,
        batch_norm_backward,
        conv,
        conv_eight_bits,
        conv_eight_bits_config,
        conv_weight_grad,
        cost,
        depthwise,
        depthwise_eight_bits,
        device,
        epilogue,
        ese,
        ese_backward,
        ese_eight_bits,
        max_pool,
        pack,
    )

    return kernels


def form(layer: Any, x: Tensor) -> str:
    """The preferred form of Triton's configurations, which depends on how the tensors lie."""
    kernels = load_kernels()
    return kernels.cost.configurations(layer, kernels._common.capability(x.device))[0].form


def choose(
    x: Tensor,
    layer: Any,
    key: str,
    libraries: Sequence[str],
    run: Callable[[str], None],
    prepare: Callable[[], tuning.Trial],
) -> str:
    """The fastest of some libraries' engines and of Triton's configurations for a layer."""
    kernels = load_kernels()
    static = kernels.cost.static_choice(layer, kernels.device.of(x.device))
    found = candidates(layer, x.device, *libraries)
    return tuning.choose(x.device, key, found, static.name, run, prepare=prepare)
