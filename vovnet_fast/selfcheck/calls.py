"""One call of each function of the backends, of the same name: arguments in, results out.

Each returns everything that the function computes. A tensor is held against its own largest
value, so rows of different magnitude are returned apart.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dtypes import accumulator
from ..specs import Gate, Pool
from .tensors import Tensors

Backend = Any
"""A module of :mod:`vovnet_fast.backends`."""


def backend_module(name: str) -> ModuleType:
    """A backend by its name."""
    return importlib.import_module(f"vovnet_fast.backends.{name}")


def reference() -> Backend:
    """The backend that others are held against."""
    return backend_module("reference")


Size = tuple[int, int, int]


class Layer(NamedTuple):
    """A convolution: kernel size, channels in and out, size of the input, stride."""

    kernel: int
    c_in: int
    c_out: int
    size: Size
    stride: int = 1

    def __str__(self) -> str:
        stride = f" with stride {self.stride}" if self.stride > 1 else ""
        return (
            f"{self.kernel}x{self.kernel}{stride}, {self.c_in} to {self.c_out} channels, "
            f"{words(self.size)}"
        )

    @property
    def output(self) -> Size:
        n, h, w = self.size
        return n, (h - 1) // self.stride + 1, (w - 1) // self.stride + 1

    def x(self, t: Tensors) -> Tensor:
        return t.activations(*self.size, self.c_in)

    def weight(self, t: Tensors, *, master: bool = False) -> Tensor:
        shape = (self.c_out, self.kernel, self.kernel, self.c_in)
        return t.weight(*shape, fan=math.prod(shape[1:]), master=master)

    def gradient(self, t: Tensors) -> Tensor:
        return t.activations(*self.output, self.c_out)

    def out(self, t: Tensors) -> Tensor:
        return t.output(*self.output, self.c_out)


def words(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def conv(backend: Backend, t: Tensors, *, layer: Layer, pool: bool) -> Iterator[Tensor]:
    x, weight, out = layer.x(t), layer.weight(t), layer.out(t)
    scale, shift = t.vector(layer.c_out), t.vector(layer.c_out, low=-0.5, high=0.5)
    partials = backend.conv(x, weight, scale, shift, out, stride=layer.stride, relu=True, pool=pool)
    yield out
    if pool:
        yield partials.sum(1)


def conv_statistics(backend: Backend, t: Tensors, *, layer: Layer) -> Iterator[Tensor]:
    x, weight, out = layer.x(t), layer.weight(t), layer.out(t)
    partials = backend.conv_statistics(x, weight, out, stride=layer.stride)
    yield out
    yield from reference().batch_norm_merge(partials.double()).to(partials.dtype)


def conv_input_grad(
    backend: Backend,
    t: Tensors,
    *,
    layer: Layer,
    scaled: bool,
    added: bool,
    master: bool = False,
) -> Iterator[Tensor]:
    """As between two layers, masked; ``added``: to the gradient in the slot, in place."""
    g, weight, scale = layer.gradient(t), layer.weight(t, master=master), t.vector(layer.c_out)
    out, mask = layer.x(t), t.activations(*layer.size, layer.c_in, relu=True)
    backend.conv_input_grad(
        g, weight, scale if scaled else None, out, stride=layer.stride,
        add=out if added else None, mask=mask,
    )  # fmt: skip
    yield out


def concat_input_grad(
    backend: Backend, t: Tensors, *, layer: Layer, added: bool, masked: int, master: bool = False
) -> Iterator[Tensor]:
    """Of the 1x1: the identity belongs to the first channels, the mask to the last ones."""
    g, weight, scale = layer.gradient(t), layer.weight(t, master=master), t.vector(layer.c_out)
    add = t.activations(*layer.size, layer.c_out) if added else None
    mask = t.activations(*layer.size, masked, relu=True)
    out = t.output(*layer.size, layer.c_in)
    backend.conv_input_grad(g, weight, scale, out, add=add, mask=mask)
    yield out


def conv_weight_grad(
    backend: Backend, t: Tensors, *, layer: Layer, scaled: bool, master: bool = False
) -> Iterator[Tensor]:
    x, g, weight = layer.x(t), layer.gradient(t), layer.weight(t, master=master)
    scale = t.vector(layer.c_out) if scaled else None
    found = backend.conv_weight_grad(x, g, weight, scale, stride=layer.stride)
    yield from (grad for grad in found if grad is not None)


def normalize(
    backend: Backend, t: Tensors, *, shape: Sequence[int], pool: bool
) -> Iterator[Tensor]:
    z, out = t.activations(*shape), t.output(*shape)
    scale, shift = t.vector(shape[3]), t.vector(shape[3], low=-0.5, high=0.5)
    partials = backend.normalize(z, scale, shift, out, pool=pool)
    yield out
    if pool:
        yield partials.sum(1)


def _statistics(t: Tensors, channels: int) -> Tensor:
    """``[R, 3, C]``: counts, sums and sums of squared deviations of parts."""
    parts, count = 37, 16
    return torch.stack(
        [
            torch.full((parts, channels), count, dtype=accumulator(t.dtype), device=t.device),
            t.vector(parts, channels, low=2 * count, high=3 * count),
            t.vector(parts, channels, low=count, high=2 * count),
        ],
        dim=1,
    )


def _norm(t: Tensors, channels: int, count: int) -> Tensor:
    """``[6, C]``: mean, rstd, scale, shift, variance and count of a batch norm."""
    norm = t.vector(6, channels)
    norm[5] = count
    return norm


def batch_norm_merge(backend: Backend, t: Tensors, *, channels: int) -> Iterable[Tensor]:
    merged: Tensor = backend.batch_norm_merge(_statistics(t, channels))
    return merged


def batch_norm_finish(
    backend: Backend, t: Tensors, *, channels: int, affine: bool
) -> Iterable[Tensor]:
    partials, gamma, beta = _statistics(t, channels), None, None
    if affine:
        gamma, beta = t.vector(channels), t.vector(channels, low=-1)
    norm: Tensor = backend.batch_norm_finish(partials, gamma, beta, 1e-5)
    return norm


def batch_norm_sums(backend: Backend, t: Tensors, *, shape: Sequence[int]) -> Iterable[Tensor]:
    g, z = t.activations(*shape), t.activations(*shape)
    sums: Tensor = backend.batch_norm_sums(g, z, _norm(t, shape[3], math.prod(shape[:3])))
    return sums


def batch_norm_input_grad(
    backend: Backend, t: Tensors, *, shape: Sequence[int]
) -> Iterator[Tensor]:
    g, z, out = t.activations(*shape), t.activations(*shape), t.output(*shape)
    norm, sums = _norm(t, shape[3], math.prod(shape[:3])), t.vector(2, shape[3], low=-9, high=9)
    backend.batch_norm_input_grad(g, z, norm, sums, t.vector(shape[3]), out)
    yield out


def depthwise(
    backend: Backend, t: Tensors, *, shape: Sequence[int], stride: int
) -> Iterator[Tensor]:
    layer = Layer(3, shape[3], shape[3], (shape[0], shape[1], shape[2]), stride)
    x, weight, out = layer.x(t), t.weight(3, 3, shape[3], fan=9), layer.out(t)
    backend.depthwise(x, weight, out, stride=stride)
    yield out


def depthwise_input_grad(
    backend: Backend, t: Tensors, *, shape: Sequence[int], stride: int
) -> Iterator[Tensor]:
    layer = Layer(3, shape[3], shape[3], (shape[0], shape[1], shape[2]), stride)
    g, weight, out = layer.gradient(t), t.weight(3, 3, shape[3], fan=9), layer.x(t)
    mask = t.activations(*shape, relu=True)
    backend.depthwise_input_grad(g, weight, out, stride=stride, add=out, mask=mask)
    yield out


def depthwise_weight_grad(
    backend: Backend, t: Tensors, *, shape: Sequence[int], stride: int
) -> Iterator[Tensor]:
    layer = Layer(3, shape[3], shape[3], (shape[0], shape[1], shape[2]), stride)
    yield backend.depthwise_weight_grad(layer.x(t), layer.gradient(t), stride=stride)


def gates(
    backend: Backend, t: Tensors, *, channels: int, kind: Gate, master: bool = False
) -> Iterator[Tensor]:
    """Means near one, and logits on either side of what saturates a gate."""
    c = channels
    partials, weight = t.vector(2, 5, c, high=2), t.weight(c, c, fan=c // 16, master=master)
    yield from backend.gates(partials, 6, weight, t.weight(c, fan=4, master=master), kind)


def gate_sums(backend: Backend, t: Tensors, *, shape: Sequence[int]) -> Iterator[Tensor]:
    yield backend.gate_sums(t.activations(*shape), t.activations(*shape, relu=True))


def gates_backward(
    backend: Backend, t: Tensors, *, channels: int, kind: Gate, master: bool = False
) -> Iterable[Tensor]:
    c = channels
    dgates, gates = t.vector(3, c, low=-1, high=1), t.vector(3, c, low=-0.25, high=1.25)
    mean, weight = t.vector(3, c), t.weight(c, c, fan=c, master=master)
    grads: tuple[Tensor, ...] = backend.gates_backward(
        dgates, gates.clamp(0, 1), mean, 35, weight, kind
    )
    return grads


def apply_gates(
    backend: Backend, t: Tensors, *, shape: Sequence[int], gated: bool, added: bool
) -> Iterator[Tensor]:
    z, out = t.activations(*shape), t.output(*shape)
    gates = t.vector(shape[0], shape[3], low=0, high=1) if gated else None
    identity = t.activations(*shape) if added else None
    backend.apply_gates(z, gates, identity, out)
    yield out


def apply_gates_backward(
    backend: Backend, t: Tensors, *, shape: Sequence[int], gated: bool
) -> Iterator[Tensor]:
    dout, y, out = t.activations(*shape), t.activations(*shape, relu=True), t.output(*shape)
    gates, dpixel = (t.vector(shape[0], shape[3], low=-0.5) if gated else None for _ in "gd")
    backend.apply_gates_backward(dout, gates, dpixel, y, out)
    yield out


def _pooled(t: Tensors, shape: Sequence[int], mode: Pool) -> tuple[Tensor, Tensor, Tensor]:
    """Input, output and argmax of a max pool."""
    n, h, w, c = shape
    size = (h // 2, w // 2) if mode == "ceil" else ((h + 1) // 2, (w + 1) // 2)
    argmax = torch.full((n, *size, c), 255, dtype=torch.uint8, device=t.device)
    return t.activations(*shape), t.output(n, *size, c), argmax


def max_pool(
    backend: Backend, t: Tensors, *, shape: Sequence[int], mode: Pool, kept: bool
) -> Iterator[Tensor]:
    """``kept``: with the positions that a backward pass needs."""
    x, out, argmax = _pooled(t, shape, mode)
    backend.max_pool(x, out, mode, argmax if kept else None)
    yield out
    if kept:
        yield argmax


def max_pool_backward(
    backend: Backend, t: Tensors, *, shape: Sequence[int], mode: Pool
) -> Iterator[Tensor]:
    x, pooled, argmax = _pooled(t, shape, mode)
    reference().max_pool(x, pooled, mode, argmax)
    dout, out = t.activations(*pooled.shape), t.output(*shape)
    backend.max_pool_backward(dout, argmax, out, mode)
    yield out
