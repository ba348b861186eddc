"""Whether a checkpoint's tensors fill an architecture exactly, and which ones they would fill."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import specs
from ..network.filling import COUNTER, CheckpointError, why_not, why_not_plain
from ..network.model import VoVNet
from ..specs import Dialect, VoVNetSpec
from .files import StateDict, unwrap
from .layouts import ANCHORS, DIALECTS, ROOTS, Layout, function_of, keys_of, locate, names_in
from .tensors import Inert


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


@functools.lru_cache(maxsize=64)
def expected(spec: VoVNetSpec, input_ch: int) -> dict[str, Tensor]:
    """On the meta device, and in fp64, which holds what every dtype of weights holds."""
    with torch.device("meta"):
        own = VoVNet(spec, input_ch=input_ch).state_dict()
        return {
            key: torch.empty(v.shape, dtype=torch.float64 if v.is_floating_point() else v.dtype)
            for key, v in own.items()
        }


def take(
    state_dict: StateDict, spec: VoVNetSpec, layout: Layout | None, prefix: str | None
) -> tuple[dict[str, Tensor], list[str], Report]:
    """Rename a source's backbone to native keys.

    Returns:
        the tensors by native key, the source's keys that look like a backbone's
        but have no place in ``spec``, and the report.
    """
    layout, prefix = locate(state_dict, layout, prefix)
    rename = {theirs: native for native, theirs in names_in(spec, layout).items()}
    taken: dict[str, Tensor] = {}
    surplus, ignored = [], []
    for key, value in state_dict.items():
        module, _, leaf = key.removeprefix(prefix).rpartition(".")
        if key.startswith(prefix) and module in rename:
            reason = why_not_plain(value)
            if isinstance(value, Inert):
                reason = value.why_no_weight()
            if reason is not None:
                raise CheckpointError(f"{key!r} {reason}")
            taken[f"{rename[module]}.{leaf}"] = value
        elif key.startswith(tuple(prefix + root for root in ROOTS[keys_of(layout)])):
            surplus.append(key)
        else:
            ignored.append(key)
    report = Report(
        spec=spec.name,
        layout=layout,
        prefix=prefix,
        tensors=len(taken),
        parameters=sum(v.numel() for k, v in taken.items() if not k.endswith(COUNTER)),
        ignored=tuple(ignored),
    )
    return taken, surplus, report


def check(
    taken: Mapping[str, Tensor],
    surplus: list[str],
    expected: Mapping[str, Tensor],
    report: Report,
    state_dict: StateDict,
) -> None:
    """Raise unless the tensors fill the architecture exactly, with finite values."""
    missing = [k for k in expected if k not in taken and not k.endswith(COUNTER)]
    unexpected = surplus + [k for k in taken if k not in expected and not k.endswith(COUNTER)]
    shapes = [
        f"{k} is {list(taken[k].shape)}, expected {list(there.shape)}"
        for k, there in expected.items()
        if k in taken and taken[k].shape != there.shape
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
    amiss = {k: why_not(taken[k], there) for k, there in expected.items() if k in taken}
    found = [f"{k!r} {reason}" for k, reason in amiss.items() if reason is not None]
    if found:
        more = f". {len(found) - 1} other tensors cannot be taken either" if found[1:] else ""
        raise CheckpointError(f"the checkpoint's {found[0]}{more}")
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


def refuse_other_function(spec: VoVNetSpec, dialect: Dialect, what: str) -> None:
    reasons = specs.differences(spec, dialect)
    if reasons:
        raise CheckpointError(
            f"{what}: the two do not compute the same function. "
            + "; ".join(reasons[:6])
            + ("; ..." if len(reasons) > 6 else "")
            + f". Use the {dialect} dialect's own architecture: {', '.join(specs.names(dialect))}"
        )


def require_function(
    state_dict: StateDict,
    spec: VoVNetSpec,
    asked: Layout | None,
    layout: Layout,
    prefix: str,
    what: str,
) -> None:
    """Raise where a backbone is another function than ``spec``, and warn where nothing tells.

    Args:
        state_dict: where the backbone is.
        spec: the architecture that it is to fill.
        asked: the layout as the caller gave it.
        layout: the layout as it was found, under ``prefix``.
        what: what cannot be done with files of ``{0}`` and the architecture ``{1}``.
    """
    dialect = function_of(state_dict, layout, prefix)
    if dialect is not None:
        of = layout if layout in DIALECTS else dialect
        refuse_other_function(spec, dialect, what.format(of, spec.name))
    elif asked is None:
        others = specs.twins(spec)
        if others:
            warnings.warn(
                f"nothing in the checkpoint tells {spec.name} ({spec.dialect}) from "
                f"{' and '.join(f'{name} ({specs.get(name).dialect})' for name in others)}, which "
                "has the same parameters and is another function. It is taken for "
                f"{spec.name}: layout='native' says that it is one. Otherwise take "
                f"{' or '.join(others)}. A classifier in the file tells: torch.hub's is "
                "'classifier.', timm's 'head.fc.'",
                stacklevel=3,
            )


def identify(
    state_dict: StateDict, *, layout: Layout | None = None, prefix: str | None = None
) -> list[str]:
    """Names of the published architectures that a checkpoint fits exactly.

    Several fit where dialects agree (``V-19-slim-eSE`` and
    ``ese_vovnet19b_slim`` are one function), and where nothing in the file tells two
    functions apart (``vovnet39a`` and ``V-39``, without a classifier); those of the
    layout's own dialect come first.

    Args:
        state_dict: tensors by key, wrapped or not, of any layout.
        layout: the key layout, recognised by default.
        prefix: what stands before the backbone's keys, found by default.

    Raises:
        CheckpointError: no backbone, or several.
    """
    state_dict = unwrap(state_dict)
    layout, prefix = locate(state_dict, layout, prefix)
    first = state_dict[prefix + ANCHORS[keys_of(layout)]]
    dialect = function_of(state_dict, layout, prefix)
    if why_not_plain(first) is not None or first.ndim != 4:
        return []
    fitting = []
    for spec in specs.SPECS.values():
        if dialect is not None and specs.differences(spec, dialect):
            continue
        taken, surplus, _ = take(state_dict, spec, layout, prefix)
        there = expected(spec, first.shape[1]).items()
        wanted = {k: v.shape for k, v in there if not k.endswith(COUNTER)}
        have = {k: v.shape for k, v in taken.items() if not k.endswith(COUNTER)}
        if have == wanted and not surplus:
            fitting.append(spec)
    own = dialect or "detectron2"
    return [s.name for s in sorted(fitting, key=lambda s: s.dialect != own)]
