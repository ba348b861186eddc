"""Writing files of tensors by key: each tensor's own elements, one tensor after another."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from .._files import replacing
from ..network.filling import CheckpointError, require_names, why_not_plain

SAFETENSORS = ".safetensors"

ALIGNMENT = 64
"""Bytes at a multiple of which PyTorch begins tensors on a CPU: where a window on a file begins
elsewhere, libraries add in another order, and the last bits of what they compute differ."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the dtypes that every release of it reads."""


def write(state_dict: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a state dict; an interrupted write leaves what was there before.

    Of a view its own elements are written, and nothing else of the memory that it lies in.
    Tensors that are the same stay so in a file of ``torch.save``, and are written twice in
    ``.safetensors``, which has no word for it. Nothing is copied but what lies strided, and on
    another device: for ``.safetensors`` a tensor at a time.

    Args:
        state_dict: tensors by key.
        path: ``.safetensors`` writes that format, anything else ``torch.save``'s. A file that is
            there hands on its mode.

    Raises:
        CheckpointError: a key is no string; a value is no plain tensor with values, or of a
            dtype that the format has no word for.
        FileNotFoundError: the folder does not exist.
        OSError: the disk is full, or may not be written.
    """
    path = Path(path)
    if path.suffix == SAFETENSORS:
        write_safetensors(state_dict, path)
        return
    _require_writable(state_dict, safe=False)
    with _in_place_of(path) as file:
        torch.save(_own_elements(state_dict), file)


def write_safetensors(
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """As :func:`write`, in that format whatever the file is called.

    Args:
        state_dict: tensors by key.
        path: where to.
        metadata: what the file is to say beside them, by name.
    """
    _require_writable(state_dict, safe=True)
    with _in_place_of(Path(path)) as file:
        _write_safetensors(state_dict, file, metadata or {})


@contextlib.contextmanager
def _in_place_of(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of ``path`` if that went well."""
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            yield file
    except Exception as error:  # torch.save reports a full disk as it finds its file too short.
        reason = _system_error(error)
        if reason is None:
            raise
        raise OSError(
            reason.errno, f"cannot write: {reason.strerror}; what was there is as it was", str(path)
        ) from error


def _require_writable(state_dict: Mapping[str, Tensor], safe: bool) -> None:
    require_names(state_dict)
    for key, value in state_dict.items():
        reason = why_not_plain(value)
        if reason is None and value.is_meta:
            reason = "is on the meta device and has no values to write: fill the model first"
        if reason is None and type(value) not in (Tensor, nn.Parameter):
            reason = (
                f"is a {type(value).__name__}, expected a torch.Tensor: what reads the file may "
                "not know that class. Make it a plain tensor first"
            )
        if reason is None and safe and value.dtype not in _NAMES:
            reason = f"is {value.dtype}, for which {SAFETENSORS} has no word: write a .pth file"
        if reason is None and safe and key == "__metadata__":
            reason = f"has a name that {SAFETENSORS} keeps for itself: rename it, or write a .pth"
        if reason is not None:
            raise CheckpointError(f"cannot write {key!r}: it {reason}")


def _system_error(error: BaseException | None) -> OSError | None:
    """What the system said, if that is what an error comes from."""
    while error is not None and not (isinstance(error, OSError) and error.errno is not None):
        error = error.__cause__ or error.__context__
    return error


def _own_elements(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values in storages that hold nothing else.

    ``torch.save`` writes whole storages: of a view, all that was ever beside it.
    """
    known: dict[Any, Tensor] = {}
    own = {}
    for key, value in state_dict.items():
        value = value.detach()
        same = (
            value.untyped_storage()._cdata, value.dtype, value.storage_offset(), value.shape,
            value.stride(), value.is_conj(), value.is_neg(),
        )  # fmt: skip
        if same not in known:
            known[same] = _in_own_storage(value)
        own[key] = known[same]
    return own


def _in_own_storage(value: Tensor) -> Tensor:
    value = value.resolve_conj().resolve_neg()
    storage, size = value.untyped_storage(), value.numel() * value.element_size()
    if storage.nbytes() == size:
        return value
    if value.device.type != "cpu" or not _is_dense(value):
        return value.clone(memory_format=torch.contiguous_format)
    begin = value.storage_offset() * value.element_size()
    # A window on the same memory: what is large should not be there twice.
    window = storage[begin : begin + size]
    return torch.empty(0, dtype=value.dtype, device="cpu").set_(
        window, 0, value.shape, value.stride()
    )


def _is_dense(value: Tensor) -> bool:
    """Whether the elements lie side by side, in whatever order."""
    expected = 1
    for stride, size in sorted((value.stride(i), value.shape[i]) for i in range(value.ndim)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return value.numel() > 0


def _order(value: Tensor) -> tuple[bool, int]:
    return value.numel() * value.element_size() % ALIGNMENT != 0, -value.element_size()


def _write_safetensors(
    state_dict: Mapping[str, Tensor], file: IO[bytes], metadata: Mapping[str, str]
) -> None:
    """As https://huggingface.co/docs/safetensors#format says.

    The library's own writer makes a new file, of a mode of its own, and wants all tensors
    contiguous at once.
    """
    # What ends at a multiple of ALIGNMENT first, and then the widest: as many as can then begin at
    # such a multiple, and each begins at one of its element's size. The format allows no gaps.
    keys = sorted(state_dict, key=lambda key: _order(state_dict[key]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for key in keys:
        value = state_dict[key]
        begin, end = end, end + value.numel() * value.element_size()
        header[key] = {
            "dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for key in keys:
        value = state_dict[key].detach().cpu().resolve_conj().resolve_neg()
        file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
