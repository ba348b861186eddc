"""Peers that run ONNX on a GPU, where they are installed: ONNX Runtime's CUDA provider, TensorRT.

Both get the network in fp16, which they do best in, and tensors that lie on the GPU already.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vovnet_fast import use_backend
from vovnet_fast.bench.training import image

from .networks import build
from .peers import Case, Missing, Model

_INPUT = "images"
_OUTPUTS = ("stage2", "stage3", "stage4", "stage5")
_LEVEL = 5
"""TensorRT's highest optimisation level."""


def _library(name: str, case: Case) -> Any:
    if case.device.type != "cuda":
        kind = case.device.type.upper()
        raise Missing(f"{name} is measured on NVIDIA GPUs; this is a {kind}")
    try:
        importlib.import_module("onnx")  # The export needs it.
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Missing(f"{error.name} is not installed") from error
    except Exception as error:  # Of an installation whose parts do not fit each other.
        raise Missing(f"{name} cannot be imported: {error}") from error


def _exported(case: Case) -> tuple[bytes, list[Tensor]]:
    """The network in fp16 as ONNX, and tensors of its outputs' sizes."""
    with use_backend("reference"), tempfile.TemporaryDirectory() as folder:
        model = build(case.spec, torch.float16, case.device)
        images = image(case.shape, torch.float16, case.device, torch.contiguous_format)
        features = model(images)
        path = Path(folder) / "network.onnx"
        torch.onnx.export(
            model, (images,), path, input_names=[_INPUT], output_names=list(_OUTPUTS),
            dynamo=False, verbose=False,
        )  # fmt: skip
        outputs = [torch.empty_like(f, memory_format=torch.contiguous_format) for f in features]
        return path.read_bytes(), outputs


def onnxruntime(case: Case) -> Model:
    """ONNX Runtime on its CUDA provider. The next call overwrites the features.

    Raises:
        Missing: it is not installed, or without that provider.
    """
    runtime = _library("onnxruntime", case)
    provider = "CUDAExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise Missing("this onnxruntime has no CUDA provider: onnxruntime-gpu has")
    content, outputs = _exported(case)
    settings = {"cudnn_conv_algo_search": "EXHAUSTIVE", "prefer_nhwc": "1"}
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = runtime.InferenceSession(content, options, providers=[(provider, settings)])
    if provider not in session.get_providers():  # It would fall back to the CPU, quietly.
        raise Missing("onnxruntime's CUDA provider does not load here")
    binding = session.io_binding()
    half: Any = importlib.import_module("numpy").float16

    def run(images: Tensor) -> Sequence[Tensor]:
        torch.cuda.current_stream().synchronize()  # It runs on a stream of its own, and waits.
        place = ("cuda", images.device.index or 0, half)
        binding.bind_input(_INPUT, *place, tuple(images.shape), images.data_ptr())
        for name, out in zip(_OUTPUTS, outputs, strict=True):
            binding.bind_output(name, *place, tuple(out.shape), out.data_ptr())
        session.run_with_iobinding(binding)
        return outputs

    return run


def tensorrt(case: Case) -> Model:
    """TensorRT, whose engine is built here, in minutes. The next call overwrites the features.

    Raises:
        Missing: it is not installed, or cannot take the network.
    """
    trt = _library("tensorrt", case)
    content, outputs = _exported(case)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        raise Missing(f"TensorRT cannot take the network: {parser.get_error(0)}")
    config = builder.create_builder_config()
    config.builder_optimization_level = _LEVEL
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise Missing("TensorRT builds no engine of the network here")
    engine = trt.Runtime(logger).deserialize_cuda_engine(built)
    context = engine.create_execution_context()

    def run(images: Tensor) -> Sequence[Tensor]:
        context.set_tensor_address(_INPUT, images.data_ptr())
        for name, out in zip(_OUTPUTS, outputs, strict=True):
            context.set_tensor_address(name, out.data_ptr())
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return outputs

    return run
