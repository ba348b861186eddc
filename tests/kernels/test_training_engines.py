"""The engines of the convolutions of training agree, and measuring them leaves no trace."""

import pytest
import torch

from vovnet_fast import tuning
from vovnet_fast.backends import reference
from vovnet_fast.backends import triton as backend
from vovnet_fast.backends.triton import convolution, convolution_gradients
from vovnet_fast.backends.triton.choosing import load_kernels

TOLERANCE = {2: 2e-2, 4: 1e-5, 8: 1e-12}
"""By bytes of the dtype."""


@pytest.fixture(autouse=True)
def _exact_fp32(monkeypatch):
    """Engines differ in what TF32 rounds."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def slot(device, dtype, *shape):
    """Random numbers in a slot whose neighbours are NaN."""
    *pixels, channels = shape
    buffer = torch.full((*pixels, channels + 32), float("nan"), dtype=dtype, device=device)
    return buffer, buffer[..., 16:-16].copy_(torch.randn(shape, device=device))


def high(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_close(actual, expected, dtype):
    tolerance = TOLERANCE[dtype.itemsize]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def assert_neighbours_untouched(buffer):
    assert buffer[..., :16].isnan().all()
    assert buffer[..., -16:].isnan().all()


class Gradient:
    """Arguments of an input gradient in place, and the right result."""

    def __init__(self, device, dtype, kernel=3, stride=1, added=48, size=(5, 8)):
        small = [(side - 1) // stride + 1 for side in size]
        _, self.g = slot(device, dtype, 2, *small, 32)
        self.weight = torch.randn(32, kernel, kernel, 48, device=device) / (32 * kernel**2) ** 0.5
        self.weight = self.weight.to(high(dtype))
        self.scale = torch.rand(32, device=device, dtype=high(dtype)) + 0.5
        self.buffer, self.out = slot(device, dtype, 2, *size, 48)
        _, self.mask = slot(device, dtype, 2, *size, 40)
        self.options = dict(stride=stride, add=self.out[..., :added], mask=self.mask)
        self.expected = torch.empty(self.out.shape, dtype=torch.float64, device=device)
        reference.conv_input_grad(
            self.g.double(), self.weight.double(), self.scale.double(), self.expected,
            stride=stride, add=self.options["add"].double(), mask=self.mask.double(),
        )  # fmt: skip

    def run(self):
        backend.conv_input_grad(self.g, self.weight, self.scale, self.out, **self.options)

    def assert_right(self):
        assert_close(self.out, self.expected, self.g.dtype)
        assert_neighbours_untouched(self.buffer)


LAYERS = [
    *((1, 1, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
    *((kernel, stride, torch.float16) for kernel, stride in ((3, 1), (3, 2), (1, 2))),
]
"""Kernel, stride and dtype."""


def skip_fp64_on_a_gpu(dtype, device):
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("fp64 is served in the interpreter only")


@pytest.mark.parametrize(("kernel", "stride", "dtype"), LAYERS)
def test_engines_of_the_input_gradient_agree(kernel, stride, dtype, device):
    skip_fp64_on_a_gpu(dtype, device)
    layer = Gradient(device, dtype, kernel, stride)
    packed = convolution_gradients._pack_transposed(layer.weight, layer.scale, layer.g)
    found, static = load_kernels().conv.input_grad_choices(
        layer.g, packed, layer.out, **layer.options
    )
    assert static in found
    before = layer.out.clone()
    for engine in [backend.ATEN, *(config.name for config in found)]:
        layer.out.copy_(before)
        backend.run_input_grad_engine(engine, layer.g, packed, layer.out, **layer.options)
        layer.assert_right()


@pytest.mark.parametrize("size", [(1, 1), (1, 8), (7, 1), (6, 8), (7, 9)])
def test_aten_gradient_of_a_stride_of_2_at_every_parity(size, device):
    layer = Gradient(device, torch.float32, 3, 2, size=size)
    packed = convolution_gradients._pack_transposed(layer.weight, layer.scale, layer.g)
    backend.run_input_grad_engine(backend.ATEN, layer.g, packed, layer.out, **layer.options)
    layer.assert_right()


def test_input_gradient_without_scale_add_and_mask(device):
    layer = Gradient(device, torch.float32)
    expected = torch.empty_like(layer.out)
    for module, out in ((reference, expected), (backend, layer.out)):
        module.conv_input_grad(layer.g, layer.weight, None, out)
    assert_close(layer.out, expected, torch.float32)


@pytest.mark.parametrize(("kernel", "stride", "dtype"), LAYERS)
def test_engines_of_the_statistics_agree(kernel, stride, dtype, device):
    skip_fp64_on_a_gpu(dtype, device)
    _, x = slot(device, dtype, 2, 5, 8, 32)
    weight = (torch.randn(48, kernel, kernel, 32, device=device) / (32 * kernel**2) ** 0.5).to(
        dtype
    )
    buffer, out = slot(device, dtype, 2, *((side - 1) // stride + 1 for side in (5, 8)), 48)
    expected = torch.empty(out.shape, dtype=torch.float64, device=device)
    exact = reference.conv_statistics(x.double(), weight.double(), expected, stride=stride)[0]
    found, static = load_kernels().conv.choices(x, weight, out, stride=stride, statistics=True)
    assert static in found
    for engine in [backend.ATEN, *(config.name for config in found)]:
        buffer.fill_(float("nan"))
        partials = backend.run_statistics_engine(engine, x, weight, out, stride=stride)
        assert_close(out, expected, dtype)
        assert_neighbours_untouched(buffer)
        assert partials.dtype == high(dtype)
        count, sums, squares = reference.batch_norm_merge(partials.double())
        assert torch.equal(count, exact[0])
        pixels = out[..., 0].numel()
        assert_close(sums / pixels, exact[1] / pixels, dtype)
        assert_close(squares / pixels, exact[2] / pixels, dtype)


@pytest.mark.parametrize("pool", [False, True])
def test_normalize(pool, dtype, device):
    _, z = slot(device, dtype, 2, 9, 10, 48)
    buffer, out = slot(device, dtype, 2, 9, 10, 48)
    scale, shift = torch.randn(2, 48, device=device, dtype=high(dtype))
    partials = backend.normalize(z, scale, shift, out, pool=pool)
    expected = (z.double() * scale.double() + shift.double()).relu()
    assert_close(out, expected, dtype)
    assert_neighbours_untouched(buffer)
    if pool:
        assert_close(partials.sum(1) / 90, expected.mean((1, 2)), dtype)
    else:
        assert partials is None


def test_empty_batches(device):
    x, out = torch.empty(0, 5, 7, 32, device=device), torch.empty(0, 5, 7, 48, device=device)
    weight, scale = torch.randn(48, 3, 3, 32, device=device), torch.ones(48, device=device)
    partials = backend.conv_statistics(x, weight, out)
    assert partials.shape[1:] == (3, 48)
    assert not partials.any()
    assert backend.normalize(out, scale, scale, out, pool=True).shape[::2] == (0, 48)
    backend.conv_input_grad(out, weight, scale, x, add=x, mask=x)


# --------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Lets anything be measured, into a file of its own; counts what is timed."""
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "may_measure", lambda device: True)
    # It is said once a process: which test would see it depends on their order.
    monkeypatch.setattr(tuning, "_announce", lambda: None)
    times = []

    def timer(work):
        for _ in range(2):
            work()
        times.append(len(times))
        return float(times[-1])

    monkeypatch.setattr(tuning, "_device_timer", lambda device: timer)
    tuning._table.cache_clear()
    yield times
    tuning._table.cache_clear()


