"""What is checked: every function of the backends, in two levels.

The *slim* check has each function in each of its forms, on layers of the published networks
wherever they have one, and on a GPU on maps large enough to be tiled as theirs are: the kernels
that it needs are then those that a network needs anyway.
The *thorough* one adds widths that fill no tile, single rows, and more combinations of options.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..compat import zip
from ..specs import Gate, Pool
from . import calls
from .calls import Backend, Layer, Size, words
from .tensors import Tensors


class Case(NamedTuple):
    """One call of a function of a backend.

    Attributes:
        function: its name.
        words: shapes and options.
        call: makes the arguments, calls it, and returns everything that it computes.
        slim: it is part of the slim check, and not of the thorough one alone.
        products: it sums products, whose operands TF32 may round.
    """

    function: str
    words: str
    call: Callable[[Backend, Tensors], Iterable[Tensor]]
    slim: bool = False
    products: bool = False


def of_layers(
    call: Callable[..., Iterable[Tensor]], *layers: Layer, slim: bool = False, **options: Any
) -> Iterator[Case]:
    """A case of a convolution for each layer; slim ones have large maps on a GPU."""
    name = call.__name__.replace("concat_", "conv_")
    for layer in layers:
        bound = functools.partial(call, layer=layer, **options)
        text = f"{layer}{_options(options)}"
        if slim:
            bound = functools.partial(_sized, call, layer, options)
            text += f", on a GPU {words(_LARGE)}"
        yield Case(name, text, bound, slim, products=True)


_LARGE: Size = (24, 32, 32)
"""Enough pixels for the tiles, and so for the kernels, that networks have on a GPU."""


def _sized(
    call: Callable[..., Iterable[Tensor]],
    layer: Layer,
    options: dict[str, Any],
    backend: Backend,
    t: Tensors,
) -> Iterable[Tensor]:
    """A call for a layer, whose maps are large where it is for a GPU, or planned for one."""
    if t.device.type in ("cuda", "meta"):
        layer = layer._replace(size=_LARGE)
    return call(backend, t, layer=layer, **options)


def of_shapes(
    call: Callable[..., Iterable[Tensor]],
    *shapes: Sequence[int],
    slim: bool = False,
    **options: Any,
) -> Iterator[Case]:
    """A case of another function for each shape."""
    for shape in shapes:
        bound = functools.partial(call, shape=shape, **options)
        yield Case(call.__name__, f"{words(shape)}{_options(options)}", bound, slim)


def of_channels(
    call: Callable[..., Iterable[Tensor]], *channels: int, slim: bool = False, **options: Any
) -> Iterator[Case]:
    """A case of a function that sees no map for each number of channels."""
    for c in channels:
        bound = functools.partial(call, channels=c, **options)
        yield Case(call.__name__, f"{c} channels{_options(options)}", bound, slim)


def _options(options: dict[str, Any]) -> str:
    """Options in words; those that are off are not named."""
    named = {
        name: name if value is True else value if isinstance(value, str) else f"{name} {value}"
        for name, value in options.items()
        if value is not False
    }
    return "".join(f", {text}" for text in named.values())


# The stem of published networks, a layer of a block, and a 1x1 over a concat like theirs.
_FIRST = Layer(3, 3, 64, (2, 10, 7), stride=2)
_SECOND = Layer(3, 64, 64, (2, 9, 7))
_THIRD = Layer(3, 64, 128, (1, 11, 8), stride=2)
_INNER = Layer(3, 128, 128, (1, 6, 5))
_CONCAT = Layer(1, 384, 256, (2, 5, 7))
# Widths that fill no tile.
_ODD = Layer(3, 80, 96, (1, 5, 11))
_NARROW = Layer(1, 224, 112, (2, 5, 13))

_STEM, _STAGE = (2, 5, 7, 64), (2, 5, 7, 128)
_MAP, _PIXELS, _LOW = (2, 5, 7, 48), (2, 1, 5, 56), (1, 8, 2, 56)

_STRIDES = (1, 2)
_KINDS: tuple[Gate, Gate] = ("hard_sigmoid", "sigmoid")
_MODES: tuple[Pool, Pool] = ("ceil", "padded")


def _convolutions() -> Iterator[Case]:
    slim = functools.partial(of_layers, slim=True)
    yield from slim(calls.conv, _FIRST, _SECOND, _THIRD, pool=False)
    yield from slim(calls.conv, _CONCAT, pool=True)
    yield from of_layers(calls.conv, _ODD, pool=False)
    yield from of_layers(calls.conv, _NARROW, pool=True)
    yield from slim(calls.conv_statistics, _FIRST, _SECOND, _THIRD, _CONCAT)
    yield from of_layers(calls.conv_statistics, _NARROW)
    yield from slim(calls.conv_input_grad, _INNER, scaled=True, added=True, master=True)
    yield from slim(calls.conv_input_grad, _THIRD, scaled=False, added=False, master=True)
    yield from slim(calls.concat_input_grad, _CONCAT, added=True, masked=128, master=True)
    yield from of_layers(calls.conv_input_grad, _ODD, _THIRD, scaled=True, added=True)
    yield from of_layers(calls.concat_input_grad, _NARROW, added=True, masked=112)
    yield from slim(calls.conv_weight_grad, _FIRST, _CONCAT, scaled=True, master=True)
    yield from slim(calls.conv_weight_grad, _SECOND, scaled=False, master=True)
    yield from of_layers(calls.conv_weight_grad, _NARROW, scaled=True)
    yield from of_layers(calls.conv_weight_grad, _ODD, scaled=False)


def _norms() -> Iterator[Case]:
    yield from of_shapes(calls.normalize, _STEM, slim=True, pool=False)
    yield from of_shapes(calls.normalize, _STAGE, slim=True, pool=True)
    yield from of_shapes(calls.normalize, _MAP, _PIXELS, pool=True)
    yield from of_channels(calls.batch_norm_merge, 128, slim=True)
    yield from of_channels(calls.batch_norm_merge, 80)
    yield from of_channels(calls.batch_norm_finish, 128, slim=True, affine=True)
    for affine in (True, False):
        yield from of_channels(calls.batch_norm_finish, 80, affine=affine)
    for call in (calls.batch_norm_sums, calls.batch_norm_input_grad):
        yield from of_shapes(call, _STEM, slim=True)
        yield from of_shapes(call, _MAP, _PIXELS)


def _depthwise() -> Iterator[Case]:
    for call in (calls.depthwise, calls.depthwise_input_grad, calls.depthwise_weight_grad):
        for stride in _STRIDES:
            yield from of_shapes(call, _STEM, slim=True, stride=stride)
            yield from of_shapes(call, _MAP, stride=stride)
        yield from of_shapes(call, _PIXELS, stride=1)


def _gates() -> Iterator[Case]:
    for kind, master in zip(_KINDS, (False, True), strict=True):
        yield from of_channels(calls.gates, 128, slim=True, kind=kind, master=master)
        yield from of_channels(calls.gates_backward, 128, slim=True, kind=kind, master=True)
        for of_gates in (calls.gates, calls.gates_backward):
            yield from of_channels(of_gates, 80, kind=kind)
    yield from of_shapes(calls.gate_sums, _STAGE, slim=True)
    yield from of_shapes(calls.gate_sums, _MAP, _PIXELS)
    yield from of_shapes(calls.apply_gates, _STAGE, slim=True, gated=True, added=False)
    yield from of_shapes(calls.apply_gates, _STAGE, slim=True, gated=True, added=True)
    yield from of_shapes(calls.apply_gates, _STAGE, slim=True, gated=False, added=True)
    yield from of_shapes(calls.apply_gates, _MAP, gated=True, added=True)
    yield from of_shapes(calls.apply_gates, _PIXELS, gated=True, added=False)
    yield from of_shapes(calls.apply_gates, _MAP, gated=False, added=True)
    for gated in (True, False):
        yield from of_shapes(calls.apply_gates_backward, _STAGE, slim=True, gated=gated)
        yield from of_shapes(calls.apply_gates_backward, _MAP, gated=gated)
    yield from of_shapes(calls.apply_gates_backward, _PIXELS, gated=True)


def _pools() -> Iterator[Case]:
    for mode, kept in zip(_MODES, (False, True), strict=True):
        yield from of_shapes(calls.max_pool, _STAGE, slim=True, mode=mode, kept=kept)
    for mode in _MODES:
        yield from of_shapes(calls.max_pool, _MAP, _LOW, mode=mode, kept=True)
        yield from of_shapes(calls.max_pool_backward, _STAGE, slim=True, mode=mode)
        yield from of_shapes(calls.max_pool_backward, _MAP, _LOW, mode=mode)


CASES: tuple[Case, ...] = (*_convolutions(), *_norms(), *_depthwise(), *_gates(), *_pools())
"""Everything that is checked. Every function of the backends is in either level."""

PRODUCTS = frozenset(case.function for case in CASES if case.products)
"""Functions whose numbers depend on whether torch allows TF32."""
