"""What is to be compiled in int8 and fp8: convolutions, and all that lies between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..arithmetic import fp8, int8
from ..arithmetic.layers import QuantizedDepthwise, QuantizedGate, QuantizedSum
from ..specs import Gate
from .convolutions import LAYERS
from .job import Job, capability, meta

if TYPE_CHECKING:
    from ..kernels.conv_config import ConvConfig
    from ..kernels.conv_eight_bits_config import Format

FORMATS: tuple[Format, ...] = ("int8", "fp8")


def _activation(form: Format) -> torch.dtype:
    found = int8.ACTIVATION if form == "int8" else fp8.ACTIVATION
    assert found is not None
    return found


def formats(arch: str) -> list[Format]:
    """Those that are compiled for an architecture. That of Ada is there for fp8 alone: in int8 it
    runs what sm_80 does."""
    from ..kernels.conv_eight_bits_config import MIN_CAPABILITY

    found = [form for form in FORMATS if capability(arch) >= MIN_CAPABILITY[form]]
    if fp8.ACTIVATION is None:
        found.remove("fp8")
    return [form for form in found if form == "fp8"] if arch == "sm_89" else found


def _conv_job(
    config: ConvConfig | None,
    form: Format,
    layer: tuple[int, int, int, int],
    *,
    levels: int = 127,
    written: str = "slot",
    wide: bool = False,
    essential: bool = True,
) -> Job:
    """A convolution of a slot into the next; a 1x1 leaves sums for a pool, as in a block.

    ``written``: what, or both. Images have a configuration of their own if None is given.
    """
    from ..kernels import conv_eight_bits
    from ..kernels.conv_eight_bits_config import EightBits, offset

    c_in, c_out, kernel, stride = layer
    kind = _activation(form)
    x = meta(2, 50, 84, c_in + 5 * max(c_out, 16), dtype=kind)[..., :c_in]
    if c_in == 3:
        x = meta(2, 50, 84, 3, dtype=(int8 if form == "int8" else fp8).image_dtype(wide))
    size = conv_eight_bits.output_size(50, 84, kernel, stride)
    out = meta(2, *size, c_in + 5 * c_out, dtype=kind)[..., -c_out:]
    feature = meta(2, *size, c_out, dtype=torch.float32)
    weight = meta(c_out, kernel, kernel, c_in, dtype=conv_eight_bits.product(x.dtype))
    bias = meta(c_out, dtype=torch.int32 if form == "int8" else torch.float32)
    vector = meta(c_out, dtype=torch.float32)
    epilogue = EightBits(
        bias, vector, vector, levels,
        out if written != "feature" else None, feature if written != "slot" else None,
        weight_sums=bias if offset(x.dtype, levels) else None,
    )  # fmt: skip
    if config is None:
        _, config = conv_eight_bits.choices(x, weight, epilogue, stride=stride)
    if kernel == 1 and written != "feature":
        tiles = conv_eight_bits.pool_tiles(x, weight, epilogue, stride=stride, config=config)
        partials = meta(2, tiles, c_out, dtype=bias.dtype)
        epilogue = dataclasses.replace(epilogue, pool_partials=partials)
    notes = [written] if written != "slot" else []
    notes += [f"{levels} levels"] if levels != 127 and form == "int8" else []
    notes += ["wide"] if wide else []
    text = ", ".join([f"{c_in}>{c_out} {kernel}x{kernel}/{stride} {form}", *notes])
    launch = conv_eight_bits.plan(x, weight, epilogue, stride=stride, config=config)
    return Job("conv eight bits", text, config.name, launch, essential)


def _conv_jobs(arch: str, form: Format) -> Iterator[Job]:
    from ..kernels._triton import TensorDescriptor
    from ..kernels.conv_eight_bits_config import candidates

    seen = set()
    for layer in LAYERS:
        c_in, c_out, kernel, stride = layer
        tma = TensorDescriptor is not None and stride == 1 and c_in >= 16
        for config in candidates(capability(arch), c_in, c_out, form, kernel=kernel, tma=tma):
            yield _conv_job(config, form, layer, essential=config not in seen)
            seen.add(config)
    inner: tuple[int, int, int, int] = (128, 128, 3, 1)
    for written in ("feature", "both"):
        found = candidates(capability(arch), 128, 128, form, both=written == "both")
        for config in {config.form: config for config in reversed(found)}.values():
            yield _conv_job(config, form, inner, written=written)
    if form == "int8":
        config = candidates(capability(arch), 128, 128, form, tma=False)[0]
        yield _conv_job(config, form, inner, levels=255)


def conv_jobs(arch: str) -> Iterator[Job]:
    """The convolutions."""
    from ..kernels._common import Target, planning_for

    for form in formats(arch):
        yield from _conv_jobs(arch, form)
        with planning_for(Target(capability(arch))):
            yield _conv_job(None, form, (3, 64, 3, 2), wide=True)


def elementwise_jobs(arch: str) -> Iterator[Job]:
    """All the others, for one number of channels."""
    for form in formats(arch):
        yield from _elementwise_jobs(form)


def _elementwise_jobs(form: Format) -> Iterator[Job]:
    from ..kernels import depthwise_eight_bits, ese_eight_bits, max_pool

    kind, c = _activation(form), 112
    ops, number = (int8, torch.int32) if form == "int8" else (fp8, torch.float32)

    def job(kernel: str, launch: Any, config: str) -> Job:
        return Job(kernel, f"{c} {form}", config, launch)

    z = meta(2, 50, 84, c, dtype=kind)
    slot = meta(2, 50, 84, 5 * c, dtype=kind)[..., :c]
    small = meta(2, 25, 42, 5 * c, dtype=kind)[..., :c]
    feature = meta(2, 50, 84, c, dtype=torch.float32)
    vector, gates = meta(c, dtype=torch.float32), meta(2, c, dtype=number)
    images = meta(2, 3, 50, 84, dtype=torch.float32).permute(0, 2, 3, 1)
    for wide in (False, True):
        out = meta(2, 50, 84, 3, dtype=ops.image_dtype(wide))
        launch = depthwise_eight_bits.plan_image(images, 0.1, out)
        yield job("image", launch, "wide" if wide else "")
    zero = meta(c, dtype=torch.uint8)
    taps = meta(3, 3, c, dtype=torch.int8 if form == "int8" else kind)
    layer = QuantizedDepthwise(taps, vector, zero, vector, vector)
    for stride, out in ((1, slot), (2, small)):
        launch = depthwise_eight_bits.plan(z, layer, out, levels=127, stride=stride)
        yield job("depthwise", launch, f"stride {stride}")
    yield job("max pool", max_pool.plan(slot, small, "ceil"), "ceil")
    factors = QuantizedSum(1, 1, 14, 0.1)
    for name, identity, target in (("identity", slot, None), ("feature", None, feature)):
        launch = ese_eight_bits.plan_apply(
            z, gates, identity, factors, slot, levels=127, feature=target
        )
        yield job("ese apply", launch, name)
    sums = meta(2, 66, c, dtype=number)
    weight = meta(c, c, dtype=torch.int16 if form == "int8" else torch.float32)
    table = meta(int8.TABLE, dtype=torch.int32) if form == "int8" else None
    kinds: tuple[tuple[Gate, Any], ...] = (("hard_sigmoid", None), ("sigmoid", table))
    for gate, looked_up in kinds:
        fc = QuantizedGate(weight, meta(c, dtype=number), vector, 1, 1.0, gate, looked_up)
        mean, gated = ese_eight_bits.plan_gates(sums, 4200, fc, gates, gates)
        yield job("ese gates", gated, gate)
    yield job("ese pool", mean, "")
