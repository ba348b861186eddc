"""Convolution, batch norm, ReLU: one layer, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from .._dtypes import accumulator
from . import _checks, batch_norm
from .batch_norm import SCALE, SHIFT, FixedNorm
from .memory import Memory


class ConvParams(NamedTuple):
    """One convolution layer and its batch norm.

    Attributes:
        weight: ``[C_out, K, K, C_in]``, K = 1 or 3. Where dtype or layout are not those of
            contiguous activations, a rounded copy is made at every call.
        scale: ``[C_out]``, fp32 (fp64 for fp64): gamma / sqrt(var + eps).
        shift: ``[C_out]``, as ``scale``: beta + (bias - mean) * scale.
        stride: of the convolution, or of the depthwise one before it.
        depthwise: ``[3, 3, C_in]`` of a depthwise 3x3 that comes first, or None.
        eps: None where the statistics are fixed, as above. Otherwise the norm takes those
            of the batch: ``scale`` and ``shift`` are then gamma and beta themselves, and
            ``eps`` is added to the variance.
        group: name of the process group that shares the statistics of the batch (SyncBN).
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    stride: int = 1
    depthwise: Tensor | None = None
    eps: float | None = None
    group: str = ""


_FIXED = ("conv",)
_BATCH = ("conv_statistics", "batch_norm_finish", "normalize")
_SHARED = ("batch_norm_merge",)
_DEPTHWISE = ("depthwise",)
_BACKWARD = ("conv_input_grad", "conv_weight_grad")
_BATCH_BACKWARD = ("batch_norm_sums", "batch_norm_input_grad")
_DEPTHWISE_BACKWARD = ("depthwise_input_grad", "depthwise_weight_grad")


class Kinds(NamedTuple):
    """Which kinds of layers there are among several.

    Attributes:
        depthwise: with a depthwise convolution that comes first.
        fixed: with a norm of fixed statistics.
        batch: with a norm that takes its statistics from the batch.
        shared: with one that shares them with other processes.
    """

    depthwise: bool
    fixed: bool
    batch: bool
    shared: bool

    @classmethod
    def of(cls, layers: Sequence[ConvParams]) -> Kinds:
        """Those of layers as the ops take them."""
        return cls(
            any(layer.depthwise is not None for layer in layers),
            any(layer.eps is None for layer in layers),
            any(layer.eps is not None for layer in layers),
            any(layer.eps is not None and bool(layer.group) for layer in layers),
        )

    def needs(self, *, backward: bool) -> tuple[str, ...]:
        """The functions of a backend that such layers use; see :func:`backends.select`.

        ``backward``: in a forward pass that a backward pass follows, and in the latter.
        """
        used = (
            (_FIXED, self.fixed),
            (_BATCH, self.batch),
            (_SHARED, self.shared),
            (_DEPTHWISE, self.depthwise),
            (_BACKWARD, backward),
            (_BATCH_BACKWARD, backward and self.batch),
            (_DEPTHWISE_BACKWARD, backward and self.depthwise),
        )
        return tuple(name for names, needed in used if needed for name in names)


