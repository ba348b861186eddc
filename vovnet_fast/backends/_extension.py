"""The extension ``vovnet_fast._C`` (csrc/), and its ops on tensors.

It has a half for the CPU and, where it was built with nvcc, one for CUDA. Both have the
same functions, which take the structs of ``csrc/params.h``, so :class:`Ops` is written
once: memory-bound functions of :mod:`vovnet_fast.backends` are the extension's,
convolutions are ATen's, followed by one pass of the extension into the slot.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._dtypes import accumulator
from .._version import __version__
from ..specs import Gate, Pool
from . import _aten
from . import _fields as fields
from ._passes import Passes

NAME = "vovnet_fast._C"
NORM_ROWS = 6
"""Rows of a batch norm: mean, rstd, scale, shift, variance, count."""

SOURCES = ("_C", "backends._aten", "backends._extension", "backends._fields", "backends._passes")
"""Modules of this package that compute the functions of :class:`Ops`."""

_GATES = {"hard_sigmoid": 0, "sigmoid": 1}
_PADDING = {"ceil": 0, "padded": 1}
_REBUILD = (
    "pip install --force-reinstall --no-binary vovnet-fast vovnet-fast, or in a working copy: "
    "python setup.py build_ext --inplace"
)


@functools.cache
def _loaded() -> tuple[ModuleType | None, str | None]:
    """The extension, or the reason why there is none. (torch is loaded: its OpenMP is shared.)"""
    # Not find_spec(): where a working copy is installed as well, setuptools would offer its own.
    if PathFinder.find_spec(NAME, sys.modules[__name__.partition(".")[0]].__path__) is None:
        return None, (
            f"the extension {NAME} is not built, which takes a C++ compiler at installation "
            f"({_REBUILD})"
        )
    try:
        module = importlib.import_module(NAME)
    except Exception as error:  # A missing symbol, or an unknown VOVNET_FAST_CPU_ISA.
        return None, f"the extension {NAME} cannot be loaded: {error} (to rebuild it: {_REBUILD})"
    built = module.build_info()["version"]
    if built not in ("", __version__):
        return None, (
            f"the extension {NAME} was built for vovnet_fast {built}, this is {__version__} "
            f"(to rebuild it: {_REBUILD})"
        )
    return module, None


def why_not(half: str) -> str | None:
    """The reason why a half of the extension, ``cpu`` or ``cuda``, is not there, or None."""
    module, reason = _loaded()
    if module is None or hasattr(module, half):
        return reason
    return (
        f"the extension {NAME} was built without its {half} half, which takes nvcc at "
        f"installation (VOVNET_FAST_CUDA=1 says why it is not built; {_REBUILD})"
    )


def build_info() -> dict[str, Any] | None:
    """How the extension was built (``csrc/bindings.cpp``); None where there is none."""
    module, _ = _loaded()
    return None if module is None else module.build_info()


def load(half: str) -> ModuleType:
    """A half of the extension.

    Raises:
        RuntimeError: it is not there.
    """
    module, _ = _loaded()
    reason = why_not(half)
    if module is None or reason is not None:
        raise RuntimeError(str(reason))
    found: ModuleType = getattr(module, half)
    return found


def _threads(call: Callable[..., None], device: torch.device, given: dict[str, Any]) -> None:
    """Call a function of the CPU half on as many threads as torch uses."""
    assert device.type == "cpu", f"the extension's CPU half takes tensors on the CPU, not {device}"
    call(torch.get_num_threads(), **given)


def _stream(call: Callable[..., None], device: torch.device, given: dict[str, Any]) -> None:
    """Call a function of the CUDA half on torch's current stream."""
    assert device.type == "cuda", f"the extension's CUDA half takes tensors on a GPU, not {device}"
    with torch.cuda.device(device):
        call(torch.cuda.current_stream(device).cuda_stream, **given)


