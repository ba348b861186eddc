"""The extension's part in the backward functions of a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dtypes import accumulator
from ...specs import Gate, Pool
from .. import _aten
from . import fields, shapes
from .passes import Passes


class Backward(Passes):
    """The backward functions of :mod:`vovnet_fast.backends` on a half of the extension."""

    def conv_input_grad(
        self,
        g: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        out: Tensor,
        *,
        stride: int = 1,
        add: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """See :mod:`vovnet_fast.backends`."""
        if out.numel() == 0:
            return
        c_out, kernel, _, c_in = weight.shape
        packed = g.new_empty(c_in, kernel, kernel, c_out)
        self.pack_transposed(weight, scale, packed)
        self.accumulate(_aten.input_grad(g, packed, out, stride), out, add, mask)

    def conv_weight_grad(
        self, x: Tensor, g: Tensor, weight: Tensor, scale: Tensor | None, *, stride: int = 1
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """See :mod:`vovnet_fast.backends`.

        ATen sums in fp32, and hands sums over in the dtype of its operands. On a GPU it is
        given fp32 copies of fp16 and bf16 ones, which tensor cores take as they are; on a CPU
        these would take several times as long, and sums are rounded as those of plain modules.
        """
        high = accumulator(x.dtype)
        if g.numel() == 0:
            products = g.new_zeros(weight.shape)
        elif x.is_cuda:
            products = _aten.weight_grad(x.to(high), g.to(high), weight, stride=stride)
        else:
            products = _aten.weight_grad(x, g, weight, stride=stride)
        return *self.pack_backward(products, weight, scale), self.channel_sums(g)

    def depthwise_input_grad(
        self,
        g: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        stride: int = 1,
        add: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """See :mod:`vovnet_fast.backends`."""
        n, h, w, c = shape = tuple(out.shape)
        self._run(
            "depthwise_input_grad",
            out,
            g=fields.view("g", g, out, n, *shapes.strided(h, w, stride), c),
            out=fields.view("out", out, out, *shape),
            add=fields.view("add", add, out, *shape),
            mask=fields.view("mask", mask, out, *shape),
            weight=fields.packed("weight", weight, out.dtype, 3, 3, c),
            stride=stride,
            **fields.windows(out, g),
        )

    def depthwise_weight_grad(self, x: Tensor, g: Tensor, *, stride: int = 1) -> Tensor:
        """See :mod:`vovnet_fast.backends`."""
        n, h, w, c = shape = tuple(x.shape)
        parts = self._parts(g)
        partials, out = fields.new_high(x, n, parts, 3, 3, c), fields.new_high(x, 3, 3, c)
        self._run(
            "depthwise_weight_grad",
            x,
            x=fields.view("x", x, x, *shape),
            g=fields.view("g", g, x, n, *shapes.strided(h, w, stride), c),
            partials=fields.pointer("partials", partials),
            out=fields.pointer("out", out),
            parts=parts,
            stride=stride,
            **fields.windows(x, g),
        )
        return out

    def gate_sums(self, dout: Tensor, y: Tensor) -> Tensor:
        """See :mod:`vovnet_fast.backends`."""
        n, _, _, c = shape = tuple(y.shape)
        parts = self._parts(y)
        partials, out = fields.new_high(y, n, parts, c), fields.new_high(y, n, c)
        self._run(
            "gate_sums",
            y,
            dout=fields.view("dout", dout, y, *shape),
            y=fields.view("y", y, y, *shape),
            partials=fields.pointer("partials", partials),
            out=fields.pointer("out", out),
            parts=parts,
            **fields.image(y),
        )
        return out

    def gates_backward(
        self,
        dgates: Tensor,
        gates: Tensor,
        mean: Tensor,
        num_pixels: int,
        fc_weight: Tensor,
        kind: Gate,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :mod:`vovnet_fast.backends`."""
        n, c = shape = tuple(gates.shape)
        high = accumulator(gates.dtype)
        assert num_pixels > 0 or n == 0, "the mean over no pixels is undefined"
        dpixel, dfc_weight = fields.new_high(gates, n, c), fields.new_high(gates, c, c)
        dfc_bias = fields.new_high(gates, c)
        self._run(
            "gates_backward",
            gates,
            dgates=fields.packed("dgates", dgates, high, *shape),
            gates=fields.packed("gates", gates, high, *shape),
            mean=fields.packed("mean", mean, high, *shape),
            fc_weight=fields.array("fc_weight", fc_weight, c, c),
            dpixel=fields.pointer("dpixel", dpixel),
            dfc_weight=fields.pointer("dfc_weight", dfc_weight),
            dfc_bias=fields.pointer("dfc_bias", dfc_bias),
            n=n,
            c=c,
            num_pixels=num_pixels,
            kind=shapes.GATES[kind],
        )
        return dpixel, dfc_weight, dfc_bias

    def apply_gates_backward(
        self, dout: Tensor, gates: Tensor | None, dpixel: Tensor | None, y: Tensor, out: Tensor
    ) -> None:
        """See :mod:`vovnet_fast.backends`."""
        n, _, _, c = shape = tuple(y.shape)
        high = accumulator(y.dtype)
        assert (gates is None) == (dpixel is None), "give both of gates and dpixel, or neither"
        self._run(
            "apply_gates_backward",
            y,
            dout=fields.view("dout", dout, y, *shape),
            y=fields.view("y", y, y, *shape),
            out=fields.view("out", out, y, *shape),
            gates=fields.packed("gates", gates, high, n, c),
            dpixel=fields.packed("dpixel", dpixel, high, n, c),
            **fields.image(y),
        )

    def max_pool_backward(self, dout: Tensor, argmax: Tensor, out: Tensor, mode: Pool) -> None:
        """See :mod:`vovnet_fast.backends`."""
        n, h, w, c = shape = tuple(out.shape)
        pooled = (n, *shapes.pooled(h, w, mode), c)
        self._run(
            "max_pool_backward",
            out,
            dout=fields.view("dout", dout, out, *pooled),
            out=fields.view("out", out, out, *shape),
            argmax=fields.packed("argmax", argmax, torch.uint8, *pooled),
            pad=shapes.PADDING[mode],
            **fields.windows(out, dout),
        )

    def batch_norm_sums(self, g: Tensor, z: Tensor, norm: Tensor) -> Tensor:
        """See :mod:`vovnet_fast.backends`."""
        n, _, _, c = shape = tuple(z.shape)
        parts = self._parts(z)
        partials, out = fields.new_high(z, n, parts, 2, c), fields.new_high(z, 2, c)
        self._run(
            "batch_norm_sums",
            z,
            g=fields.view("g", g, z, *shape),
            z=fields.view("z", z, z, *shape),
            norm=fields.packed("norm", norm, out.dtype, shapes.NORM_ROWS, c),
            partials=fields.pointer("partials", partials),
            out=fields.pointer("out", out),
            parts=parts,
            **fields.image(z),
        )
        return out

    def batch_norm_input_grad(
        self, g: Tensor, z: Tensor, norm: Tensor, sums: Tensor, gamma: Tensor | None, out: Tensor
    ) -> None:
        """See :mod:`vovnet_fast.backends`."""
        shape, c, high = tuple(z.shape), z.shape[3], accumulator(z.dtype)
        self._run(
            "batch_norm_input_grad",
            z,
            g=fields.view("g", g, z, *shape),
            z=fields.view("z", z, z, *shape),
            out=fields.view("out", out, z, *shape),
            norm=fields.packed("norm", norm, high, shapes.NORM_ROWS, c),
            sums=fields.packed("sums", sums, high, 2, c),
            gamma=fields.array("gamma", gamma, c),
            **fields.image(z),
        )
