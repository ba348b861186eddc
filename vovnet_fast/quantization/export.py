"""A network in eight bits as an ONNX file, compared with its own numbers before it is there.

>>> import vovnet_fast
>>> from vovnet_fast.quantization import export
>>> quantized = vovnet_fast.load_quantized("v39-int8.safetensors")  # doctest: +SKIP
>>> report = export.onnx(quantized, "v39-int8.onnx", (1, 640, 640))  # doctest: +SKIP

:mod:`.onnx_graph` says what is in it, and what of it is exact.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch

from .._files import replacing
from ..deploy import export as floating
from ..deploy.export import OPSET
from ..deploy.onnx_check import Size, sizes
from ..deploy.onnx_graph import to_proto
from ..ops.features import check_size
from .network import QuantizedVoVNet
from .onnx_check import Check, Comparison
from .onnx_graph import OLDEST_OPSET, OLDEST_OPSET_OF_FP8, QdqGraph


class Report(NamedTuple):
    """What was exported.

    Attributes:
        path: the file.
        nbytes: its size.
        opset: of its nodes.
        nodes: how many there are of each kind.
        steps: the largest difference of an activation, given what came before it, in steps of it.
        checks: features that were compared; none if that was not wanted.
    """

    path: Path
    nbytes: int
    opset: int
    nodes: dict[str, int]
    steps: float
    checks: tuple[Check, ...]


def onnx(
    network: QuantizedVoVNet,
    path: str | os.PathLike[str],
    size: Size,
    *,
    dynamic: Collection[str] = (),
    opset: int | None = None,
    check: bool = True,
    told: Callable[[str], None] = lambda text: None,
) -> Report:
    """Write a network in int8 or fp8 to an ONNX file of quantised and dequantised tensors (QDQ),
    and compare what onnxruntime makes of it before it is there.

    Images and features are fp32, called ``image`` and as the features are. The same network gives
    the same file, byte for byte. The comparison is on a CPU, with smooth random images within the
    range of the calibration: on small ones every activation, by :mod:`.onnx_check`; and the
    features, on images of the sizes of :func:`vovnet_fast.deploy.export.onnx`.

    Args:
        network: what :func:`vovnet_fast.quantize` made. It is left as it is.
        path: the file; one that is there is replaced, and hands on its mode.
        size: N, H, W of the images. What is not dynamic is this for ever.
        dynamic: ``batch``, ``height`` and ``width``, or some of them: free in the file.
        opset: of the nodes, 13 or newer, by default 17, which TensorRT 8.6 and 10 read; in fp8 19.
        check: whether to compare.
        told: is called with what is done next.

    Returns:
        what was exported, with the differences.

    Raises:
        ExportError: onnx is not installed, or onnxruntime; onnxruntime cannot run it, or computes
            something else. There is then no file, or the old one.
        TypeError: it is no quantised network.
        ValueError: an argument is none of those; the image is too small.
        OSError: there is no such folder, the disk is full, or may not be written.
    """
    if not isinstance(network, QuantizedVoVNet):
        raise TypeError(
            "an export to ONNX in eight bits takes what quantize or load_quantized made, got "
            f"{type(network).__name__}: vovnet_fast.deploy.export.onnx takes others"
        )
    whole = network.dtype == "int8"
    oldest = OLDEST_OPSET if whole else OLDEST_OPSET_OF_FP8
    if opset is None:
        opset = max(OPSET, oldest)
    floating.require(size, dynamic, opset, torch.float32, None, check=check)
    if opset < oldest:
        why = "whose weights have a scale for each channel" if whole else "which older ones lack"
        raise ValueError(
            f"opset must be {oldest} or newer for a network in {network.dtype}, {why}; got {opset}"
        )
    check_size(network.spec, network.out_features, *size[1:])
    path, free = Path(path), frozenset(dynamic)
    graph = QdqGraph(network.network)
    with replacing(path) as temporary:
        told(f"writing {graph.nbytes / 1e6:.1f} MB")
        _write(graph, temporary, size, free, opset)
        checks: list[Check] = []
        steps = 0.0
        if check:
            comparison = Comparison(network, graph, temporary, opset, told)
            steps = max(comparison.layer_by_layer().values())
            for each in sizes(graph, size, free):
                checks += comparison.features(each)
        nbytes = os.path.getsize(temporary)
    return Report(path, nbytes, opset, graph.counts(), steps, tuple(checks))


def _write(graph: QdqGraph, path: str, size: Size, free: frozenset[str], opset: int) -> None:
    import onnx as library

    proto = to_proto(graph, size, free, opset)
    library.checker.check_model(proto)
    with open(path, "wb") as file:
        file.write(proto.SerializeToString())
