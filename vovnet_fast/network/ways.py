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
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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
    return processor.choose(
        _problem(network, x),
        CANDIDATES,
        MIXED,
        functools.partial(_trial, network, x),
        steps=True,
        favourite=MODULES,
        unless=functools.partial(_would_be_seen, network),
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
    """Whether there is a choice. It is asked at every step."""
    return (
        x.device.type == "cpu"
        and not compat.is_compiling()
        and backends.chosen() == "auto"
        and x.numel() > 0
        and not torch.are_deterministic_algorithms_enabled()  # Ways differ in the last bits.
        and decision.needs_gradient(network, x)
        and watching(x) is None
        and backends.select(x.device, decision.compute_dtype(x), ()) == "cpu"
    )


def _would_be_seen(network: VoVNet) -> bool:
    """Whether nothing may be tried: somebody would notice, by a hook, or in another process, or the
    network is made of other parts than what is measured would be remembered for."""
    below = (m for child in network.children() for m in child.modules())
    seen = any(has_hooks(m) or isinstance(m, nn.SyncBatchNorm) for m in below)
    return seen or network._why_other_parts() is not None


def _problem(network: VoVNet, x: Tensor) -> str:
    """Names what times depend on. Images of similar sizes are one problem."""
    n, _, height, width = _measured_size(x)
    pixels = 2 ** round(math.log2(n * height * width))
    layout = "channels_last" if _is_channels_last(x) else "contiguous"
    dtype, gradient = decision.compute_dtype(x), x.requires_grad
    return _words(
        network.spec.name, pixels, layout, dtype, gradient, network.out_features, _modes(network)
    )


@functools.lru_cache
def _words(
    spec: str,
    pixels: int,
    layout: str,
    dtype: torch.dtype,
    gradient: bool,
    features: tuple[str, ...],
    modes: str,
) -> str:
    return (
        f"training step of {spec}, {pixels} pixels, {layout}, {dtype}, input gradient {gradient}, "
        f"{','.join(features)}, parts {modes}"
    )


class _Leaves(NamedTuple):
    """Modules of a part that have weights, and those that are batch norms."""

    weighted: list[weakref.ref[nn.Module]]
    norms: list[weakref.ref[nn.Module]]


_known: WeakKeyDictionary[nn.Module, list[_Leaves]] = WeakKeyDictionary()
"""By network, of stem and stages. One that is no longer there may still be among them while it
lives: what that changes is what is taken to be measured, and no number."""


def _modes(network: VoVNet) -> str:
    """Of stem and stages: norms by the batch's statistics or by running ones, trained or not."""
    try:
        return _modes_of(_known[network])
    except (KeyError, AttributeError):  # Not looked at yet, or modules that are gone.
        parts = _known[network] = [
            _Leaves(
                [
                    weakref.ref(m)
                    for m in child.modules()
                    if m._parameters.get("weight") is not None
                ],
                [weakref.ref(m) for m in child.modules() if isinstance(m, _BatchNorm)],
            )
            for child in network.children()
        ]
        return _modes_of(parts)


def _modes_of(parts: Iterable[_Leaves]) -> str:
    # At every step: it looks no further than to the first that trains.
    return "".join(
        ("b" if any(ref().training for ref in norms) else "f")  # type: ignore[union-attr]
        + ("g" if any(map(_trains, weighted)) else "n")
        for weighted, norms in parts
    )


def _has_weight(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None


def _trains(ref: weakref.ref[nn.Module]) -> bool:
    weight = ref()._parameters["weight"]  # type: ignore[union-attr]
    return weight is not None and weight.requires_grad


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

    gradients: list[Tensor] = []

    def step(way: str) -> None:
        with compat.unseen_by_hooks(), torch._C.DisableTorchFunction():
            with autocast(enabled=dtype is not None, cache_enabled=False):
                features = [f for f in run(twin, image, way) if f.requires_grad]
            if (
                not gradients
            ):  # They stay, as what an optimizer holds does: the heap ends behind it.
                gradients.extend(torch.ones_like(f) for f in features)
            with autocast(enabled=False):
                torch.autograd.backward(features, gradients)
        twin.zero_grad(set_to_none=True)
        image.grad = None

    return step
