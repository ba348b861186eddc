"""Passes of training steps, made again by their recorded calls (:mod:`.recording`).

A pass, of an OSA block's gradients say, is thirty calls of the extension, and Python needs as long
for each as a small map's convolution takes. All that it decides depends on shapes, strides and
dtypes of the tensors that it is given, and on what the caller names beside them: passes for which
these are the same differ in addresses only. From the third on they are made by one call.

A recording belongs to no network and holds no memory. Results are new tensors. What lies between is
lent for the time of a pass (:mod:`.scratch`), in places that overlap where their times do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...compat import zip
from .. import _extension, _steps
from . import recording, scratch

MOST_BYTES = 128 << 20
"""Of the tensors that a pass is given and makes, and what lies between fits into memory that is
lent. Of larger ones Python's time is nothing beside the rest, and each tensor should have its
memory for no longer than it is needed."""

KEPT_PASSES = 512
"""How many kinds of passes are known, each by some 30 KiB at most: a network of 25 parts has 50 for
images of a shape."""

_ALIGNMENT = 64

Work = Callable[[], "list[Tensor | None]"]


class _New(NamedTuple):
    """A result in memory of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, _: Sequence[Tensor]) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="cpu")


class _View(NamedTuple):
    """A result that is a view of a tensor that was given: which one, and how many elements from
    its first."""

    given: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def make(self, tensors: Sequence[Tensor]) -> Tensor:
        base = tensors[self.given]
        return base.as_strided(self.shape, self.stride, base.storage_offset() + self.offset)


class _Pass(NamedTuple):
    """A recorded pass.

    Attributes:
        calls: of the extension. They take the addresses of what is given, of new results, and of
            what lies between.
        results: how each is made, or None for one that is None.
        offsets: of what lies between, in the memory that is lent.
        size: of that memory, in bytes.
    """

    calls: Any
    results: list[_New | _View | None]
    offsets: list[int]
    size: int

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        results = [None if each is None else each.make(tensors) for each in self.results]
        lent = scratch.lend("between", self.size)
        first = lent.data_ptr()
        addresses = [t.data_ptr() for t in tensors]
        addresses += [
            result.data_ptr()
            for result, each in zip(results, self.results, strict=True)
            if result is not None and type(each) is _New
        ]
        addresses += [first + offset for offset in self.offsets]
        self.calls.run(torch.get_num_threads(), addresses)
        return results


class _Known:
    """What is known of passes of one kind.

    Attributes:
        spare: recordings that no thread is using; None if there cannot be any.
        recorded: whether there has been one.
        used: when it was last asked for.
    """

    __slots__ = ("recorded", "spare", "used")

    def __init__(self) -> None:
        self.spare: list[_Pass] | None = []
        self.recorded = False
        self.used = 0


# No lock, which a fork could leave taken: each thing that is done with it is one step of Python's.
_known: dict[Hashable, _Known] = {}
_clock = itertools.count()


