"""What a forward pass has to do, counted without running it: launches, FLOP, bytes, a floor.

The fused path is counted from its own launches: the orchestration of
:mod:`vovnet_fast.ops` runs on meta tensors, which have shapes and no memory, and the
launches that it decides are collected instead of run. Eager is counted from the ATen
operations that the same model dispatches on meta tensors.

Bytes are compulsory traffic: each operand of a launch once, however often a kernel
reads it, as if no cache kept anything from one launch to the next. FLOP are those of
convolutions and fully connected layers, two a multiply-add.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import _optional, backends
from ..network.layers import ESE
from ..network.model import VoVNet
from ..ops._checks import nhwc
from ..ops.features import run as run_features
from ..specs import VoVNetSpec

if TYPE_CHECKING:
    from ..kernels._common import Launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

IMAGE_CHANNELS = 3

H200_TFLOPS = 790.0
"""Measured bf16 matrix multiplication rate of an H200, in 1e12 FLOP/s."""

H200_TBS = 4.3
"""Measured copy bandwidth of an H200, read and written, in 1e12 bytes/s."""

_POINTWISE = "gate + identity"
_ESE = "eSE pool + FC"
_POOL = "max pool"
_DEPTHWISE = "depthwise 3x3"
_ESE_BACKWARD = "eSE backward"
_STATISTICS = "batch statistics"
_NORM_BACKWARD = "batch norm backward"
_KINDS = (
    "conv 3x3",
    "conv 1x1",
    _DEPTHWISE,
    "batch norm",
    "scale, shift, ReLU",
    "ReLU",
    "cat",
    _ESE,
    _POINTWISE,
    _POOL,
)
"""Order of the rows; kinds that are not here come last, in the order in which they ran."""


@dataclass(frozen=True)
class Work:
    """What one launch has to do: its kind, FLOP, and bytes read and written."""

    kind: str
    flop: int
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Rates:
    """What a device can do at most.

    Attributes:
        tflops: matrix multiplication in the dtype of the activations, 1e12 FLOP/s.
        tbs: memory traffic, read and written together, 1e12 bytes/s.

    Raises:
        ValueError: a rate is not positive and finite.
    """

    tflops: float = H200_TFLOPS
    tbs: float = H200_TBS

    def __post_init__(self) -> None:
        for name, rate in (("matrix rate", self.tflops), ("bandwidth", self.tbs)):
            if not 0 < rate < math.inf:
                raise ValueError(f"the {name} must be positive and finite, got {rate}")

    def floor(self, work: Work) -> float:
        """Seconds below which ``work`` cannot be done."""
        moved = work.bytes_read + work.bytes_written
        return max(work.flop / self.tflops, moved / self.tbs) * 1e-12


@dataclass(frozen=True)
class Row:
    """All launches of one kind.

    Attributes:
        kind: in words.
        launches: how many.
        flop: their FLOP.
        bytes_read: bytes they read.
        bytes_written: bytes they write.
        floor_seconds: sum over them of the longer of arithmetic and traffic.
    """

    kind: str
    launches: int
    flop: int
    bytes_read: int
    bytes_written: int
    floor_seconds: float

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Tally:
    """A forward pass on one path: a row a kind of launch."""

    rows: tuple[Row, ...]

    @property
    def total(self) -> Row:
        """The sum of all rows."""
        names = ("launches", "flop", "bytes_read", "bytes_written", "floor_seconds")
        return Row("total", *(sum(getattr(row, name) for row in self.rows) for name in names))


@dataclass(frozen=True)
class Plan:
    """A forward pass of one network on one input, fused and eager.

    Attributes:
        spec: canonical name of the architecture.
        shape: N, H, W of the images.
        dtype: a key of :data:`DTYPES`.
        rates: those of which the floors are made.
        fused: from the launches of the Triton backend.
        eager: from the ATen operations of the plain modules, one launch each.
    """

    spec: str
    shape: tuple[int, int, int]
    dtype: str
    rates: Rates
    fused: Tally
    eager: Tally

    def as_dict(self) -> dict[str, Any]:
        """Everything, and the totals, as what JSON can hold. Units: FLOP, bytes, seconds."""
        found = asdict(self)
        found["measured"] = False  # Bounds from counts: nothing has run.
        for name in ("fused", "eager"):
            found[name]["total"] = asdict(getattr(self, name).total)
        return found


def plan_forward(
    spec: str | VoVNetSpec,
    shape: tuple[int, int, int],
    *,
    dtype: str = "bf16",
    rates: Rates | None = None,
) -> Plan:
    """Count a forward pass in inference, from ``channels_last`` images to the four stages.

    Batch norms are taken as folded already: folding depends on parameters only.
    No GPU is needed; tiles are chosen as for a GPU of compute capability 9.0.

    Args:
        spec: an architecture or its name.
        shape: N, H, W of the images, which have three channels.
        dtype: of images and parameters, a key of :data:`DTYPES`.
        rates: of the device, an H200 by default. That default is a bf16 rate: for
            ``fp32`` the floor is then true, but too low.

    Raises:
        UnknownSpecError: no architecture has that name.
        ValueError: a size below 1, images too small for the network, unknown dtype.
        BackendError: Triton is not installed, or cannot be imported.
    """
    reason = _optional.why_not("triton")
    if reason is not None:
        raise backends.BackendError(
            f"the launches of the fused path are planned with Triton: {reason}"
        )
    check_input(shape, dtype)
    rates = rates or Rates()
    batch, height, width = shape
    with torch.device("meta"), torch.no_grad():
        model = VoVNet(spec, input_ch=IMAGE_CHANNELS).to(DTYPES[dtype]).eval()
        image = torch.empty(batch, IMAGE_CHANNELS, height, width, dtype=DTYPES[dtype])
        image = image.to(memory_format=torch.channels_last)
        eager = _eager_work(model, image)
        fused = _fused_work(model, image)
    return Plan(model.spec.name, shape, dtype, rates, _tally(fused, rates), _tally(eager, rates))


def check_input(shape: tuple[int, int, int], dtype: str) -> None:
    """Refuse sizes below 1, and what is no key of :data:`DTYPES`, with a ValueError."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if min(shape) < 1:
        raise ValueError(f"N, H and W must be at least 1, got {tuple(shape)}")


