"""A VoVNet as an ONNX file, for TensorRT and other runtimes, compared with the network before it is
there.

>>> import vovnet_fast
>>> from vovnet_fast.deploy import export
>>> model = vovnet_fast.VoVNet("V-39-eSE")
>>> report = export.onnx(model, "v39.onnx", (1, 640, 640), dynamic=("batch", "height", "width"))

:mod:`.onnx_graph` says what is in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch

from .. import _optional
from .._files import replacing
from ..network.filling import overflows
from ..network.model import VoVNet
from ..ops import ConvParams, NetworkParams
from ..ops.features import check_size, rebuild
from .freeze import FrozenVoVNet, freeze
from .onnx_check import ALLOWED, Check, Comparison, ExportError, Size, sizes
from .onnx_graph import AXES, OLDEST_OPSET, Graph, to_proto

OPSET = 17
"""The newest that TensorRT 8.6 reads, and TensorRT 10 as well."""

LARGEST = 2**31 - 2**20
"""Bytes of weights. A protobuf message, which an ONNX file is, ends at 2 GiB."""


class Report(NamedTuple):
    """What was exported.

    Attributes:
        path: the file.
        nbytes: its size.
        opset: of its nodes.
        nodes: how many there are of each kind.
        checks: what was compared; none if that was not wanted.
        largest: the largest value between images and features in these comparisons, where
            weights and activations are fp16; None otherwise.
    """

    path: Path
    nbytes: int
    opset: int
    nodes: dict[str, int]
    checks: tuple[Check, ...]
    largest: float | None


def onnx(
    model: VoVNet | FrozenVoVNet,
    path: str | os.PathLike[str],
    size: Size,
    *,
    dynamic: Collection[str] = (),
    opset: int = OPSET,
    dtype: torch.dtype = torch.float32,
    io_dtype: torch.dtype | None = None,
    check: bool = True,
    told: Callable[[str], None] = lambda text: None,
) -> Report:
    """Write a network to an ONNX file, and compare what onnxruntime makes of it before it is there.

    The input is ``image``, ``[N, C, H, W]``; the outputs are the model's ``out_features``, by
    name. Batch norms have their running statistics and are in the weights, folded in fp32 (fp64
    for fp64) and rounded once. The same network gives the same file, byte for byte.

    The comparison is on a CPU, with normally distributed images, as normalised ones are: of
    ``size``; and where something is dynamic, also of half that size made odd, and of the smallest
    that the network takes, where pools reach over the edge. A model is compared with its modules
    in evaluation mode, a frozen network with its weights in plain PyTorch, both in fp32; errors
    may be :data:`.onnx_check.OWN` times those that rounding makes in PyTorch. onnxruntime computes
    fp16 in fp32 on a CPU: that nothing leaves the range of fp16 where a GPU will compute is looked
    at in PyTorch, on the same images.

    Args:
        model: with its weights loaded. It is left as it is.
        path: the file; one that is there is replaced, and hands on its mode.
        size: N, H, W of the images. What is not dynamic is this for ever.
        dynamic: ``batch``, ``height`` and ``width``, or some of them: free in the file.
        opset: of the nodes, 11 or newer. TensorRT 8.6 and 10 read 17.
        dtype: of weights and activations, ``torch.float32`` or ``torch.float16``. For TensorRT's
            own mixed precision export fp32: it then chooses by layer.
        io_dtype: of images and features; ``dtype`` by default.
        check: whether to compare.
        told: is called with what is done next.

    Returns:
        what was exported, with the errors.

    Raises:
        ExportError: onnx is not installed, or onnxruntime; a weight or an activation is beyond
            fp16; the file would be larger than 2 GiB, which no published network is; onnxruntime
            cannot run it, or computes something else. There is then no file, or the old one.
        TypeError, ValueError: an argument is none of those; the image is too small.
        BackendError: the model cannot be folded; see :func:`vovnet_fast.freeze`.
        OSError: there is no such folder, the disk is full, or may not be written.
    """
    if not isinstance(model, (VoVNet, FrozenVoVNet)):
        raise TypeError(
            "an export to ONNX takes a vovnet_fast.VoVNet or what vovnet_fast.freeze made of one, "
            f"got {type(model).__name__}"
        )
    require(size, dynamic, opset, dtype, io_dtype, check=check)
    io_dtype, free = io_dtype or dtype, frozenset(dynamic)
    check_size(model.spec, model.out_features, *size[1:])
    path = Path(path)
    told("folding batch norms")
    params = _folded(model)
    graph = Graph(params, model.out_features, dtype, io_dtype)
    _require_weights(params, graph)
    with replacing(path) as temporary:
        told(f"writing {graph.nbytes / 1e6:.1f} MB")
        _write(graph, temporary, size, free, opset)
        found = None
        if check:
            found = Comparison(model, params, graph, temporary, told)
            for each in sizes(graph, size, free):
                found.compare(each)
        nbytes = os.path.getsize(temporary)
    checks = () if found is None else tuple(found.checks)
    largest = None if found is None else found.largest
    return Report(path, nbytes, opset, graph.counts(), checks, largest)


def require(
    size: Size,
    dynamic: Collection[str],
    opset: int,
    dtype: torch.dtype,
    io_dtype: torch.dtype | None,
    *,
    check: bool,
) -> None:
    """Refuse what :func:`onnx` would refuse of any network, with its errors."""
    if len(size) != 3 or not all(type(length) is int and length >= 1 for length in size):
        raise ValueError(f"size must be N, H, W of the images, three positive integers, got {size}")
    if isinstance(dynamic, str) or not set(dynamic) <= set(AXES):
        raise ValueError(f"dynamic must be some of {', '.join(AXES)}, got {dynamic!r}")
    for name, value in (("dtype", dtype), ("io_dtype", io_dtype or dtype)):
        if value not in ALLOWED:
            raise TypeError(f"{name} must be torch.float32 or torch.float16, got {value}")
    if io_dtype == torch.float16 and dtype != torch.float16:
        raise ValueError("io_dtype is torch.float16 and dtype is not: export in torch.float16")
    for package in ("onnx", "onnxruntime") if check else ("onnx",):
        reason = _optional.why_not(package)
        if reason is not None:
            raise ExportError(f"an export to ONNX needs {package}: {reason}")
    import onnx as library

    newest = library.defs.onnx_opset_version()
    if type(opset) is not int or not OLDEST_OPSET <= opset <= newest:
        raise ValueError(
            f"opset must be {OLDEST_OPSET} to {newest}, the newest that onnx "
            f"{library.__version__} knows, got {opset!r}"
        )


# --------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------


def _folded(model: VoVNet | FrozenVoVNet) -> NetworkParams:
    """The network on the CPU in fp32, all scales in the weights."""
    network = freeze(model, torch.float32) if isinstance(model, VoVNet) else model
    network._follow()  # Buffers that are not the network's are refused.
    with torch.inference_mode(False), torch.no_grad():
        params = network._unpack()
        layers = [_in_weights(layer) for layer in params.convs()]
        fcs = [fc.detach().cpu().float() for fc in params.fcs()]
        return rebuild(layers, fcs, params.spec, params.encoded_spec)


def _in_weights(layer: ConvParams) -> ConvParams:
    scale = layer.scale[:, None, None, None]
    depthwise = None if layer.depthwise is None else layer.depthwise.detach().cpu().float()
    return layer._replace(
        weight=(layer.weight.to(scale.dtype) * scale).detach().cpu().float(),
        scale=torch.ones_like(layer.scale, dtype=torch.float32, device="cpu"),
        shift=layer.shift.detach().cpu().float(),
        depthwise=depthwise,
    )


def _require_weights(params: NetworkParams, graph: Graph) -> None:
    if graph.nbytes > LARGEST:
        raise ExportError(
            f"the weights of {graph.spec.name} take {graph.nbytes / 2**30:.2f} GiB in "
            f"{graph.dtype}, and an ONNX file ends at 2 GiB: export in torch.float16, or fewer "
            "features"
        )
    for name, weight in graph.weights.items():
        if not weight.isfinite().all():
            exact = Graph(params, graph.out_features, torch.float32, torch.float32).weights[name]
            lost = overflows(exact, graph.dtype)
            raise ExportError(
                f"{name}, with its batch norm folded in, holds {lost} values beyond "
                f"{graph.dtype}: export in torch.float32"
                if lost
                else f"{name} holds NaN or Inf: its training had diverged, or the file is damaged"
            )


def _write(graph: Graph, path: str, size: Size, dynamic: frozenset[str], opset: int) -> None:
    import onnx as library

    proto = to_proto(graph, size, dynamic, opset)
    library.checker.check_model(proto)
    with open(path, "wb") as file:
        file.write(proto.SerializeToString())