class Ops(Passes):
    """The functions of :mod:`vovnet_fast.backends` on a half of the extension."""

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
        fields = self._merging(partials, scratch)
        self._run("batch_norm_merge", partials, out=out.data_ptr(), **fields)
        return out

    def batch_norm_finish(
        self, partials: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
    ) -> Tensor:
        """See :mod:`vovnet_fast.backends`."""
        c = partials.shape[2]
        norm, scratch = partials.new_empty(NORM_ROWS, c), self._groups(partials)
        self._run(
            "batch_norm_finish",
            partials,
            out=norm.data_ptr(),
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
            scratch=scratch.data_ptr(),
            parts=parts,
            c=c,
            groups=scratch.shape[0],
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
            norm=fields.packed("norm", norm, out.dtype, NORM_ROWS, c),
            partials=partials.data_ptr(),
            out=out.data_ptr(),
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
            norm=fields.packed("norm", norm, high, NORM_ROWS, c),
            sums=fields.packed("sums", sums, high, 2, c),
            gamma=fields.array("gamma", gamma, c),
            **fields.image(z),
        )

    def depthwise(self, x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> None:
        """See :mod:`vovnet_fast.backends`."""
        n, h, w, c = shape = tuple(x.shape)
        self._run(
            "depthwise",
            x,
            x=fields.view("x", x, x, *shape),
            out=fields.view("out", out, x, n, *_strided(h, w, stride), c),
            weight=fields.packed("weight", weight, x.dtype, 3, 3, c),
            stride=stride,
            **fields.windows(x, out),
        )

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
            g=fields.view("g", g, out, n, *_strided(h, w, stride), c),
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
            g=fields.view("g", g, x, n, *_strided(h, w, stride), c),
            partials=partials.data_ptr(),
            out=out.data_ptr(),
            parts=parts,
            stride=stride,
            **fields.windows(x, g),
        )
        return out

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
            mean=mean.data_ptr(),
            out=out.data_ptr(),
            fc_weight=fields.array("fc_weight", fc_weight, c, c),
            fc_bias=fields.array("fc_bias", fc_bias, c),
            n=n,
            tiles=tiles,
            c=c,
            num_pixels=num_pixels,
            kind=_GATES[kind],
        )
        return out, mean

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
            partials=partials.data_ptr(),
            out=out.data_ptr(),
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
            dpixel=dpixel.data_ptr(),
            dfc_weight=dfc_weight.data_ptr(),
            dfc_bias=dfc_bias.data_ptr(),
            n=n,
            c=c,
            num_pixels=num_pixels,
            kind=_GATES[kind],
        )
        return dpixel, dfc_weight, dfc_bias

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

    def max_pool(self, x: Tensor, out: Tensor, mode: Pool, argmax: Tensor | None = None) -> None:
        """See :mod:`vovnet_fast.backends`."""
        n, h, w, c = shape = tuple(x.shape)
        pooled = (n, *_pooled(h, w, mode), c)
        self._run(
            "max_pool",
            x,
            x=fields.view("x", x, x, *shape),
            out=fields.view("out", out, x, *pooled),
            argmax=fields.packed("argmax", argmax, torch.uint8, *pooled),
            pad=_PADDING[mode],
            **fields.windows(x, out),
        )

    def max_pool_backward(self, dout: Tensor, argmax: Tensor, out: Tensor, mode: Pool) -> None:
        """See :mod:`vovnet_fast.backends`."""
        n, h, w, c = shape = tuple(out.shape)
        pooled = (n, *_pooled(h, w, mode), c)
        self._run(
            "max_pool_backward",
            out,
            dout=fields.view("dout", dout, out, *pooled),
            out=fields.view("out", out, out, *shape),
            argmax=fields.packed("argmax", argmax, torch.uint8, *pooled),
            pad=_PADDING[mode],
            **fields.windows(out, dout),
        )


def _strided(height: int, width: int, stride: int) -> tuple[int, int]:
    """Size of the output of a 3x3 convolution, padded by one."""
    assert stride in (1, 2), f"no kernel with stride {stride}"
    return (height - 1) // stride + 1, (width - 1) // stride + 1


def _pooled(height: int, width: int, mode: Pool) -> tuple[int, int]:
    """Size of the output of a max pool."""
    if mode == "padded":
        return (height - 1) // 2 + 1, (width - 1) // 2 + 1
    return height // 2, width // 2


CPU = Ops(functools.partial(load, "cpu"), _threads)
CUDA = Ops(functools.partial(load, "cuda"), _stream)
