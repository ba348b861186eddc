"""Convolutions of the ``cuda`` backend: which engine, and one of them.

cuDNN's, through ATen, followed by one pass into the slot; those of :mod:`.conv_sm80` wherever they
take the tensors, and of :mod:`.conv_sm90` where it is on offer. The former take every layer of
every architecture, forward and backward, in fp16, bf16, and fp32 that may be rounded to TF32: where
torch has no cuDNN they serve alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _optional, tuning
from . import (
    _aten,
    _extension,
    _predict,
    conv_sm80,
    conv_sm80_grad,
    conv_sm80_input_grad,
    conv_sm90,
    conv_sm90_fp8,
    depthwise_conv,
)
from ._engines import (
    ATEN,
    aten,
    conv_trial,
    in_place,
    input_grad_trial,
    problem,
    statistics_trial,
    tf32,
    weight_grad_trial,
)


def _ops() -> Any:
    """The CUDA half's functions, ATen's convolutions among them."""
    return _extension.CUDA


def cudnn() -> bool:
    """Whether torch has cuDNN, and uses it."""
    return torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled


def offered(device: torch.device) -> dict[str, str | None]:
    """Our own engines by name, with None if they are considered, or the reason why not. That of
    networks in fp8 is one of :mod:`.triton`'s."""
    found = {
        engine.NAME: engine.why_not(device) for engine in (conv_sm80, conv_sm90, depthwise_conv)
    }
    return {**found, conv_sm90_fp8.IN_FP8: conv_sm90_fp8.why_not(device)}


def _choose(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    own: list[str],
    op: str,
    words: list[str],
    run: Callable[[str], None],
    prepare: Callable[[], tuning.Trial],
    *,
    stride: int = 1,
    kind: str = "forward",
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> str:
    """The fastest of ATen's and of our own engines for a layer, if it is right."""
    offered = [name for name in (conv_sm80.NAME, conv_sm90.NAME) if any(name in o for o in own)]
    words = [*words, "in CUDA C++", *(f"and {name}" for name in offered)]
    key = problem(op, x, weight.shape, stride, *words)
    names = [*aten(x, out), *own]
    if _optional.why_not("triton") is not None:  # With which the predictions come.
        static = ATEN if cudnn() and ATEN in names else own[0]
        return tuning.choose(x.device, key, names, static, run, prepare=prepare)
    beside = {"added": add, "masked": mask}
    layer = _predict.layer(
        x, weight, out, stride=stride, tf32=tf32(x), kind=kind,
        transposed=kind == "gradient" and stride == 2,
        **{name: view.shape[3] for name, view in beside.items() if view is not None},
    )  # fmt: skip
    found = _predict.of_libraries(layer, x.device, *names)
    static = ATEN if cudnn() and ATEN in found else min(own, key=lambda name: found[name])
    return tuning.choose(x.device, key, found, static, run, prepare=prepare)


# --------------------------------------------------------------------------------------
# Forward
# --------------------------------------------------------------------------------------


def conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = True,
    pool: bool = False,
) -> Tensor | None:
    """See :mod:`vovnet_fast.backends`. The engine is chosen by :mod:`vovnet_fast.tuning`."""
    tensors = (x, weight, scale, shift, out)
    options: dict[str, Any] = dict(stride=stride, relu=relu, pool=pool)
    own = _own(x, weight, out, stride) if out.numel() else []
    if not own:
        return run_engine(ATEN, *tensors, **options)

    def run(engine: str) -> None:
        run_engine(engine, *tensors, **options)

    prepare = functools.partial(conv_trial, run_engine, x, weight, out, **options)
    words = ["pool"] if pool else []
    engine = _choose(x, weight, out, own, "conv", words, run, prepare, stride=stride)
    return run_engine(engine, *tensors, **options)


def _own(x: Tensor, weight: Tensor, out: Tensor, stride: int) -> list[str]:
    engines = (conv_sm80.engines, conv_sm90.engines)
    return [name for each in engines for name in each(x, weight, out, stride=stride)]


def run_engine(
    engine: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    pool: bool,
) -> Tensor | None:
    """Run :func:`conv` on one engine. All of them leave the same result, up to rounding."""
    if engine == ATEN:
        found: Tensor | None = _ops().conv(
            x, weight, scale, shift, out, stride=stride, relu=relu, pool=pool
        )
        return found
    if engine.startswith(conv_sm90.NAME):
        return conv_sm90.run(engine, x, weight, scale, shift, out, relu=relu, pool=pool)
    return conv_sm80.run(
        engine, x, weight, out, scale=scale, shift=shift, stride=stride, relu=relu, pool=pool
    )