def _tally(works: Iterable[Work], rates: Rates) -> Tally:
    """Add up by kind."""
    groups: dict[str, list[Work]] = {kind: [] for kind in _KINDS}
    for work in works:
        groups.setdefault(work.kind, []).append(work)
    return Tally(
        tuple(
            Row(
                kind,
                len(group),
                sum(work.flop for work in group),
                sum(work.bytes_read for work in group),
                sum(work.bytes_written for work in group),
                sum(rates.floor(work) for work in group),
            )
            for kind, group in groups.items()
            if group
        )
    )


def _bytes(operands: Iterable[Any]) -> int:
    """Bytes of the tensors among ``operands``; one that is passed twice counts once."""
    tensors = {id(value): value for value in operands if isinstance(value, Tensor)}
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


# --------------------------------------------------------------------------------------
# Fused
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kernel:
    """How to read a launch of one Triton kernel.

    Attributes:
        kind: with the kernel's constants in braces.
        outputs: arguments that it writes, the result first. It reads all others.
        multiply_adds: for one element of the result, from the kernel's arguments by name.
    """

    kind: str
    outputs: tuple[str, ...] = ("out_ptr",)
    multiply_adds: Callable[[dict[str, Any]], int | Fraction] = field(default=lambda arguments: 0)


def conv_weight(arguments: dict[str, Any]) -> Tensor:
    """The weights that a convolution kernel is given, ``[C_out, K, K, C_in]`` or flattened."""
    return arguments["w_ptr"] if "w_ptr" in arguments else arguments["w_desc_0"].base


def _conv_multiply_adds(arguments: dict[str, Any]) -> int:
    every = conv_weight(arguments)[0].numel()
    # An input pixel has met one tap in four of a transposed convolution, on average.
    return every // arguments["STRIDE"] ** 2 if arguments.get("TRANSPOSED") else every


