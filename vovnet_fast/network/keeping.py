"""Networks that run as one op keep what was made of their weights (:mod:`vovnet_fast.replay`).

It is no part of a module: copies, pickles and state dicts know nothing of it, and it goes when the
module goes, or begins to train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import _environment, backends, compat
from ..replay.kept import Kept
from . import structure
from .watchers import watching

if TYPE_CHECKING:
    from .model import VoVNet

_kept: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


def possible(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether something is kept at all: on the ``cpu`` backend, where nobody is looking.

    ``VOVNET_FAST_KEEP_WEIGHTS=0`` keeps nothing, and neither does ``VOVNET_FAST_CHECK=1``.
    """
    return (
        x.device.type == "cpu"
        and not compat.is_compiling()
        and not torch.jit.is_tracing()
        and watching(x) is None
        and not backends.sees_shapes_only(backends.chosen())
        and _environment.flag("KEEP_WEIGHTS", "1")
        and not _environment.flag("CHECK")
        and backends.select(x.device, dtype, ()) == "cpu"
    )


def features(network: VoVNet, x: Tensor, dtype: torch.dtype) -> list[Tensor] | None:
    """Features by what is kept of a network, or None where there is nothing, or not yet.

    Args:
        network: one that runs as one op on these images: that has been decided.
        x: ``[N, C, H, W]``.
        dtype: of activations.
    """
    if not possible(x, dtype) or x.numel() == 0:
        return None
    known = structure.known(network)
    if known is None:
        return None
    kept = _kept.get(network)
    if kept is None:
        kept = _kept.setdefault(network, Kept())
    state = (known, network.spec)
    kind = x.device.type
    if compat.autocast_dtype(kind) is None:
        return kept.features(x, dtype, network.out_features, known.tensors(), state, network.fold)
    with torch.autocast(kind, enabled=False):
        return kept.features(x, dtype, network.out_features, known.tensors(), state, network.fold)


def forget(network: nn.Module) -> None:
    """Drop what is kept: the weights are about to change."""
    _kept.pop(network, None)
