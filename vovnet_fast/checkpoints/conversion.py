"""A checkpoint renamed from one key layout to another."""

from __future__ import annotations

from torch import Tensor

from .. import specs
from ..specs import VoVNetSpec
from .files import StateDict, unwrap
from .fitting import Report, check, expected, refuse_other_function, require_function, take
from .layouts import ANCHORS, DIALECTS, LAYOUTS, SEED_ROOT, Layout, locate, names_in


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
        to: the layout to write. ``native`` is always possible; the others only
            where that code base computes the same function: detectron2 and timm
            place eSE differently in stages of several blocks, the seed differs in
            stem, pool, gate and biases, torch.hub and pytorchcv have no eSE.
        layout: the source's layout, recognised by default.
        prefix: what stands before the source's backbone keys, found by default.
        add_prefix: is put before every key that is returned.

    Returns:
        tensors by key, in network order; heads and necks are left out.

    Raises:
        CheckpointError: as :func:`~vovnet_fast.checkpoints.load`, or there is no such function.
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
    state_dict = unwrap(state_dict)
    asked, (layout, prefix) = layout, locate(state_dict, layout, prefix)
    require_function(
        state_dict, spec, asked, layout, prefix, "a {0} checkpoint cannot be read as {1}"
    )
    if to in DIALECTS:
        refuse_other_function(spec, DIALECTS[to], f"{spec.name} cannot be written for {to}")
    taken, surplus, report = take(state_dict, spec, layout, prefix)
    anchor = taken.get(ANCHORS["native"])
    input_ch = anchor.shape[1] if anchor is not None and anchor.ndim == 4 else 3
    there = expected(spec, input_ch)
    check(taken, surplus, there, report, state_dict)
    rename = names_in(spec, to)
    root = add_prefix + (SEED_ROOT if to == "seed" else "")
    converted = {}
    for key in there:
        if key in taken:
            module, _, leaf = key.rpartition(".")
            converted[f"{root}{rename[module]}.{leaf}"] = taken[key]
    return converted, report
