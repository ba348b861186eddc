"""What the benchmarks run: networks, shapes, and the convolution layers inside them."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from vovnet_fast import VoVNet, _optional, backends, use_backend
from vovnet_fast.backends import conv_sm80, conv_sm90, depthwise_conv
from vovnet_fast.backends._extension.passes import Passes
from vovnet_fast.backends.cpu import convolution
from vovnet_fast.network.fusing import Fusable
from vovnet_fast.ops._checks import nhwc
from vovnet_fast.ops.features import run
from vovnet_fast.tools.bench.training import Shape, image
from vovnet_fast.tools.plan import AtenRecorder, plan_forward

if TYPE_CHECKING:
    from vovnet_fast.kernels._common import Launch

SPECS = ("V-39-eSE", "V-99-eSE", "V-19-slim-dw-eSE")
SHAPES: tuple[Shape, ...] = ((1, 800, 1344), (6, 320, 800), (6, 640, 1600), (8, 224, 224))
"""A detector's image, PETR's six cameras at two sizes, a batch for classification."""

MORE_SPECS = ("V-57-eSE", "V-19-eSE", "V-19-slim-eSE", "V-19-dw-eSE")
MORE_SHAPES: tuple[Shape, ...] = ((8, 800, 1344), (1, 224, 224))
"""What the benchmarks have besides, and nothing is compiled for beforehand."""

HEADLINE: tuple[tuple[str, Shape], ...] = (
    ("V-99-eSE", (6, 640, 1600)),
    ("V-99-eSE", (8, 800, 1344)),
    ("V-39-eSE", (1, 800, 1344)),
)
"""What counts most: PETR's six cameras, a node's batch of a detector, one image of it."""

TIMM = {
    "V-39-eSE": "ese_vovnet39b",
    "V-57-eSE": "ese_vovnet57b",
    "V-99-eSE": "ese_vovnet99b",
    "V-19-dw-eSE": "ese_vovnet19b_dw",
    "V-19-slim-eSE": "ese_vovnet19b_slim",
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


# --------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------


TRAINING_SPECS = ("V-39-eSE", "V-99-eSE")
TRAINING_SHAPES: tuple[Shape, ...] = ((2, 800, 1344), (6, 640, 1600))
"""Two of a detector's images, PETR's six cameras."""

MORE_TRAINING_SHAPES: tuple[Shape, ...] = ((6, 320, 800), (32, 224, 224))


def build_training(spec: str, device: torch.device, *, with_cp: bool = False) -> VoVNet:
    """A network in training mode, batch norms with fixed statistics, fp32, ``channels_last``."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = VoVNet(spec, with_cp=with_cp)
    return cast(VoVNet, model.to(memory_format=torch.channels_last).train())


def fold_in_graph(model: VoVNet) -> VoVNet:
    """Fold fixed batch norms into weights at every call, as mmengine's efficient_conv_bn_eval.

    Autograd then keeps no input of a batch norm, and still has gradients of its parameters.
    """
    for part in model.modules():
        for _, conv, norm in part.conv_layers().values() if isinstance(part, Fusable) else ():
            conv.forward = functools.partial(_conv_and_norm, conv, norm)
            norm.forward = lambda x: x
    return model


