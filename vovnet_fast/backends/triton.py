"""The backend of Triton kernels: the signatures of :mod:`vovnet_fast.backends`.

Runs on NVIDIA GPUs of compute capability 8.0 and newer, and, for tests, on CPU
tensors in Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _optional, selfcheck, tuning
from .._dtypes import accumulator
from ..specs import Gate, Pool
from . import _aten, conv_sm90, cudnn_graph, reference
from ._engines import ATEN, aten, conv_trial, judge, problem, tf32, tolerance
from ._predict import candidates

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


def sources(function: str) -> tuple[str, ...]:
    """Modules of this package that compute a function with static choices.

    What kernels import from each other is not named (:mod:`vovnet_fast.selfcheck.sources`), nor
    what only offers and ranks engines.
    """
    return ("backends.triton", "backends._engines", *_SOURCES[function].split())


@functools.cache
def _kernels() -> Any:
    """The kernels, imported on first use: importing the package never needs Triton."""
    from .. import kernels
    from ..kernels import (  # noqa: F401
        accumulate,
        batch_norm,
        batch_norm_backward,
        conv,
        conv_weight_grad,
        cost,
        depthwise,
        device,
        epilogue,
        ese,
        ese_backward,
        max_pool,
        pack,
    )

    return kernels


def why_not(device: torch.device | None) -> str | None:
    """The reason why the kernels cannot run on ``device`` (None: on any device here)."""
    reason = _optional.why_not("triton")
    if reason is not None:
        return reason
    from ..kernels._common import interpreted

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
    if out.numel() == 0:
        return scale.new_zeros(x.shape[0], 1, weight.shape[0]) if pool else None
    engine = choose_engine(x, weight, scale, shift, out, stride=stride, relu=relu, pool=pool)
    return run_engine(engine, x, weight, scale, shift, out, stride=stride, relu=relu, pool=pool)


def choose_engine(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    pool: bool,
) -> str:
    """The fastest engine for a layer.

    That is :data:`ATEN`, one of :func:`.cudnn_graph.engines` or :func:`.conv_sm90.engines`, or
    the name of a Triton configuration. Those that are measured must agree with the reference first.
    """
    layer = _kernels().conv.layer(x, weight, out, stride=stride, tf32=tf32(x))
    graphs: list[str] = []
    if not pool:  # Its graph has no partial sums.
        options: dict[str, Any] = dict(stride=stride, relu=relu, tf32=tf32(x))
        graphs = cudnn_graph.engines(x, weight, scale, shift, out, **options)
    own = conv_sm90.engines(x, weight, out, stride=stride)
    offered = {"cudnn-graph": graphs, "conv-sm90": own}
    words = (
        "pool" if pool else "",
        _form(layer, x),
        *(f"and {n}" for n, o in offered.items() if o),
    )
    key = problem("conv", x, weight.shape, stride, *words)

    def run(engine: str) -> None:
        run_engine(engine, x, weight, scale, shift, out, stride=stride, relu=relu, pool=pool)

    prepare = functools.partial(
        conv_trial, run_engine, x, weight, out, stride=stride, relu=relu, pool=pool
    )
    return _choose(x, layer, key, [*aten(x, out), *graphs, *own], run, prepare)


def _form(layer: Any, x: Tensor) -> str:
    """The preferred form of Triton's configurations, which depends on how the tensors lie."""
    kernels = _kernels()
    return kernels.cost.configurations(layer, kernels._common.capability(x.device))[0].form


