"""Counts that are the same on every machine: what kernels compile to, and what networks launch.

Nothing runs and nothing is measured. Kernels are compiled ahead of time and disassembled;
forward and backward passes go over meta tensors. :mod:`benchmarks.guard` compares the
counts with those that are committed.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from vovnet_fast import VoVNet, aot, backends, freeze
from vovnet_fast.aot import resources
from vovnet_fast.arithmetic import DTYPES
from vovnet_fast.backends import conv_sm90_tiles
from vovnet_fast.quantization import formats
from vovnet_fast.tools.memory import training_memory
from vovnet_fast.tools.plan import AtenRecorder, Work, launch_work, plan_forward, quantized_work

from . import sass
from .networks import Shape, launches, layers, operations

if TYPE_CHECKING:
    from vovnet_fast.kernels._common import Launch

Numbers = dict[str, float]
"""One row: numbers by what they count."""

Counts = dict[str, dict[str, Numbers]]
"""Rows by section and name."""

LOWER, HIGHER, NEITHER = -1, 1, 0

_HIGHER = ("multiply-adds an instruction", "CTAs an SM", "FLOP a byte from L2")
BETTER = dict.fromkeys(_HIGHER, HIGHER) | dict.fromkeys((*sass.PRODUCTS, "GFLOP"), NEITHER)
"""Which way is better. Of everything that is not here, less is."""

HOT = {
    "sm_90": (
        ("conv", "3>64 3x3/2 float16", "pointer-128x64-k32-w8-s2"),
        ("conv", "64>64 3x3/1 float16", "tma-256x64-k64-w8-s3"),
        ("conv", "128>128 3x3/1 float16", "tma-256x128-k64-w8-s3"),
        ("conv", "128>128 3x3/1 float16", "tma-256x128-k64-w8-s3-p"),
        ("conv", "160>160 3x3/1 float16", "tma-256x128+64-k32-w8-s6"),
        ("conv", "192>192 3x3/1 float16", "tma-256x128+64-k64-w8-s3"),
        ("conv", "224>224 3x3/1 float16", "tma-128x256-k32-w8-s6"),
        ("conv", "768>256 1x1/1 float16", "tma-256x128-k64-w8-s3"),
        ("conv statistics", "128>128 3x3/1 float16", "tma-256x128-k64-w8-s3"),
        ("conv input gradient", "128>128 3x3/1 float16", "tma-256x128-k64-w8-s3"),
        ("conv weight gradient", "128>128 3x3/1 float16", "tma-1x128-128-w8-p32-s6"),
        ("epilogue", "112 float16", "pool"),
        ("accumulate", "112 float16", "add, mask"),
        ("ese apply", "112 float16", "identity"),
        ("max pool", "112 float16", "padded argmax"),
        ("depthwise", "112 float16", "stride 1"),
        ("ese backward", "112 float16", "apply"),
        ("batch norm", "112 float16", "gradient sums"),
        ("batch norm", "112 float16", "input gradient"),
        ("conv eight bits", "128>128 3x3/1 int8", "tma-128x128-k128-w8-s3"),
        ("conv eight bits", "192>192 3x3/1 int8", "tma-256x128+64-k64-w8-s6"),
        ("conv eight bits", "768>256 1x1/1 int8", "tma-128x256-k128-w8-s3"),
        ("conv eight bits", "128>128 3x3/1 fp8", "tma-128x128-k128-w8-s3"),
        ("conv eight bits", "192>192 3x3/1 fp8", "tma-128x128+64-k64-w8-s6"),
        ("conv eight bits", "768>256 1x1/1 fp8", "tma-128x128-k128-w8-s3"),
        ("ese apply", "112 int8", "identity"),
        ("ese apply", "112 fp8", "identity"),
    ),
    "sm_89": (
        ("conv eight bits", "128>128 3x3/1 fp8", "pointer-128x128-k128-w8-s3"),
        ("conv eight bits", "224>224 3x3/1 fp8", "pointer-128x64+32+16-k128-w8-s3"),
    ),
    "sm_80": (
        ("conv", "64>64 3x3/1 float16", "pointer-128x64-k64-w8-s3"),
        ("conv", "128>128 3x3/1 float16", "pointer-128x128-k64-w8-s3"),
        ("conv", "224>224 3x3/1 float16", "pointer-128x64+32+16-k64-w8-s3"),
        ("conv", "768>256 1x1/1 float16", "pointer-128x128-k64-w8-s3"),
        ("conv input gradient", "128>128 3x3/1 float16", "pointer-128x128-k64-w8-s3"),
        ("conv weight gradient", "128>128 3x3/1 float16", "pointer-1x128-128-w8-p32-s4"),
        ("conv eight bits", "128>128 3x3/1 int8", "pointer-128x128-k128-w8-s3"),
        ("conv eight bits", "224>224 3x3/1 int8", "pointer-128x64+32+16-k128-w8-s3"),
    ),
}
"""The kernels in which V-39 and V-99 spend their time: operation, layer, configuration.

