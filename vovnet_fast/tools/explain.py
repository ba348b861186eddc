"""``vovnet-fast explain``: what would run each part of a network here, and why nothing faster."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import backends, specs, tuning
from ..backends import _cuda_conv, _predict
from ..network import decision, ways
from ..network.decision import NO_BACKEND, Decision
from ..network.model import STAGE_NAMES, VoVNet
from ..ops.features import check_size, sizes
from ..specs import VoVNetSpec
from . import sources
from .bench.command import parse_shape
from .plan import DTYPES, IMAGE_CHANNELS, check_input

NETWORK = "the network"


class Row(NamedTuple):
    """One part.

    Attributes:
        part: its name; :data:`NETWORK`, or that of a module.
        input: N, C, H, W of what it is given.
        op: an op runs it, not its modules.
        backend: which does the work.
        why: why nothing faster does, empty if there is nothing.
    """

    part: str
    input: tuple[int, int, int, int]
    op: bool
    backend: str
    why: str


def explain(
    spec: str | VoVNetSpec,
    shape: tuple[int, int, int],
    *,
    dtype: str = "fp32",
    device: torch.device | str = "cpu",
    train: bool = False,
    batch_norm: bool = False,
) -> list[Row]:
    """Decide what would run a network: as a whole, and if that is modules, each part of it.

    What has to prove right first is checked here as it would be there. Nothing else runs.

    Args:
        spec: an architecture, or its name.
        shape: N, H, W of the images.
        dtype: of images and parameters, a key of :data:`~.plan.DTYPES`. In training it is that
            of the activations, under autocast; parameters are in fp32.
        device: where it would run.
        train: a training step, and not inference.
        batch_norm: in which batch norms take their statistics from the batch.

    Raises:
        UnknownSpecError: no architecture has that name.
        ValueError: a size below 1, images too small for the network, or an unknown dtype.
        BackendError: a backend was asked for by name and cannot run there.
    """
    check_input(shape, dtype)
    architecture = specs.get(spec)
    check_size(architecture, STAGE_NAMES, *shape[1:])
    with torch.device("meta"):  # The parameters' values decide nothing.
        model = VoVNet(architecture, IMAGE_CHANNELS, norm_eval=not batch_norm)
    model.train(train)
    found = []

    def decide(name: str, part: Any, channels: int, size: tuple[int, int], like: Tensor) -> bool:
        x = like.expand(shape[0], channels, *size)  # Of any size, it takes no memory.
        decided: Decision = part.decide(x)
        kind = decision.compute_dtype(x)
        needs = _needs(part, x) if decided.op else ()
        backend = backends.select(x.device, kind, needs) if decided.op else "reference"
        why = _no_backend(x.device, kind) if decided == NO_BACKEND else decided.why
        found.append(Row(name, (*x.shape,), decided.op, backend, why))
        return decided.op

    compute, on = DTYPES[dtype], torch.device(device)
    image = torch.empty(1, dtype=torch.float32 if train else compute, device=on)[None, None, None]
    mixed = torch.autocast(on.type, compute) if train and compute.itemsize == 2 else None
    with torch.set_grad_enabled(train), mixed or contextlib.nullcontext():
        if decide(NETWORK, model, IMAGE_CHANNELS, shape[1:], image):
            return found
        maps = sizes(architecture, *shape[1:])
        decide("stem", model.stem, IMAGE_CHANNELS, shape[1:], image)
        activations = torch.empty(1, dtype=compute, device=on, requires_grad=train)
        activations = activations[None, None, None]
        for stage in STAGE_NAMES:
            for name, block in getattr(model, stage).named_children():
                decide(name, block, block.plan.in_channels, maps[stage], activations)
    return found


def _needs(part: Any, x: Tensor) -> tuple[str, ...]:
    if isinstance(part, VoVNet):
        return part.functions()
    needs: tuple[str, ...] = part.needs(part.kinds, backward=decision.needs_gradient(part, x))
    return needs


def _no_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Why ``auto`` has none but plain PyTorch for ops, or that it was asked for."""
    if backends.chosen() == "reference":
        return "the reference backend was asked for"
    reasons = [
        f"{name}: {backends.why_not(name, device) or f'not for {dtype}, or found wrong'}"
        for name in backends.CANDIDATES.get(device.type, ())
    ]
    return "; ".join(reasons) or f"there are no kernels for devices of type {device.type}"


# --------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to those of ``vovnet-fast``."""
    command = commands.add_parser(
        "explain",
        help="show what would run each block of a network here, and why nothing faster",
        description=(
            "Decide, as a call of the network would, what runs it on images of this size: one "
            "op, an op for each block, or plain modules; on which backend; and why nothing "
            "faster. Functions of a backend that have not been checked on this machine are."
        ),
        epilog="example: vovnet-fast explain V-39-eSE 1x800x1344 --train",
    )
    command.add_argument("spec", metavar="SPEC", help="an architecture (see: vovnet-fast specs)")
    command.add_argument("shape", metavar="NxHxW", help="sizes of the images")
    command.add_argument("--dtype", choices=DTYPES, help="of activations (cuda: bf16, cpu: fp32)")
    command.add_argument(
        "--device", help="where it would run; by default a GPU if there is one, or the CPU"
    )
    command.add_argument("--train", action="store_true", help="a training step, not inference")
    command.add_argument(
        "--batch-norm",
        action="store_true",
        help="in training, batch norms take the batch's statistics (norm_eval=False)",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the decisions.

    Raises:
        BackendError, UnknownSpecError, ValueError: as :func:`explain`.
    """
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = sources.device(name)
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    rows = explain(
        args.spec,
        parse_shape(args.shape),
        dtype=dtype,
        device=device,
        train=args.train,
        batch_norm=args.batch_norm,
    )
    if args.json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_table(rows))
    others = {n: r for n, r in backends.available_backends().items() if r is not None}
    for other, reason in others.items():
        console.print(f"{other} cannot run here: {reason}", markup=False)
    if args.train and device.type == "cpu" and backends.chosen() == "auto":
        console.print(
            f"A training step of a kind that is new here is measured in four ways: {ways.OPS}, "
            f"{ways.MIXED}, which this is, {ways.MODULES}, and {ways.OTHER_LAYOUT}. "
            "The fastest runs from then on; "
            f"{tuning.ENVIRONMENT}=0 measures nothing, and runs this one.",
            markup=False,
        )
    if device.type == "cuda":
        for engine, why in _cuda_conv.offered(device).items():
            if why is not None:
                console.print(f"{engine} is not considered: {why}", markup=False)
    known = tuning.table().choices().get(tuning.machine(device), {})
    console.print(f"{len(known)} choices of engines are known for this machine{_kinds(known)}")


def _kinds(known: Mapping[str, tuning.Choice]) -> str:
    """How many choices are of which kind of engine."""
    kinds = Counter(_predict.family(choice.name) for choice in known.values())
    words = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f": {words}" if words else ""


def _table(rows: Sequence[Row]) -> Table:
    table = Table("part", "input", "runs as", "backend", "why nothing faster", box=None)
    for row in rows:
        size = "x".join(map(str, row.input))
        table.add_row(row.part, size, "op" if row.op else "modules", row.backend, row.why)
    return table
