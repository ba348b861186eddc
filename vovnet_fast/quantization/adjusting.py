"""What is done to folded weights before they are rounded, and to biases afterwards.

Both are of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
(arXiv:1906.04721), with activations measured on images where that paper infers them from norms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic.layers import QuantizedNetwork
from .building import Builder
from .floating import Floating, Folded
from .formats import Format
from .ranges import Range
from .straight_through import Both, StraightThrough
from .walking import Names

_MOST = 64.0
"""A channel is made so many times larger or smaller at most."""


def equalize(folded: Folded, images: Tensor, out_features: tuple[str, ...]) -> Folded:
    """Give the channels of each activation like ranges, and take it back in the weights that read
    them: the network stays the same function.

    A channel is divided by ``sqrt(range of the channel / range of the weights that read it)``,
    both over the layer's largest. Weights have a scale for each output channel already: so the
    activation's range takes the place that the paper gives to that of the weights that make it.
    Features, and what a gate or an identity reads, stay as they are.

    Args:
        folded: weights in the dtype of the images.
        images: ``[N, C, H, W]``, on which activations are measured.
        out_features: names.
    """
    names = Names(folded.spec, out_features)
    kept = {*names.features.values()}
    for plan in folded.spec.blocks():  # Slot 0, which pools and identities read.
        kept |= {plan.name, f"{plan.name}_concat", "stem_3"}
    reached: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor) -> None:
        reached[name] = x.abs().amax((0, 2, 3))

    Floating(folded, observe).run(images, out_features)
    for name in names.layers:
        if name not in kept:
            folded = _equalize(folded, names, name, reached[name])
    return folded


def _equalize(folded: Folded, names: Names, name: str, reached: Tensor) -> Folded:
    layers = dict(folded.layers)
    readers = [other for other in names.layers if name in names.inputs[other]]
    mixing = [reader for reader in readers if layers[reader].depthwise is None]
    weights = torch.zeros_like(reached)
    for reader in mixing:
        part = layers[reader].weight[..., _part(names, folded, reader, name)]
        weights = torch.maximum(weights, part.abs().amax((0, 1, 2)))
    factor = reached / reached.max().clamp_min(1e-30)
    if mixing:  # A depthwise convolution has a scale for each channel: of its weights none suffers.
        factor = (factor / (weights / weights.max().clamp_min(1e-30)).clamp_min(1e-12)).sqrt()
    active = (reached > 0) & ((weights > 0) | (not mixing))
    factor = torch.where(active, factor.clamp(1 / _MOST, _MOST), torch.ones_like(factor))
    made = layers[name]
    layers[name] = made._replace(
        weight=made.weight / factor[:, None, None, None], shift=made.shift / factor
    )
    for reader in readers:
        params = layers[reader]
        if params.depthwise is not None:
            layers[reader] = params._replace(depthwise=params.depthwise * factor)
            continue
        weight = params.weight.clone()
        weight[..., _part(names, folded, reader, name)] *= factor
        layers[reader] = params._replace(weight=weight)
    return folded._replace(layers=layers)


def _part(names: Names, folded: Folded, reader: str, name: str) -> slice:
    """The input channels of a layer that are those of ``name``."""
    inputs = names.inputs[reader]
    after = sum(folded.layers[other].weight.shape[0] for other in inputs[inputs.index(name) + 1 :])
    end = folded.layers[reader].weight.shape[3] - after
    return slice(end - folded.layers[name].weight.shape[0], end)


class _Means(Floating):
    """Notes the mean over images and pixels of what layers make before their ReLU."""

    def __init__(self, folded: Folded) -> None:
        super().__init__(folded, lambda name, x: None)
        self.means: dict[str, Tensor] = {}

    def before_relu(self, name: str, x: Tensor) -> None:
        self.means[name] = x.mean((0, 2, 3))


class _Correcting(StraightThrough):
    """Mends the bias of each layer before it runs, so that the layers after it see it mended."""

    def __init__(
        self, network: QuantizedNetwork, folded: Folded, builder: Builder, means: dict[str, Tensor]
    ) -> None:
        super().__init__(network)
        self._mended, self._builder, self._means = folded, builder, means
        self._inputs = Names(network.spec, network.out_features).inputs

    def conv(self, name: str, inputs: list[Both], feature: bool) -> Both:
        layer, params = self.network.layers[name], self._mended.layers[name]
        x = torch.cat([one.x for one in inputs], 1)
        if layer.depthwise is not None:
            _, x = self._depthwise(name, inputs[0])
        error = self.before_relu(name, x).mean((0, 2, 3)) - self._means[name]
        mended = params._replace(shift=params.shift - error)
        self._mended.layers[name] = mended
        self.network.layers[name] = self._builder.layer(name, self._inputs[name], mended)
        return super().conv(name, inputs, feature)


def correct_biases(
    folded: Folded,
    ranges: dict[str, Range],
    form: Format,
    images: Tensor,
    out_features: tuple[str, ...],
) -> Folded:
    """Take from each bias by how much rounding moves the mean of what its layer makes.

    Args:
        folded: weights in fp32.
        ranges: of every activation by its name.
        form: dtype and levels.
        images: ``[N, C, H, W]`` fp32, on which means are taken.
        out_features: names.
    """
    exact = _Means(folded)
    exact.run(images, out_features)
    own = folded._replace(layers=dict(folded.layers))
    builder = Builder(own, ranges, form)
    network = builder.network(out_features)
    _Correcting(network, own, builder, exact.means).run(images)
    return own
