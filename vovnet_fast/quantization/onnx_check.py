"""An ONNX file of a network in eight bits in onnxruntime, compared with the network's own numbers.

**Layer by layer**: each layer is given the very bytes that it has in onnxruntime, and what it makes
of them must be what onnxruntime makes, to one step, where both round to other sides. So no error
hides behind those that other layers carry on. A step of e4m3 is to the next number of it.

**Features** are compared as they come: how much of the difference at ties is left at the end.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import use_backend
from ..compat import zip
from ..deploy.onnx_check import ExportError, Size, session
from ..deploy.onnx_check import smallest as smallest_side
from ..deploy.onnx_graph import IMAGE as INPUT
from ..deploy.onnx_graph import to_proto
from ..selfcheck.eight_bits import rank
from ..specs import BlockPlan
from .network import QuantizedVoVNet
from .onnx_graph import MIDDLE, QdqGraph, quantized
from .straight_through import Both, StraightThrough, dequantized
from .walking import DEPTHWISE, IMAGE

STEPS = 1.0
"""By how many steps an activation may differ from what the integers make of the same inputs."""

LEAST = 6.0
"""dB of a feature against the integers'. What is carried on from layer to layer is less than the
noise of rounding in a network that is of use; with less than this it is noise."""

_TRIED = 61
"""Height and width of the images of the comparison layer by layer, and 24 more for the width."""


class Check(NamedTuple):
    """One feature of images of one size, in onnxruntime and by the integers.

    Attributes:
        size: N, H, W of the images.
        feature: its name.
        sqnr: ``10 log10(sum(x**2) / sum((y - x)**2))`` in dB, x by the integers, y by the nodes as
            they are written; inf if equal.
        steps: the largest difference of these, in steps of what the feature is rounded to.
        optimised: the first of what onnxruntime makes of the nodes by default. It rounds biases of
            its own accord, and computes some layers in fp32.
    """

    size: Size
    feature: str
    sqnr: float
    steps: float
    optimised: float


class Comparison:
    """Of a file in onnxruntime with the network that it was made of.

    Args:
        network: is copied to the CPU.
        graph: of it.
        path: the file.
        opset: of the file.
        told: is called with what is done next.
    """

    def __init__(
        self,
        network: QuantizedVoVNet,
        graph: QdqGraph,
        path: str,
        opset: int,
        told: Callable[[str], None],
    ) -> None:
        self._network, self._graph = copy.deepcopy(network).cpu(), graph
        self._opset, self._told = opset, told
        self._runners = session(path, optimised=False), session(path)

    def layer_by_layer(self) -> dict[str, float]:
        """The largest difference of each activation, in steps, of layers that are given the same.

        Raises:
            ExportError: one is larger than rounding makes it.
        """
        import onnx

        self._told("comparing layer by layer")
        side = max(_TRIED, smallest_side(self._graph))
        size = 1, side, side + 24
        names = [node.output for node in self._graph.nodes if node.kind == "QuantizeLinear"]
        proto = to_proto(self._graph, size, frozenset(), self._opset)
        kind = onnx.TensorProto.INT8 if self._network.levels < MIDDLE else onnx.TensorProto.UINT8
        read = names
        if self._network.dtype == "fp8":  # Of which NumPy has no numbers.
            kind, read = onnx.TensorProto.FLOAT, [f"{name}/read" for name in names]
            proto.graph.node.extend(
                onnx.helper.make_node("Cast", [name], [output], to=kind)
                for name, output in zip(names, read, strict=True)
            )
        proto.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, kind, None) for name in read
        )
        runner = session(proto.SerializeToString(), optimised=False)
        image = self._image(size)
        features = self._network.out_features
        found = self._run(runner, [*features, *read], image, "layer by layer")
        walker = _Forced(self._network, dict(zip([*features, *names], found, strict=True)))
        with torch.no_grad():
            walker.run(image)
        return walker.steps

    def features(self, size: Size) -> list[Check]:
        """
        Raises:
            ExportError: onnxruntime cannot run images of this size, or a feature is another one.
        """
        shape, names = "x".join(map(str, size)), list(self._network.out_features)
        image = self._image(size)
        self._told(f"running {shape} by the integers")
        with torch.no_grad(), use_backend("auto"):
            expected = [feature.float() for feature in self._network(image)]
        self._told(f"running {shape} in onnxruntime")
        written, optimised = (self._run(r, names, image, shape) for r in self._runners)
        steps, checks = _steps(self._network), []
        for name, wanted, found, other in zip(names, expected, written, optimised, strict=True):
            if found.shape != wanted.shape:
                raise _different(f"{name} of {shape}", _list(found), _list(wanted))
            sqnr = _sqnr(found, wanted)
            if not sqnr >= LEAST:  # NaN is not either.
                raise _different(f"{name} of {shape}", f"{sqnr:.1f} dB", f"at least {LEAST} dB")
            difference = (found - wanted).abs().max().item() / steps[name]
            checks.append(Check(size, name, sqnr, difference, _sqnr(other, wanted)))
        return checks

    def _run(self, runner: Any, names: list[str], image: Tensor, what: str) -> list[Tensor]:
        try:
            found = runner.run(names, {INPUT: image.numpy()})
        except Exception as error:  # Its own classes come and go with its versions.
            raise ExportError(f"onnxruntime cannot run {what}: {error}") from error
        return [torch.from_numpy(each) for each in found]

    def _image(self, size: Size) -> Tensor:
        """Smooth noise, half as large as the images of the calibration at most."""
        n, h, w = size
        network = self._network
        reach = network.network.scales[IMAGE] * network.architecture.form.image_limit / 2
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, network.input_ch, h + 4, w + 4, generator=generator)
        return (F.avg_pool2d(x, 5, 1) * (5 * reach / 3)).clamp(-reach, reach)


class _Forced(StraightThrough):
    """Gives each layer the bytes that onnxruntime has, and compares what both make of them.

    Args:
        network: the integers.
        found: tensors of onnxruntime's, ``[N, C, H, W]``, by name.

    Attributes:
        steps: the largest difference by the name of an activation or a feature.
    """

    def __init__(self, network: QuantizedVoVNet, found: dict[str, Tensor]) -> None:
        super().__init__(network.network)
        self.steps: dict[str, float] = {}
        self._found = found
        activations = network.architecture.names().features
        self._features = {name: feature for feature, name in activations.items()}

    def image(self, x: Tensor) -> Both:
        return self._forced(IMAGE, super().image(x))

    def conv(self, name: str, inputs: list[Both], feature: bool) -> Both:
        made = super().conv(name, inputs, feature)
        allowed = STEPS
        whole = self.network.dtype == "int8"
        if name == "stem_1" and self.network.wide_stem and whole:  # Not rounded are images there.
            weight, _ = dequantized(self.network.layers[name])
            reach = weight.abs().sum((1, 2, 3)).max().item() / self.network.layers[name].scale
            allowed += self.network.scales[IMAGE] / 2 * reach
        forced = self._forced(name, made, allowed)
        if made.sums is None:
            return forced
        sums = forced.q.double().sum((1, 2)).to(made.sums.dtype)
        return forced._replace(sums=sums.unsqueeze(1))

    def finish(self, plan: BlockPlan, z: Both, x: Both | None, feature: bool) -> Both:
        return self._forced(plan.name, super().finish(plan, z, x, feature))

    def _depthwise(self, name: str, source: Both) -> tuple[Tensor, Tensor]:
        q, x = super()._depthwise(name, source)
        return self._compared(name + DEPTHWISE, q, STEPS), x

    def _forced(self, name: str, made: Both, allowed: float = STEPS) -> Both:
        feature = self._features.get(name)
        if feature is not None and made.feature is not None:
            found = self._found[feature]
            self._require(feature, found, made.feature, made.scale, allowed)
        return made._replace(q=self._compared(name, made.q, allowed))

    def _compared(self, name: str, q: Tensor, allowed: float) -> Tensor:
        """Onnxruntime's bytes instead of ``[N, H, W, C]``; these, where it has none."""
        found = self._found.get(quantized(name))
        if found is None:
            return q
        if name == IMAGE and found.dtype == torch.uint8:
            found = found.to(torch.int16) - MIDDLE
        wanted = q.permute(0, 3, 1, 2)
        if self.network.dtype == "fp8":
            found = found.to(q.dtype)
            self._require(name, rank(found).float(), rank(wanted).float(), 1.0, allowed)
        else:
            self._require(name, found.float(), wanted.float(), 1.0, allowed)
        return found.permute(0, 2, 3, 1).to(q.dtype).contiguous()

    def _require(
        self, name: str, found: Tensor, wanted: Tensor, step: float, allowed: float
    ) -> None:
        if found.shape != wanted.shape:
            raise _different(name, _list(found), _list(wanted))
        steps = self.steps[name] = (found - wanted).abs().max().item() / step
        if not steps <= allowed:
            raise _different(name, f"{steps:.3g} steps beside them", f"at most {allowed:.3g}")


def _steps(network: QuantizedVoVNet) -> dict[str, float]:
    """The value of a step of what each feature is rounded to."""
    names, scales = network.architecture.names(), network.network.scales
    return {name: scales[activation] for name, activation in names.features.items()}


def _sqnr(found: Tensor, wanted: Tensor) -> float:
    noise = (found.double() - wanted.double()).square().sum().item()
    if noise == 0:
        return math.inf
    signal = wanted.double().square().sum().item()
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _list(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _different(what: str, found: str, expected: str) -> ExportError:
    return ExportError(
        f"{what} is not in onnxruntime what the network computes: {found}, expected {expected}. "
        "Nothing was written: try another onnxruntime, and report it"
    )
