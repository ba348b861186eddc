"""A quantised network as a file: its buffers as safetensors, and what it is in the metadata.

>>> import vovnet_fast
>>> vovnet_fast.quantize(model, images).save("v39-int8.safetensors")
>>> network = vovnet_fast.load_quantized("v39-int8.safetensors")

As that of a frozen network (:mod:`vovnet_fast.deploy.file`): nothing in a file is executed, and it
is written whole or not at all. The metadata have one entry, :data:`KEY`, with the fields of
:class:`Header` as JSON. Features of what is loaded are those of what was saved, bit for bit.
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
from ..checkpoints.writing import ALIGNMENT, SAFETENSORS, write_safetensors
from ..deploy import file as frozen_file
from ..deploy.freeze import require_options
from ..network.filling import CheckpointError
from ..ops import _checks
from ..specs import VoVNetSpec
from . import layout
from .formats import Format
from .layout import Architecture
from .network import QuantizedVoVNet
from .report import Row

KEY = "vovnet_fast.quantized"
"""What the header is called among a file's metadata."""

FORMAT = 1
"""Of the files that this version writes, and the newest that it reads."""

_OUT_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _checks.DTYPES}
_POSITIVE = ("multiplier", "scale", "unit")
"""What tensors are called that have no zero."""

_LAYOUTS = {
    "channels_last": torch.channels_last,
    "contiguous_format": torch.contiguous_format,
}


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
    if Path(path).suffix != SAFETENSORS:
        raise ValueError(
            f"a quantised network is written as safetensors: its file's name must end in "
            f"{SAFETENSORS}, got {str(path)!r}"
        )
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
        str(network.out_dtype).removeprefix("torch."),
        str(network.memory_format).removeprefix("torch."),
        [[_plain(value) for value in row] for row in network._rows],
    )
    write_safetensors(held, path, {KEY: json.dumps(header._asdict(), allow_nan=False)})


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
    if not path.exists():
        raise FileNotFoundError(f"no quantised network at {path}")
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}: it is no file, but a folder, pipe or device")
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        tensors, metadata = frozen_file.read_tensors(path)
        header = _header(path, metadata)
        architecture = _architecture(path, header)
        _require_spec(path, architecture, spec)
        problems = _problems(architecture, tensors)
        if problems:
            raise CheckpointError(
                f"{path} does not hold {architecture.spec.name} in {header.dtype}, as its header "
                f"says: {problems}. Save the network again, or fetch the file again"
            )
        chosen = (
            out_dtype or _OUT_DTYPES[header.out_dtype],
            memory_format or _LAYOUTS[header.memory_format],
        )
        require_options("load_quantized", torch.float32, *chosen)
        for name, tensor in tensors.items():
            aligned = tensor.data_ptr() % ALIGNMENT == 0
            tensors[name] = (tensor if aligned else tensor.clone()).to(device)
        rows = [Row(*(_number(i, value) for i, value in enumerate(row))) for row in header.report]
        network = layout.network(architecture, tensors)
        return QuantizedVoVNet(network, rows, *chosen, copy=False)


def _number(place: int, value: Any) -> Any:
    return value if place < 2 else float(value)


def _header(path: Path, metadata: Mapping[str, str]) -> Header:
    if KEY not in metadata:
        frozen = frozen_file.KEY in metadata
        raise CheckpointError(
            f"{path} holds {'a frozen' if frozen else 'tensors and no quantised'} network"
            f"{', which vovnet_fast.load_frozen reads' if frozen else ''}: its metadata have no "
            f"{KEY!r}, which vovnet_fast.quantize(model, images).save(path) writes"
        )
    try:
        fields = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is no JSON ({error})") from error
    if not isinstance(fields, dict) or type(fields.get("format")) is not int:
        raise _damaged(path, "it has no number of a format")
    for what, known in (("format", FORMAT), ("arithmetic", arithmetic.VERSION)):
        if fields.get(what) != known:
            raise CheckpointError(
                f"{path} was written by vovnet_fast {fields.get('version')} and has {what} "
                f"{fields.get(what)}, where this one, {__version__}, knows {known}: install the "
                "version that wrote it, or quantise the network again with this one"
            )
    expected = dict(
        format=int, version=str, arithmetic=int, spec=str, dialect=str, dtype=str, levels=int,
        wide_stem=bool, input_ch=int, out_features=list, out_dtype=str, memory_format=str,
        report=list,
    )  # fmt: skip
    if {name: type(value) for name, value in fields.items()} != expected:
        raise _damaged(path, f"it has other fields than {', '.join(Header._fields)}")
    for row in fields["report"]:
        if not isinstance(row, list) or len(row) != len(Row._fields) or not _is_row(row):
            raise _damaged(path, f"its report has a row {row!r}")
    return Header(**fields)


