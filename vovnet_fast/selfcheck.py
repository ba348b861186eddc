"""A backend is trusted on a device once it has computed right numbers there.

Every function of the backend runs on small random tensors, and is compared with the
reference: its error against fp64 may be twice that of plain PyTorch in the same dtype,
plus one rounding of the largest value (in fp32 a few). Tensors lie in slots whose
surroundings are NaN, so that whoever reads or writes beside a slot is found out.

A backend that passed is remembered in ``verified.json`` beside the tuning file
(:mod:`vovnet_fast.tuning`), for this machine, these very sources and whether torch
allows TF32. One that failed is not: the next process checks again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from . import tuning
from ._dtypes import accumulator
from ._version import __version__
from .specs import Gate, Pool

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_TRIAL_BYTES = 2**30
_FP64 = 1e-12  # A rounding of the sums that take the place of exact ones.

_log = logging.getLogger("vovnet_fast.selfcheck")


class Row(NamedTuple):
    """What came out for one function, in one dtype and one case.

    Attributes:
        function: of the backend.
        dtype: of the activations.
        case: shapes and options in words.
        error: largest error of the output that came closest to its limit, or went
            furthest beyond it; NaN where there is none.
        allowed: that limit.
        passed: whether all outputs are right.
        problem: what went wrong besides the numbers, or nothing.
    """

    function: str
    dtype: torch.dtype
    case: str
    error: float
    allowed: float
    passed: bool
    problem: str = ""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        found = self.problem or f"error {self.error:.3g}, allowed {self.allowed:.3g}"
        return f"{self.function} ({self.case}, {dtype}): {found}"


# --------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------


class Slot:
    """Memory of a view, with NaN before, after and between its elements.

    Args:
        shape: of the view.
        stride: of the view, in elements.
        dtype: a floating one.
        device: where it lies.
        alignment: elements by which it starts after a multiple of 32 bytes.

    Attributes:
        view: the view itself, NaN as well until something is written.
    """

    _GUARD = 32  # Elements: 64 bytes in the narrowest dtype.

    def __init__(
        self,
        shape: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        alignment: int = 0,
    ) -> None:
        first = self._GUARD + alignment
        extent = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
        total = first + extent + self._GUARD
        self._storage = torch.full((total,), math.nan, dtype=dtype, device=device)
        self.view = self._storage.as_strided(tuple(shape), tuple(stride), first)

    @classmethod
    def like(cls, view: Tensor, images: int) -> Slot:
        """One for the first images of a view, laid out and aligned as the view is."""
        alignment = view.data_ptr() % 32 // view.itemsize
        return cls((images, *view.shape[1:]), view.stride(), view.dtype, view.device, alignment)

    def randomise(self, random: torch.Generator) -> Tensor:
        """Fill the view with normally distributed numbers; returns it."""
        # What an expanded view has in several places is in memory once.
        once = tuple(slice(0, 1) if s == 0 else slice(None) for s in self.view.stride())
        self.view[once].normal_(generator=random)
        return self.view

    def clear(self) -> None:
        """Fill the view and all around it with NaN."""
        self._storage.fill_(math.nan)

    def untouched(self) -> bool:
        """Whether all is NaN still around the view, whose own values this overwrites."""
        self.view.fill_(math.nan)
        return bool(self._storage.isnan().all())


def few_images(*views: Tensor) -> int:
    """How many images of these views a trial can take: all of them, or as fit into 1 GiB."""
    images = views[0].shape[0]
    bytes_each = sum(max(view.stride(0), view[0].numel()) * view.itemsize for view in views)
    return max(1, min(images, _TRIAL_BYTES // max(bytes_each, 1)))


def disagreement(pairs: Iterable[tuple[Tensor, Tensor]], tolerance: float) -> str | None:
    """What is wrong with tensors that should be equal, or None.

    Args:
        pairs: what was found, and what was expected.
        tolerance: of the error, as a fraction of the largest value expected.
    """
    for found, expected in pairs:
        error, allowed = _largest(found.to(expected.dtype) - expected), _largest(expected)
        if error > tolerance * allowed:
            return f"error {error:.3g}, allowed {tolerance * allowed:.3g}"
    return None


class Tensors:
    """Makes the arguments of one call; in the same order of requests, the same numbers.

    Args:
        rounding: activations and weights hold numbers of this dtype,
        dtype: and are of this one, in which the call computes.
        device: where they lie.
        cut: activations and weights lose the bits that TF32 does not have.
    """

    def __init__(
        self,
        rounding: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        *,
        cut: bool = False,
    ) -> None:
        self.rounding, self.dtype, self.device, self.cut = rounding, dtype, device, cut
        self._random = torch.Generator().manual_seed(0)  # The user's numbers stay as they are.
        self._slots: list[Slot] = []

    def output(self, *shape: int) -> Tensor:
        """A slot ``[N, H, W, C]`` of a wider buffer, full of NaN."""
        _, h, w, c = shape
        pixel = c + 32  # Neighbours on either side, and slots stay aligned to 16 bytes.
        slot = Slot(shape, (h * w * pixel, w * pixel, pixel, 1), self.dtype, self.device)
        self._slots.append(slot)
        return slot.view

    def activations(self, *shape: int, relu: bool = False) -> Tensor:
        """Such a slot with normally distributed numbers; with ``relu`` the positive ones."""
        values = self._numbers(shape)
        return self.output(*shape).copy_(values.relu() if relu else values)

    def weight(self, *shape: int, fan: int) -> Tensor:
        """Packed, so that a sum over ``fan`` products with activations has variance one."""
        return self._numbers(shape, fan**-0.5).to(self.device, self.dtype)

    def vector(self, *shape: int, low: float = 0.5, high: float = 1.5) -> Tensor:
        """Uniformly distributed numbers in fp32, or fp64 for fp64."""
        values = torch.rand(shape, generator=self._random, dtype=torch.float32)
        return (values * (high - low) + low).to(self.device, accumulator(self.dtype))

    def untouched(self) -> bool:
        """Whether nothing was written beside a slot. Spoils what is in the slots."""
        return all(slot.untouched() for slot in self._slots)

    def _numbers(self, shape: Sequence[int], deviation: float = 1.0) -> Tensor:
        values = torch.randn(tuple(shape), generator=self._random, dtype=torch.float32) * deviation
        values = values.to(self.rounding)
        if self.cut:
            values = (values.float().view(torch.int32) & ~0x1FFF).view(torch.float32)
        return values.to(self.dtype)


# --------------------------------------------------------------------------------------
# Cases: one function a function of the backends
# --------------------------------------------------------------------------------------

Backend = Any
"""A module of :mod:`vovnet_fast.backends`."""


class Case(NamedTuple):
    """One call of a function of a backend.

    Attributes:
        function: its name.
        words: shapes and options.
        call: makes the arguments, calls it, and returns everything that it computes.
            Each tensor is held against its own largest value, so rows of different
            magnitude are returned apart.
        products: it sums products, whose operands TF32 may round.
    """

    function: str
    words: str
    call: Callable[[Backend, Tensors], Iterable[Tensor]]
    products: bool = False


Size = tuple[int, int, int]


class _Layer(NamedTuple):
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
            f"{_words(self.size)}"
        )

    @property
    def output(self) -> Size:
        n, h, w = self.size
        return n, (h - 1) // self.stride + 1, (w - 1) // self.stride + 1

    def x(self, t: Tensors) -> Tensor:
        return t.activations(*self.size, self.c_in)

    def weight(self, t: Tensors) -> Tensor:
        taps = self.kernel * self.kernel
        return t.weight(self.c_out, self.kernel, self.kernel, self.c_in, fan=taps * self.c_in)

    def gradient(self, t: Tensors) -> Tensor:
        return t.activations(*self.output, self.c_out)

    def out(self, t: Tensors) -> Tensor:
        return t.output(*self.output, self.c_out)


def _words(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


_WIDE = _Layer(3, 64, 64, (2, 9, 7))
_ODD = _Layer(3, 80, 96, (1, 5, 11))
_STRIDED = _Layer(3, 64, 128, (1, 11, 8), stride=2)
_IMAGE = _Layer(3, 3, 64, (2, 10, 7), stride=2)
_CONCAT = _Layer(1, 224, 112, (2, 5, 13))


def _conv(backend: Backend, t: Tensors, *, layer: _Layer, pool: bool) -> Iterator[Tensor]:
    x, weight, out = layer.x(t), layer.weight(t), layer.out(t)
    scale, shift = t.vector(layer.c_out), t.vector(layer.c_out, low=-0.5, high=0.5)
    partials = backend.conv(x, weight, scale, shift, out, stride=layer.stride, relu=True, pool=pool)
    yield out
    if pool:
        yield partials.sum(1)


def _conv_statistics(backend: Backend, t: Tensors, *, layer: _Layer) -> Iterator[Tensor]:
    x, weight, out = layer.x(t), layer.weight(t), layer.out(t)
    partials = backend.conv_statistics(x, weight, out, stride=layer.stride)
    yield out
    yield from _reference().batch_norm_merge(partials.double()).to(partials.dtype)


def _conv_input_grad(backend: Backend, t: Tensors, *, layer: _Layer) -> Iterator[Tensor]:
    """As in a block: added to the gradient in the slot, masked, in place."""
    g, weight, scale = layer.gradient(t), layer.weight(t), t.vector(layer.c_out)
    out, mask = layer.x(t), t.activations(*layer.size, layer.c_in, relu=True)
    backend.conv_input_grad(g, weight, scale, out, stride=layer.stride, add=out, mask=mask)
    yield out


def _concat_input_grad(backend: Backend, t: Tensors, *, layer: _Layer) -> Iterator[Tensor]:
    """Of the 1x1: the identity belongs to the first channels, the mask to the last ones."""
    g, weight, scale = layer.gradient(t), layer.weight(t), t.vector(layer.c_out)
    add = t.activations(*layer.size, layer.c_out)
    mask = t.activations(*layer.size, layer.c_in - layer.c_out, relu=True)
    out = t.output(*layer.size, layer.c_in)
    backend.conv_input_grad(g, weight, scale, out, add=add, mask=mask)
    yield out


def _conv_weight_grad(
    backend: Backend, t: Tensors, *, layer: _Layer, scaled: bool
) -> Iterator[Tensor]:
    x, g, weight = layer.x(t), layer.gradient(t), layer.weight(t)
    scale = t.vector(layer.c_out) if scaled else None
    found = backend.conv_weight_grad(x, g, weight, scale, stride=layer.stride)
    yield from (grad for grad in found if grad is not None)


def _normalize(backend: Backend, t: Tensors, *, shape: Sequence[int]) -> Iterator[Tensor]:
    z, out = t.activations(*shape), t.output(*shape)
    scale, shift = t.vector(shape[3]), t.vector(shape[3], low=-0.5, high=0.5)
    partials = backend.normalize(z, scale, shift, out, pool=True)
    yield out
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


def _batch_norm_merge(backend: Backend, t: Tensors) -> Iterable[Tensor]:
    merged: Tensor = backend.batch_norm_merge(_statistics(t, 80))
    return merged


def _batch_norm_finish(backend: Backend, t: Tensors, *, affine: bool) -> Iterable[Tensor]:
    partials = _statistics(t, 80)
    gamma, beta = (t.vector(80), t.vector(80, low=-1)) if affine else (None, None)
    norm: Tensor = backend.batch_norm_finish(partials, gamma, beta, 1e-5)
    return norm


def _batch_norm_sums(backend: Backend, t: Tensors, *, shape: Sequence[int]) -> Iterable[Tensor]:
    g, z = t.activations(*shape), t.activations(*shape)
    sums: Tensor = backend.batch_norm_sums(g, z, _norm(t, shape[3], math.prod(shape[:3])))
    return sums


def _batch_norm_input_grad(
    backend: Backend, t: Tensors, *, shape: Sequence[int]
) -> Iterator[Tensor]:
    g, z, out = t.activations(*shape), t.activations(*shape), t.output(*shape)
    norm, sums = _norm(t, shape[3], math.prod(shape[:3])), t.vector(2, shape[3], low=-9, high=9)
    backend.batch_norm_input_grad(g, z, norm, sums, t.vector(shape[3]), out)
    yield out


def _depthwise(
    backend: Backend, t: Tensors, *, shape: Sequence[int], stride: int
) -> Iterator[Tensor]:
    layer = _Layer(3, shape[3], shape[3], (shape[0], shape[1], shape[2]), stride)
    x, weight, out = layer.x(t), t.weight(3, 3, shape[3], fan=9), layer.out(t)
    backend.depthwise(x, weight, out, stride=stride)
    yield out


def _depthwise_input_grad(
    backend: Backend, t: Tensors, *, shape: Sequence[int], stride: int
) -> Iterator[Tensor]:
    layer = _Layer(3, shape[3], shape[3], (shape[0], shape[1], shape[2]), stride)
    g, weight, out = layer.gradient(t), t.weight(3, 3, shape[3], fan=9), layer.x(t)
    mask = t.activations(*shape, relu=True)
    backend.depthwise_input_grad(g, weight, out, stride=stride, add=out, mask=mask)
    yield out


def _depthwise_weight_grad(
    backend: Backend, t: Tensors, *, shape: Sequence[int], stride: int
) -> Iterator[Tensor]:
    layer = _Layer(3, shape[3], shape[3], (shape[0], shape[1], shape[2]), stride)
    yield backend.depthwise_weight_grad(layer.x(t), layer.gradient(t), stride=stride)


def _gates(backend: Backend, t: Tensors, *, kind: Gate) -> Iterator[Tensor]:
    partials, weight = t.vector(2, 5, 80, high=2), t.weight(80, 80, fan=5)
    yield from backend.gates(partials, 6, weight, t.vector(80, low=-1), kind)


def _gate_sums(backend: Backend, t: Tensors, *, shape: Sequence[int]) -> Iterator[Tensor]:
    yield backend.gate_sums(t.activations(*shape), t.activations(*shape, relu=True))


def _gates_backward(backend: Backend, t: Tensors, *, kind: Gate) -> Iterable[Tensor]:
    dgates, gates = t.vector(3, 80, low=-1, high=1), t.vector(3, 80, low=-0.25, high=1.25)
    mean, weight = t.vector(3, 80), t.weight(80, 80, fan=80)
    grads: tuple[Tensor, ...] = backend.gates_backward(
        dgates, gates.clamp(0, 1), mean, 35, weight, kind
    )
    return grads


def _apply_gates(
    backend: Backend, t: Tensors, *, shape: Sequence[int], gated: bool, added: bool
) -> Iterator[Tensor]:
    z, out = t.activations(*shape), t.output(*shape)
    gates = t.vector(shape[0], shape[3], low=0, high=1) if gated else None
    identity = t.activations(*shape) if added else None
    backend.apply_gates(z, gates, identity, out)
    yield out


def _apply_gates_backward(
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


def _max_pool(
    backend: Backend, t: Tensors, *, shape: Sequence[int], mode: Pool
) -> Iterator[Tensor]:
    x, out, argmax = _pooled(t, shape, mode)
    backend.max_pool(x, out, mode, argmax)
    yield from (out, argmax)


def _max_pool_backward(
    backend: Backend, t: Tensors, *, shape: Sequence[int], mode: Pool
) -> Iterator[Tensor]:
    x, pooled, argmax = _pooled(t, shape, mode)
    _reference().max_pool(x, pooled, mode, argmax)
    dout, out = t.activations(*pooled.shape), t.output(*shape)
    backend.max_pool_backward(dout, argmax, out, mode)
    yield out


def _of_layers(
    call: Callable[..., Iterable[Tensor]], *layers: _Layer, **options: Any
) -> Iterator[Case]:
    """A case of a convolution for each layer."""
    name = call.__name__.removeprefix("_").replace("concat_", "conv_")
    for layer in layers:
        yield Case(name, str(layer), functools.partial(call, layer=layer, **options), True)


def _of_shapes(
    call: Callable[..., Iterable[Tensor]], *shapes: Sequence[int], words: str = "", **options: Any
) -> Iterator[Case]:
    """A case of another function for each shape."""
    for shape in shapes:
        bound = functools.partial(call, shape=shape, **options)
        yield Case(call.__name__.removeprefix("_"), f"{_words(shape)}{words}", bound)


def _of_options(
    call: Callable[..., Iterable[Tensor]], words: str, **options: Any
) -> Iterator[Case]:
    """A case of a function that takes no shape."""
    yield Case(call.__name__.removeprefix("_"), words, functools.partial(call, **options))


_MAP, _PIXELS = (2, 5, 7, 48), (2, 1, 5, 56)
_KINDS: tuple[Gate, Gate] = ("hard_sigmoid", "sigmoid")
_MODES: tuple[Pool, Pool] = ("ceil", "padded")

CASES: tuple[Case, ...] = tuple(
    itertools.chain(
        _of_layers(_conv, _WIDE, _ODD, _STRIDED, _IMAGE, pool=False),
        _of_layers(_conv, _CONCAT, pool=True),
        _of_layers(_conv_statistics, _WIDE, _STRIDED, _CONCAT),
        _of_layers(_conv_input_grad, _WIDE, _ODD, _STRIDED),
        _of_layers(_concat_input_grad, _CONCAT),
        _of_layers(_conv_weight_grad, _IMAGE, _CONCAT, scaled=True),
        _of_layers(_conv_weight_grad, _ODD, scaled=False),
        _of_shapes(_normalize, _MAP, _PIXELS),
        _of_options(_batch_norm_merge, "37 parts, 80 channels"),
        *(_of_options(_batch_norm_finish, f"37 parts, {words}", affine=affine)
          for words, affine in (("gamma and beta", True), ("not affine", False))),
        _of_shapes(_batch_norm_sums, _MAP, _PIXELS),
        _of_shapes(_batch_norm_input_grad, _MAP),
        _of_shapes(_depthwise, _MAP, _PIXELS, stride=1),
        _of_shapes(_depthwise, _MAP, words=" with stride 2", stride=2),
        *(_of_shapes(call, _MAP, words=f" with stride {stride}", stride=stride)
          for call in (_depthwise_input_grad, _depthwise_weight_grad) for stride in (1, 2)),
        *(_of_options(call, kind, kind=kind)
          for call in (_gates, _gates_backward) for kind in _KINDS),
        _of_shapes(_gate_sums, _MAP, _PIXELS),
        _of_shapes(_apply_gates, _MAP, words=", gates and identity", gated=True, added=True),
        _of_shapes(_apply_gates, _PIXELS, words=", gates", gated=True, added=False),
        _of_shapes(_apply_gates, _MAP, words=", identity", gated=False, added=True),
        _of_shapes(_apply_gates_backward, _MAP, _PIXELS, words=", gates", gated=True),
        _of_shapes(_apply_gates_backward, _MAP, gated=False),
        *(_of_shapes(call, _MAP, (1, 8, 2, 56), words=f", {mode}", mode=mode)
          for call in (_max_pool, _max_pool_backward) for mode in _MODES),
    )
)  # fmt: skip
"""Everything that is checked. Every function of the backends is here at least once."""


# --------------------------------------------------------------------------------------
# Running them
# --------------------------------------------------------------------------------------


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"vovnet_fast.backends.{name}")


def _reference() -> Backend:
    return _backend("reference")


def run(
    backend: str,
    device: torch.device | str,
    dtypes: Sequence[torch.dtype] = DTYPES,
    functions: Sequence[str] | None = None,
    *,
    progress: bool = False,
) -> list[Row]:
    """Check a backend; a matter of minutes on a GPU for which nothing was compiled before.

    Args:
        backend: its name.
        device: where it is to be checked.
        dtypes: of the activations.
        functions: only these; all by default.
        progress: show a bar on stderr.

    Returns:
        a row for every case and dtype. What cannot run has a row as well.

    Raises:
        ValueError: there is no function of that name.
    """
    unknown = set(functions or ()) - {case.function for case in CASES}
    if unknown:
        raise ValueError(f"no function is called {', '.join(sorted(unknown))}")
    wanted = [case for case in CASES if functions is None or case.function in functions]
    device = torch.device(device)
    rows: list[Row] = []

    def work() -> None:
        with torch.no_grad(), tuning.static_choices():
            for case, dtype in track(
                list(itertools.product(wanted, dtypes)),
                f"vovnet_fast checks its {backend} kernels on {device}, once",
                console=Console(stderr=True),
                disable=not progress,
            ):
                rows.append(_run_case(case, backend, dtype, device))

    _run_apart(work)
    return rows


def _run_apart(work: Callable[[], None]) -> None:
    """Run in a thread of its own.

    It knows nothing of the caller's autocast, inference mode, dispatch modes and default
    device, all of which would change what is computed.
    """
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded, name="vovnet_fast self-check")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _run_case(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> Row:
    def failed(problem: str) -> Row:
        return Row(case.function, dtype, case.words, math.nan, math.nan, False, problem)

    tf32 = case.products and dtype == torch.float32 and _tf32(device)
    tensors = Tensors(dtype, dtype, device)
    try:
        exact = list(case.call(_reference(), Tensors(dtype, torch.float64, device)))
        eager = list(case.call(_reference(), Tensors(dtype, dtype, device, cut=tf32)))
        found = list(case.call(_backend(backend), tensors))
        if [out.shape for out in found] != [out.shape for out in exact]:
            return failed(f"its outputs are {[list(out.shape) for out in found]}")
        limits = list(map(_limit, eager, exact, itertools.repeat(tf32)))
        errors = [_largest(a.double() - b) for a, b in zip(found, exact, strict=True)]
        if not tensors.untouched():
            return failed("it wrote outside its slot")
    except Exception as exception:  # Whatever it is, the backend is not to be used.
        return failed(f"{type(exception).__name__}: {exception}")
    error, limit = max(zip(errors, limits, strict=True), key=_excess)
    return Row(case.function, dtype, case.words, error, limit, _excess((error, limit)) <= 1)


def _tf32(device: torch.device) -> bool:
    return device.type == "cuda" and tuning.tf32_allowed()


def _limit(eager: Tensor, exact: Tensor, tf32: bool) -> float:
    """Twice the error of eager, and one rounding of the largest value; in fp32 a few.

    What is in fp32 was mostly summed in it, in an order of each backend's own.
    """
    unit = 0.0
    if tf32:  # It has the precision of fp16.
        unit = torch.finfo(torch.float16).eps
    elif eager.is_floating_point():
        unit = torch.finfo(eager.dtype).eps * (4 if eager.dtype == torch.float32 else 1)
    return 2 * _largest(eager.double() - exact) + max(unit, _FP64) * _largest(exact)


def _largest(values: Tensor) -> float:
    """Largest magnitude; infinite where a value is NaN, since nothing here should be."""
    return values.abs().nan_to_num(nan=math.inf, posinf=math.inf).max().item()


def _excess(pair: tuple[float, float]) -> float:
    """An error as a fraction of its limit. Where both are zero, it is kept."""
    error, limit = pair
    return error / limit if limit > 0 else (0.0 if error == 0 else math.inf)


# --------------------------------------------------------------------------------------
# Trust
# --------------------------------------------------------------------------------------

_PASSED = "passed"
_lock = threading.Lock()
_verdicts: dict[tuple[str, str, str], bool] = {}
"""What this process found out, by file, machine and subject."""


def remembered(backend: str, device: torch.device) -> bool | None:
    """Whether a backend passed on this machine; None where it is not known."""
    path, machine, subject = _key(backend, device)
    verdict = _verdicts.get((path, machine, subject))
    if verdict is None and _table(path).get(machine, subject) == _PASSED:
        verdict = _verdicts[path, machine, subject] = True
    return verdict


def trusted(backend: str, device: torch.device) -> bool:
    """Whether a backend computes right numbers on ``device``: remembered, or found out now.

    A failure is said aloud, once in a process.
    """
    with _lock:  # Threads that ask at the same time wait for one answer.
        verdict = remembered(backend, device)
        if verdict is None:
            verdict = _verdicts[_key(backend, device)] = _find_out(backend, device)
    return verdict


def _find_out(backend: str, device: torch.device) -> bool:
    path, machine, subject = _key(backend, device)
    compiles = device.type != "cpu"
    long = "minutes" if compiles else "a few seconds"
    _log.info("checking the %s backend on %s, once; this takes %s", backend, machine, long)
    rows = run(backend, device, progress=compiles)
    failures = [row for row in rows if not row.passed]
    if not failures:
        _table(path).put(machine, subject, _PASSED)
        return True
    _log.warning(
        "the %s backend fails its self-check on %s and is not used; plain PyTorch takes its "
        "place. %d of %d checks failed, the first of them:\n  %s\nPlease report this. "
        "VOVNET_FAST_BACKEND=reference chooses plain PyTorch without a check.",
        backend,
        machine,
        len(failures),
        len(rows),
        "\n  ".join(map(str, failures[:5])),
    )
    return False


def _key(backend: str, device: torch.device) -> tuple[str, str, str]:
    """The file, the machine and the subject of a verdict."""
    path = tuning.cache_file().with_name("verified.json")
    subject = f"{backend} of vovnet_fast {__version__}, sources {_sources()}"
    variant = getattr(_backend(backend), "variant", None)
    if variant is not None:
        subject += f", {variant()}"
    return str(path), tuning.machine(device), subject + (" with TF32" if _tf32(device) else "")


@functools.cache
def _sources() -> str:
    """A digest of what computes, the extension too: versions of a working copy have one number."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    patterns = ("backends/*.py", "kernels/*.py", "_C.*")
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def _table(path: str) -> tuning.Table:
    return tuning.Table(Path(path))
