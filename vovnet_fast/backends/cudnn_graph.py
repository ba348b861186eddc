"""cuDNN's graph API as an engine of :func:`.triton.conv`: one kernel, from a slot into a slot.

The graph is convolution, scale, shift and ReLU; cuDNN compiles it into one kernel that reads
and writes the slots where they lie, at the pixel stride of their concat buffer. (Through ATen
the slot is first copied together, and the result once more by the epilogue.)

It is driven through NVIDIA's frontend, an optional dependency (``vovnet-fast[cudnn]``), with
the cuDNN that torch has loaded. What cuDNN refuses is not offered; the logger
``vovnet_fast.cudnn_graph`` says why at level DEBUG, as :func:`why_none` does.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _optional

NAME = "cudnn-graph"
"""Names of engines begin with it; the name that cuDNN has for the plan follows."""

PLANS = 3
"""How many of the plans that cuDNN ranks are offered: to compile one takes up to seconds."""

MIN_CAPABILITY = (8, 0)
MIN_CUDNN = 91000
"""The oldest cuDNN that was seen to grant strided outputs."""

_ALIGNMENT = 16  # Bytes; what cuDNN assumes of every pointer.
_INT32_LIMIT = 2**31
_DTYPES = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}

_log = logging.getLogger("vovnet_fast.cudnn_graph")


class Refused(RuntimeError):
    """cuDNN, or this module, does not take a problem."""


# --------------------------------------------------------------------------------------
# What is installed
# --------------------------------------------------------------------------------------


def why_not(device: torch.device) -> str | None:
    """The reason why nothing at all is offered on ``device``, or None."""
    reason = _optional.why_not("cudnn")
    if reason is not None:
        return f"NVIDIA's cuDNN frontend: {reason}"
    if device.type != "cuda":
        return f"it needs tensors on an NVIDIA GPU, these are on {device}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch sees no NVIDIA GPU"
    if not torch.backends.cudnn.enabled:
        return "torch.backends.cudnn.enabled is off"
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        return f"compute capability {found[0]}.{found[1]} is below 8.0 (Ampere)"
    return _mismatch()


def _frontend() -> Any:
    """The frontend, which may be missing. It loads cuDNN, torch's where torch has one."""
    return importlib.import_module("cudnn")


@functools.cache
def _mismatch() -> str | None:
    """What is wrong with the frontend, or with the cuDNN that it found."""
    try:
        found = _frontend().backend_version()
    except (OSError, RuntimeError) as error:
        return f"NVIDIA's cuDNN frontend does not load: {error}"
    if found < MIN_CUDNN:
        return f"cuDNN {found} is older than {MIN_CUDNN}"
    expected = torch.backends.cudnn.version()
    if found != expected:
        return f"the frontend found cuDNN {found}, torch has {expected}"
    return None


