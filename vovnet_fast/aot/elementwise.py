"""What is to be compiled beside the convolutions, over a few numbers of channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .job import Job, meta


def elementwise_jobs() -> Iterator[Job]:
    from ..kernels import accumulate, depthwise, epilogue, ese, max_pool, pack

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for channels in (112, 56, 64, 160, 256):
            essential = dtype == torch.float16 and channels == 112

            def job(kernel, launch, config, width=channels, kind=kind, essential=essential):
                return Job(kernel, f"{width} {kind}", config, launch, essential)

            z, slot = (
                meta(2, 50, 84, channels, dtype=dtype),
                meta(2, 50, 84, 5 * channels, dtype=dtype)[..., :channels],
            )
            small = meta(2, 25, 42, 5 * channels, dtype=dtype)[..., :channels]
            vector = meta(channels, dtype=torch.float32)
            gates = meta(2, channels, dtype=torch.float32)
            pool = meta(2, epilogue.pool_tiles(z), channels, dtype=torch.float32)
            launch = epilogue.plan(z, vector, vector, slot, pool_partials=pool)
            yield job("epilogue", launch, "pool")
            yield job("epilogue", epilogue.plan(z, vector, vector, slot), "")
            parts = meta(2, epilogue.pool_tiles(z), 3, channels, dtype=torch.float32)
            for name, target in (("statistics", slot), ("statistics, in place", z)):
                launch = epilogue.plan(z, None, None, target, relu=False, statistics=parts)
                yield job("epilogue", launch, name)
            yield job("accumulate", accumulate.plan(z, slot, slot, slot), "add, mask")
            yield job("accumulate", accumulate.plan(z, slot), "")
            weight = meta(channels, 3, 3, channels, dtype=torch.float32)
            packed = meta(channels, 3, 3, channels, dtype=dtype)
            yield job("pack", pack.plan_transposed(weight, vector, packed), "scale")
            yield job("ese apply", ese.plan_apply(z, gates, slot, slot), "identity")
            yield job("ese apply", ese.plan_apply(z, gates, None, slot), "")
            yield job("ese apply", ese.plan_apply(z, None, slot, slot), "identity, no gate")
            fc = meta(channels, channels, dtype=dtype)
            bias = meta(channels, dtype=dtype)
            for gate in ("hard_sigmoid", "sigmoid"):
                finish, gated = ese.plan_gates(pool, 4200, fc, bias, gate, gates, gates)
                yield job("ese gates", gated, gate)
            yield job("ese pool", finish, "")
            argmax = meta(2, 25, 42, channels, dtype=torch.uint8)
            yield job("max pool", max_pool.plan(slot, small, "ceil"), "ceil")
            yield job("max pool", max_pool.plan(slot, small, "padded", argmax), "padded argmax")
            taps = meta(3, 3, channels, dtype=dtype)
            yield job("depthwise", depthwise.plan(z, taps, slot), "stride 1")
            yield job("depthwise", depthwise.plan(z, taps, small, stride=2), "stride 2")


def backward_jobs() -> Iterator[Job]:
    """The gradients of what :func:`elementwise_jobs` compiles, and batch norm."""
    from ..kernels import (
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

            z = meta(2, 50, 84, channels, dtype=dtype)
            slot = meta(2, 50, 84, 5 * channels, dtype=dtype)[..., :channels]
            dout = meta(2, 25, 42, channels, dtype=dtype)
            gates, vector = meta(2, channels, dtype=float32), meta(channels, dtype=float32)
            fc = meta(channels, channels, dtype=dtype)
            dfc = meta(channels, channels, dtype=float32)
            yield job("ese backward", ese_backward.plan_gate_sums(slot, z, gates)[0], "gate sums")
            for gate in ("hard_sigmoid", "sigmoid"):
                inputs, weights = ese_backward.plan_gates_backward(
                    gates, gates, gates, 4200, fc, gate, gates, dfc, vector
                )
                yield job("ese backward", inputs, f"fc input {gate}")
                yield job("ese backward", weights, f"fc weight {gate}")
            gated = ese_backward.plan_apply_backward(slot, gates, gates, z, z)
            yield job("ese backward", gated, "apply")
            yield job(
                "ese backward", ese_backward.plan_apply_backward(slot, None, None, z, z), "mask"
            )
            argmax = meta(2, 25, 42, channels, dtype=torch.uint8)
            for mode in ("ceil", "padded"):
                launch = max_pool.plan_backward(dout, argmax, slot, mode)
                yield job("max pool backward", launch, mode)
            partials = meta(4000, 3, channels, dtype=float32)
            groups = meta(30, 3, channels, dtype=float64)
            norm, sums = meta(6, channels, dtype=float32), meta(2, channels, dtype=float32)
            yield job("batch norm", batch_norm.plan_merge(partials, groups), "merge")
            last = batch_norm.plan_finish(groups, vector, vector, 1e-5, norm)
            yield job("batch norm", last, "finish")
            launch, last = batch_norm_backward.plan_backward_sums(slot, z, norm, sums)
            yield job("batch norm", launch, "gradient sums")
            yield job("batch norm", last, "last sums")
            launch = batch_norm_backward.plan_input_grad(slot, z, norm, sums, vector, slot)
            yield job("batch norm", launch, "input gradient")
            taps, dtaps = meta(3, 3, channels, dtype=dtype), meta(3, 3, channels, dtype=float32)
            for stride, g in ((1, z), (2, dout)):
                options: dict[str, Any] = dict(stride=stride)
                launch = depthwise.plan_input_grad(g, taps, slot, add=slot, mask=slot, **options)
                yield job("depthwise backward", launch, f"input, stride {stride}")
                launch, _ = depthwise.plan_weight_grad(slot, g, dtaps, **options)
                yield job("depthwise backward", launch, f"weight, stride {stride}")
            launch, sums = conv_weight_grad_finish.plan_channel_sums(slot)
            yield job("channel sums", launch, "")
            weight = meta(channels, 3, 3, channels, dtype=dtype)
            dweight = meta(channels, 3, 3, channels, dtype=float32)
            for library, products in (
                ("", meta(28, 3, 3, channels, channels, dtype=float32).permute(0, 4, 1, 2, 3)),
                (" of another library", weight.unsqueeze(0)),
            ):
                launch, _ = conv_weight_grad_finish.plan_finish(
                    products, sums, weight, vector, dweight, vector, vector
                )
                yield job("finish weight gradient", launch, f"products{library}")