All are among those that tests/aot/test_aot.py compiles, so that Triton's cache has them.
"""

NETWORKS: tuple[tuple[str, Shape], ...] = (
    ("V-39-eSE", (1, 800, 1344)),
    ("V-99-eSE", (6, 640, 1600)),
    ("V-19-slim-dw-eSE", (8, 224, 224)),
)

_MULTIPLYING = (*sass.PRODUCTS, "UTMALDG", "LDGSTS", "LDSM", "LDS", "STS", "BAR")
_MOVING = ("LDG", "STG", "LDS", "STS", "BAR")


# --------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------


def kernels(arch: str) -> Iterator[tuple[str, Numbers]]:
    """Compile the hot kernels for ``arch``.

    Raises:
        LookupError: one of :data:`HOT` is not shipped any more.
    """
    jobs = {(job.kernel, job.layer, job.config): job for job in aot.jobs(arch) if job.essential}
    for name in HOT[arch]:
        if name not in jobs:
            raise LookupError(
                f"no kernel {', '.join(name)} is shipped for {arch} (python -m vovnet_fast.aot "
                f"--arch {arch} lists them): replace it in HOT of {__name__}"
            )
        row, disassembly = aot.examine(jobs[name], arch)
        numbers = kernel_numbers(row, disassembly)
        if resources.is_stale(jobs[name], row):
            numbers["out of date in kernels/resources"] = 1
        yield ", ".join(name), numbers


def kernel_numbers(row: aot.Row, disassembly: str) -> Numbers:
    """What one compiled kernel needs; of a kernel that multiplies, its loop's instructions."""
    every, loop = sass.instructions(disassembly), sass.hot_loop(disassembly)
    body = loop or every  # Few steps are unrolled, and leave no loop.
    counted, products = sass.counts(body), sass.multiply_adds(body)
    found: Numbers = {
        "registers": row.registers,
        "spilled bytes": row.spilled,
        "shared bytes": row.shared,
        "CTAs an SM": row.ctas,
        "instructions": len(every),
    }
    if loop:
        found["loop instructions"] = len(loop)
    if products:
        found["multiply-adds an instruction"] = round(products / len(body), 1)
    else:
        accesses = [one.name for one in every if one.operation in ("LDG", "STG")]
        found["narrow loads and stores"] = sum("128" not in name for name in accesses)
    for name in _MULTIPLYING if products else _MOVING:
        if counted[name]:
            found[name] = counted[name]
    return found


