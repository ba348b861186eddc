"""What backends share that choose among several engines for a convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import selfcheck, tuning
from .._dtypes import accumulator
from ..compat import zip
from . import reference

ATEN = "aten"
"""The engine of ATen's (cuDNN's) convolution, followed by one fused epilogue into the slot."""


def aten(*views: Tensor) -> list[str]:
    """:data:`ATEN`, but not where cuDNN, which counts in 32 bits, may crash."""
    return [ATEN] if max(view.numel() for view in views) < 2**31 else []


def tf32(x: Tensor) -> bool:
    """Whether products of ``x`` may be rounded to TF32: where torch lets cuDNN do it.

    What is planned on meta tensors is to run on a GPU.
    """
    return x.dtype == torch.float32 and (x.is_cuda or x.is_meta) and tuning.tf32_allowed()


def problem(op: str, x: Tensor, weight: Sequence[int], stride: int, *words: str) -> str:
    """What choices are remembered by: the op, ``[C_out, K, K, C_in]``, pixels and dtype of x.

    Pixels are rounded up to a power of two: images of a detector in training have
    hundreds of sizes, and what is fastest for one is for its neighbours.
    """
    c_out, kernel, _, c_in = weight
    pixels = 1 << (x.shape[:3].numel() - 1).bit_length()
    dtype = str(x.dtype).removeprefix("torch.")
    layer = f"{op} {kernel}x{kernel} stride {stride} {c_in}>{c_out} on {pixels} pixels {dtype}"
    return " ".join(filter(None, (layer, "tf32" if tf32(x) else "", *words)))


def tolerance(x: Tensor) -> float:
    """Of an engine's error, as a fraction of the largest value: a few roundings."""
    if x.dtype.itemsize == 2 or tf32(x):
        return 4 * torch.finfo(torch.float16 if tf32(x) else x.dtype).eps
    return 1000 * torch.finfo(x.dtype).eps  # Engines sum in another order, or by Winograd's rule.


def judge(
    target: selfcheck.Slot,
    run: Callable[[str], Iterable[tuple[Tensor, Tensor]]],
    tolerance: float,
) -> tuning.Trial:
    """Runs an engine into a cleared slot; ``run`` returns what came out and what should have."""

    def trial(engine: str) -> str | None:
        target.clear()
        wrong = selfcheck.disagreement(run(engine), tolerance)
        return wrong or (None if target.untouched() else "it wrote outside its slot")

    return trial


def conv_trial(
    run_engine: Callable[..., Tensor | None],
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    pool: bool,
) -> tuning.Trial:
    """Holds engines against the reference in fp32, on random numbers in memory like the layer's.

    The layer's own numbers would prove little where they are zeros, as in a warm-up, and
    an engine that writes outside its slot would spoil the slots beside it.

    Args:
        run_engine: called as ``run_engine(engine, x, weight, scale, shift, out, ...)``.
        x, weight, out, stride, relu, pool: of the layer.
    """
    images = selfcheck.few_images(x, out)
    source, target = selfcheck.Slot.like(x, images), selfcheck.Slot.like(out, images)
    random = torch.Generator(x.device).manual_seed(0)
    high = accumulator(x.dtype)
    source.randomise(random)
    weight = torch.empty_like(weight).normal_(0, weight[0].numel() ** -0.5, generator=random)
    scale, shift = torch.randn(2, weight.shape[0], generator=random, dtype=high, device=x.device)
    expected = torch.empty(target.view.shape, dtype=high, device=x.device)
    options: dict[str, Any] = dict(stride=stride, relu=relu, pool=pool)
    exact = reference.conv(source.view.to(high), weight.to(high), scale, shift, expected, **options)

    def run(engine: str) -> list[tuple[Tensor, Tensor]]:
        sums = run_engine(engine, source.view, weight, scale, shift, target.view, **options)
        pairs = [(target.view, expected)]
        if sums is not None and exact is not None:
            pairs.append((sums.sum(1), exact.sum(1)))
        return pairs

    return judge(target, run, tolerance(x))


