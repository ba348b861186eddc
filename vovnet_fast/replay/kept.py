"""A network whose weights can change at any time, run as if they never did.

What is made of weights (norms folded, weights packed, calls recorded) is kept for as long as
every tensor that it was made of is where it was, and holds what it held (:mod:`.fingerprint`).
That is found out at every call. Weights that do change, as in training, cost nothing here: what is
kept is made at the second call that finds the same ones, and not before.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import cpu
from ..backends.cpu import convolution
from ..ops import NetworkParams, _checks
from ..ops.features import check_params, plan, rebuild, run
from ..ops.memory import Arena
from . import fingerprint
from .caches import Workspace, Workspaces
from .cpu import Replay, engines

KEPT_ARENAS = 4
"""How many arenas a network keeps: one a shape of images that has come more than once."""

KNOWN_SHAPES = 64
"""Of how many shapes it is known that they have come."""


class Form(NamedTuple):
    """A network as it runs: its weights are packed, and are nobody else's.

    Attributes:
        params: what :func:`vovnet_fast.ops.features.run` takes.
        dtype: of activations.
        out_features: names of the features.
        workspaces: arenas, and the calls recorded in them.
    """

    params: NetworkParams
    dtype: torch.dtype
    out_features: tuple[str, ...]
    workspaces: Workspaces

    @classmethod
    def of(
        cls, params: NetworkParams, dtype: torch.dtype, out_features: tuple[str, ...], like: Tensor
    ) -> Form:
        """Of parameters as a network folds them; the errors are :func:`check_params`'s."""
        check_params("features", params, like.new_empty(0, dtype=dtype))
        layers = []
        for layer in params.packed(dtype).convs():
            depthwise = None if layer.depthwise is None else layer.depthwise.clone()
            weight = convolution.stand_in(layer.weight, layer.stride)
            layers.append(layer._replace(weight=weight, depthwise=depthwise))
        fcs = [fc.clone(memory_format=torch.contiguous_format) for fc in params.fcs()]
        own = rebuild(layers, fcs, params.spec, params.encoded_spec)
        return cls(own, dtype, out_features, Workspaces(KEPT_ARENAS))

    def features(self, x: Tensor, *, again: bool) -> list[Tensor]:
        """Features of images, each ``[N, C', H', W']`` in memory of its own.

        Args:
            x: ``[N, C, H, W]``, with elements.
            again: the shape has come before, and is worth an arena.
        """
        x = x.resolve_neg()
        if not again:
            found = run(cpu, _checks.nhwc(x.to(self.dtype)), self.params, self.out_features)
            return [_checks.nchw(feature) for feature in found]
        workspace = self.workspaces.take(x.shape)
        if workspace is None:
            n, c, h, w = x.shape
            needed = plan((n, c, h, w), self.params, self.out_features)
            arena = Arena(needed, self.dtype, x.device)
            workspace = Workspace(arena, Replay(at_once=True))
        arena = workspace.arena
        image = x.permute(0, 2, 3, 1)
        if x.dtype != self.dtype or (x.shape[1] > 1 and image.stride(3) != 1):
            image = arena.scratch("image", self.params.stem[0].scale, *image.shape).copy_(image)
        work = functools.partial(
            run, cpu, params=self.params, out_features=self.out_features, memory=arena
        )
        # What else a recording depends on, this form does.
        found = workspace.replay(work, image, (image.shape, image.stride()))
        self.workspaces.give(x.shape, workspace)
        return found


class Kept:
    """What is kept of one network between calls, of any number of threads."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._shapes: deque[Hashable] = deque(maxlen=KNOWN_SHAPES)
        self._cause: tuple[Any, ...] | None = None
        self._layout: fingerprint.Layout | None = None
        self._content: tuple[int, int] | None = None
        self._form: Form | None = None

    def features(
        self,
        x: Tensor,
        dtype: torch.dtype,
        out_features: tuple[str, ...],
        tensors: Sequence[Tensor | None],
        state: tuple[Any, ...],
        fold: Callable[[torch.dtype], NetworkParams],
    ) -> list[Tensor] | None:
        """Features of images, or None: the weights, or ``state``, are not yet known to last.

        Args:
            x: ``[N, C, H, W]``, with elements.
            dtype: of activations.
            out_features: names of the features.
            tensors: all that ``fold`` reads, and maybe more.
            state: what else it depends on; it is compared.
            fold: returns the network's parameters for activations of a dtype.
        """
        if self._process != os.getpid():  # Its lock may be held by a thread that is not here.
            self._begin()
        places = fingerprint.places(tensors)
        if places is None:
            return None
        cause = (dtype, out_features, engines(dtype), *state)
        with self._lock:
            again = x.shape in self._shapes
            if not again:
                self._shapes.append(x.shape)
            if self._layout is None or self._layout.places != places or self._cause != cause:
                self._cause, self._layout = cause, fingerprint.layout(tensors, places)
                self._content = self._form = None
                return None
            layout = self._layout
        content = fingerprint.content(tensors, layout)
        form = self._find(
            layout, content, tensors, lambda: Form.of(fold(dtype), dtype, out_features, x)
        )
        return None if form is None else form.features(x, again=again)

    def _find(
        self,
        layout: fingerprint.Layout,
        content: tuple[int, int],
        tensors: Sequence[Tensor | None],
        make: Callable[[], Form],
    ) -> Form | None:
        """The form of weights with this content, made if they had it at the call before."""
        with self._lock:
            if self._layout is not layout:  # Another thread has found other weights.
                return None
            if self._content not in (None, content):
                self._content, self._form = content, None
                return None
            self._content = content
            if self._form is None:
                with torch.inference_mode(False), torch.no_grad():
                    form = make()
                # Somebody may be writing to the weights just now.
                if fingerprint.content(tensors, layout) != content:
                    return None
                self._form = form
            return self._form
