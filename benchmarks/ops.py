"""The ops of a network one by one: how a backend does them, and how eager PyTorch does.

A :class:`Case` makes the tensors of one op; a backend and eager then work on the same
numbers. A backend's activations are ``[N, H, W, C]`` views into wider buffers, as inside a
network, eager's are dense and ``channels_last``, which is what it likes best. Both do the same
work: where a kernel applies scale, shift and ReLU, eager runs its batch norm and its ReLU; where
a gradient is added to another and masked, eager adds and masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vovnet_fast import reference, specs
from vovnet_fast.backends import reference as plain
from vovnet_fast.deploy.folded import NO_EPS
from vovnet_fast.ops.features import sizes
from vovnet_fast.ops.max_pool import output_size
from vovnet_fast.tools.plan import IMAGE_CHANNELS

from .networks import Layer, Shape

aten = torch.ops.aten

STAGES = (2, 3, 4, 5)


class Work(NamedTuple):
    """One op on tensors that are there.

    Attributes:
        ours: does it by a backend, a module of :mod:`vovnet_fast.backends`.
        eager: does it by ATen.
        operands: what any implementation has to read or write once.

    Both return their result as ``[N, H, W, C]``, or as ``[C_out, K, K, C_in]``.
    """

    ours: Callable[[Any], Tensor]
    eager: Callable[[], Tensor]
    operands: Sequence[Tensor]

    @property
    def moved(self) -> int:
        """Bytes that have to be moved."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.operands)


Make = Callable[[torch.dtype, torch.device], Work]


class Case(NamedTuple):
    """An op on maps of one size.

    Attributes:
        name: unique, with channels and sizes.
        kind: ``conv`` or ``op``.
        direction: ``forward`` or ``backward``.
        shape: N, C, H, W of its input.
        flop: two a multiply-add; zero where only memory is moved.
        make: makes the tensors.
    """

    name: str
    kind: str
    direction: str
    shape: tuple[int, int, int, int]
    flop: int
    make: Make


def _dense(x: Tensor) -> Tensor:
    """``[N, C, H, W]``, channels_last and contiguous, of an ``[N, H, W, C]`` view."""
    return x.contiguous().permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


class _Tensors:
    """Makes tensors; in the same order of requests, the same numbers."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._random = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, deviation: float = 1.0, high: bool = False) -> Tensor:
        values = torch.randn(shape, generator=self._random, device=self.device) * deviation
        return values if high else values.to(self.dtype)

    def uniform(self, *shape: int, low: float = 0.5, high: float = 1.5) -> Tensor:
        """In fp32, for vectors over the channels."""
        values = torch.rand(shape, generator=self._random, device=self.device)
        return values * (high - low) + low

    def room(self, *shape: int) -> Tensor:
        """A slot in a buffer of twice its channels."""
        *pixels, c = shape
        return torch.zeros(*pixels, 2 * c, dtype=self.dtype, device=self.device)[..., :c]

    def slot(self, *shape: int, relu: bool = False) -> Tensor:
        values = self.normal(*shape)
        return self.room(*shape).copy_(values.relu() if relu else values)

    def like(self, layout: Any) -> Tensor:
        """A view with the strides of a layer's, and numbers in it."""
        view = layout.empty(self.dtype, self.device)
        return view.copy_(self.normal(*layout.shape))

    def weight(self, layer: Layer) -> Tensor:
        return self.normal(*layer.weight, deviation=math.prod(layer.weight[1:]) ** -0.5)


class _Norm(NamedTuple):
    """A batch norm with fixed statistics, as eager runs it: mean, variance, gamma, beta."""

    mean: Tensor
    var: Tensor
    gamma: Tensor
    beta: Tensor

    @classmethod
    def of(cls, scale: Tensor, shift: Tensor) -> _Norm:
        return cls(torch.zeros_like(scale), torch.ones_like(scale), scale, shift)

    def __call__(self, z: Tensor) -> Tensor:
        return F.batch_norm(z, *self, eps=NO_EPS)


# --------------------------------------------------------------------------------------
# Convolution layers
# --------------------------------------------------------------------------------------


