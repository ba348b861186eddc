"""What is kept from call to call: arenas, CUDA graphs, parameters."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import NetworkParams
from ..ops.memory import Arena
from .cpu import Replay

KEPT_SHAPES = 8
"""How many arenas, or graphs, are kept. Detection has many shapes; memory is finite."""


class Workspace:
    """What calls for one shape use, one call at a time.

    Attributes:
        arena: the memory.
        replay: on the ``cpu`` backend, what repeats the work in this arena.
    """

    def __init__(self, arena: Arena, replay: Replay | None = None) -> None:
        self.arena, self.replay = arena, replay or Replay()


class Workspaces:
    """Workspaces that no call is using at the moment.

    A call takes its workspace out, so that no other thread finds it: calls of one shape at the
    same time have one each.

    Args:
        limit: how many are kept.
    """

    def __init__(self, limit: int = KEPT_SHAPES) -> None:
        self._lock, self._limit = threading.Lock(), limit
        self._spare: list[tuple[Hashable, Workspace]] = []  # Those used last are last.

    def take(self, key: Hashable) -> Workspace | None:
        with self._lock:
            for i in reversed(range(len(self._spare))):
                if self._spare[i][0] == key:
                    return self._spare.pop(i)[1]
        return None

    def give(self, key: Hashable, workspace: Workspace) -> None:
        """Keep a workspace; those used longest ago go."""
        with self._lock:
            self._spare.append((key, workspace))
            del self._spare[: -self._limit]


class Captured(NamedTuple):
    """A CUDA graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    image: Tensor
    features: list[Tensor]


class Graphs:
    """Captured graphs by key.

    Attributes:
        lock: held from copying the image in to copying the features out.
        done: recorded when the features of the last replay have been copied.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done: torch.cuda.Event | None = None
        self._kept: OrderedDict[Hashable, Captured] = OrderedDict()

    def get(self, key: Hashable, capture: Callable[[], Captured]) -> Captured:
        """The graph of ``key``, captured if there is none; those used longest ago go."""
        captured = self._kept.pop(key, None)
        if captured is None:
            while len(self._kept) >= KEPT_SHAPES:
                self.wait()
                self._kept.popitem(last=False)
            captured = capture()
        self._kept[key] = captured
        return captured

    def wait(self) -> None:
        """Until no graph is running, so that graphs can be dropped."""
        if self.done is not None:
            self.done.synchronize()

    def pool(self) -> Any:
        """The memory pool of the graphs that there are, None for a new one.

        They can share it: none leaves anything in it that another replay could spoil
        before it was copied out.
        """
        return next(iter(self._kept.values())).graph.pool() if self._kept else None


class Caches:
    """What is made when it is first needed, and not part of a copy or a pickle.

    Attributes:
        workspaces: arenas, and what repeats the work in them.
        graphs: captured ones.
        params: the buffers as the ops take them.
        tensors: all that the ops read.
        buffers: of which all this was made, by name.
        versions: of those that have to be constants, when they were.
    """

    def __init__(self) -> None:
        self.workspaces = Workspaces()
        self.graphs = Graphs()
        self.params: NetworkParams | None = None
        self.tensors: list[Tensor] = []
        self.buffers: dict[str, Tensor | None] = {}
        self.versions: list[int | None] = []

    def __reduce__(self) -> tuple[type[Caches], tuple[()]]:
        return Caches, ()
