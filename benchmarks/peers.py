"""Who is measured on whole networks in inference, with the best settings that each has.

A peer that this machine lacks raises :class:`Missing`, with the reason. Peers get the same
weights and images; each wants the latter in its own form (:attr:`Peer.images`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vovnet_fast import backends, freeze, use_backend
from vovnet_fast.arithmetic import DTYPES
from vovnet_fast.backends import eight_bits
from vovnet_fast.tools.bench.training import image

from . import runtimes
from .networks import TIMM, build, build_timm, fold_ahead
from .peer import Case, Missing, Model, Peer, imported, only

__all__ = ["EAGER", "PEERS", "Case", "Missing", "Peer"]


# --------------------------------------------------------------------------------------
# PyTorch
# --------------------------------------------------------------------------------------


def _plain(case: Case) -> Model:
    return case.network()


def _nchw(case: Case) -> Model:
    network = case.network()
    return network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _amp(case: Case) -> Model:
    if case.dtype == torch.float32:
        raise Missing("autocast has nothing to cast to where activations are in fp32")
    model = build(case.spec, torch.float32, case.device)

    def run(x: Tensor) -> Sequence[Tensor]:
        with torch.autocast(case.device.type, case.dtype):
            features: Sequence[Tensor] = model(x)
        return features

    return run


def _folded(case: Case) -> Model:
    return fold_ahead(build(case.spec, case.dtype, case.device))


def _compiled(case: Case) -> Model:
    return torch.compile(case.network(), dynamic=False)


def _compiled_folded(case: Case) -> Model:
    if case.device.type == "cpu":
        return _frozen_by_inductor(case)
    return torch.compile(_folded(case), dynamic=False)


def _compiled_folded_nchw(case: Case) -> Model:
    only(case, "cpu", "Inductor's freezing, which packs weights itself, is for CPUs")
    return _frozen_by_inductor(case, torch.contiguous_format)


def _frozen_by_inductor(
    case: Case, memory_format: torch.memory_format = torch.channels_last
) -> Model:
    """Inductor's own folding and packing of weights, which is its best on a CPU."""
    import torch._inductor.config as inductor

    network = build(case.spec, case.dtype, case.device)
    network = network.to(memory_format=memory_format)  # type: ignore[call-overload]
    with inductor.patch(freezing=True):
        model = torch.compile(network, dynamic=False)
        model(image(case.shape, case.dtype, case.device, memory_format))
    return model


def _max_autotune(mode: str) -> Callable[[Case], Model]:
    def make(case: Case) -> Model:
        only(case, "cuda", "max-autotune is for GPUs")
        return torch.compile(_folded(case), mode=mode, dynamic=False)

    return make


class _Graphed:
    """A CUDA graph of a network, ``captured``. The next call overwrites its features."""

    def __init__(self, model: Model, images: Tensor) -> None:
        self.captured = model
        self._images = images.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(self._images)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._features = model(self._images)

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        self._images.copy_(images)
        self._graph.replay()
        return self._features


def _folded_graph(case: Case) -> Model:
    only(case, "cuda", "CUDA graphs need an NVIDIA GPU")
    return _Graphed(_folded(case), case.images())


def _timm(case: Case) -> Model:
    imported("timm")
    if case.spec not in TIMM:
        raise Missing(f"timm has no {case.spec}")
    return build_timm(case.spec, case.dtype, case.device)


# --------------------------------------------------------------------------------------
# vovnet_fast
# --------------------------------------------------------------------------------------


def _frozen(case: Case) -> Model:
    return freeze(build(case.spec, case.dtype, case.device))


def _frozen_graph(case: Case) -> Model:
    only(case, "cuda", "CUDA graphs need an NVIDIA GPU")
    return freeze(build(case.spec, case.dtype, case.device), graph=True)


EIGHT_BITS = 0.3
"""How far features in eight bits may be from eager's: of random weights and images int8 makes some
hundredths, fp8 a tenth."""


def _quantized(dtype: str, *, graph: bool = False) -> Callable[[Case], Model]:
    def make(case: Case) -> Model:
        if graph:
            only(case, "cuda", "CUDA graphs need an NVIDIA GPU")
        found, reason = eight_bits.find(_BACKENDS[case.device.type], case.device, dtype, ())
        if found is None:
            raise Missing(f"{dtype}: {reason}")
        model = case.quantized(dtype)
        if not graph:
            return model
        with use_backend("triton"):
            return _Graphed(model, case.images())

    return make


_BACKENDS = {"cpu": "cpu", "cuda": "triton"}


