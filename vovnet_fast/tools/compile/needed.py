"""What runs of published architectures need, from a name, a shape and a mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import arithmetic, backends, first_use, specs, tuning
from ...compiling.jobs import Job, arch_of, compiled, different
from ...first_use import rehearsal
from ...first_use.rehearsal import Plan, Setting
from ...kernels._common import Target
from ...kernels.conv_eight_bits_config import MIN_CAPABILITY
from ...kernels.device import CARDS
from ...network.model import STAGE_NAMES, VoVNet
from ...ops.features import check_size
from ...quantization import formats, rehearsing
from ...quantization.layout import Architecture
from ...specs import VoVNetSpec
from ..plan import DTYPES, IMAGE_CHANNELS, check_input

Shape = tuple[int, int, int]

ARCHITECTURES = tuple(dict.fromkeys(arch_of(card.capability) for card in CARDS))
"""What kernels can be compiled for."""

MODES = ("inference", "training", "training-batch")
"""Forward passes without gradients; training steps with fixed statistics, and with the batch's."""


class Run(NamedTuple):
    """A network that runs.

    Attributes:
        spec: the architecture, or its name.
        shape: N, H, W of the images, which have three channels and are ``channels_last``.
        dtype: of activations, a key of :data:`~vovnet_fast.tools.plan.DTYPES`. In inference of the
            weights too; in training these are in fp32. Or ``int8`` or ``fp8``: a network that
            :func:`vovnet_fast.quantize` has made, with either stem.
        mode: one of :data:`MODES`. A training step ends with the backward pass from all stages.
        levels: the largest activation of int8, 127 by default.
    """

    spec: str | VoVNetSpec
    shape: Shape
    dtype: str = "bf16"
    mode: str = "inference"
    levels: int | None = None

    def network(self) -> tuple[VoVNet, Tensor]:
        """The model and the images, on meta.

        Raises:
            UnknownSpecError: no architecture has that name.
            ValueError: a size below 1, images too small for the network, unknown dtype or mode.
        """
        check_input(self.shape, self.dtype)
        architecture = specs.get(self.spec)
        check_size(architecture, STAGE_NAMES, *self.shape[1:])
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        images = self._images(DTYPES[self.dtype])
        trained = self.mode != "inference"
        with torch.device("meta"):
            model: Any = VoVNet(
                architecture, IMAGE_CHANNELS, norm_eval=self.mode != "training-batch"
            )
        model.to(
            dtype=torch.float32 if trained else images.dtype, memory_format=torch.channels_last
        )
        return model.train(trained), images

    def quantized(self) -> tuple[list[Architecture], Tensor]:
        """The networks in eight bits that may be meant, and the images, on meta.

        Raises:
            UnknownSpecError, ValueError: as :meth:`network`, or another number of levels.
            RuntimeError: this torch has no fp8.
        """
        check_input(self.shape, "fp32")
        spec = specs.get(self.spec)
        check_size(spec, STAGE_NAMES, *self.shape[1:])
        if self.mode != "inference":
            raise ValueError(f"there is no training step in {self.dtype}, but one in bf16, say")
        form = formats.require(self.dtype, self.levels)
        found = [
            Architecture(spec, form._replace(wide_stem=wide), STAGE_NAMES, IMAGE_CHANNELS)
            for wide in (False, True)
        ]
        return found, self._images(torch.float32)

    def _images(self, dtype: torch.dtype) -> Tensor:
        n, h, w = self.shape
        images = torch.empty(n, IMAGE_CHANNELS, h, w, dtype=dtype, device="meta")
        return images.to(memory_format=torch.channels_last)

    @property
    def eight_bits(self) -> bool:
        """Whether it is in int8 or fp8."""
        return self.dtype in arithmetic.DTYPES

    @property
    def activation(self) -> torch.dtype:
        """Of activations in memory."""
        if not self.eight_bits:
            return DTYPES[self.dtype]
        found: torch.dtype = formats.require(self.dtype, self.levels).ops.ACTIVATION
        return found

    @property
    def gradient(self) -> bool:
        """Whether autograd takes part."""
        return self.mode != "inference"


def plan(run: Run, setting: Setting) -> Plan:
    """What a run launches.

    Raises:
        UnknownSpecError, ValueError: as :meth:`Run.network` and :meth:`Run.quantized`.
        BackendError: the GPU has no products of that format.
    """
    if run.eight_bits:
        return _plan_quantized(run, setting)
    model, images = run.network()
    with torch.set_grad_enabled(run.gradient):
        return rehearsal.of_model(model, images, setting)


def _plan_quantized(run: Run, setting: Setting) -> Plan:
    architectures, images = run.quantized()
    capability = setting.target.capability
    least = MIN_CAPABILITY["fp8" if run.dtype == "fp8" else "int8"]
    if capability < least:
        raise backends.BackendError(
            f"{arch_of(capability)} has no products of {run.dtype}: {arch_of(least)} and newer have"
        )
    found = [rehearsing.plan(architecture, images, setting) for architecture in architectures]
    launches = [launch for plan in found for launch in plan.launches]
    return Plan(launches, frozenset().union(*(plan.functions for plan in found)))


def note(run: Run, jobs: Iterable[Job], setting: Setting) -> None:
    """Note for its first use what a run needs, as far as it is compiled.

    Raises:
        OSError: the cache cannot be written.
    """
    if run.eight_bits:
        architectures, images = run.quantized()
        for architecture in architectures:
            key = first_use.key_of_quantized(architecture, images)
            first_use.Note(key, setting).write(compiled(jobs))
        return
    model, images = run.network()
    with torch.set_grad_enabled(run.gradient):
        keys = [first_use.key_of_model(model, images, images.dtype)]
    if not run.gradient:
        keys.append(first_use.key_of_frozen(model, images, images.dtype))
    for key in keys:
        first_use.Note(key, setting).write(compiled(jobs))


def settings(arch: str, planning: tuning.Planning) -> list[Setting]:
    """All known cards of an architecture: what is worth measuring differs between them."""
    return [
        Setting(Target(card.capability, card.processors, card.name), planning)
        for card in CARDS
        if arch_of(card.capability) == arch
    ]


def by_run(runs: Iterable[Run], settings: Sequence[Setting]) -> dict[Run, list[Job]]:
    """The kernels that each run needs, each once, with those of the self-check.

    Args:
        runs: what will run.
        settings: where, on cards of one architecture.

    Raises:
        UnknownSpecError, ValueError: as :func:`plan`.
    """
    return {run: list(_of_run(run, settings)) for run in runs}


def _of_run(run: Run, settings: Sequence[Setting]) -> Iterable[Job]:
    found: dict[str, Job] = {}
    for setting in settings:
        planned = plan(run, setting)
        checked = rehearsal.self_check(planned.functions, run.activation, setting.target)
        arch = arch_of(setting.target.capability)
        found |= {job.key: job for job in different([*planned.launches, *checked], arch)}
    return found.values()
