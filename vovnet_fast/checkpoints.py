"""Read, check, rename and write VoVNet checkpoints of every published key layout.

Key layouts, for the first layer of the second stage:

=============================  =================================================
``native`` and ``detectron2``  ``stage2.OSA2_1.layers.0.OSA2_1_0/conv.weight``
``timm``                       ``stages.0.blocks.0.conv_mid.0.conv.weight``
``seed`` (mmdet 1.2 port)      ``model.OSA_2.OSA2_1.layers.0.0.weight``
=============================  =================================================

``native`` and ``detectron2`` share their keys and differ in what they promise:
``native`` is the layout of this package's own modules, of any dialect;
``detectron2`` is a file that vovnet-detectron2, PETR and their relatives run as
the same function. Converting refuses where no such function exists.

Nothing here executes code from a file: pickles are read with
``weights_only=True``, and unknown classes in them (a trainer's log buffers, say)
become inert placeholders.
"""

from __future__ import annotations

import functools
import os
import pickle
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import specs
from ._files import replacing
from .network.model import VoVNet
from .specs import Dialect, VoVNetSpec

Layout = Literal["native", "detectron2", "timm", "seed"]
LAYOUTS: tuple[Layout, ...] = ("native", "detectron2", "timm", "seed")

StateDict = Mapping[str, Any]

_WRAPPERS = ("state_dict", "model")
_SEED_ROOT = "model."
_FOREIGN: tuple[Dialect, ...] = ("timm", "seed")
_COUNTER = "num_batches_tracked"  # A step count, no weight; frozen norms do not have it.


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the architecture."""


@dataclass(frozen=True)
class Report:
    """What was found in a checkpoint.

    Attributes:
        spec: canonical name of the architecture.
        layout: key layout of the source.
        prefix: what stood before every backbone key, e.g. ``module.backbone.``.
        tensors: number of tensors taken.
        parameters: number of scalar values in them, counters left out.
        ignored: keys of the source that belong to no backbone (heads, necks).
    """

    spec: str
    layout: Layout
    prefix: str
    tensors: int
    parameters: int
    ignored: tuple[str, ...]


# --------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------


def _layer_names(
    native: str, timm: str, seed: str, index: int, separable: bool
) -> Iterator[tuple[str, str, str]]:
    """Names of one layer's convolution(s) and norm in (native, timm, seed)."""
    if separable:
        yield f"{native}/dw_conv3x3", f"{timm}.conv_dw", f"{seed}.{index}"
        yield f"{native}/pw_conv1x1", f"{timm}.conv_pw", f"{seed}.{index + 1}"
        yield f"{native}/pw_norm", f"{timm}.bn", f"{seed}.{index + 2}"
    else:
        yield f"{native}/conv", f"{timm}.conv", f"{seed}.{index}"
        yield f"{native}/norm", f"{timm}.bn", f"{seed}.{index + 1}"


def _module_names(spec: VoVNetSpec) -> Iterator[tuple[str, str, str]]:
    """Names of every module with parameters in (native, timm, seed)."""
    index = 0  # The seed's stem is one flat Sequential, its ReLUs counted.
    for i in range(3):
        separable = spec.depthwise and i > 0
        yield from _layer_names(f"stem.stem_{i + 1}", f"stem.{i}", "stem", index, separable)
        index += 4 if separable else 3
    for block in spec.blocks():
        native = f"stage{block.stage}.{block.name}"
        timm = f"stages.{block.stage - specs.FIRST_STAGE}.blocks.{block.index - 1}"
        seed = f"OSA_{block.stage}.{block.name}"
        if block.reduction:
            yield from _layer_names(
                f"{native}.conv_reduction.{block.name}_reduction_0",
                f"{timm}.conv_reduction",
                f"{seed}.conv_reduction",
                0,
                False,
            )
        for i in range(block.num_layers):
            yield from _layer_names(
                f"{native}.layers.{i}.{block.name}_{i}",
                f"{timm}.conv_mid.{i}",
                f"{seed}.layers.{i}",
                0,
                block.depthwise,
            )
        yield from _layer_names(
            f"{native}.concat.{block.name}_concat",
            f"{timm}.conv_concat",
            f"{seed}.concat",
            0,
            False,
        )
        if block.ese:
            yield f"{native}.ese.fc", f"{timm}.attn.fc", f"{seed}.ese.fc"


