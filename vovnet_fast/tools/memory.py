"""What training keeps in memory: the bytes that autograd holds for the backward pass.

They are counted on meta tensors, which have shapes and no memory: for any size, on any
machine. On a GPU the peak of a training step can be measured as well.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import backends, specs
from ..compat import zip
from ..network.model import VoVNet
from ..specs import VoVNetSpec
from .plan import DTYPES, IMAGE_CHANNELS, check_input


class Mode(NamedTuple):
    """A way to train a network.

    Attributes:
        fused: by the ops, and not by plain modules.
        with_cp: every OSA block keeps its input only, and is computed again.
    """

    fused: bool
    with_cp: bool


MODES = {
    "eager": Mode(False, False),
    "eager, checkpoint": Mode(False, True),
    "fused": Mode(True, False),
    "fused, recompute": Mode(True, True),
}


@dataclass(frozen=True)
class Row:
    """One mode. Units: bytes.

    Attributes:
        mode: a key of :data:`MODES`.
        stages: what autograd holds after the forward pass, by the stage that needs it;
            where several do, by the last one in network order.
        peak: the most that a training step had allocated at a time, beyond parameters,
            buffers and images; None where it was not measured or did not fit.
    """

    mode: str
    stages: dict[str, int]
    peak: int | None = None

    @property
    def kept(self) -> int:
        """The sum over the stages."""
        return sum(self.stages.values())


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of a training step of one network on one input, a row a mode, eager first.

    Attributes:
        spec: canonical name of the architecture.
        shape: N, H, W of the images.
        dtype: a key of :data:`~vovnet_fast.tools.plan.DTYPES`.
        norm_eval: batch norms keep their statistics.
        rows: in the order of :data:`MODES`.
        device: name of the GPU on which peaks were measured, or None.
    """

    spec: str
    shape: tuple[int, int, int]
    dtype: str
    norm_eval: bool
    rows: tuple[Row, ...]
    device: str | None = None

    def ratio(self, row: Row) -> float:
        """What ``row`` keeps, of what eager does."""
        return row.kept / self.rows[0].kept

    def as_dict(self) -> dict[str, Any]:
        """Everything, totals and ratios included, as what JSON can hold. Units: bytes."""
        found = asdict(self)
        for content, row in zip(found["rows"], self.rows, strict=True):
            content.update(kept=row.kept, ratio_to_eager=self.ratio(row))
        return found


def training_memory(
    spec: str | VoVNetSpec,
    shape: tuple[int, int, int],
    *,
    dtype: str = "bf16",
    norm_eval: bool = True,
    measure: bool = False,
) -> TrainingMemory:
    """Count what autograd keeps of a forward pass in training, in every mode.

    Model and images are ``channels_last`` and of one dtype, all parameters need
    gradients, and the images none. Parameters, buffers and images are left out.

    Args:
        spec: an architecture or its name.
        shape: N, H, W of the images, which have three channels.
        dtype: of images and parameters, a key of :data:`~vovnet_fast.tools.plan.DTYPES`.
        norm_eval: batch norms keep their statistics, instead of taking the batch's.
        measure: run training steps on the current GPU, and note their peaks.

    Raises:
        UnknownSpecError: no architecture has that name.
        ValueError: a size below 1, images too small for the network, unknown dtype.
        BackendError: ``measure`` without a GPU that can run the Triton kernels.
    """
    check_input(shape, dtype)
    architecture = specs.get(spec)
    device = None
    if measure:
        reason = backends.why_not("triton", torch.device("cuda"))
        if reason is not None:
            raise backends.BackendError(
                f"peaks cannot be measured here: {reason}. Without --measure bytes are counted, "
                "on any machine"
            )
        device = torch.cuda.get_device_name()
    rows = []
    for name, mode in MODES.items():
        stages = _count(*_setup(architecture, shape, dtype, norm_eval, mode, "meta"), mode)
        peak = None
        if measure:
            with contextlib.suppress(torch.OutOfMemoryError):
                peak = _measure(*_setup(architecture, shape, dtype, norm_eval, mode, "cuda"), mode)
            torch.cuda.empty_cache()
        rows.append(Row(name, stages, peak))
    return TrainingMemory(architecture.name, shape, dtype, norm_eval, tuple(rows), device)


def _setup(
    spec: VoVNetSpec,
    shape: tuple[int, int, int],
    dtype: str,
    norm_eval: bool,
    mode: Mode,
    device: str,
) -> tuple[VoVNet, Tensor]:
    """A network in training mode, and uninitialised images."""
    batch, height, width = shape
    with torch.device(device):
        model: Any = VoVNet(spec, IMAGE_CHANNELS, norm_eval=norm_eval, with_cp=mode.with_cp)
        images = torch.empty(batch, IMAGE_CHANNELS, height, width, dtype=DTYPES[dtype])
    model = model.to(dtype=DTYPES[dtype], memory_format=torch.channels_last)
    return model.train(), images.to(memory_format=torch.channels_last)


def _count(model: VoVNet, images: Tensor, mode: Mode) -> dict[str, int]:
    """Bytes that autograd holds by stage, after a forward pass on meta tensors."""
    given = (images, *model.parameters(), *model.buffers())
    own = {StorageWeakRef(t.untyped_storage()) for t in given}
    stages: dict[StorageWeakRef, str] = {}
    sizes: dict[StorageWeakRef, int] = {}
    running = ""

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept = StorageWeakRef(storage)
        stages[kept], sizes[kept] = running, storage.nbytes()
        return tensor

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            nonlocal running
            running = name

        return hook

    found = dict.fromkeys([name for name, _ in model.named_children()], 0)
    for name in found:
        # On whole stages: the fused path runs no module inside them.
        model.get_submodule(name).register_forward_pre_hook(enter(name))
    path = backends.shapes_only() if mode.fused else backends.use_backend("reference")
    with path, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model(images)
        # Of nodes that are gone already, nothing is held.
        for kept in [kept for kept in sizes if kept not in own and not kept.expired()]:
            found[stages[kept]] += sizes[kept]
        del features
    return found


def _measure(model: VoVNet, images: Tensor, mode: Mode) -> int:
    """Peak bytes of a training step on a GPU, gradients of the parameters included."""
    images.normal_()
    with backends.use_backend("triton" if mode.fused else "reference"):
        with torch.no_grad():
            gradients = [torch.ones_like(feature) for feature in model(images)]
        for _ in range(2):  # The first one compiles, and chooses engines.
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.backward(model(images), gradients)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
