"""Every kernel of the Hopper convolution in e4m3, tried as :mod:`.conv_sm90_trial` tries others.

Activations, features and sums of the pool are held against :mod:`vovnet_fast.arithmetic.fp8` as the
self-check does (:mod:`vovnet_fast.selfcheck.eight_bits`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from .. import tuning
from ..arithmetic import fp8
from ..arithmetic.layers import QuantizedConv
from ..compat import zip
from ..selfcheck import eight_bits as check
from . import _apart, conv_sm90_fp8
from .conv_sm90_tiles import WIDTHS, Config, kernels
from .conv_sm90_trial import SMALL, Map, device_of, forms, large, made

_SOURCES = (
    "backends._extension.fields", "backends.conv_sm90_fp8", "backends.conv_sm90_tiles",
    "backends.conv_sm90_trial", "backends.conv_sm90_fp8_trial", "arithmetic.fp8", "arithmetic.sums",
    "selfcheck.eight_bits", "selfcheck.eight_bit_calls",
)  # fmt: skip

WHOLE = {3: 48, 1: 464}
"""Input channels on the small map: bulk copies want multiples of 16."""


def sources(function: str) -> tuple[str, ...]:
    """Modules that a verdict depends on (:func:`vovnet_fast.selfcheck.digest`)."""
    return ("_C", *_SOURCES)


def main() -> None:
    """In the process that tries."""
    _apart.serve(trials)


def trials(given: Mapping[str, Any]) -> _apart.Trials:
    """All of them, on a GPU.

    Args:
        given: see :func:`.conv_sm90_trial.device_of`.

    Raises:
        Unable: there is no such GPU here.
    """
    device, processors = device_of(given, "conv_sm90_fp8")
    many = large(processors)
    for pixels in (SMALL._replace(c_in=WHOLE), many._replace(c_in={3: 144, 1: 208})):
        for block in WIDTHS:
            yield from of_tiles(device, pixels, block)


def of_tiles(device: torch.device, pixels: Map, block: int) -> _apart.Trials:
    """Those of tiles with so many output channels, if there are any."""
    for kernel in (1, 3) if kernels(block, 1) else ():
        configs = {config.name: config for config in forms(pixels, block, kernel, 1)}
        trial = _trial(device, pixels, block, kernel, configs)
        for name, config in configs.items():
            words = f"{name}, {kernel}x{kernel} of {pixels.size} in e4m3"
            yield words, functools.partial(made, trial, config, pixels.times)


def _trial(
    device: torch.device, pixels: Map, block: int, kernel: int, configs: Mapping[str, Config]
) -> tuning.Trial:
    """Writes activations and a feature, in slots that are poisoned before."""
    numbers = check.Numbers("fp8", device, fp8.LARGEST)
    c_in, c_out = pixels.c_in[kernel], pixels.across * block
    x = numbers.activations(*pixels.size, c_in)
    weight, bias = numbers.weight(c_out, kernel, kernel, c_in), numbers.bias(c_out)
    factors, unit = numbers.factors(c_out, kernel**2 * c_in), numbers.floats(c_out, scale=0.01)
    layer = QuantizedConv(weight, bias, factors, unit, 1, None, unit, None, 1.0)
    out = numbers.slot(*pixels.size, c_out)
    feature = numbers.slot(*pixels.size, c_out, dtype=torch.float32)
    written = numbers.slots[1:]
    sums = fp8.conv(x, layer, out, feature=feature, pool=True)
    assert sums is not None
    wanted = [out.clone(), feature.clone(), check.pooled(sums, out)]

    def trial(name: str) -> str | None:
        for slot in written:
            slot.clear()
        sums = conv_sm90_fp8.run_config(configs[name], x, layer, out, feature=feature, pool=True)
        assert sums is not None
        for ours, exact in zip((out, feature, check.pooled(sums, out)), wanted, strict=True):
            apart = check.distance(ours, exact, "fp8")
            if not apart <= 1:
                return f"{apart} apart, in fp8"
        return None if all(slot.untouched() for slot in written) else "it wrote outside its slot"

    return trial
