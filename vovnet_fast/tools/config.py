"""A training config: whether what stands around the backbone goes together with it.

A detector builds its backbone and its neck apart from each other, and fills both from a file that
it hands on part by part: only in the config are they seen together.
"""

from __future__ import annotations

import os
import re
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import checkpoints
from ..checkpoints import CheckpointError
from ..checkpoints.files import read_whole
from ..integrations.quantized import VoVNetFastQuantized
from ..integrations.whole import Guarded, refuse_others, refuse_partial_load
from ..network.model import VoVNet
from ..specs import UnknownSpecError

_TYPES = ("VoVNetFast", "VoVNetFastQuantized")
_NOT_OURS = ("type", "init_cfg", "pretrained", "_delete_", "_scope_")


class Finding(NamedTuple):
    """Something found out about a config.

    Attributes:
        name: what was looked at, such as ``model.img_neck``.
        value: what it is, in words.
        wrong: whether it does not go together; the words then say what to write.
    """

    name: str
    value: str
    wrong: bool = False


def examine(path: str | os.PathLike[str]) -> list[Finding]:
    """Look at every backbone of type ``VoVNetFast`` or ``VoVNetFastQuantized``, its neck, and the
    files that fill it.

    Args:
        path: a config of mmengine's or mmcv 1.x's. It is Python, and run as these run it; what it
            imports by ``custom_imports`` is not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or has no such backbone.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config at {path}")
    config = _load(path)
    found = [
        finding
        for where, holder, key in _backbones(config)
        for finding in _look(config, where, holder, key)
    ]
    if not found:
        raise ValueError(f"{path} has no dict of type VoVNetFast: there is nothing to look at")
    return found


def _load(path: str | os.PathLike[str]) -> Any:
    try:
        try:
            from mmengine.config import Config
        except ImportError:
            from mmcv import Config
        return Config.fromfile(str(path), import_custom_modules=False)
    except Exception as error:
        raise ValueError(f"cannot read the config {path}: {error}") from error


def _backbones(config: Any, where: str = "") -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """The name of each, what holds it, and under which key."""
    items = config.items() if isinstance(config, Mapping) or hasattr(config, "items") else ()
    for key, value in items:
        if not isinstance(value, Mapping):
            continue
        if _type(value) in _TYPES:
            yield where + key, config, key
        else:
            yield from _backbones(value, f"{where}{key}.")


def _type(section: Mapping[str, Any]) -> Any:
    kind = section.get("type")
    return getattr(kind, "__name__", kind)  # Lazy configs hold the class.


def _look(config: Any, where: str, holder: Mapping[str, Any], key: str) -> Iterator[Finding]:
    section = holder[key]
    options = {name: value for name, value in section.items() if name not in _NOT_OURS}
    backbone: Guarded | VoVNetFastQuantized
    try:
        if _type(section) == "VoVNetFastQuantized":
            backbone = VoVNetFastQuantized(**options)
        else:
            refuse_others(options)
            with torch.device("meta"):
                backbone = Guarded(**options)
    except (UnknownSpecError, ValueError, TypeError, OSError, RuntimeError) as error:
        yield Finding(where, str(error), wrong=True)
        return
    channels = list(backbone.feature_channels)
    strides = ", ".join(map(str, backbone.feature_strides))
    names = ", ".join(backbone.out_features)
    yield Finding(where, f"{backbone.spec.name}: {names} of strides {strides}, {channels} channels")
    yield from _neck(where, holder, key, channels)
    if isinstance(backbone, Guarded):
        yield from _init(where, section, backbone)
    prefix = f"{key}."  # Detectors are built from "model", whose parts have their keys' names.
    for name in ("load_from", "resume_from"):
        if where == f"model.{key}" and config.get(name):
            yield _whole(name, config[name], backbone, prefix)


def _neck(
    where: str, holder: Mapping[str, Any], key: str, channels: list[int]
) -> Iterator[Finding]:
    name = key.replace("backbone", "neck")
    neck = holder.get(name) if name != key else None
    if isinstance(neck, (list, tuple)):  # One after another.
        neck = neck[0]
    if not isinstance(neck, Mapping) or "in_channels" not in neck:
        return
    wanted = neck["in_channels"]
    name = where[: -len(key)] + name
    wanted = list(wanted) if isinstance(wanted, (list, tuple)) else wanted
    if wanted in (channels, channels[-1]):
        yield Finding(name, f"in_channels={wanted}, which are the backbone's")
    else:
        write = channels if isinstance(wanted, list) else channels[-1]
        yield Finding(
            name,
            f"in_channels={wanted} are those of another backbone: write in_channels={write}, or "
            "choose other features with the backbone's out_features",
            wrong=True,
        )


def _init(where: str, section: Mapping[str, Any], backbone: Guarded) -> Iterator[Finding]:
    """The backbone's own initialisation, which says whether noise would be meant."""
    cfgs = section.get("init_cfg") or []
    cfgs = [cfgs] if isinstance(cfgs, Mapping) else list(cfgs)
    backbone.filled = bool(cfgs or section.get("pretrained"))
    files = [(c["checkpoint"], c.get("prefix")) for c in cfgs if "checkpoint" in c]
    if section.get("pretrained"):
        files.append((section["pretrained"], None))
    for file, prefix in files:
        name = f"{where}.init_cfg"
        state = _state(name, file)
        if isinstance(state, Finding):
            yield state
            continue
        try:
            filled = VoVNet(backbone.spec, backbone.input_ch)
            report = checkpoints.load(filled, state, prefix=prefix)
        except CheckpointError as error:
            yield Finding(name, f"{file}: {error}", wrong=True)
        else:
            others = f", and leaves {len(report.ignored)} other tensors of the file"
            yield Finding(name, f"{file} fills all {report.tensors} tensors{others}")


def _whole(name: str, file: str, backbone: Guarded | VoVNetFastQuantized, prefix: str) -> Finding:
    """A file for the whole detector."""
    state = _state(name, file)
    if isinstance(state, Finding):
        return state
    raw = state.get("state_dict", state)  # All that mmengine and mmcv unwrap.
    state = {re.sub(r"^module\.", "", k): v for k, v in raw.items() if isinstance(k, str)}
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            if isinstance(backbone, VoVNetFastQuantized):
                backbone.require_same(state, prefix)
                return Finding(name, f"{file}: its backbone is the one that was quantised")
            refuse_partial_load(backbone, state, prefix)
    except CheckpointError as error:
        return Finding(name, f"{file}: {error}", wrong=True)
    ours = sum(key.startswith(prefix) for key in state)
    told = [str(warning.message) for warning in warned]
    filled = f"{ours} tensors are the backbone's, which fill all of it, {len(state) - ours} others"
    return Finding(name, f"{file}: {told[0] if told else filled}")


def _state(name: str, file: str) -> Any:
    """What a file holds, or why that cannot be seen."""
    if len(urllib.parse.urlparse(str(file)).scheme) > 1:
        return Finding(name, f"{file} is an address, and was not looked at")
    try:
        content = read_whole(file)
    except (CheckpointError, OSError) as error:
        return Finding(name, str(error), wrong=True)
    if not isinstance(content, Mapping):
        return Finding(name, f"{file} holds no tensors by name", wrong=True)
    return content
