"""Every different convolution layer of V-39 and V-99 at 800x1344, on every engine.

``pytest benchmarks/test_conv.py --benchmark-only``. A row is a layer, as the network asks for it:
from a slot of a concat buffer into a slot, with scale, shift and ReLU, and with the sums of eSE's
pool where they are needed. The row's time is that of the engine that was fastest;
``extra_info["engines"]`` has all of them, ms and TFLOP/s, or why one does not run. On a CPU
there is one tiny layer, in Triton's interpreter where that is on.
"""

import pytest
import torch

from vovnet_fast import backends

from .networks import SHAPES, SMALL, layers
from .timing import measure

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def _cases():
    if not ON_GPU:
        small = layers(SMALL[0], (1, 32, 32)).values()
        layer = min(small, key=lambda layer: layer.flop)
        return {layer.name: layer}
    return {**layers("V-39-eSE", SHAPES[0]), **layers("V-99-eSE", SHAPES[0])}


CASES = _cases()


def _filled(layer, device):
    """The layer's tensors, with numbers that neither vanish nor overflow."""
    torch.manual_seed(0)
    x, weight, scale, shift, out = layer.tensors(DTYPE, device)
    weight.normal_(std=weight[0].numel() ** -0.5)
    return x.normal_(), weight, scale.uniform_(0.5, 1.5), shift.normal_(), out


@pytest.mark.parametrize("name", CASES)
def test_conv(name, benchmark, watch, device):
    reason = backends.why_not("triton", device)
    if reason is not None:
        pytest.skip(reason)
    from vovnet_fast.backends import cudnn_graph
    from vovnet_fast.backends import triton as backend

    layer = CASES[name]
    tensors = _filled(layer, device)
    x, weight, _, _, out = tensors
    found, static = backend._kernels().conv.choices(x, weight, out, stride=layer.stride)
    engines, times = {}, {}
    graphs, missing = [], "it has no sums for the pool"
    if not layer.pool:
        graphs = cudnn_graph.engines(*tensors, stride=layer.stride)
        missing = cudnn_graph.why_none(*tensors, stride=layer.stride)
    if not graphs:
        engines[cudnn_graph.NAME] = {"error": missing}

    def run(engine):
        options = dict(stride=layer.stride, relu=True, pool=layer.pool)
        backend.run_engine(engine, *tensors, **options)

    for engine in (backend.ATEN, *graphs, *(config.name for config in found)):
        try:
            seconds = watch.median(lambda engine=engine: run(engine), *(() if ON_GPU else (1, 0)))
        except Exception as error:
            if "illegal" in str(error):  # Nothing runs on the device after that.
                raise
            engines[engine] = {"error": str(error)[:200]}
        else:
            times[engine] = seconds
            engines[engine] = {"ms": seconds * 1e3, "tflops": layer.flop / seconds / 1e12}
    best = min(times, key=lambda engine: times[engine])
    benchmark.extra_info.update(
        layer=name, dtype=str(DTYPE), engines=engines, best=best, static=static.name,
        ratio_to_aten=times.get(backend.ATEN, float("nan")) / times[best],
    )  # fmt: skip
    milliseconds = measure(benchmark, watch, lambda: run(best))
    benchmark.extra_info["tflops"] = layer.flop / milliseconds / 1e9