# --------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A training step on the Triton backend, in launches.

    Attributes:
        launches: of both passes.
        forward, backward: the work of each launch.
        aten: of the ATen operations between them, both ways.
        ready: parameters, in the order in which their gradients are there, and after how
            many launches of the backward pass.
    """

    launches: list[Launch]
    forward: list[Work]
    backward: list[Work]
    aten: list[Work]
    ready: list[tuple[nn.Parameter, int]]


def training_model(spec: str, **options: Any) -> Any:
    """A network on the meta device, with parameters in fp32."""
    with torch.device("meta"):
        model = VoVNet(spec, **options)
    return model.to(memory_format=torch.channels_last).train()


def _images(shape: Shape) -> torch.Tensor:
    images = torch.empty(shape[0], 3, *shape[1:], dtype=torch.bfloat16, device="meta")
    return images.to(memory_format=torch.channels_last)


def _backward(features: list[torch.Tensor]) -> None:
    torch.autograd.backward(features, [torch.empty_like(f) for f in features])


def step_launches(model: Any, shape: Shape, *, backward: bool = True) -> list[Launch]:
    """Of a :func:`training_model`, of both passes or of the first.

    Nothing else is recorded, and a model serves many shapes: they are gone through in half
    of the time that :func:`training_step` takes.
    """
    from vovnet_fast.kernels._common import recording

    model.zero_grad()
    images = _images(shape)
    with recording() as found, backends.shapes_only("triton"):
        features = model._run_modules(images)
        if backward:
            _backward(features)
    return found


def training_step(spec: str, shape: Shape, **options: Any) -> Step:
    """Plan forward and backward pass on bf16 images, with parameters in fp32.

    Args:
        spec: an architecture's name.
        shape: N, H, W of the images.
        options: of :class:`vovnet_fast.VoVNet`.
    """
    from vovnet_fast.kernels._common import recording

    ready: list[tuple[nn.Parameter, int]] = []
    model, images = training_model(spec, **options), _images(shape)
    with recording() as found, AtenRecorder() as recorder, backends.shapes_only("triton"):
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: ready.append((parameter, len(found)))
            )
        # Not the model itself, which wants images in the weights' dtype.
        features = model._run_modules(images)
        forward = len(found)
        _backward(features)
    works = [launch_work(launch) for launch in found]
    ready = [(parameter, count - forward) for parameter, count in ready]
    return Step(found, works[:forward], works[forward:], recorder.works, ready)


def moved(works: Iterable[Work]) -> int:
    """Bytes read and written."""
    return sum(work.bytes_read + work.bytes_written for work in works)


def title(spec: str, shape: Shape) -> str:
    """``V-39-eSE 1x800x1344``."""
    return f"{spec} {'x'.join(map(str, shape))}"


def inference(spec: str, shape: Shape) -> Numbers:
    """Of a forward pass in bf16."""
    total = plan_forward(spec, shape).fused.total
    return {
        "launches": total.launches,
        "GFLOP": round(total.flop / 1e9, 3),
        "bytes": total.bytes_moved,
    }


def in_eight_bits(spec: str, shape: Shape, dtype: str) -> Numbers:
    """The same in int8 or fp8."""
    found = quantized_work(spec, shape, formats.require(dtype, None))
    return {
        "launches": len(found),
        "GFLOP": round(sum(work.flop for work in found) / 1e9, 3),
        "bytes": moved(found),
    }


def training(spec: str, shape: Shape, **options: Any) -> Numbers:
    """Of forward and backward pass in bf16 with parameters in fp32."""
    step = training_step(spec, shape, **options)
    return {
        "launches forward": len(step.forward),
        "launches backward": len(step.backward),
        "operations of PyTorch": len(step.aten),
        "bytes forward": moved(step.forward),
        "bytes backward": moved(step.backward),
        "bytes of PyTorch's operations": moved(step.aten),
    }


def memory(spec: str, shape: Shape, norm_eval: bool) -> Numbers:
    """What autograd keeps for the backward pass, in bytes, by mode."""
    rows = training_memory(spec, shape, norm_eval=norm_eval).rows
    return {f"bytes, {row.mode}": row.kept for row in rows if row.mode.startswith("fused")}


def frozen(spec: str) -> Numbers:
    """ATen operations of a frozen network on plain PyTorch, by dtype."""
    model, images = VoVNet(spec).eval(), torch.zeros(1, 3, 64, 64)
    return {
        str(dtype).removeprefix("torch."): operations(
            functools.partial(freeze(model, dtype), images)
        )
        for dtype in (torch.float32, torch.bfloat16)
    }


# --------------------------------------------------------------------------------------
# The convolution for Hopper
# --------------------------------------------------------------------------------------

HOPPER: tuple[str, Shape] = ("V-39-eSE", (1, 800, 1344))
PROCESSORS = 132
"""Of an H100 or H200."""


def hopper() -> dict[str, Numbers]:
    """What the tiles of the hand-written convolution that fetch least take from L2.

    Of layers with stride 1, whose gradients of inputs are such layers too.
    """
    found: dict[str, Numbers] = {}
    for name, layer in layers(*HOPPER).items():
        c_out, kernel, _, c_in = layer.weight
        if layer.stride != 1:
            continue
        n, height, width, _ = layer.out.shape
        size = (1, height * width) if kernel == 1 else (height, width)
        for suffix, channels in (("", (c_in, c_out)), (" input gradient", (c_out, c_in))):
            shape = conv_sm90_tiles.Shape(n, *size, *channels, kernel, layer.pool and not suffix)
            best = max(
                (
                    conv_sm90_tiles.work(config, shape, PROCESSORS)
                    for config in conv_sm90_tiles.configs(shape.c_out, kernel)
                ),
                key=lambda work: work.intensity,
            )
            found[name + suffix] = {"FLOP a byte from L2": round(best.intensity, 1)}
    return found


# --------------------------------------------------------------------------------------
# Kernels that a network needs
# --------------------------------------------------------------------------------------

COMPILED_FOR = "V-99-eSE"
CAMERAS: Shape = (6, 640, 1600)
BATCHES = (1, 2, 4, 8, 16)
IMAGE_SIZES = 24


def image_sizes(number: int = IMAGE_SIZES) -> list[tuple[int, int]]:
    """Heights and widths of a multi-scale training of a detector, always the same.

    As mmdet makes them: of images of any proportion the shorter side becomes 480 to 800
    pixels, in steps of 32, the longer one no more than 1333, and both are padded to 32.
    """
    chance = random.Random(0)
    found: dict[tuple[int, int], None] = {}
    while len(found) < number:
        ratio = chance.uniform(1, 2)
        short = min(chance.randrange(480, 801, 32), 1333 / ratio)
        height, width = (32 * -(-int(side) // 32) for side in (short, short * ratio))
        found[(width, height) if chance.random() < 0.25 else (height, width)] = None
    return list(found)


def compiled(found: Iterable[Launch]) -> set[str]:
    """The different compiled kernels that launches need."""
    from vovnet_fast.kernels._variants import variant

    return {variant(launch).key for launch in found}


def needed() -> dict[str, Numbers]:
    """How many kernels Triton has to compile, at one size and over many of them."""
    model = training_model(COMPILED_FOR)
    sizes = [compiled(step_launches(model, (2, *size))) for size in image_sizes()]
    batches = [
        compiled(step_launches(model, (batch, 320, 800), backward=False)) for batch in BATCHES
    ]
    return {
        f"inference, {title(COMPILED_FOR, CAMERAS)}": {
            "kernels, with all that tuning may try": len(compiled(launches(COMPILED_FOR, CAMERAS)))
        },
        f"training steps, {COMPILED_FOR}, 2 images": {
            "kernels, at most for one size": max(map(len, sizes)),
            f"kernels, {len(sizes)} sizes": len(set().union(*sizes)),
        },
        f"forward pass, {COMPILED_FOR}, 320x800": {
            "kernels, at most for one batch": max(map(len, batches)),
            f"kernels, batches of {', '.join(map(str, BATCHES))}": len(set().union(*batches)),
        },
    }


def count(*, compiling: bool = True) -> Counts:
    """Everything, in sections.

    Args:
        compiling: count what kernels compile to as well. Triton must not interpret.
    """
    found: Counts = {f"kernels for {a}": dict(kernels(a)) for a in HOT} if compiling else {}
    if compiling:
        found["compiled kernels"] = needed()
    found["forward pass"] = {title(*network): inference(*network) for network in NETWORKS}
    found["forward pass in eight bits"] = {
        f"{title(*network)} {dtype}": in_eight_bits(*network, dtype)
        for network in NETWORKS
        for dtype in DTYPES
    }
    for words, norm_eval, networks in (
        ("fixed norms", True, NETWORKS),
        ("norms of the batch", False, NETWORKS[:1]),
    ):
        steps = {title(*each): training(*each, norm_eval=norm_eval) for each in networks}
        kept = {title(*each): memory(*each, norm_eval) for each in networks}
        found |= {f"training step, {words}": steps, f"kept for the backward pass, {words}": kept}
    found["convolution for Hopper"] = hopper()
    found["operations of PyTorch, frozen"] = {spec: frozen(spec) for spec, _ in NETWORKS}
    return found


def versions() -> dict[str, str]:
    """On which sections of :func:`count` depend: see :data:`NEEDS`."""
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__.partition("+")[0]}


NEEDS = {
    "kernels": "triton",
    "compiled kernels": "triton",
    "operations of PyTorch": "torch",
    "training step": "torch",
}
"""What has to be of the same version for a section to be compared, by how its name begins."""


def needs(section: str) -> str | None:
    """The library whose version the numbers of a section are bound to."""
    return next((name for begin, name in NEEDS.items() if section.startswith(begin)), None)


if __name__ == "__main__":
    print(json.dumps(count(), indent=1))
