"""The module that :func:`vovnet_fast.freeze` makes, and the ways in which it runs."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .. import backends, compat, first_use
from .._dtypes import accumulator
from ..backends import cpu
from ..backends.cpu import packing, winograd
from ..network import decision
from ..network.filling import AllOrNothing
from ..network.watchers import watching
from ..ops import NetworkParams, _checks
from ..ops import features as run_op
from ..ops.features import check_size, needs, plan, rebuild, run
from ..ops.flattening import unflatten
from ..ops.memory import Arena, Memory
from ..replay.caches import Caches, Captured, Workspace
from ..replay.cpu import stamp
from .folded import folded_forward

_WARM_UP = 3
"""Calls before a capture: kernels are compiled and libraries choose their algorithms."""


class FrozenVoVNet(AllOrNothing):
    """An inference module that :func:`.freeze.freeze` makes.

    Without a fused backend (:mod:`vovnet_fast.backends`) it runs PyTorch's convolutions
    with a bias, or in half precision with a scale and a shift, and in-place ReLUs. With
    one it runs :func:`vovnet_fast.ops.features` in an arena, planned once for each input
    shape and used again by later calls. What it returns is never part of an arena:
    results stay as they are for as long as they are kept. The arenas used last are kept
    (:data:`vovnet_fast.replay.caches.KEPT_SHAPES`); threads that run at the same time do not
    share one. On the ``cpu`` backend the third call for a shape, and those after it, repeat
    recorded calls of the extension, with no Python between them.

    All tensors are buffers. ``to(device)``, ``state_dict``, ``deepcopy`` and ``pickle``
    work; the dtype is fixed, :meth:`train` changes nothing, and autocast is ignored.

    Attributes:
        spec: the architecture.
        out_features: names of the returned features, in network order.
        feature_channels: their channels, in the same order (FPN's ``in_channels``).
        feature_strides: their strides, in the same order.
        dtype: of weights and activations. Images of another floating dtype are converted.
        out_dtype: of the returned features.
        memory_format: of the returned features.
        graph: whether CUDA graphs are captured and replayed.
    """

    weight_0: Tensor
    scale: Tensor
    shift: Tensor
    zeros: Tensor
    ones: Tensor

    def __init__(
        self,
        params: NetworkParams,
        out_features: tuple[str, ...],
        memory_format: torch.memory_format,
        graph: bool,
        out_dtype: torch.dtype,
        *,
        copy: bool = True,
    ) -> None:
        super().__init__()
        layers, fcs = params.convs(), params.fcs()
        channels, strides = params.spec.feature_channels(), params.spec.feature_strides()
        self.spec, self._encoded_spec = params.spec, params.encoded_spec
        self._needs = needs(params.spec)
        self.out_features = out_features
        self.feature_channels = tuple(channels[name] for name in out_features)
        self.feature_strides = tuple(strides[name] for name in out_features)
        self.dtype, self.out_dtype = layers[0].weight.dtype, out_dtype
        self.graph = graph
        # Not the format itself, which cannot be pickled.
        self._channels_last = memory_format == torch.channels_last

        def hold(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
            own = tensor.detach().to(dtype, copy=copy, memory_format=torch.contiguous_format)
            self.register_buffer(name, own)

        for i, layer in enumerate(layers):
            hold(f"weight_{i}", layer.weight, self.dtype)
            if layer.depthwise is not None:
                hold(f"depthwise_{i}", layer.depthwise, self.dtype)
        for i, fc in enumerate(fcs):
            hold(f"fc_{i}", fc, self.dtype)
        exact = accumulator(self.dtype)
        hold("scale", torch.cat([layer.scale for layer in layers]), exact)
        hold("shift", torch.cat([layer.shift for layer in layers]), exact)
        self._widths = [layer.shift.numel() for layer in layers]
        hold("zeros", self.shift.new_zeros(max(self._widths)), exact)
        hold("ones", self.shift.new_ones(max(self._widths)), exact)
        # Strides as ops.flattening.flatten writes them: negative for a depthwise layer.
        self._strides = [
            layer.stride if layer.depthwise is None else -layer.stride for layer in layers
        ]
        self._num_fcs = len(fcs)
        self._constants = {"zeros": 0, "ones": 1, **({"scale": 1} if self.dtype == exact else {})}
        self._layout = {name: (tuple(t.shape), t.dtype) for name, t in self.named_buffers()}

        self._caches = Caches()
        self.register_load_state_dict_post_hook(_forget)
        self.eval()

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of the returned features."""
        return torch.channels_last if self._channels_last else torch.contiguous_format

    @compat.traced
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of a batch of images.

        Args:
            x: ``[N, C, H, W]`` on the module's device, of any layout and of dtype fp16,
                bf16, fp32 or fp64, which is converted to :attr:`dtype`.

        Returns:
            One ``[N, C', H', W']`` tensor of :attr:`out_dtype` and :attr:`memory_format`
            for each of :attr:`out_features`, in memory of its own.

        Raises:
            ValueError: wrong rank, channels or device, or too small an image.
            TypeError: no such dtype.
            RuntimeError: a gradient would be needed; ``graph`` without a CUDA device.
            BackendError: the backend that was asked for cannot run.
        """
        self._check(x)
        kind = x.device.type
        if compat.autocast_dtype(kind) is not None:  # The dtypes were chosen in freezing.
            with torch.autocast(kind, enabled=False):
                return self.forward(x)
        tracing = compat.is_compiling() or torch.jit.is_tracing()
        if tracing or watching(x, modules=False) is not None:
            return tuple(self._deliver(feature) for feature in self._trace(x))
        self._follow()
        if x.is_cuda:
            first_use.of_frozen(self, x)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            # Someone else's graph: memory is that graph's, and no arena of later calls.
            found = self._compute(x, Memory())
        elif self.graph:
            return self._replay(x)
        else:
            found = self._run(x)
        return tuple(self._deliver(feature) for feature in found)

    def workspace_bytes(self, shape: tuple[int, int, int, int]) -> int:
        """Bytes of the arena of a fused backend for images of ``[N, C, H, W]``.

        Returned features are not in it, nor are the eSE pool's partial sums and the gates.
        """
        needed = plan(shape, self._params(), self.out_features)
        return self.dtype.itemsize * sum(needed.values())

    def train(self, mode: bool = True) -> FrozenVoVNet:
        """Do nothing: there is no training mode. Detectors call it on all their parts."""
        return super().train(False)

    def extra_repr(self) -> str:
        return f"{self.spec.name}, out_features={self.out_features}, dtype={self.dtype}"

    def _check(self, x: Tensor) -> None:
        _checks.activations("a frozen VoVNet", "x", x, self.weight_0.shape[3])
        if x.device != self.shift.device:
            raise ValueError(
                f"the image is on {x.device} and the frozen VoVNet on {self.shift.device}: move one"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "a frozen VoVNet has no backward pass: call it under torch.no_grad(), detach "
                "the image, or use the model that it was made of"
            )
        check_size(self.spec, self.out_features, x.shape[2], x.shape[3])

    def _deliver(self, feature: Tensor, *, clone: bool = False) -> Tensor:
        return feature.to(self.out_dtype, copy=clone, memory_format=_layout(self.memory_format))

    def refresh(self) -> None:
        """Forget all that was made of the buffers: packed weights, recorded calls, graphs.

        Writes through ``tensor.data``, NumPy, DLPack, or another process's view of shared memory
        are counted nowhere: after them this has to be called. Others are followed: in-place
        functions, ``load_state_dict``, other buffers by assignment or ``functional_call``.
        ``VOVNET_FAST_CHECK=1`` makes every call compare what was packed with the buffers.
        """
        _forget(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file for :func:`vovnet_fast.load_frozen`; see :func:`.file.save`."""
        from .file import save

        save(self, path)

    def _follow(self) -> None:
        """Notice other buffers than those of the last call, and constants that no longer are.

        Raises:
            ValueError: they are not of the shapes, dtypes or values of the network's.
        """
        held, now = self._caches.buffers, cast("dict[str, Tensor]", self._buffers)
        same = map(operator.is_, held.values(), now.values())
        if [*held] != [*now] or not all(same):
            _forget(self)
            layout = {name: (tuple(t.shape), t.dtype) for name, t in now.items() if t is not None}
            for name, (shape, dtype) in self._layout.items():
                if layout.get(name) != (shape, dtype):
                    raise ValueError(
                        f"a frozen VoVNet: the buffer {name} must be {list(shape)} in {dtype}, got "
                        f"{layout.get(name, 'none')}: assign one like it, or freeze the model again"
                    )
            self._caches.buffers = dict(now)
        versions = [_version(now[name]) for name in self._constants]
        if versions == self._caches.versions:
            return
        for name, value in self._constants.items():
            if not (getattr(self, name) == value).all():
                raise ValueError(
                    f"a frozen VoVNet in {self.dtype}: the buffer {name} must be {value} "
                    "throughout (scales of batch norms are in the weights): write to weights and "
                    "shift, or freeze the model again"
                )
        self._caches.versions = versions

    def _params(self) -> NetworkParams:
        """The buffers as the ops take them."""
        if self._caches.params is None:
            with torch.inference_mode(False):
                params = self._unpack()
                tensors = [t for layer in params.convs() for t in (layer.weight, layer.depthwise)]
                held = [self.scale, self.shift, *params.fcs(), *tensors]
                self._caches.tensors = [tensor for tensor in held if tensor is not None]
                winograd.lasting(layer.weight for layer in params.convs())
                self._caches.params = params
        return self._caches.params

    def _unpack(self) -> NetworkParams:
        layers = unflatten(
            [getattr(self, f"weight_{i}") for i in range(len(self._widths))],
            list(self.scale.split(self._widths)),
            list(self.shift.split(self._widths)),
            [getattr(self, f"depthwise_{i}") for i, s in enumerate(self._strides) if s < 0],
            self._strides,
        )
        fcs = [getattr(self, f"fc_{i}") for i in range(self._num_fcs)]
        return rebuild(layers, fcs, self.spec, self._encoded_spec)

    # ----------------------------------------------------------------------------------
    # Ways to run
    # ----------------------------------------------------------------------------------

    def _trace(self, x: Tensor) -> list[Tensor]:
        """For who follows single functions, and plans memory itself, or needs no plan."""
        if decision.of_frozen(x, self.dtype, self._needs).op:
            return run_op(x.to(self.dtype), self._unpack(), self.out_features)
        return self._plain(x, self._unpack())

    def _run(self, x: Tensor) -> list[Tensor]:
        """In an arena, where the backend is fused."""
        if not decision.of_frozen(x, self.dtype, self._needs).op:
            return self._plain(x, self._params())
        # What a stream is given it does in order: only there can memory be used again
        # before the work on it is done.
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        key = (x.shape, x.device, stream)
        workspace = self._caches.workspaces.take(key)
        if workspace is None:
            n, c, h, w = x.shape
            needed = plan((n, c, h, w), self._params(), self.out_features)
            workspace = Workspace(Arena(needed, self.dtype, x.device))
        if backends.select(x.device, self.dtype, self._needs) == "cpu":
            image, params = self._image(x, workspace.arena), self._params()
            work = functools.partial(
                run, cpu, params=params, out_features=self.out_features, memory=workspace.arena
            )
            found = workspace.replay(work, image, stamp(image, self._caches.tensors))
        else:
            found = self._compute(x, workspace.arena)
        self._caches.workspaces.give(key, workspace)
        return found

    def _compute(self, x: Tensor, memory: Memory) -> list[Tensor]:
        """On the backend that was chosen, with memory for what is fused."""
        if not decision.of_frozen(x, self.dtype, self._needs).op:
            return self._plain(x, self._params())
        backend = backends.get(x.device, self.dtype, self._needs)
        found = run(backend, self._image(x, memory), self._params(), self.out_features, memory)
        return [_checks.nchw(feature) for feature in found]

    def _plain(self, x: Tensor, params: NetworkParams) -> list[Tensor]:
        """By PyTorch's own functions."""
        x = x.to(self.dtype, memory_format=_layout(torch.channels_last))
        return folded_forward(x, params, self.out_features, (self.zeros, self.ones))

    def _image(self, x: Tensor, memory: Memory) -> Tensor:
        """``x`` as a backend takes it: converted, where it has another dtype or layout."""
        view = x.resolve_neg().permute(0, 2, 3, 1)
        if x.dtype == self.dtype and (x.shape[1] == 1 or view.stride(3) == 1):
            return view
        return memory.scratch("image", self.weight_0, *view.shape).copy_(view)

    def _replay(self, x: Tensor) -> tuple[Tensor, ...]:
        """Copy the image in, replay the graph of its shape, copy the features out."""
        if not x.is_cuda:
            raise RuntimeError(
                f"freeze(graph=True) captures CUDA graphs, and this module is on {x.device}: "
                "move it to an NVIDIA GPU, or freeze, or load, with graph=False"
            )
        key = (x.shape, x.device, backends.chosen())
        graphs = self._caches.graphs
        # All graphs of a module share one memory pool: only one may be running.
        with graphs.lock, torch.cuda.device(x.device):
            captured = graphs.get(key, lambda: self._capture(x, graphs.pool()))
            stream = torch.cuda.current_stream()
            if graphs.done is not None:
                stream.wait_event(graphs.done)
            captured.image.copy_(x)
            captured.graph.replay()
            found = tuple(self._deliver(feature, clone=True) for feature in captured.features)
            graphs.done = stream.record_event()
        return found

    def _capture(self, x: Tensor, pool: Any) -> Captured:
        # Not in inference mode: a later call outside it could not copy its image in.
        with torch.inference_mode(False), torch.no_grad():
            image = torch.empty(
                x.shape, dtype=self.dtype, device=x.device, memory_format=torch.channels_last
            ).copy_(x)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self._compute(image, Memory())
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads, a data loader's say, may go on allocating: thread_local.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                features = self._compute(image, Memory())
        return Captured(graph, image, features)

    # ----------------------------------------------------------------------------------
    # What modules can do
    # ----------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenVoVNet:
        """Move to a device. Layouts stay packed, and scales and shifts in fp32."""
        dtype = fn(self.weight_0.new_empty(0)).dtype
        if dtype != self.dtype:
            raise TypeError(
                f"this VoVNet is frozen in {self.dtype} and cannot be converted to {dtype}: "
                f"freeze the original again, with dtype={dtype}"
            )

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype:
                moved = tensor.to(moved.device)
            return moved.contiguous()  # module.to(memory_format=...) permutes what has 4 axes.

        super()._apply(move, recurse)
        _forget(self)
        return self

    def _replicate_for_data_parallel(self) -> FrozenVoVNet:
        replica = super()._replicate_for_data_parallel()
        replica._caches = Caches()  # Its buffers are on another device.
        return replica


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; inference mode does not count."""
    return None if tensor.is_inference() else tensor._version


def _layout(wanted: torch.memory_format) -> torch.memory_format:
    """What is wanted, but under vmap, which hides a dimension, and knows no layout with it."""
    if not compat.is_compiling() and torch._C._are_functorch_transforms_active():
        return torch.preserve_format
    return wanted


def _forget(module: FrozenVoVNet, *_: Any) -> None:
    """Drop what points to memory of buffers that may have been replaced."""
    module._caches.graphs.wait()
    packing.forget(module._caches.tensors)
    module._caches = Caches()
