"""Reading files of tensors by key, without running code from them.

Files of ``torch.save`` are read with ``weights_only=True``, and unknown classes in them (a
trainer's log buffers, say) become inert placeholders; pickles of NumPy arrays are not unpickled.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..network.filling import CheckpointError
from . import arrays, downloads

StateDict = Mapping[str, Any]

_WRAPPERS = ("state_dict", "model")
_DEEPEST = 16
_ZIP = b"PK\x03\x04"

_inert_lock = threading.Lock()


class _Inert:
    """Stands in for any class that a file names and that weights do not need."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def unwrap(state_dict: Any) -> StateDict:
    """Descend to the mapping of tensors by key."""
    for _ in range(_DEEPEST):
        if not isinstance(state_dict, Mapping):
            raise CheckpointError(
                "the checkpoint must be a mapping of tensors by key, got "
                f"{type(state_dict).__name__}"
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
            replace it, as :func:`~vovnet_fast.checkpoints.write` does. Files of before PyTorch
            1.6 and pickles of arrays are read whole.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a checkpoint, or it asks for blocked modules; an address
            cannot be downloaded.
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
    return _content(_existing(source), True)


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
    return unwrap(_content(path, mmap))


def _content(path: Path, mmap: bool) -> Any:
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path, mmap)
        return _load_pickle(path, mmap)
    except CheckpointError:
        raise
    except Exception as error:  # Damaged files raise almost anything.
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _load_safetensors(path: Path, mmap: bool) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = ((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
        return {key: tensor if mmap else tensor.clone() for key, tensor in tensors}


def _load_pickle(path: Path, mmap: bool) -> Any:
    with open(path, "rb") as file:
        head = file.read(64)
    if arrays.is_pickle(head):
        return arrays.load(path)
    mmap = mmap and head.startswith(_ZIP)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError:  # A file of before torch 1.6.
            raise CheckpointError(
                f"{path} holds more than weights ({error}). Load it once where it was written, "
                "and save its state_dict alone"
            ) from error
        with _inert(unknown):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


@contextlib.contextmanager
def _inert(names: Iterable[str]) -> Iterator[None]:
    """Let placeholders stand in for classes, in one thread at a time.

    PyTorch keeps one list for all threads, and its own context manager puts back at its end what
    there was at its beginning: two that overlap take each other's names away, and what others
    added meanwhile.
    """
    ours: list[Any] = [(_Inert, name) for name in names]
    with _inert_lock:
        torch.serialization.add_safe_globals(ours)
        try:
            yield
        finally:
            others = [g for g in torch.serialization.get_safe_globals() if g not in ours]
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)
