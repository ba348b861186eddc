"""Compile every Triton kernel in every shipped configuration, without a GPU.

``python -m vovnet_fast.aot --arch sm_90`` prints what each compilation needs: a
configuration that spills, or a main loop that lost its bulk copies, is visible
before any GPU runs it. The tests hold the same rows against limits.

Launch plans are made from meta tensors by the very code that makes them for real
ones, and their arguments are specialised as Triton's launcher does it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .kernels._common import Launch
    from .kernels.conv_config import ConvConfig

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

INSTRUCTIONS = {
    "HGMMA": r"\bHGMMA\b",  # Warpgroup MMA.
    "HGMMA(R)": r"\bHGMMA\S* R\d+, R\d+, gdesc",  # Of these, first operand from registers.
    "UTCHMMA": r"\bUTCHMMA\b",  # MMA of sm_100.
    "HMMA": r"\bHMMA\b",  # Warp MMA.
    "UTMALDG": r"\bUTMALDG\b",  # Bulk copy to shared memory.
    "UTMASTG": r"\bUTMASTG\b",  # Bulk copy from shared memory.
    "LDGSTS": r"\bLDGSTS\b",  # cp.async.
    "LDSM": r"\bLDSM\b",  # Shared memory to registers, for an MMA operand.
    "STL": r"\bSTL\b",  # Store of a spilled register.
    "LDL": r"\bLDL\b",  # Load of a spilled register.
}
"""SASS instructions that are counted, by the pattern that finds them."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile.

    Attributes:
        kernel: name of the operation.
        layer: the representative shape, in words.
        config: name of the configuration.
        launch: what to compile.
        essential: one of the jobs that together show every kernel and configuration once.
    """

    kernel: str
    layer: str
    config: str
    launch: Launch
    essential: bool = True


@dataclass(frozen=True)
class Row:
    """What one compilation needs.

    Attributes:
        kernel, layer, config: as in :class:`Job`.
        arch: ``sm_80`` and so on.
        warps: warps a program.
        registers: registers a thread.
        spilled: bytes of local memory a thread, 0 where nothing spills.
        shared: bytes of shared memory a program.
        ctas: programs that fit on a processor at a time.
        instructions: counts of those of :data:`INSTRUCTIONS` that occur.
        essential: as in :class:`Job`.
        key: as :func:`key` makes it.
    """

    kernel: str
    layer: str
    config: str
    arch: str
    warps: int
    registers: int
    spilled: int
    shared: int
    ctas: int
    instructions: dict[str, int]
    essential: bool
    key: str


def _meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _conv_job(
    config: ConvConfig,
    c_in: int,
    c_out: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    dtype: torch.dtype = torch.float16,
    tf32: bool = False,
    essential: bool = True,
) -> Job:
    """A convolution of a slot of a concat buffer into the next; a 1x1 pools, as in a block."""
    from .kernels import conv

    height, width = 50, 84
    buffer = _meta(2, height, width, c_in + 5 * max(c_out, 16), dtype=dtype)
    x = buffer[..., :c_in] if c_in > 3 else _meta(2, height, width, c_in, dtype=dtype)
    out_size = conv.output_size(height, width, kernel, stride)
    out = _meta(2, *out_size, c_in + 5 * max(c_out, 16), dtype=dtype)[..., c_in : c_in + c_out]
    if c_in == 3:
        out = _meta(2, *out_size, c_out, dtype=dtype)
    weight = _meta(c_out, kernel, kernel, c_in, dtype=dtype)
    vector = _meta(c_out, dtype=torch.float32)
    pool = None
    if kernel == 1:
        tiles = conv.pool_tiles(x, weight, out, stride=stride, tf32=tf32, config=config)
        pool = _meta(2, tiles, c_out, dtype=torch.float32)
    launch = conv.plan(
        x, weight, vector, vector, out,
        stride=stride, pool_partials=pool, tf32=tf32, config=config,
    )  # fmt: skip
    precision = "tf32" if tf32 else str(dtype).removeprefix("torch.")
    layer = f"{c_in}>{c_out} {kernel}x{kernel}/{stride} {precision}"
    return Job("conv", layer, config.name, launch, essential)


_LAYERS: tuple[tuple[int, int, int, int], ...] = (
    # C_in, C_out, kernel, stride: layers of the specs that together meet every configuration.
    (3, 64, 3, 2),
    (64, 64, 3, 1),
    (128, 128, 3, 1),
    (192, 192, 3, 1),
    (160, 160, 3, 1),
    (224, 224, 3, 1),
    (768, 256, 1, 1),
    (1056, 512, 1, 1),
    (80, 80, 3, 1),
    (96, 96, 3, 1),
    (112, 112, 3, 1),
    (64, 128, 3, 2),
    (496, 256, 1, 1),
    (672, 384, 1, 1),
    (1472, 768, 1, 1),
    (1888, 1024, 1, 1),
    (768, 224, 3, 1),
    (512, 192, 3, 1),
    (64, 64, 1, 1),
    (80, 80, 1, 1),
)


def _bulk_copies(channels: int, stride: int, tf32: bool) -> bool:
    """Whether they can fetch a layer's input."""
    from .kernels.conv_tma import ROUNDS_TO_TF32

    return stride == 1 and channels >= 16 and (ROUNDS_TO_TF32 or not tf32)


