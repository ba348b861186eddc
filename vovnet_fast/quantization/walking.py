"""The way through a network, written down once for all that goes it.

What an activation is depends on who walks: a tensor for calibration, the name of it for who makes
the layers. Each has a name, :data:`IMAGE`, that of the layer that makes it, or that of the block
where a gate or an identity comes after the 1x1:

``image``, ``stem_1``, ``stem_2``, ``stem_3``, ``OSA2_1_reduction_0``, ``OSA2_1_0``,
``OSA2_1_concat``, ``OSA2_1``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from ..compat import zip
from ..network.model import STAGE_NAMES
from ..specs import FIRST_STAGE, BlockPlan, Pool, VoVNetSpec

Value = TypeVar("Value")

IMAGE = "image"

DEPTHWISE = "/depthwise"
"""What is added to a layer's name for the output of its depthwise convolution."""

STEM = {"stem_1": "stem_1", "stem_2": "stem_2", "stem_3": "stem"}
"""The stem's layers, and the features that they are."""


class Walker(Generic[Value]):
    """Who goes through a network."""

    def conv(self, name: str, inputs: list[Value], feature: bool) -> Value:
        """A layer with its ReLU. ``feature``: it is returned to the caller as well.

        ``inputs`` are several for the 1x1 over the concat: the slots.
        """
        raise NotImplementedError

    def finish(self, plan: BlockPlan, z: Value, x: Value | None, feature: bool) -> Value:
        """The gate of a block that has one, and the identity where ``x`` is its input."""
        raise NotImplementedError

    def pool(self, x: Value, mode: Pool) -> Value:
        """The max pool of a stage."""
        raise NotImplementedError


def walk(
    walker: Walker[Value], spec: VoVNetSpec, image: Value, out_features: Sequence[str]
) -> list[Value]:
    """Go through a network up to its last feature; returns the features, in network order."""
    x, found = image, []
    for name, feature in STEM.items():
        x = walker.conv(name, [x], feature in out_features)
        if feature in out_features:
            found.append(x)
        if len(found) == len(out_features):
            return found
    plans = list(spec.blocks())
    for number, feature in enumerate(STAGE_NAMES, start=FIRST_STAGE):
        if number >= spec.first_pooled_stage:
            x = walker.pool(x, spec.pool)
        blocks = [plan for plan in plans if plan.stage == number]
        for plan in blocks:
            x = _block(walker, plan, x, plan is blocks[-1] and feature in out_features)
        if feature in out_features:
            found.append(x)
        if len(found) == len(out_features):
            break
    return found


def is_plain(plan: BlockPlan) -> bool:
    """Whether the 1x1 over the concat makes the block's output."""
    return not plan.ese and not plan.identity


def layer_names(plan: BlockPlan) -> list[str]:
    """Those of a block's layers, in the order in which they run."""
    reduction = [f"{plan.name}_reduction_0"] if plan.reduction else []
    chained = [f"{plan.name}_{i}" for i in range(plan.num_layers)]
    return [*reduction, *chained, f"{plan.name}_concat"]


def _block(walker: Walker[Value], plan: BlockPlan, x: Value, feature: bool) -> Value:
    """See :func:`vovnet_fast.reference.osa_block`."""
    slots, y = [x], x
    names = layer_names(plan)
    for name in names[:-1]:
        y = walker.conv(name, [y], False)
        if not (plan.reduction and name == names[0]):
            slots.append(y)
    z = walker.conv(names[-1], slots, feature and is_plain(plan))
    if is_plain(plan):
        return z
    return walker.finish(plan, z, x if plan.identity else None, feature)


class _Names(Walker[str]):
    """Finds out which activations there are."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.blocks: list[BlockPlan] = []
        self.inputs: dict[str, list[str]] = {}

    def conv(self, name: str, inputs: list[str], feature: bool) -> str:
        self.layers.append(name)
        self.inputs[name] = inputs
        return name

    def finish(self, plan: BlockPlan, z: str, x: str | None, feature: bool) -> str:
        self.blocks.append(plan)
        self.inputs[plan.name] = [z] if x is None else [z, x]
        return plan.name

    def pool(self, x: str, mode: Pool) -> str:
        return x


class Names:
    """What there is in a network up to its last feature.

    Attributes:
        layers: names of the convolutions, in the order in which they run.
        blocks: those that end in a gate or an identity.
        inputs: by the name of a layer or such a block, the names of what it reads.
        features: by the name of a feature, that of its activation.
    """

    def __init__(self, spec: VoVNetSpec, out_features: Sequence[str]) -> None:
        found = _Names()
        ends = walk(found, spec, IMAGE, out_features)
        self.layers, self.blocks, self.inputs = found.layers, found.blocks, found.inputs
        self.features = dict(zip(out_features, ends, strict=True))

    def activations(self) -> list[str]:
        """Names of the activations that have one scale."""
        return [IMAGE, *self.layers, *(plan.name for plan in self.blocks)]
