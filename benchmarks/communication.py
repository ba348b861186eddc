"""Training on several GPUs, on paper: gradients summed over a ring while the backward pass runs.

Nothing here is measured. The rates of the links are data sheets' with a stated share of
them, latencies are assumptions, and the backward pass takes its floor: the shortest time
that it could take, which leaves the least time to hide communication in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MIB = 1 << 20
GPUS_A_NODE = 8


@dataclass(frozen=True)
class Link:
    """What joins GPUs.

    Attributes:
        name: in words.
        rate: bytes a second that all rings together send from one GPU to the next, and
            between nodes from one node to the next.
        share: of the rate that a ring reaches; assumed.
        latency: seconds a step of a ring takes at least; assumed.
        small: seconds a collective of a few kilobytes takes; assumed.
    """

    name: str
    rate: float
    share: float
    latency: float
    small: float


NVLINK = Link("NVLink 4, in a node", 450e9, 0.8, 3e-6, 20e-6)
INFINIBAND = Link("InfiniBand NDR, a port a GPU", GPUS_A_NODE * 50e9, 0.8, 5e-6, 40e-6)
"""A ring leaves a node through one port: there are as many rings as ports."""


class Gradient(NamedTuple):
    """What the backward pass leaves.

    Attributes:
        size: bytes.
        seconds: from the beginning of the backward pass until it is there.
    """

    size: int
    seconds: float


def link(gpus: int) -> Link:
    """The slowest one in a ring of so many GPUs."""
    return NVLINK if gpus <= GPUS_A_NODE else INFINIBAND


def all_reduce_seconds(size: int, gpus: int, over: Link) -> float:
    """A sum over rings: 2 (p - 1) / p of the bytes pass each link in 2 (p - 1) steps."""
    steps = 2 * (gpus - 1)
    return steps / gpus * size / (over.rate * over.share) + steps * over.latency


def buckets(
    gradients: Iterable[Gradient], *, first: int = MIB, others: int = 25 * MIB
) -> list[Gradient]:
    """Gradients as DDP joins them: in the order in which they are there, up to a size.

    A bucket can be sent when its last gradient is there. The limits are DDP's defaults.
    """
    found: list[Gradient] = []
    size, limit = 0, first
    last = 0.0
    for gradient in gradients:
        size, last = size + gradient.size, gradient.seconds
        if size >= limit:
            found.append(Gradient(size, last))
            size, limit = 0, others
    return [*found, Gradient(size, last)] if size else found


def exposed_seconds(
    sent: Sequence[Gradient], backward_seconds: float, gpus: int, over: Link
) -> float:
    """By how much the last bucket's sum comes after the end of the backward pass.

    Buckets are summed one after the other. What the sums take away from the kernels in
    processors and memory bandwidth is left out.
    """
    if gpus == 1:
        return 0.0
    free = 0.0
    for bucket in sent:
        free = max(free, bucket.seconds) + all_reduce_seconds(bucket.size, gpus, over)
    return max(0.0, free - backward_seconds)


def sync_batch_norm_seconds(norms: int, gpus: int, over: Link) -> float:
    """What waiting for each other's statistics takes in a step.

    A norm gathers statistics in the forward pass and sums gradients in the backward one.
    Both are a few kilobytes, and everything after them waits.
    """
    return 0.0 if gpus == 1 else 2 * norms * over.small
