"""Who quantises to int8 on CPUs, with the settings that each recommends: peers of
:mod:`benchmarks.eight_bits`. All get the same network in fp32 and the same images to calibrate on.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vovnet_fast
from vovnet_fast import freeze, use_backend

from .peer import Missing, Model, imported
from .runtimes import IMAGES, compiled_by_openvino, exported, session_of


class Int8Peer(NamedTuple):
    """Someone who makes features of images.

    Attributes:
        name: as rows name it.
        precision: ``int8``, or what it is compared with.
        settings: which ones it got, in words.
        build: of a network in fp32, in eval mode, and the images to calibrate on.
    """

    name: str
    precision: str
    settings: str
    build: Callable[[nn.Module, Sequence[Tensor]], Model]


# --------------------------------------------------------------------------------------
# vovnet_fast
# --------------------------------------------------------------------------------------


def _ours(**options: Any) -> Callable[[nn.Module, Sequence[Tensor]], Model]:
    def make(network: nn.Module, images: Sequence[Tensor]) -> Model:
        return vovnet_fast.quantize(network, images, report=False, **options)  # type: ignore[arg-type]

    return make


def _frozen(dtype: torch.dtype) -> Callable[[nn.Module, Sequence[Tensor]], Model]:
    def make(network: nn.Module, _: Sequence[Tensor]) -> Model:
        return freeze(network, dtype=dtype)  # type: ignore[arg-type]

    return make


# --------------------------------------------------------------------------------------
# ONNX Runtime
# --------------------------------------------------------------------------------------


def _of_numpy(model: Model) -> Model:
    return lambda x: model(x.numpy())


def _onnxruntime(network: nn.Module, images: Sequence[Tensor]) -> Model:
    with exported(network, images[0][:1]) as path:
        return _of_numpy(session_of(path))


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Its quantiser warns through the root logger, once a layer: whoever called keeps their own
    level."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _onnxruntime_int8(network: nn.Module, images: Sequence[Tensor]) -> Model:
    imported("onnxruntime")
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    shape: Any = importlib.import_module("onnxruntime.quantization.shape_inference")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter([{IMAGES: x.numpy()} for batch in images for x in batch.split(1)])

        def get_next(self) -> Any:
            return next(self._left, None)

    with _only_errors(), exported(network, images[0][:1]) as path:
        ready, quantized = path.with_name("ready.onnx"), path.with_name("int8.onnx")
        shape.quant_pre_process(path, ready, skip_symbolic_shape=True)
        quantization.quantize_static(
            ready, quantized, Reader(), quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8, per_channel=True,
            reduce_range=not has_vnni(),
        )  # fmt: skip
        return _of_numpy(session_of(quantized))


def has_vnni() -> bool:
    """Whether products of bytes are summed without saturation: else its authors advise weights of
    seven bits."""
    with contextlib.suppress(OSError):
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        return "avx512_vnni" in words or "avx_vnni" in words
    return False


# --------------------------------------------------------------------------------------
# OpenVINO
# --------------------------------------------------------------------------------------


def _openvino(precision: str) -> Callable[[nn.Module, Sequence[Tensor]], Model]:
    def make(network: nn.Module, images: Sequence[Tensor]) -> Model:
        library = imported("openvino")
        with exported(network, images[0][:1]) as path:
            return _of_numpy(compiled_by_openvino(library.Core().read_model(path), precision))

    return make


def _openvino_int8(network: nn.Module, images: Sequence[Tensor]) -> Model:
    library, nncf = imported("openvino"), imported("nncf")
    singles = [x.numpy() for batch in images for x in batch.split(1)]
    with exported(network, images[0][:1]) as path:
        model = library.Core().read_model(path)
        quantized = nncf.quantize(
            model, nncf.Dataset(singles), preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(singles),
        )  # fmt: skip
        return _of_numpy(compiled_by_openvino(quantized, "f32"))


# --------------------------------------------------------------------------------------
# Inductor
# --------------------------------------------------------------------------------------


def _inductor_int8(network: nn.Module, images: Sequence[Tensor]) -> Model:
    imported("torchao")
    try:
        pt2e: Any = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
        x86: Any = importlib.import_module(
            "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"
        )
    except ImportError as error:
        raise Missing(f"this torchao has no quantiser for x86: {error}") from None
    import torch._inductor.config as inductor

    example = images[0][:1]
    with use_backend("reference"):
        exported = torch.export.export(network, (example,)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    try:
        prepared = pt2e.prepare_pt2e(exported, quantizer)
    except AssertionError as error:
        raise Missing("torchao's quantiser for x86 asserts that no number is added") from error
    for batch in images:
        for x in batch.split(1):
            prepared(x)
    converted = pt2e.convert_pt2e(prepared)
    with inductor.patch(freezing=True):
        compiled = torch.compile(converted)
        compiled(example)
    run: Model = compiled
    return run


PEERS = (
    Int8Peer("ours", "int8", "vovnet_fast.quantize, 127 levels", _ours()),
    Int8Peer("ours", "int8, 255 levels", "vovnet_fast.quantize(levels=255)", _ours(levels=255)),
    Int8Peer("ours", "bf16", "vovnet_fast.freeze", _frozen(torch.bfloat16)),
    Int8Peer("ours", "fp32", "vovnet_fast.freeze", _frozen(torch.float32)),
    Int8Peer("ONNX Runtime", "int8", "static, QDQ, u8 x s8 by channel, min-max", _onnxruntime_int8),
    Int8Peer("ONNX Runtime", "fp32", "all optimisations", _onnxruntime),
    Int8Peer("OpenVINO", "int8", "NNCF, mixed preset", _openvino_int8),
    Int8Peer("OpenVINO", "bf16", "latency", _openvino("bf16")),
    Int8Peer("OpenVINO", "fp32", "latency", _openvino("f32")),
    Int8Peer("Inductor", "int8", "torchao's PT2E for x86, freezing", _inductor_int8),
)
