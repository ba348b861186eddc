"""Who is measured on whole networks in inference, with the best settings that each has.

A peer that this machine lacks raises :class:`Missing`, with the reason. Peers get the same
weights and images; each wants the latter in its own form (:attr:`Peer.images`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vovnet_fast import backends, freeze, use_backend
from vovnet_fast.bench.training import Shape, image
from vovnet_fast.plan import DTYPES

from .networks import (
    build,
    build_timm,
    counted,
    extension_launches,
    fold_ahead,
    operations,
    text,
)

Model = Callable[[Any], Sequence[Tensor]]
"""Makes the four features of images."""


class Missing(Exception):
    """This machine does not have the peer; the message says why."""


class Case(NamedTuple):
    """A network on images of one size; ``dtype`` is that of activations."""

    spec: str
    shape: Shape
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{self.spec}-{text(self.shape)}-{str(self.dtype).removeprefix('torch.')}"

    def network(self) -> nn.Module:
        """The plain network in this dtype, ``channels_last``, in eval mode."""
        return build(self.spec, self.dtype, self.device)

    def images(self) -> Tensor:
        """``channels_last``, in this dtype."""
        with torch.inference_mode(False):
            return image(self.shape, self.dtype, self.device)


def _same(x: Tensor) -> Tensor:
    return x


class Peer(NamedTuple):
    """Someone who makes features of images.

    Attributes:
        provider: as rows name it.
        build: makes it; may compile, convert, capture.
        settings: which ones it got, in words.
        images: of ``channels_last`` images in the case's dtype, those that it wants.
        backend: under which it runs; that of a row is None for the plain modules.
        same: computes the same function of the same weights as eager.
        slow: takes minutes to build.
        opaque: the reason why nobody can count its launches, where that is so.
    """

    provider: str
    build: Callable[[Case], Model]
    settings: str
    images: Callable[[Tensor], Any] = _same
    backend: str = "reference"
    same: bool = True
    slow: bool = False
    opaque: str = ""

    @property
    def ours(self) -> str | None:
        """The backend, where this is vovnet_fast."""
        return self.backend if self.provider.startswith(("fused", "frozen")) else None

    def ready(self, case: Case) -> Model:
        """Build it, unless it is missing here.

        Raises:
            Missing: the reason why it is.
        """
        reason = backends.why_not(self.backend, case.device)
        if reason is None and self.backend == "triton" and case.device.type == "cpu":
            reason = "the time of Triton's interpreter says nothing"
        if reason is not None:
            raise Missing(f"backend {self.backend}: {reason}")
        # As its user would: outside inference mode, which makes tensors of another kind.
        with torch.inference_mode(False), torch.no_grad():
            return self.build(case)

    def launches(self, case: Case, model: Model) -> int:
        """How many kernels ``model``, which :meth:`ready` made, launches; counted, not measured.

        Of plain PyTorch ATen's operations, of Triton what it would launch with the choices that
        need no measurement, of the extension its calls. Of a CUDA graph, what was captured.

        Raises:
            Missing: it cannot be counted; the message says why.
        """
        if self.opaque:
            raise Missing(self.opaque)
        if self.ours == "triton":
            dtype = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
            launches: int = counted(case.spec, case.shape, dtype)["launches"]["fused"]
            return launches
        if self.ours in ("cpu", "cuda"):
            return extension_launches(self.ours, *case)
        images = self.images(case.images())
        captured: Model = getattr(model, "captured", model)
        return operations(lambda: captured(images))


def _only(case: Case, kind: str, what: str) -> None:
    if case.device.type != kind:
        raise Missing(f"{what}; this is a {case.device.type.upper()}")


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
    _only(case, "cpu", "Inductor's freezing, which packs weights itself, is for CPUs")
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
        _only(case, "cuda", "max-autotune is for GPUs")
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
    _only(case, "cuda", "CUDA graphs need an NVIDIA GPU")
    return _Graphed(_folded(case), case.images())


def _timm(case: Case) -> Model:
    if importlib.util.find_spec("timm") is None:
        raise Missing("timm is not installed")
    try:
        return build_timm(case.spec, case.dtype, case.device)
    except KeyError:
        raise Missing(f"timm has no {case.spec}") from None
    except (ImportError, AttributeError) as error:
        raise Missing(f"timm cannot be imported: {error}") from error


# --------------------------------------------------------------------------------------
# vovnet_fast
# --------------------------------------------------------------------------------------


def _frozen(case: Case) -> Model:
    return freeze(build(case.spec, case.dtype, case.device))


def _frozen_graph(case: Case) -> Model:
    _only(case, "cuda", "CUDA graphs need an NVIDIA GPU")
    return freeze(build(case.spec, case.dtype, case.device), graph=True)


def _ours() -> Iterator[Peer]:
    yield Peer("frozen", _frozen, "vovnet_fast.freeze on plain PyTorch")
    for name in backends.NAMES:
        if name != "reference":
            settings = f"vovnet_fast.freeze, backend {name}"
            yield Peer("fused", _frozen, settings, backend=name)
            if name != "cpu":
                graph = f"{settings}, graph=True"
                yield Peer("fused, graph", _frozen_graph, graph, backend=name)


# --------------------------------------------------------------------------------------
# Other runtimes; those on GPUs are in gpu_runtimes.py
# --------------------------------------------------------------------------------------


@contextlib.contextmanager
def onnx_file(case: Case) -> Iterator[Path]:
    """The network in fp32, exported for images of this size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        with use_backend("reference"):
            model = build(case.spec, torch.float32, case.device)
            images = image(case.shape, torch.float32, case.device).contiguous()
            # The exporter by TorchScript: the newer one takes several times as long.
            torch.onnx.export(
                model, (images,), path, input_names=["images"], dynamo=False, verbose=False
            )
        yield path


