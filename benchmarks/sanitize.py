"""Launch every kernel, and whole networks, once: what compute-sanitizer watches.

``compute-sanitizer python -m benchmarks.sanitize``, with ``--few`` in a minute. Sizes are small
and odd, so that every tile hangs over an edge. Nothing is measured and no result is compared: the
tests do that. Without a GPU it runs in Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vovnet_fast import VoVNet, backends, specs
from vovnet_fast.arithmetic import DTYPES, LEVELS, fp8, int8
from vovnet_fast.arithmetic.layers import (
    QuantizedConv,
    QuantizedDepthwise,
    QuantizedGate,
    QuantizedSum,
)
from vovnet_fast.backends import cudnn_graph, eight_bits
from vovnet_fast.backends import triton as backend
from vovnet_fast.backends.triton import eight_bits as in_eight_bits
from vovnet_fast.kernels import accumulate, conv, conv_weight_grad, max_pool
from vovnet_fast.kernels._common import Launch, recording
from vovnet_fast.network.model import STAGE_NAMES
from vovnet_fast.ops.features import run as run_network
from vovnet_fast.quantization import formats, layout
from vovnet_fast.quantization.running import run as run_quantized
from vovnet_fast.specs import Gate

LAYERS = ((3, 64, 3, 2), (64, 80, 3, 1), (64, 192, 3, 1), (80, 128, 1, 1), (64, 128, 3, 2))
"""C_in, C_out, kernel, stride: with every form of the convolution among their choices."""


def _some(found: Iterable[Any], few: bool) -> list[Any]:
    """All of the configurations, or the smallest of each form."""
    configs = list(found)
    return list({config.form: config for config in configs}.values()) if few else configs


def _convolutions(device: torch.device, dtype: torch.dtype, few: bool = False) -> None:
    """Every configuration that can take these layers, with a pool and without."""
    for c_in, c_out, kernel, stride in LAYERS:
        size = [conv.output_size(19, 37, kernel, stride)[axis] for axis in (0, 1)]
        x = torch.zeros(2, 19, 37, c_in, dtype=dtype, device=device)
        weight = torch.zeros(c_out, kernel, kernel, c_in, dtype=dtype, device=device)
        scale, shift = torch.ones(2, c_out, device=device)
        out = torch.zeros(2, *size, c_out, dtype=dtype, device=device)
        for config in _some(conv.choices(x, weight, out, stride=stride)[0], few):
            for pool in (False, True) if kernel == 1 else (False,):
                backend.run_engine(
                    config.name, x, weight, scale, shift, out, stride=stride, relu=True, pool=pool
                )


def _gradients(device: torch.device, dtype: torch.dtype, few: bool = False) -> None:
    """The same for the convolutions of a backward pass, and those that leave statistics."""
    for c_in, c_out, kernel, stride in LAYERS:
        options = dict(stride=stride)
        size = [conv.output_size(19, 37, kernel, stride)[axis] for axis in (0, 1)]
        x = torch.zeros(2, 19, 37, c_in, dtype=dtype, device=device)
        g = torch.zeros(2, *size, c_out, dtype=dtype, device=device)
        weight = torch.zeros(c_out, kernel, kernel, c_in, dtype=dtype, device=device)
        packed = torch.zeros(c_in, kernel, kernel, c_out, dtype=dtype, device=device)
        scale = torch.ones(c_out, device=device)
        for config in _some(conv.choices(x, weight, g, statistics=True, **options)[0], few):
            backend.run_statistics_engine(config.name, x, weight, g, **options)
        for config in _some(conv_weight_grad.choices(x, g, kernel, **options)[0], few):
            backend.run_weight_grad_engine(config.name, x, g, weight, scale, **options)
        for views in (dict(add=None, mask=None), dict(add=x, mask=torch.ones_like(x))):
            found = conv.input_grad_choices(g, packed, x, **views, **options)[0]
            for config in _some(found, few):
                backend.run_input_grad_engine(config.name, g, packed, x, **views, **options)


def _others(device: torch.device, dtype: torch.dtype) -> None:
    """Everything but convolutions, on a width that fills no block of channels."""
    x = torch.zeros(2, 9, 13, 56, dtype=dtype, device=device)
    out, small = torch.zeros_like(x), torch.zeros(2, 5, 7, 56, dtype=dtype, device=device)
    one = torch.ones(56, device=device)
    weight, fc = torch.zeros(56, 1, 1, 56, dtype=dtype, device=device), one.new_zeros(56, 56)
    partials = backend.run_engine(
        backend.ATEN, x, weight, one, one, out, stride=1, relu=True, pool=True
    )
    assert partials is not None
    for kind in ("hard_sigmoid", "sigmoid"):
        gates, _ = backend.gates(partials, 9 * 13, fc, one, kind)
        backend.apply_gates(x, gates, x, out)
    taps = torch.zeros(3, 3, 56, dtype=dtype, device=device)
    for stride, into in ((1, out), (2, small)):
        backend.depthwise(x, taps, into, stride=stride)
    argmax = torch.zeros(small.shape, dtype=torch.uint8, device=device)
    max_pool.max_pool(x, small, "padded", argmax)
    max_pool.max_pool(x, small[:, :4, :6], "ceil")
    accumulate.accumulate(x, out, out, x)


def _network(device: torch.device, dtype: torch.dtype) -> None:
    """The network whose blocks have everything: depthwise layers, a reduction, an identity."""
    with torch.device(device):
        model = VoVNet("V-19-slim-dw-eSE").to(dtype).eval()
    view = torch.zeros(1, 72, 104, 3, dtype=dtype, device=device)
    run_network(backend, view, model.fold(dtype), model.out_features)


def _training(device: torch.device, dtype: torch.dtype) -> None:
    """A training step of it, with fixed statistics and with those of the batch."""
    on_gpu = device.type == "cuda"
    for norm_eval in (True, False):
        with torch.device(device):
            model = VoVNet("V-19-slim-dw-eSE", norm_eval=norm_eval).to(dtype).train()
        image = torch.zeros(2, 3, 72, 104, dtype=dtype, device=device)
        path = backends.use_backend if on_gpu else backends.shapes_only
        with path("triton"), torch.enable_grad():
            features = model(image)
            torch.autograd.backward(features, [torch.zeros_like(f) for f in features])


# --------------------------------------------------------------------------------------
# Eight bits
# --------------------------------------------------------------------------------------


def _formats(device: torch.device) -> list[str]:
    """Those that the device multiplies; of the others it is said why not."""
    reasons = {form: eight_bits.find("triton", device, form, ())[1] for form in DTYPES}
    for form, reason in reasons.items():
        if reason is not None and device.type != "meta":
            print(f"{form} is not launched: {reason}")
    return [form for form in DTYPES if reasons[form] is None or device.type == "meta"]


def _quantized(
    ops: ModuleType, device: torch.device, layer: tuple[int, int, int, int], wide: bool
) -> QuantizedConv:
    """A convolution of zeros."""
    c_in, c_out, kernel, stride = layer
    whole = ops.ACTIVATION == int8.ACTIVATION
    dtype = torch.int8 if whole else ops.ACTIVATION
    if wide:
        dtype = ops.image_dtype(True)
    weight = torch.zeros(c_out, kernel, kernel, c_in, dtype=dtype, device=device)
    bias = torch.zeros(c_out, dtype=torch.int32 if whole else torch.float32, device=device)
    scale = torch.ones(c_out, device=device)
    return QuantizedConv(
        weight, bias, scale, scale, stride, None, scale.new_ones(c_in), None, 1.0
    )  # fmt: skip


def _convolutions_in_eight_bits(device: torch.device, form: str, few: bool) -> None:
    """Every engine that is on offer for these layers, but cuDNN's: into a slot, a feature, or both
    with a pool; of all numbers of levels, and of a wide stem."""
    ops = _ops(form)
    for layer in LAYERS:
        c_in, c_out, kernel, stride = layer
        size = conv.output_size(19, 37, kernel, stride)
        slots = torch.zeros(2, *size, 2 * c_out, dtype=ops.ACTIVATION, device=device)
        features = torch.zeros(2, *size, c_out, device=device)
        for wide in (False, True) if c_in == 3 else (False,):
            dtype = ops.image_dtype(wide) if c_in == 3 else ops.ACTIVATION
            x = torch.zeros(2, 19, 37, c_in, dtype=dtype, device=device)
            quantized = _quantized(ops, device, layer, wide)
            for levels in LEVELS if form == "int8" else (fp8.LARGEST,):
                for out, feature in (
                    (slots[..., c_out:], None), (None, features), (slots[..., c_out:], features)
                ):  # fmt: skip
                    options: dict[str, Any] = dict(
                        levels=levels, feature=feature, pool=kernel == 1 and out is not None
                    )
                    found = in_eight_bits.engines(x, quantized, out, **options)
                    for engine in _few_of_each(found) if few else found:
                        if not engine.startswith(cudnn_graph.NAME):
                            in_eight_bits.run_engine(engine, x, quantized, out, **options)


def _few_of_each(engines: Iterable[str]) -> list[str]:
    """The last of each kind, by how names begin: of Triton's forms the smallest tiles."""
    return list({engine.partition("-")[0]: engine for engine in engines}.values())


