"""What a network in eight bits will launch on a GPU, for compiling it beforehand."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import backends, first_use
from ..arithmetic.layers import QuantizedNetwork
from ..specs import VoVNetSpec
from . import layout
from .layout import Architecture
from .running import run
from .walking import Names

if TYPE_CHECKING:
    from ..first_use.rehearsal import Plan, Setting


@functools.cache  # Asked for at every call.
def functions(spec: VoVNetSpec, out_features: tuple[str, ...]) -> tuple[str, ...]:
    """The ops that a network uses."""
    blocks = Names(spec, out_features).blocks
    used = {
        "depthwise": spec.depthwise,
        "gates": any(plan.ese for plan in blocks),
        "apply_gates": bool(blocks),
    }
    return ("quantize_image", "conv", "max_pool", *(name for name in used if used[name]))


def launch(network: QuantizedNetwork, x: Tensor) -> list[Tensor]:
    """Run a network on Triton's ops without memory: what these launch is for who listens
    (``kernels._common.recording``).

    Args:
        network: on meta, as :func:`.layout.blank` makes it.
        x: ``[N, C, H, W]`` images on meta.

    Returns:
        the features, ``[N, H', W', C']``, on meta.
    """
    room = f"{backends.__name__}.triton.{network.dtype}"
    ops: ModuleType = importlib.import_module(room)
    with torch.no_grad():
        return run(ops, x.float().permute(0, 2, 3, 1), network)


def plan(architecture: Architecture, x: Tensor, setting: Setting) -> Plan:
    """What a network of an architecture needs on images on meta, with what will be measured."""
    from ..first_use import rehearsal

    network = layout.blank(architecture, "meta")
    with rehearsal.planning(setting) as planned:
        launch(network, x)
    needed = functions(architecture.spec, architecture.out_features)
    return planned()._replace(functions=frozenset(needed))


def at_first_use(architecture: Architecture, x: Tensor) -> None:
    """Compile on all cores what a network will launch for these images, if it is new.

    Args:
        architecture: of the network.
        x: ``[N, C, H, W]`` images on a GPU.
    """
    if type(x) is not Tensor:
        return

    def planned(setting: Setting) -> Plan:
        from ..first_use import rehearsal

        return plan(architecture, rehearsal.on_meta(x), setting)

    key = first_use.key_of_quantized(architecture, x)
    dtype: torch.dtype = architecture.form.ops.ACTIVATION
    first_use.once(key, x.device, dtype, planned)