def _numpy(x: Tensor) -> Any:
    return x.float().contiguous().numpy()


def _onnxruntime(case: Case) -> Model:
    _only(case, "cpu", "ONNX Runtime is measured on CPUs")
    if case.dtype != torch.float32:
        raise Missing("ONNX Runtime has no convolutions in half precision on CPUs")
    if importlib.util.find_spec("onnxruntime") is None:
        raise Missing("onnxruntime is not installed")
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    with _exported(case) as path:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Any) -> Sequence[Tensor]:
        return [torch.from_numpy(found) for found in session.run(None, {"images": images})]

    return run


def _openvino(case: Case) -> Model:
    _only(case, "cpu", "OpenVINO is measured on CPUs")
    if importlib.util.find_spec("openvino") is None:
        raise Missing("openvino is not installed")
    openvino: Any = importlib.import_module("openvino")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[case.dtype]
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,  # It would bind this very thread, and all peers with it.
    }
    with _exported(case) as path:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(path), "CPU", options)
    request = compiled.create_infer_request()

    def run(images: Any) -> Sequence[Tensor]:
        found = request.infer([images], share_inputs=True, share_outputs=True)
        return [torch.from_numpy(found[output]) for output in compiled.outputs]

    return run


def _onnxruntime_cuda(case: Case) -> Model:
    from . import gpu_runtimes

    return gpu_runtimes.onnxruntime(case)


def _tensorrt(case: Case) -> Model:
    from . import gpu_runtimes

    return gpu_runtimes.tensorrt(case)


@contextlib.contextmanager
def _exported(case: Case) -> Iterator[Path]:
    if importlib.util.find_spec("onnx") is None:
        raise Missing("onnx, which the export needs, is not installed")
    with onnx_file(case) as path:
        yield path


_CL = "channels_last"
_BY_COMPILER = "torch.compile makes kernels of its own, and does not say how many"
_BY_RUNTIME = "a runtime of its own, which does not say what it launches"


def _half(x: Tensor) -> Tensor:
    return x.half().contiguous(memory_format=torch.contiguous_format)


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
    Peer("timm", _timm, f"timm's network of the same convolutions, {_CL}", same=False),
    Peer(
        "onnxruntime", _onnxruntime, "fp32, all graph optimisations, as many threads as torch",
        _numpy, opaque=_BY_RUNTIME,
    ),
    Peer(
        "onnxruntime CUDA", _onnxruntime_cuda,
        "fp16, CUDA provider, all algorithms of cuDNN tried, NHWC preferred", _half,
        opaque=_BY_RUNTIME,
    ),
    Peer(
        "tensorrt", _tensorrt, "fp16, strongly typed, optimisation level 5", _half, slow=True,
        opaque=_BY_RUNTIME,
    ),
    Peer(
        "openvino", _openvino, "latency hint, precision hint of the dtype, threads of torch",
        _numpy, opaque=_BY_RUNTIME,
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