def conv_cases(found: dict[str, Layer]) -> Iterator[Case]:
    """Each layer forward, and its two gradients; that of an image nobody needs."""
    for name, layer in found.items():
        yield _conv_case(name, "forward", layer, _conv)
        if layer.weight[3] != IMAGE_CHANNELS:
            yield _conv_case(f"{name} input gradient", "backward", layer, _input_grad)
        yield _conv_case(f"{name} weight gradient", "backward", layer, _weight_grad)


def _conv_case(name: str, direction: str, layer: Layer, make: Callable[..., Work]) -> Case:
    n, h, w, c = layer.x.shape
    return Case(name, "conv", direction, (n, c, h, w), layer.flop, _bind(make, layer))


def _bind(make: Callable[..., Work], *words: Any) -> Make:
    return lambda dtype, device: make(_Tensors(dtype, device), *words)


def _conv(t: _Tensors, layer: Layer) -> Work:
    x, weight, out = t.like(layer.x), t.weight(layer), layer.out.empty(t.dtype, t.device)
    scale = t.uniform(layer.weight[0])
    shift = t.uniform(layer.weight[0], low=-0.5, high=0.5)
    dense, kernel, norm = _dense(x), _dense(weight), _Norm.of(scale, shift)

    def ours(backend: Any) -> Tensor:
        options: dict[str, Any] = dict(stride=layer.stride, relu=True, pool=layer.pool)
        backend.conv(x, weight, scale, shift, out, **options)
        return out

    def eager() -> Tensor:
        z = F.conv2d(dense, kernel, None, layer.stride, layer.weight[1] // 2)
        y = norm(z).relu_()
        if layer.pool:
            y.mean((2, 3))
        return _nhwc(y)

    return Work(ours, eager, (x, weight, out))


def _input_grad(t: _Tensors, layer: Layer) -> Work:
    """Inside a block the gradient of a 3x3 is added to the one in its slot, and masked.

    Eager is given the gradient after its batch norm, which :func:`_weight_grad` pays for.
    """
    g, weight, x = t.like(layer.out), t.weight(layer), t.like(layer.x).relu_()
    scale, out = t.uniform(layer.weight[0]), torch.empty_like(x)
    inside = layer.weight[1] == 3 and layer.stride == 1
    add, mask = (t.like(layer.x), x) if inside else (None, None)
    dz, kernel, dense = _dense((g * scale).to(t.dtype)), _dense(weight), _dense(x)
    dense_add = None if add is None else _dense(add)

    def ours(backend: Any) -> Tensor:
        backend.conv_input_grad(g, weight, scale, out, stride=layer.stride, add=add, mask=mask)
        return out

    def eager() -> Tensor:
        dx = _convolution_backward(dz, dense, kernel, layer.stride, [True, False, False])[0]
        if dense_add is not None:
            dx = aten.threshold_backward(dx + dense_add, dense, 0)
        return _nhwc(dx)

    read = [tensor for tensor in (g, weight, add, mask) if tensor is not None]
    return Work(ours, eager, (*read, out))


def _weight_grad(t: _Tensors, layer: Layer) -> Work:
    """Gradients of weight, scale and shift; in eager those of the convolution and its norm."""
    x, g, weight = t.like(layer.x), t.like(layer.out), t.weight(layer)
    scale = t.uniform(layer.weight[0])
    dense, kernel, norm = _dense(x), _dense(weight), _Norm.of(scale, torch.zeros_like(scale))
    dense_g = _dense(g)
    z = F.conv2d(dense, kernel, None, layer.stride, layer.weight[1] // 2)

    def ours(backend: Any) -> Tensor:
        dweight: Tensor = backend.conv_weight_grad(x, g, weight, scale, stride=layer.stride)[0]
        return dweight

    def eager() -> Tensor:
        dz = aten.native_batch_norm_backward(
            dense_g, z, norm.gamma, norm.mean, norm.var, None, None, False, 0.0, [True] * 3
        )[0]
        dw = _convolution_backward(dz, dense, kernel, layer.stride, [False, True, False])[1]
        return _nhwc(dw)

    # dW has no operand of its own in the table: it is as large as the weight, in fp32.
    return Work(ours, eager, (x, g, weight, torch.empty_like(weight, dtype=torch.float32)))


def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, stride: int, which: list[bool], groups: int = 1
) -> Any:
    pad = weight.shape[2] // 2
    return aten.convolution_backward(
        g, x, weight, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], groups, which
    )


