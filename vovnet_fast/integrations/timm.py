"""timm's VoVNets as networks of this package: ``ese_vovnet39b_fast`` beside ``ese_vovnet39b``.

>>> import timm, vovnet_fast.timm
>>> model = timm.create_model("ese_vovnet39b_fast", pretrained=True)
>>> backbone = timm.create_model("ese_vovnet39b_fast", features_only=True, out_indices=(2, 3, 4))

The names end in ``_fast`` because timm takes what stands behind a dot for the tag of a set of
weights: ``ese_vovnet39b.fast`` would be its own network with weights called "fast", while
``ese_vovnet39b_fast.ra_in1k`` is this one with timm's weights of that tag. Each name has the
pretrained configurations that timm has for the architecture.

timm's ``eca_vovnet39b`` and ``ese_vovnet39b_evos`` have another attention and other norms than any
VoVNet here, and no such twin.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import _optional

try:
    import timm
    from timm.layers import ClassifierHead
    from timm.models import (
        DefaultCfg,
        FeatureInfo,
        build_model_with_cfg,
        get_pretrained_cfg,
        is_model,
        list_models,
        register_model,
    )
except ImportError as error:
    raise ImportError(
        f"vovnet_fast.timm needs timm 0.9 or newer, and importing it failed with: {error}. "
        f"Install it with: {_optional.remedy('timm')}"
    ) from error

from .. import checkpoints, specs
from ..checkpoints.layouts import ANCHORS, names_in
from ..network.filling import AllOrNothing
from ..network.model import STAGE_NAMES, VoVNet
from ..specs import VoVNetSpec

if tuple(map(int, re.findall(r"\d+", timm.__version__)[:2])) < (0, 9):
    raise ImportError(
        f"vovnet_fast.timm needs timm 0.9 or newer, got {timm.__version__}. "
        f"Install it with: {_optional.remedy('timm')}"
    )

FEATURES = ("stem_2", *STAGE_NAMES)
"""timm's five features, of strides 2 to 32, by the names that they have here."""

_OWN = "backbone."
_ANCHOR = _OWN + ANCHORS["native"]


