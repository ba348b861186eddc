"""What the launch of each Triton kernel reads, writes and multiplies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .work import (
    DEPTHWISE,
    ESE_BACKWARD,
    ESE_POOL,
    NORM_BACKWARD,
    POINTWISE,
    POOL,
    STATISTICS,
    Work,
    bytes_of,
)

if TYPE_CHECKING:
    from ...kernels._common import Launch


@dataclass(frozen=True)
class _Kernel:
    """How to read a launch of one Triton kernel.

    Attributes:
        kind: with the kernel's constants in braces.
        outputs: arguments that it writes, the result first. It reads all others.
        multiply_adds: for one element of the result, from the kernel's arguments by name.
    """

    kind: str
    outputs: tuple[str, ...] = ("out_ptr",)
    multiply_adds: Callable[[dict[str, Any]], int | Fraction] = field(default=lambda arguments: 0)


def conv_weight(arguments: dict[str, Any]) -> Tensor:
    """The weights that a convolution kernel is given, ``[C_out, K, K, C_in]`` or flattened."""
    return arguments["w_ptr"] if "w_ptr" in arguments else arguments["w_desc_0"].base


def _conv_multiply_adds(arguments: dict[str, Any]) -> int:
    every = conv_weight(arguments)[0].numel()
    # An input pixel has met one tap in four of a transposed convolution, on average.
    return every // arguments["STRIDE"] ** 2 if arguments.get("TRANSPOSED") else every


def _inputs_of_fc(arguments: dict[str, Any]) -> int:
    return arguments["weight_ptr"].shape[1]


def _pixels_of_a_split(arguments: dict[str, Any]) -> Fraction:
    """What each partial sum of a weight gradient is over, on average."""
    n, height, width, _ = arguments["g_ptr"].shape
    return Fraction(n * height * width, arguments["products_ptr"].shape[0])


_CONV = "conv {KERNEL}x{KERNEL}"
_WEIGHT_GRAD = "conv {KERNEL}x{KERNEL} weights"
_KERNELS = {
    "conv_pointer_kernel": _Kernel(
        _CONV, ("out_ptr", "pool_ptr", "statistics_ptr"), _conv_multiply_adds
    ),
    "conv_tma_kernel": _Kernel(
        _CONV, ("out_desc_0", "out_desc_1", "pool_ptr", "statistics_ptr"), _conv_multiply_adds
    ),
    "depthwise_kernel": _Kernel(DEPTHWISE, multiply_adds=lambda arguments: 9),
    "epilogue_kernel": _Kernel("scale, shift, ReLU", ("out_ptr", "pool_ptr", "statistics_ptr")),
    "accumulate_kernel": _Kernel("add + ReLU backward"),
    "transpose_kernel": _Kernel("transpose weights"),
    "finish_pool_kernel": _Kernel(ESE_POOL, ("mean_ptr",)),
    "fc_gate_kernel": _Kernel(ESE_POOL, multiply_adds=_inputs_of_fc),
    "apply_kernel": _Kernel(POINTWISE),
    "max_pool_kernel": _Kernel(POOL, ("out_ptr", "argmax_ptr")),
    "gate_sums_kernel": _Kernel(ESE_BACKWARD, ("partials_ptr",)),
    "fc_input_grad_kernel": _Kernel(ESE_BACKWARD, multiply_adds=_inputs_of_fc),
    "fc_weight_grad_kernel": _Kernel(
        ESE_BACKWARD,
        ("dweight_ptr", "dbias_ptr"),
        multiply_adds=lambda arguments: arguments["batch"],
    ),
    "apply_backward_kernel": _Kernel("gate backward + ReLU backward"),
    "max_pool_backward_kernel": _Kernel("max pool backward"),
    "conv_weight_grad_pointer_kernel": _Kernel(
        _WEIGHT_GRAD, ("products_ptr", "sums_ptr"), _pixels_of_a_split
    ),
    "conv_weight_grad_tma_kernel": _Kernel(
        _WEIGHT_GRAD, ("products_ptr", "sums_ptr"), _pixels_of_a_split
    ),
    "finish_weight_grad_kernel": _Kernel(
        "finish weight gradients", ("dweight_ptr", "dscale_ptr", "dshift_ptr")
    ),
    "channel_sums_kernel": _Kernel("sums of gradients", ("sums_ptr",)),
    "depthwise_input_grad_kernel": _Kernel(
        DEPTHWISE,
        multiply_adds=lambda arguments: Fraction(
            9 * arguments["g_ptr"].numel(), arguments["out_ptr"].numel()
        ),
    ),
    "depthwise_weight_grad_kernel": _Kernel(
        DEPTHWISE + " weights", ("products_ptr",), _pixels_of_a_split
    ),
    "merge_statistics_kernel": _Kernel(STATISTICS),
    "finish_norm_kernel": _Kernel(STATISTICS),
    "norm_sums_kernel": _Kernel(NORM_BACKWARD, ("partials_ptr",)),
    "norm_input_grad_kernel": _Kernel(NORM_BACKWARD),
    "sum_rows_kernel": _Kernel("sums of partials"),
    "conv_eight_bits_pointer_kernel": _Kernel(
        _CONV, ("out_ptr", "feature_ptr", "pool_ptr"), _conv_multiply_adds
    ),
    "conv_eight_bits_tma_kernel": _Kernel(
        _CONV,
        ("out_desc_0", "out_desc_1", "feature_desc_0", "feature_desc_1", "pool_ptr"),
        _conv_multiply_adds,
    ),
    "depthwise_eight_bits_kernel": _Kernel(DEPTHWISE, multiply_adds=lambda arguments: 9),
    "image_eight_bits_kernel": _Kernel("round images"),
    "mean_eight_bits_kernel": _Kernel(ESE_POOL, ("mean_ptr",)),
    "gates_eight_bits_kernel": _Kernel(ESE_POOL, multiply_adds=_inputs_of_fc),
    "apply_eight_bits_kernel": _Kernel(POINTWISE, ("out_ptr", "feature_ptr")),
}


def written(launch: Launch) -> tuple[str, ...]:
    """Names of the arguments that a launch writes, the result first.

    Raises:
        LookupError: as :func:`launch_work`.
    """
    name = launch.kernel.fn.__name__
    kernel = _KERNELS.get(name)
    if kernel is None or not set(kernel.outputs) <= set(launch.args):
        raise LookupError(
            f"{name} with arguments {', '.join(launch.args)} is not what _KERNELS in "
            f"{__name__} says: write there which of them it writes"
        )
    return kernel.outputs


def launch_work(launch: Launch) -> Work:
    """What a launch of a Triton kernel has to do.

    Args:
        launch: on meta tensors or others: only their shapes matter. Under
            :func:`vovnet_fast.kernels._common.recording` launches are collected.

    Raises:
        LookupError: the kernel is not in :data:`_KERNELS`, or not as it is there.
    """
    names = written(launch)
    kernel = _KERNELS[launch.kernel.fn.__name__]
    # A tensor descriptor keeps its tensor as its base.
    operands = {name: getattr(value, "base", value) for name, value in launch.args.items()}
    outputs = [operands.pop(name) for name in names]
    # In eight bits there may be no activation, where a feature alone is wanted.
    result = next(output for output in outputs if output is not None)
    return Work(
        kernel.kind.format(**launch.constants),
        int(2 * result.numel() * kernel.multiply_adds(launch.args | launch.constants)),
        bytes_of(operands.values()),
        bytes_of(outputs),
    )
