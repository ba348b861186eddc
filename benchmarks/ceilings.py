"""What this device reaches at most, measured in the same run as everything else.

A large copy is the ceiling of what moves memory, a large matrix multiplication in the dtype
of the activations that of arithmetic. Rows of ops say which fraction of both they reach. The
copy is far larger than any cache: what fits into one, as small ops on a CPU do, can move more.
On a CPU the multiplication is made by two libraries, and the faster one counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vovnet_fast.tools.bench.stopwatch import Stopwatch, interleaved

COPY = "copy"
_SIDE = {"cuda": 8192, "cpu": 1536}
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
_ROUNDS = 20
_SECONDS = 3.0


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for it; without, it takes tens of times as long."""
    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


class Ceiling(NamedTuple):
    """A ceiling.

    Attributes:
        name: in words.
        work: the call that is measured.
        flop: of the call.
        moved: bytes that it reads and writes.
        times: seconds of its calls, in turn with those of the other ceilings.
    """

    name: str
    work: Callable[[], Any]
    flop: int
    moved: int
    times: list[float]

    @property
    def seconds(self) -> float:
        """Of the fastest call: what the device can, and not what it did at a bad moment."""
        return min(self.times)

    def rates(self) -> dict[str, float]:
        """``tflops`` and ``gbs`` as rows have them."""
        found = {"gbs": self.moved / self.seconds / 1e9}
        return found | ({"tflops": self.flop / self.seconds / 1e12} if self.flop else {})


class Ceilings:
    """The ceilings of one device, measured when the first of them is asked for.

    Args:
        watch: of the device.
        side: rows and columns of the matrices.
        copied: bytes that are copied.
    """

    def __init__(
        self, watch: Stopwatch, *, side: int | None = None, copied: int | None = None
    ) -> None:
        kind = watch.device.type
        self._watch = watch
        self._side, self._copied = side or _SIDE[kind], copied or _COPY_BYTES[kind]
        self._found: dict[str, Ceiling] = {}

    @staticmethod
    def names(device: torch.device) -> list[str]:
        """What there is on a device: :data:`COPY`, and dtypes of matrix multiplications."""
        if device.type == "cuda":
            return [COPY, "bfloat16"]
        return [COPY, *(["bfloat16"] if multiplies_bf16() else []), "float32"]

    def __getitem__(self, name: str) -> Ceiling:
        if not self._found:
            self._measure()
        return self._found[name]

    def fractions(self, flop: int, moved: int, seconds: float, dtype: torch.dtype) -> dict:
        """``tflops``, ``gbs``, ``of_matmul`` and ``of_copy`` of a call.

        ``of_matmul`` is left out where no ceiling of that dtype was measured.
        """
        row = {"tflops": flop / seconds / 1e12, "gbs": moved / seconds / 1e9}
        name = str(dtype).removeprefix("torch.")
        row["of_copy"] = row["gbs"] / self[COPY].rates()["gbs"]
        if name in self.names(self._watch.device):
            row["of_matmul"] = row["tflops"] / self[name].rates()["tflops"]
        return row

    def _measure(self) -> None:
        device = self._watch.device
        with torch.inference_mode():
            made = [(name, way) for name in self.names(device) for way in self._make(name, device)]
            times = interleaved(
                {way.name: way.work for _, way in made},
                _ROUNDS, watch=self._watch, seconds=_SECONDS,
            )  # fmt: skip
        for name, way in made:
            found = way._replace(times=times[way.name])
            if name not in self._found or found.seconds < self._found[name].seconds:
                self._found[name] = found

    def _make(self, name: str, device: torch.device) -> list[Ceiling]:
        """Ways to come near one, of which the fastest is it."""
        if name == COPY:
            source = torch.zeros(self._copied, dtype=torch.uint8, device=device)
            target = torch.zeros_like(source)
            text = f"copy of {self._copied / 2**20:.0f} MiB"
            return [Ceiling(text, lambda: target.copy_(source), 0, 2 * self._copied, [])]
        n, dtype = self._side, getattr(torch, name)
        # Zeros would need less power, and so run at higher clocks.
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        text = f"{n}x{n} times {n}x{n} in {name}"
        flop, moved = 2 * n**3, 3 * n * n * out.itemsize
        found = [Ceiling(text, lambda: torch.mm(a, b, out=out), flop, moved, [])]
        if device.type == "cpu":
            # As large a one by oneDNN: MKL's in fp32 was half as fast on a Zen 5.
            image = a.view(1, 1, n, n).permute(0, 3, 1, 2)
            weight = b.view(n, 1, 1, n).permute(0, 3, 1, 2)
            convolution = functools.partial(torch.nn.functional.conv2d, image, weight)
            found.append(Ceiling(f"{text}, a 1x1 convolution", convolution, flop, moved, []))
        return found
