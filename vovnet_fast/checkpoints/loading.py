"""A model filled from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..network.model import VoVNet
from .files import StateDict, read, unwrap
from .fitting import COUNTER, Report, check, refuse_other_function, take
from .layouts import FOREIGN, Layout, locate


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
    state_dict = unwrap(source if isinstance(source, Mapping) else read(source))
    found_layout, found_prefix = locate(state_dict, layout, prefix)
    if found_layout in FOREIGN:
        refuse_other_function(
            model.spec, found_layout, f"{model.spec.name} cannot load a {found_layout} checkpoint"
        )
    taken, surplus, report = take(state_dict, model.spec, found_layout, found_prefix)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    check(taken, surplus, expected, report, state_dict)
    # Keep the model's own counters where the file has none, and drop the file's
    # where the model has none (frozen norms).
    own = {k: v for k, v in model.state_dict().items() if k.endswith(COUNTER)}
    model.load_state_dict({**own, **{k: v for k, v in taken.items() if k in expected}})
    return report
