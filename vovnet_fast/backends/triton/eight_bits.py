"""The ops of :mod:`vovnet_fast.arithmetic` by Triton's kernels, in int8 and fp8 alike.

What a kernel takes in another form than a layer has it, is made of the layer's weights once:
sums of an output channel's, for 255 levels, and those of a wide stem in fp16.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ... import selfcheck, tuning
from ...arithmetic import fp8, int8
from ...arithmetic.layers import QuantizedConv, QuantizedDepthwise, QuantizedGate, QuantizedSum
from ...compat import zip
from ...selfcheck import eight_bits as check
from ...specs import Pool
from .. import conv_sm90_fp8, cudnn_graph
from .._engines import problem
from .choosing import choose, load_kernels

FUNCTIONS = ("quantize_image", "conv", "depthwise", "max_pool", "gates", "apply_gates")
"""What a network may need."""

_SOURCES = {
    "quantize_image": "kernels.depthwise_eight_bits",
    "conv": "kernels.conv_eight_bits",
    "depthwise": "kernels.depthwise_eight_bits",
    "max_pool": "kernels.max_pool",
    "gates": "kernels.ese_eight_bits",
    "apply_gates": "kernels.ese_eight_bits",
}


def sources(function: str) -> tuple[str, ...]:
    """Modules of this package that compute a function; as those of :mod:`..triton`."""
    return "backends.triton.eight_bits", "backends.triton.choosing", _SOURCES[function]


def quantize_image(x: Tensor, scale: float, out: Tensor, *, wide: bool = False) -> None:
    """See :func:`vovnet_fast.arithmetic.int8.quantize_image`; ``out`` says what is wide."""
    load_kernels().depthwise_eight_bits.quantize_image(x, scale, out)


def conv(
    x: Tensor,
    layer: QuantizedConv,
    out: Tensor | None,
    *,
    levels: int,
    feature: Tensor | None = None,
    pool: bool = False,
) -> Tensor | None:
    """See :func:`vovnet_fast.arithmetic.int8.conv`. The configuration is chosen by
    :mod:`vovnet_fast.tuning`."""
    options: dict[str, Any] = dict(levels=levels, feature=feature, pool=pool and out is not None)
    if x.shape[0] == 0:
        return layer.bias.new_zeros(0, 1, layer.bias.shape[0]) if options["pool"] else None
    return run_engine(choose_engine(x, layer, out, **options), x, layer, out, **options)


def choose_engine(
    x: Tensor,
    layer: QuantizedConv,
    out: Tensor | None,
    *,
    levels: int,
    feature: Tensor | None,
    pool: bool,
) -> str:
    """The fastest of :func:`libraries` and of Triton's configurations for a layer. Those that are
    measured must agree with the reference."""
    kernels = load_kernels()
    weight, epilogue = _arguments(x, layer, out, levels, feature)
    found = kernels.conv_eight_bits.layer(x, weight, epilogue, stride=_stride(layer))
    options: dict[str, Any] = dict(levels=levels, feature=feature, pool=pool)
    others = libraries(x, layer, out, **options)
    words = {
        "pool": pool,
        "slot": out is not None,
        "feature": feature is not None,
        f"{levels} levels": x.dtype == int8.ACTIVATION,
        "tma": found.tma,
        f"and {cudnn_graph.NAME}": any(name.startswith(cudnn_graph.NAME) for name in others),
        f"and {conv_sm90_fp8.NAME}": any(name.startswith(conv_sm90_fp8.NAME) for name in others),
    }
    chosen = [word for word, said in words.items() if said]
    key = problem("conv", x, weight.shape, _stride(layer), *chosen)

    def run(engine: str) -> None:
        run_engine(engine, x, layer, out, **options)

    prepare = functools.partial(_trial, x, layer, out, **options)
    return choose(x, found, key, others, run, prepare)


def engines(
    x: Tensor,
    layer: QuantizedConv,
    out: Tensor | None,
    *,
    levels: int,
    feature: Tensor | None,
    pool: bool,
) -> list[str]:
    """Names of all that :func:`run_engine` can take for these arguments."""
    weight, epilogue = _arguments(x, layer, out, levels, feature)
    found, _ = load_kernels().conv_eight_bits.choices(x, weight, epilogue, stride=_stride(layer))
    others = libraries(x, layer, out, levels=levels, feature=feature, pool=pool)
    return [*others, *(config.name for config in found)]


def libraries(
    x: Tensor,
    layer: QuantizedConv,
    out: Tensor | None,
    *,
    levels: int,
    feature: Tensor | None,
    pool: bool,
) -> list[str]:
    """Those of them that are not Triton's: the extension's for Hopper, and plans of cuDNN."""
    own = conv_sm90_fp8.engines(x, layer.weight, out, feature, stride=_stride(layer))
    if _why_no_graph(x, layer, out, levels, feature, pool) is not None or out is None:
        return own
    graph = _of_graph(x, layer, out)
    return [*own, *cudnn_graph.engines(*graph, stride=_stride(layer), levels=levels)]


def _why_no_graph(
    x: Tensor, layer: QuantizedConv, out: Tensor | None, levels: int, feature: Tensor | None,
    pool: bool,
) -> str | None:  # fmt: skip
    """The reason why nothing is put to cuDNN, or None."""
    if out is None or feature is not None or pool:
        return "graphs write activations alone"
    reason = cudnn_graph.installed.why_not(x.device)
    if reason is not None:
        return reason
    if layer.weight.dtype.itemsize > 1:
        return "images of a wide stem have more than eight bits"
    if layer.weight.is_inference():
        return "what is made of weights of inference mode cannot be kept"
    if layer.bias.is_floating_point() or _below_exact(layer, levels):
        return None
    return f"a sum may reach {_EXACT}, from where fp32 does not hold all integers"


_EXACT = 2**24


def _below_exact(layer: QuantizedConv, levels: int) -> bool:
    """Whether no sum of integers, with its bias, gets beyond what fp32 holds exactly."""
    tensors = layer.weight, layer.bias
    if _capturing(layer.weight) and not all(_is_kept(t, _largest) for t in tensors):
        return False  # To find it out would synchronise.
    weight, bias = (int(_kept(tensor, _largest)) for tensor in tensors)
    return levels * weight + bias < _EXACT


def _of_graph(x: Tensor, layer: QuantizedConv, out: Tensor) -> tuple[Tensor, ...]:
    """As :func:`.cudnn_graph.run` takes them: the bias in fp32."""
    bias = layer.bias if layer.bias.is_floating_point() else _kept(layer.bias, torch.Tensor.float)
    return x, layer.weight, layer.multiplier, bias, out


def run_engine(
    engine: str,
    x: Tensor,
    layer: QuantizedConv,
    out: Tensor | None,
    *,
    levels: int,
    feature: Tensor | None,
    pool: bool,
) -> Tensor | None:
    """Run :func:`conv` on one of :func:`engines`."""
    if engine.startswith(conv_sm90_fp8.NAME):
        return conv_sm90_fp8.run(engine, x, layer, out, feature=feature, pool=pool)
    kernel, stride = load_kernels().conv_eight_bits, _stride(layer)
    if engine.startswith(cudnn_graph.NAME):
        assert out is not None, "graphs write activations"
        cudnn_graph.run(engine, *_of_graph(x, layer, out), stride=stride, levels=levels)
        return None
    weight, epilogue = _arguments(x, layer, out, levels, feature)
    found, _ = kernel.choices(x, weight, epilogue, stride=stride)
    config = next(config for config in found if config.name == engine)
    partials = None
    if pool:
        tiles = kernel.pool_tiles(x, weight, epilogue, stride=stride, config=config)
        partials = layer.bias.new_empty(x.shape[0], tiles, weight.shape[0])
        epilogue = dataclasses.replace(epilogue, pool_partials=partials)
    kernel.conv(x, weight, epilogue, stride=stride, config=config)
    return partials


def _trial(
    x: Tensor,
    layer: QuantizedConv,
    out: Tensor | None,
    *,
    levels: int,
    feature: Tensor | None,
    pool: bool,
) -> tuning.Trial:
    """Holds configurations against the reference, with the layer's weights and a random input."""
    views = [view for view in (out, feature) if view is not None]
    images = selfcheck.few_images(x, *views)
    form = "fp8" if layer.bias.is_floating_point() else "int8"
    reference = int8 if form == "int8" else fp8
    source = check.ByteSlot.like(x, images).view
    source.copy_(_random(source, levels))
    slots = {
        name: None if view is None else check.ByteSlot.like(view, images)
        for name, view in (("out", out), ("feature", feature))
    }

    def run(conv: Callable[..., Tensor | None]) -> list[Tensor]:
        out, feature = (None if slot is None else slot.view for slot in slots.values())
        sums = conv(source, layer, out, levels=levels, feature=feature, pool=pool)
        found = [view.clone() for view in (out, feature) if view is not None]
        return found if sums is None or out is None else [*found, check.pooled(sums, out)]

    expected = run(reference.conv)

    def trial(engine: str) -> str | None:
        for slot in slots.values():
            if slot is not None:
                slot.clear()
        found = run(functools.partial(run_engine, engine))
        for ours, exact in zip(found, expected, strict=True):
            apart = check.distance(ours, exact, form)
            if not apart <= (form == "fp8"):
                return f"{apart} apart, in {form}"
        kept = all(slot.untouched() for slot in slots.values() if slot is not None)
        return None if kept else "it wrote outside its slot"

    return trial


