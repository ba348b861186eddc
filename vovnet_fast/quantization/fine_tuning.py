"""Training on what the integers compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arithmetic.layers import QuantizedNetwork
from ..ops import ConvParams
from ..ops.features import check_size
from .building import build
from .floating import Folded
from .formats import Format
from .network import QuantizedVoVNet
from .ranges import Range
from .report import measure
from .straight_through import StraightThrough


class FineTuning(nn.Module):
    """A quantised network whose weights can be trained; see :mod:`.straight_through`.

    In int8 its features are those of :meth:`quantized`, bit for bit. Weights are rounded anew at
    every call, with a scale that follows them; ranges of activations stay. Norms are in the
    weights: there is nothing in it that training and evaluation do differently.

    Attributes:
        spec: the architecture.
        out_features: names of the returned features, in network order.
        feature_channels: their channels, in the same order.
        form: dtype and levels.
    """

    def __init__(
        self,
        folded: Folded,
        ranges: dict[str, Range],
        form: Format,
        out_features: tuple[str, ...],
    ) -> None:
        super().__init__()
        channels = folded.spec.feature_channels()
        self.spec, self.form, self.out_features = folded.spec, form, out_features
        self.feature_channels = tuple(channels[name] for name in out_features)
        self._strides = {name: layer.stride for name, layer in folded.layers.items()}
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        self.depthwise = nn.ParameterDict()
        self.gate_weights, self.gate_biases = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in folded.layers.items():
            self.weights[name] = _parameter(layer.weight)
            self.biases[name] = _parameter(layer.shift)
            if layer.depthwise is not None:
                self.depthwise[name] = _parameter(layer.depthwise)
        for name, (weight, bias) in folded.gates.items():
            self.gate_weights[name], self.gate_biases[name] = _parameter(weight), _parameter(bias)
        self._sites = list(ranges)
        for name, reached in ranges.items():
            self.register_buffer(f"range_{name}", torch.stack([reached.low, reached.high]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[N, C, H, W]`` fp32 images to their features in fp32, with gradients.

        Raises:
            ValueError: too small an image, or one that holds NaN or Inf.
        """
        check_size(self.spec, self.out_features, x.shape[2], x.shape[3])
        if not x.isfinite().all():
            raise ValueError("the image holds NaN or Inf, for which there are no bytes")
        folded = self.folded()
        with torch.no_grad():
            network = self._network(folded)
        return tuple(StraightThrough(network, folded).run(x.float()))

    def quantized(self, images: Tensor | None = None) -> QuantizedVoVNet:
        """The inference module of what it is now, which shares no memory with it.

        Args:
            images: ``[N, C, H, W]``, to measure a report on; without them it has none.
        """
        with torch.no_grad():
            folded = self.folded()
            network = self._network(folded)
            rows = [] if images is None else measure(network, folded, images.float())
            return QuantizedVoVNet(network, rows)

    def folded(self) -> Folded:
        """Its parameters as a network."""
        layers = {}
        for name, weight in self.weights.items():
            spatial = self.depthwise.get(name)
            layers[name] = ConvParams(
                weight, torch.ones_like(self.biases[name]), self.biases[name],
                self._strides[name], spatial,
            )  # fmt: skip
        gates = {name: (w, self.gate_biases[name]) for name, w in self.gate_weights.items()}
        return Folded(self.spec, layers, gates)

    def extra_repr(self) -> str:
        return f"{self.spec.name}, out_features={self.out_features}, dtype={self.form.dtype}"

    def _network(self, folded: Folded) -> QuantizedNetwork:
        ranges = {name: Range(*getattr(self, f"range_{name}")) for name in self._sites}
        return build(folded, ranges, self.form, self.out_features)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone().float())
