"""The ops of :mod:`vovnet_fast.arithmetic.int8` by the extension: the same integers, bit for bit.

Which instructions multiply makes no difference to any of them, so that the fastest engine there is
is taken: AMX, VNNI, or sums of products in 16 bits (csrc/cpu/int8_conv_engines.h), and where that
is faster Winograd's (:mod:`.int8_winograd`). Images, which have signs, and the weights of their
layer are multiplied in 16 bits.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...arithmetic.int8 import (
    ACTIVATION,
    LARGEST,
    TABLE,
    WIDE,
    image_dtype,
)
from ...arithmetic.layers import QuantizedConv, QuantizedDepthwise, QuantizedGate, QuantizedSum
from ...specs import Pool
from .. import _extension
from .._extension.fields import image, packed, pointer, view, windows
from . import int8_winograd, packing, winograd

__all__ = [
    "ACTIVATION", "apply_gates", "conv", "depthwise", "engines", "gates", "image_dtype",
    "max_pool", "quantize_image", "why_not",
]  # fmt: skip

WORDS = "words"
"""The engine of images, and of more steps than ``maddubs`` multiplies two at a time."""

_MADDUBS_LEVELS = 127

_TRIAL_FORMS, _TRIAL_BYTES = 8, 32 << 20
"""Of the weights that take turns in a trial of one layer: in a network, one is not found in a near
cache."""

_KINDS = {torch.uint8: 0, torch.int8: 1, torch.int16: 2}


def why_not(device: torch.device) -> str | None:
    """The reason why it cannot run on a device (None: it can)."""
    if device.type != "cpu":
        return f"it needs tensors on the CPU, these are on {device}"
    reason = _extension.why_not("cpu")
    if reason is None and not engines():
        isa = _extension.load("cpu").isa()
        return f"it has no convolutions in eight bits for the instruction set {isa}"
    return reason


def engines() -> tuple[str, ...]:
    """Engines of all convolutions of steps, the fastest first."""
    found = _extension.load("cpu").int8_conv_engines()
    return tuple(name for name in found if name not in (WORDS, *int8_winograd.NAMES))


def quantize_image(x: Tensor, scale: float, out: Tensor, *, wide: bool = False) -> None:
    """See :func:`vovnet_fast.arithmetic.int8.quantize_image`."""
    assert x.dtype == torch.float32, f"x is in {x.dtype}"
    assert out.dtype == image_dtype(wide), f"out is in {out.dtype}"
    n, h, w, c = x.stride()
    _extension.load("cpu").int8_image(
        torch.get_num_threads(),
        x=(pointer("x", x), n, h, w),
        x_stride_c=c,
        out=packed("out", out, out.dtype, *x.shape),
        factor=_float32(1 / scale),
        limit=WIDE if wide else LARGEST,
        kind=_KINDS[out.dtype],
        **image(x),
    )


def conv(
    x: Tensor,
    layer: QuantizedConv,
    out: Tensor | None,
    *,
    levels: int,
    feature: Tensor | None = None,
    pool: bool = False,
) -> Tensor | None:
    """See :func:`vovnet_fast.arithmetic.int8.conv`."""
    engine = engines()[0] if x.dtype == ACTIVATION else WORDS
    if engine == "maddubs" and levels > _MADDUBS_LEVELS:
        engine = WORDS
    c_out, kernel, _, c_in = layer.weight.shape
    if x.dtype == ACTIVATION and kernel == 3 and layer.stride == 1 and not pool and c_out and c_in:
        engine = int8_winograd.choose(x, layer.weight, levels, _trial, engine)
    return run_engine(engine, x, layer, out, levels=levels, feature=feature, pool=pool)


def run_engine(
    engine: str,
    x: Tensor,
    layer: QuantizedConv,
    out: Tensor | None,
    *,
    levels: int,
    feature: Tensor | None = None,
    pool: bool = False,
) -> Tensor | None:
    """Run :func:`conv` on an engine by name."""
    target = feature if out is None else out
    assert target is not None, "nothing to write to"
    cpu, c_out, kernel = _extension.load("cpu"), layer.weight.shape[0], layer.weight.shape[1]
    stride = 1 if layer.depthwise is not None else layer.stride
    n, height, width, _ = target.shape
    partials = None
    if pool and out is not None:
        sizes = height, width, x.shape[3], c_out, kernel, stride
        partials = out.new_empty(n, cpu.int8_conv_parts(engine, *sizes), c_out, dtype=torch.int32)
    tiles = packing.kept_tiles(engine, layer.weight, _pack)  # Held here, as nobody else may.
    cpu.int8_conv(
        torch.get_num_threads(),
        engine,
        x=view("x", x, x, *x.shape[:3], layer.weight.shape[3]),
        out=_bytes(out=out)["out"],
        feature=_values("feature", feature, n, height, width, c_out),
        tiles=pointer("tiles", tiles),
        bias=packed("bias", layer.bias, torch.int32, c_out),
        multiplier=packed("multiplier", layer.multiplier, torch.float32, c_out),
        unit=packed("unit", layer.unit, torch.float32, c_out),
        pool_partials=None if partials is None else pointer("pool_partials", partials),
        n=n,
        height=x.shape[1],
        width=x.shape[2],
        out_height=height,
        out_width=width,
        c_in=x.shape[3],
        c_out=c_out,
        kind=_KINDS[x.dtype],
        kernel=kernel,
        stride=stride,
        levels=levels,
    )
    return partials


@torch.inference_mode(False)
def _trial(layer: winograd.Layer) -> Callable[[str], None]:
    """What runs a layer by an engine's name, with weights that are in no near cache."""
    height = 1 << (layer.pixels.bit_length() - 1) // 2
    sizes = 1, height, layer.pixels // height
    x = torch.ones(*sizes, layer.c_in, dtype=ACTIVATION)
    out = torch.empty(*sizes, layer.c_out, dtype=ACTIVATION)
    c_out, c_in = layer.c_out, layer.c_in
    number = max(1, min(_TRIAL_FORMS, _TRIAL_BYTES // (c_out * 9 * c_in)))
    ones, none = torch.ones(c_out), torch.zeros(c_out, dtype=torch.int32)
    convs = [
        QuantizedConv(
            torch.ones(c_out, 3, 3, c_in, dtype=torch.int8), none, ones, ones, 1, None,
            torch.ones(c_in), None, 1.0,
        )
        for _ in range(number)
    ]  # fmt: skip
    turns: Counter[str] = Counter()

    def run(engine: str) -> None:
        assert layer.levels is not None
        if engine not in turns:  # A turn that does not count.
            for conv in convs:
                packing.kept_tiles(engine, conv.weight, _pack)
        turns[engine] += 1
        run_engine(engine, x, convs[turns[engine] % number], out, levels=layer.levels)

    return run


def depthwise(
    x: Tensor, layer: QuantizedDepthwise, out: Tensor, *, levels: int, stride: int = 1
) -> None:
    """See :func:`vovnet_fast.arithmetic.int8.depthwise`."""
    c = x.shape[3]
    _extension.load("cpu").int8_depthwise(
        torch.get_num_threads(),
        **_bytes(x=x, out=out),
        weight=packed("weight", layer.weight, torch.int8, 3, 3, c),
        multiplier=packed("multiplier", layer.multiplier, torch.float32, c),
        zero=packed("zero", layer.zero, torch.uint8, c),
        **windows(x, out),
        stride=stride,
        levels=levels,
    )


def max_pool(x: Tensor, out: Tensor, mode: Pool) -> None:
    """See :func:`vovnet_fast.arithmetic.int8.max_pool`."""
    _extension.load("cpu").int8_max_pool(
        torch.get_num_threads(),
        **_bytes(x=x, out=out),
        **windows(x, out),
        pad=0 if mode == "ceil" else 1,
    )


def gates(sums: Tensor, num_pixels: int, layer: QuantizedGate) -> Tensor:
    """See :func:`vovnet_fast.arithmetic.int8.gates`."""
    n, tiles, c = sums.shape
    mean = sums.new_empty(n, c, dtype=torch.int16)
    out = sums.new_empty(n, c)
    most = int(layer.most) if layer.table is None else TABLE - 1
    weight = packing.kept_tiles("gates", layer.weight, _as_it_is)
    _extension.load("cpu").int8_gates(
        torch.get_num_threads(),
        partials=packed("sums", sums, torch.int32, n, tiles, c),
        mean=pointer("mean", mean),
        out=pointer("out", out),
        fc_weight=packed("weight", weight, torch.int16, c, c),
        fc_bias=packed("bias", layer.bias, torch.int32, c),
        multiplier=packed("multiplier", layer.multiplier, torch.float32, c),
        table=packed("table", layer.table, torch.int32, TABLE),
        n=n,
        tiles=tiles,
        c=c,
        mean_factor=_float32(layer.mean_scale / num_pixels),
        most=most,
    )
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
    n, _, _, c = z.shape
    _extension.load("cpu").int8_apply_gates(
        torch.get_num_threads(),
        **_bytes(z=z, identity=identity, out=out),
        feature=_values("feature", feature, *z.shape),
        gates=packed("gates", gates, torch.int32, n, c),
        **image(z),
        rescale=2.0**-layer.shift,
        step=_float32(layer.scale * 2.0**-layer.shift),
        gate=int(layer.gate),
        identity_gate=int(layer.identity),
        levels=levels,
    )


def _pack(engine: str, weight: Tensor) -> Tensor:
    """``[C_out, K, K, C_in]`` int8, or int16, as an engine takes it."""
    c_out, kernel, _, c_in = weight.shape
    cpu = _extension.load("cpu")
    with torch.inference_mode(False):
        size = cpu.int8_conv_pack_bytes(engine, c_out, kernel, c_in)
        tiles = torch.empty(size, dtype=torch.uint8, device="cpu")
    cpu.int8_conv_pack(
        torch.get_num_threads(),
        engine,
        weight=packed("weight", weight, weight.dtype, c_out, kernel, kernel, c_in),
        out=pointer("tiles", tiles),
        c_out=c_out,
        kernel=kernel,
        c_in=c_in,
        kind=_KINDS[weight.dtype],
    )
    return tiles


def _as_it_is(_: str, weight: Tensor) -> Tensor:
    """The weight itself, which is kept side by side with packed ones."""
    return weight


def _bytes(**views: Tensor | None) -> dict[str, Any]:
    """Views of steps."""
    found = {}
    for name, tensor in views.items():
        assert tensor is None or tensor.dtype == ACTIVATION, f"{name} is in {tensor.dtype}"
        found[name] = None if tensor is None else view(name, tensor, tensor, *tensor.shape)
    return found


def _values(name: str, tensor: Tensor | None, *shape: int) -> tuple[int, ...] | None:
    assert tensor is None or tensor.dtype == torch.float32, f"{name} is in {tensor.dtype}"
    return None if tensor is None else view(name, tensor, tensor, *shape)


def _float32(value: float) -> float:
    """The nearest number of fp32, by no op of PyTorch: none would be recorded."""
    return ctypes.c_float(value).value
