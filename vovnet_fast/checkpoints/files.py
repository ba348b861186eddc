"""Reading files of tensors by key, without running code from them.

No pickle is unpickled, neither of ``torch.save`` nor of NumPy arrays: see :mod:`.pickles`.
"""

from __future__ import annotations

import contextlib
import os
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..network.filling import CheckpointError
from . import archives, arrays, downloads
from .tensors import Inert

StateDict = Mapping[str, Any]

_WRAPPERS = ("state_dict", "model")
_DEEPEST = 16


def unwrap(state_dict: Any) -> StateDict:
    """Descend to the mapping of tensors by key."""
    for _ in range(_DEEPEST):
        if not isinstance(state_dict, Mapping):
            raise CheckpointError(
                "the checkpoint must be a mapping of tensors by key, got "
                f"{state_dict if isinstance(state_dict, Inert) else type(state_dict).__name__}"
            )
        inner = [state_dict[k] for k in _WRAPPERS if isinstance(state_dict.get(k), Mapping)]
        if not inner:
            return state_dict
        state_dict = inner[0]
    raise CheckpointError(
        f"the checkpoint is wrapped in {' or '.join(map(repr, _WRAPPERS))} more than {_DEEPEST} "
        "times, or holds itself: a mapping of tensors by key was expected. Give the one inside"
    )


def read(source: str | os.PathLike[str], *, mmap: bool = False) -> StateDict:
    """Read a checkpoint's state dict on the CPU, without running code from it.

    Args:
        source: a ``.safetensors`` file, a file written by ``torch.save``, a pickle of NumPy
            arrays by key, as detectron2's ``.pkl`` files are, or an http(s) address of one, which
            is kept in torch.hub's cache. What is kept and cannot be read is downloaded again.
        mmap: tensors are windows on the file, of which only what is used is ever in memory;
            changing them does not change it. The file must not be written to while they live:
            replace it, as :func:`~vovnet_fast.checkpoints.write` does. What is not as this machine
            has it in memory is read: files of before PyTorch 1.6, or of another byte order, and
            pickles of arrays.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a checkpoint, or it names something that is there to do harm
            (``os.system``); an address cannot be downloaded.
    """
    scheme = urllib.parse.urlparse(str(source)).scheme
    if scheme in ("http", "https"):
        return _read_address(str(source), mmap)
    if len(scheme) > 1:  # One letter is a Windows drive.
        raise CheckpointError(
            f"cannot read {str(source)!r}: only files and http(s) addresses are understood. "
            "Download the file first"
        )
    return _read_file(_existing(source), mmap)


def read_whole(source: str | os.PathLike[str]) -> Any:
    """What a file holds, wrappers and all, on the CPU; as :func:`read` with ``mmap``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read.
    """
    return _part(_existing(source), True, lambda content: content)


def _existing(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}: it is no file, but a folder, pipe or device")
    return path


def _read_address(url: str, mmap: bool) -> StateDict:
    path = downloads.kept_at(url)
    if path.is_file():
        with contextlib.suppress(CheckpointError):  # Cut, or some proxy's page.
            return _read_file(path, mmap)
    path = downloads.download(url)
    try:
        return _read_file(path, mmap)
    except CheckpointError as error:
        downloads.forget(path)
        raise CheckpointError(f"what {url} sends is no checkpoint: {error}") from error


def _read_file(path: Path, mmap: bool) -> StateDict:
    found: StateDict = _part(path, mmap, unwrap)
    return found


def _part(path: Path, mmap: bool, part: Callable[[Any], Any]) -> Any:
    try:
        if path.suffix == ".safetensors":
            return part(_load_safetensors(path, mmap))
        return _load_pickle(path, mmap, part)
    except CheckpointError:
        raise
    except Exception as error:  # Damaged files raise almost anything.
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _load_safetensors(path: Path, mmap: bool) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = ((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
        return {key: tensor if mmap else tensor.clone() for key, tensor in tensors}


def _load_pickle(path: Path, mmap: bool, part: Callable[[Any], Any]) -> Any:
    with open(path, "rb") as file:
        head = file.read(64)
    if arrays.is_pickle(head):
        return part(arrays.load(path))
    return archives.load(path, mmap=mmap, part=part)