def _choose(
    x: Tensor,
    layer: Any,
    key: str,
    libraries: Sequence[str],
    run: Callable[[str], None],
    prepare: Callable[[], tuning.Trial],
) -> str:
    """The fastest of some libraries' engines and of Triton's configurations for a layer."""
    kernels = _kernels()
    static = kernels.cost.static_choice(layer, kernels.device.of(x.device))
    found = candidates(layer, x.device, *libraries)
    return tuning.choose(x.device, key, found, static.name, run, prepare=prepare)


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
    kernels, n, c_out = _kernels(), x.shape[0], weight.shape[0]
    if engine == ATEN:
        z = _aten.conv(x, weight, stride=stride)
        tiles = kernels.epilogue.pool_tiles(out)
        partials = scale.new_empty(n, tiles, c_out) if pool else None
        kernels.epilogue.epilogue(z, scale, shift, out, relu=relu, pool_partials=partials)
        return partials
    options: dict[str, Any] = dict(stride=stride, tf32=tf32(x))
    if engine.startswith(cudnn_graph.NAME):
        assert not pool, f"{engine} has no pool partials"
        cudnn_graph.run(engine, x, weight, scale, shift, out, relu=relu, **options)
        return None
    if engine.startswith(conv_sm90.NAME):
        return conv_sm90.run(engine, x, weight, scale, shift, out, relu=relu, pool=pool)
    found, _ = kernels.conv.choices(x, weight, out, **options)
    options["config"] = next(config for config in found if config.name == engine)
    partials = None
    if pool:
        tiles = kernels.conv.pool_tiles(x, weight, out, **options)
        partials = scale.new_empty(n, tiles, c_out)
    kernels.conv.conv(x, weight, scale, shift, out, relu=relu, pool_partials=partials, **options)
    return partials