def fold_ahead(model: VoVNet) -> VoVNet:
    """Fold fixed batch norms into weights and biases for good, rounding once: for inference.

    What every deployment does by hand, and torch.compile's freezing by itself.
    """
    for part in model.modules():
        for _, conv, norm in part.conv_layers().values() if isinstance(part, Fusable) else ():
            dtype, bias = conv.weight.dtype, conv.bias
            weight, bias = fuse_conv_bn_weights(
                conv.weight.float(),
                None if bias is None else bias.float(),
                norm.running_mean.float(),
                norm.running_var.float(),
                norm.eps,
                norm.weight.float(),
                norm.bias.float(),
            )
            conv.weight, conv.bias = (nn.Parameter(t.to(dtype), False) for t in (weight, bias))
            norm.forward = lambda x: x
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _conv_and_norm(conv: nn.Conv2d, norm: Any, x: Tensor) -> Tensor:
    """A convolution whose weights take the fixed batch norm after it along."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    shift = shift if conv.bias is None else shift + conv.bias * scale
    weight = conv.weight * scale[:, None, None, None]
    return nn.functional.conv2d(x, weight, shift, conv.stride, cast(Any, conv.padding))


@functools.cache
def counted(spec: str, shape: Shape, dtype: str) -> dict[str, Any]:
    """What a forward pass has to do and move (:mod:`vovnet_fast.tools.plan`), if there is Triton.

    Returns:
        ``flop`` and ``bytes`` of the fused path, and ``launches`` by path, fused and eager.
    """
    if _optional.why_not("triton") is not None:
        return {}
    with torch.inference_mode(False):
        plan = plan_forward(spec, shape, dtype=dtype)
    return {
        "flop": plan.fused.total.flop,
        "bytes": plan.fused.total.bytes_moved,
        "launches": {p: getattr(plan, p).total.launches for p in ("fused", "eager")},
    }


def operations(work: Callable[[], Any]) -> int:
    """ATen operations of a call on plain PyTorch that move memory: each is a launch."""
    with _counting() as recorder, use_backend("reference"), recorder:
        work()
    return len(recorder.works)


def extension_launches(
    backend: str, spec: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> int:
    """Launches of a forward pass on ``cpu`` or ``cuda``, counted in one that is run.

    These are the calls of the extension's functions (of which some launch two kernels of a GPU),
    and ATen's operations between them. Weights are folded and packed before.
    """
    with _counting() as recorder:
        model = build(spec, dtype, device)
        params, images = model.fold(dtype).packed(dtype), nhwc(image(shape, dtype, device))
        module = backends._module(backend)
        with _calls() as called, recorder:
            run(module, images, params, model.out_features)
    return len(called) + len(recorder.works)


@contextlib.contextmanager
def _counting() -> Iterator[AtenRecorder]:
    with torch.inference_mode(False), torch.no_grad():
        yield AtenRecorder()


@contextlib.contextmanager
def _calls() -> Iterator[list[str]]:
    """Collects the extension's functions that are called: passes, and its own convolutions."""
    found: list[str] = []
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (Passes, "_run"), (convolution, "run_engine"), (conv_sm80, "run"), (conv_sm90, "run"),
            (depthwise_conv, "run"),
        ):  # fmt: skip
            noted = _noting(found, getattr(owner, name), name)
            stack.enter_context(mock.patch.object(owner, name, noted))
        yield found


def _noting(found: list[str], function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def noted(*args: Any, **options: Any) -> Any:
        found.append(name)
        return function(*args, **options)

    return noted


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

    def gates(self, partials: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return partials[:, 0], partials[:, 0]

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


# --------------------------------------------------------------------------------------
# Launches
# --------------------------------------------------------------------------------------


def launches(spec: str, shape: Shape, *, training: bool = False) -> list[Launch]:
    """Everything that a fused network and its tuning can launch, on meta tensors.

    Activations are in bf16; weights too, and in training, which is then forward and backward
    pass, in fp32.
    """
    from vovnet_fast.tools.compile import needed

    run = needed.Run(spec, shape, mode="training" if training else "inference")
    return needed.plan(run, needed.Setting()).launches


# --------------------------------------------------------------------------------------
# timm
# --------------------------------------------------------------------------------------


def build_timm(spec: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """timm's network of the same name with the last four features, ``channels_last``."""
    import timm  # Optional: with torchvision, which it wants, the largest thing here.

    with torch.device(device):
        model = timm.create_model(TIMM[spec], features_only=True, out_indices=(1, 2, 3, 4))
    return model.to(dtype=dtype, memory_format=torch.channels_last).eval()