def _others_in_eight_bits(device: torch.device, form: str) -> None:
    """Everything but convolutions, on a width that fills no block of channels."""
    ops, whole = _ops(form), form == "int8"
    levels, sums = (127, torch.int32) if whole else (fp8.LARGEST, torch.float32)
    images = torch.zeros(2, 3, 9, 13, device=device).permute(0, 2, 3, 1)
    for wide in (False, True):
        rounded = torch.zeros(2, 9, 13, 3, dtype=ops.image_dtype(wide), device=device)
        ops.quantize_image(images, 1.0, rounded, wide=wide)
    x = torch.zeros(2, 9, 13, 56, dtype=ops.ACTIVATION, device=device)
    out, small = torch.zeros_like(x), x.new_zeros(2, 5, 7, 56)
    one = torch.ones(56, device=device)
    taps = torch.zeros(3, 3, 56, dtype=torch.int8 if whole else ops.ACTIVATION, device=device)
    spatial = QuantizedDepthwise(taps, one, one.to(torch.uint8), one, one)
    for stride, into in ((1, out), (2, small)):
        ops.depthwise(x, spatial, into, levels=levels, stride=stride)
    ops.max_pool(x, small, "padded")
    ops.max_pool(x, small[:, :4, :6], "ceil")
    weight = torch.zeros(56, 56, dtype=torch.int16 if whole else torch.float32, device=device)
    table = torch.zeros(int8.TABLE, dtype=torch.int32, device=device) if whole else None
    partials = torch.zeros(2, 3, 56, dtype=sums, device=device)
    kinds: tuple[tuple[Gate, Tensor | None], ...] = (("hard_sigmoid", None), ("sigmoid", table))
    for kind, looked_up in kinds:
        gate = QuantizedGate(weight, one.to(sums), one, 1, 1.0, kind, looked_up)
        gates = ops.gates(partials, 9 * 13, gate)
    factors, feature = QuantizedSum(1, 1, 0, 1.0), torch.zeros(2, 9, 13, 56, device=device)
    for given, written in (((gates, x), (out, None)), ((None, x), (None, feature)),
                           ((gates, None), (out, feature))):  # fmt: skip
        ops.apply_gates(x, *given, factors, written[0], levels=levels, feature=written[1])


