"""Whether tensors hold what they held before: by where they lie, and by what is there.

A tensor's version does not count writes through ``tensor.data``, NumPy, DLPack or another
process's view of shared memory, and averages of weights are swapped in in just such ways. So the
memory itself is read, at the speed at which it can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import _extension
from ..compat import zip

_PLAIN = (Tensor, nn.Parameter)


class Layout(NamedTuple):
    """Where tensors lie, and how.

    Attributes:
        places: of each tensor its address, how often it was written to as far as that is counted,
            its shape, strides and dtype, and whether it stands for its negative.
        known: tensors whose memory is dense, which is read as it lies: addresses and bytes.
        loose: indices of the others.
    """

    places: list[tuple[Any, ...] | None]
    known: list[tuple[int, int]]
    loose: list[int]


def places(tensors: Sequence[Tensor | None]) -> list[tuple[Any, ...] | None] | None:
    """See :class:`Layout`; None if one has no strides or no memory."""
    # At every call of a network, for some hundreds: no question more than is needed.
    try:
        return [
            None
            if t is None
            else (t.data_ptr(), t._version, t.shape, t.stride(), t.dtype, t.is_neg())
            for t in tensors
        ]
    except RuntimeError:  # Some of them count no versions, being made in inference mode.
        if not any(t is not None and t.is_inference() for t in tensors):
            return None
    counted = [t if t is None or not t.is_inference() else None for t in tensors]
    found = places(counted)
    if found is None:
        return None
    return [
        known
        if t is None or known is not None
        else (t.data_ptr(), None, t.shape, t.stride(), t.dtype, t.is_neg())
        for t, known in zip(tensors, found, strict=True)
    ]


def layout(tensors: Sequence[Tensor | None], found: list[tuple[Any, ...] | None]) -> Layout | None:
    """What :func:`content` needs, of tensors that are where :func:`places` found them.

    None if one of them is no plain tensor in this machine's memory.
    """
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or not t.is_cpu or t.layout != torch.strided):
            return None
    dense = [t is None or (is_dense(t) and not t.is_neg()) for t in tensors]
    return Layout(
        found,
        [
            (t.data_ptr(), t.numel() * t.element_size())
            for t, whole in zip(tensors, dense, strict=True)
            if t is not None and whole
        ],
        [i for i, whole in enumerate(dense) if not whole],
    )


def content(tensors: Sequence[Tensor | None], known: Layout) -> tuple[int, int]:
    """128 bits of what tensors hold, that differ where anything of it does (``csrc/cpu``)."""
    copies = [
        t.detach().contiguous().resolve_neg() for i in known.loose if (t := tensors[i]) is not None
    ]
    pieces = [*known.known, *((t.data_ptr(), t.numel() * t.element_size()) for t in copies)]
    found: tuple[int, int] = _extension.load("cpu").fingerprint(torch.get_num_threads(), pieces)
    return found


def is_dense(t: Tensor) -> bool:
    """Whether a tensor's elements, in some order of its axes, lie one after another."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 0:
            return True
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