def _is_row(row: list[Any]) -> bool:
    try:
        numbers = [float(value) for value in row[2:]]
    except (TypeError, ValueError):
        return False
    return len(numbers) == 3 and all(isinstance(value, str) for value in row[:2])


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"cannot read the header of {path}: {why}. Save the network again, or fetch the file again"
    )


def _architecture(path: Path, header: Header) -> Architecture:
    try:
        spec = VoVNetSpec.decode(header.spec)
    except Exception as error:
        raise _damaged(path, f"its architecture is none ({error})") from error
    if spec.dialect != header.dialect:
        raise _damaged(path, f"its dialect is {header.dialect}, its architecture's {spec.dialect}")
    levels = {"int8": arithmetic.LEVELS, "fp8": (fp8.LARGEST,)}.get(header.dtype, ())
    if header.levels not in levels:
        raise _damaged(path, f"there is no {header.dtype} of {header.levels} levels")
    reason = fp8.why_not() if header.dtype == "fp8" else None
    if reason is not None:
        raise RuntimeError(f"{path} holds a network in fp8: {reason}")
    for known, name in ((_OUT_DTYPES, header.out_dtype), (_LAYOUTS, header.memory_format)):
        if name not in known:
            raise _damaged(path, f"it has {name!r} where one of {', '.join(known)} was expected")
    features = list(spec.feature_channels())
    if not header.out_features or header.out_features != [
        name for name in features if name in header.out_features
    ]:
        raise _damaged(
            path,
            f"its features are {header.out_features}, and one or more of {', '.join(features)} "
            "were expected, in this order",
        )
    if not 1 <= header.input_ch < 2**20 or sum(spec.blocks_per_stage) > 2**10:
        raise _damaged(path, f"no network has {header.input_ch} channels of images, or such depth")
    form = Format(header.dtype, header.levels, header.wide_stem)
    return Architecture(spec, form, tuple(header.out_features), header.input_ch)


def _require_spec(path: Path, found: Architecture, spec: str | VoVNetSpec | None) -> None:
    if spec is not None and specs.get(spec) != found.spec:
        raise CheckpointError(
            f"{path} holds {found.spec.name} of the dialect {found.spec.dialect}, expected "
            f"{specs.get(spec).name}: quantise that, or ask for the other"
        )


def _problems(architecture: Architecture, found: Mapping[str, Tensor]) -> str:
    """What is wrong with tensors, or nothing."""
    expected = layout.expected(architecture)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()}
    groups = {
        "missing": [name for name in expected if name not in shapes],
        "without a place": [name for name in shapes if name not in expected],
        "that differ": [
            f"{name} is {list(shapes[name][0])} in {shapes[name][1]}, expected {list(shape)} in "
            f"{dtype}"
            for name, (shape, dtype) in expected.items()
            if shapes.get(name, (shape, dtype)) != (shape, dtype)
        ],
    }
    if not any(groups.values()):
        groups["out of range"] = [name for name in expected if _is_bad(name, found[name])]
    return ". ".join(
        f"{len(items)} tensors {what}: {', '.join(items[:4])}{', ...' if len(items) > 4 else ''}"
        for what, items in groups.items()
        if items
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