def conv_statistics(x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> Tensor:
    """See :mod:`vovnet_fast.backends`. The engine is chosen by :mod:`vovnet_fast.tuning`."""
    own = conv_sm80.engines(x, weight, out, stride=stride) if out.numel() else []
    if not own:
        return run_statistics_engine(ATEN, x, weight, out, stride=stride)

    def run(engine: str) -> None:
        run_statistics_engine(engine, x, weight, out, stride=stride)

    prepare = functools.partial(
        statistics_trial, run_statistics_engine, x, weight, out, stride=stride
    )
    engine = _choose(
        x, weight, out, own, "conv", ["statistics"], run, prepare, stride=stride, kind="statistics"
    )
    return run_statistics_engine(engine, x, weight, out, stride=stride)


def run_statistics_engine(
    engine: str, x: Tensor, weight: Tensor, out: Tensor, *, stride: int
) -> Tensor:
    """Run :func:`conv_statistics` on one engine; they divide the pixels into other parts."""
    if engine == ATEN:
        found: Tensor = _ops().conv_statistics(x, weight, out, stride=stride)
        return found
    partials = conv_sm80.run(engine, x, weight, out, stride=stride, statistics=True)
    assert partials is not None
    return partials


# --------------------------------------------------------------------------------------
# Backward
# --------------------------------------------------------------------------------------


def conv_input_grad(
    g: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    out: Tensor,
    *,
    stride: int = 1,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """See :mod:`vovnet_fast.backends`. The engine is chosen by :mod:`vovnet_fast.tuning`.

    With a stride of 1 it is a convolution of the gradient with other weights, but for images. Where
    ``add`` is ``out`` itself, every run adds once more: what ``out`` held before anything was
    measured is put back.
    """
    if out.numel() == 0:
        return
    packed = _pack_transposed(weight, g, scale)
    options: dict[str, Any] = dict(stride=stride, add=add, mask=mask)
    if conv_sm80_input_grad.takes(packed, stride):
        own = conv_sm80_input_grad.engines(g, packed, out, **options)
    else:
        own = conv_sm80.engines(g, packed, out, add=add, mask=mask)
    if stride == 1:
        own = [*own, *conv_sm90.engines(g, packed, out, add=add, mask=mask)]
    if not own:
        run_input_grad_engine(ATEN, g, packed, out, **options)
        return
    named = (("add", add), ("mask", mask))
    words = [f"{name} {view.shape[3]}" for name, view in named if view is not None]
    before: list[Tensor] = []

    def run(engine: str) -> None:
        run_input_grad_engine(engine, g, packed, out, **options)

    def prepare() -> tuning.Trial:
        if in_place(add, out):
            before.append(out.clone())
        return input_grad_trial(run_input_grad_engine, _pack_transposed, g, packed, out, **options)

    try:
        engine = _choose(
            g, packed, out, own, "conv input gradient", words, run, prepare, stride=stride,
            kind="gradient", add=add, mask=mask,
        )  # fmt: skip
    finally:
        for values in before:
            out.copy_(values)
    run_input_grad_engine(engine, g, packed, out, **options)


def _pack_transposed(weight: Tensor, g: Tensor, scale: Tensor | None = None) -> Tensor:
    """``[C_in, K, K, C_out]`` in the dtype of g: weight * scale, transposed and flipped."""
    c_out, kernel, _, c_in = weight.shape
    packed = g.new_empty(c_in, kernel, kernel, c_out)
    _ops().pack_transposed(weight, scale, packed)
    return packed


def run_input_grad_engine(
    engine: str,
    g: Tensor,
    packed: Tensor,
    out: Tensor,
    *,
    stride: int,
    add: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Run :func:`conv_input_grad` on one engine, with weights that are packed already."""
    if engine == ATEN:
        _ops().accumulate(_aten.input_grad(g, packed, out, stride), out, add, mask)
    elif engine.startswith(conv_sm90.NAME):
        conv_sm90.run(engine, g, packed, None, None, out, add=add, mask=mask)
    elif conv_sm80_input_grad.takes(packed, stride):
        conv_sm80_input_grad.run(engine, g, packed, out, stride=stride, add=add, mask=mask)
    else:
        conv_sm80.run(engine, g, packed, out, add=add, mask=mask)


def conv_weight_grad(
    x: Tensor, g: Tensor, weight: Tensor, scale: Tensor | None, *, stride: int = 1
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See :mod:`vovnet_fast.backends`. The engine is chosen by :mod:`vovnet_fast.tuning`."""
    own = conv_sm80_grad.engines(x, g, weight.shape[1], stride=stride) if g.numel() else []
    if not own:
        return run_weight_grad_engine(ATEN, x, g, weight, scale, stride=stride)

    def run(engine: str) -> None:
        run_weight_grad_engine(engine, x, g, weight, scale, stride=stride)

    prepare = functools.partial(
        weight_grad_trial, run_weight_grad_engine, x, g, weight, stride=stride
    )
    words = ("in CUDA C++", f"and {conv_sm80.NAME}")
    key = problem("conv weight gradient", x, weight.shape, stride, *words)
    names = [*aten(x, g), *own]
    static = ATEN if cudnn() and ATEN in names else own[0]
    engine = tuning.choose(x.device, key, names, static, run, prepare=prepare)
    return run_weight_grad_engine(engine, x, g, weight, scale, stride=stride)


def run_weight_grad_engine(
    engine: str, x: Tensor, g: Tensor, weight: Tensor, scale: Tensor | None, *, stride: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run :func:`conv_weight_grad` on one engine; all have the same result, up to rounding."""
    ops = _ops()
    if engine == ATEN:
        found: tuple[Tensor, Tensor | None, Tensor] = ops.conv_weight_grad(
            x, g, weight, scale, stride=stride
        )
        return found
    products = conv_sm80_grad.run(x, g, weight.shape[1], stride=stride)
    return *ops.pack_backward(products, weight, scale), ops.channel_sums(g)