def _inputs_of_fc(arguments: dict[str, Any]) -> int:
    return arguments["weight_ptr"].shape[1]


def _pixels_of_a_split(arguments: dict[str, Any]) -> Fraction:
    """What each partial sum of a weight gradient is over, on average."""
    n, height, width, _ = arguments["g_ptr"].shape
    return Fraction(n * height * width, arguments["products_ptr"].shape[0])


_CONV = "conv {KERNEL}x{KERNEL}"
_WEIGHT_GRAD = "conv {KERNEL}x{KERNEL} weights"
_KERNELS = {
    "conv_pointer_kernel": _Kernel(
        _CONV, ("out_ptr", "pool_ptr", "statistics_ptr"), _conv_multiply_adds
    ),
    "conv_tma_kernel": _Kernel(
        _CONV, ("out_desc_0", "out_desc_1", "pool_ptr", "statistics_ptr"), _conv_multiply_adds
    ),
    "depthwise_kernel": _Kernel(_DEPTHWISE, multiply_adds=lambda arguments: 9),
    "epilogue_kernel": _Kernel("scale, shift, ReLU", ("out_ptr", "pool_ptr", "statistics_ptr")),
    "accumulate_kernel": _Kernel("add + ReLU backward"),
    "transpose_kernel": _Kernel("transpose weights"),
    "finish_pool_kernel": _Kernel(_ESE, ("mean_ptr",)),
    "fc_gate_kernel": _Kernel(_ESE, multiply_adds=_inputs_of_fc),
    "apply_kernel": _Kernel(_POINTWISE),
    "max_pool_kernel": _Kernel(_POOL, ("out_ptr", "argmax_ptr")),
    "gate_sums_kernel": _Kernel(_ESE_BACKWARD, ("partials_ptr",)),
    "fc_input_grad_kernel": _Kernel(_ESE_BACKWARD, multiply_adds=_inputs_of_fc),
    "fc_weight_grad_kernel": _Kernel(
        _ESE_BACKWARD,
        ("dweight_ptr", "dbias_ptr"),
        multiply_adds=lambda arguments: arguments["batch"],
    ),
    "apply_backward_kernel": _Kernel("gate backward + ReLU backward"),
    "max_pool_backward_kernel": _Kernel("max pool backward"),
    "conv_weight_grad_pointer_kernel": _Kernel(
        _WEIGHT_GRAD, ("products_ptr", "sums_ptr"), _pixels_of_a_split
    ),
    "conv_weight_grad_tma_kernel": _Kernel(
        _WEIGHT_GRAD, ("products_ptr", "sums_ptr"), _pixels_of_a_split
    ),
    "finish_weight_grad_kernel": _Kernel(
        "finish weight gradients", ("dweight_ptr", "dscale_ptr", "dshift_ptr")
    ),
    "channel_sums_kernel": _Kernel("sums of gradients", ("sums_ptr",)),
    "depthwise_input_grad_kernel": _Kernel(
        _DEPTHWISE,
        multiply_adds=lambda arguments: Fraction(
            9 * arguments["g_ptr"].numel(), arguments["out_ptr"].numel()
        ),
    ),
    "depthwise_weight_grad_kernel": _Kernel(
        _DEPTHWISE + " weights", ("products_ptr",), _pixels_of_a_split
    ),
    "merge_statistics_kernel": _Kernel(_STATISTICS),
    "finish_norm_kernel": _Kernel(_STATISTICS),
    "norm_sums_kernel": _Kernel(_NORM_BACKWARD, ("partials_ptr",)),
    "norm_input_grad_kernel": _Kernel(_NORM_BACKWARD),
    "sum_rows_kernel": _Kernel("sums of partials"),
}


