"""Weights as the engines of the ``cpu`` backend multiply them, made at a call or kept.

Those of a frozen network are packed once, and kept for as long as the weight lives and is what it
was; those of one that trains at every call, in memory that is used again (:mod:`.scratch`).
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ... import _environment
from ... import _pages as pages
from .. import _extension, _steps
from .._extension.fields import DTYPES, array, pointer, weight_strides
from . import scratch, winograd


class _Packed(NamedTuple):
    """A weight as an engine takes it, and what it was made of."""

    engine: str
    pointer: int
    version: int
    tiles: Tensor


_kept = WeakTensorKeyDictionary()
"""Packed forms by weight and engine, for as long as it lives: a frozen network packs only once."""

_numbers = WeakTensorKeyDictionary()
"""What was counted of a weight last, with the address and the version that it had, and by whom."""

_lock = threading.Lock()


def _renew_lock() -> None:
    """In a process that was forked while another thread held the lock, which is not there."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def tiles_of(engine: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The packed form of a weight for activations of a dtype.

    It is kept of those that are as activations are, where frozen networks have theirs; not in a
    step of training, which makes a new view of a weight that autograd holds until the backward
    pass, and that would hold it as well.
    """
    trains = weight.requires_grad or _steps.training()
    if trains or weight.dtype != dtype or not weight.is_contiguous():
        return pack(engine, weight, dtype=dtype, lent=trains)
    return kept_tiles(engine, weight, pack)


def kept_tiles(engine: str, weight: Tensor, make: Callable[[str, Tensor], Tensor]) -> Tensor:
    """What a weight was packed to, packed again where it has changed since."""
    if weight.is_inference():  # It does not count what is written to it.
        return make(engine, weight)
    with _lock:
        found: _Packed | None = _kept.get(weight, {}).get(engine)
    now = (engine, weight.data_ptr(), weight._version)
    if found is not None and found[:3] == now and _environment.flag("CHECK"):
        if not torch.equal(found.tiles, make(engine, weight)):
            raise RuntimeError(
                f"a weight of {list(weight.shape)} was written to in a way that PyTorch does not "
                "count (tensor.data, NumPy, DLPack, shared memory), and what was packed of it is "
                "not what it is now: call refresh() of the frozen network after such writes"
            )
    elif found is None or found[:3] != now:
        found = _Packed(*now, pages.kept(make(engine, weight)))
        with _lock:
            _kept.setdefault(weight, {})[engine] = found
    return found.tiles


def kept_number(weight: Tensor, count: Callable[[Tensor], int]) -> int:
    """What was counted of a weight, again where it has changed since.

    ``count`` must call no op of PyTorch that computes: calls are being recorded, perhaps.
    """
    if weight.is_inference():
        return count(weight)
    now = weight.data_ptr(), weight._version, count
    with _lock:
        found: tuple[tuple[object, ...], int] | None = _numbers.get(weight)
    if found is None or found[0] != now:
        found = now, count(weight)
        with _lock:
            _numbers[weight] = found
    return found[1]


def stand_in(engine: str, weight: Tensor) -> Tensor:
    """What takes the place of a weight that will not change, and need not be kept.

    It is of the weight's shape and dtype on the meta device, with no memory but that of its packed
    form.
    """
    with torch.inference_mode(False):
        alone = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    packed_form = _Packed(
        engine, alone.data_ptr(), alone._version, pages.kept(pack(engine, weight))
    )
    with _lock:
        _kept[alone] = {engine: packed_form}
    return alone


def forget(weights: Iterable[Tensor]) -> None:
    """Drop what is kept of weights, which were written to without PyTorch's counting it."""
    with _lock:
        for weight in weights:
            _kept.pop(weight, None)
            _numbers.pop(weight, None)


def pack(
    engine: str,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    transposed: bool = False,
    lent: bool = False,
) -> Tensor:
    """``weight * scale``, rounded once, as an engine takes it.

    Args:
        engine: by name.
        weight: ``[C_out, K, K, C_in]`` view, any strides, any floating dtype.
        scale: ``[C_out]``, any floating dtype, or None for one.
        dtype: of activations, to which it is rounded; that of ``weight`` by default.
        transposed: for the gradient of the input of the convolution that has this weight.
        lent: in memory that the next call writes to (:mod:`.scratch`).
    """
    c_out, kernel, _, c_in = weight.shape
    cpu = _extension.load("cpu")
    outputs, inputs = (c_in, c_out) if transposed else (c_out, c_in)
    side = winograd.SIDES.get(engine)
    if side is None:
        size = cpu.conv_pack_bytes(engine, outputs, kernel, inputs)
        run = functools.partial(cpu.conv_pack, torch.get_num_threads(), engine)
    else:
        size = cpu.conv_winograd_pack_bytes(side, outputs, inputs)
        run = functools.partial(cpu.conv_winograd_pack, torch.get_num_threads(), side)
    given = (pointer("weight", weight), DTYPES[weight.dtype]), array("scale", scale, c_out)
    if lent:
        tiles = scratch.lend("tiles", size)
    else:
        with torch.inference_mode(False):
            tiles = torch.empty(size, dtype=torch.uint8, device="cpu")
    run(
        weight=given[0],
        scale=given[1],
        out=pointer("tiles", tiles),
        transposed=int(transposed),
        dtype=DTYPES[dtype or weight.dtype],
        **weight_strides(weight),
    )
    return tiles