def _column(layout: Layout) -> int:
    return {"native": 0, "detectron2": 0, "timm": 1, "seed": 2}[layout]


_ANCHORS: dict[Layout, str] = {
    "native": "stem.stem_1/conv.weight",
    "timm": "stem.0.conv.weight",
    "seed": "stem.0.weight",
}
_ROOTS: dict[Layout, tuple[str, ...]] = {
    "native": ("stem.", "stage2.", "stage3.", "stage4.", "stage5."),
    "timm": ("stem.", "stages."),
    "seed": ("stem.", "OSA_"),
}


def _locate(state_dict: StateDict, layout: Layout | None, prefix: str | None) -> tuple[Layout, str]:
    """Find the layout and the prefix of the one backbone in ``state_dict``."""
    if layout == "detectron2":
        layout = "native"
    found = []
    for candidate, anchor in _ANCHORS.items():
        if layout not in (None, candidate):
            continue
        for key in state_dict:
            if key == anchor or key.endswith("." + anchor):
                found.append((candidate, key[: -len(anchor)]))
    if prefix is not None:
        asked = prefix if not prefix or prefix.endswith(".") else prefix + "."
        # The seed's own keys begin with "model.", which is no prefix to its users.
        found = [f for f in found if f[1] in (asked, asked + _SEED_ROOT)]
    if not found:
        some = ", ".join(repr(key) for key in list(state_dict)[:4]) or "nothing"
        where = f" under the prefix {prefix!r}" if prefix else ""
        raise CheckpointError(
            f"no VoVNet backbone found{where}: a key that ends in one of "
            + ", ".join(repr(a) for name, a in _ANCHORS.items() if layout is None or name == layout)
            + f" was expected, the checkpoint holds {some}"
        )
    if len(found) > 1:
        raise CheckpointError(
            "the checkpoint holds more than one backbone; choose one with prefix=: "
            + ", ".join(f"{p!r} ({name})" for name, p in found)
        )
    return found[0]


# --------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _expected_shapes(spec: VoVNetSpec, input_ch: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = VoVNet(spec, input_ch=input_ch)
    return {key: value.shape for key, value in model.state_dict().items()}


def _take(
    state_dict: StateDict, spec: VoVNetSpec, layout: Layout | None, prefix: str | None
) -> tuple[dict[str, Tensor], list[str], Report]:
    """Rename a source's backbone to native keys.

    Returns:
        the tensors by native key, the source's keys that look like a backbone's
        but have no place in ``spec``, and the report.
    """
    layout, prefix = _locate(state_dict, layout, prefix)
    column = _column(layout)
    rename = {names[column]: names[0] for names in _module_names(spec)}
    taken: dict[str, Tensor] = {}
    surplus, ignored = [], []
    for key, value in state_dict.items():
        module, _, leaf = key.removeprefix(prefix).rpartition(".")
        if key.startswith(prefix) and module in rename:
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{key!r} is no tensor but {type(value).__name__}: the file was not written "
                    "by torch.save of a state dict"
                )
            taken[f"{rename[module]}.{leaf}"] = value
        elif key.startswith(tuple(prefix + root for root in _ROOTS[layout])):
            surplus.append(key)
        else:
            ignored.append(key)
    report = Report(
        spec=spec.name,
        layout=layout,
        prefix=prefix,
        tensors=len(taken),
        parameters=sum(v.numel() for k, v in taken.items() if not k.endswith(_COUNTER)),
        ignored=tuple(ignored),
    )
    return taken, surplus, report


def _check(
    taken: Mapping[str, Tensor],
    surplus: list[str],
    expected: Mapping[str, torch.Size],
    report: Report,
    state_dict: StateDict,
) -> None:
    """Raise unless the tensors fill the architecture exactly, with finite values."""
    missing = [k for k in expected if k not in taken and not k.endswith(_COUNTER)]
    unexpected = surplus + [k for k in taken if k not in expected and not k.endswith(_COUNTER)]
    shapes = [
        f"{k} is {list(taken[k].shape)}, expected {list(shape)}"
        for k, shape in expected.items()
        if k in taken and taken[k].shape != shape
    ]
    problems = [
        f"{len(items)} {what}: {', '.join(items[:4])}{', ...' if len(items) > 4 else ''}"
        for what, items in (
            ("parameters left unfilled", missing),
            ("keys without a place", unexpected),
            ("shapes differ", shapes),
        )
        if items
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint ({report.layout} keys, prefix {report.prefix!r}) does not fit "
            f"{report.spec}. " + ". ".join(problems) + f". {_hint(state_dict, report)}"
        )
    bad = [k for k, v in taken.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{len(bad)} tensors of the checkpoint hold NaN or Inf, first {bad[0]}: it was "
            "written after a diverged training or is damaged"
        )