def _conv_jobs(capability: tuple[int, int]) -> Iterator[Job]:
    from .kernels.conv_config import candidates

    halves = (torch.float16, torch.bfloat16)
    variants = [(dtype, False) for dtype in halves] + [(torch.float32, t) for t in (True, False)]
    seen = set()
    for dtype, tf32 in variants:
        for c_in, c_out, kernel, stride in _LAYERS:
            tma = _bulk_copies(c_in, stride, tf32)
            for config in candidates(
                capability, c_in, c_out, kernel=kernel, dtype=dtype, tf32=tf32, tma=tma
            ):
                # The two half precisions compile to the same code but for the type.
                key = (config, kernel, dtype.itemsize, tf32)
                yield _conv_job(
                    config, c_in, c_out,
                    kernel=kernel, stride=stride, dtype=dtype, tf32=tf32,
                    essential=key not in seen,
                )  # fmt: skip
                seen.add(key)


def _statistics_launch(
    config: ConvConfig, layer: tuple[int, int, int, int], dtype: torch.dtype, tf32: bool
) -> Launch:
    """A raw convolution and its statistics, from a slot."""
    from .kernels import conv

    c_in, c_out, kernel, stride = layer
    channels = c_in if c_in == 3 else c_in + 5 * max(c_out, 16)
    x = _meta(2, 50, 84, channels, dtype=dtype)[..., :c_in]
    out = _meta(2, *conv.output_size(50, 84, kernel, stride), c_out, dtype=dtype)
    weight = _meta(c_out, kernel, kernel, c_in, dtype=dtype)
    options: dict[str, Any] = dict(stride=stride, tf32=tf32, config=config)
    tiles = conv.pool_tiles(x, weight, out, **options)
    statistics = _meta(2, tiles, 3, c_out, dtype=torch.float32)
    return conv.plan(x, weight, None, None, out, relu=False, statistics=statistics, **options)


def _input_grad_launch(
    config: ConvConfig,
    layer: tuple[int, int, int, int],
    dtype: torch.dtype,
    tf32: bool,
    *,
    channels: int,
) -> Launch:
    """The gradient of a layer's input, in its slot, added to and masked in so many channels."""
    from .kernels import conv

    c_in, c_out, kernel, stride = layer
    small = conv.output_size(50, 84, kernel, stride)
    g = _meta(2, *small, c_out + 16, dtype=dtype)[..., :c_out]
    slots = _meta(2, 50, 84, c_in + 5 * c_out, dtype=dtype)
    out = slots[..., :c_in]
    add, mask = (out[..., :channels], out[..., -channels:]) if channels else (None, None)
    packed = _meta(c_in, kernel, kernel, c_out, dtype=dtype)
    return conv.plan_input_grad(
        g, packed, out, stride=stride, add=add, mask=mask, tf32=tf32, config=config
    )


