"""A training step on a CPU by ops or by plain modules: whichever is faster there, as measured.

Ops save passes over activations, and pay with passes over weights; plain modules keep the layout of
the images, and oneDNN is faster in one layout on one processor and in the other on the next. What
wins depends on the processor, the network, the size and the layout of the images: it is measured at
the first step of a kind, and remembered (:mod:`vovnet_fast.tuning.processor`).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import backends, compat
from ..tuning import processor
from . import decision
from .structure import has_hooks
from .watchers import watching

if TYPE_CHECKING:
    from .model import VoVNet

OPS, MIXED, MODULES = "ops", "ops on large maps", "modules"
OTHER_LAYOUT = "modules in the other layout"
"""All parts that can run as ops; those on maps of :data:`.decision.CPU_PIXELS_TRAINING` pixels or
more; none; none, on a copy of the images in channels_last, or in NCHW if they come in that (weights
stay as they are: where they are in channels_last, PyTorch convolves in that). Plain modules are
taken unless another way is faster by more than measurements differ by themselves; of the others,
where two are equally fast, the one that keeps less."""

CANDIDATES = (OPS, MIXED, MODULES, OTHER_LAYOUT)

PIXELS = 2 * 256 * 256
"""Of the images that are measured with, N * H * W, at most: beyond, ratios no longer change."""


def choose(network: VoVNet, x: Tensor) -> str:
    """The way to run a network's parts on images ``[N, C, H, W]``."""
    if not _chosen_by_time(network, x):
        return MIXED
    prepare = functools.partial(_trial, network, x)
    return processor.choose(
        _problem(network, x), CANDIDATES, MIXED, prepare, steps=True, favourite=MODULES
    )


def run(network: VoVNet, x: Tensor, way: str) -> tuple[Tensor, ...]:
    """Run them."""
    if way == OTHER_LAYOUT:
        last = _is_channels_last(x)
        x = x.contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)
    if way in (MODULES, OTHER_LAYOUT):
        with backends.use_backend("reference"):
            return network._run_modules(x)
    if way == OPS:
        with decision.on_maps_of_any_size():
            return network._run_modules(x)
    return network._run_modules(x)


def _chosen_by_time(network: VoVNet, x: Tensor) -> bool:
    """Whether there is a choice, and nobody who would see what is tried."""
    return (
        x.device.type == "cpu"
        and not compat.is_compiling()
        and backends.chosen() == "auto"
        and x.numel() > 0
        and not torch.are_deterministic_algorithms_enabled()  # Ways differ in the last bits.
        and decision.needs_gradient(network, x)
        and watching(x) is None
        and backends.select(x.device, decision.compute_dtype(x), ()) == "cpu"
        and not any(map(_would_be_seen, network.children()))
        and network._why_other_parts() is None
    )


def _would_be_seen(child: nn.Module) -> bool:
    """Whether somebody would notice that it is run: by a hook, or in another process."""
    return any(has_hooks(m) or isinstance(m, nn.SyncBatchNorm) for m in child.modules())


def _problem(network: VoVNet, x: Tensor) -> str:
    """Names what times depend on. Images of similar sizes are one problem."""
    n, _, height, width = _measured_size(x)
    layout = "channels_last" if _is_channels_last(x) else "contiguous"
    modes = "".join(
        ("b" if any(parts.batch for parts in part.conv_layers().values()) else "f")
        + ("g" if decision.needs_gradient(part, x) else "n")
        for part in (network.stem, *network._blocks())
    )
    pixels = 2 ** round(math.log2(n * height * width))
    return (
        f"training step of {network.spec.name}, {pixels} pixels, {layout}, "
        f"{decision.compute_dtype(x)}, input gradient {x.requires_grad}, "
        f"{','.join(network.out_features)}, parts {modes}"
    )


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1


def _measured_size(x: Tensor) -> tuple[int, int, int, int]:
    """Of the images that are measured with."""
    n, channels, height, width = x.shape
    if height * width > PIXELS:
        shrink = math.sqrt(PIXELS / (height * width))
        height, width = (max(32, int(size * shrink) // 32 * 32) for size in (height, width))
    return min(n, max(1, PIXELS // (height * width))), channels, height, width


def _trial(network: VoVNet, x: Tensor) -> Callable[[str], None]:
    """Runs a step of a twin of the network, which leaves no trace: gradients and statistics are the
    twin's, weights are shared. Where weights are cast by autocast, they are in every step."""
    n, _, height, width = _measured_size(x)
    image = x.detach()[:n, :, :height, :width].clone(memory_format=torch.preserve_format)
    image.requires_grad_(x.requires_grad)
    shared: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), p.requires_grad) for p in network.parameters()
    }
    shared.update((id(b), b.detach().clone()) for b in network.buffers())
    twin = copy.deepcopy(network, shared)

    dtype = compat.autocast_dtype("cpu")
    autocast = functools.partial(torch.autocast, "cpu", dtype or torch.bfloat16)

    def step(way: str) -> None:
        with compat.unseen_by_hooks(), torch._C.DisableTorchFunction():
            with autocast(enabled=dtype is not None, cache_enabled=False):
                features = [f for f in run(twin, image, way) if f.requires_grad]
            with autocast(enabled=False):
                torch.autograd.backward(features, [torch.ones_like(f) for f in features])
        twin.zero_grad(set_to_none=True)
        image.grad = None

    return step
