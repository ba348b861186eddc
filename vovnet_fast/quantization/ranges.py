"""How large activations are: histograms, and calibrators that choose what a byte reaches.

==============  ==========================================================================
``minmax``      the least and the largest value that was seen
``percentile``  all but the given part of the values, zeros counted
``mse``         the least squared error of the quantised values
``entropy``     the least Kullback-Leibler divergence from the quantised distribution
==============  ==========================================================================

Sources: Migacz, "8-bit Inference with TensorRT" (GTC 2017) for the entropy; Nagel et al.
(arXiv:2106.08295, section 3.1) for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CALIBRATORS = ("minmax", "percentile", "mse", "entropy")

BINS = 2048
"""Of a histogram, on each side of zero."""

CHANNEL_BINS = 512
"""Of those of single channels."""

_CANDIDATES = 100
"""Parts of the largest value that ``mse`` and ``entropy`` try, down to a tenth."""

_ELEMENTS = 1 << 22
"""Of a tensor, at most, where all candidates are tried at once."""


class Range(NamedTuple):
    """What a byte reaches: ``[G]`` fp64, of all channels (G = 1) or of each.

    Attributes:
        low: at most 0.
        high: at least 0.
    """

    low: Tensor
    high: Tensor


class Histogram:
    """Counts of values in bins of one width, which doubles when a value lies beyond them.

    So batches may come one after another, and none has to be kept. Zeros are counted apart: a ReLU
    makes many.

    Args:
        groups: G: 1, or the number of channels for a histogram of each.

    Attributes:
        bins: B, on each side of zero.
        counts: ``[G, 2 * B]`` fp64, of the values other than zero.
        zeros: ``[G]``, how many there are.
        low, high: ``[G]``, the least and the largest value, and zero.
        squares: ``[G]``, their sum.
        reach: ``[G]``: the bins are those of values from ``-reach`` to ``reach``.
    """

    def __init__(self, groups: int, device: torch.device) -> None:
        self.bins = BINS if groups == 1 else CHANNEL_BINS
        self.counts = torch.zeros(groups, 2 * self.bins, dtype=torch.float64, device=device)
        nothing = self.counts.new_zeros(groups)
        self.zeros = self.low = self.high = self.squares = self.reach = nothing

    @property
    def mean_square(self) -> Tensor:
        """``[G]``."""
        return self.squares / (self.counts.sum(1) + self.zeros).clamp_min(1)

    @property
    def width(self) -> Tensor:
        """``[G, 1]``: of a bin."""
        return self.reach[:, None] / self.bins

    def add(self, x: Tensor) -> None:
        """Count the values of ``[N, C, H, W]``."""
        groups, both = self.counts.shape
        rows = x.detach().transpose(0, 1).reshape(groups, -1).double()
        if rows.numel() == 0:
            return
        self.low = torch.minimum(self.low, rows.amin(1))
        self.high = torch.maximum(self.high, rows.amax(1))
        self.squares = self.squares + rows.square().sum(1)
        self._reach_for(torch.maximum(-self.low, self.high))
        nonzero = rows != 0
        self.zeros = self.zeros + (~nonzero).sum(1)
        width = torch.where(self.width > 0, self.width, torch.ones_like(self.width))
        index = (rows / width).floor_().add_(self.bins).clamp_(0, both - 1).long()
        index += torch.arange(groups, device=x.device)[:, None] * both
        found = torch.bincount(index[nonzero], minlength=self.counts.numel())
        self.counts += found.view_as(self.counts)

    def _reach_for(self, largest: Tensor) -> None:
        self.reach = torch.where(self.reach > 0, self.reach, largest)
        while (beyond := self.reach < largest).any():
            merged = torch.zeros_like(self.counts)
            half = self.bins // 2
            merged[:, half : 3 * half] = self.counts.view(-1, self.bins, 2).sum(2)
            self.counts = torch.where(beyond[:, None], merged, self.counts)
            self.reach = torch.where(beyond, self.reach * 2, self.reach)

    def centres(self) -> Tensor:
        """``[G, 2 * B]``: the values that the bins stand for."""
        steps = torch.arange(2 * self.bins, dtype=torch.float64, device=self.counts.device)
        return (steps - self.bins + 0.5) * self.width


Rounding = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``rounding(x, low, high)``: what values become in a format that reaches from low to high."""


