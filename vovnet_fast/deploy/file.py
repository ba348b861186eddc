"""A frozen network as a file: its buffers as safetensors, and what it is in the file's metadata.

>>> import vovnet_fast
>>> vovnet_fast.freeze(model).save("v39.safetensors")
>>> network = vovnet_fast.load_frozen("v39.safetensors")  # No model, no checkpoint, no folding.

The tensors are the buffers of :class:`.frozen.FrozenVoVNet` under their names, without those that
are the same number throughout. Nothing that depends on a machine is in the file: what a backend
packs is packed where the network is loaded. Its header is :class:`Header`; see :mod:`.header`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .._version import __version__
from ..checkpoints.writing import write_safetensors
from ..network.filling import CheckpointError
from ..network.model import STAGE_NAMES
from ..specs import FIRST_STAGE, VoVNetSpec
from . import header as headers
from . import layout
from .freeze import FrozenVoVNet, require_options
from .header import DTYPES, LAYOUTS

FORMAT = 1
"""Of the files that this version writes, and the only one that it reads."""

KIND = headers.Kind("vovnet_fast.frozen", "frozen network", {"format": FORMAT})


class Header(NamedTuple):
    """What a file says of its network, beside the tensors.

    Attributes:
        format: of the file, :data:`FORMAT`.
        version: of the package that wrote it.
        spec: the architecture, as :meth:`VoVNetSpec.encode` writes it.
        dialect: that of the architecture, for who reads the header alone.
        dtype: of weights and activations, ``float32`` say.
        out_features: names of the returned features.
        out_dtype: their dtype.
        memory_format: their layout, ``channels_last`` or ``contiguous_format``.
        graph: whether CUDA graphs are captured.
    """

    format: int
    version: str
    spec: str
    dialect: str
    dtype: str
    out_features: list[str]
    out_dtype: str
    memory_format: str
    graph: bool


# --------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------


def save(network: FrozenVoVNet, path: str | os.PathLike[str]) -> None:
    """Write a frozen network to a file, which :func:`load_frozen` reads, all or nothing.

    What is written are its buffers as they are now, on whatever device. Hooks are no part of it.

    Args:
        network: what :func:`vovnet_fast.freeze` made.
        path: ends in ``.safetensors``. A file that is there hands on its mode.

    Raises:
        ValueError: another ending; buffers that do not fit, as for a call.
        CheckpointError: a value is not finite, or there are none (meta).
        OSError: there is no such folder, the disk is full, or may not be written.
    """
    headers.require_ending(path, KIND)
    tensors = {name: getattr(network, name) for name in _written(network)}
    empty = [name for name, tensor in tensors.items() if tensor is not None and tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"cannot save a frozen network on the meta device, where {empty[0]} has no values"
        )
    network._follow()  # Buffers that are not the network's are refused.
    _require_finite("cannot save a frozen network: ", tensors)
    header = Header(
        FORMAT,
        __version__,
        network.spec.encode(),
        network.spec.dialect,
        headers.name(network.dtype),
        list(network.out_features),
        headers.name(network.out_dtype),
        headers.name(network.memory_format),
        network.graph,
    )
    write_safetensors(tensors, path, {KIND.key: json.dumps(header._asdict())})


def _written(network: FrozenVoVNet) -> list[str]:
    """Names of the buffers that a file has."""
    return [name for name in network._layout if name not in network._constants]


def _require_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{what}{len(bad)} of its tensors hold NaN or Inf, first {bad[0]}: its training had "
            "diverged, its dtype is too narrow for its weights, or it is damaged"
        )


# --------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------


def load_frozen(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    memory_format: torch.memory_format | None = None,
    graph: bool | None = None,
    out_dtype: torch.dtype | None = None,
) -> FrozenVoVNet:
    """A frozen network out of a file that :meth:`FrozenVoVNet.save` wrote.

    On a CPU its buffers are windows on the file (but for those that lie there as PyTorch does not
    lay tensors, which are few and small, and copied): the system holds only what is used of it, and
    one copy for all processes that have the same network. Writing to them changes them for this
    process alone, and never the file. The file may be replaced or removed meanwhile, but not cut
    or written to where it lies, which may end the process. What backends pack of the weights they
    pack when they first use them, on this machine.

    It is a frozen network like any other: it follows its own buffers, as that does which
    :func:`vovnet_fast.freeze` made, and neither a model nor the file. :meth:`FrozenVoVNet.refresh`
    forgets what was made of the buffers, and reads nothing anew; who wants what is in the file now
    loads it again. Features are those of the network that was saved, bit for bit on the same
    backend and machine.

    Its ``dtype`` is that of the file. Weights that are rounded already would be rounded once more
    by another one: for that, freeze the model again.

    Args:
        path: the file.
        device: to put it on.
        memory_format, graph, out_dtype: see :func:`vovnet_fast.freeze`; by default as they were
            when it was saved.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, holds no frozen network, or is of a newer version; it does
            not hold what its architecture has, by name, shape and dtype; a value is not finite.
        TypeError, ValueError: another ``memory_format`` or ``out_dtype`` than there is.
    """
    path = Path(path)
    # Windows on a file have no use for a default device, nor for not counting what is written.
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        tensors, metadata = headers.read(path, KIND)
        header = _header(path, metadata)
        spec = headers.architecture(path, header, KIND)
        _require_fit(path, header, spec, tensors)
        _require_finite(f"cannot load {path}: ", tensors)
        options = (
            memory_format or LAYOUTS[header.memory_format],
            header.graph if graph is None else graph,
            out_dtype or DTYPES[header.out_dtype],
        )
        require_options("load_frozen", DTYPES[header.dtype], options[2], options[0])
        params = layout.params(spec, header.spec, headers.placed(tensors, device))
        return FrozenVoVNet(params, tuple(header.out_features), *options, copy=False)


def _header(path: Path, metadata: Mapping[str, str]) -> Header:
    if KIND.key not in metadata:
        raise CheckpointError(
            f"{path} holds tensors and no frozen network, of which its metadata would have "
            f"{KIND.key!r}: a checkpoint fills a model (vovnet_fast.checkpoints.load), which "
            "vovnet_fast.freeze makes a frozen network of"
        )
    header = headers.parse(path, metadata[KIND.key], KIND, Header)
    headers.require_one_of(path, DTYPES, header.dtype)
    return header


def _require_fit(
    path: Path, header: Header, spec: VoVNetSpec, tensors: Mapping[str, Tensor]
) -> None:
    headers.require_count(path, header, spec, tensors, FIRST_STAGE + len(STAGE_NAMES) - 1)
    # How many channels images have only the first tells.
    expected = layout.expected(spec, tensors["weight_0"].shape[3], DTYPES[header.dtype])
    problems = headers.difference(expected, tensors)
    if problems:
        raise headers.other_network(path, header, spec, problems)