def depthwise(x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> None:
    """See :mod:`vovnet_fast.backends`."""
    _kernels().depthwise.depthwise(x, weight, out, stride=stride)


def gates(
    partials: Tensor, num_pixels: int, fc_weight: Tensor, fc_bias: Tensor, kind: Gate
) -> tuple[Tensor, Tensor]:
    """See :mod:`vovnet_fast.backends`."""
    out = partials.new_empty(partials.shape[0], partials.shape[2])
    mean = torch.empty_like(out)
    _kernels().ese.gates(partials, num_pixels, fc_weight, fc_bias, kind, mean, out)
    return out, mean


def apply_gates(z: Tensor, gates: Tensor | None, identity: Tensor | None, out: Tensor) -> None:
    """See :mod:`vovnet_fast.backends`."""
    _kernels().ese.apply(z, gates, identity, out)


def max_pool(x: Tensor, out: Tensor, mode: Pool, argmax: Tensor | None = None) -> None:
    """See :mod:`vovnet_fast.backends`."""
    _kernels().max_pool.max_pool(x, out, mode, argmax)


def gate_sums(dout: Tensor, y: Tensor) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    out = y.new_empty(y.shape[0], y.shape[3], dtype=accumulator(y.dtype))
    _kernels().ese_backward.gate_sums(dout, y, out)
    return out


def gates_backward(
    dgates: Tensor,
    gates: Tensor,
    mean: Tensor,
    num_pixels: int,
    fc_weight: Tensor,
    kind: Gate,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`vovnet_fast.backends`."""
    dpixel, dfc_weight = torch.empty_like(mean), mean.new_empty(fc_weight.shape)
    dfc_bias = mean.new_empty(mean.shape[1])
    _kernels().ese_backward.gates_backward(
        dgates, gates, mean, num_pixels, fc_weight, kind, dpixel, dfc_weight, dfc_bias
    )
    return dpixel, dfc_weight, dfc_bias


def apply_gates_backward(
    dout: Tensor, gates: Tensor | None, dpixel: Tensor | None, y: Tensor, out: Tensor
) -> None:
    """See :mod:`vovnet_fast.backends`."""
    _kernels().ese_backward.apply_backward(dout, gates, dpixel, y, out)


def max_pool_backward(dout: Tensor, argmax: Tensor, out: Tensor, mode: Pool) -> None:
    """See :mod:`vovnet_fast.backends`."""
    _kernels().max_pool.max_pool_backward(dout, argmax, out, mode)


def batch_norm_merge(partials: Tensor) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    out = partials.new_empty(partials.shape[1:])
    _kernels().batch_norm.merge(partials, out)
    return out


def batch_norm_finish(
    partials: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    kernel = _kernels().batch_norm
    norm = partials.new_empty(kernel.NORM_ROWS, partials.shape[2])
    kernel.finish(partials, gamma, beta, eps, norm)
    return norm


def batch_norm_sums(g: Tensor, z: Tensor, norm: Tensor) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    out = norm.new_empty(2, z.shape[3])
    _kernels().batch_norm_backward.backward_sums(g, z, norm, out)
    return out


def batch_norm_input_grad(
    g: Tensor, z: Tensor, norm: Tensor, sums: Tensor, gamma: Tensor | None, out: Tensor
) -> None:
    """See :mod:`vovnet_fast.backends`."""
    _kernels().batch_norm_backward.input_grad(g, z, norm, sums, gamma, out)


def conv_weight_grad(
    x: Tensor, g: Tensor, weight: Tensor, scale: Tensor | None, *, stride: int = 1
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See :mod:`vovnet_fast.backends`. The engine is chosen by :mod:`vovnet_fast.tuning`."""
    if g.numel() == 0:  # Zeros.
        return _kernels().conv_weight_grad.weight_grad(x, g, weight, scale, stride=stride)
    engine = choose_weight_grad_engine(x, g, weight, scale, stride=stride)
    return run_weight_grad_engine(engine, x, g, weight, scale, stride=stride)


def choose_weight_grad_engine(
    x: Tensor, g: Tensor, weight: Tensor, scale: Tensor | None, *, stride: int
) -> str:
    """The fastest engine for a weight gradient: :data:`ATEN`, or a Triton configuration."""
    options: dict[str, Any] = dict(stride=stride, tf32=tf32(x))
    layer = _kernels().conv_weight_grad.layer(x, g, weight.shape[1], **options)
    key = problem("conv weight gradient", x, weight.shape, stride, _form(layer, x))

    def run(engine: str) -> None:
        run_weight_grad_engine(engine, x, g, weight, scale, stride=stride)

    prepare = functools.partial(_weight_grad_trial, x, g, weight, stride=stride)
    return _choose(x, layer, key, aten(x, g), run, prepare)


def _weight_grad_trial(x: Tensor, g: Tensor, weight: Tensor, *, stride: int) -> tuning.Trial:
    """Holds engines against the reference, as :func:`conv_trial` does for the convolution."""
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
        found = run_weight_grad_engine(
            engine, source.view, gradient.view, weight, scale, stride=stride
        )
        pairs = [
            (f, e) for f, e in zip(found, expected, strict=True) if f is not None and e is not None
        ]
        return selfcheck.disagreement(pairs, tolerance(x))

    return trial


def run_weight_grad_engine(
    engine: str, x: Tensor, g: Tensor, weight: Tensor, scale: Tensor | None, *, stride: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run :func:`conv_weight_grad` on one engine; all have the same result, up to rounding.

    :data:`ATEN` hands sums over in the dtype of its operands, so that it is given fp32 copies
    of fp16 and bf16 ones: the gradient is to be rounded once, at the end. Where torch allows
    TF32, as it does by default, tensor cores take these copies as they are.
    """
    kernel, size = _kernels().conv_weight_grad, weight.shape[1]
    if engine == ATEN:
        high = accumulator(x.dtype)
        dw = _aten.weight_grad(x.to(high), g.to(high), weight, stride=stride)
        products = dw.contiguous().unsqueeze(0)
        return kernel.finish(products, kernel.channel_sums(g), weight, scale)
    options: dict[str, Any] = dict(stride=stride, tf32=tf32(x))
    found, _ = kernel.choices(x, g, size, **options)
    config = next(config for config in found if config.name == engine)
    return kernel.weight_grad(x, g, weight, scale, config=config, **options)


def depthwise_input_grad(
    g: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """See :mod:`vovnet_fast.backends`."""
    _kernels().depthwise.input_grad(g, weight, out, stride=stride, add=add, mask=mask)


def depthwise_weight_grad(x: Tensor, g: Tensor, *, stride: int = 1) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    return _kernels().depthwise.weight_grad(x, g, stride=stride)


def conv_statistics(x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> Tensor:
    """See :mod:`vovnet_fast.backends`. The engine is chosen by :mod:`vovnet_fast.tuning`."""
    if out.numel() == 0:
        return x.new_zeros(1, 3, weight.shape[0], dtype=accumulator(x.dtype))
    engine = choose_statistics_engine(x, weight, out, stride=stride)
    return run_statistics_engine(engine, x, weight, out, stride=stride)


def choose_statistics_engine(x: Tensor, weight: Tensor, out: Tensor, *, stride: int) -> str:
    """The fastest engine for :func:`conv_statistics`: :data:`ATEN`, or a Triton configuration."""
    options: dict[str, Any] = dict(stride=stride, tf32=tf32(x), statistics=True)
    layer = _kernels().conv.layer(x, weight, out, **options)
    key = problem("conv", x, weight.shape, stride, "statistics", _form(layer, x))

    def run(engine: str) -> None:
        run_statistics_engine(engine, x, weight, out, stride=stride)

    prepare = functools.partial(_statistics_trial, x, weight, out, stride=stride)
    return _choose(x, layer, key, aten(x, out), run, prepare)


def _statistics_trial(x: Tensor, weight: Tensor, out: Tensor, *, stride: int) -> tuning.Trial:
    """Holds engines against the reference, as :func:`conv_trial` does."""
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
        partials = run_statistics_engine(engine, source.view, weight, target.view, stride=stride)
        merged = reference.batch_norm_merge(partials)
        return [(target.view, expected), *zip(merged, exact[0], strict=True)]

    return judge(target, run, tolerance(x))


def run_statistics_engine(
    engine: str, x: Tensor, weight: Tensor, out: Tensor, *, stride: int
) -> Tensor:
    """Run :func:`conv_statistics` on one engine; they divide the pixels into other parts."""
    kernels, n, c_out = _kernels(), x.shape[0], weight.shape[0]
    high = accumulator(x.dtype)
    if engine == ATEN:
        z = _aten.conv(x, weight, stride=stride)
        tiles = kernels.epilogue.pool_tiles(out)
        partials = x.new_empty(n, tiles, 3, c_out, dtype=high)
        kernels.epilogue.epilogue(z, None, None, out, relu=False, statistics=partials)
        return partials.flatten(0, 1)
    options: dict[str, Any] = dict(stride=stride, tf32=tf32(x))
    found, _ = kernels.conv.choices(x, weight, out, statistics=True, **options)
    options["config"] = next(config for config in found if config.name == engine)
    tiles = kernels.conv.pool_tiles(x, weight, out, **options)
    partials = x.new_empty(n, tiles, 3, c_out, dtype=high)
    kernels.conv.conv(x, weight, None, None, out, relu=False, statistics=partials, **options)
    return partials.flatten(0, 1)


def normalize(
    z: Tensor, scale: Tensor, shift: Tensor, out: Tensor, *, pool: bool = False
) -> Tensor | None:
    """See :mod:`vovnet_fast.backends`."""
    if out.numel() == 0:
        return scale.new_zeros(z.shape[0], 1, z.shape[3]) if pool else None
    kernel, partials = _kernels().epilogue, None
    if pool:
        partials = scale.new_empty(z.shape[0], kernel.pool_tiles(out), z.shape[3])
    kernel.epilogue(z, scale, shift, out, pool_partials=partials)
    return partials


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
    """See :mod:`vovnet_fast.backends`. The engine is chosen by :mod:`vovnet_fast.tuning`."""
    if out.numel() == 0:
        return
    packed = _pack_transposed(weight, scale, g)
    options: dict[str, Any] = dict(stride=stride, add=add, mask=mask)
    engine = choose_input_grad_engine(g, packed, out, **options)
    run_input_grad_engine(engine, g, packed, out, **options)


def _pack_transposed(weight: Tensor, scale: Tensor | None, g: Tensor) -> Tensor:
    """``[C_in, K, K, C_out]`` in the dtype of g: weight * scale, transposed and flipped."""
    c_out, kernel, _, c_in = weight.shape
    packed = g.new_empty(c_in, kernel, kernel, c_out)
    _kernels().pack.transposed(weight, scale, packed)
    return packed


def choose_input_grad_engine(
    g: Tensor,
    packed: Tensor,
    out: Tensor,
    *,
    stride: int,
    add: Tensor | None,
    mask: Tensor | None,
) -> str:
    """The fastest engine for an input gradient: :data:`ATEN`, or a Triton configuration.

    Where ``add`` is ``out`` itself, every run adds once more: what ``out`` held before
    anything was measured is put back.
    """
    options: dict[str, Any] = dict(stride=stride, add=add, mask=mask)
    found = _kernels().conv.input_grad_layer(g, packed, out, tf32=tf32(g), **options)
    c_in, kernel, _, c_out = packed.shape
    named = (("add", add), ("mask", mask))
    words = [f"{name} {view.shape[3]}" for name, view in named if view is not None]
    layer = (c_out, kernel, kernel, c_in)
    key = problem("conv input gradient", out, layer, stride, *words, _form(found, g))
    before: list[Tensor] = []

    def run(engine: str) -> None:
        run_input_grad_engine(engine, g, packed, out, **options)

    def prepare() -> tuning.Trial:
        if _in_place(add, out):
            before.append(out.clone())
        return _input_grad_trial(g, packed, out, **options)

    try:
        return _choose(g, found, key, aten(g, out), run, prepare)
    finally:
        for values in before:
            out.copy_(values)


def _in_place(add: Tensor | None, out: Tensor) -> bool:
    """Whether ``add`` is ``out``, or its first channels."""
    return add is not None and add.data_ptr() == out.data_ptr()


def _input_grad_trial(
    g: Tensor,
    packed: Tensor,
    out: Tensor,
    *,
    stride: int,
    add: Tensor | None,
    mask: Tensor | None,
) -> tuning.Trial:
    """Holds engines against the reference, as :func:`conv_trial` does; in place if ``add`` is."""
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
    packed = _pack_transposed(weight, None, g)
    given = {name: slot.view for name, slot in slots.items()}
    high = accumulator(g.dtype)
    expected = torch.empty(target.view.shape, dtype=high, device=g.device)
    reference.conv_input_grad(
        source.view.to(high), weight.to(high), None, expected, stride=stride,
        **{name: view.to(high) for name, view in given.items()},
    )  # fmt: skip

    def run(engine: str) -> list[tuple[Tensor, Tensor]]:
        options: dict[str, Any] = dict(stride=stride, add=None, mask=None) | given
        if _in_place(add, out):
            options["add"] = target.view[..., : given["add"].shape[3]].copy_(given["add"])
        run_input_grad_engine(engine, source.view, packed, target.view, **options)
        return [(target.view, expected)]

    return judge(target, run, tolerance(g))


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
    kernels = _kernels()
    if engine == ATEN:
        kernels.accumulate.accumulate(_aten.input_grad(g, packed, out, stride), out, add, mask)
        return
    options: dict[str, Any] = dict(stride=stride, add=add, mask=mask, tf32=tf32(g))
    found, _ = kernels.conv.input_grad_choices(g, packed, out, **options)
    config = next(config for config in found if config.name == engine)
    kernels.conv.input_grad(g, packed, out, config=config, **options)
