"""``VoVNetFast`` for mmdetection, mmdetection3d and other code bases on mmengine or mmcv 1.x.

In a config::

    custom_imports = dict(imports=["vovnet_fast.mmdet"], allow_failed_imports=False)
    model = dict(backbone=dict(_delete_=True, type="VoVNetFast", spec_name="V-39-eSE"))

The class, and :class:`.quantized.VoVNetFastQuantized`, is registered in mmdet's ``MODELS``
and in the root registry of mmengine, or of mmcv 1.x (mmdet 2.x), so that it is found from
the scope of any code base that builds on them.
Nothing else in this package imports mmdet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import checkpoints
from ..network.model import STAGE_NAMES
from ..network.norms import NormCfg
from ..specs import VoVNetSpec
from .openmmlab import REGISTRIES, BaseModule, PretrainedInit, update_init_info
from .quantized import VoVNetFastQuantized
from .whole import Guarded, refuse_others


class VoVNetFast(Guarded, BaseModule):
    """:class:`vovnet_fast.VoVNet` as a ``BaseModule`` of mmengine, or of mmcv 1.x.

    Takes the arguments of :class:`~vovnet_fast.VoVNet`, and:

    Args:
        pretrained: a checkpoint; short for
            ``init_cfg=dict(type='Pretrained', checkpoint=pretrained)``.
        init_cfg: initialisation in mmengine's manner. ``Pretrained`` goes through
            :func:`vovnet_fast.checkpoints.load`: every published layout is
            recognised, and a file that leaves a parameter unfilled is an error
            where mmengine would only warn. Its ``prefix`` is honoured. None
            keeps the initialisation of the original.

    Raises:
        UnknownSpecError, ValueError: as :class:`~vovnet_fast.VoVNet`.
        TypeError: an argument of another backbone, a ResNet's ``depth``; the message has
            the channels that the neck is to be given.

    A checkpoint of a whole detector (``load_from``, ``resume``) that holds some
    but not all of the backbone's parameters is refused too, and so is one that
    holds none for a backbone that nothing has filled: a silent mismatch of keys
    trains from noise (:mod:`.whole`).
    """

    _is_init: bool

    def __init__(
        self,
        spec_name: str | VoVNetSpec = "V-39-eSE",
        input_ch: int = 3,
        out_features: Sequence[str] | None = STAGE_NAMES,
        frozen_stages: int = -1,
        norm_eval: bool = True,
        norm_cfg: NormCfg | None = None,
        with_cp: bool = False,
        *,
        out_indices: Sequence[int] | None = None,
        model_name: str | None = None,
        pretrained: str | None = None,
        init_cfg: dict | list[dict] | None = None,
        **others: Any,
    ) -> None:
        out_features = STAGE_NAMES if out_features is None else out_features
        named = dict(spec_name=spec_name, model_name=model_name)
        refuse_others({**others, **named, "out_features": out_features, "out_indices": out_indices})
        super().__init__(
            spec_name,
            input_ch,
            out_features,
            frozen_stages,
            norm_eval,
            norm_cfg,
            with_cp,
            out_indices=out_indices,
            model_name=model_name,
        )
        if pretrained is not None:
            if init_cfg is not None:
                raise ValueError(
                    "pretrained and init_cfg both say how to initialise the backbone: give one"
                )
            init_cfg = dict(type="Pretrained", checkpoint=pretrained)
        self.init_cfg = init_cfg
        self.guard()

    def init_weights(self) -> None:
        """Apply ``init_cfg`` once; weights that are already loaded stay."""
        if self._is_init:
            return
        cfgs = self.init_cfg or []
        cfgs = [cfgs] if isinstance(cfgs, dict) else list(cfgs)
        names = ("Pretrained", "PretrainedInit", PretrainedInit)  # Lazy configs hold the class.
        pretrained = [cfg for cfg in cfgs if cfg["type"] in names]
        self.init_cfg = [cfg for cfg in cfgs if cfg not in pretrained] or None
        super().init_weights()
        for cfg in pretrained:
            report = checkpoints.load(self, cfg["checkpoint"], prefix=cfg.get("prefix"))
            if hasattr(self, "_params_init_info"):  # A detector's log of who set what.
                update_init_info(
                    self,
                    init_info=f"vovnet_fast.checkpoints.load from {cfg['checkpoint']} "
                    f"({report.layout} keys)",
                )
        self.init_cfg = cfgs or None
        self.filled = self.filled or bool(cfgs)
        self._is_init = True


for _registry in REGISTRIES:
    for _class in (VoVNetFast, VoVNetFastQuantized):
        _registry.register_module(name=_class.__name__, module=_class)
