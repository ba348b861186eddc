"""Runtimes of ONNX as peers: ONNX Runtime and OpenVINO on CPUs, ONNX Runtime and TensorRT on GPUs.

On a GPU the network is in fp16, which both do best in, for TensorRT in int8 and fp8 as well. Images
and features lie there already: the next call overwrites the features.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vovnet_fast import use_backend
from vovnet_fast.quantization import export
from vovnet_fast.tools.bench.training import image

from .networks import build
from .peer import Case, Missing, Model, imported, only

IMAGES = "images"
FEATURES = ("stage2", "stage3", "stage4", "stage5")
_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorRT is measured on NVIDIA GPUs"
_LEVEL = 5
"""TensorRT's highest level of optimisation."""


@contextlib.contextmanager
def onnx_file(case: Case, dtype: torch.dtype = torch.float32) -> Iterator[Path]:
    """The network in a dtype, exported for images of this size."""
    model = build(case.spec, dtype, case.device)
    with exported(model, image(case.shape, dtype, case.device).contiguous()) as path:
        yield path


@contextlib.contextmanager
def exported(model: nn.Module, images: Tensor) -> Iterator[Path]:
    """A file of a network for images like these."""
    imported("onnx")  # torch's exporter needs it.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        with use_backend("reference"):
            # The exporter by TorchScript: the newer one takes several times as long.
            torch.onnx.export(
                model, (images,), path, input_names=[IMAGES], output_names=list(FEATURES),
                dynamo=False, verbose=False,
            )  # fmt: skip
        yield path


# --------------------------------------------------------------------------------------
# CPUs
# --------------------------------------------------------------------------------------


def onnxruntime(case: Case) -> Model:
    """ONNX Runtime on its CPU provider."""
    only(case, "cpu", "ONNX Runtime is measured on CPUs")
    if case.dtype != torch.float32:
        raise Missing("ONNX Runtime has no convolutions in half precision on CPUs")
    with onnx_file(case) as path:
        return session_of(path)


def session_of(path: Path) -> Model:
    """What ONNX Runtime makes of a file on a CPU; it takes images of NumPy."""
    runtime = imported("onnxruntime")
    options = _all_optimisations(runtime)
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Any) -> Sequence[Tensor]:
        return [torch.from_numpy(found) for found in session.run(None, {IMAGES: images})]

    return run


def openvino(case: Case) -> Model:
    """OpenVINO."""
    only(case, "cpu", "OpenVINO is measured on CPUs")
    library = imported("openvino")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[case.dtype]
    with onnx_file(case) as path:
        return compiled_by_openvino(library.Core().read_model(path), precision)


def compiled_by_openvino(model: Any, precision: str) -> Model:
    """What OpenVINO makes of a model of its own on a CPU; it takes images of NumPy."""
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,  # It would bind this very thread, and all peers with it.
    }
    compiled = imported("openvino").Core().compile_model(model, "CPU", options)
    request = compiled.create_infer_request()

    def run(images: Any) -> Sequence[Tensor]:
        found = request.infer([images], share_inputs=True, share_outputs=True)
        return [torch.from_numpy(found[output]) for output in compiled.outputs]

    return run


def _all_optimisations(runtime: Any) -> Any:
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return options


# --------------------------------------------------------------------------------------
# GPUs
# --------------------------------------------------------------------------------------


def onnxruntime_cuda(case: Case) -> Model:
    """ONNX Runtime on its CUDA provider."""
    only(case, "cuda", "ONNX Runtime's CUDA provider is measured on NVIDIA GPUs")
    runtime = imported("onnxruntime")
    if _CUDA not in runtime.get_available_providers():
        raise Missing("this onnxruntime has no CUDA provider: onnxruntime-gpu has")
    settings = {"cudnn_conv_algo_search": "EXHAUSTIVE", "prefer_nhwc": "1"}
    with onnx_file(case, torch.float16) as path:
        session = runtime.InferenceSession(
            path, _all_optimisations(runtime), providers=[(_CUDA, settings)]
        )
    if _CUDA not in session.get_providers():  # It would fall back to the CPU, quietly.
        raise Missing("onnxruntime's CUDA provider does not load here")
    binding, outputs = session.io_binding(), _outputs(case, torch.float16)
    half: Any = importlib.import_module("numpy").float16

    def run(images: Tensor) -> Sequence[Tensor]:
        torch.cuda.current_stream().synchronize()  # It runs on a stream of its own, and waits.
        place = ("cuda", images.device.index or 0, half)
        binding.bind_input(IMAGES, *place, tuple(images.shape), images.data_ptr())
        for name, out in zip(FEATURES, outputs, strict=True):
            binding.bind_output(name, *place, tuple(out.shape), out.data_ptr())
        session.run_with_iobinding(binding)
        return outputs

    return run


def tensorrt(case: Case) -> Model:
    """TensorRT, whose engine is built here, in minutes."""
    only(case, "cuda", _TENSORRT)
    imported("tensorrt")
    with onnx_file(case, torch.float16) as path:
        return _engine(path, _outputs(case, torch.float16))


def tensorrt_in(dtype: str) -> Callable[[Case], Model]:
    """TensorRT in int8 or fp8: of the network that is ours in it, by its ONNX file."""

    def make(case: Case) -> Model:
        only(case, "cuda", _TENSORRT)
        imported("tensorrt")
        with quantized_file(case, dtype) as path:
            # What has no Q and DQ around it may run in fp16, as in fp32.
            return _engine(path, _outputs(case, torch.float32), dtype.upper(), "FP16")

    return make


@contextlib.contextmanager
def quantized_file(case: Case, dtype: str) -> Iterator[Path]:
    """The ONNX file of :meth:`.Case.quantized`, for images of the case's size.

    It is not compared with anything: the feature of the engine is.
    """
    imported("onnx")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export.onnx(case.quantized(dtype), path, case.shape, check=False)
        yield path


def _engine(path: Path, outputs: Sequence[Tensor], *precisions: str) -> Model:
    """What TensorRT makes of a file, by default in the dtypes that it says (strongly typed); with
    ``precisions``, names of its flags, in the fastest of these, where it has such flags."""
    trt = imported("tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flags = [getattr(trt.BuilderFlag, name, None) for name in precisions]
    weakly = bool(flags) and None not in flags
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(0 if weakly else typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(path.read_bytes()):
        raise Missing(f"TensorRT cannot take the network: {parser.get_error(0)}")
    config = builder.create_builder_config()
    config.builder_optimization_level = _LEVEL
    for flag in flags if weakly else ():
        config.set_flag(flag)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise Missing("TensorRT builds no engine of the network here")
    engine = trt.Runtime(logger).deserialize_cuda_engine(built)
    context = engine.create_execution_context()

    def run(images: Tensor) -> Sequence[Tensor]:
        context.set_tensor_address(IMAGES, images.data_ptr())
        for name, out in zip(FEATURES, outputs, strict=True):
            context.set_tensor_address(name, out.data_ptr())
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return outputs

    return run


def _outputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Contiguous tensors of the features' sizes."""
    with use_backend("reference"):
        features = build(case.spec, torch.float16, case.device)(case.images().half())
    return [
        torch.empty_like(f, dtype=dtype, memory_format=torch.contiguous_format) for f in features
    ]
