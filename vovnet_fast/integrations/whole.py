"""State dicts of whole detectors, as ``load_from`` and ``resume`` give them: is the backbone there?

Such a load goes past ``init_cfg``, from module to module, and what is left unfilled is at most a
line in a log: detectors have been trained and evaluated for days with a backbone of noise.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from .. import compat
from ..checkpoints import identify
from ..checkpoints.files import unwrap
from ..checkpoints.layouts import locate
from ..network.filling import COUNTER, CheckpointError
from ..network.model import VoVNet

_TAKEN = frozenset(inspect.signature(VoVNet).parameters)


def refuse_others(options: Mapping[str, Any]) -> None:
    """Look at the arguments of a backbone that may have been written for the one that it replaces.

    Raises:
        TypeError: one is no argument of :class:`~vovnet_fast.VoVNet`.
        UnknownSpecError, ValueError: as that.
    """
    others = [name for name in options if name not in _TAKEN]
    if not others:
        return
    with torch.device("meta"):
        backbone = VoVNet(**{name: options[name] for name in options if name in _TAKEN})
    raise TypeError(
        f"VoVNetFast takes no {', '.join(map(repr, others))}: a slip of the pen, or arguments of "
        "the backbone that it replaces, as a ResNet's depth. Leave those out: spec_name says which "
        "VoVNet (vovnet-fast specs lists them), and out_indices, frozen_stages, norm_cfg, "
        "norm_eval, with_cp and init_cfg are what they are there. "
        f"{backbone.spec.name} gives {list(backbone.feature_channels)} channels: write these as "
        "the neck's in_channels"
    )


class Guarded(VoVNet):
    """A backbone that looks at what a detector's state dict has for it, before anything is copied.

    Attributes:
        filled: whether a state dict has filled all of it, or weights were set on purpose.
        remedy: how its code base fills a backbone from a file, with a place for the prefix.
        on_purpose: how one says there that random weights are meant.
    """

    filled = False
    remedy = (
        "A file that holds a backbone alone, or that another code base wrote (DD3D and CenterMask: "
        "names that begin with backbone.bottom_up., in 'model'), does not fit a whole detector: "
        "fill the backbone with init_cfg=dict(type='Pretrained', checkpoint=FILE), or make a file "
        "that fits with: vovnet-fast convert FILE OUT.pth --add-prefix {prefix}"
    )
    on_purpose = "give it an init_cfg, dict(type='Kaiming', layer='Conv2d') for instance"

    def guard(self) -> None:
        """Begin to look. A deep copy goes on."""
        compat.register_load_state_dict_pre_hook(self, refuse_partial_load)


def refuse_partial_load(
    module: Guarded, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Stop a load that leaves the backbone as noise, or fills only part of it.

    One that has nothing for a backbone that was filled before, heads alone say, is warned about.
    """
    expected = [key for key in module.state_dict() if not key.endswith(COUNTER)]
    missing = [key for key in expected if prefix + key not in state_dict]
    if not missing:
        module.filled = True
        return
    shown = ", ".join(repr(prefix + key) for key in missing[:4])
    if len(missing) < len(expected):
        raise CheckpointError(
            f"the checkpoint fills {len(expected) - len(missing)} of the backbone's "
            f"{len(expected)} tensors and lacks {shown}{' and others' if missing[4:] else ''}: it "
            f"was written for another architecture than {module.spec.name}"
        )
    told = (
        f"the checkpoint holds nothing for the backbone {module.spec.name}: of its {len(expected)} "
        f"tensors none was filled, as there is no key like {prefix + missing[0]!r}. "
        f"{_found(state_dict, prefix)}"
    )
    remedy = module.remedy.format(prefix=prefix or "backbone.")
    if not module.filled:
        raise CheckpointError(
            f"{told}Nothing else has filled it either: it would be noise. {remedy}. To begin with "
            f"random weights on purpose, {module.on_purpose}"
        )
    warnings.warn(f"{told}It keeps the weights that it has. {remedy}", stacklevel=2)


def _found(state_dict: Mapping[str, Any], prefix: str) -> str:
    """What lies in the place of the backbone, or elsewhere, as far as the loader lets one see."""
    below = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
    for what, place in ((below, f"under {prefix!r}"), (state_dict, "elsewhere")):
        try:
            layout, where = locate(unwrap(what), None, None)
            names = identify(what, layout=layout, prefix=where)
        except CheckpointError:
            continue
        fits = f", of {names[0]}" if names else ""
        return (
            f"There is a backbone {place} in {layout} keys{fits}, whose names begin with "
            f"{where!r}. "
        )
    if below:
        return f"There are keys of another network, {next(iter(below))!r} for one. "
    return ""