# --------------------------------------------------------------------------------------
# Everything else
# --------------------------------------------------------------------------------------


def other_cases(spec: str, shape: Shape, stages: Sequence[int] = STAGES) -> Iterator[Case]:
    """eSE, batch norm and max pool in the first block of each stage.

    In a depthwise network these are left out, and there are its depthwise convolutions.
    """
    architecture = specs.get(spec)
    maps = sizes(architecture, *shape[1:])
    first = {block.stage: block for block in reversed(list(architecture.blocks()))}
    for stage, block in first.items():
        if stage not in stages:
            continue
        pixels = (shape[0], *maps[f"stage{stage}"])
        out, mid = (*pixels, block.out_channels), (*pixels, block.mid_channels)
        if block.depthwise:
            flop = 18 * math.prod(mid)
            yield _case("depthwise 3x3", "forward", mid, _depthwise, flop)
            both = flop + 2 * math.prod(mid) * block.mid_channels
            yield _case("depthwise 3x3 and 1x1", "forward", mid, _depthwise_layer, both)
            yield _case("depthwise 3x3 input gradient", "backward", mid, _depthwise_input, flop)
            yield _case("depthwise 3x3 weight gradient", "backward", mid, _depthwise_weight, flop)
            continue
        flop = 2 * pixels[0] * block.out_channels**2
        yield _case("eSE", "forward", out, _ese, flop)
        yield _case("eSE", "backward", out, _ese_backward, 2 * flop)
        yield _case("batch norm, fixed", "forward", mid, _normalize)
        flop = 18 * math.prod(mid) * block.mid_channels
        yield _case("conv 3x3 + batch norm", "forward", mid, _batch_norm, flop)
        yield _case("batch norm", "backward", mid, _batch_norm_backward)
        if f"stage{stage + 1}" in maps:
            yield _case("max pool", "forward", out, _max_pool)
            yield _case("max pool", "backward", out, _max_pool_backward)


def _case(op: str, direction: str, shape: Sequence[int], make: Callable, flop: int = 0) -> Case:
    n, h, w, c = shape
    name = f"{op} {c} on {n}x{h}x{w}{'' if direction == 'forward' else ' backward'}"
    return Case(name, "op", direction, (n, c, h, w), flop, _bind(make, tuple(shape)))


NHWC = tuple[int, int, int, int]