def _hint(state_dict: StateDict, report: Report) -> str:
    fitting = identify(state_dict, layout=report.layout, prefix=report.prefix)
    if fitting:
        return "It fits " + " and ".join(fitting)
    return "It fits none of the published architectures"


def _refuse_other_function(spec: VoVNetSpec, dialect: Dialect, what: str) -> None:
    reasons = specs.differences(spec, dialect)
    if reasons:
        raise CheckpointError(
            f"{what}: the two do not compute the same function. "
            + "; ".join(reasons[:6])
            + ("; ..." if len(reasons) > 6 else "")
            + f". Use the {dialect} dialect's own architecture: {', '.join(specs.names(dialect))}"
        )


# --------------------------------------------------------------------------------------
# The public face
# --------------------------------------------------------------------------------------


def identify(
    state_dict: StateDict, *, layout: Layout | None = None, prefix: str | None = None
) -> list[str]:
    """Names of the published architectures that a checkpoint fits exactly.

    Several fit where dialects agree (``V-19-slim-eSE`` and
    ``ese_vovnet19b_slim`` are one function); those of the layout's own dialect
    come first.

    Args:
        state_dict: tensors by key, wrapped or not, of any layout.
        layout: the key layout, recognised by default.
        prefix: what stands before the backbone's keys, found by default.

    Raises:
        CheckpointError: no backbone, or several.
    """
    state_dict = _unwrap(state_dict)
    layout, prefix = _locate(state_dict, layout, prefix)
    first = state_dict[prefix + _ANCHORS[layout]]
    if not isinstance(first, Tensor) or first.ndim != 4:
        return []
    fitting = []
    for spec in specs.SPECS.values():
        if layout in _FOREIGN and specs.differences(spec, layout):
            continue
        taken, surplus, _ = _take(state_dict, spec, layout, prefix)
        expected = {
            k: v for k, v in _expected_shapes(spec, first.shape[1]).items() if k[-7:] != "tracked"
        }
        have = {k: v.shape for k, v in taken.items() if not k.endswith(_COUNTER)}
        if have == expected and not surplus:
            fitting.append(spec)
    own = "detectron2" if layout == "native" else layout
    return [s.name for s in sorted(fitting, key=lambda s: s.dialect != own)]


def load(
    model: VoVNet,
    source: str | os.PathLike[str] | StateDict,
    *,
    layout: Layout | None = None,
    prefix: str | None = None,
) -> Report:
    """Fill a model from a checkpoint of any layout, completely or not at all.

    Args:
        model: the backbone. Its parameters are written only if everything fits.
        source: a file (``.pth``, ``.pt``, ``.bin``, ``.safetensors``), an http(s)
            address, or a state dict, bare or inside ``state_dict`` or ``model``.
        layout: ``native``, ``detectron2``, ``timm`` or ``seed``; recognised by
            default.
        prefix: what stands before the backbone's keys, e.g. ``img_backbone.``;
            found by default.

    Returns:
        what was found.

    Raises:
        CheckpointError: the file cannot be read; it holds no backbone, or
            several; a parameter is left unfilled, a key has no place, a shape
            differs (the first few are named, and the architectures that would
            fit); a value is not finite; the layout's dialect computes another
            function than the model.
        FileNotFoundError: there is no such file.
    """
    if not isinstance(model, VoVNet):
        raise TypeError(f"model must be a vovnet_fast.VoVNet, got {type(model).__name__}")
    state_dict = _unwrap(source if isinstance(source, Mapping) else read(source))
    found_layout, found_prefix = _locate(state_dict, layout, prefix)
    if found_layout in _FOREIGN:
        _refuse_other_function(
            model.spec, found_layout, f"{model.spec.name} cannot load a {found_layout} checkpoint"
        )
    taken, surplus, report = _take(state_dict, model.spec, found_layout, found_prefix)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    _check(taken, surplus, expected, report, state_dict)
    # Keep the model's own counters where the file has none, and drop the file's
    # where the model has none (frozen norms).
    own = {k: v for k, v in model.state_dict().items() if k.endswith(_COUNTER)}
    model.load_state_dict({**own, **{k: v for k, v in taken.items() if k in expected}})
    return report