def _random(like: Tensor, levels: int) -> Tensor:
    """Activations, or an image."""
    random = torch.Generator(like.device).manual_seed(0)
    if like.is_floating_point():
        x = torch.randn(like.shape, generator=random, device=like.device, dtype=torch.float32)
        return x if like.dtype == torch.float32 else x.relu()
    low, high = (0, levels) if like.dtype == int8.ACTIVATION else (-127, 127)
    return torch.randint(low, high + 1, like.shape, generator=random, device=like.device)


def depthwise(
    x: Tensor, layer: QuantizedDepthwise, out: Tensor, *, levels: int, stride: int = 1
) -> None:
    """See :func:`vovnet_fast.arithmetic.int8.depthwise`."""
    load_kernels().depthwise_eight_bits.depthwise(x, layer, out, levels=levels, stride=stride)


def max_pool(x: Tensor, out: Tensor, mode: Pool) -> None:
    """See :func:`vovnet_fast.arithmetic.int8.max_pool`."""
    load_kernels().max_pool.max_pool(x, out, mode, None)


def gates(sums: Tensor, num_pixels: int, layer: QuantizedGate) -> Tensor:
    """See :func:`vovnet_fast.arithmetic.int8.gates`."""
    out = sums.new_empty(sums.shape[0], sums.shape[2])
    load_kernels().ese_eight_bits.gates(sums, num_pixels, layer, torch.empty_like(out), out)
    return out