def _in_eight_bits() -> Iterator[Peer]:
    for backend, dtype, graph in (
        ("cpu", "int8", False), ("triton", "int8", False), ("triton", "fp8", False),
        ("triton", "int8", True), ("triton", "fp8", True),
    ):  # fmt: skip
        settings = f"vovnet_fast.quantize in {dtype}, backend {backend}"
        yield Peer(
            f"fused, {dtype}{', graph' if graph else ''}", _quantized(dtype, graph=graph),
            f"{settings}, a CUDA graph" if graph else settings, backend=backend,
            apart=EIGHT_BITS,
            opaque="calls of the extension are recorded" if backend == "cpu" else "",
        )  # fmt: skip


def _ours() -> Iterator[Peer]:
    yield Peer("frozen", _frozen, "vovnet_fast.freeze on plain PyTorch")
    for name in backends.NAMES:
        if name != "reference":
            settings = f"vovnet_fast.freeze, backend {name}"
            yield Peer("fused", _frozen, settings, backend=name)
            if name != "cpu":
                graph = f"{settings}, graph=True"
                yield Peer("fused, graph", _frozen_graph, graph, backend=name)


_CL = "channels_last"
_BY_COMPILER = "torch.compile makes kernels of its own, and does not say how many"
_BY_RUNTIME = "a runtime of its own, which does not say what it launches"


def _numpy(x: Tensor) -> Any:
    return x.float().contiguous().numpy()


def _half(x: Tensor) -> Tensor:
    return x.half().contiguous(memory_format=torch.contiguous_format)


def _single(x: Tensor) -> Tensor:
    return x.float().contiguous(memory_format=torch.contiguous_format)


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.contiguous_format)


EAGER = Peer("eager", _plain, f"plain modules in the dtype, {_CL}")
"""What all are compared with."""

_LISTED = [
    EAGER,
    Peer(
        "eager NCHW", _nchw, "plain modules in the dtype, contiguous",
        _contiguous,
    ),
    Peer("eager AMP", _amp, f"plain modules in fp32, {_CL}, autocast", Tensor.float),
    Peer("folded", _folded, f"batch norms folded into weights and biases, {_CL}"),
    Peer(
        "folded, graph", _folded_graph,
        f"batch norms folded into weights and biases, {_CL}, a CUDA graph",
    ),
    *_ours(),
    *_in_eight_bits(),
    Peer("timm", _timm, f"timm's network of the same convolutions, {_CL}", same=False),
    Peer(
        "onnxruntime", runtimes.onnxruntime,
        "fp32, all graph optimisations, as many threads as torch", _numpy, opaque=_BY_RUNTIME,
    ),
    Peer(
        "onnxruntime CUDA", runtimes.onnxruntime_cuda,
        "fp16, CUDA provider, all algorithms of cuDNN tried, NHWC preferred", _half,
        opaque=_BY_RUNTIME,
    ),
    Peer(
        "tensorrt", runtimes.tensorrt, "fp16, strongly typed, optimisation level 5", _half,
        slow=True, opaque=_BY_RUNTIME,
    ),
    *(
        Peer(
            f"tensorrt, {dtype}", runtimes.tensorrt_in(dtype),
            f"{dtype} of vovnet_fast.quantize by its ONNX file (QDQ), fp16 elsewhere, "
            "optimisation level 5", _single, slow=True, opaque=_BY_RUNTIME, apart=EIGHT_BITS,
        )
        for dtype in DTYPES
    ),
    Peer(
        "openvino", runtimes.openvino,
        "latency hint, precision hint of the dtype, threads of torch", _numpy, opaque=_BY_RUNTIME,
    ),
    Peer(
        "compiled", _compiled, f"torch.compile, default mode, {_CL}", slow=True,
        opaque=_BY_COMPILER,
    ),
    Peer(
        "compiled, folded", _compiled_folded,
        f"torch.compile, default mode, folded (on a CPU by Inductor's freezing), {_CL}", slow=True,
        opaque=_BY_COMPILER,
    ),
    Peer(
        "compiled, folded, NCHW", _compiled_folded_nchw,
        "torch.compile, default mode, folded by Inductor's freezing, network and images contiguous",
        _contiguous, slow=True, opaque=_BY_COMPILER,
    ),
    Peer(
        "compiled, max-autotune", _max_autotune("max-autotune-no-cudagraphs"),
        f"torch.compile, max-autotune, folded, {_CL}", slow=True,
        opaque=_BY_COMPILER,
    ),
    Peer(
        "compiled, max-autotune, graph", _max_autotune("max-autotune"),
        f"torch.compile, max-autotune with CUDA graphs, folded, {_CL}", slow=True,
        opaque=_BY_COMPILER,
    ),
]  # fmt: skip


def _named(peer: Peer) -> str:
    """``fused-triton``, ``eager``: unique, and without what pytest's -k takes for an operator."""
    words = [peer.provider.replace(", ", "-").replace(" ", "-")]
    return "-".join([*words, peer.backend] if peer.provider.startswith("fused") else words)


PEERS = {_named(peer): peer for peer in _LISTED}
"""All of them by name, eager first."""
