"""``VoVNetFastQuantized``: a backbone in eight bits, in a detector that predicts.

In a config that has a ``VoVNetFast``, another type and a file::

    model = dict(backbone=dict(type="VoVNetFastQuantized", quantized="v39-int8.safetensors"))

The file is what ``vovnet-fast quantize`` wrote, or :meth:`QuantizedVoVNet.save`. The detector's
checkpoint stays the same: its backbone in floating point is held against the file, and left out.
:mod:`.mmdet` registers it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..network.filling import CheckpointError
from ..network.model import STAGE_NAMES, VoVNet
from ..quantization.file import load_quantized
from ..quantization.network import QuantizedVoVNet
from ..quantization.straight_through import dequantized
from ..quantization.walking import layer_names
from ..specs import FIRST_STAGE, VoVNetSpec

OF_TRAINING = ("frozen_stages", "norm_eval", "norm_cfg", "with_cp", "pretrained", "init_cfg")
"""Arguments of ``VoVNetFast`` that are taken and not looked at: they are about training, and a
config that inherits from another has them."""

LEAST = 0.99
"""Cosine of the angle between weights in floating point and in eight bits. Rounding leaves more
than 0.999, other weights next to nothing."""


class VoVNetFastQuantized(QuantizedVoVNet):
    """:class:`vovnet_fast.QuantizedVoVNet` as a backbone of mmdet.

    Takes the arguments of ``VoVNetFast``, so that its ``type`` can be changed in a config, and:

    Args:
        quantized: the file.
        spec_name, model_name: the architecture that it has to be of, the second one of an mmdet 1.2
            config; by default any.
        input_ch: channels of images that it has to be for; by default any.
        out_features, out_indices: the features that it has to have, all of them; by default any.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it holds no quantised network, or of another architecture; see
            :func:`vovnet_fast.load_quantized`. When a detector's checkpoint is loaded: the backbone
            in it is another than the one that was quantised.
        ValueError: its features or channels are others.
        TypeError: an argument that ``VoVNetFast`` does not take.
        RuntimeError: it is to be trained.
    """

    def __init__(
        self,
        quantized: str | os.PathLike[str],
        spec_name: str | VoVNetSpec | None = None,
        input_ch: int | None = None,
        out_features: Sequence[str] | None = None,
        *,
        out_indices: Sequence[int] | None = None,
        model_name: str | None = None,
        **others: Any,
    ) -> None:
        unknown = [name for name in others if name not in OF_TRAINING]
        if unknown:
            raise TypeError(
                f"VoVNetFastQuantized takes no {', '.join(map(repr, unknown))}: a slip of the pen, "
                "or arguments of the backbone that it replaces. Leave those out"
            )
        spec = spec_name if model_name is None else model_name
        loaded = load_quantized(quantized, spec=spec)
        super().__init__(
            loaded.network, loaded._rows, loaded.out_dtype, loaded.memory_format, copy=False
        )
        self._file = os.fspath(quantized)
        if out_features is not None or out_indices is not None:
            wanted = _features(self.spec, out_features, out_indices)
            if wanted != self.out_features:
                raise ValueError(
                    f"{self._file} has the features {', '.join(self.out_features)}, and "
                    f"{', '.join(wanted)} are asked for: quantise again with --features "
                    f"{','.join(wanted)}, or ask for those"
                )
        if input_ch not in (None, self.input_ch):
            raise ValueError(
                f"{self._file} is for images of {self.input_ch} channels, and input_ch={input_ch} "
                "is asked for"
            )

    def train(self, mode: bool = True) -> VoVNetFastQuantized:
        """Refuse a training mode, which a detector that is trained calls on all its parts.

        Raises:
            RuntimeError: ``mode`` is true.
        """
        if mode:
            raise RuntimeError(
                f"a detector with the quantised backbone {self._file} cannot be trained: it has "
                "no gradients. Train with type='VoVNetFast' and quantise that again; "
                "vovnet_fast.quantization.fine_tuning trains the backbone on its integers; and "
                "heads alone are trained with detector.backbone = vovnet_fast.load_quantized(FILE)"
            )
        super().train(False)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Fill it from a state dict of its own; from a detector's in floating point nothing."""
        if any(prefix + name in state_dict for name, _ in self.named_buffers()):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        elif any(key.startswith(prefix) for key in state_dict):
            self.require_same(state_dict, prefix)

    def require_same(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Hold a checkpoint's backbone in floating point against the file.

        Of the last 1x1 the directions of rows are compared, over the channels that no equalisation
        has touched.

        Args:
            state_dict: of the checkpoint.
            prefix: what stands before the backbone's keys.

        Raises:
            CheckpointError: it is another one.
        """
        last = self.out_features[-1]
        if last not in STAGE_NAMES:
            return
        stage = FIRST_STAGE + STAGE_NAMES.index(last)
        plan = [plan for plan in self.spec.blocks() if plan.stage == stage][-1]
        name = layer_names(plan)[-1]
        key = f"{prefix}stage{stage}.{plan.name}.concat.{name}"
        weight, norm = (state_dict.get(f"{key}/{part}.weight") for part in ("conv", "norm"))
        ours = dequantized(self.network.layers[name])[0].flatten(1).float().cpu()
        if weight is None or weight.numel() != ours.numel():
            what = "is not there" if weight is None else f"is {list(weight.shape)}"
            raise CheckpointError(
                f"the checkpoint's backbone is another than the {self.spec.name} in {self._file}: "
                f"{key}/conv.weight {what}"
            )
        theirs = weight.detach().float().cpu().flatten(1)
        if norm is not None:  # Of which but the sign turns a row.
            theirs = theirs * norm.detach().float().cpu().sign()[:, None]
        first = slice(plan.in_channels)
        cosine = F.cosine_similarity(ours[:, first], theirs[:, first], dim=1).median().item()
        if not cosine >= LEAST:
            raise CheckpointError(
                f"the checkpoint's backbone is another than the one that was quantised in "
                f"{self._file}: weights of {name} point elsewhere (cosine {cosine:.3f}, expected "
                f"{LEAST} or more). Quantise the backbone of this checkpoint"
            )


def _features(
    spec: VoVNetSpec, out_features: Sequence[str] | None, out_indices: Sequence[int] | None
) -> tuple[str, ...]:
    """What ``VoVNetFast`` would return."""
    features = STAGE_NAMES if out_features is None else out_features
    with torch.device("meta"):
        return VoVNet(spec, out_features=features, out_indices=out_indices).out_features
