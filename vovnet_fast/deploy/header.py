"""What the files of frozen and of quantised networks have in common: tensors as safetensors, and a
header that says what they are.

The header is one entry among a file's metadata, whose value are the fields of a NamedTuple as JSON:
:class:`.file.Header`, and that of :mod:`vovnet_fast.quantization.file`. Nothing in a file is
executed, and nothing that it says is believed: fields are looked at one by one, and tensors are
held against what the architecture has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, get_origin, get_type_hints

import torch
from torch import Tensor

from .._version import __version__
from ..checkpoints.writing import ALIGNMENT, SAFETENSORS
from ..network.filling import CheckpointError
from ..ops import _checks
from ..specs import FIRST_STAGE, VoVNetSpec

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _checks.DTYPES}
LAYOUTS = {
    "channels_last": torch.channels_last,
    "contiguous_format": torch.contiguous_format,
}

Expected = Mapping[str, "tuple[tuple[int, ...], torch.dtype]"]
"""Shapes and dtypes by name."""


class Kind(NamedTuple):
    """A kind of network that there are files of.

    Attributes:
        key: what the header is called among a file's metadata.
        network: it in words, ``frozen network``.
        versions: by the name of a field, its value in files that this version writes, and the only
            one that it reads.
    """

    key: str
    network: str
    versions: Mapping[str, int]


class Common(Protocol):
    """Fields of every header."""

    @property
    def version(self) -> str: ...
    @property
    def spec(self) -> str: ...
    @property
    def dialect(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def out_features(self) -> list[str]: ...
    @property
    def out_dtype(self) -> str: ...
    @property
    def memory_format(self) -> str: ...


Header = TypeVar("Header")


def name(value: torch.dtype | torch.memory_format) -> str:
    """As headers write it."""
    return str(value).removeprefix("torch.")


def require_ending(path: str | os.PathLike[str], kind: Kind) -> None:
    """Refuse to write a file that is not called what it is."""
    if Path(path).suffix != SAFETENSORS:
        raise ValueError(
            f"a {kind.network} is written as safetensors: its file's name must end in "
            f"{SAFETENSORS}, got {str(path)!r}"
        )


# --------------------------------------------------------------------------------------
# The file
# --------------------------------------------------------------------------------------


def holds(path: str | os.PathLike[str], kind: Kind) -> bool:
    """Whether a file can be read as safetensors, and has the header of a network of this kind."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return kind.key in (file.metadata() or {})
    except Exception:  # Whatever it is, it is another thing.
        return False


def read(path: Path, kind: Kind) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors, windows on the file, and metadata, both unchecked.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no whole file of safetensors.
    """
    from safetensors import safe_open

    if not path.exists():
        raise FileNotFoundError(f"no {kind.network} at {path}")
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}: it is no file, but a folder, pipe or device")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except Exception as error:  # Damaged files raise almost anything.
        raise CheckpointError(
            f"cannot read {path}: {error}. A whole {SAFETENSORS} file was expected, as "
            "save() writes it"
        ) from error


def placed(tensors: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Tensors on a device; on a CPU windows on the file, but for those that begin in odd places."""
    return {
        name: (tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()).to(device)
        for name, tensor in tensors.items()
    }


# --------------------------------------------------------------------------------------
# What it says
# --------------------------------------------------------------------------------------