class _Network(AllOrNothing):
    """What takes state dicts of timm's own networks as well as its own."""

    backbone: VoVNet

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, *args, **kwargs):
        """As PyTorch's, and a state dict of timm's own network is one of this too.

        Raises:
            CheckpointError: a ``RuntimeError``, as PyTorch's is.
        """
        if isinstance(state_dict, Mapping):
            state_dict = _renamed(state_dict, self.backbone.spec, "")
        return super().load_state_dict(state_dict, strict, *args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # Inside of something else too, such as DDP. It is a copy, made by PyTorch for this.
        renamed = _renamed(state_dict, self.backbone.spec, prefix)
        if renamed is not state_dict:
            state_dict.clear()
            state_dict.update(renamed)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class VoVNetFast(_Network):
    """A VoVNet with timm's classifier and timm's methods.

    Its parameters are ``backbone.`` and the names of :class:`vovnet_fast.VoVNet`, and ``head.fc.``;
    timm's own state dicts load, too, and :meth:`timm_state_dict` makes one.

    Args:
        cfg: the architecture.
        in_chans: channels of the image.
        num_classes: 0 for none.
        global_pool: timm's kind of pool before the classifier, ``""`` for none.
        output_stride: 32, nothing else.
        drop_rate: of the dropout before the classifier.
        drop_path_rate: 0, nothing else.
        device: where the parameters are.
        dtype: of the parameters.

    Attributes:
        backbone: may be replaced by what :func:`vovnet_fast.freeze` makes of it, for inference.
        feature_info: timm's list of features: channels, reductions, names of modules.

    Raises:
        ValueError: a value that timm knows and this network does not have.
        TypeError: an argument that it does not have, such as ``norm_layer``.
    """

    def __init__(
        self,
        cfg: VoVNetSpec,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        for name, value, only in (
            ("output_stride", output_stride, 32),
            ("drop_path_rate", drop_path_rate, 0),
        ):
            if value != only:
                raise ValueError(f"{cfg.name}_fast has {name}={only} alone, got {value}")
        if others:
            raise TypeError(
                f"{cfg.name}_fast takes no {', '.join(sorted(others))}: timm's own {cfg.name} may"
            )
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.backbone = VoVNet(cfg, in_chans, FEATURES[-1:], norm_eval=False)
        self.num_features = cfg.out_channels[-1]
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate
        )
        if isinstance(self.head.fc, nn.Linear):
            nn.init.zeros_(self.head.fc.bias)
        self.to(device=device, dtype=dtype)
        channels, strides = cfg.feature_channels(), cfg.feature_strides()
        modules = {FEATURES[0]: "stem"}  # The others are called as what they give.
        self.feature_info = [
            dict(
                num_chs=channels[name],
                reduction=strides[name],
                module=_OWN + modules.get(name, name),
            )
            for name in FEATURES
        ]

    @property
    def head_hidden_size(self) -> int:
        """Channels of what ``forward_head(pre_logits=True)`` returns."""
        return self.num_features * self.head.global_pool.feat_mult()

    def forward_features(self, x: Tensor) -> Tensor:
        """``[N, in_chans, H, W]`` to ``[N, num_features, H / 32, W / 32]``, rounded up or down."""
        return self.backbone(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What :meth:`forward_features` returns to ``[N, num_classes]``, or to pooled features."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_chans, H, W]`` to ``[N, num_classes]``."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of one image batch, in network order, as timm's own networks give them.

        Args:
            x: ``[N, in_chans, H, W]``.
            indices: of features, 0 to 4; the last n for a number, all for None.
            norm: nothing changes; these features have no norm of their own.
            stop_early: nothing changes; what is not needed is never run.
            output_fmt: ``"NCHW"``.
            intermediates_only: leave out the last feature map.

        Returns:
            the features, or the last feature map and them.
        """
        if str(getattr(output_fmt, "value", output_fmt)) != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted = _indices(len(FEATURES) if indices is None else indices)
        view = copy.copy(self.backbone)  # The same modules.
        last = () if intermediates_only else (len(FEATURES) - 1,)
        view.out_features = tuple(FEATURES[i] for i in sorted({*wanted, *last}))
        features = view(x)
        if intermediates_only:
            return list(features)
        return features[-1], list(features[: len(wanted)])

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer, with random weights, where the old one was."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        weight = next(self.backbone.parameters(), None)
        if weight is not None:
            self.head.to(weight.device, weight.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks keep their input alone for the backward pass."""
        _checkpoint_blocks(self.backbone, enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's groups of parameters, for learning rates by layer."""
        blocks = r"^backbone\.stage(\d+)" if coarse else r"^backbone\.stage(\d+)\.OSA\d+_(\d+)"
        return dict(stem=r"^backbone\.stem", blocks=blocks)

    def timm_state_dict(self) -> dict[str, Tensor]:
        """The weights under timm's names, for timm's own network. Tensors are not copied."""
        names = {_OWN + ours: theirs for ours, theirs in _modules(self.backbone.spec)}
        found = {}
        for key, value in self.state_dict().items():
            module, _, leaf = key.rpartition(".")
            found[f"{names.get(module, module)}.{leaf}"] = value
        return found


class VoVNetFastFeatures(_Network):
    """What ``features_only=True`` gives: features in network order.

    Parameters that none of them depends on, which timm's own networks would lack, take part in no
    training: DDP waits for no gradient of theirs.

    Args:
        model: whose backbone it takes.
        out_indices: of features, 0 to 4 for strides 2 to 32; the last n for a number.

    Attributes:
        feature_info: timm's ``FeatureInfo``: ``channels()``, ``reduction()``, ``module_name()``.
    """

    def __init__(self, model: VoVNetFast, out_indices: int | Sequence[int] = (0, 1, 2, 3, 4)):
        super().__init__()
        self.out_indices = _indices(out_indices)
        self.feature_info = FeatureInfo(model.feature_info, self.out_indices)
        self.backbone = model.backbone
        self.backbone.out_features = tuple(FEATURES[i] for i in self.out_indices)
        last = self.out_indices[-1]
        for name, parameter in self.backbone.named_parameters():
            if name.startswith(STAGE_NAMES[last:] if last else (*STAGE_NAMES, "stem.stem_3")):
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[N, in_chans, H, W]`` to one ``[N, C, H / s, W / s]`` for each of the indices."""
        return list(self.backbone(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks keep their input alone for the backward pass."""
        _checkpoint_blocks(self.backbone, enable)


def _checkpoint_blocks(backbone: VoVNet, enable: bool) -> None:
    backbone.with_cp = enable
    for block in backbone._blocks():
        block.with_cp = enable


def _indices(out_indices: int | Sequence[int]) -> tuple[int, ...]:
    """timm's indices of features, which may count from the end or be how many, in order."""
    n = len(FEATURES)
    given = range(n - out_indices, n) if isinstance(out_indices, int) else out_indices
    found = sorted(i + n if i < 0 else i for i in given)
    if not found or len(set(found)) != len(found) or found[0] < 0 or found[-1] >= n:
        raise ValueError(
            f"out_indices must be one or more of 0 to {n - 1}, each once, for strides 2 to 32, or "
            f"how many of the last, got {out_indices!r}"
        )
    return tuple(found)


def _modules(spec: VoVNetSpec) -> Iterable[tuple[str, str]]:
    """Names of every module of a backbone in (native, timm)."""
    return names_in(spec, "timm").items()


def _renamed(state_dict: Mapping[str, Any], spec: VoVNetSpec, prefix: str) -> Mapping[str, Any]:
    """A state dict with timm's names under ``prefix`` replaced by ours, or itself without any."""
    if prefix + ANCHORS["timm"] not in state_dict:
        return state_dict
    names = {prefix + theirs: prefix + _OWN + ours for ours, theirs in _modules(spec)}
    found = {}
    for key, value in state_dict.items():
        module, _, leaf = key.rpartition(".")
        found[f"{names[module]}.{leaf}" if module in names else key] = value
    return found


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: VoVNetFast) -> dict[str, Any]:
    """A file of weights, in whatever layout, under this network's names.

    Raises:
        CheckpointError: it does not fill the backbone exactly.
    """
    if _ANCHOR in state_dict:
        return dict(state_dict)
    spec = model.backbone.spec
    found, report = checkpoints.convert_with_report(state_dict, spec, add_prefix=_OWN)
    state_dict = checkpoints.files.unwrap(state_dict)
    for leaf in ("weight", "bias"):
        key = f"{report.prefix}head.fc.{leaf}"
        if key in state_dict:
            found[f"head.fc.{leaf}"] = state_dict[key]
    return found


def _pretrained_cfgs(name: str) -> DefaultCfg:
    """timm's own configurations of an architecture's weights, for the network of this package."""
    tags = list_models(name, include_tags=True)
    default = get_pretrained_cfg(name)
    if default is not None and default.tag:  # The first is what a name without a tag means.
        tags.sort(key=lambda tag: tag != f"{name}.{default.tag}")
    found = DefaultCfg()
    for tagged in tags:
        cfg = get_pretrained_cfg(tagged)
        if cfg is not None:
            tag = cfg.tag or ""
            found.tags.append(tag)
            found.cfgs[tag] = replace(cfg, first_conv=f"{_OWN}stem.stem_1/conv")
    found.is_pretrained = any(cfg.has_weights for cfg in found.cfgs.values())
    return found


def _entrypoint(spec: VoVNetSpec) -> None:
    """Register a function that makes the network, under the name that timm finds it by."""
    name = f"{spec.name}_fast"

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if kwargs.get("feature_cls") is not None:
            raise ValueError(
                f"{name} has features of its own and takes no feature_cls, got "
                f"{kwargs['feature_cls']!r}: leave it out, or take timm's own {spec.name}"
            )
        return build_model_with_cfg(
            VoVNetFast,
            name,
            pretrained,
            model_cfg=spec,
            feature_cfg=dict(feature_cls=VoVNetFastFeatures),
            pretrained_filter_fn=checkpoint_filter_fn,
            **kwargs,
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f":class:`VoVNetFast` of timm's ``{spec.name}``."
    default_cfgs[name] = _pretrained_cfgs(spec.name)
    register_model(create)


default_cfgs: dict[str, DefaultCfg] = {}
"""Where :func:`timm.models.register_model` looks for the weights of a name."""

__all__ = ["NAMES", "VoVNetFast", "VoVNetFastFeatures", "checkpoint_filter_fn"]

for _name in specs.names("timm"):
    if is_model(_name):
        _entrypoint(specs.get(_name))

NAMES = tuple(default_cfgs)
"""The names that were registered."""
