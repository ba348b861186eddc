"""Every different convolution of V-39 and V-99 in int8 and fp8, on every engine of the GPU.

``pytest benchmarks/test_conv_eight_bits.py --benchmark-only``. A layer is as the network asks for
it: from a slot of a concat buffer into a slot, with bias, multipliers and ReLU, and with the sums
of eSE's pool where they are needed. Each engine is held against the arithmetic before it is timed;
``extra_info["engines"]`` has all of them, ms, or why one does not run. Beside it, as eager, the
same layer in bf16 by ATen. On a CPU there is one tiny layer in Triton's interpreter where that is
on, whose times say nothing.
"""

import pytest
import torch

from vovnet_fast.arithmetic import LEVELS, fp8
from vovnet_fast.arithmetic.layers import QuantizedConv
from vovnet_fast.backends import eight_bits
from vovnet_fast.selfcheck.eight_bit_calls import Numbers
from vovnet_fast.tools.plan import IMAGE_CHANNELS

from .networks import layers
from .op_rows import SECONDS, _choosing, engines, interpreted
from .ops import conv_cases
from .timing import measure, warm_ms

ON_GPU = torch.cuda.is_available()
SHAPES = ((1, 800, 1344), (1, 640, 1600))
TINY = "3x3 64>64 on 1x8x8"


def _layers():
    if ON_GPU:
        return {
            name: layer
            for shape in SHAPES
            for spec in ("V-39-eSE", "V-99-eSE")
            for name, layer in layers(spec, shape).items()
        }
    found = layers("V-39-eSE", (1, 16, 16)) if interpreted() else {}
    return {name: layer for name, layer in found.items() if name == TINY}


LAYERS = _layers()


def quantized(layer, form, device):
    """Its input, the layer as ops take it, its slot, and the largest activation."""
    numbers = Numbers(form, device, LEVELS[0] if form == "int8" else fp8.LARGEST)
    c_out, kernel, _, c_in = layer.weight
    if c_in == IMAGE_CHANNELS:
        x = layer.x.empty(numbers.ops.image_dtype(False), device)
        pixels = numbers.normal(*layer.x.shape, dtype=torch.float32)
        numbers.ops.quantize_image(pixels, 4 / 127, x)
    else:
        x = layer.x.empty(numbers.ops.ACTIVATION, device)
        x.copy_(numbers.activations(*layer.x.shape))
    scales, products = numbers.floats(c_in), kernel**2 * c_in
    weight, bias = numbers.weight(c_out, kernel, kernel, c_in), numbers.bias(c_out)
    unit, factors = numbers.floats(c_out, scale=0.01), numbers.factors(c_out, products)
    made = QuantizedConv(weight, bias, factors, unit, layer.stride, None, scales, None, 1.0)
    return x, made, layer.out.empty(numbers.ops.ACTIVATION, device), numbers.levels


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("name", LAYERS)
def test_conv_eight_bits(name, form, benchmark, watch, device, ceilings, request):
    layer, tiny = LAYERS[name], name == TINY
    ops, reason = eight_bits.find("triton", device, form, ())
    if ops is None:
        pytest.skip(f"{form}: {reason}")
    with torch.inference_mode(False), torch.no_grad():
        (case, *_) = conv_cases({name: layer})
        eager = case.make(torch.bfloat16 if ON_GPU else torch.float32, device).eager
        x, made, out, levels = quantized(layer, form, device)

        def call():
            ops.conv(x, made, out, levels=levels, pool=layer.pool)

        size = sum(each.numel() * each.element_size() for each in (x, made.weight, out))
        benchmark.group = name
        n, h, w, c = layer.x.shape
        benchmark.extra_info.update(
            kind="conv", name=f"{name} {form}", provider="triton", backend="triton", dtype=form,
            shape=f"{n}x{c}x{h}x{w}", flop=layer.flop, bytes=size,
            settings="slots of a wider buffer; eager is in bf16",
        )  # fmt: skip
        benchmark.extra_info["pass"] = "forward"
        which = request.config.getoption("--engines")
        found = engines(call, watch, quick=tiny, which=which)
        assert found is not None, "the backend chose nothing"
        with _choosing(found[1]):
            benchmark.extra_info.update(engines=found[0], engine=found[1])
            measured = measure(benchmark, watch, call, eager, seconds=0 if tiny else SECONDS)
            if not tiny:
                benchmark.extra_info["warm_ms"] = warm_ms(watch, call, SECONDS / 4)
    seconds, dtype = measured.median_ms / 1e3, out.dtype
    benchmark.extra_info.update(ceilings.fractions(layer.flop, size, seconds, dtype))