def repeat(key: Hashable, tensors: Sequence[Tensor], work: Work) -> list[Tensor | None]:
    """Results of a pass, by its recorded calls if there are any.

    Args:
        key: all that the pass depends on beside its tensors.
        tensors: all that it reads and, if they are the caller's, writes.
        work: computes it. Each result is a tensor of its own, a view of one of ``tensors``, or
            None; which of these depends on nothing else either.
    """
    key = (
        key,
        _steps.training(),
        torch.get_num_threads(),
        _extension.load("cpu").isa(),
        torch.are_deterministic_algorithms_enabled(),
        *[(t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors],
    )
    known = _known.get(key)
    if known is None:
        return _first(key, tensors, work)
    known.used = next(_clock)
    if known.spare is None:
        return work()
    if not known.recorded:
        return _second(known, tensors, work)
    try:
        found = known.spare.pop()
    except IndexError:  # Another thread is using it.
        return work()
    try:
        return found.run(tensors)
    finally:
        known.spare.append(found)


def forget() -> None:
    """All recordings: what they depend on has changed."""
    _known.clear()


def _first(key: Hashable, tensors: Sequence[Tensor], work: Work) -> list[Tensor | None]:
    """A pass that nobody has seen before: what it chooses is measured now."""
    known = _Known()
    known.used = next(_clock)
    results = work()
    every = [*tensors, *(result for result in results if result is not None)]
    if sum(t.numel() * t.itemsize for t in every) > MOST_BYTES or not all(
        t.is_cpu and t.layout == torch.strided and t.numel() for t in every
    ):
        known.spare = None
    _known[key] = known
    if len(_known) > KEPT_PASSES:
        every_kind = sorted(_known.items(), key=lambda item: item[1].used)
        for old, _ in every_kind[: KEPT_PASSES // 4]:
            _known.pop(old, None)
    return results


def _second(known: _Known, tensors: Sequence[Tensor], work: Work) -> list[Tensor | None]:
    known.recorded = True
    try:
        results, found = recording.record(work, packs=True)
    except BaseException:  # Maybe the next one ends.
        known.recorded = False
        raise
    made = _made(found, tensors, results) if found.complete else None
    if made is None:
        known.spare = None
    elif known.spare is not None:
        known.spare.append(made)
    return results


def _made(
    found: recording.Recorded, tensors: Sequence[Tensor], results: Sequence[Tensor | None]
) -> _Pass | None:
    """A recording that can be repeated, or None."""
    given = [recording.extent(t) for t in tensors]
    if recording.overlap(given):
        return None
    owners = {_memory(t): i for i, t in enumerate(found.allocated) if t.is_cpu}
    lenders: dict[int, list[int]] = {}
    for i, t in enumerate(tensors):
        lenders.setdefault(_memory(t), []).append(i)
    forms: list[_New | _View | None] = []
    new: list[Tensor] = []
    for result in results:
        if result is None:
            forms.append(None)
        elif _memory(result) in owners:
            del owners[_memory(result)]
            if not _whole(result):
                return None
            forms.append(_New(result.shape, result.stride(), result.dtype))
            new.append(result)
        elif len(lenders.get(_memory(result), ())) == 1:
            [i] = lenders[_memory(result)]
            if tensors[i].dtype != result.dtype:
                return None
            offset = int(result.storage_offset() - tensors[i].storage_offset())
            forms.append(_View(i, offset, result.shape, result.stride()))
        else:  # Of memory that is somebody else's, or of two tensors that may part.
            return None
    between = [found.allocated[i] for i in owners.values()]
    pieces = [*given, *map(recording.extent, new), *map(recording.extent, between)]
    uses, elsewhere = found.calls.move(pieces)
    if elsewhere:  # Of something that is kept, and that a pass would have to look up anew.
        return None
    sizes = [t.numel() * t.itemsize for t in between]
    offsets, size = _places(sizes, uses[len(pieces) - len(between) :])
    if size > scratch.MOST:
        return None
    return _Pass(found.calls, forms, offsets, size)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _whole(tensor: Tensor) -> bool:
    """Whether a tensor is all that is in its memory."""
    size = tensor.numel() * tensor.itemsize
    return size == tensor.untyped_storage().nbytes() == recording.extent(tensor)[1]


def _places(sizes: Sequence[int], uses: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Where pieces of memory lie in one that they share, and its size.

    Pieces that are in use at the same time, between the first call and the last one that uses
    them, lie apart. The largest are given their places first, each the lowest that is free.
    """
    offsets, total = [0] * len(sizes), 0
    placed: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = -(-sizes[i] // _ALIGNMENT) * _ALIGNMENT
        beside = sorted(
            (offsets[j], offsets[j] + sizes[j])
            for j in placed
            if uses[j][0] <= uses[i][1] and uses[i][0] <= uses[j][1]
        )
        at = 0
        for first, end in beside:
            if at + size <= first:
                break
            at = max(at, -(-end // _ALIGNMENT) * _ALIGNMENT)
        offsets[i], total = at, max(total, at + size)
        placed.append(i)
    return offsets, total
