"""What every module is called in every published key layout, and which one a checkpoint has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from .. import specs
from ..network.filling import CheckpointError, require_names
from ..specs import Dialect, VoVNetSpec
from .files import StateDict

Layout = Literal["native", "detectron2", "timm", "seed"]
LAYOUTS: tuple[Layout, ...] = ("native", "detectron2", "timm", "seed")

SEED_ROOT = "model."
FOREIGN: tuple[Dialect, ...] = ("timm", "seed")


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


def column_of(layout: Layout) -> int:
    return {"native": 0, "detectron2": 0, "timm": 1, "seed": 2}[layout]


ANCHORS: dict[Layout, str] = {
    "native": "stem.stem_1/conv.weight",
    "timm": "stem.0.conv.weight",
    "seed": "stem.0.weight",
}
ROOTS: dict[Layout, tuple[str, ...]] = {
    "native": ("stem.", "stage2.", "stage3.", "stage4.", "stage5."),
    "timm": ("stem.", "stages."),
    "seed": ("stem.", "OSA_"),
}


def locate(state_dict: StateDict, layout: Layout | None, prefix: str | None) -> tuple[Layout, str]:
    """Find the layout and the prefix of the one backbone in ``state_dict``."""
    require_names(state_dict)
    if layout == "detectron2":
        layout = "native"
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
