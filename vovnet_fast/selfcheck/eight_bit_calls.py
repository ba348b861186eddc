"""One call of each op in eight bits, of the same name: arguments in, results out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..arithmetic import fp8, int8
from ..arithmetic.layers import QuantizedConv, QuantizedDepthwise, QuantizedGate, QuantizedSum
from ..compat import zip
from ..specs import Gate, Pool
from .calls import Layer

POISON = 0x5D
"""What lies around a slot, in every byte: a finite number in all dtypes."""

_GUARD = 64  # Bytes.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class ByteSlot:
    """Memory of a view, with :data:`POISON` before, after and between its elements.

    Args:
        shape, stride: of the view, in elements.
        dtype: of at most four bytes.
        device: where it lies.
        alignment: bytes by which it starts after a multiple of 32.

    Attributes:
        view: the view itself, poisoned as well until something is written.
    """

    def __init__(
        self,
        shape: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        alignment: int = 0,
    ) -> None:
        size = dtype.itemsize
        first = (_GUARD + alignment) // size
        extent = sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
        total = (first + extent) * size + _GUARD
        total += -total % 4
        self._bytes = torch.full((total,), POISON, dtype=torch.uint8, device=device)
        where = tuple(shape), tuple(stride), first
        self.view = self._bytes.view(dtype).as_strided(*where)
        self._own = self._bytes.view(_INTEGERS[size]).as_strided(*where)
        self._poison = int.from_bytes(bytes([POISON] * size), "little")

    @classmethod
    def like(cls, view: Tensor, images: int) -> ByteSlot:
        """One for the first images of a view, laid out and aligned as the view is."""
        shape = images, *view.shape[1:]
        return cls(shape, view.stride(), view.dtype, view.device, view.data_ptr() % 32)

    def clear(self) -> None:
        """Poison the view too."""
        self._own.fill_(self._poison)

    def untouched(self) -> bool:
        """Whether nothing was written around the view, which this poisons."""
        self.clear()
        return bool((self._bytes == POISON).all())


class Numbers:
    """Makes arguments of calls; in the same order of requests, the same numbers.

    Args:
        form: ``int8`` or ``fp8``.
        device: where they lie.
        levels: the largest activation.
    """

    def __init__(self, form: str, device: torch.device, levels: int) -> None:
        self.form, self.device, self.levels = form, device, levels
        self.ops: ModuleType = int8 if form == "int8" else fp8
        self._random = torch.Generator("cpu").manual_seed(0)
        self.slots: list[ByteSlot] = []

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """Between both, ends included, which come up more often than others."""
        # Nobody's default device may say where: the generator is the processor's.
        options = dict(generator=self._random, device="cpu")
        x = torch.randint(low, high + 1, shape, **options)  # type: ignore[call-overload]
        ends = torch.randint(0, 8, shape, **options)  # type: ignore[call-overload]
        x = torch.where(ends == 0, low, torch.where(ends == 1, high, x))
        return x.to(self.device, dtype)

    def floats(self, *shape: int, scale: float = 1.0) -> Tensor:
        """fp32 between 0 and ``scale``."""
        options = dict(generator=self._random, device="cpu", dtype=torch.float32)
        return (torch.rand(shape, **options) * scale).to(self.device)  # type: ignore[call-overload]

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Normally distributed."""
        options = dict(generator=self._random, device="cpu", dtype=torch.float32)
        return torch.randn(shape, **options).to(self.device, dtype)  # type: ignore[call-overload]

    def slot(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """``[N, H, W, C]`` in a wider buffer, poisoned."""
        dtype = self.ops.ACTIVATION if dtype is None else dtype
        _, h, w, c = shape
        pixel = c + 32 // dtype.itemsize  # Slots stay aligned to 16 bytes.
        strides = h * w * pixel, w * pixel, pixel, 1
        self.slots.append(ByteSlot(shape, strides, dtype, self.device))
        return self.slots[-1].view

    def activations(self, *shape: int) -> Tensor:
        """Such a slot, filled."""
        if self.form == "int8":
            return self.slot(*shape).copy_(self.integers(0, self.levels, *shape, dtype=torch.uint8))
        return self.slot(*shape).copy_(self.normal(*shape, dtype=torch.float32).relu())

    def weight(self, *shape: int, limit: int = int8.LARGEST) -> Tensor:
        """As a layer has them."""
        if self.form == "int8":
            kind = torch.int8 if limit == int8.LARGEST else torch.int16
            return self.integers(-limit, limit, *shape, dtype=kind)
        return self.normal(*shape, dtype=self.ops.ACTIVATION)

    def factors(self, channels: int, products: int, largest: int = int8.LARGEST) -> Tensor:
        """``[C]`` multipliers that spread sums of so many products over the levels, and beyond."""
        typical = float(products) ** 0.5
        if self.form == "int8":
            typical *= largest * 60.0
        return self.floats(channels, scale=2.0 * min(self.levels, 255) / typical)

    def bias(self, channels: int, reach: int = 4000) -> Tensor:
        """``[C]`` in units of the accumulator."""
        if self.form == "int8":
            return self.integers(-reach, reach, channels, dtype=torch.int32)
        return self.normal(channels, dtype=torch.float32)

    def untouched(self) -> bool:
        """Whether nothing was written beside a slot. Spoils what is in the slots."""
        return all(slot.untouched() for slot in self.slots)


def quantize_image(ops: ModuleType, t: Numbers, *, wide: bool) -> Iterator[Tensor]:
    """Beyond the range too."""
    x = (t.floats(2, 3, 9, 13) - 0.5).permute(0, 2, 3, 1)
    out = torch.zeros(x.shape, dtype=t.ops.image_dtype(wide), device=t.device)
    ops.quantize_image(x, 0.4 / (int8.WIDE if wide else int8.LARGEST), out, wide=wide)
    yield out


def conv(
    ops: ModuleType, t: Numbers, *, layer: Layer, written: str, wide: bool = False
) -> Iterator[Tensor]:
    """``written``: the slot, the feature, or both and a pool."""
    n, h, w = layer.size
    image = layer.c_in == 3
    x = t.activations(n, h, w, layer.c_in)
    if image:
        x = torch.zeros(n, h, w, 3, dtype=t.ops.image_dtype(wide), device=t.device)
        t.ops.quantize_image(t.floats(n, h, w, 3) - 0.5, 0.4 / 127, x, wide=wide)
    limit = int8.WIDE_WEIGHT // 8 if wide else int8.LARGEST
    weight = t.weight(layer.c_out, layer.kernel, layer.kernel, layer.c_in, limit=limit)
    if wide and t.form == "fp8":
        weight = weight.to(torch.float32)
    products = layer.kernel**2 * layer.c_in
    quantized = QuantizedConv(
        weight, t.bias(layer.c_out), t.factors(layer.c_out, products, limit),
        t.floats(layer.c_out, scale=0.01), layer.stride, None,
        t.floats(layer.c_in), None, 1.0,
    )  # fmt: skip
    out = None if written == "feature" else t.slot(*layer.output, layer.c_out)
    feature = t.slot(*layer.output, layer.c_out, dtype=torch.float32)
    sums = ops.conv(
        x, quantized, out, levels=t.levels, feature=None if written == "slot" else feature,
        pool=written == "both",
    )  # fmt: skip
    if out is not None:
        yield out
    if written != "slot":
        yield feature
    if sums is not None and out is not None:
        yield pooled(sums, out)


def pooled(sums: Tensor, out: Tensor) -> Tensor:
    """Partial sums ``[N, T, C]`` of what is stored, added up, as they can be held against others.

    In fp8 by what they should be: an activation that is a step from the reference's, as it may be,
    moves the sum of a small map by more than sums may be wrong.
    """
    total = sums.sum(1, dtype=sums.dtype)
    if not total.is_floating_point():
        return total
    return (total + 1) / (out.to(torch.float32).sum((1, 2)) + 1)


def depthwise(
    ops: ModuleType, t: Numbers, *, shape: Sequence[int], stride: int
) -> Iterator[Tensor]:
    c = shape[3]
    layer = Layer(3, c, c, (shape[0], shape[1], shape[2]), stride)
    zero = t.integers(0, t.levels // 4, c, dtype=torch.uint8)
    quantized = QuantizedDepthwise(
        t.weight(3, 3, c), t.factors(c, 9), torch.zeros_like(zero) if t.form == "fp8" else zero,
        t.floats(c), t.floats(c),
    )  # fmt: skip
    out = t.slot(*layer.output, c)
    ops.depthwise(t.activations(*shape), quantized, out, levels=t.levels, stride=stride)
    yield out


def max_pool(ops: ModuleType, t: Numbers, *, shape: Sequence[int], mode: Pool) -> Iterator[Tensor]:
    n, h, w, c = shape
    size = (h // 2, w // 2) if mode == "ceil" else ((h + 1) // 2, (w + 1) // 2)
    out = t.slot(n, *size, c)
    ops.max_pool(t.activations(*shape), out, mode)
    yield out


def gates(ops: ModuleType, t: Numbers, *, channels: int, kind: Gate) -> Iterator[Tensor]:
    """Logits on either side of what saturates a gate."""
    c, pixels = channels, 300
    if t.form == "int8":
        sums = t.integers(0, 60 * t.levels, 2, 5, c, dtype=torch.int32)
        table = t.integers(0, int8.FACTOR, int8.TABLE, dtype=torch.int32)
        scale = 2 ** (int8.MEAN_BITS - t.levels.bit_length())
        layer = QuantizedGate(
            t.weight(c, c, limit=3000), t.integers(0, 2**28, c, dtype=torch.int32),
            t.floats(c, scale=1e-4), scale, 20000.0, kind, table if kind == "sigmoid" else None,
        )  # fmt: skip
    else:
        sums = t.floats(2, 5, c, scale=100.0)
        layer = QuantizedGate(
            t.normal(c, c, dtype=torch.float32), t.bias(c), t.floats(c, scale=0.5), 1, 1.5, kind,
            None,
        )  # fmt: skip
    yield ops.gates(sums, pixels, layer)


def apply_gates(
    ops: ModuleType, t: Numbers, *, shape: Sequence[int], gated: bool, added: bool, written: str
) -> Iterator[Tensor]:
    z, identity = t.activations(*shape), t.activations(*shape) if added else None
    found, layer = None, QuantizedSum(0.7, 1.2, 0, 0.03)
    if t.form == "int8":
        layer = QuantizedSum(20000, 9000, 14, 0.03)
    if gated:
        found = t.floats(shape[0], shape[3], scale=1.5)
        if t.form == "int8":
            found = t.integers(0, int8.FACTOR, shape[0], shape[3], dtype=torch.int32)
    out = None if written == "feature" else t.slot(*shape)
    feature = None if written == "slot" else t.slot(*shape, dtype=torch.float32)
    ops.apply_gates(z, found, identity, layer, out, levels=t.levels, feature=feature)
    yield from (one for one in (out, feature) if one is not None)