def parse(path: Path, text: str, kind: Kind, header: type[Header]) -> Header:
    """A header, a NamedTuple, with fields of the types that it has.

    Raises:
        CheckpointError: it is none, or of another version.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is no JSON ({error})") from error
    if not isinstance(fields, dict) or type(fields.get("format")) is not int:
        raise damaged(path, "it has no number of a format")
    for field, known in kind.versions.items():
        if fields.get(field) != known:
            what = f"{field} {fields.get(field)}"
            raise _other_version(path, fields.get("version"), what, f"knows {known}", kind)
    types = {field: get_origin(hint) or hint for field, hint in get_type_hints(header).items()}
    if {field: type(value) for field, value in fields.items()} != types:
        raise damaged(path, f"it has other fields than {', '.join(types)}")
    return header(**fields)


def architecture(path: Path, header: Common, kind: Kind) -> VoVNetSpec:
    """The architecture; what else all headers say is looked at too.

    Raises:
        CheckpointError: there is no such architecture, dialect, feature, dtype or layout.
    """
    try:
        spec = VoVNetSpec.decode(header.spec)
    except Exception as error:
        if header.version == __version__:
            raise damaged(path, f"its architecture is none ({error})") from error
        what = f"an architecture ({error})"
        raise _other_version(path, header.version, what, "does not know it", kind) from error
    if spec.dialect != header.dialect:
        raise damaged(path, f"its dialect is {header.dialect}, its architecture's {spec.dialect}")
    require_one_of(path, DTYPES, header.out_dtype)
    require_one_of(path, LAYOUTS, header.memory_format)
    features = list(spec.feature_channels())
    if not header.out_features or header.out_features != [
        name for name in features if name in header.out_features
    ]:
        raise damaged(
            path,
            f"its features are {header.out_features}, and one or more of {', '.join(features)} "
            "were expected, in this order",
        )
    return spec


def require_one_of(path: Path, known: Mapping[str, Any], value: str) -> None:
    """Refuse a word that means nothing."""
    if value not in known:
        raise damaged(path, f"it has {value!r} where one of {', '.join(known)} was expected")


def damaged(path: Path, why: str) -> CheckpointError:
    """The error of a header that makes no sense."""
    return CheckpointError(
        f"cannot read the header of {path}: {why}. Save the network again, or fetch the file again"
    )


def _other_version(
    path: Path, version: str | None, what: str, knows: str, kind: Kind
) -> CheckpointError:
    return CheckpointError(
        f"{path} was written by vovnet_fast {version} and has {what}, where this one, "
        f"{__version__}, {knows}: install vovnet_fast {version}, or make the {kind.network} again "
        "with this one"
    )


# --------------------------------------------------------------------------------------
# What it holds
# --------------------------------------------------------------------------------------


def require_count(
    path: Path, header: Common, spec: VoVNetSpec, tensors: Mapping[str, Tensor], last: int
) -> None:
    """Refuse what is said to have more layers than there are tensors, before they are counted one
    by one: a file may say that there are as many as it likes.

    Args:
        path: the file.
        header: what it says.
        spec: the architecture.
        tensors: what it holds.
        last: the last stage of which there are tensors; 1 for the stem.
    """
    first = tensors.get("weight_0")
    blocks = spec.blocks_per_stage[: last - FIRST_STAGE + 1]
    least = sum(blocks) * (spec.layers_per_block + 1)
    if first is None or first.ndim != 4 or least >= len(tensors):
        shape = "none" if first is None else list(first.shape)
        what = f"there are {len(tensors)} tensors, of which weight_0 is {shape}: more were expected"
        raise other_network(path, header, spec, what)


def other_network(path: Path, header: Common, spec: VoVNetSpec, why: str) -> CheckpointError:
    """The error of a file that does not hold what it says."""
    return CheckpointError(
        f"{path} does not hold {spec.name} in {header.dtype}, as its header says: {why}. Save the "
        "network again, or fetch the file again"
    )


def difference(expected: Expected, tensors: Mapping[str, Tensor]) -> str:
    """What is wrong with the names, shapes and dtypes of tensors, or nothing."""
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return listed(
        {
            "missing": [name for name in expected if name not in found],
            "without a place": [name for name in found if name not in expected],
            "that differ": [
                f"{name} is {list(found[name][0])} in {found[name][1]}, expected {list(shape)} in "
                f"{dtype}"
                for name, (shape, dtype) in expected.items()
                if found.get(name, (shape, dtype)) != (shape, dtype)
            ],
        }
    )


def listed(groups: Mapping[str, list[str]]) -> str:
    """Names of tensors by what is wrong with them, the first four of each."""
    return ". ".join(
        f"{len(names)} tensors {what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for what, names in groups.items()
        if names
    )