def convert(
    state_dict: StateDict,
    spec_name: str | VoVNetSpec,
    to: Layout = "native",
    *,
    layout: Layout | None = None,
    prefix: str | None = None,
    add_prefix: str = "",
) -> dict[str, Tensor]:
    """Rename a checkpoint's backbone to another layout. Tensors are not copied.

    Args:
        state_dict: tensors by key, of any layout, bare or wrapped.
        spec_name: the architecture that the checkpoint holds.
        to: the layout to write. ``native`` is always possible; ``detectron2``,
            ``timm`` and ``seed`` only where that code base computes the same
            function: detectron2 and timm place eSE differently in stages of
            several blocks, the seed differs in stem, pool, gate and biases.
        layout: the source's layout, recognised by default.
        prefix: what stands before the source's backbone keys, found by default.
        add_prefix: is put before every key that is returned.

    Returns:
        tensors by key, in network order; heads and necks are left out.

    Raises:
        CheckpointError: as :func:`load`, or there is no such function.
        UnknownSpecError: no architecture has that name.
    """
    return convert_with_report(
        state_dict, spec_name, to, layout=layout, prefix=prefix, add_prefix=add_prefix
    )[0]


def convert_with_report(
    state_dict: StateDict,
    spec_name: str | VoVNetSpec,
    to: Layout = "native",
    *,
    layout: Layout | None = None,
    prefix: str | None = None,
    add_prefix: str = "",
) -> tuple[dict[str, Tensor], Report]:
    """:func:`convert`, and what was found in the source."""
    spec = specs.get(spec_name)
    for name, value in (("to", to), ("layout", layout)):
        if value is not None and value not in LAYOUTS:
            raise ValueError(f"{name} must be one of {', '.join(LAYOUTS)}, got {value!r}")
    state_dict = _unwrap(state_dict)
    layout, prefix = _locate(state_dict, layout, prefix)
    if layout in _FOREIGN:
        _refuse_other_function(spec, layout, f"a {layout} checkpoint cannot be read as {spec.name}")
    if to != "native":
        _refuse_other_function(spec, to, f"{spec.name} cannot be written for {to}")
    taken, surplus, report = _take(state_dict, spec, layout, prefix)
    anchor = taken.get(_ANCHORS["native"])
    input_ch = anchor.shape[1] if anchor is not None and anchor.ndim == 4 else 3
    expected = _expected_shapes(spec, input_ch)
    _check(taken, surplus, expected, report, state_dict)
    column = _column(to)
    rename = {names[0]: names[column] for names in _module_names(spec)}
    root = add_prefix + (_SEED_ROOT if to == "seed" else "")
    converted = {}
    for key in expected:
        if key in taken:
            module, _, leaf = key.rpartition(".")
            converted[f"{root}{rename[module]}.{leaf}"] = taken[key]
    return converted, report


# --------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------


class _Inert:
    """Stands in for any class that a file names and that weights do not need."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _unwrap(state_dict: Any) -> StateDict:
    """Descend to the mapping of tensors by key."""
    while isinstance(state_dict, Mapping):
        inner = [state_dict[k] for k in _WRAPPERS if isinstance(state_dict.get(k), Mapping)]
        if not inner:
            return state_dict
        state_dict = inner[0]
    raise CheckpointError(
        f"the checkpoint must be a mapping of tensors by key, got {type(state_dict).__name__}"
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

            return _unwrap(load_file(path))
        return _unwrap(_load_pickle(path))
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


def write(state_dict: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a state dict; an interrupted write leaves what was there before.

    Args:
        state_dict: tensors by key.
        path: ``.safetensors`` writes that format, anything else ``torch.save``'s.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({k: v.contiguous() for k, v in state_dict.items()}, temporary)
        else:
            torch.save(dict(state_dict), temporary)