# --------------------------------------------------------------------------------------
# Problems
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """A 4-D tensor as cuDNN describes it, ``[N, C, H, W]``; strides are in elements."""

    dims: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last one."""
        return 1 + sum((d - 1) * s for d, s in zip(self.dims, self.strides, strict=True))


@dataclass(frozen=True)
class Problem:
    """All that a plan depends on.

    Attributes:
        x, weight, out: the operands.
        stride: of the convolution, along both axes.
        relu: the graph ends in one.
        dtype: of the operands. Sums, scale and shift are fp32.
        tf32: fp32 products may be rounded to TF32.
        aligned: every pointer is a multiple of 16 bytes.
        device: where it runs.
    """

    x: Operand
    weight: Operand
    out: Operand
    stride: int
    relu: bool
    dtype: torch.dtype
    tf32: bool
    aligned: bool
    device: torch.device

    @property
    def padding(self) -> int:
        """Of the image, on all sides."""
        return self.weight.dims[2] // 2


def operand(view: Tensor) -> Operand:
    """Describe a ``[N, H, W, C]`` view.

    The stride of a dimension of size 1 says nothing, and torch leaves anything there. It
    becomes that of adjacent pixels, so that cuDNN recognises the layout.
    """
    n, h, w, c = view.shape
    pixel = view.stride(2) if w > 1 else c
    row = view.stride(1) if h > 1 else w * pixel
    image = view.stride(0) if n > 1 else h * row
    channel = view.stride(3) if c > 1 else 1
    return Operand((n, c, h, w), (image, channel, row, pixel))


def describe(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    tf32: bool,
) -> Problem:
    """The problem of some arguments of :func:`.triton.conv`."""
    pointers = (t.data_ptr() for t in (x, weight, scale, shift, out))
    return Problem(
        operand(x),
        operand(weight),
        operand(out),
        stride,
        relu,
        x.dtype,
        tf32,
        all(pointer % _ALIGNMENT == 0 for pointer in pointers),
        x.device,
    )


def refusal(problem: Problem) -> str | None:
    """The reason why a problem is not put to cuDNN at all, or None."""
    if problem.dtype not in _DTYPES:
        return f"no plans for {problem.dtype}"
    if problem.dtype == torch.float32 and not problem.tf32:
        return "fp32 would be rounded to TF32, which torch does not allow here"
    if not problem.aligned:
        return f"a pointer is no multiple of {_ALIGNMENT} bytes"
    for name in ("x", "out"):
        found: Operand = getattr(problem, name)
        if min(found.strides) < 1 or found.strides[1] != 1:
            return f"{name} has strides {found.strides}"
        if found.span >= _INT32_LIMIT:
            return f"{name} spans {found.span} elements; cuDNN may count in 32 bits"
    return None


# --------------------------------------------------------------------------------------
# Graphs and plans
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Graph:
    """A graph and those of its tensors that have memory."""

    graph: Any
    x: Any
    weight: Any
    scale: Any
    shift: Any
    out: Any


def _build(frontend: Any, problem: Problem, **options: Any) -> _Graph:
    """Describe a problem to the frontend. ``options`` go to the graph, ``handle`` say."""
    types = frontend.data_type
    dtype = getattr(types, _DTYPES[problem.dtype])
    # Between the operations values stay in fp32: they are rounded once, when stored.
    graph = frontend.pygraph(
        io_data_type=dtype,
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
        **options,
    )

    def tensor(name: str, found: Operand, data_type: Any) -> Any:
        dim, stride = list(found.dims), list(found.strides)
        return graph.tensor(name=name, dim=dim, stride=stride, data_type=data_type)

    channels = problem.out.dims[1]
    vector = Operand((1, channels, 1, 1), (channels, 1, channels, channels))
    x, weight = (tensor(name, getattr(problem, name), dtype) for name in ("x", "weight"))
    scale, shift = (tensor(name, vector, types.FLOAT) for name in ("scale", "shift"))
    pair = [problem.padding] * 2
    y = graph.conv_fprop(
        image=x, weight=weight, padding=pair, stride=[problem.stride] * 2, dilation=[1, 1]
    )
    y = graph.bias(input=graph.scale(input=y, scale=scale), bias=shift)
    if problem.relu:
        y = graph.relu(input=y)
    y.set_name("out").set_output(True).set_data_type(dtype)
    y.set_dim(list(problem.out.dims)).set_stride(list(problem.out.strides))
    return _Graph(graph, x, weight, scale, shift, y)


@dataclass(frozen=True)
class _Handle:
    """cuDNN's handle of a device. It has one stream at a time, hence the lock."""

    handle: Any
    lock: threading.Lock


@functools.cache
def _handle(device: torch.device) -> _Handle:
    with torch.cuda.device(device):
        return _Handle(_frontend().create_handle(), threading.Lock())


@contextmanager
def _on_stream(device: torch.device) -> Iterator[Any]:
    """The handle of a device, for this thread alone and on its current stream."""
    found = _handle(device)
    with torch.cuda.device(device), found.lock:
        stream = torch.cuda.current_stream(device).cuda_stream
        _frontend().set_stream(handle=found.handle, stream=stream)
        yield found.handle


class Plans:
    """The plans that cuDNN ranks for a problem. Each is compiled when first needed.

    Attributes:
        names: all of them, best first.

    Raises:
        Refused: there are none.
    """

    def __init__(self, problem: Problem) -> None:
        reason = refusal(problem)
        if reason is not None:
            raise Refused(reason)
        self._device = problem.device
        self._workspaces: dict[int, int] = {}  # Bytes, by index of the plans that are compiled.
        frontend = _frontend()
        try:
            with _on_stream(problem.device) as handle:
                self._graph = _build(frontend, problem, handle=handle)
                _rank(frontend, self._graph.graph)
        except (RuntimeError, ValueError, frontend.cudnnGraphNotSupportedError) as error:
            raise Refused(f"cuDNN refuses: {error}") from error
        graph = self._graph.graph
        count = graph.get_execution_plan_count()
        self.names = [f"{NAME} {graph.get_plan_name_at_index(i)}" for i in range(count)]

    def run(
        self, name: str, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, out: Tensor
    ) -> None:
        """Enqueue a plan on the current stream."""
        index, tensors = self.names.index(name), self._graph
        pointers = {
            tensors.x: x.data_ptr(),
            tensors.weight: weight.data_ptr(),
            tensors.scale: scale.data_ptr(),
            tensors.shift: shift.data_ptr(),
            tensors.out: out.data_ptr(),
        }
        with _on_stream(self._device) as handle:
            # Allocated for this launch, on its stream: streams never share one.
            workspace = torch.empty(self._compile(index), dtype=torch.uint8, device=self._device)
            tensors.graph.execute_plan_at_index(pointers, workspace, index, handle)

    def _compile(self, index: int) -> int:
        """Make sure that a plan is compiled; the bytes of its workspace."""
        if index not in self._workspaces:
            graph = self._graph.graph
            graph.build_plan_at_index(index)
            self._workspaces[index] = graph.get_workspace_size_plan_at_index(index)
        return self._workspaces[index]


