"""Reading files of tensors by key, without running code from them.

Pickles are read with ``weights_only=True``, and unknown classes in them (a trainer's log
buffers, say) become inert placeholders.
"""

from __future__ import annotations

import os
import pickle
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..network.filling import CheckpointError

StateDict = Mapping[str, Any]

_WRAPPERS = ("state_dict", "model")
_DEEPEST = 16


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


def read(source: str | os.PathLike[str]) -> StateDict:
    """Read a checkpoint's state dict on the CPU, without running code from it.

    Args:
        source: a ``.safetensors`` file, a file written by ``torch.save``, or an
            http(s) address of one, which is kept in torch.hub's cache.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a checkpoint, or it asks for blocked modules.
    """
    scheme = urllib.parse.urlparse(str(source)).scheme
    if scheme in ("http", "https"):
        path = _download(str(source))
    elif len(scheme) > 1:  # One letter is a Windows drive.
        raise CheckpointError(
            f"cannot read {str(source)!r}: only files and http(s) addresses are understood. "
            "Download the file first"
        )
    else:
        path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return unwrap(load_file(path))
        return unwrap(_load_pickle(path))
    except CheckpointError:
        raise
    except Exception as error:  # Damaged files raise almost anything.
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError:  # A file of before torch 1.6.
            raise CheckpointError(
                f"{path} holds more than weights ({error}). Load it once where it was written, "
                "and save its state_dict alone"
            ) from error
        with torch.serialization.safe_globals([(_Inert, name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True)


def _download(url: str) -> Path:
    name = os.path.basename(urllib.parse.urlparse(url).path)
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
    return path
