"""Every published VoVNet architecture as data.

Four families of code compute four slightly different networks under almost
the same names. A :class:`VoVNetSpec` writes down each point on which they
disagree, so that one model class serves them all:

======================  ===============  ===============  ================  ===============
field                   ``detectron2``   ``timm``         ``seed``          ``torchhub``
======================  ===============  ===============  ================  ===============
``stem_strides``        2, 1, 2          2, 1, 2          2, 1, 1           2, 1, 2
``first_pooled_stage``  3                3                2                 3
``pool``                ceil mode        ceil mode        padding 1         ceil mode
``ese``                 every block      last of a stage  every block       none
``gate``                hard sigmoid     hard sigmoid     sigmoid           (none)
``identity``            after the first  after the first  of equal widths   after the first
``pointwise_bias``      no               no               yes               no
``init``                Kaiming, fan in  fan out          fan out           fan in
======================  ===============  ===============  ================  ===============

The VoVNet of 2019 has no eSE, and is two functions: that of the torch.hub models,
which the first family's code came from, adds identities; timm's ``vovnet39a`` and
``vovnet57a`` add none, with parameters of the same names and shapes.

Sources: ``youngwanLEE/vovnet-detectron2`` (also the code of PETR, StreamPETR,
BEVFormer and DD3D), ``timm/models/vovnet.py``, ``mmdetection-vovnet`` for
mmdet 1.2, called the seed here, and ``stigma0617/VoVNet.pytorch``, whose models
torch.hub and pytorchcv have. Papers: "An Energy and GPU-Computation
Efficient Backbone Network for Real-Time Object Detection" (arXiv:1904.09730),
"CenterMask: Real-Time Anchor-Free Instance Segmentation" (arXiv:1911.06667).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from .compat import zip

Dialect = Literal["detectron2", "timm", "seed", "torchhub"]
ESEPlacement = Literal["every", "last", "none"]
Gate = Literal["hard_sigmoid", "sigmoid"]
Identity = Literal["after_first", "equal_width", "none"]
Pool = Literal["ceil", "padded"]
Init = Literal["fan_in", "fan_out"]

FIRST_STAGE = 2
"""Stages are numbered from 2, as in the paper: stage 1 is the stem."""

NUM_STAGES = 4


class UnknownSpecError(KeyError):
    """No architecture bears the name that was asked for."""

    def __str__(self) -> str:  # KeyError shows the repr of its message.
        return str(self.args[0])


@dataclass(frozen=True)
class BlockPlan:
    """One OSA block of a network, with every dialect rule already decided.

    Attributes:
        stage: number of the stage, 2 to 5.
        index: position in the stage, from 1.
        in_channels: channels of the block's input (C_in).
        mid_channels: channels of each 3x3 layer (C_mid).
        out_channels: channels of the 1x1 over the concat (C_out).
        num_layers: number of chained 3x3 layers (L).
        depthwise: each layer is a depthwise 3x3 followed by a 1x1.
        reduction: a 1x1 brings C_in to C_mid before the first depthwise layer.
        ese: the block ends in an effective Squeeze-Excitation gate.
        identity: the block's input is added to its output.
    """

    stage: int
    index: int
    in_channels: int
    mid_channels: int
    out_channels: int
    num_layers: int
    depthwise: bool
    reduction: bool
    ese: bool
    identity: bool

    @property
    def name(self) -> str:
        """Module name in the native (detectron2) layout, e.g. ``OSA4_2``."""
        return f"OSA{self.stage}_{self.index}"

    @property
    def concat_channels(self) -> int:
        """Channels of the concat: the input and every layer's output."""
        return self.in_channels + self.num_layers * self.mid_channels


def _count(value: object) -> bool:
    return type(value) is int and value >= 1