def _ese(t: _Tensors, shape: NHWC) -> Work:
    """With an identity. The convolution has left partial sums for ours; eager pools."""
    n, h, w, c = shape
    z, identity, out = t.slot(*shape, relu=True), t.slot(*shape), t.room(*shape)
    weight, bias = t.normal(c, c, deviation=c**-0.5), t.normal(c)
    partials = torch.zeros(n, -(-h * w // 128), c, device=t.device)
    partials[:, 0] = z.sum((1, 2), dtype=torch.float32)
    dense, added, kernel = _dense(z), _dense(identity), weight[:, :, None, None]

    def ours(backend: Any) -> Tensor:
        gates, _ = backend.gates(partials, h * w, weight, bias, "hard_sigmoid")
        backend.apply_gates(z, gates, identity, out)
        return out

    def eager() -> Tensor:
        return _nhwc(reference.ese(dense, kernel, bias) + added)

    return Work(ours, eager, (z, identity, weight, partials, out))


def _ese_backward(t: _Tensors, shape: NHWC) -> Work:
    """And that of the ReLU before it. Eager: what autograd runs for the same formulas."""
    h, w, c = shape[1:]
    y, dout, out = t.slot(*shape, relu=True), t.slot(*shape), t.room(*shape)
    weight, bias = t.normal(c, c, deviation=c**-0.5), t.normal(c)
    partials = y.sum((1, 2), dtype=torch.float32)[:, None]
    gates, mean = plain.gates(partials, h * w, weight, bias, "hard_sigmoid")
    dense, dense_dout = _dense(y), _dense(dout)
    low_gates, low_mean = (v.to(t.dtype)[:, :, None, None] for v in (gates, mean))
    inside = (low_gates > 0) & (low_gates < 1)

    def ours(backend: Any) -> Tensor:
        dgates = backend.gate_sums(dout, y)
        dpixel, *_ = backend.gates_backward(dgates, gates, mean, h * w, weight, "hard_sigmoid")
        backend.apply_gates_backward(dout, gates, dpixel, y, out)
        return out

    def eager() -> Tensor:
        dgates = (dense_dout * dense).sum((2, 3), keepdim=True)
        d = torch.where(inside, dgates / 6, 0)
        dmean, *_ = _convolution_backward(d, low_mean, weight[:, :, None, None], 1, [True] * 3)
        dy = dense_dout * low_gates + dmean / (h * w)
        return _nhwc(aten.threshold_backward(dy, dense, 0))

    return Work(ours, eager, (y, dout, weight, out))


def _normalize(t: _Tensors, shape: NHWC) -> Work:
    z, out = t.slot(*shape), t.room(*shape)
    scale, shift = t.uniform(shape[3]), t.uniform(shape[3], low=-0.5, high=0.5)
    dense, norm = _dense(z), _Norm.of(scale, shift)

    def ours(backend: Any) -> Tensor:
        backend.normalize(z, scale, shift, out)
        return out

    return Work(ours, lambda: _nhwc(norm(dense).relu_()), (z, out))


def _batch_norm(t: _Tensors, shape: NHWC) -> Work:
    """A 3x3 convolution, statistics of the batch, normalisation, ReLU."""
    c = shape[3]
    x, raw, out = t.slot(*shape), t.room(*shape), t.room(*shape)
    weight = t.normal(c, 3, 3, c, deviation=(9 * c) ** -0.5)
    gamma, beta = t.uniform(c), t.uniform(c, low=-0.5, high=0.5)
    mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)
    dense, kernel = _dense(x), _dense(weight)

    def ours(backend: Any) -> Tensor:
        partials = backend.conv_statistics(x, weight, raw)
        norm = backend.batch_norm_finish(partials, gamma, beta, 1e-5)
        backend.normalize(raw, norm[2], norm[3], out)
        return out

    def eager() -> Tensor:
        z = F.conv2d(dense, kernel, None, 1, 1)
        return _nhwc(F.batch_norm(z, mean, var, gamma, beta, True).relu_())

    return Work(ours, eager, (x, weight, raw, raw, out))  # What all are made of is read again.


def _batch_norm_backward(t: _Tensors, shape: NHWC) -> Work:
    c, count = shape[3], math.prod(shape[:3])
    g, z, out = t.slot(*shape), t.slot(*shape), t.room(*shape)
    gamma, beta = t.uniform(c), t.uniform(c)
    values = z.float().flatten(0, 2)
    total = values.sum(0)
    deviations = (values - total / count).square().sum(0)
    partials = torch.stack([torch.full_like(total, count), total, deviations])[None]
    norm = plain.batch_norm_finish(partials, gamma, beta, 1e-5)
    dense, dense_g = _dense(z), _dense(g)
    mean, rstd = norm[0].contiguous(), norm[1].contiguous()

    def ours(backend: Any) -> Tensor:
        sums = backend.batch_norm_sums(g, z, norm)
        backend.batch_norm_input_grad(g, z, norm, sums, gamma, out)
        return out

    def eager() -> Tensor:
        dz = aten.native_batch_norm_backward(
            dense_g, dense, gamma, mean, mean, mean, rstd, True, 1e-5, [True] * 3
        )[0]
        return _nhwc(dz)

    return Work(ours, eager, (g, z, g, z, out))  # The sums need all of both before.


def _max_pool(t: _Tensors, shape: NHWC) -> Work:
    """As in training: with the positions of the maxima."""
    n, h, w, c = shape
    x, out = t.slot(*shape), t.room(n, *output_size(h, w, "ceil"), c)
    argmax = torch.empty(out.shape, dtype=torch.uint8, device=t.device)
    dense = _dense(x)

    def ours(backend: Any) -> Tensor:
        backend.max_pool(x, out, "ceil", argmax)
        return out

    def eager() -> Tensor:
        return _nhwc(F.max_pool2d(dense, 3, 2, ceil_mode=True, return_indices=True)[0])

    return Work(ours, eager, (x, argmax, out))


def _max_pool_backward(t: _Tensors, shape: NHWC) -> Work:
    n, h, w, c = shape
    x, out = t.slot(*shape), t.room(*shape)
    dout = t.slot(n, *output_size(h, w, "ceil"), c)
    argmax = torch.empty(dout.shape, dtype=torch.uint8, device=t.device)
    plain.max_pool(x, torch.empty_like(dout), "ceil", argmax)
    dense, dense_dout = _dense(x), _dense(dout)
    indices = F.max_pool2d(dense, 3, 2, ceil_mode=True, return_indices=True)[1]

    def ours(backend: Any) -> Tensor:
        backend.max_pool_backward(dout, argmax, out, "ceil")
        return out

    def eager() -> Tensor:
        return _nhwc(
            aten.max_pool2d_with_indices_backward(
                dense_dout, dense, [3, 3], [2, 2], [0, 0], [1, 1], True, indices
            )
        )

    return Work(ours, eager, (dout, argmax, out))


def _depthwise(t: _Tensors, shape: NHWC) -> Work:
    x, out, weight = t.slot(*shape), t.room(*shape), t.normal(3, 3, shape[3], deviation=1 / 3)
    dense, kernel = _dense(x), _depthwise_kernel(weight)

    def ours(backend: Any) -> Tensor:
        backend.depthwise(x, weight, out)
        return out

    def eager() -> Tensor:
        return _nhwc(F.conv2d(dense, kernel, None, 1, 1, groups=shape[3]))

    return Work(ours, eager, (x, weight, out))


def _depthwise_layer(t: _Tensors, shape: NHWC) -> Work:
    """With the 1x1 and its norm and ReLU: in one kernel where a backend has it, and chooses it."""
    c = shape[3]
    x, out, between = (
        t.slot(*shape),
        t.room(*shape),
        torch.empty(shape, dtype=t.dtype, device=t.device),
    )
    taps, weight = t.normal(3, 3, c, deviation=1 / 3), t.normal(c, 1, 1, c, deviation=c**-0.5)
    scale, shift = t.uniform(c), t.uniform(c, low=-0.5, high=0.5)
    norm, dense = _Norm.of(scale, shift), _dense(x)
    kernel, pointwise = _depthwise_kernel(taps), _dense(weight)

    def ours(backend: Any) -> Tensor:
        if hasattr(backend, "depthwise_conv"):
            options = dict(taps=taps, spatial=lambda: between)
            backend.depthwise_conv(x, weight, scale, shift, out, **options)
        else:
            backend.depthwise(x, taps, between)
            backend.conv(between, weight, scale, shift, out)
        return out

    def eager() -> Tensor:
        z = F.conv2d(F.conv2d(dense, kernel, None, 1, 1, groups=c), pointwise)
        return _nhwc(norm(z).relu_())

    return Work(ours, eager, (x, taps, weight, out))


def _depthwise_kernel(weight: Tensor) -> Tensor:
    """``[C, 1, 3, 3]`` of ``[3, 3, C]``."""
    return weight.permute(2, 0, 1).unsqueeze(1).contiguous()


def _depthwise_input(t: _Tensors, shape: NHWC) -> Work:
    """Masked, and added to the gradient that is there."""
    g, add, mask, out = t.slot(*shape), t.slot(*shape), t.slot(*shape, relu=True), t.room(*shape)
    weight = t.normal(3, 3, shape[3], deviation=1 / 3)
    dense_g, dense_add, dense = _dense(g), _dense(add), _dense(mask)
    kernel = _depthwise_kernel(weight)

    def ours(backend: Any) -> Tensor:
        backend.depthwise_input_grad(g, weight, out, add=add, mask=mask)
        return out

    def eager() -> Tensor:
        which = [True, False, False]
        dx = _convolution_backward(dense_g, dense, kernel, 1, which, shape[3])[0]
        return _nhwc(aten.threshold_backward(dx + dense_add, dense, 0))

    return Work(ours, eager, (g, weight, add, mask, out))


def _depthwise_weight(t: _Tensors, shape: NHWC) -> Work:
    x, g = t.slot(*shape), t.slot(*shape)
    dense, dense_g = _dense(x), _dense(g)
    kernel = _depthwise_kernel(t.normal(3, 3, shape[3]))

    def ours(backend: Any) -> Tensor:
        dweight: Tensor = backend.depthwise_weight_grad(x, g)
        return dweight

    def eager() -> Tensor:
        which = [False, True, False]
        dw = _convolution_backward(dense_g, dense, kernel, 1, which, shape[3])[1]
        return dw[:, 0].permute(1, 2, 0)

    return Work(ours, eager, (x, g))