def _rank(frontend: Any, graph: Any) -> None:
    """Let cuDNN rank its plans for a graph, strides and all. Nothing is compiled yet.

    ``check_support`` would compile the first plan, also where another engine is known to be
    faster. What does not compile after all is left out by the one who measures.

    Raises:
        RuntimeError, ValueError, frontend.cudnnGraphNotSupportedError: it has none.
    """
    notes = frontend.numerical_note
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([frontend.heur_mode.A, frontend.heur_mode.FALLBACK])
    graph.deselect_numeric_notes([notes.NONDETERMINISTIC, notes.REDUCED_PRECISION_REDUCTION])


@functools.cache
def _plans(problem: Problem) -> Plans | str:
    """The plans of a problem, or the reason why there are none.

    Nothing is ever dropped: a captured CUDA graph goes on using the kernels of its plans.

    Raises:
        Refused: a CUDA graph is being captured, and compiling would end the capture. This
            is not remembered.
    """
    if torch.cuda.is_current_stream_capturing():
        raise Refused("a CUDA graph is being captured")
    try:
        return Plans(problem)
    except Refused as refused:
        _log.debug("not offered for %s: %s", problem, refused)
        return str(refused)


# --------------------------------------------------------------------------------------
# The engine
# --------------------------------------------------------------------------------------


def engines(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = True,
    tf32: bool = False,
) -> list[str]:
    """Names of the plans on offer for these arguments of :func:`.triton.conv`, best first.

    Empty where the frontend is missing, where cuDNN refuses, and for a problem that is new
    while a CUDA graph is being captured.
    """
    options: dict[str, Any] = dict(stride=stride, relu=relu, tf32=tf32)
    plans = _find(x, weight, scale, shift, out, **options)
    return [] if isinstance(plans, str) else plans.names[:PLANS]


def why_none(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = True,
    tf32: bool = False,
) -> str | None:
    """The reason why :func:`engines` is empty for these arguments, or None where it is not."""
    options: dict[str, Any] = dict(stride=stride, relu=relu, tf32=tf32)
    plans = _find(x, weight, scale, shift, out, **options)
    return plans if isinstance(plans, str) else None


def _find(x: Tensor, *others: Tensor, **options: Any) -> Plans | str:
    """The plans for some arguments of :func:`engines`, or the reason why there are none."""
    reason = why_not(x.device)
    if reason is not None:
        return reason
    try:
        return _plans(describe(x, *others, **options))
    except Refused as refused:
        return str(refused)


def run(
    engine: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = True,
    tf32: bool = False,
) -> None:
    """out = relu(conv(x, weight) * scale + shift), padded by K // 2, on one of :func:`engines`.

    Products are summed in fp32, and rounded once, when they are stored. NaN stays NaN.

    Args:
        engine: a name that :func:`engines` gave, for these arguments or, where cuDNN ranks
            the same plan, for similar ones.
        x: ``[N, H, W, C_in]`` view in fp16, bf16, or fp32 with ``tf32``.
        weight: ``[C_out, K, K, C_in]``, contiguous, dtype of ``x``.
        scale, shift: ``[C_out]``, fp32.
        out: ``[N, H', W', C_out]`` view, dtype of ``x``. Nothing outside it is written.
        stride: of the convolution.
        relu: apply it.
        tf32: fp32 operands may be rounded to TF32.

    Raises:
        Refused: there is no such plan.
    """
    options: dict[str, Any] = dict(stride=stride, relu=relu, tf32=tf32)
    plans = _plans(describe(x, weight, scale, shift, out, **options))
    if isinstance(plans, str):
        raise Refused(plans)
    if engine not in plans.names:
        raise Refused(f"cuDNN does not offer {engine} for these arguments")
    plans.run(engine, x, weight, scale, shift, out)
