"""Graphs, and the plans that cuDNN ranks for them."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...arithmetic import int8
from .._extension.fields import pointer
from . import installed
from .problems import DTYPES, EIGHT_BITS, Operand, Problem, refusal

NAME = "cudnn-graph"
"""Names of engines begin with it; the name that cuDNN has for the plan follows."""

_log = logging.getLogger("vovnet_fast.cudnn_graph")


class Refused(RuntimeError):
    """cuDNN, or this module, does not take a problem."""


NEAREST = 1.5 * 2**23
"""fp32 numbers near it have no fractions: what is added to it, and taken off again, is an integer,
the nearest one, of ties the even one. So nothing depends on how cuDNN converts to int8."""


@dataclass(frozen=True)
class _Graph:
    """A graph and those of its tensors that have memory.

    Attributes:
        nearest: :data:`NEAREST`, in int8.
    """

    graph: Any
    x: Any
    weight: Any
    scale: Any
    shift: Any
    out: Any
    nearest: Any = None


def _build(frontend: Any, problem: Problem, **options: Any) -> _Graph:
    """Describe a problem to the frontend. ``options`` go to the graph, ``handle`` say."""
    types = frontend.data_type
    dtype = getattr(types, (EIGHT_BITS if problem.levels else DTYPES)[problem.dtype])
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
    geometry = dict(padding=pair, stride=[problem.stride] * 2, dilation=[1, 1])
    nearest = None
    if problem.dtype == int8.ACTIVATION:
        sums = graph.conv_fprop(
            image=x, weight=weight, compute_data_type=types.INT32, **geometry
        ).set_data_type(types.INT32)
        one = Operand((1, 1, 1, 1), (1, 1, 1, 1))
        nearest = tensor("nearest", one, types.FLOAT)
        y = _rescaled(graph, sums, scale, shift, problem.levels)
        y = graph.sub(a=graph.add(a=y, b=nearest), b=nearest)
    elif problem.levels:
        sums = graph.conv_fprop(image=x, weight=weight, **geometry)
        y = _rescaled(graph, sums, scale, shift, problem.levels)
    else:
        y = graph.conv_fprop(image=x, weight=weight, **geometry)
        y = graph.bias(input=graph.scale(input=y, scale=scale), bias=shift)
        if problem.relu:
            y = graph.relu(input=y)
    y.set_name("out").set_output(True).set_data_type(dtype)
    y.set_dim(list(problem.out.dims)).set_stride(list(problem.out.strides))
    return _Graph(graph, x, weight, scale, shift, y, nearest)


def _rescaled(graph: Any, sums: Any, scale: Any, shift: Any, levels: int) -> Any:
    """clamp((sums + shift) * scale, 0, levels), in fp32.

    The clamp is between the product and whatever is added next: no FMA takes both.
    """
    y = graph.mul(a=graph.add(a=sums, b=shift), b=scale)
    return graph.relu(input=y, lower_clip=0.0, upper_clip=float(levels))


@dataclass(frozen=True)
class _Handle:
    """cuDNN's handle of a device. It has one stream at a time, hence the lock."""

    handle: Any
    lock: threading.Lock


@functools.cache
def _handle(device: torch.device) -> _Handle:
    with torch.cuda.device(device):
        return _Handle(installed.frontend().create_handle(), threading.Lock())


@contextmanager
def _on_stream(device: torch.device) -> Iterator[Any]:
    """The handle of a device, for this thread alone and on its current stream."""
    found = _handle(device)
    with torch.cuda.device(device), found.lock:
        stream = torch.cuda.current_stream(device).cuda_stream
        installed.frontend().set_stream(handle=found.handle, stream=stream)
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
        frontend = installed.frontend()
        try:
            with _on_stream(problem.device) as handle:
                self._graph = _build(frontend, problem, handle=handle)
                _rank(frontend, self._graph.graph)
        except (RuntimeError, ValueError, frontend.cudnnGraphNotSupportedError) as error:
            raise Refused(f"cuDNN refuses: {error}") from error
        # Of this object, which is never dropped: captured launches read it, too.
        self._nearest = torch.full((1,), NEAREST, dtype=torch.float32, device=problem.device)
        graph = self._graph.graph
        count = graph.get_execution_plan_count()
        self.names = [f"{NAME} {graph.get_plan_name_at_index(i)}" for i in range(count)]

    def run(
        self, name: str, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, out: Tensor
    ) -> None:
        """Enqueue a plan on the current stream."""
        index, tensors = self.names.index(name), self._graph
        pointers = {
            tensors.x: pointer("x", x),
            tensors.weight: pointer("weight", weight),
            tensors.scale: pointer("scale", scale),
            tensors.shift: pointer("shift", shift),
            tensors.out: pointer("out", out),
        }
        if tensors.nearest is not None:
            pointers[tensors.nearest] = pointer("nearest", self._nearest)
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
def plans_for(problem: Problem) -> Plans | str:
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
