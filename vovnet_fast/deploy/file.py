"""A frozen network as a file: its buffers as safetensors, and what it is in the file's metadata.

>>> import vovnet_fast
>>> vovnet_fast.freeze(model).save("v39.safetensors")
>>> network = vovnet_fast.load_frozen("v39.safetensors")  # No model, no checkpoint, no folding.

The tensors are the buffers of :class:`.frozen.FrozenVoVNet` under their names, without those that
are the same number throughout. Nothing that depends on a machine is in the file: what a backend
packs is packed where the network is loaded. The metadata have one entry, :data:`KEY`, with the
fields of :class:`Header` as JSON. Nothing in a file is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._version import __version__
from ..checkpoints.writing import ALIGNMENT, SAFETENSORS, write_safetensors
from ..network.filling import CheckpointError
from ..ops import _checks
from ..specs import VoVNetSpec
from . import layout
from .freeze import FrozenVoVNet, require_options

KEY = "vovnet_fast.frozen"
"""What the header is called among a file's metadata."""

FORMAT = 1
"""Of the files that this version writes, and the newest that it reads."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _checks.DTYPES}
_LAYOUTS = {
    "channels_last": torch.channels_last,
    "contiguous_format": torch.contiguous_format,
}


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
    if Path(path).suffix != SAFETENSORS:
        raise ValueError(
            f"a frozen network is written as safetensors: its file's name must end in "
            f"{SAFETENSORS}, got {str(path)!r}"
        )
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
        _name(network.dtype),
        list(network.out_features),
        _name(network.out_dtype),
        _name(network.memory_format),
        network.graph,
    )
    write_safetensors(tensors, path, {KEY: json.dumps(header._asdict())})


def _written(network: FrozenVoVNet) -> list[str]:
    """Names of the buffers that a file has."""
    return [name for name in network._layout if name not in network._constants]


def _name(value: torch.dtype | torch.memory_format) -> str:
    return str(value).removeprefix("torch.")


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
    if not path.exists():
        raise FileNotFoundError(f"no frozen network at {path}")
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}: it is no file, but a folder, pipe or device")
    # Windows on a file have no use for a default device, nor for not counting what is written.
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        tensors, metadata = read_tensors(path)
        header = _header(path, metadata)
        spec = _spec(path, header)
        _require_fit(path, header, spec, tensors)
        _require_finite(f"cannot load {path}: ", tensors)
        options = (
            memory_format or _LAYOUTS[header.memory_format],
            header.graph if graph is None else graph,
            out_dtype or _DTYPES[header.out_dtype],
        )
        require_options("load_frozen", _DTYPES[header.dtype], options[2], options[0])
        for name, tensor in tensors.items():
            aligned = tensor.data_ptr() % ALIGNMENT == 0
            tensors[name] = (tensor if aligned else tensor.clone()).to(device)
        params = layout.params(spec, header.spec, tensors)
        return FrozenVoVNet(params, tuple(header.out_features), *options, copy=False)


def is_frozen(path: str | os.PathLike[str]) -> bool:
    """Whether a file can be read as safetensors, and has the header of a frozen network."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return KEY in (file.metadata() or {})
    except Exception:  # Whatever it is, it is another thing.
        return False


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors, windows on the file, and metadata, both unchecked.

    Raises:
        CheckpointError: it is no whole file of safetensors.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except Exception as error:  # Damaged files raise almost anything.
        raise CheckpointError(
            f"cannot read {path}: {error}. A whole {SAFETENSORS} file was expected, as "
            "save() writes it"
        ) from error


def _header(path: Path, metadata: Mapping[str, str]) -> Header:
    if KEY not in metadata:
        raise CheckpointError(
            f"{path} holds tensors and no frozen network, of which its metadata would have "
            f"{KEY!r}: a checkpoint fills a model (vovnet_fast.checkpoints.load), which "
            "vovnet_fast.freeze makes a frozen network of"
        )
    try:
        fields = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is no JSON ({error})") from error
    if not isinstance(fields, dict) or type(fields.get("format")) is not int:
        raise _damaged(path, "it has no number of a format")
    if fields["format"] != FORMAT:
        raise CheckpointError(_newer(path, fields, f"format {fields['format']}"))
    expected = dict(
        format=int, version=str, spec=str, dialect=str, dtype=str, out_features=list,
        out_dtype=str, memory_format=str, graph=bool,
    )  # fmt: skip
    if {name: type(value) for name, value in fields.items()} != expected:
        raise _damaged(path, f"it has other fields than {', '.join(Header._fields)}")
    return Header(**fields)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"cannot read the header of {path}: {why}. Save the network again, or fetch the file again"
    )


def _newer(path: Path, header: Mapping[str, Any], what: str) -> str:
    return (
        f"{path} was written by vovnet_fast {header.get('version')} and has {what}, which this "
        f"one, {__version__}, does not know: install vovnet_fast {header.get('version')} or newer, "
        "or save the network again with this one"
    )


def _spec(path: Path, header: Header) -> VoVNetSpec:
    """The architecture; what else the header says is looked at too."""
    try:
        spec = VoVNetSpec.decode(header.spec)
    except Exception as error:
        if header.version == __version__:
            raise _damaged(path, f"its architecture is none ({error})") from error
        message = _newer(path, header._asdict(), f"an architecture ({error})")
        raise CheckpointError(message) from error
    if spec.dialect != header.dialect:
        raise _damaged(path, f"its dialect is {header.dialect}, its architecture's {spec.dialect}")
    for known, name in (
        (_DTYPES, header.dtype),
        (_DTYPES, header.out_dtype),
        (_LAYOUTS, header.memory_format),
    ):
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
    return spec


def _require_fit(
    path: Path, header: Header, spec: VoVNetSpec, tensors: Mapping[str, Tensor]
) -> None:
    first = tensors.get("weight_0")
    # Before they are counted: what is in a file may say that there are as many as it likes.
    least = sum(spec.blocks_per_stage) * (spec.layers_per_block + 1)
    if first is None or first.ndim != 4 or least >= len(tensors):
        shape = "none" if first is None else list(first.shape)
        what = f"there are {len(tensors)} tensors, of which weight_0 is {shape}: more were expected"
        raise _other(path, header, spec, what)
    # How many channels images have only the first tells.
    expected = layout.expected(spec, first.shape[3], _DTYPES[header.dtype])
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    problems = [
        f"{len(items)} {what}: {', '.join(items[:4])}{', ...' if len(items) > 4 else ''}"
        for what, items in (
            ("tensors missing", [name for name in expected if name not in found]),
            ("tensors without a place", [name for name in found if name not in expected]),
            (
                "tensors that differ",
                [
                    f"{name} is {list(found[name][0])} in {found[name][1]}, expected "
                    f"{list(shape)} in {dtype}"
                    for name, (shape, dtype) in expected.items()
                    if found.get(name, (shape, dtype)) != (shape, dtype)
                ],
            ),
        )
        if items
    ]
    if problems:
        raise _other(path, header, spec, ". ".join(problems))


def _other(path: Path, header: Header, spec: VoVNetSpec, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} does not hold {spec.name} in {header.dtype}, as its header says: {why}. Save the "
        "network again, or fetch the file again"
    )
