"""A model filled from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..network.filling import COUNTER, CheckpointError
from ..network.model import VoVNet
from .files import StateDict, read, unwrap
from .fitting import Report, check, require_function, take
from .layouts import Layout, locate


def load(
    model: VoVNet,
    source: str | os.PathLike[str] | StateDict,
    *,
    layout: Layout | None = None,
    prefix: str | None = None,
) -> Report:
    """Fill a model from a checkpoint of any layout, completely or not at all.

    A file is mapped into memory: the system holds no more of it than it has room for, and nothing
    of what else is in it (heads, an optimizer's state). It may be replaced meanwhile, but not cut
    or written to where it lies, which may end the process.

    Args:
        model: the backbone. Its parameters are written only if everything fits.
        source: a file (``.pth``, ``.pt``, ``.bin``, ``.safetensors``), an http(s)
            address, or a state dict, bare or inside ``state_dict`` or ``model``.
        layout: ``native``, ``detectron2``, ``timm``, ``seed``, ``torchhub`` or
            ``pytorchcv``; recognised by default. A backbone without eSE under native
            keys may be torch.hub's or timm's, which are two functions; a classifier
            beside it tells (``classifier.`` or ``head.fc.``), and where there is none
            that is warned about, unless the layout is given.
        prefix: what stands before the backbone's keys, e.g. ``img_backbone.``;
            found by default.

    Returns:
        what was found.

    Raises:
        CheckpointError: the file cannot be read; it holds no backbone, or
            several; a parameter is left unfilled, a key has no place, a shape
            differs (the first few are named, and the architectures that would
            fit); a tensor is not of numbers as weights are (integers, fp8, complex,
            quantised, sparse, nested, meta); a value is not finite, or would not be in
            the model's dtype; the layout's dialect computes another function than the
            model; the model is on the meta device.
        FileNotFoundError: there is no such file.
    """
    if not isinstance(model, VoVNet):
        raise TypeError(f"model must be a vovnet_fast.VoVNet, got {type(model).__name__}")
    state_dict = unwrap(source if isinstance(source, Mapping) else read(source, mmap=True))
    found_layout, found_prefix = locate(state_dict, layout, prefix)
    require_function(
        state_dict, model.spec, layout, found_layout, found_prefix,
        "{1} cannot load a {0} checkpoint",
    )  # fmt: skip
    taken, surplus, report = take(state_dict, model.spec, found_layout, found_prefix)
    expected = model.state_dict()
    empty = [key for key, value in expected.items() if value.is_meta]
    if empty:
        raise CheckpointError(
            f"{len(empty)} tensors of the model are on the meta device and can hold no values, "
            f"first {empty[0]!r}: model.to_empty(device='cpu') before loading"
        )
    check(taken, surplus, expected, report, state_dict)
    # Keep the model's own counters where the file has none, and drop the file's
    # where the model has none (frozen norms).
    own = {k: v for k, v in expected.items() if k.endswith(COUNTER)}
    model.load_state_dict({**own, **{k: v for k, v in taken.items() if k in expected}})
    return report
