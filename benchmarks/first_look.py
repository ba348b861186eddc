"""The first half minute on a device: what is it, what can it do, and do the backends compute right?

``python -m benchmarks.first_look``: the ceilings of copies and matrix multiplications; one kernel
of each backend, on odd sizes, against plain PyTorch bit for bit; whole networks in half
precision on each backend against fp64, whose error may be twice that of plain PyTorch in the same
dtype. Each check stands alone, prints a line when it has ended, and is a test result of
``benchmarks/gpu.py``. On a CPU networks are small and in fp32, and Triton's kernels run in its
interpreter where ``TRITON_INTERPRET=1``.

Exit status: 0, or 1 if a check failed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vovnet_fast import VoVNet, backends, use_backend
from vovnet_fast import _provenance as provenance
from vovnet_fast.backends import eight_bits, reference
from vovnet_fast.specs import VoVNetSpec
from vovnet_fast.tools.bench.stopwatch import Stopwatch, spread
from vovnet_fast.tools.bench.training import Shape, image

from .ceilings import COPY, Ceilings
from .evidence.records import Sink
from .networks import text

NETWORKS: dict[str, Shape] = {"V-39-eSE": (1, 800, 1344), "V-99-eSE": (6, 640, 1600)}
"""On a GPU; two that are measured afterwards, whose kernels are then compiled once."""

SMALL: Shape = (1, 32, 32)
"""On a CPU."""

DTYPES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.float32,)}

NO_MORE_AFTER = 45.0
"""Seconds after which no network is begun."""


class Missing(Exception):
    """What cannot be checked here; the message says why."""


Check = Callable[[], str]
"""Returns what it found, in words; raises AssertionError if it is wrong, or :class:`Missing`."""


class Checks:
    """Runs checks one by one, and keeps what becomes of each.

    Attributes:
        failed: how many did not pass.
    """

    def __init__(self) -> None:
        self.failed, self._sink = 0, Sink.here()

    def __call__(self, name: str, check: Check) -> None:
        """Run one, and print how it ended."""
        self._sink.began(name)
        begin = time.perf_counter()
        try:
            outcome, found = "passed", check()
        except Missing as missing:
            outcome, found = "skipped", str(missing)
        except Exception as error:  # Of a kernel, a driver, a library: the next check may pass.
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            outcome, found = "failed", f"{kind}{error}"
            self.failed += 1
        seconds = time.perf_counter() - begin
        self._sink.ended(name, outcome, seconds, found)
        print(f"{outcome:8} {seconds:5.1f} s  {name}: {found}", flush=True)

    def row(self, name: str, **row: object) -> None:
        """Keep a measurement."""
        self._sink.row(name, dict(row))


# --------------------------------------------------------------------------------------
# Ceilings
# --------------------------------------------------------------------------------------


def ceilings(device: torch.device, checks: Checks, small: bool) -> None:
    """Measure them; each becomes a row."""
    sizes = dict(side=64, copied=2**20) if small else {}
    found = Ceilings(Stopwatch(device), **sizes)

    def check(name: str) -> str:
        ceiling = found[name]
        rates = ceiling.rates()
        checks.row(
            ceiling.name, kind="ceiling", provider="torch", dtype=None if name == COPY else name,
            flop=ceiling.flop, bytes=ceiling.moved, **spread(ceiling.times), **rates,
        )  # fmt: skip
        return ", ".join(f"{rate:.1f} {unit}" for unit, rate in rates.items())

    for name in Ceilings.names(device):
        checks(f"ceiling {name}", lambda name=name: check(name))


# --------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------


def usable(backend: str, device: torch.device) -> None:
    """Raise :class:`Missing` unless a backend can run on the device."""
    reason = backends.why_not(backend, device)
    if reason is not None:
        raise Missing(reason)


def simplest(backend: str, device: torch.device) -> str:
    """A max pool, the only function whose result no rounding can change, on odd sizes."""
    usable(backend, device)
    x = torch.randn(2, 9, 13, 56, device=device)
    found, expected = (torch.full((2, 5, 7, 56), torch.nan, device=device) for _ in "ab")
    reference.max_pool(x, expected, "padded", None)
    backends._module(backend).max_pool(x, found, "padded", None)
    assert torch.equal(found, expected), f"{(found != expected).sum()} of {found.numel()} differ"
    return "as plain PyTorch, bit for bit"


# --------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------


class Exact(NamedTuple):
    """A network on images, with what is right.

    Attributes:
        model: in fp32.
        images: in fp32.
        features: in fp64.
    """

    model: VoVNet
    images: Tensor
    features: list[Tensor]

    @classmethod
    def of(cls, spec: str | VoVNetSpec, shape: Shape, device: torch.device) -> Exact:
        """Weights and norms as after training: nothing is zero or one."""
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = VoVNet(spec).eval()
        for part in model.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            elif isinstance(part, nn.BatchNorm2d):
                for mean in (part.bias, part.running_mean):
                    nn.init.normal_(mean, std=0.2)
                for variance in (part.weight, part.running_var):
                    nn.init.uniform_(variance, 0.5, 1.5)
        # Halves that both dtypes have, so that the images round nothing.
        images = image(shape, torch.float32, device).bfloat16().half().float()
        model = model.to(memory_format=torch.channels_last)
        with use_backend("reference"):
            features = copy.deepcopy(model).double()(images.double())
        return cls(model, images, list(features))

    def error(self, backend: str, dtype: torch.dtype) -> float:
        """The largest relative error of a feature, in norms."""
        with use_backend(backend):
            found = copy.deepcopy(self.model).to(dtype)(self.images.to(dtype))
        return max(
            ((ours.double() - right).norm() / right.norm()).item()
            for ours, right in zip(found, self.features, strict=True)
        )


def network(exact: Exact, backend: str, dtype: torch.dtype) -> str:
    """Hold a network on a backend against fp64."""
    eager = exact.error("reference", dtype)
    if backend == "reference":
        assert eager < 0.1, f"error {eager:.2e}: plain PyTorch itself computes something else"
        return f"error {eager:.2e}"
    error, allowed = exact.error(backend, dtype), 2 * eager + torch.finfo(dtype).eps
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}, twice eager's"
    return f"error {error:.2e}, eager's {eager:.2e}"


def networks(device: torch.device, checks: Checks, end: float) -> None:
    """All of them, in all dtypes, on all backends, while there is time."""
    for dtype in DTYPES[device.type]:
        for name, spec, shape in _networks(device):
            exact = functools.cache(functools.partial(Exact.of, spec, shape, device))
            for backend in backends.NAMES:

                def check(
                    backend: str = backend,
                    exact: Callable[[], Exact] = exact,
                    dtype: torch.dtype = dtype,
                ) -> str:
                    usable(backend, device)
                    if time.perf_counter() > end:
                        raise Missing("no time was left for it")
                    return network(exact(), backend, dtype)

                short = str(dtype).removeprefix("torch.")
                checks(f"{name} {text(shape)} in {short} on {backend}", check)


def in_eight_bits(form: str, device: torch.device) -> str:
    """Hold a network in eight bits on Triton against the integers, and fp8 against e4m3."""
    ops, reason = eight_bits.find("triton", device, form, ())
    if ops is None:
        raise Missing(str(reason))
    from tests.quantization.cases import images, quantized

    name, x = ("V-39-eSE", images(1, height=96, width=128)) if device.type == "cuda" else (
        "detectron2", images(1, height=33, width=32)
    )  # fmt: skip
    model = copy.deepcopy(quantized(name, form)).to(device)
    found, wanted = [], []
    for backend, features in (("triton", found), ("reference", wanted)):
        with use_backend(backend):
            features += model(x.to(device))
    if form == "int8":
        differ = sum(int((a != b).sum()) for a, b in zip(found, wanted, strict=True))
        assert not differ, f"{differ} numbers differ from those of the integers"
        return "the integers, bit for bit"
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True))
    assert error < 0.02, f"error {error:.2e} against e4m3 with exact sums, allowed 0.02"
    return f"error {error:.2e} against e4m3 with exact sums"


def _networks(device: torch.device) -> Iterator[tuple[str, str | VoVNetSpec, Shape]]:
    """Name, architecture and images."""
    if device.type == "cuda":
        for name, shape in NETWORKS.items():
            yield name, name, shape
        return
    from tests.tiny import TINY  # V-39 with few and narrow layers.

    yield "a small V-39-eSE", TINY["detectron2"], SMALL


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python -m benchmarks.first_look``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_look",
        description="What a device is, and whether the backends work on it.",
    )
    parser.add_argument(
        "--seconds", type=float, default=NO_MORE_AFTER, metavar="S",
        help="begin no further network after S seconds (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="ceilings of small tensors")
    options = parser.parse_args(arguments)
    end = time.perf_counter() + options.seconds
    # A network takes the static choices: measuring engines comes later.
    os.environ["VOVNET_FAST_TUNE"] = "0"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in provenance.collect(device).items():
        print(f"{name:18}{value}", flush=True)
    checks = Checks()
    with torch.inference_mode():
        ceilings(device, checks, options.small)
    with torch.no_grad():
        for backend in backends.NAMES:
            checks(f"a kernel of {backend}", lambda backend=backend: simplest(backend, device))
        for form in ("int8", "fp8"):
            checks(f"a network in {form} on triton", functools.partial(in_eight_bits, form, device))
        networks(device, checks, end)
    print("all that could be checked is right" if not checks.failed else f"{checks.failed} failed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