def launch_work(launch: Launch) -> Work:
    """What a launch of a Triton kernel has to do.

    Args:
        launch: on meta tensors or others: only their shapes matter. Under
            :func:`vovnet_fast.kernels._common.recording` launches are collected.

    Raises:
        LookupError: the kernel is not in :data:`_KERNELS`, or not as it is there.
    """
    name = launch.kernel.fn.__name__
    kernel = _KERNELS.get(name)
    if kernel is None or not set(kernel.outputs) <= set(launch.args):
        raise LookupError(
            f"{name} with arguments {', '.join(launch.args)} is not what _KERNELS in "
            f"{__name__} says: write there which of them it writes"
        )
    # A tensor descriptor keeps its tensor as its base.
    operands = {name: getattr(value, "base", value) for name, value in launch.args.items()}
    outputs = [operands.pop(name) for name in kernel.outputs]
    return Work(
        kernel.kind.format(**launch.constants),
        int(2 * outputs[0].numel() * kernel.multiply_adds(launch.args | launch.constants)),
        _bytes(operands.values()),
        _bytes(outputs),
    )


def _fused_work(model: VoVNet, image: Tensor) -> list[Work]:
    """The launches of the Triton backend, and any ATen operation between them."""
    from ..backends import triton
    from ..kernels._common import recording

    params = model.fold(image.dtype).packed(image.dtype)
    with AtenRecorder() as recorder, recording() as launches:
        run_features(triton, nhwc(image), params, model.out_features)
    return [launch_work(launch) for launch in launches] + recorder.works


# --------------------------------------------------------------------------------------
# Eager
# --------------------------------------------------------------------------------------

_MOVE_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_MOVE_NOTHING |= {"as_strided_", "set_"}  # Views in place. Autograd uses the latter for outputs.
_OVERWRITE = {"copy_", "fill_", "zero_"}  # They write their first argument without reading it.
_ATEN_KINDS = {
    "native_batch_norm": "batch norm",
    "relu": "ReLU",
    "mul": _POINTWISE,
    "add": _POINTWISE,
    "max_pool2d_with_indices": _POOL,  # Writes 8 bytes of index an element, wanted or not.
}


class AtenRecorder(TorchDispatchMode):
    """Collects the work of the ATen operations that run inside it, on meta tensors or others.

    Not in inference mode, where an operation may not be taken apart into those that run.

    Attributes:
        works: one for each operation that moves memory. Views and allocations do not.
        in_ese: the operations belong to an eSE module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []
        self.in_ese = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _MOVE_NOTHING:
            operands = tree_leaves((args, kwargs or {}))
            if name in _OVERWRITE:
                del operands[0]
            self.works.append(
                Work(
                    self._kind(name, args),
                    _aten_flop(name, args, result),
                    _bytes(operands),
                    _bytes(tree_leaves(result)),
                )
            )
        return result

    def _kind(self, name: str, args: tuple[Any, ...]) -> str:
        if self.in_ese and name != "mul":
            return _ESE
        if name == "convolution":
            _, per_group, height, width = args[1].shape
            groups = args[8]
            return _DEPTHWISE if per_group == 1 < groups else f"conv {height}x{width}"
        return _ATEN_KINDS.get(name, name)


def _aten_flop(name: str, args: tuple[Any, ...], result: Any) -> int:
    """Two a multiply-add of a convolution; the FC of eSE is one."""
    if name != "convolution":
        return 0
    return 2 * result.numel() * args[1].shape[1:].numel()  # weight: [C_out, C_in / groups, K, K]


@contextlib.contextmanager
def _marking_ese(model: nn.Module, recorder: AtenRecorder) -> Iterator[None]:
    """Tell ``recorder`` when an eSE module runs: alone, its FC looks like any other 1x1."""

    def enter(module: nn.Module, args: Any) -> None:
        recorder.in_ese = True

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        recorder.in_ese = False

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, ESE):
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        yield


def _eager_work(model: VoVNet, image: Tensor) -> list[Work]:
    """The ATen operations of the plain modules."""
    recorder = AtenRecorder()
    with backends.use_backend("reference"), _marking_ese(model, recorder), recorder:
        model(image)
    return recorder.works