@dataclass(frozen=True)
class VoVNetSpec:
    """One architecture. The defaults are the detectron2 dialect.

    Attributes:
        name: canonical name, unique among all specs.
        mid_channels: C_mid of stages 2 to 5 (``stage_conv_ch``).
        out_channels: C_out of stages 2 to 5 (``stage_out_ch``).
        layers_per_block: number of 3x3 layers in a block (L).
        blocks_per_stage: number of OSA blocks in stages 2 to 5.
        depthwise: 3x3 layers after the first stem convolution are depthwise.
        stem_channels: output channels of the three stem convolutions.
        stem_strides: their strides.
        first_pooled_stage: stages from this number on start with a max pool.
        pool: 3x3 stride 2 max pool, in ``ceil`` mode or ``padded`` by 1.
        ese: which blocks of a stage are gated.
        gate: the gate's nonlinearity. ``hard_sigmoid`` is relu6(x + 3) / 6.
        identity: which blocks add their input: all but the first of a stage,
            those whose input and output widths agree, or none.
        pointwise_bias: the 1x1 convolutions have a bias.
        init: Kaiming-normal initialisation by fan in or fan out.
        dialect: the family this architecture comes from.

    Raises:
        ValueError: a field is out of range, or the fields contradict each other.
    """

    name: str
    mid_channels: tuple[int, int, int, int]
    out_channels: tuple[int, int, int, int]
    layers_per_block: int
    blocks_per_stage: tuple[int, int, int, int]
    depthwise: bool = False
    stem_channels: tuple[int, int, int] = (64, 64, 128)
    stem_strides: tuple[int, int, int] = (2, 1, 2)
    first_pooled_stage: int = 3
    pool: Pool = "ceil"
    ese: ESEPlacement = "every"
    gate: Gate = "hard_sigmoid"
    identity: Identity = "after_first"
    pointwise_bias: bool = False
    init: Init = "fan_in"
    dialect: Dialect = "detectron2"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a spec needs a name, got {self.name!r}")
        for field, length in (
            ("stem_channels", 3),
            ("stem_strides", 3),
            ("mid_channels", NUM_STAGES),
            ("out_channels", NUM_STAGES),
            ("blocks_per_stage", NUM_STAGES),
        ):
            value = getattr(self, field)
            if not isinstance(value, tuple) or len(value) != length or not all(map(_count, value)):
                raise ValueError(
                    f"spec {self.name!r}: {field} must be a tuple of {length} positive "
                    f"integers, got {value!r}"
                )
        if not _count(self.layers_per_block):
            raise ValueError(
                f"spec {self.name!r}: layers_per_block must be an integer of at least 1, "
                f"got {self.layers_per_block!r}"
            )
        if max(self.stem_strides) > 2:
            raise ValueError(
                f"spec {self.name!r}: stem_strides must be 1 or 2 each, got {self.stem_strides}"
            )
        stages = range(FIRST_STAGE, FIRST_STAGE + NUM_STAGES + 1)
        for field, allowed in (
            ("first_pooled_stage", stages),  # The last one means none.
            ("depthwise", (False, True)),
            ("pointwise_bias", (False, True)),
            ("pool", get_args(Pool)),
            ("ese", get_args(ESEPlacement)),
            ("gate", get_args(Gate)),
            ("identity", get_args(Identity)),
            ("init", get_args(Init)),
            ("dialect", get_args(Dialect)),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"spec {self.name!r}: {field} must be one of {', '.join(map(str, allowed))}, "
                    f"got {getattr(self, field)!r}"
                )
        if self.depthwise and len(set(self.stem_channels)) != 1:
            raise ValueError(
                f"spec {self.name!r}: a depthwise stem needs three equal widths, "
                f"got stem_channels={self.stem_channels}"
            )

    def encode(self) -> str:
        """The spec as a line of JSON; :meth:`decode` is the inverse."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> VoVNetSpec:
        """The spec that :meth:`encode` wrote."""
        fields: dict[str, Any] = json.loads(text)
        for name, value in fields.items():
            fields[name] = tuple(value) if isinstance(value, list) else value
        return VoVNetSpec(**fields)

    def blocks(self) -> Iterator[BlockPlan]:
        """All OSA blocks in the order in which the network runs them."""
        in_channels = self.stem_channels[-1]
        for i in range(NUM_STAGES):
            mid, out, num_blocks = (
                self.mid_channels[i],
                self.out_channels[i],
                self.blocks_per_stage[i],
            )
            for index in range(1, num_blocks + 1):
                yield BlockPlan(
                    stage=FIRST_STAGE + i,
                    index=index,
                    in_channels=in_channels,
                    mid_channels=mid,
                    out_channels=out,
                    num_layers=self.layers_per_block,
                    depthwise=self.depthwise,
                    reduction=self.depthwise and in_channels != mid,
                    ese=self.ese == "every" or (self.ese == "last" and index == num_blocks),
                    identity=(self.identity == "after_first" and index > 1)
                    or (self.identity == "equal_width" and in_channels == out),
                )
                in_channels = out

    def feature_channels(self) -> dict[str, int]:
        """Channels of every feature that the network can return, by name."""
        stages = {f"stage{FIRST_STAGE + i}": c for i, c in enumerate(self.out_channels)}
        return {"stem_2": self.stem_channels[1], "stem": self.stem_channels[2], **stages}

    def feature_strides(self) -> dict[str, int]:
        """Input pixels per feature pixel of every feature, by name."""
        stem_2 = self.stem_strides[0] * self.stem_strides[1]
        stride = stem_2 * self.stem_strides[2]
        strides = {"stem_2": stem_2, "stem": stride}
        for i in range(NUM_STAGES):
            if FIRST_STAGE + i >= self.first_pooled_stage:
                stride *= 2
            strides[f"stage{FIRST_STAGE + i}"] = stride
        return strides


def differences(spec: VoVNetSpec, dialect: Dialect) -> list[str]:
    """Why a network of another dialect cannot compute what ``spec`` computes.

    A network is the same function in two dialects only where their rules lead
    to the same blocks: a stage of one block has its eSE in "the last block" and
    in "every block" alike, so the V-19 models agree between detectron2 and
    timm, and the deeper ones do not.

    Args:
        spec: the architecture.
        dialect: the dialect to compare with.

    Returns:
        One sentence for each difference, empty where there is none.
    """
    if spec.dialect == dialect:
        return []
    rules = dict(_DIALECT_RULES[dialect])
    if dialect == "timm" and spec.ese == "none":
        rules.update(_V1)
    other = replace(spec, dialect=dialect, **rules)
    found = []
    if spec.depthwise and dialect == "torchhub":
        found.append(f"depthwise layers: {spec.name} has them, torchhub has none")
    for field, what in (
        ("stem_strides", "stem strides"),
        ("first_pooled_stage", "first stage with a max pool"),
        ("pool", "max pool mode"),
        ("pointwise_bias", "bias in the 1x1 convolutions"),
    ):
        ours, theirs = getattr(spec, field), getattr(other, field)
        if ours != theirs:
            found.append(f"{what}: {ours} in {spec.name}, {theirs} in {dialect}")
    if spec.ese != "none" and spec.gate != other.gate:
        found.append(f"eSE gate: {spec.gate} in {spec.name}, {other.gate} in {dialect}")
    for ours_, theirs_ in zip(spec.blocks(), other.blocks(), strict=True):
        for field, what in (("ese", "an eSE gate"), ("identity", "an identity add")):
            has, expects = getattr(ours_, field), getattr(theirs_, field)
            if has != expects:
                found.append(
                    f"{ours_.name} has {what if has else what.replace('an ', 'no ')} in "
                    f"{spec.name}, {dialect} has {'one' if expects else 'none'}"
                )
    return found


_DIALECT_RULES: dict[str, dict] = {
    "detectron2": dict(
        stem_strides=(2, 1, 2),
        first_pooled_stage=3,
        pool="ceil",
        ese="every",
        gate="hard_sigmoid",
        identity="after_first",
        pointwise_bias=False,
        init="fan_in",
    ),
    "timm": dict(
        stem_strides=(2, 1, 2),
        first_pooled_stage=3,
        pool="ceil",
        ese="last",
        gate="hard_sigmoid",
        identity="after_first",
        pointwise_bias=False,
        init="fan_out",
    ),
    "seed": dict(
        stem_strides=(2, 1, 1),
        first_pooled_stage=2,
        pool="padded",
        ese="every",
        gate="sigmoid",
        identity="equal_width",
        pointwise_bias=True,
        init="fan_out",
    ),
    "torchhub": dict(
        stem_strides=(2, 1, 2),
        first_pooled_stage=3,
        pool="ceil",
        ese="none",
        gate="hard_sigmoid",  # Of no block.
        identity="after_first",
        pointwise_bias=False,
        init="fan_in",
    ),
}

_SLIM: dict = dict(mid_channels=(64, 80, 96, 112), out_channels=(112, 256, 384, 512))
_FULL: dict = dict(mid_channels=(128, 160, 192, 224), out_channels=(256, 512, 768, 1024))
_DW: dict = dict(depthwise=True, stem_channels=(64, 64, 64))
_V19: dict = dict(layers_per_block=3, blocks_per_stage=(1, 1, 1, 1))
_V27_SLIM: dict = dict(
    mid_channels=(64, 80, 96, 112),
    out_channels=(128, 256, 384, 512),
    layers_per_block=5,
    blocks_per_stage=(1, 1, 1, 1),
)
_V39: dict = dict(layers_per_block=5, blocks_per_stage=(1, 1, 2, 2))
_V57: dict = dict(layers_per_block=5, blocks_per_stage=(1, 1, 4, 3))
_V99: dict = dict(layers_per_block=5, blocks_per_stage=(1, 3, 9, 3))
_SLIM_DW1: dict = dict(
    mid_channels=(64, 80, 96, 112),
    out_channels=(56, 128, 192, 256),
    layers_per_block=1,
    blocks_per_stage=(1, 1, 1, 1),
)
_V1: dict = dict(ese="none", identity="none")


def _spec(dialect: Dialect, name: str, *parts: dict) -> VoVNetSpec:
    fields: dict = dict(_DIALECT_RULES[dialect])
    for part in parts:
        fields.update(part)
    return VoVNetSpec(name=name, dialect=dialect, **fields)


SPECS: dict[str, VoVNetSpec] = {
    spec.name: spec
    for spec in (
        _spec("detectron2", "V-19-slim-dw-eSE", _SLIM, _V19, _DW),
        _spec("detectron2", "V-19-dw-eSE", _FULL, _V19, _DW),
        _spec("detectron2", "V-19-slim-eSE", _SLIM, _V19),
        _spec("detectron2", "V-19-eSE", _FULL, _V19),
        _spec("detectron2", "V-39-eSE", _FULL, _V39),
        _spec("detectron2", "V-57-eSE", _FULL, _V57),
        _spec("detectron2", "V-99-eSE", _FULL, _V99),
        _spec("timm", "ese_vovnet19b_slim_dw", _SLIM, _V19, _DW),
        _spec("timm", "ese_vovnet19b_dw", _FULL, _V19, _DW),
        _spec("timm", "ese_vovnet19b_slim", _SLIM, _V19),
        _spec("timm", "ese_vovnet39b", _FULL, _V39),
        _spec("timm", "ese_vovnet57b", _FULL, _V57),
        _spec("timm", "ese_vovnet99b", _FULL, _V99),
        _spec("timm", "vovnet39a", _FULL, _V39, _V1),
        _spec("timm", "vovnet57a", _FULL, _V57, _V1),
        _spec("seed", "vovnet-19-slim-dw1", _SLIM_DW1, _DW),
        _spec("seed", "vovnet-19-slim-dw", _SLIM, _V19, _DW),
        _spec("seed", "vovnet-19-slim", _SLIM, _V19),
        _spec("seed", "vovnet-19", _FULL, _V19),
        _spec("seed", "vovnet-39", _FULL, _V39),
        _spec("seed", "vovnet-57", _FULL, _V57),
        _spec("seed", "vovnet-99", _FULL, _V99),
        _spec("torchhub", "V-27-slim", _V27_SLIM),
        _spec("torchhub", "V-39", _FULL, _V39),
        _spec("torchhub", "V-57", _FULL, _V57),
    )
}
"""All architectures by canonical name."""

_ALIASES = {
    "vovnet27_slim": "V-27-slim",
    "vovnet27s": "V-27-slim",
    "vovnet39": "V-39",
    "vovnet57": "V-57",
}
"""What torch.hub and pytorchcv call some of them."""


def _normalise(name: str) -> str:
    """Fold what people vary when they write a name: case, hub prefix, weight tag."""
    name = name.strip().casefold()
    for prefix in ("hf-hub:", "hf_hub:", "timm/"):
        name = name.removeprefix(prefix)
    stem, _, tag = name.partition(".")  # timm writes architecture.weights
    return stem if tag else name


_BY_NORMALISED_NAME = {
    **{_normalise(name): spec for name, spec in SPECS.items()},
    **{_normalise(alias): SPECS[name] for alias, name in _ALIASES.items()},
}


def get(name: str | VoVNetSpec) -> VoVNetSpec:
    """Look an architecture up by name.

    Case does not matter, and timm's weight tags and hub prefixes are accepted
    (``timm/ese_vovnet39b.ra_in1k``). Names of different dialects are different
    networks: ``V-39-eSE``, ``ese_vovnet39b`` and ``vovnet-39`` are three. torch.hub's
    and pytorchcv's names of the VoVNet of 2019 are understood: ``vovnet39`` is ``V-39``.

    Args:
        name: one of :func:`names`, or a spec, which is returned as it is.

    Raises:
        UnknownSpecError: no architecture has that name. The message lists the
            closest ones.
        TypeError: ``name`` is neither a string nor a spec.
    """
    if isinstance(name, VoVNetSpec):
        return name
    if not isinstance(name, str):
        raise TypeError(
            f"a VoVNet is chosen by name or by VoVNetSpec, got {type(name).__name__}: {name!r}"
        )
    spec = _BY_NORMALISED_NAME.get(_normalise(name))
    if spec is None:
        close = difflib.get_close_matches(_normalise(name), _BY_NORMALISED_NAME, n=4)
        hint = (
            "did you mean " + ", ".join(_BY_NORMALISED_NAME[c].name for c in close) + "?"
            if close
            else "known names: " + ", ".join(SPECS)
        )
        raise UnknownSpecError(f"unknown VoVNet {name!r}: {hint}")
    return spec


def twins(spec: VoVNetSpec) -> list[str]:
    """Published architectures with the parameters of ``spec``, which compute another function.

    Names and shapes do not tell whether a block adds its input: ``V-39`` and timm's
    ``vovnet39a`` are twins.
    """
    return [
        other.name
        for other in SPECS.values()
        if _parameters(other) == _parameters(spec) and differences(spec, other.dialect)
    ]


def _parameters(spec: VoVNetSpec) -> tuple:
    """What the names and the shapes of its parameters depend on."""
    blocks = tuple(replace(block, identity=False) for block in spec.blocks())
    return spec.stem_channels, spec.depthwise, spec.pointwise_bias, blocks


def names(dialect: Dialect | None = None) -> list[str]:
    """Canonical names of all architectures, or of one dialect's."""
    return [s.name for s in SPECS.values() if dialect is None or s.dialect == dialect]
