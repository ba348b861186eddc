"""The extension's passes that follow ATen's convolutions, or prepare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._dtypes import accumulator
from . import fields

TILE_PIXELS = 256
"""Pixels of a pool partial, and of a part of the statistics; ``csrc/params.h`` has it as well."""

Launch = Callable[[Callable[..., None], torch.device, dict[str, Any]], None]
"""Calls a function of the extension for tensors of a device, with fields of its struct."""


class Passes:
    """Functions of a half of the extension.

    Args:
        half: returns ``_C.cpu`` or ``_C.cuda``, or a module with its functions.
        launch: calls one of them.
    """

    def __init__(
        self,
        half: Callable[[], Any],
        launch: Launch,
    ) -> None:
        self._half, self._launch = half, launch

    def _run(self, name: str, like: Tensor, **given: Any) -> None:
        """Run a function; fields without a dtype get that of ``like``."""
        given.setdefault("dtype", fields.DTYPES[like.dtype])
        self._launch(getattr(self._half(), name), like.device, given)

    def call(self, name: str, device: torch.device, **given: Any) -> None:
        """Call a function of the half for tensors of ``device``, with all fields of its struct."""
        self._launch(getattr(self._half(), name), device, given)

    def _parts(self, x: Tensor) -> int:
        """Into how many parts a reduction divides the pixels of an image."""
        parts: int = self._half().reduction_parts(*x.shape)
        return parts

    def tiles(self, out: Tensor) -> int:
        """Number of pool partials, or of statistics, of an image in :meth:`epilogue`."""
        return -(-out.shape[1] * out.shape[2] // TILE_PIXELS)

    def epilogue(
        self,
        z: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        out: Tensor,
        *,
        relu: bool = True,
        pool_partials: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> None:
        """out = relu(z * scale + shift), computed in fp32 (fp64 for fp64).

        Args:
            z: ``[N, H, W, C]`` view, a convolution's raw output.
            scale, shift: ``[C]``, fp32 (fp64 for fp64), or both None, for a copy without ReLU.
            out: as ``z``, same dtype; may be ``z`` itself, which is then not copied.
            relu: apply it; NaN stays NaN.
            pool_partials: ``[N, T, C]``, dtype of sums, contiguous, with T from :meth:`tiles`,
                or None: receives sums over the pixels.
            statistics: ``[N, T, 3, C]``, likewise, of a ``z`` without scale and shift.
        """
        n, _, _, c = shape = tuple(z.shape)
        high, tiles = accumulator(z.dtype), self.tiles(out)
        assert (scale is None) == (shift is None), "give both of scale and shift, or neither"
        assert scale is not None or not relu, "a ReLU comes with scale and shift"
        assert scale is not None or pool_partials is None, "pool partials come with scale and shift"
        assert scale is None or statistics is None, "statistics are those of z without a scale"
        self._run(
            "epilogue",
            z,
            z=fields.view("z", z, z, *shape),
            out=fields.view("out", out, z, *shape),
            scale=fields.packed("scale", scale, high, c),
            shift=fields.packed("shift", shift, high, c),
            pool_partials=fields.packed("pool_partials", pool_partials, high, n, tiles, c),
            statistics=fields.packed("statistics", statistics, high, n, tiles, 3, c),
            relu=int(relu),
            **fields.image(z),
        )

    def accumulate(
        self, z: Tensor, out: Tensor, add: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """out = mask(z + add), as in ``conv_input_grad``; out may be z or add itself."""
        n, h, w, c = shape = tuple(z.shape)
        add_c, mask_c = (0 if view is None else view.shape[3] for view in (add, mask))
        assert max(add_c, mask_c) <= c, f"add has {add_c}, mask {mask_c} channels, z has {c}"
        self._run(
            "accumulate",
            z,
            z=fields.view("z", z, z, *shape),
            out=fields.view("out", out, z, *shape),
            add=fields.view("add", add, z, n, h, w, add_c),
            mask=fields.view("mask", mask, z, n, h, w, mask_c),
            add_c=add_c,
            mask_c=mask_c,
            **fields.image(z),
        )

    def channel_sums(self, g: Tensor) -> Tensor:
        """Sums of ``[N, H, W, C]`` over images and pixels: ``[C]``."""
        parts = self._parts(g)
        partials, out = (
            fields.new_high(g, g.shape[0], parts, g.shape[3]),
            fields.new_high(g, g.shape[3]),
        )
        self._run(
            "channel_sums",
            g,
            g=fields.view("g", g, g, *g.shape),
            partials=fields.pointer("partials", partials),
            out=fields.pointer("out", out),
            parts=parts,
            **fields.image(g),
        )
        return out

    def pack(self, weight: Tensor, scale: Tensor | None, out: Tensor) -> None:
        """out = weight * scale, rounded once.

        Args:
            weight: ``[C_out, K, K, C_in]`` view, any strides, any floating dtype.
            scale: ``[C_out]``, any floating dtype, or None for one.
            out: of the shape of ``weight``, contiguous.
        """
        self._pack("pack", weight, scale, out, tuple(weight.shape))

    def pack_transposed(self, weight: Tensor, scale: Tensor | None, out: Tensor) -> None:
        """out[i, h, w, o] = weight[o, K-1-h, K-1-w, i] * scale[o]; arguments as :meth:`pack`."""
        c_out, kernel, _, c_in = weight.shape
        self._pack("pack_transposed", weight, scale, out, (c_in, kernel, kernel, c_out))

    def _pack(
        self, name: str, weight: Tensor, scale: Tensor | None, out: Tensor, shape: Sequence[int]
    ) -> None:
        assert weight.shape[1] == weight.shape[2], f"no square kernel: {tuple(weight.shape)}"
        self._run(
            name,
            out,
            weight=(fields.pointer("weight", weight), fields.DTYPES[weight.dtype]),
            scale=fields.array("scale", scale, weight.shape[0]),
            out=fields.packed("out", out, out.dtype, *shape),
            **fields.weight_strides(weight),
        )

    def pack_backward(
        self, products: Tensor, weight: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of weight and scale, from that of their product.

        Args:
            products: ``[C_out, K, K, C_in]`` view, any strides, any floating dtype.
            weight: of this shape, contiguous, any floating dtype.
            scale: ``[C_out]``, fp32 (fp64 for fp64), or None for one, which has no gradient.
        """
        high = accumulator(products.dtype)
        dweight = torch.empty_like(weight, dtype=high)
        dscale = None if scale is None else torch.empty_like(scale)
        self._run(
            "pack_backward",
            dweight,
            products=(fields.pointer("products", products), fields.DTYPES[products.dtype]),
            weight=None if scale is None else fields.array("weight", weight, *products.shape),
            scale=fields.packed("scale", scale, high, weight.shape[0]),
            dweight=fields.packed("dweight", dweight, high, *products.shape),
            dscale=fields.packed("dscale", dscale, high, weight.shape[0]),
            **fields.weight_strides(products),
        )
        return dweight, dscale
