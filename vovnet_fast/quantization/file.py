"""A quantised network as a file: its buffers as safetensors, and what it is in the metadata.

>>> import vovnet_fast
>>> vovnet_fast.quantize(model, images).save("v39-int8.safetensors")
>>> network = vovnet_fast.load_quantized("v39-int8.safetensors")

It is written whole or not at all. Its header is :class:`Header`; see
:mod:`vovnet_fast.deploy.header`. Features of what is loaded are those of what was saved, bit for
bit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arithmetic, specs
from .._version import __version__
from ..arithmetic import fp8, int8
from ..checkpoints.writing import write_safetensors
from ..deploy import file as frozen_file
from ..deploy import header as headers
from ..deploy.freeze import require_options
from ..deploy.header import DTYPES, LAYOUTS, damaged
from ..network.filling import CheckpointError
from ..network.model import STAGE_NAMES
from ..specs import FIRST_STAGE, VoVNetSpec
from . import layout
from .formats import Format
from .layout import Architecture
from .network import QuantizedVoVNet
from .report import Row

FORMAT = 1
"""Of the files that this version writes, and the only one that it reads."""

KIND = headers.Kind(
    "vovnet_fast.quantized",
    "quantised network",
    {"format": FORMAT, "arithmetic": arithmetic.VERSION},
)

_POSITIVE = ("multiplier", "scale", "unit")
"""What tensors are called that have no zero."""


class Header(NamedTuple):
    """What a file says of its network, beside the tensors.

    Attributes:
        format: of the file, :data:`FORMAT`.
        version: of the package that wrote it.
        arithmetic: :data:`vovnet_fast.arithmetic.VERSION`, by which its features are computed.
        spec: the architecture, as :meth:`VoVNetSpec.encode` writes it.
        dialect: that of the architecture.
        dtype: ``int8`` or ``fp8``.
        levels: the largest activation.
        wide_stem: whether the first layer has more than eight bits.
        input_ch: channels of images.
        out_features: names of the returned features.
        out_dtype: their dtype.
        memory_format: their layout.
        report: rows of the report, as lists; a number that JSON has no word for is a string.
    """

    format: int
    version: str
    arithmetic: int
    spec: str
    dialect: str
    dtype: str
    levels: int
    wide_stem: bool
    input_ch: int
    out_features: list[str]
    out_dtype: str
    memory_format: str
    report: list[Any]


# --------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------


def save(network: QuantizedVoVNet, path: str | os.PathLike[str]) -> None:
    """Write a quantised network to a file, which :func:`load_quantized` reads, all or nothing.

    Args:
        network: what :func:`vovnet_fast.quantize` made.
        path: ends in ``.safetensors``. A file that is there hands on its mode.

    Raises:
        ValueError: another ending.
        CheckpointError: its tensors are no longer a quantised network's, or are on the meta device.
        OSError: there is no such folder, the disk is full, or may not be written.
    """
    headers.require_ending(path, KIND)
    architecture, held = network.architecture, dict(network.named_buffers())
    del held["stamp"]  # The header says it.
    if network.scales.is_meta:
        raise CheckpointError("cannot save a quantised network on the meta device: no values")
    problems = _problems(architecture, held)
    if problems:
        raise CheckpointError(f"cannot save a quantised network: {problems}")
    header = Header(
        FORMAT,
        __version__,
        arithmetic.VERSION,
        network.spec.encode(),
        network.spec.dialect,
        network.dtype,
        network.levels,
        network.wide_stem,
        network.input_ch,
        list(network.out_features),
        headers.name(network.out_dtype),
        headers.name(network.memory_format),
        [[_plain(value) for value in row] for row in network._rows],
    )
    write_safetensors(held, path, {KIND.key: json.dumps(header._asdict(), allow_nan=False)})


def _plain(value: str | float) -> str | float:
    return value if isinstance(value, str) or math.isfinite(value) else repr(value)


# --------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------


def load_quantized(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    memory_format: torch.memory_format | None = None,
    out_dtype: torch.dtype | None = None,
    spec: str | VoVNetSpec | None = None,
) -> QuantizedVoVNet:
    """A quantised network out of a file that :meth:`QuantizedVoVNet.save` wrote.

    On a CPU its buffers are windows on the file; see :func:`vovnet_fast.load_frozen`.

    Args:
        path: the file.
        device: to put it on.
        memory_format, out_dtype: of features; by default as they were when it was saved.
        spec: the architecture that it has to be of; by default any.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, holds no quantised network or one of another architecture,
            is of a newer version or another arithmetic; it does not hold what its architecture
            has, by name, shape, dtype and range.
        RuntimeError: it is in fp8, which this torch does not have.
        TypeError, ValueError: another ``memory_format`` or ``out_dtype`` than there is.
    """
    path = Path(path)
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        tensors, metadata = headers.read(path, KIND)
        header = _header(path, metadata)
        found = headers.architecture(path, header, KIND)
        _require_spec(path, found, spec)
        architecture = _architecture(path, header, found, tensors)
        problems = _problems(architecture, tensors)
        if problems:
            raise headers.other_network(path, header, found, problems)
        chosen = (
            out_dtype or DTYPES[header.out_dtype],
            memory_format or LAYOUTS[header.memory_format],
        )
        require_options("load_quantized", torch.float32, *chosen)
        rows = [Row(*(_number(i, value) for i, value in enumerate(row))) for row in header.report]
        network = layout.network(architecture, headers.placed(tensors, device))
        return QuantizedVoVNet(network, rows, *chosen, copy=False)


def _number(place: int, value: Any) -> Any:
    return value if place < 2 else float(value)


def _header(path: Path, metadata: Mapping[str, str]) -> Header:
    if KIND.key not in metadata:
        frozen = frozen_file.KIND.key in metadata
        raise CheckpointError(
            f"{path} holds {'a frozen' if frozen else 'tensors and no quantised'} network"
            f"{', which vovnet_fast.load_frozen reads' if frozen else ''}: its metadata have no "
            f"{KIND.key!r}, which vovnet_fast.quantize(model, images).save(path) writes"
        )
    header = headers.parse(path, metadata[KIND.key], KIND, Header)
    for row in header.report:
        if not isinstance(row, list) or len(row) != len(Row._fields) or not _is_row(row):
            raise damaged(path, f"its report has a row {row!r}")
    return header


def _is_row(row: list[Any]) -> bool:
    try:
        numbers = [float(value) for value in row[2:]]
    except (TypeError, ValueError):
        return False
    return len(numbers) == 3 and all(isinstance(value, str) for value in row[:2])


def _architecture(
    path: Path, header: Header, spec: VoVNetSpec, tensors: Mapping[str, Tensor]
) -> Architecture:
    levels = {"int8": arithmetic.LEVELS, "fp8": (fp8.LARGEST,)}.get(header.dtype, ())
    if header.levels not in levels:
        raise damaged(path, f"there is no {header.dtype} of {header.levels} levels")
    reason = fp8.why_not() if header.dtype == "fp8" else None
    if reason is not None:
        raise RuntimeError(f"{path} holds a network in fp8: {reason}")
    if not 1 <= header.input_ch < 2**20 or sum(spec.blocks_per_stage) > 2**10:
        raise damaged(path, f"no network has {header.input_ch} channels of images, or such depth")
    last = header.out_features[-1]
    stage = FIRST_STAGE + STAGE_NAMES.index(last) if last in STAGE_NAMES else FIRST_STAGE - 1
    headers.require_count(path, header, spec, tensors, stage)
    form = Format(header.dtype, header.levels, header.wide_stem)
    return Architecture(spec, form, tuple(header.out_features), header.input_ch)


def _require_spec(path: Path, found: VoVNetSpec, spec: str | VoVNetSpec | None) -> None:
    if spec is not None and specs.get(spec) != found:
        raise CheckpointError(
            f"{path} holds {found.name} of the dialect {found.dialect}, expected "
            f"{specs.get(spec).name}: quantise that, or ask for the other"
        )


def _problems(architecture: Architecture, found: Mapping[str, Tensor]) -> str:
    """What is wrong with tensors, or nothing."""
    expected = layout.expected(architecture)
    problems = headers.difference(expected, found)
    if problems:
        return problems
    return headers.listed(
        {"out of range": [name for name in expected if _is_bad(name, found[name])]}
    )


def _is_bad(name: str, tensor: Tensor) -> bool:
    """Whether a tensor has values that no network has: damaged, or made by something else."""
    if tensor.dtype in (torch.uint8, torch.int16, torch.int32):
        return False
    if tensor.dtype == torch.int8:  # Whose -128 would overflow where pairs of products saturate.
        return bool((tensor < -int8.LARGEST).any())
    values = tensor.float()
    if not values.isfinite().all():
        return True
    if name == "sums":
        return bool((values[:, :2] < 0).any())
    return bool(any(word in name for word in _POSITIVE) and (values <= 0).any())