def statistics_trial(
    run_engine: Callable[..., Tensor], x: Tensor, weight: Tensor, out: Tensor, *, stride: int
) -> tuning.Trial:
    """Holds engines of ``conv_statistics`` against the reference, as :func:`conv_trial` does.

    Args:
        run_engine: called as ``run_engine(engine, x, weight, out, stride=...)``.
        x, weight, out, stride: of the layer.
    """
    images = selfcheck.few_images(x, out)
    source, target = selfcheck.Slot.like(x, images), selfcheck.Slot.like(out, images)
    random = torch.Generator(x.device).manual_seed(0)
    high = accumulator(x.dtype)
    source.randomise(random)
    weight = torch.empty_like(weight).normal_(0, weight[0].numel() ** -0.5, generator=random)
    expected = torch.empty(target.view.shape, dtype=high, device=x.device)
    exact = reference.conv_statistics(
        source.view.to(high), weight.to(high), expected, stride=stride
    )

    def run(engine: str) -> list[tuple[Tensor, Tensor]]:
        partials = run_engine(engine, source.view, weight, target.view, stride=stride)
        merged = reference.batch_norm_merge(partials)
        return [(target.view, expected), *zip(merged, exact[0], strict=True)]

    return judge(target, run, tolerance(x))


def in_place(add: Tensor | None, out: Tensor) -> bool:
    """Whether ``add`` is ``out``, or its first channels."""
    return add is not None and add.data_ptr() == out.data_ptr()


def input_grad_trial(
    run_engine: Callable[..., None],
    pack: Callable[[Tensor, Tensor], Tensor],
    g: Tensor,
    packed: Tensor,
    out: Tensor,
    *,
    stride: int,
    add: Tensor | None,
    mask: Tensor | None,
) -> tuning.Trial:
    """Holds engines of ``conv_input_grad`` against the reference, as :func:`conv_trial` does.

    In place if ``add`` is.

    Args:
        run_engine: called as ``run_engine(engine, g, packed, out, stride=..., add=..., mask=...)``.
        pack: makes of a weight and a tensor like g the weight as engines take it.
        g, packed, out, stride, add, mask: of the layer.
    """
    views = {name: view for name, view in (("add", add), ("mask", mask)) if view is not None}
    images = selfcheck.few_images(g, out, *views.values())
    source, target = selfcheck.Slot.like(g, images), selfcheck.Slot.like(out, images)
    slots = {name: selfcheck.Slot.like(view, images) for name, view in views.items()}
    random = torch.Generator(g.device).manual_seed(0)
    for slot in (source, *slots.values()):
        slot.randomise(random)
    c_in, kernel, _, c_out = packed.shape
    deviation = packed[0].numel() ** -0.5
    weight = packed.new_empty(c_out, kernel, kernel, c_in).normal_(0, deviation, generator=random)
    packed = pack(weight, g)
    given = {name: slot.view for name, slot in slots.items()}
    high = accumulator(g.dtype)
    expected = torch.empty(target.view.shape, dtype=high, device=g.device)
    reference.conv_input_grad(
        source.view.to(high), weight.to(high), None, expected, stride=stride,
        **{name: view.to(high) for name, view in given.items()},
    )  # fmt: skip

    def run(engine: str) -> list[tuple[Tensor, Tensor]]:
        options: dict[str, Any] = dict(stride=stride, add=None, mask=None) | given
        if in_place(add, out):
            options["add"] = target.view[..., : given["add"].shape[3]].copy_(given["add"])
        run_engine(engine, source.view, packed, target.view, **options)
        return [(target.view, expected)]

    return judge(target, run, tolerance(g))


def weight_grad_trial(
    run_engine: Callable[..., tuple[Tensor, Tensor | None, Tensor]],
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    *,
    stride: int,
) -> tuning.Trial:
    """Holds engines of ``conv_weight_grad`` against the reference, as :func:`conv_trial` does.

    Args:
        run_engine: called as ``run_engine(engine, x, g, weight, scale, stride=...)``.
        x, g, weight, stride: of the layer.
    """
    images = selfcheck.few_images(x, g)
    source, gradient = selfcheck.Slot.like(x, images), selfcheck.Slot.like(g, images)
    random = torch.Generator(x.device).manual_seed(0)
    for slot in (source, gradient):
        slot.randomise(random)
    high = accumulator(x.dtype)
    weight = torch.empty_like(weight).normal_(generator=random)
    scale = torch.randn(weight.shape[0], generator=random, dtype=high, device=x.device)
    expected = reference.conv_weight_grad(
        source.view.to(high), gradient.view.to(high), weight.to(high), scale, stride=stride
    )

    def trial(engine: str) -> str | None:
        found = run_engine(engine, source.view, gradient.view, weight, scale, stride=stride)
        pairs = [
            (f, e) for f, e in zip(found, expected, strict=True) if f is not None and e is not None
        ]
        return selfcheck.disagreement(pairs, tolerance(x))

    return trial