@pytest.mark.parametrize("added", [48, 24])
def test_measuring_adds_nothing_in_place(added, timed, device, caplog):
    """Every run of every engine adds to the slot; only the one at the end may be seen."""
    layer = Gradient(device, torch.float32, 1, added=added)
    layer.run()
    layer.assert_right()
    assert len(timed) > 1
    assert caplog.messages == []


def test_a_failed_measurement_leaves_the_slot_as_it_was(timed, device, monkeypatch):
    layer = Gradient(device, torch.float32, 1)
    before = layer.out.clone()
    run, trial_only = backend.run_input_grad_engine, []

    def broken(engine, g, packed, out, **options):
        run(engine, g, packed, out, **options)
        if out.data_ptr() == layer.out.data_ptr():
            raise RuntimeError("on the real tensors")
        trial_only.append(engine)

    monkeypatch.setattr(convolution_gradients, "run_input_grad_engine", broken)
    with pytest.raises(RuntimeError, match="none of the candidates"):
        layer.run()
    assert trial_only
    assert torch.equal(layer.out, before)


@pytest.mark.parametrize("function", ["conv_input_grad", "conv_statistics"])
def test_a_wrong_engine_is_left_out(function, timed, device, monkeypatch, caplog):
    def halve(run):
        def run_engine(engine, *args, **options):
            result = run(engine, *args, **options)
            if engine == backend.ATEN:
                (args[2] if result is None else result).mul_(0.5)
            return result

        return run_engine

    rooms = {
        "run_input_grad_engine": convolution_gradients,
        "run_statistics_engine": convolution,
    }
    for name, room in rooms.items():
        monkeypatch.setattr(room, name, halve(getattr(room, name)))
    layer = Gradient(device, torch.float32, 1)
    if function == "conv_input_grad":
        layer.run()
        layer.assert_right()
    else:
        backend.conv_statistics(layer.out, layer.weight, layer.g)
    [warning] = caplog.messages
    assert warning.startswith("candidate aten is wrong and is left out, conv ")
