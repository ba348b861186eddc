"""Tensors of a check: slots in NaN, filled with the same numbers at every request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .._dtypes import accumulator
from ..compat import zip

_TRIAL_BYTES = 2**30


class Slot:
    """Memory of a view, with NaN before, after and between its elements.

    Args:
        shape: of the view.
        stride: of the view, in elements.
        dtype: a floating one.
        device: where it lies.
        alignment: elements by which it starts after a multiple of 32 bytes.

    Attributes:
        view: the view itself, NaN as well until something is written.
    """

    _GUARD = 32  # Elements: 64 bytes in the narrowest dtype.

    def __init__(
        self,
        shape: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        alignment: int = 0,
    ) -> None:
        first = self._GUARD + alignment
        extent = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
        total = first + extent + self._GUARD
        self._storage = torch.full((total,), math.nan, dtype=dtype, device=device)
        self.view = self._storage.as_strided(tuple(shape), tuple(stride), first)

    @classmethod
    def like(cls, view: Tensor, images: int) -> Slot:
        """One for the first images of a view, laid out and aligned as the view is."""
        alignment = view.data_ptr() % 32 // view.itemsize
        return cls((images, *view.shape[1:]), view.stride(), view.dtype, view.device, alignment)

    def randomise(self, random: torch.Generator) -> Tensor:
        """Fill the view with normally distributed numbers; returns it."""
        # What an expanded view has in several places is in memory once.
        once = tuple(slice(0, 1) if s == 0 else slice(None) for s in self.view.stride())
        self.view[once].normal_(generator=random)
        return self.view

    def clear(self) -> None:
        """Fill the view and all around it with NaN."""
        self._storage.fill_(math.nan)

    def untouched(self) -> bool:
        """Whether all is NaN still around the view, whose own values this overwrites."""
        self.view.fill_(math.nan)
        return bool(self._storage.isnan().all())


def few_images(*views: Tensor) -> int:
    """How many images of these views a trial can take: all of them, or as fit into 1 GiB."""
    images = views[0].shape[0]
    bytes_each = sum(max(view.stride(0), view[0].numel()) * view.itemsize for view in views)
    return max(1, min(images, _TRIAL_BYTES // max(bytes_each, 1)))


def disagreement(pairs: Iterable[tuple[Tensor, Tensor]], tolerance: float) -> str | None:
    """What is wrong with tensors that should be equal, or None.

    Args:
        pairs: what was found, and what was expected.
        tolerance: of the error, as a fraction of the largest value expected.
    """
    for found, expected in pairs:
        error, allowed = largest(found.to(expected.dtype) - expected), largest(expected)
        if error > tolerance * allowed:
            return f"error {error:.3g}, allowed {tolerance * allowed:.3g}"
    return None


def largest(values: Tensor) -> float:
    """Largest magnitude; infinite where a value is NaN, since nothing here should be."""
    return values.abs().nan_to_num(nan=math.inf, posinf=math.inf).max().item()


class Tensors:
    """Makes the arguments of one call; in the same order of requests, the same numbers.

    Args:
        rounding: activations and weights hold numbers of this dtype,
        dtype: and are of this one, in which the call computes.
        device: where they lie.
        cut: activations and weights lose the bits that TF32 does not have.
    """

    def __init__(
        self,
        rounding: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        *,
        cut: bool = False,
    ) -> None:
        self.rounding, self.dtype, self.device, self.cut = rounding, dtype, device, cut
        # Its own, so that the user's numbers stay as they are.
        self._source = device if device.type == "cuda" else torch.device("cpu")
        self._random = torch.Generator(self._source).manual_seed(0)
        self._slots: list[Slot] = []

    def output(self, *shape: int) -> Tensor:
        """A slot ``[N, H, W, C]`` of a wider buffer, full of NaN."""
        _, h, w, c = shape
        pixel = c + 32  # Neighbours on either side, and slots stay aligned to 16 bytes.
        slot = Slot(shape, (h * w * pixel, w * pixel, pixel, 1), self.dtype, self.device)
        self._slots.append(slot)
        return slot.view

    def activations(self, *shape: int, relu: bool = False) -> Tensor:
        """Such a slot with normally distributed numbers; with ``relu`` the positive ones."""
        values = self._numbers(shape)
        return self.output(*shape).copy_(values.relu() if relu else values)

    def weight(self, *shape: int, fan: int, master: bool = False) -> Tensor:
        """Packed, so that a sum over ``fan`` products with activations has variance one.

        ``master``: in fp32 (fp64 for fp64), as in training in mixed precision.
        """
        dtype = accumulator(self.dtype) if master else self.dtype
        return self._numbers(shape, fan**-0.5).to(self.device, dtype)

    def vector(self, *shape: int, low: float = 0.5, high: float = 1.5) -> Tensor:
        """Uniformly distributed numbers in fp32, or fp64 for fp64."""
        values = torch.rand(shape, generator=self._random, dtype=torch.float32, device=self._source)
        return (values * (high - low) + low).to(self.device, accumulator(self.dtype))

    def untouched(self) -> bool:
        """Whether nothing was written beside a slot. Spoils what is in the slots."""
        return all(slot.untouched() for slot in self._slots)

    def _numbers(self, shape: Sequence[int], deviation: float = 1.0) -> Tensor:
        values = torch.randn(
            tuple(shape), generator=self._random, dtype=torch.float32, device=self._source
        )
        values = (values * deviation).to(self.rounding)
        if self.cut:
            values = (values.float().view(torch.int32) & ~0x1FFF).view(torch.float32)
        return values.to(self.dtype)
