"""What the benchmarks run: networks, shapes, and the convolution layers inside them."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vovnet_fast import VoVNet
from vovnet_fast.ops._checks import nhwc
from vovnet_fast.ops.features import run
from vovnet_fast.plan import plan_forward

if TYPE_CHECKING:
    from vovnet_fast.kernels._common import Launch

Shape = tuple[int, int, int]
"""N, H, W of images with three channels."""

SPECS = ("V-39-eSE", "V-99-eSE", "V-19-slim-dw-eSE")
SHAPES: tuple[Shape, ...] = ((1, 800, 1344), (6, 320, 800), (6, 640, 1600), (8, 224, 224))
"""A detector's image, PETR's six cameras at two sizes, a batch for classification."""

SMALL: tuple[str, Shape] = ("V-19-slim-dw-eSE", (1, 128, 128))
"""What a CPU is given."""

TIMM = {
    "V-39-eSE": "ese_vovnet39b",
    "V-99-eSE": "ese_vovnet99b",
    "V-19-slim-dw-eSE": "ese_vovnet19b_slim_dw",
}
"""timm's nearest: the same convolutions, but a gate in the last block of a stage only."""


def text(shape: Shape) -> str:
    """``1x3x800x1344``."""
    return f"{shape[0]}x3x{shape[1]}x{shape[2]}"


def build(spec: str, dtype: torch.dtype, device: torch.device) -> VoVNet:
    """A network in eval mode, ``channels_last``: the same weights for the same arguments."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = VoVNet(spec)
    return cast(VoVNet, model.to(dtype=dtype, memory_format=torch.channels_last).eval())


def image(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[N, 3, H, W]`` of normal numbers, ``channels_last``."""
    torch.manual_seed(1)
    x = torch.randn(shape[0], 3, *shape[1:], device=device, dtype=dtype)
    return x.to(memory_format=torch.channels_last)


@functools.cache
def counted(spec: str, shape: Shape) -> dict[str, float]:
    """Bounds of the fused path in bf16 from :mod:`vovnet_fast.plan`, at an H200's rates."""
    with torch.inference_mode(False):
        total = plan_forward(spec, shape, dtype="bf16").fused.total
    return {
        "floor_ms": total.floor_seconds * 1e3,
        "gflop": total.flop / 1e9,
        "gbytes": total.bytes_moved / 1e9,
        "launches": total.launches,
    }


# --------------------------------------------------------------------------------------
# Convolution layers
# --------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Shape and strides of an ``[N, H, W, C]`` view."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor that lies as the view does, at the beginning of memory of its own."""
        return torch.empty_strided(self.shape, self.stride, dtype=dtype, device=device)


class Layer(NamedTuple):
    """A convolution as a network asks for it: from a slot into a slot.

    Attributes:
        x: the input.
        weight: ``[C_out, K, K, C_in]``.
        out: the output.
        stride: 1 or 2.
        pool: with the partial sums of eSE's pool.
    """

    x: Layout
    weight: tuple[int, int, int, int]
    out: Layout
    stride: int
    pool: bool

    @property
    def name(self) -> str:
        """``3x3 128>128 on 1x200x336``; a stride of 2 and a pool are named too."""
        c_out, kernel, _, c_in = self.weight
        found = f"{kernel}x{kernel} {c_in}>{c_out} on {'x'.join(map(str, self.x.shape[:3]))}"
        return f"{found}{' stride 2' if self.stride == 2 else ''}{' pool' if self.pool else ''}"

    @property
    def flop(self) -> int:
        """Two a multiply-add."""
        n, h, w, _ = self.out.shape
        c_out, kernel, _, c_in = self.weight
        return 2 * n * h * w * c_out * kernel**2 * c_in

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """x, weight, scale, shift and out, uninitialised."""
        vector = torch.empty(2, self.weight[0], device=device)
        weight = torch.empty(self.weight, dtype=dtype, device=device)
        return (self.x.empty(dtype, device), weight, *vector, self.out.empty(dtype, device))


class _Listener:
    """A backend that computes nothing and notes the convolutions that it is asked for."""

    def __init__(self) -> None:
        self.layers: dict[str, Layer] = {}

    def conv(
        self, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, out: Tensor,
        *, stride: int = 1, relu: bool = True, pool: bool = False,
    ) -> Tensor | None:  # fmt: skip
        views = (Layout(tuple(view.shape), view.stride()) for view in (x, out))
        shape = cast(tuple[int, int, int, int], tuple(weight.shape))
        layer = Layer(next(views), shape, next(views), stride, pool)
        self.layers.setdefault(layer.name, layer)
        return scale.new_empty(x.shape[0], 1, weight.shape[0]) if pool else None

    def gates(self, partials: Tensor, *_: Any) -> Tensor:
        return partials[:, 0]

    def depthwise(self, *_: Any, **__: Any) -> None: ...

    apply_gates = max_pool = depthwise


def layers(spec: str, shape: Shape) -> dict[str, Layer]:
    """The different convolution layers of a network by name, in network order."""
    listener = _Listener()
    with torch.device("meta"), torch.no_grad():
        model = VoVNet(spec).to(torch.bfloat16).eval()
        x = torch.empty(shape[0], 3, *shape[1:], dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last)
        backend = cast(types.ModuleType, listener)
        run(backend, nhwc(x), model.fold(torch.bfloat16), model.out_features)
    return listener.layers


def launches(spec: str, shape: Shape) -> Iterator[Launch]:
    """Everything that a fused network and its tuning can launch in bf16, on meta tensors."""
    from vovnet_fast.backends import triton as backend
    from vovnet_fast.kernels import conv
    from vovnet_fast.kernels._common import recording

    meta, bf16 = torch.device("meta"), torch.bfloat16
    with recording() as rest, torch.device("meta"), torch.no_grad():
        model = VoVNet(spec).to(bf16).eval()
        view = torch.empty(shape[0], *shape[1:], 3, dtype=bf16)
        run(backend, view, model.fold(bf16), model.out_features)
    for layer in layers(spec, shape).values():
        x, weight, scale, shift, out = layer.tensors(bf16, meta)
        options: dict[str, Any] = dict(stride=layer.stride)
        with recording() as rest_of_aten:
            backend.run_engine(
                backend.ATEN, x, weight, scale, shift, out,
                relu=True, pool=layer.pool, **options,
            )  # fmt: skip
        rest += rest_of_aten
        for config in conv.choices(x, weight, out, **options)[0]:
            partials = None
            if layer.pool:
                tiles = conv.pool_tiles(x, weight, out, config=config, **options)
                partials = scale.new_empty(x.shape[0], tiles, weight.shape[0])
            yield conv.plan(
                x, weight, scale, shift, out, pool_partials=partials, config=config, **options
            )
    yield from (launch for launch in rest if not launch.kernel.fn.__name__.startswith("conv"))


# --------------------------------------------------------------------------------------
# timm
# --------------------------------------------------------------------------------------


def build_timm(spec: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """timm's network of the same name with the last four features, ``channels_last``."""
    import timm  # Optional: with torchvision, which it wants, the largest thing here.

    with torch.device(device):
        model = timm.create_model(TIMM[spec], features_only=True, out_indices=(1, 2, 3, 4))
    return model.to(dtype=dtype, memory_format=torch.channels_last).eval()