_ADDED_AND_MASKED: dict[str, tuple[tuple[str, Callable[[int], int]], ...]] = {
    # Of a number of channels, those that an input gradient is added to and masked in.
    "gradient": (("", lambda channels: channels), (", half", lambda channels: channels // 2)),
    "forward": ((", none", lambda channels: 0),),
}


def _conv_training_jobs(capability: tuple[int, int]) -> Iterator[Job]:
    """Statistics, and input gradients with and without ``add`` and ``mask``.

    Their loops are those of :func:`_conv_jobs`, and only their epilogues are new: of
    configurations that differ in anything but their accumulators one is essential.
    """
    from .kernels.conv_config import Kind, candidates

    variants = ((torch.float16, False), (torch.float32, True), (torch.float32, False))
    kinds: tuple[Kind, ...] = ("statistics", "gradient", "forward")
    seen = set()
    for dtype, tf32 in variants:
        precision = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        for layer, kind in itertools.product(_LAYERS, kinds):
            c_in, c_out, kernel, stride = layer
            # A product of the gradient of the output is as wide as the input.
            k, width = (c_in, c_out) if kind == "statistics" else (c_out, c_in)
            if width == 3:  # Nobody asks for the gradient of an image.
                continue
            text = f"{k}>{width} {kernel}x{kernel}/{stride} {precision}"
            for config in candidates(
                capability, k, width,
                kernel=kernel, dtype=dtype, tf32=tf32, tma=_bulk_copies(k, stride, tf32),
                kind=kind,
            ):  # fmt: skip
                arguments = (config, layer, dtype, tf32)
                accumulators = (config.form, config.pixels, config.block_out, config.persistent)
                key = (kind, stride, *accumulators)
                essential = key not in seen and kind != "forward"
                seen.add(key)
                if kind == "statistics":
                    launch = _statistics_launch(*arguments)
                    yield Job("conv statistics", text, config.name, launch, essential)
                    continue
                for note, channels in _ADDED_AND_MASKED[kind]:
                    launch = _input_grad_launch(*arguments, channels=channels(c_in))
                    kept = essential and not note
                    yield Job("conv input gradient", text + note, config.name, launch, kept)


def _conv_weight_grad_jobs(capability: tuple[int, int]) -> Iterator[Job]:
    """Main passes of weight gradients, from slots.

    In fp32 configurations that differ in their output channels only count as one.
    """
    from .kernels import conv, conv_weight_grad

    variants = ((torch.float16, False), (torch.float32, True), (torch.float32, False))
    seen = set()
    for (dtype, tf32), layer in itertools.product(variants, _LAYERS):
        c_in, c_out, kernel, stride = layer
        precision = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        channels = c_in if c_in == 3 else c_in + 5 * c_out
        x = _meta(2, 50, 84, channels, dtype=dtype)[..., :c_in]
        size = conv.output_size(50, 84, kernel, stride)
        g = _meta(2, *size, 5 * c_out, dtype=dtype)[..., :c_out]
        options: dict[str, Any] = dict(stride=stride, tf32=tf32, capability=capability)
        for config in conv_weight_grad.choices(x, g, kernel, **options)[0]:
            launch, _, _ = conv_weight_grad.plan(
                x, g, kernel, stride=stride, tf32=tf32, config=config
            )
            text = f"{c_in}>{c_out} {kernel}x{kernel}/{stride} {precision}"
            tiles = config if dtype.itemsize == 2 else (config.columns, config.pixels)
            key = (tiles, dtype, tf32)
            yield Job("conv weight gradient", text, config.name, launch, key not in seen)
            seen.add(key)


def _elementwise_jobs() -> Iterator[Job]:
    from .kernels import accumulate, depthwise, epilogue, ese, max_pool, pack

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for channels in (112, 56, 64, 160, 256):
            essential = dtype == torch.float16 and channels == 112

            def job(kernel, launch, config, width=channels, kind=kind, essential=essential):
                return Job(kernel, f"{width} {kind}", config, launch, essential)

            z, slot = (
                _meta(2, 50, 84, channels, dtype=dtype),
                _meta(2, 50, 84, 5 * channels, dtype=dtype)[..., :channels],
            )
            small = _meta(2, 25, 42, 5 * channels, dtype=dtype)[..., :channels]
            vector = _meta(channels, dtype=torch.float32)
            gates = _meta(2, channels, dtype=torch.float32)
            pool = _meta(2, epilogue.pool_tiles(z), channels, dtype=torch.float32)
            launch = epilogue.plan(z, vector, vector, slot, pool_partials=pool)
            yield job("epilogue", launch, "pool")
            yield job("epilogue", epilogue.plan(z, vector, vector, slot), "")
            parts = _meta(2, epilogue.pool_tiles(z), 3, channels, dtype=torch.float32)
            for name, target in (("statistics", slot), ("statistics, in place", z)):
                launch = epilogue.plan(z, None, None, target, relu=False, statistics=parts)
                yield job("epilogue", launch, name)
            yield job("accumulate", accumulate.plan(z, slot, slot, slot), "add, mask")
            yield job("accumulate", accumulate.plan(z, slot), "")
            weight = _meta(channels, 3, 3, channels, dtype=torch.float32)
            packed = _meta(channels, 3, 3, channels, dtype=dtype)
            yield job("pack", pack.plan_transposed(weight, vector, packed), "scale")
            yield job("ese apply", ese.plan_apply(z, gates, slot, slot), "identity")
            yield job("ese apply", ese.plan_apply(z, gates, None, slot), "")
            yield job("ese apply", ese.plan_apply(z, None, slot, slot), "identity, no gate")
            fc = _meta(channels, channels, dtype=dtype)
            bias = _meta(channels, dtype=dtype)
            for gate in ("hard_sigmoid", "sigmoid"):
                finish, gated = ese.plan_gates(pool, 4200, fc, bias, gate, gates, gates)
                yield job("ese gates", gated, gate)
            yield job("ese pool", finish, "")
            argmax = _meta(2, 25, 42, channels, dtype=torch.uint8)
            yield job("max pool", max_pool.plan(slot, small, "ceil"), "ceil")
            yield job("max pool", max_pool.plan(slot, small, "padded", argmax), "padded argmax")
            taps = _meta(3, 3, channels, dtype=dtype)
            yield job("depthwise", depthwise.plan(z, taps, slot), "stride 1")
            yield job("depthwise", depthwise.plan(z, taps, small, stride=2), "stride 2")


def _backward_jobs() -> Iterator[Job]:
    """The gradients of what :func:`_elementwise_jobs` compiles, and batch norm."""
    from .kernels import (
        batch_norm,
        batch_norm_backward,
        conv_weight_grad_finish,
        depthwise,
        ese_backward,
        max_pool,
    )

    float32, float64 = torch.float32, torch.float64
    for dtype in (torch.float16, torch.bfloat16, float32):
        kind = str(dtype).removeprefix("torch.")
        for channels in (112, 56, 64, 160, 256):
            essential = dtype == torch.float16 and channels == 112

            def job(kernel, launch, config, width=channels, kind=kind, essential=essential):
                return Job(kernel, f"{width} {kind}", config, launch, essential)

            z = _meta(2, 50, 84, channels, dtype=dtype)
            slot = _meta(2, 50, 84, 5 * channels, dtype=dtype)[..., :channels]
            dout = _meta(2, 25, 42, channels, dtype=dtype)
            gates, vector = _meta(2, channels, dtype=float32), _meta(channels, dtype=float32)
            fc = _meta(channels, channels, dtype=dtype)
            dfc = _meta(channels, channels, dtype=float32)
            yield job("ese backward", ese_backward.plan_gate_sums(slot, z, gates)[0], "gate sums")
            for gate in ("hard_sigmoid", "sigmoid"):
                inputs, weights = ese_backward.plan_gates_backward(
                    gates, gates, gates, 4200, fc, gate, gates, dfc, vector
                )
                yield job("ese backward", inputs, f"fc input {gate}")
                yield job("ese backward", weights, f"fc weight {gate}")
            gated = ese_backward.plan_apply_backward(slot, gates, gates, z, z)
            yield job("ese backward", gated, "apply")
            masked = ese_backward.plan_apply_backward(slot, None, None, z, z)
            yield job("ese backward", masked, "mask")
            argmax = _meta(2, 25, 42, channels, dtype=torch.uint8)
            for mode in ("ceil", "padded"):
                launch = max_pool.plan_backward(dout, argmax, slot, mode)
                yield job("max pool backward", launch, mode)
            partials = _meta(4000, 3, channels, dtype=float32)
            groups = _meta(30, 3, channels, dtype=float64)
            norm, sums = _meta(6, channels, dtype=float32), _meta(2, channels, dtype=float32)
            yield job("batch norm", batch_norm.plan_merge(partials, groups), "merge")
            last = batch_norm.plan_finish(groups, vector, vector, 1e-5, norm)
            yield job("batch norm", last, "finish")
            launch, last = batch_norm_backward.plan_backward_sums(slot, z, norm, sums)
            yield job("batch norm", launch, "gradient sums")
            yield job("batch norm", last, "last sums")
            launch = batch_norm_backward.plan_input_grad(slot, z, norm, sums, vector, slot)
            yield job("batch norm", launch, "input gradient")
            taps, dtaps = _meta(3, 3, channels, dtype=dtype), _meta(3, 3, channels, dtype=float32)
            for stride, g in ((1, z), (2, dout)):
                options: dict[str, Any] = dict(stride=stride)
                launch = depthwise.plan_input_grad(g, taps, slot, add=slot, mask=slot, **options)
                yield job("depthwise backward", launch, f"input, stride {stride}")
                launch, _ = depthwise.plan_weight_grad(slot, g, dtaps, **options)
                yield job("depthwise backward", launch, f"weight, stride {stride}")
            launch, sums = conv_weight_grad_finish.plan_channel_sums(slot)
            yield job("channel sums", launch, "")
            weight = _meta(channels, 3, 3, channels, dtype=dtype)
            dweight = _meta(channels, 3, 3, channels, dtype=float32)
            for library, products in (
                ("", _meta(28, 3, 3, channels, channels, dtype=float32).permute(0, 4, 1, 2, 3)),
                (" of another library", weight.unsqueeze(0)),
            ):
                launch, _ = conv_weight_grad_finish.plan_finish(
                    products, sums, weight, vector, dweight, vector, vector
                )
                yield job("finish weight gradient", launch, f"products{library}")


def capability(arch: str) -> tuple[int, int]:
    """``(9, 0)`` for ``sm_90``."""
    number = int(arch.removeprefix("sm_"))
    return number // 10, number % 10


def conv_jobs(arch: str) -> Iterator[Job]:
    """The convolutions of :func:`jobs`."""
    number = capability(arch)
    yield from _conv_jobs(number)
    yield from _conv_training_jobs(number)
    yield from _conv_weight_grad_jobs(number)


def jobs(arch: str) -> list[Job]:
    """Everything that is shipped for ``arch``, over the layers of the published networks."""
    return [*conv_jobs(arch), *_elementwise_jobs(), *_backward_jobs()]


def compile_launch(launch: Launch, arch: str) -> Any:
    """Compile one launch plan for ``arch``; returns Triton's compiled kernel.

    Raises:
        RuntimeError: the process runs Triton's interpreter.
    """
    from .kernels._variants import variant

    return variant(launch).compile(arch)


def key(job: Job, arch: str) -> str:
    """The same for jobs that compile to the same: source, specialisation, compiler."""
    import triton

    from .kernels._variants import variant

    needed = variant(job.launch)
    parts = (triton.__version__, arch, needed.kernel.cache_key, needed.key)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _tool(name: str, *arguments: str) -> str:
    """Run one of the CUDA tools that come with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@contextlib.contextmanager
def _file(cubin: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        yield file.name


def _usage(name: str) -> tuple[int, int]:
    """Registers and bytes of stack a thread of a compiled kernel in a file."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", name))
    assert usage is not None, "cuobjdump printed no resource usage"
    return int(usage[1]), int(usage[2])


def disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers a thread, bytes of stack a thread, and SASS of a compiled kernel."""
    with _file(cubin) as name:
        return *_usage(name), _tool("nvdisasm", "-c", name)


def resources(job: Job, arch: str) -> tuple[int, int, int]:
    """Compile ``job``: registers and bytes spilled of a thread, bytes of shared memory."""
    compiled = compile_launch(job.launch, arch)
    with _file(compiled.asm["cubin"]) as name:
        return *_usage(name), compiled.metadata.shared


def _count(sass: str) -> dict[str, int]:
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTIONS.items()}
    return {name: count for name, count in counts.items() if count}


def compile_job(job: Job, arch: str) -> Row:
    """Compile ``job`` for ``arch`` and read what it needs."""
    return examine(job, arch)[0]


def examine(job: Job, arch: str) -> tuple[Row, str]:
    """Compile ``job`` for ``arch``; returns what it needs, and its SASS."""
    from .kernels.resources import Resources

    compiled = compile_launch(job.launch, arch)
    registers, spilled, sass = disassemble(compiled.asm["cubin"])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    resident = Resources(warps, registers, shared).resident(capability(arch))
    row = Row(
        job.kernel, job.layer, job.config,
        arch, warps, registers, spilled, shared, resident, _count(sass), job.essential,
        key(job, arch),
    )  # fmt: skip
    return row, sass


def rows(
    arch: str, *, all_layers: bool = False, known: Mapping[str, Row] | None = None
) -> Iterator[Row]:
    """Compile what is shipped for ``arch``, one by one.

    Args:
        arch: one of :data:`ARCHITECTURES`.
        all_layers: every layer and dtype in every configuration. Otherwise every
            kernel in every configuration, with one layer each.
        known: rows by key, of what need not be compiled.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    for job in jobs(arch):
        if job.essential or all_layers:
            yield look_up(job, arch, known or {})