def fold(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    *,
    stride: int = 1,
    depthwise: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> ConvParams:
    """Fold a batch norm with fixed statistics. Differentiable.

    The scale is kept apart from the weight, and applied in fp32 to the fp32 sum:
    folding it into fp16 weights would round it a second time.

    Args:
        weight: ``[C_out, C_in, K, K]``; ``channels_last`` ones need no copy.
        bias: ``[C_out]`` of the convolution, or None.
        bn_weight, bn_bias: ``[C_out]`` (gamma, beta), or None for one and zero.
        running_mean, running_var: ``[C_out]``.
        eps: added to the variance.
        stride: see :class:`ConvParams`.
        depthwise: ``[C_in, 1, 3, 3]`` of a depthwise convolution that comes first.
        dtype: of the activations; that of ``weight`` by default.
    """
    norm = FixedNorm(bn_weight, bn_bias, running_mean, running_var, eps, bias)
    [(scale, shift)] = batch_norm.fold([norm], dtype or weight.dtype)
    return ConvParams(
        channels_last(weight),
        scale,
        shift,
        stride,
        None if depthwise is None else depthwise_last(depthwise),
    )


def channels_last(weight: Tensor) -> Tensor:
    """View ``[C_out, C_in, K, K]`` as ``[C_out, K, K, C_in]``."""
    return weight.permute(0, 2, 3, 1)


def depthwise_last(weight: Tensor) -> Tensor:
    """View ``[C, 1, 3, 3]`` as ``[3, 3, C]``."""
    return weight[:, 0].permute(1, 2, 0)


def pack(params: ConvParams, dtype: torch.dtype) -> ConvParams:
    """Weights as the backends take them: contiguous, in the dtype of the activations."""
    depthwise = params.depthwise
    return params._replace(
        weight=params.weight.to(dtype).contiguous(),
        depthwise=None if depthwise is None else depthwise.to(dtype).contiguous(),
    )


def output_size(height: int, width: int, params: ConvParams) -> tuple[int, int]:
    """Height and width of a layer's output."""
    stride = params.stride
    return (height - 1) // stride + 1, (width - 1) // stride + 1


class Kept(NamedTuple):
    """What a layer leaves beside its output.

    Attributes:
        partials: partial sums of the output over its pixels, if they were asked for.
        raw: ``[N, H', W', C_out]``, the convolution's output before a norm that takes the
            batch's statistics. None with fixed ones: the output itself is enough.
        norm: the statistics, see :mod:`.batch_norm`; None with fixed ones.
    """

    partials: Tensor | None = None
    raw: Tensor | None = None
    norm: Tensor | None = None


def run(
    backend: ModuleType,
    x: Tensor,
    params: ConvParams,
    out: Tensor,
    memory: Memory,
    *,
    pool: bool = False,
) -> Kept:
    """Run a layer on ``[N, H, W, C]`` views; see :mod:`vovnet_fast.backends`."""
    if not _as_they_are(backend):
        params = pack(params, x.dtype)
    elif params.depthwise is not None:
        params = params._replace(depthwise=_taps(backend, params.depthwise, x.dtype))
    weight, scale, shift, stride, depthwise, eps, group = params
    conv = "conv"
    options: dict[str, Any] = {}
    if depthwise is not None and hasattr(backend, "depthwise_conv"):
        room = functools.partial(memory.scratch, "spatial", x, *out.shape[:3], x.shape[3])
        conv, options = "depthwise_conv", dict(taps=depthwise, spatial=room)
    elif depthwise is not None:
        x, stride = _spatial(backend, x, depthwise, stride, out, memory), 1
    if eps is None:
        options.update(stride=stride, relu=True, pool=pool)
        return Kept(getattr(backend, conv)(x, weight, scale, shift, out, **options))
    raw = memory.scratch("raw", out, *out.shape)
    partials = getattr(backend, f"{conv}_statistics")(x, weight, raw, stride=stride, **options)
    norm = batch_norm.statistics(backend, partials, scale, shift, eps, group)
    return Kept(backend.normalize(raw, norm[SCALE], norm[SHIFT], out, pool=pool), raw, norm)


def _as_they_are(backend: ModuleType) -> bool:
    """Whether a backend takes weights of any dtype and strides."""
    return getattr(backend, "WEIGHTS_AS_THEY_ARE", False)


def _taps(backend: ModuleType, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of a depthwise convolution, contiguous, in the dtype of the activations."""
    if weight.dtype == dtype and weight.is_contiguous():
        return weight
    if not hasattr(backend, "depthwise_taps"):
        return weight.to(dtype).contiguous()
    taps: Tensor = backend.depthwise_taps(weight, dtype)
    return taps


def run_again(backend: ModuleType, kept: Kept, out: Tensor) -> None:
    """Compute the output of a layer with the batch's statistics from what it kept."""
    assert kept.raw is not None
    assert kept.norm is not None
    backend.normalize(kept.raw, kept.norm[SCALE], kept.norm[SHIFT], out)


def _spatial(
    backend: ModuleType, x: Tensor, weight: Tensor, stride: int, out: Tensor, memory: Memory
) -> Tensor:
    """The output of the depthwise convolution of a layer."""
    spatial = memory.scratch("spatial", x, *out.shape[:3], x.shape[3])
    backend.depthwise(x, weight, spatial, stride=stride)
    return spatial


class ConvGrads(NamedTuple):
    """Gradients of :class:`ConvParams`, each in fp32 (fp64 for fp64) and of its shape."""

    weight: Tensor
    scale: Tensor
    shift: Tensor
    depthwise: Tensor | None = None


def run_backward(
    backend: ModuleType,
    x: Tensor,
    g: Tensor,
    params: ConvParams,
    kept: Kept,
    *,
    wanted: bool = True,
    dx: Tensor | None = None,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> ConvGrads | None:
    """Gradients of a layer.

    Args:
        backend: who does the work.
        x: ``[N, H, W, C_in]``, the layer's input.
        g: ``[N, H', W', C_out]``, the gradient of its output, already zero where the ReLU
            is. It is overwritten where the norm takes the batch's statistics.
        params: of the layer.
        kept: what the forward pass left.
        wanted: whether a gradient of the parameters is.
        dx: ``[N, H, W, C]`` receives the gradient of the last C channels of the input, or None.
        add: added to it; for the first of its channels, may be ``dx`` itself.
        mask: activations of the last channels of ``dx``: where they are not positive, the
            gradient becomes zero.

    Returns:
        the parameters' gradients, or None if they are not wanted.
    """
    packed = not _as_they_are(backend)
    weight, stride = params.weight.contiguous() if packed else params.weight, params.stride
    scale: Tensor | None = params.scale
    dscale: Tensor | None
    if params.eps is not None:
        assert kept.raw is not None
        assert kept.norm is not None
        dscale, dshift = batch_norm.backward(
            backend, g, kept.raw, kept.norm, params.scale, params.group
        )
        scale = None
    spatial, depthwise = x, None
    if params.depthwise is not None:
        depthwise = _taps(backend, params.depthwise, x.dtype)
        spatial, stride = _spatial(backend, x, depthwise, stride, g, Memory()), 1
    grads = None
    if wanted:
        dw, by_scale, by_shift = backend.conv_weight_grad(spatial, g, weight, scale, stride=stride)
        if params.eps is None:
            dscale, dshift = by_scale, by_shift
        assert dscale is not None
        grads = ConvGrads(dw, dscale, dshift)
    if depthwise is None:
        if dx is not None:
            some = weight[..., x.shape[3] - dx.shape[3] :]
            some = some.contiguous() if packed else some
            backend.conv_input_grad(g, some, scale, dx, stride=stride, add=add, mask=mask)
        return grads
    if dx is not None or wanted:
        backend.conv_input_grad(g, weight, scale, spatial, stride=1)  # In place of its input.
    if grads is not None:
        dw = backend.depthwise_weight_grad(x, spatial, stride=params.stride)
        grads = grads._replace(depthwise=dw)
    if dx is not None:
        backend.depthwise_input_grad(
            spatial, depthwise, dx, stride=params.stride, add=add, mask=mask
        )
    return grads


def check(op: str, params: ConvParams, x: Tensor, channels: int | None = None) -> None:
    """Refuse parameters that do not fit each other or the activations."""
    if params.weight.ndim != 4 or params.weight.shape[1] not in (1, 3):
        raise ValueError(
            f"{op}: weight must be [C_out, K, K, C_in] with K = 1 or 3 (see "
            f"vovnet_fast.ops.fold), got {list(params.weight.shape)}"
        )
    c_out, kernel, _, c_in = params.weight.shape
    if channels is not None and c_in != channels:
        raise ValueError(f"{op}: a layer takes {c_in} channels, and is given {channels}")
    _checks.parameter(op, "weight", params.weight, (c_out, kernel, kernel, c_in), x)
    for name, vector in (("scale", params.scale), ("shift", params.shift)):
        _checks.parameter(op, name, vector, (c_out,), x)
        if vector.dtype != accumulator(x.dtype):
            raise TypeError(
                f"{op}: {name} must be {accumulator(x.dtype)} for activations in {x.dtype}, got "
                f"{vector.dtype}: fold for x.dtype"
            )
    if params.depthwise is not None:
        _checks.parameter(op, "depthwise", params.depthwise, (3, 3, c_in), x)
    if params.stride not in (1, 2):
        raise ValueError(f"{op}: stride must be 1 or 2, got {params.stride}")


def repeat(
    choice: str,
    key: tuple[Hashable, ...],
    layers: Sequence[ConvParams],
    tensors: Sequence[Tensor],
    work: Callable[[], list[Any]],
) -> list[Any]:
    """Results of a pass over layers; see :func:`vovnet_fast.backends.repeat`.

    Args:
        choice: as there.
        key: all that the pass depends on beside its layers and tensors.
        layers: that it goes through.
        tensors: all that it reads and, if they are the caller's, writes, beside those of layers.
        work: as there.
    """
    if any(layer.group for layer in layers):  # Other processes take part.
        return work()
    of_layers = [
        t
        for layer in layers
        for t in (layer.weight, layer.scale, layer.shift, layer.depthwise)
        if t is not None
    ]
    statics = [(layer.stride, layer.eps, layer.depthwise is None) for layer in layers]
    return backends.repeat(choice, (*key, *statics), [*tensors, *of_layers], work)
