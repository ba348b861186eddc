"""The module that :func:`vovnet_fast.quantize` makes."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import arithmetic, backends, compat
from ..arithmetic.layers import QuantizedNetwork
from ..backends import eight_bits
from ..backends.cpu import int8 as cpu
from ..backends.cpu import packing
from ..compat import zip
from ..network.filling import AllOrNothing, CheckpointError
from ..network.watchers import watching
from ..ops import _checks
from ..ops.features import check_size
from ..ops.memory import Arena
from ..replay.caches import Workspace, Workspaces
from ..replay.cpu import stamp
from . import layout, rehearsing
from .formats import Format
from .layout import Architecture
from .report import Report, Row
from .running import plan, run


class _Made(NamedTuple):
    """What is made of buffers, for as long as they are what they were.

    Attributes:
        tensors: the buffers.
        versions: how often each had been written to.
        network: they are.
        workspaces: memory, and recorded calls of the ``cpu`` backend, by shape of the images.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    network: QuantizedNetwork
    workspaces: Workspaces


class _Caches:
    """Not part of a copy or a pickle."""

    def __init__(self) -> None:
        self.made: _Made | None = None

    def __reduce__(self) -> tuple[type[_Caches], tuple[()]]:
        return _Caches, ()


class QuantizedVoVNet(AllOrNothing):
    """An inference module in int8 or fp8, which :func:`vovnet_fast.quantize` makes.

    It computes what :mod:`vovnet_fast.arithmetic` says, int8 bit for bit on every device: on
    processors with AVX2 by the extension, in memory that is planned once for each shape of images
    and by calls that are recorded on the second; on NVIDIA GPUs that have the products by Triton's
    kernels, fp8 too, once these have been found right there; elsewhere by plain PyTorch in fp64:
    exact, and slow. All tensors are buffers.
    ``to(device)``, ``state_dict``, ``deepcopy`` and ``pickle`` work (PyTorch pickles no e4m3: fp8
    is kept by :meth:`save`); dtypes are fixed, :meth:`train` changes nothing, and autocast is
    ignored.

    Attributes:
        spec: the architecture.
        out_features: names of the returned features, in network order.
        feature_channels: their channels, in the same order (FPN's ``in_channels``).
        feature_strides: their strides, in the same order.
        input_ch: channels of images.
        dtype: ``int8`` or ``fp8``, of weights and activations.
        levels: the largest activation of int8, 127 or 255; 448 in fp8.
        wide_stem: the first layer has images and weights of more than eight bits.
        out_dtype: of the returned features.
        memory_format: of the returned features.
    """

    weight_0: Tensor
    scales: Tensor

    def __init__(
        self,
        network: QuantizedNetwork,
        rows: Sequence[Row] = (),
        out_dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
        *,
        copy: bool = True,
    ) -> None:
        super().__init__()
        channels, strides = network.spec.feature_channels(), network.spec.feature_strides()
        self.spec, self.out_features = network.spec, network.out_features
        self.feature_channels = tuple(channels[name] for name in self.out_features)
        self.feature_strides = tuple(strides[name] for name in self.out_features)
        self.input_ch = network.layers["stem_1"].weight.shape[3]
        self.dtype, self.levels, self.wide_stem = network.dtype, network.levels, network.wide_stem
        self.out_dtype = out_dtype
        # Not the format itself, which cannot be pickled.
        self._channels_last = memory_format == torch.channels_last
        self._rows = [Row(*row) for row in rows]
        for name, tensor in layout.tensors(network).items():
            held = tensor.detach().contiguous()
            self.register_buffer(name, held.clone() if copy and held is tensor else held)
        # Names and shapes do not tell 127 levels from 255, nor two dialects: a state dict does.
        stamp = zlib.crc32(repr((arithmetic.VERSION, self.architecture)).encode())
        self.register_buffer("stamp", torch.tensor(stamp, device=self.scales.device))
        self._caches = _Caches()
        self.eval()

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of the returned features."""
        return torch.channels_last if self._channels_last else torch.contiguous_format

    @property
    def architecture(self) -> Architecture:
        """What its buffers depend on."""
        form = Format(self.dtype, self.levels, self.wide_stem)
        return Architecture(self.spec, form, self.out_features, self.input_ch)

    @property
    def network(self) -> QuantizedNetwork:
        """Its buffers as the ops take them: layers with weights, scales and zero points."""
        return layout.network(self.architecture, dict(self.named_buffers()))

    @compat.hidden
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of a batch of images.

        Args:
            x: ``[N, C, H, W]`` on the module's device, of any layout and of dtype fp16, bf16,
                fp32 or fp64, normalised as those of the calibration. What is beyond the range of
                these is cut there.

        Returns:
            One ``[N, C', H', W']`` tensor of :attr:`out_dtype` and :attr:`memory_format` for each
            of :attr:`out_features`.

        Raises:
            ValueError: wrong rank, channels or device, too small an image, or one that holds NaN
                or Inf, for which there are no bytes.
            TypeError: no such dtype.
            RuntimeError: a gradient would be needed.
            BackendError: a backend was asked for by name that has no ops in eight bits, or
                cannot run here.
        """
        self._check(x)
        ops = self._fast_ops(x)
        with torch.no_grad():
            pixels = x.float().permute(0, 2, 3, 1)
            if ops is not None:
                found = self._run_fast(ops, pixels)
            else:
                views = run(self.architecture.form.ops, pixels, self.network)
                found = list(map(_checks.nchw, views))
            return tuple(
                feature.to(self.out_dtype, memory_format=self.memory_format) for feature in found
            )

    def _fast_ops(self, x: Tensor) -> ModuleType | None:
        """The ops of a backend, or None where plain PyTorch computes.

        Raises:
            BackendError: a backend was asked for by name that cannot run.
        """
        name = backends.chosen()
        if name == "reference":
            return None
        watched = watching(x, modules=False)
        if watched is not None and not (watched.knows_ops and name != "auto"):
            eight_bits.require(name, self.dtype, watched.why)
            return None
        if x.is_cuda:
            rehearsing.at_first_use(self.architecture, x)
        ops, reason = eight_bits.find(
            name, x.device, self.dtype, rehearsing.functions(self.spec, self.out_features)
        )
        eight_bits.require(name, self.dtype, reason)
        return ops

    def _run_fast(self, ops: ModuleType, pixels: Tensor) -> list[Tensor]:
        """On a backend, in memory that is planned once for a shape; on ``cpu`` from the second call
        on by recorded calls. From ``[N, H, W, C]`` to ``[N, C, H, W]``."""
        made = self._made()
        if pixels.is_cuda and torch.cuda.is_current_stream_capturing():
            # Someone else's graph: memory is that graph's, and no arena of later calls.
            return list(map(_checks.nchw, run(ops, pixels, made.network)))
        # What a stream is given it does in order: only there can memory be used again before the
        # work on it is done.
        key: Hashable = pixels.shape
        if pixels.is_cuda:
            key = pixels.shape, torch.cuda.current_stream(pixels.device).cuda_stream
        workspace = made.workspaces.take(key)
        if workspace is None:
            n, h, w, c = pixels.shape
            sizes = plan((n, c, h, w), made.network, self.architecture.form.ops)
            workspace = Workspace(Arena(sizes, ops.ACTIVATION, pixels.device))
        work = functools.partial(run, ops, network=made.network, memory=workspace.arena)
        if ops is cpu:
            found = workspace.replay(work, pixels, stamp(pixels, made.tensors))
        else:
            found = list(map(_checks.nchw, work(pixels)))
        made.workspaces.give(key, workspace)
        return found

    def _made(self) -> _Made:
        """Of the buffers as they are now."""
        tensors = tuple(tensor for tensor in self._buffers.values() if tensor is not None)
        if any(tensor.is_inference() for tensor in tensors):  # They count no writes.
            return _Made(tensors, (), self.network, Workspaces())
        versions = tuple(tensor._version for tensor in tensors)
        made = self._caches.made
        if (
            made is None
            or made.versions != versions
            or any(old is not new for old, new in zip(made.tensors, tensors, strict=True))
        ):
            made = _Made(tensors, versions, self.network, Workspaces())
            self._caches.made = made
        return made

    def refresh(self) -> None:
        """Forget what was made of the buffers: after writes that PyTorch does not count, as
        those through ``tensor.data``, NumPy, DLPack or shared memory."""
        tensors = [tensor for tensor in self._buffers.values() if tensor is not None]
        packing.forget(tensors)
        eight_bits.forget(tensors)
        self._caches.made = None

    def report(self) -> Report:
        """What quantisation cost on images of the calibration; of a loaded one what it cost then.

        Raises:
            ValueError: it was not measured.
        """
        if not self._rows:
            raise ValueError(
                f"nothing was measured of this {self.spec.name} in {self.dtype}: "
                "vovnet_fast.quantize measures unless report=False"
            )
        return Report(self._rows)

    def train(self, mode: bool = True) -> QuantizedVoVNet:
        """Do nothing: there is no training mode. Detectors call it on all their parts."""
        return super().train(False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file for :func:`vovnet_fast.load_quantized`; see :func:`.file.save`."""
        from .file import save

        save(self, path)

    def extra_repr(self) -> str:
        return f"{self.spec.name}, out_features={self.out_features}, dtype={self.dtype}"

    def _check(self, x: Tensor) -> None:
        _checks.activations("a quantised VoVNet", "x", x, self.input_ch)
        if x.device != self.scales.device:
            raise ValueError(
                f"the image is on {x.device} and the quantised VoVNet on {self.scales.device}: "
                "move one"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "a quantised VoVNet has no backward pass: call it under torch.no_grad(), detach "
                "the image, or train what vovnet_fast.quantization.fine_tuning makes"
            )
        check_size(self.spec, self.out_features, x.shape[2], x.shape[3])
        # NaN is the least and the largest of what it is among; isfinite() takes ten times as long.
        values = x if x.dtype == torch.float64 else x.float()  # torch 2.1 finds none of halves.
        if x.numel() and not all(end.isfinite() for end in values.aminmax()):
            raise ValueError("the image holds NaN or Inf, for which there are no bytes")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedVoVNet:
        """Move to a device. Integers and scales keep their dtypes."""
        wanted = fn(torch.empty(0, dtype=torch.float32, device=self.scales.device)).dtype
        if wanted != torch.float32:
            raise TypeError(
                f"this VoVNet is quantised in {self.dtype} and cannot be converted to {wanted}: "
                "quantise the original again, with out_dtype for features in another dtype"
            )

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype:  # Of fp64 and e4m3, which to(torch.float32) takes.
                moved = tensor.to(moved.device)
            return moved.contiguous()  # module.to(memory_format=...) permutes what has 4 axes.

        super()._apply(move, recurse)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Bytes are copied as they are, or not at all: another dtype is another number."""
        problems = []
        for name, own in self.named_buffers():
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor) and prefix + name in state_dict:
                problems.append(f"{name} is {type(value).__name__}, expected a tensor")
            elif value is not None and (value.shape, value.dtype) != (own.shape, own.dtype):
                problems.append(
                    f"{name} is {list(value.shape)} in {value.dtype}, expected {list(own.shape)} "
                    f"in {own.dtype}"
                )
            elif name == "stamp" and value is not None and not torch.equal(value.cpu(), own.cpu()):
                problems.append(
                    f"it is that of another architecture, dtype or number of levels than "
                    f"{self.spec.name} of {self.levels}"
                )
        if problems:
            raise CheckpointError(
                f"the state dict does not fit this VoVNet in {self.dtype}, of which nothing was "
                f"changed: {'; '.join(problems[:4])}{'; ...' if len(problems) > 4 else ''}"
            )
        torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)