def _network_in_eight_bits(device: torch.device, form: str) -> None:
    """The network that :func:`_network` runs."""
    kind = formats.require(form, None)
    spec = specs.get("V-19-slim-dw-eSE")
    network = layout.blank(layout.Architecture(spec, kind, STAGE_NAMES, 3), device)
    run_quantized(_ops(form), torch.zeros(1, 72, 104, 3, device=device), network)


def _ops(form: str) -> ModuleType:
    """Triton's."""
    return importlib.import_module(f"{backend.__name__}.{form}")


def launches(*, few: bool = False) -> list[Launch]:
    """What :func:`main` launches on a GPU, for compiling it beforehand."""
    meta = torch.device("meta")
    with recording() as found, torch.no_grad():
        _others(meta, torch.float16)
        for part in (_convolutions, _gradients):
            part(meta, torch.float16, few)
        for part in () if few else (_network, _training):
            part(meta, torch.float16)
        for form in _formats(meta):
            _others_in_eight_bits(meta, form)
            _convolutions_in_eight_bits(meta, form, few)
            if not few:
                _network_in_eight_bits(meta, form)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python -m benchmarks.sanitize``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize")
    parser.add_argument(
        "--few", action="store_true", help="one configuration of each form, and no networks"
    )
    few = parser.parse_args(arguments).few
    # A cache of memory would hide accesses beyond the end of a tensor from memcheck.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    # A network takes the static choices: cuDNN's kernels are not ours to check.
    os.environ["VOVNET_FAST_TUNE"] = "0"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        _others(device, torch.float16)
        for form in _formats(device):
            _others_in_eight_bits(device, form)
            if device.type == "cuda":
                _convolutions_in_eight_bits(device, form, few)
                if not few:
                    _network_in_eight_bits(device, form)
        if device.type == "cuda":  # Minutes in the interpreter.
            for part in (_convolutions, _gradients):
                part(device, torch.float16, few)
            for part in () if few else (_network, _training):
                part(device, torch.float16)
            torch.cuda.synchronize()
    print("every kernel was launched")
    return 0


if __name__ == "__main__":
    sys.exit(main())