def apply_gates(
    z: Tensor,
    gates: Tensor | None,
    identity: Tensor | None,
    layer: QuantizedSum,
    out: Tensor | None,
    *,
    levels: int,
    feature: Tensor | None = None,
) -> None:
    """See :func:`vovnet_fast.arithmetic.int8.apply_gates`."""
    load_kernels().ese_eight_bits.apply(
        z, gates, identity, layer, out, levels=levels, feature=feature
    )


# --------------------------------------------------------------------------------------
# What is made of weights
# --------------------------------------------------------------------------------------


def _stride(layer: QuantizedConv) -> int:
    return 1 if layer.depthwise is not None else layer.stride


def _arguments(
    x: Tensor, layer: QuantizedConv, out: Tensor | None, levels: int, feature: Tensor | None
) -> tuple[Tensor, Any]:
    """The weight, and all that follows the products, as the kernel takes them."""
    config = load_kernels().conv_eight_bits_config
    weight, sums = layer.weight, None
    if weight.dtype == torch.int16:
        weight = _kept(weight, torch.Tensor.half)
    if config.offset(x.dtype, levels):
        sums = _kept(weight, _sums)
    epilogue = config.EightBits(
        layer.bias, layer.multiplier, layer.unit, levels, out, feature, weight_sums=sums
    )
    return weight, epilogue


def _sums(weight: Tensor) -> Tensor:
    return weight.sum((1, 2, 3), dtype=torch.int32)


def _largest(weight: Tensor) -> Tensor:
    """The largest sum of magnitudes of an output channel's weights, or a bias; on the CPU."""
    return (
        weight.flatten(1).abs().sum(1).max().cpu() if weight.ndim > 1 else weight.abs().max().cpu()
    )


_found = WeakTensorKeyDictionary()
"""By weight, and by what makes it: the weight's version, and what was made."""

_lock = threading.Lock()


def _kept(weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """What was made of a weight, made again where it has changed since."""
    if weight.is_inference():  # It does not count what is written to it.
        return make(weight)
    now = weight.data_ptr(), weight._version
    with _lock:
        made = _found.setdefault(weight, {})
        if make not in made or made[make][0] != now:
            if _capturing(weight):  # It will be in a graph's own memory.
                return make(weight)
            with torch.inference_mode(False):
                made[make] = now, make(weight)
        kept: Tensor = made[make][1]
    return kept


def _capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured. A torch for CPUs cannot be asked."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_kept(weight: Tensor, make: Callable[[Tensor], Tensor]) -> bool:
    """Whether what was made of a weight is there, and of the weight as it is."""
    if weight.is_inference():
        return False
    with _lock:
        found = _found.get(weight, {}).get(make)
    return found is not None and found[0] == (weight.data_ptr(), weight._version)


def forget(weights: Any) -> None:
    """Drop what was made of weights: after writes that nobody counts."""
    with _lock:
        for weight in weights:
            _found.pop(weight, None)
