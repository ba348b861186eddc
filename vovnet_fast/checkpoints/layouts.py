"""What every module is called in every published key layout, and which one a checkpoint has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from .. import specs
from ..network.filling import CheckpointError, require_names
from ..specs import Dialect, VoVNetSpec
from .files import StateDict

Layout = Literal["native", "detectron2", "timm", "seed", "torchhub", "pytorchcv"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

SEED_ROOT = "model."

DIALECTS: dict[Layout, Dialect] = {
    "detectron2": "detectron2",
    "timm": "timm",
    "seed": "seed",
    "torchhub": "torchhub",
    "pytorchcv": "torchhub",
}
"""Whose function the files of a layout are. ``native`` ones are of any dialect."""

HEADS: dict[str, Layout] = {"classifier.weight": "torchhub", "head.fc.weight": "timm"}
"""Classifiers beside native keys, of networks without eSE, and the code bases that have them."""


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


def module_names(spec: VoVNetSpec) -> Iterator[tuple[str, str, str]]:
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


def _pytorchcv_names(spec: VoVNetSpec) -> Iterator[tuple[str, str]]:
    """Names of every module with parameters in (native, pytorchcv), which has no eSE."""

    def parts(native: str, theirs: str) -> Iterator[tuple[str, str]]:
        yield f"{native}/conv", f"{theirs}.conv"
        yield f"{native}/norm", f"{theirs}.bn"

    for i in range(1, 4):
        yield from parts(f"stem.stem_{i}", f"features.init_block.conv{i}")
    for block in spec.blocks():
        native = f"stage{block.stage}.{block.name}"
        unit = f"features.stage{block.stage - specs.FIRST_STAGE + 1}.unit{block.index}"
        for i in range(block.num_layers):
            layer = f"{native}.layers.{i}.{block.name}_{i}"
            yield from parts(layer, f"{unit}.branches.branch{i + 1}")
        yield from parts(f"{native}.concat.{block.name}_concat", f"{unit}.concat_conv")


def names_in(spec: VoVNetSpec, layout: Layout) -> dict[str, str]:
    """By native name of every module with parameters, its name in a layout.

    Only where the layout's dialect computes what ``spec`` does are these names somebody's.
    """
    if layout == "pytorchcv":
        return dict(_pytorchcv_names(spec))
    column = {"timm": 1, "seed": 2}.get(layout, 0)
    return {names[0]: names[column] for names in module_names(spec)}


ANCHORS: dict[Layout, str] = {
    "native": "stem.stem_1/conv.weight",
    "timm": "stem.0.conv.weight",
    "seed": "stem.0.weight",
    "pytorchcv": "features.init_block.conv1.conv.weight",
}
ROOTS: dict[Layout, tuple[str, ...]] = {
    "native": ("stem.", "stage2.", "stage3.", "stage4.", "stage5."),
    "timm": ("stem.", "stages."),
    "seed": ("stem.", "OSA_"),
    "pytorchcv": ("features.",),
}
"""By what keys look like, which is less than whose function they are: see :func:`keys_of`."""


def keys_of(layout: Layout) -> Layout:
    """The layout whose keys these are: three have the native ones."""
    return "native" if layout in ("detectron2", "torchhub") else layout


def locate(state_dict: StateDict, layout: Layout | None, prefix: str | None) -> tuple[Layout, str]:
    """Find the layout and the prefix of the one backbone in ``state_dict``.

    Native keys are torch.hub's where its classifier is beside them.
    """
    found, prefix = _locate(state_dict, layout and keys_of(layout), prefix)
    if layout is None and _head_of(state_dict, found, prefix) == "torchhub":
        return "torchhub", prefix
    return layout or found, prefix


def function_of(state_dict: StateDict, layout: Layout, prefix: str) -> Dialect | None:
    """The dialect whose function a backbone is, as far as its keys and a classifier's tell."""
    return DIALECTS.get(layout) or DIALECTS.get(_head_of(state_dict, layout, prefix))


def _head_of(state_dict: StateDict, layout: Layout, prefix: str) -> Layout:
    if layout != "native" or any(k.startswith(prefix) and ".ese." in k for k in state_dict):
        return layout  # Names tell already, or no two functions share them.
    return next((who for key, who in HEADS.items() if prefix + key in state_dict), layout)


def _locate(state_dict: StateDict, layout: Layout | None, prefix: str | None) -> tuple[Layout, str]:
    require_names(state_dict)
    found = []
    for candidate, anchor in ANCHORS.items():
        if layout not in (None, candidate):
            continue
        for key in state_dict:
            if key == anchor or key.endswith("." + anchor):
                found.append((candidate, key[: -len(anchor)]))
    if prefix is not None:
        asked = prefix if not prefix or prefix.endswith(".") else prefix + "."
        # The seed's own keys begin with "model.", which is no prefix to its users.
        found = [f for f in found if f[1] in (asked, asked + SEED_ROOT)]
    if not found:
        some = ", ".join(repr(key) for key in list(state_dict)[:4]) or "nothing"
        where = f" under the prefix {prefix!r}" if prefix else ""
        raise CheckpointError(
            f"no VoVNet backbone found{where}: a key that ends in one of "
            + ", ".join(repr(a) for name, a in ANCHORS.items() if layout is None or name == layout)
            + f" was expected, the checkpoint holds {some}"
        )
    if len(found) > 1:
        raise CheckpointError(
            "the checkpoint holds more than one backbone; choose one with prefix=: "
            + ", ".join(f"{p!r} ({name})" for name, p in found)
        )
    return found[0]