def choose(histogram: Histogram, calibrator: str, percentile: float, rounding: Rounding) -> Range:
    """The range that a calibrator chooses, never beyond what was seen.

    Args:
        histogram: of an activation.
        calibrator: one of :data:`CALIBRATORS`.
        percentile: of ``percentile``, say 99.99.
        rounding: of the format, for ``mse`` and ``entropy``.
    """
    whole = Range(histogram.low, histogram.high)
    if calibrator == "minmax" or not histogram.reach.any():
        return whole
    if calibrator == "percentile":
        return _percentile(histogram, percentile)
    cost = {"mse": _squared_error, "entropy": _divergence}[calibrator]
    fractions = torch.arange(_CANDIDATES // 10, _CANDIDATES + 1, device=histogram.counts.device)
    fractions = fractions.double()[:, None] / _CANDIDATES
    # Of ranges without a negative side half of the bins are empty.
    first = 0 if (histogram.low < 0).any() else histogram.bins
    counts, centres = histogram.counts[:, first:], histogram.centres()[:, first:]
    low, high = histogram.low, histogram.high
    reach = torch.maximum(-low, high)
    # What a candidate reaches, [F, G]: the smaller side is cut where it reaches further.
    tried = Range(torch.maximum(low, -reach * fractions), torch.minimum(high, reach * fractions))
    some = max(_ELEMENTS // (len(fractions) * counts.shape[1]), 1)
    parts = [
        cost(
            counts[i : i + some],
            centres[i : i + some],
            Range(*(x[:, i : i + some] for x in tried)),
            rounding,
        )
        for i in range(0, counts.shape[0], some)
    ]
    best = torch.cat(parts, 1).argmin(0, keepdim=True)
    return Range(*(ends.gather(0, best)[0] for ends in tried))


def _percentile(histogram: Histogram, percentile: float) -> Range:
    counts, zeros = histogram.counts, histogram.zeros
    total = counts.sum(1) + zeros
    beyond = total * (1 - percentile / 100)  # [G] values that may lie beyond, on each side.
    bins = histogram.bins
    edges = torch.arange(1, bins + 1, dtype=torch.float64, device=counts.device) * histogram.width

    def reach(side: Tensor) -> Tensor:
        """``side``: counts from zero outwards. The nearest edge beyond which there are no more."""
        left = side.sum(1, keepdim=True) - side.cumsum(1)
        inside = left <= beyond[:, None] + 1e-9
        return edges.gather(1, inside.double().argmax(1, keepdim=True))[:, 0]

    return Range(
        torch.maximum(-reach(counts[:, :bins].flip(1)), histogram.low),
        torch.minimum(reach(counts[:, bins:]), histogram.high),
    )


def _squared_error(counts: Tensor, centres: Tensor, tried: Range, rounding: Rounding) -> Tensor:
    """``[F, G]`` for ranges ``[F, G]`` of histograms ``[G, B]`` and the values of their bins."""
    error = rounding(centres[None], tried.low[..., None], tried.high[..., None]) - centres
    return (counts * error.square_()).sum(2)


def _divergence(counts: Tensor, centres: Tensor, tried: Range, rounding: Rounding) -> Tensor:
    """KL(P || Q) of the values clipped, P, and of these spread over what rounds alike, Q.

    Values beyond the range are P's outermost ones, and none of Q's: that is what clipping costs.
    Shapes are those of :func:`_squared_error`.
    """
    low, high = tried.low[..., None], tried.high[..., None]
    inside = ((centres >= low) & (centres <= high)).to(counts.dtype)
    kept = counts * inside
    filled = (kept > 0).to(counts.dtype)
    p = kept.clone()
    last = inside.shape[2] - 1 - inside.flip(2).argmax(2, keepdim=True)
    for outside, end in ((centres < low, inside.argmax(2, keepdim=True)), (centres > high, last)):
        p.scatter_add_(2, end, (counts * outside).sum(2, keepdim=True))
    rounded = rounding(centres[None], low, high).expand_as(kept)
    level = torch.zeros_like(kept, dtype=torch.int64)  # Rounding is monotonous.
    level[..., 1:] = (rounded[..., 1:] != rounded[..., :-1]).cumsum(2)
    totals = torch.zeros_like(kept).scatter_add_(2, level, kept)
    bins = torch.zeros_like(kept).scatter_add_(2, level, filled)
    q = totals.gather(2, level) / bins.gather(2, level).clamp_min(1) * filled
    p, q = (x / x.sum(2, keepdim=True).clamp_min(1e-300) for x in (p, q))
    # Where values were clipped to a bin that had none Q has nothing, which is as good as never.
    q = torch.where((p > 0) & (q == 0), torch.finfo(torch.float32).tiny, q)
    divergence = torch.where(p > 0, p * (p / q.clamp_min(1e-300)).log(), 0.0).sum(2)
    return torch.where(kept.sum(2) > 0, divergence, math.inf)