def look_up(job: Job, arch: str, known: Mapping[str, Row]) -> Row:
    """What ``job`` compiles to: compiled, if no known row is of the same key."""
    found = known.get(key(job, arch))
    if found is None:
        return compile_job(job, arch)
    return dataclasses.replace(
        found, kernel=job.kernel, layer=job.layer, config=job.config, essential=job.essential
    )


def read(file: Path) -> dict[str, Row]:
    """The rows that ``--json`` printed, by key.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is no row.
    """
    found = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = Row(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}, line {number}, is no row of --json: {error}") from error
        found[row.key] = row
    return found


def _print_table(table: Iterable[Row], arch: str) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table(title=f"Triton kernels for {arch}")
    for heading in ("kernel", "layer", "configuration"):
        view.add_column(heading, no_wrap=True)
    for heading in ("warps", "registers", "spilled B", "shared B", "CTAs/SM"):
        view.add_column(heading, justify="right")
    view.add_column("instructions")
    for row in table:
        numbers = (row.warps, row.registers, row.spilled, row.shared, row.ctas)
        counts = " ".join(f"{name}:{count}" for name, count in row.instructions.items())
        view.add_row(row.kernel, row.layer, row.config, *map(str, numbers), counts)
    # A pipe has no width to fit into.
    Console(width=None if sys.stdout.isatty() else 200).print(view)


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python -m vovnet_fast.aot``."""
    parser = argparse.ArgumentParser(
        prog="python -m vovnet_fast.aot", description="Compile the Triton kernels without a GPU."
    )
    parser.add_argument("--arch", choices=ARCHITECTURES, default="sm_90")
    parser.add_argument("--all", action="store_true", help="every layer and dtype, not one each")
    parser.add_argument("--json", action="store_true", help="print JSON, one row a line")
    parser.add_argument(
        "--known", metavar="FILE", type=Path,
        help="rows of an earlier --json: what they are of is not compiled again",
    )  # fmt: skip
    parser.add_argument(
        "--resources", action="store_true", help="write the tables that choices are made from"
    )
    options = parser.parse_args(arguments)
    if options.resources:
        from . import aot_resources
        from .kernels.resources import FOLDER

        for file in aot_resources.write(FOLDER):
            print(file)
        return 0
    known = None
    if options.known is not None:
        try:
            known = read(options.known)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    table = rows(options.arch, all_layers=options.all, known=known)
    if options.json:
        for row in table:
            print(json.dumps(dataclasses.asdict(row)), flush=True)
    else:
        _print_table(table, options.arch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
