"""The extension's part in the forward functions of a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._dtypes import accumulator
from ...specs import Gate, Pool
from .. import _aten
from . import fields, shapes
from .passes import Passes


class Forward(Passes):
    """The forward functions of :mod:`vovnet_fast.backends` on a half of the extension."""

    def conv(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        out: Tensor,
        *,
        stride: int = 1,
        relu: bool = True,
        pool: bool = False,
    ) -> Tensor | None:
        """See :mod:`vovnet_fast.backends`."""
        if out.numel() == 0:
            return scale.new_zeros(x.shape[0], 1, weight.shape[0]) if pool else None
        z = _aten.conv(x, weight, stride=stride)
        return self.normalize(z, scale, shift, out, relu=relu, pool=pool)

    def conv_statistics(self, x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> Tensor:
        """See :mod:`vovnet_fast.backends`."""
        if out.numel() == 0:
            return fields.new_high(x, 1, 3, weight.shape[0]).zero_()
        z = _aten.conv(x, weight, stride=stride)
        partials = fields.new_high(z, z.shape[0], self.tiles(out), 3, z.shape[3])
        self.epilogue(z, None, None, out, relu=False, statistics=partials)
        return partials.flatten(0, 1)

    def normalize(
        self,
        z: Tensor,
        scale: Tensor,
        shift: Tensor,
        out: Tensor,
        *,
        relu: bool = True,
        pool: bool = False,
    ) -> Tensor | None:
        """See :mod:`vovnet_fast.backends`; ``relu`` can be left out."""
        partials = None
        if pool:
            partials = scale.new_empty(z.shape[0], max(self.tiles(out), 1), z.shape[3])
            if out.numel() == 0:
                return partials.zero_()
        self.epilogue(z, scale, shift, out, relu=relu, pool_partials=partials)
        return partials

    def batch_norm_merge(self, partials: Tensor) -> Tensor:
        """See :mod:`vovnet_fast.backends`."""
        out, scratch = partials.new_empty(partials.shape[1:]), self._groups(partials)
        address = fields.pointer("out", out)
        self._run("batch_norm_merge", partials, out=address, **self._merging(partials, scratch))
        return out

    def batch_norm_finish(
        self, partials: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
    ) -> Tensor:
        """See :mod:`vovnet_fast.backends`."""
        c = partials.shape[2]
        norm, scratch = partials.new_empty(shapes.NORM_ROWS, c), self._groups(partials)
        self._run(
            "batch_norm_finish",
            partials,
            out=fields.pointer("out", norm),
            gamma=fields.array("gamma", gamma, c),
            beta=fields.array("beta", beta, c),
            eps=eps,
            **self._merging(partials, scratch),
        )
        return norm

    def _groups(self, partials: Tensor) -> Tensor:
        """Memory for groups of statistics ``[R, 3, C]`` that are merged first; may be empty."""
        groups = self._half().merge_groups(partials.shape[0], partials.shape[2])
        return partials.new_empty(groups, *partials.shape[1:], dtype=torch.float64)

    def _merging(self, partials: Tensor, scratch: Tensor) -> dict[str, Any]:
        """Fields for merging statistics, in memory that the caller keeps until it has launched."""
        parts, _, c = partials.shape
        return dict(
            partials=fields.packed("partials", partials, accumulator(partials.dtype), parts, 3, c),
            scratch=fields.pointer("scratch", scratch),
            parts=parts,
            c=c,
            groups=scratch.shape[0],
        )

    def depthwise(self, x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> None:
        """See :mod:`vovnet_fast.backends`."""
        n, h, w, c = shape = tuple(x.shape)
        self._run(
            "depthwise",
            x,
            x=fields.view("x", x, x, *shape),
            out=fields.view("out", out, x, n, *shapes.strided(h, w, stride), c),
            weight=fields.packed("weight", weight, x.dtype, 3, 3, c),
            stride=stride,
            **fields.windows(x, out),
        )

    def gates(
        self, partials: Tensor, num_pixels: int, fc_weight: Tensor, fc_bias: Tensor, kind: Gate
    ) -> tuple[Tensor, Tensor]:
        """See :mod:`vovnet_fast.backends`."""
        n, tiles, c = partials.shape
        assert num_pixels > 0 or n == 0, "the mean over no pixels is undefined"
        out, mean = partials.new_empty(n, c), partials.new_empty(n, c)
        self._run(
            "gates",
            partials,
            partials=fields.packed("partials", partials, accumulator(partials.dtype), n, tiles, c),
            mean=fields.pointer("mean", mean),
            out=fields.pointer("out", out),
            fc_weight=fields.array("fc_weight", fc_weight, c, c),
            fc_bias=fields.array("fc_bias", fc_bias, c),
            n=n,
            tiles=tiles,
            c=c,
            num_pixels=num_pixels,
            kind=shapes.GATES[kind],
        )
        return out, mean

    def apply_gates(
        self, z: Tensor, gates: Tensor | None, identity: Tensor | None, out: Tensor
    ) -> None:
        """See :mod:`vovnet_fast.backends`."""
        n, _, _, c = shape = tuple(z.shape)
        self._run(
            "apply_gates",
            z,
            z=fields.view("z", z, z, *shape),
            out=fields.view("out", out, z, *shape),
            identity=fields.view("identity", identity, z, *shape),
            gates=fields.packed("gates", gates, accumulator(z.dtype), n, c),
            **fields.image(z),
        )

    def max_pool(self, x: Tensor, out: Tensor, mode: Pool, argmax: Tensor | None = None) -> None:
        """See :mod:`vovnet_fast.backends`."""
        n, h, w, c = shape = tuple(x.shape)
        pooled = (n, *shapes.pooled(h, w, mode), c)
        self._run(
            "max_pool",
            x,
            x=fields.view("x", x, x, *shape),
            out=fields.view("out", out, x, *pooled),
            argmax=fields.packed("argmax", argmax, torch.uint8, *pooled),
            pad=shapes.PADDING[mode],
            **fields.windows(x, out),
        )
