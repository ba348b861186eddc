"""An ONNX file in onnxruntime, compared with the network that it was made of in PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..backends import use_backend
from ..compat import zip
from ..network.model import VoVNet
from ..ops import NetworkParams
from ..ops.features import check_size, rebuild
from .folded import folded_forward
from .freeze import FrozenVoVNet
from .onnx_graph import AXES, IMAGE, Graph, Nodes

ALLOWED = {torch.float32: 1e-5, torch.float16: 2e-3}
"""An error of a feature that is always let pass, relative to its largest value, by dtype."""

OWN = 4
"""How many times the error that rounding makes in PyTorch is let pass too. What networks make of it
differs by orders of magnitude."""

HALF = torch.finfo(torch.float16).max

MOST = 0.2
"""What is never let pass."""

Size = tuple[int, int, int]


class ExportError(RuntimeError):
    """A network cannot be exported, or what was exported computes something else."""


class Check(NamedTuple):
    """One feature of images of one size, in onnxruntime and in PyTorch.

    Attributes:
        size: N, H, W of the images.
        feature: its name.
        absolute: the largest difference.
        relative: the same over the largest value of the feature in PyTorch.
        allowed: of the latter.
    """

    size: Size
    feature: str
    absolute: float
    relative: float
    allowed: float


def sizes(graph: Nodes, size: Size, dynamic: frozenset[str]) -> Iterator[Size]:
    """What is compared: ``size``, and with other lengths for what is dynamic."""
    yield size
    if not dynamic:
        return
    n, h, w = (axis in dynamic for axis in AXES)
    least = smallest(graph)
    batch = (2 if size[0] == 1 else 1) if n else size[0]
    half = [max(length // 2, least) | 1 for length in size[1:]]
    yield batch, half[0] if h else size[1], half[1] if w else size[2]
    if h or w:
        yield batch, least if h else size[1], least if w else size[2]


def smallest(graph: Nodes) -> int:
    """Height and width of the smallest square image."""
    length = 1
    while True:
        try:
            check_size(graph.spec, graph.out_features, length, length)
        except ValueError:
            length += 1
        else:
            return length


class Comparison:
    """Of a file in onnxruntime with a network in PyTorch.

    Attributes:
        checks: what was compared.
        largest: see :class:`.export.Report`.
    """

    def __init__(
        self,
        model: VoVNet | FrozenVoVNet,
        params: NetworkParams,
        graph: Graph,
        path: str,
        told: Callable[[str], None],
    ) -> None:
        self.checks: list[Check] = []
        self.largest: float | None = 0.0 if graph.dtype == torch.float16 else None
        self._params, self._graph, self._told = params, graph, told
        self._session = session(path)
        self._twin: VoVNet | None = None
        if isinstance(model, VoVNet):
            self._twin = copy.deepcopy(model).cpu().float().eval()

    def compare(self, size: Size) -> None:
        """
        Raises:
            ExportError: a feature differs by more than is allowed, or fp16 is left.
        """
        shape, graph = "x".join(map(str, size)), self._graph
        n, h, w = size
        self._told(f"running {shape} in PyTorch")
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(n, graph.channels, h, w, generator=generator).to(graph.io_dtype)
        expected, own = self._expected(image.float(), shape)
        self._told(f"running {shape} in onnxruntime")
        found = self._run(image, shape)
        for i, name in enumerate(graph.out_features):
            if found[i].shape != expected[i].shape:
                raise _different(f"{name} of {shape}", _list(found[i]), _list(expected[i]))
            absolute, relative = _error(found[i], expected[i])
            allowed = ALLOWED[graph.dtype]
            if own is None and not relative <= allowed:
                self._told(f"running {shape} in PyTorch in fp64")
                own = self._error_of_fp32(image)
            if own is not None:
                allowed = min(MOST, max(allowed, OWN * own[i]))
            self.checks.append(Check(size, name, absolute, relative, allowed))
            if not relative <= allowed:  # NaN is not either.
                raise _different(
                    f"{name} of {shape}",
                    f"errors up to {absolute:.3g}, {relative:.3g} of its largest value",
                    f"at most {allowed:.3g}",
                )

    def _expected(self, image: Tensor, shape: str) -> tuple[list[Tensor], list[float] | None]:
        """The features in fp32, and for fp16 the relative errors that fp16 makes of them."""
        with torch.no_grad(), torch.device("cpu"), use_backend("reference"):
            features = self._folded(image) if self._twin is None else list(self._twin(image))
            if self.largest is None:
                return features, None
            with _Half() as seen:
                half = self._folded(image.half().float(), rounded=True)
            self.largest = max(self.largest, seen.largest)
        if self.largest > HALF:
            raise ExportError(
                f"a value between the images and the features of {shape} is {self.largest:.4g} in "
                "fp32, and fp16 ends at 65504: export in torch.float32, and let the runtime choose "
                "by layer"
            )
        return features, [_error(*pair)[1] for pair in zip(half, features, strict=True)]

    def _error_of_fp32(self, image: Tensor) -> list[float]:
        """The relative errors that PyTorch makes in fp32, against fp64."""
        with torch.no_grad(), torch.device("cpu"):
            pairs = zip(self._folded(image), self._folded(image.double()), strict=True)
            return [_error(*pair)[1] for pair in pairs]

    def _folded(self, image: Tensor, *, rounded: bool = False) -> list[Tensor]:
        """The features by the folded weights, as they are or as they are in fp16."""
        params, dtype = self._params, image.dtype

        def converted(weight: Tensor) -> Tensor:
            return (weight.half() if rounded else weight).to(dtype)

        layers = [
            layer._replace(
                weight=converted(layer.weight),
                shift=converted(layer.shift),
                depthwise=None if layer.depthwise is None else converted(layer.depthwise),
            )
            for layer in params.convs()
        ]
        fcs = [converted(fc) for fc in params.fcs()]
        params = rebuild(layers, fcs, params.spec, params.encoded_spec)
        statistics = image.new_zeros(0), image.new_ones(0)  # The scales are in the weights.
        return folded_forward(image, params, self._graph.out_features, statistics)

    def _run(self, image: Tensor, shape: str) -> list[Tensor]:
        try:
            found = self._session.run(list(self._graph.out_features), {IMAGE: image.numpy()})
        except Exception as error:  # Its own classes come and go with its versions.
            raise ExportError(f"onnxruntime cannot run {shape}: {error}") from error
        return [torch.from_numpy(feature).float() for feature in found]


def session(path: str | bytes, *, optimised: bool = True) -> Any:
    """A file in onnxruntime, on a CPU.

    Args:
        path: the file, or what is in it.
        optimised: nodes may be put together; otherwise each runs as it is written.

    Raises:
        ExportError: it cannot read it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Errors; it warns of what it optimises.
    options.intra_op_num_threads = torch.get_num_threads()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} cannot read what was written: {error}. A newer "
            "one may, or an older opset"
        ) from error


def _different(what: str, found: str, expected: str) -> ExportError:
    return ExportError(
        f"{what} is not in onnxruntime what it is in PyTorch: {found}, expected {expected}. "
        "Nothing was written: try another onnxruntime, and report it"
    )


def _list(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _error(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference, and the same over the largest value."""
    absolute = (found - expected).abs().max().item()
    largest = expected.abs().max().item()
    return absolute, absolute / largest if absolute and largest else absolute


class _Half(TorchDispatchMode):
    """Rounds what functions of PyTorch's return to fp16, as a GPU would from node to node.

    onnxruntime computes fp16 in fp32 on a CPU, and rounds nothing in between.

    Attributes:
        largest: the largest magnitude before that, up to the first beyond fp16.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = isinstance(out, Tensor) and out.is_floating_point() and not func.is_view
        if made and out.numel() and self.largest <= HALF:  # What Inf becomes later says nothing.
            self.largest = max(self.largest, out.abs().max().item())
            out.copy_(out.half())
        return out
