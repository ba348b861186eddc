"""VoVNet: a stem, four OSA stages, features out.

"An Energy and GPU-Computation Efficient Backbone Network for Real-Time Object
Detection" (arXiv:1904.09730) and "CenterMask: Real-Time Anchor-Free Instance
Segmentation" (arXiv:1911.06667).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import backends, compat, first_use, ops, specs
from ..ops import _checks
from ..ops.features import check_size
from ..ops.features import needs as features_need
from ..specs import FIRST_STAGE, NUM_STAGES, VoVNetSpec
from . import decision, keeping, structure, ways
from .blocks import OSABlock, OSAStage
from .decision import compute_dtype, fused
from .filling import AllOrNothing
from .layers import Stem
from .norms import NormCfg
from .structure import computed_by, has_hooks
from .telling import Told, call

STAGE_NAMES = tuple(f"stage{FIRST_STAGE + i}" for i in range(NUM_STAGES))

_DEFAULT_SPEC = "V-39-eSE"


@computed_by()
class VoVNet(AllOrNothing):
    """VoVNet backbone of any published architecture.

    Args:
        spec_name: an architecture's name (:func:`vovnet_fast.specs.names`), or
            a :class:`~vovnet_fast.specs.VoVNetSpec` of your own.
        input_ch: channels of the image.
        out_features: names of the features to return, out of ``stem_2`` (the
            second stem layer, timm's first feature), ``stem`` and ``stage2`` to
            ``stage5``. They are returned in network order, whatever order is
            given. Stages after the last one named are not run.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and stages 2
            to k + 1: no gradients, and evaluation mode whatever :meth:`train`
            is told.
        norm_eval: keep all batch norms in evaluation mode during training, so
            that running statistics stay as loaded.
        norm_cfg: normalisation in mmdet's form, ``dict(type='BN' | 'SyncBN' |
            'FrozenBN' | 'GN', requires_grad=...)``; None is ``dict(type='BN')``.
        with_cp: activation checkpointing of every OSA block in training.
        out_indices: the features in mmdet's form: 0 to 3 for stages 2 to 5.
            Takes the place of ``out_features``.
        model_name: takes the place of ``spec_name``, as configs of the
            mmdet 1.2 port write it.

    On a CPU, inference keeps the weights as its convolutions take them, folded and packed or
    transformed, and arenas for the shapes of images that come again
    (:mod:`vovnet_fast.replay.kept`), from the second call that finds the weights unchanged until
    the model trains: up to 5 times the memory that the weights have in fp32 where Winograd's
    convolution is the faster one (``VOVNET_FAST_WINOGRAD=0`` does without), else as much as they
    have. Any write to a weight is followed. ``VOVNET_FAST_KEEP_WEIGHTS=0`` keeps nothing.

    Attributes:
        spec: the architecture.
        out_features: names of the returned features, in network order.
        feature_channels: their channels, in the same order (FPN's ``in_channels``).
        feature_strides: their strides, in the same order.

    Raises:
        UnknownSpecError: no architecture has that name.
        ValueError: an argument is out of range or contradicts another; the
            message says which and what is possible.
    """

    def __init__(
        self,
        spec_name: str | VoVNetSpec = _DEFAULT_SPEC,
        input_ch: int = 3,
        out_features: Sequence[str] = STAGE_NAMES,
        frozen_stages: int = -1,
        norm_eval: bool = True,
        norm_cfg: NormCfg | None = None,
        with_cp: bool = False,
        *,
        out_indices: Sequence[int] | None = None,
        model_name: str | None = None,
    ) -> None:
        super().__init__()
        spec = _choose_spec(spec_name, model_name)
        if input_ch < 1:
            raise ValueError(f"input_ch must be at least 1, got {input_ch}")
        if not -1 <= frozen_stages <= NUM_STAGES:
            raise ValueError(
                f"frozen_stages must be -1 (none), 0 (stem) or 1 to {NUM_STAGES} (stem and "
                f"stages 2 to frozen_stages + 1), got {frozen_stages}"
            )
        self.spec = spec
        # Here, because torch.compile cannot trace them.
        self._encoded_spec, self._needs = spec.encode(), features_need(spec)
        self.input_ch = input_ch
        self.out_features = _choose_features(spec, out_features, out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp

        self.stem = Stem(
            input_ch,
            spec.stem_channels,
            spec.stem_strides,
            spec.depthwise,
            spec.pointwise_bias,
            norm_cfg,
        )
        blocks = [
            OSABlock(plan, spec.gate, spec.pointwise_bias, norm_cfg, with_cp)
            for plan in spec.blocks()
        ]
        for number, name in enumerate(STAGE_NAMES, start=FIRST_STAGE):
            stage = OSAStage(
                [block for block in blocks if block.plan.stage == number],
                pool=spec.pool if number >= spec.first_pooled_stage else None,
            )
            self.add_module(name, stage)

        self.reset_parameters()
        self._freeze_stages()

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of the returned features."""
        channels = self.spec.feature_channels()
        return tuple(channels[name] for name in self.out_features)

    @property
    def feature_strides(self) -> tuple[int, ...]:
        """Strides of the returned features."""
        strides = self.spec.feature_strides()
        return tuple(strides[name] for name in self.out_features)

    @property
    def first_weight(self) -> Tensor | None:
        """The first floating parameter: the others are of its dtype, and on its device."""
        for parameter in self.parameters():  # Not next(), which older torch.compile cannot trace.
            if parameter.is_floating_point():
                return parameter
        return None

    def reset_parameters(self) -> None:
        """Initialise as the original of the dialect does.

        Convolution weights are Kaiming-normal: by fan in in vovnet-detectron2,
        by fan out in timm and in the seed. The eSE bias is PyTorch's default,
        in the seed zero. Norms keep PyTorch's defaults, one and zero.
        """
        for module in self.modules():
            # On the meta device there is nothing to fill, and normal_ imports torch's compiler.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                if self.spec.init == "fan_in":
                    nn.init.kaiming_normal_(module.weight)
                else:
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None and self.spec.dialect == "seed":
                    nn.init.zeros_(module.bias)

    @compat.traced
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of a batch of images.

        Args:
            x: ``[N, input_ch, H, W]``, of the parameters' dtype and device.
                ``channels_last`` is the faster layout.

        Returns:
            One ``[N, C, H', W']`` tensor for each of :attr:`out_features`.

        Raises:
            ValueError: wrong rank or channels, or an image too small for the
                deepest feature that was asked for.
            TypeError: the dtype does not match the parameters' (and autocast is off).
        """
        self._check_input(x)
        check_size(self.spec, self.out_features, x.shape[2], x.shape[3])
        if x.is_cuda and not compat.is_compiling():
            first_use.of_model(self, x, compute_dtype(x))
        decided = self.decide(x)
        if decided.op:
            dtype = compute_dtype(x)
            found = keeping.features(self, x, dtype)
            if found is None and decided is not decision.SMALL_AT_FIRST:
                found = ops.features(x.to(dtype), self.fold(dtype), self.out_features)
            if found is not None:
                return tuple(found)
        elif decided is decision.GRADIENT and not compat.is_compiling():
            keeping.forget(self)
        return ways.run(self, x, ways.choose(self, x))

    def decide(self, x: Tensor) -> decision.Decision:
        """Whether it runs as one op on images; otherwise each of its parts decides by itself.

        Raises:
            BackendError: a fused backend was asked for by name and cannot run.
        """
        return decision.of_network(self, x)

    def fold(self, dtype: torch.dtype) -> ops.NetworkParams:
        """Parameters for :func:`vovnet_fast.ops.features`: norms folded.

        Args:
            dtype: of the activations.

        Raises:
            BackendError: a part of the network cannot be folded; the message says which.
        """
        reason = self.why_not_one_op()
        if reason is not None:
            raise backends.BackendError(reason)
        return ops.NetworkParams(
            self.spec,
            self._encoded_spec,
            self.stem.fold(dtype),
            tuple(block.fold(dtype) for block in self._blocks()),
        )

    def _blocks(self) -> list[OSABlock]:
        stages = [cast(OSAStage, getattr(self, name)) for name in STAGE_NAMES]
        return [block for stage in stages for block in stage.blocks()]

    def why_other(self) -> str | None:
        """Why the modules are not what an op computes in some mode, or None."""
        for name, module in self.named_modules():
            if name and has_hooks(module):
                return f"{name}: it has hooks, and one op would not run this module"
        reason = self._why_other_parts()
        if reason is not None:
            return reason
        for part in (self.stem, *self._blocks()):
            reason = part.why_not_fused()
            if reason is not None:
                return reason
        return None

    def _why_other_parts(self) -> str | None:
        """Why the network is made of other parts than its architecture has, or None."""
        reason = structure.why_other(self._modules.get("stem"), Stem)
        if reason is not None:
            return f"stem: {reason}"
        plans = list(self.spec.blocks())
        for number, name in enumerate(STAGE_NAMES, start=FIRST_STAGE):
            stage: Any = self._modules.get(name)
            reason = structure.why_other(stage, OSAStage)
            if reason is not None:
                return f"{name}: {reason}"
            for child, block in stage.named_children():
                reason = structure.why_other(block, OSABlock)
                if reason is not None:
                    return f"{name}.{child}: {reason}"
            if [block.plan for block in stage.children()] != [
                p for p in plans if p.stage == number
            ]:
                return f"{name}: its blocks are no longer those of {self.spec.name}"
            if stage.pool != (self.spec.pool if number >= self.spec.first_pooled_stage else None):
                return f"{name}: its pool is no longer that of {self.spec.name}, but {stage.pool!r}"
            for child, block in stage.named_children():
                gate = None if block.ese is None else getattr(block.ese, "gate", None)
                if gate != (self.spec.gate if block.plan.ese else None):
                    return f"{name}.{child}.ese: {self.spec.name} has another gate, or none"
        return None

    def why_not_one_op(self) -> str | None:
        """The reason why one op cannot take the place of the modules, or None."""
        return structure.kept(self, self._why_not_one_op)

    def _why_not_one_op(self) -> str | None:
        reason = self.why_other()
        if reason is not None:
            return reason
        for part in (self.stem, *self._blocks()):
            if part.kinds.batch:
                first = next(iter(part.conv_layers()))
                return f"{first}: norms of it and after are in training mode; call eval() first"
        return None

    def functions(self) -> tuple[str, ...]:
        """The functions of a backend that it uses as one op."""
        return self._needs

    def _run_modules(self, x: Tensor) -> tuple[Tensor, ...]:
        """Call the modules one after another; each knows whether it runs fused."""
        wanted, features = self.out_features, []
        # A feature that is returned keeps its memory: it should be no larger than itself.
        room = 0
        if "stem" not in wanted and isinstance(self.stage2, OSAStage) and fused(x, ()):
            n, _, height, width = x.shape
            pixels = n * height * width // math.prod(self.spec.stem_strides) ** 2
            room = self.stage2.room(x, pixels)
        stem_2, x = call(self.stem, x, Told(room, "stem_2" in wanted))
        features += [f for name, f in (("stem_2", stem_2), ("stem", x)) if name in wanted]
        del stem_2  # A feature that nobody asked for must not live through the stages.
        for name in STAGE_NAMES:
            if len(features) == len(wanted):
                break
            x = getattr(self, name)(x)
            if name in wanted:
                features.append(x)
        return tuple(features)

    def train(self, mode: bool = True) -> VoVNet:
        """Set training mode, except in frozen stages and, with ``norm_eval``, in norms."""
        super().train(mode)
        self._freeze_stages()
        if mode:
            keeping.forget(self)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages >= 0:
            for name in ("stem", *STAGE_NAMES[: self.frozen_stages]):
                getattr(self, name).eval().requires_grad_(False)

    def _check_input(self, x: Tensor) -> None:
        _checks.tensor("the images of a VoVNet", x)
        if x.ndim != 4:
            raise ValueError(
                f"VoVNet takes a batch of images [N, {self.input_ch}, H, W], "
                f"got a tensor of {x.ndim} dimensions: {list(x.shape)}"
            )
        if x.shape[1] != self.input_ch:
            hint = (
                "; this looks like [N, H, W, C]: permute(0, 3, 1, 2) first"
                if x.shape[3] == self.input_ch
                else "; build the model with input_ch to match"
            )
            raise ValueError(
                f"VoVNet was built for {self.input_ch} input channels, got {list(x.shape)}{hint}"
            )
        weight = self.first_weight
        if weight is None:  # All of them are kept by something else, which knows its own.
            return
        if x.dtype != weight.dtype and compat.autocast_dtype(x.device.type) is None:
            raise TypeError(
                f"the image is {x.dtype} and the parameters are {weight.dtype}: convert one of "
                "them, or run under torch.autocast"
            )

    def extra_repr(self) -> str:
        return f"{self.spec.name}, out_features={self.out_features}"


def _choose_spec(spec_name: str | VoVNetSpec, model_name: str | None) -> VoVNetSpec:
    if model_name is None:
        return specs.get(spec_name)
    spec = specs.get(model_name)
    if spec_name != _DEFAULT_SPEC and specs.get(spec_name) != spec:
        raise ValueError(
            f"spec_name={spec_name!r} and model_name={model_name!r} name different "
            "architectures: give one of the two"
        )
    return spec


def _choose_features(
    spec: VoVNetSpec, out_features: Sequence[str], out_indices: Sequence[int] | None
) -> tuple[str, ...]:
    if out_indices is not None:
        if tuple(out_features) != STAGE_NAMES:
            raise ValueError(
                f"out_indices={tuple(out_indices)} and out_features={tuple(out_features)} both "
                "choose the returned features: give one of the two"
            )
        wrong = [i for i in out_indices if not 0 <= i < NUM_STAGES]
        if wrong:
            raise ValueError(
                f"out_indices counts the stages as mmdet does, 0 to {NUM_STAGES - 1} for stage2 "
                f"to stage5, got {tuple(out_indices)} (timm counts its stem as 0: subtract one)"
            )
        out_features = [STAGE_NAMES[i] for i in out_indices]
    if isinstance(out_features, str):
        raise ValueError(
            f"out_features must be a sequence of names, got the string {out_features!r}: "
            f"write ({out_features!r},)"
        )
    known = spec.feature_channels()
    unknown = [name for name in out_features if name not in known]
    if unknown or not out_features or len(set(out_features)) != len(out_features):
        raise ValueError(
            f"out_features must name one or more of {', '.join(known)}, each once, "
            f"got {tuple(out_features)}"
        )
    return tuple(name for name in known if name in out_features)
