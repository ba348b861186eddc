"""The Hopper convolution: its numbers on a simulated GPU, and on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from tests.csrc.hopper import (
    CHANNELS,
    DTYPES,
    Layer,
    by_themselves,
    simulate,
    simulate_gradient,
    with_sources,
)
from vovnet_fast import selfcheck
from vovnet_fast.backends import conv_sm90, conv_sm90_tiles, conv_sm90_verdict

pytestmark = with_sources

# --------------------------------------------------------------------------------------
# Numbers, on the simulator
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("c_out", CHANNELS)
def test_3x3_is_right(c_out, simulator):
    for config in by_themselves(c_out):
        simulate(simulator, Layer(1, 9, 11, 72, c_out), config)


@pytest.mark.parametrize("c_out", CHANNELS)
def test_1x1_with_pool_partials_is_right(c_out, simulator):
    for config in by_themselves(c_out, 1):
        simulate(simulator, Layer(2, 9, 17, 80, c_out, kernel=1), config, pool=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c_in", [8, 16, 40, 64, 160])
def test_every_number_of_input_channels(c_in, dtype, simulator):
    """Down to chunks of one, two and three steps; what lies beside a slot is NaN."""
    for kernel in (1, 3):
        layer = Layer(1, 5, 7, c_in, 80, kernel=kernel, dtype=dtype)
        simulate(simulator, layer, conv_sm90.Config(128, 80), pool=True)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (17, 9), (16, 33)])
def test_odd_sizes(size, kernel, simulator):
    for crop in (False, True):  # Cropped rows do not follow each other.
        layer = Layer(2, *size, 24, 64, kernel=kernel, crop=crop)
        simulate(simulator, layer, conv_sm90.Config(128, 64), pool=True)


def test_weights_stay_where_they_have_room(simulator):
    """They are fetched by the first tile of a CTA alone."""
    config = conv_sm90.Config(256, 64)
    for c_in, resident in ((64, True), (72, False)):
        for ctas in (1, 3):
            layer = Layer(2, 17, 40, c_in, 64)
            shape = conv_sm90_tiles.Shape(2, 17, 40, c_in, 64, 3)
            assert conv_sm90_tiles.work(config, shape, ctas).resident == resident
            for late in (False, True):  # What is fetched is compared there.
                simulate(simulator, layer, config, ctas=ctas, late_copies=late)


def test_several_blocks_of_channels_share_a_tile(simulator):
    simulate(simulator, Layer(2, 9, 9, 16, 320), conv_sm90.Config(256, 160), ctas=3, pool=True)


@pytest.mark.parametrize("slots", [(768, 192), (1024, 224), (4096, 80)])
def test_1x1_over_a_concat_buffer(slots, simulator):
    """All of a block's slots at once, each of its own magnitude, in many more steps than stages.

    Against sums over one slot after the other: products that are lost, or another slot's, show.
    """
    first, width = slots
    widths = [first] + [width] * 5
    for config in [*conv_sm90.configs(256)[:1], conv_sm90.Config(128, 128, (1, 2))]:
        layer = Layer(1, 9, 29, sum(widths), 256, kernel=1)
        for i, slot in enumerate(layer.x.split(widths, dim=3)):
            slot.mul_(2.0**-i)
        simulate(simulator, layer, config, pool=True, ctas=1)
        x, weight = (t.double().split(widths, dim=3) for t in (layer.x, layer.weight))
        z = sum(x @ w.flatten(1).T for x, w in zip(x, weight))
        exact = F.relu(z * layer.scale.double() + layer.shift.double())
        torch.testing.assert_close(layer.out.double(), exact, rtol=6e-4, atol=2e-5)


def test_the_last_block_of_channels_may_be_short(simulator):
    """Of the widths that gradients of concat buffers have; what lies beyond is left alone."""
    for c_out in (72, 152, 328):
        for config in by_themselves(c_out):
            assert c_out % config.block_out
            for kernel in (1, 3):
                simulate(simulator, Layer(1, 9, 15, 24, c_out, kernel=kernel), config, pool=True)
            layer = Layer(1, 9, 15, 24, c_out)
            simulate_gradient(simulator, layer, config, layer.beside(c_out), layer.beside(c_out))


# --------------------------------------------------------------------------------------
# Gradients of inputs, on the simulator
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("c_out", CHANNELS)
def test_input_gradient_is_right(c_out, kernel, simulator):
    for config in by_themselves(c_out):
        layer = Layer(1, 9, 11, 72, c_out, kernel=kernel)
        simulate_gradient(simulator, layer, config, layer.beside(c_out), layer.beside(c_out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("add_c", "mask_c"), [(0, 0), (80, 0), (24, 0), (0, 80), (40, 56)])
def test_what_is_added_and_what_masks(add_c, mask_c, dtype, simulator):
    for size, crop in (((5, 9), False), ((17, 9), True)):
        layer = Layer(2, *size, 24, 80, dtype=dtype, crop=crop)
        add, mask = (layer.beside(c) if c else None for c in (add_c, mask_c))
        if mask is not None:
            mask[0, 0, 0, :2] = torch.tensor([float("nan"), 0.0])
        simulate_gradient(simulator, layer, conv_sm90.Config(128, 80), add, mask, ctas=3)


def test_what_is_added_may_be_the_output(simulator):
    layer = Layer(2, 9, 33, 24, 320)
    add = layer.out.copy_(layer.beside(320))[..., :160]
    simulate_gradient(simulator, layer, conv_sm90.Config(128, 160), add, layer.beside(320))


def test_it_is_the_gradient_of_autograd(simulator):
    """Through the weights as backends pack them: scaled, transposed and flipped."""
    weight = torch.randn(96, 3, 3, 80, dtype=torch.float64)
    scale = torch.rand(96, dtype=torch.float64)
    layer = Layer(1, 9, 11, 96, 80)
    packed = (weight * scale[:, None, None, None]).permute(3, 1, 2, 0).flip(1, 2)
    layer.weight = packed.contiguous().half()
    x = torch.zeros(1, 80, 9, 11, dtype=torch.float64, requires_grad=True)
    filters = layer.weight.double().permute(3, 1, 2, 0).flip(1, 2)
    F.conv2d(x, filters.permute(0, 3, 1, 2), padding=1).backward(
        layer.x.double().permute(0, 3, 1, 2)
    )
    launch = layer.plan(conv_sm90.Config(128, 80), add=None)
    simulator.run(dict(launch.fields, pool_partials=None))
    layer.check(exact=x.grad.permute(0, 2, 3, 1))


# --------------------------------------------------------------------------------------
# The rest, on the simulator
# --------------------------------------------------------------------------------------


def test_without_relu(simulator):
    simulate(simulator, Layer(1, 4, 8, 16, 80, relu=False), conv_sm90.Config(128, 80))


@pytest.mark.parametrize("kernel", [1, 3])
def test_nan_and_inf_go_where_they_go_in_torch(kernel, simulator):
    layer = Layer(1, 8, 16, 16, 64, kernel=kernel)
    layer.x[0, 2, 3, 5], layer.x[0, 6, 9, 0] = float("nan"), float("inf")
    launch = layer.plan(conv_sm90.Config(128, 64))
    simulator.run(dict(launch.fields, pool_partials=None))
    exact = layer.exact()
    assert torch.equal(layer.out.isnan(), exact.isnan())
    assert torch.equal(layer.out.isposinf(), exact.isposinf())


@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("late_products", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_rings_hold_whatever_the_timing(late_copies, late_products, kernel, simulator):
    """Many tiles for one CTA: every stage is used again and again, also across tiles."""
    simulate(
        simulator, Layer(1, 17, 24, 136 if kernel == 3 else 456, 128, kernel=kernel),
        conv_sm90.Config(128, 64), pool=True, ctas=1,
        late_copies=late_copies, late_products=late_products,
    )  # fmt: skip


@pytest.mark.parametrize("parts", [1, 2])
def test_the_next_tile_is_fetched_under_an_epilogue(parts, simulator):
    """As much as the rings hold, while nothing of the tile is stored; not a stage more."""
    layer = Layer(1, 16, 16, 512, 128)
    fields = dict(layer.plan(conv_sm90.Config(128, 128, parts=parts)).fields, pool_partials=None)
    strips, weights, _ = simulator.plan(fields)
    assert strips < 24 // parts, "the next tile has more stages than the rings"
    assert weights < 72 // parts, "the next tile has more stages than the rings"
    strip, tap = 18 * 8 * 128, 128 * 128
    first = 24 * strip + 72 * tap  # All parts of the first tile together.
    full = first + parts * (strips * strip + weights * tap)
    simulator.run(fields, ctas=parts, ahead=full)
    layer.check()
    layer.out.fill_(float("nan"))
    with pytest.raises(AssertionError, match="copies under an epilogue"):
        simulator.run(fields, ctas=parts, ahead=full + 1)


# --------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_it_passes_its_trials_in_a_process_of_its_own(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv(conv_sm90.ENVIRONMENT)
    selfcheck.trust._table.cache_clear()
    monkeypatch.setattr(conv_sm90_verdict, "_known", {})
    assert conv_sm90.why_not(gpu) is None
    assert "conv-sm90" in (tmp_path / "verified.json").read_text()
    selfcheck.trust._table.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setenv(conv_sm90.ENVIRONMENT, "1")
    device = torch.device("cuda")
    reason = conv_sm90.why_not(device)
    if reason is not None:
        pytest.skip(reason)
    return device


def run_all_gradients(layer, add=None, mask=None):
    exact = layer.gradient(add, mask)
    for engine in conv_sm90.engines(layer.x, layer.weight, layer.out, add=add, mask=mask):
        layer.out.fill_(float("nan"))
        x, weight, _, _, out = layer.tensors
        conv_sm90.run(engine, x, weight, None, None, out, add=add, mask=mask)
        layer.check(exact=exact)


def run_all(layer, *, pool=False):
    found = conv_sm90.engines(layer.x, layer.weight, layer.out)
    assert found
    for engine in found:
        layer.out.fill_(float("nan"))
        partials = conv_sm90.run(engine, *layer.tensors, relu=layer.relu, pool=pool)
        layer.check(partials)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("c_out", [*CHANNELS, 320, 512])
def test_gpu_every_number_of_output_channels(c_out, kernel, dtype, gpu):
    for c_in in (8, 80, 160, 224):
        layer = Layer(2, 33, 50, c_in, c_out, kernel=kernel, dtype=dtype, device=gpu)
        run_all(layer, pool=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "c_out"), [(3, 64), (3, 128), (3, 160), (3, 224), (1, 1472)])
def test_gpu_gradients_of_inputs(kernel, c_out, dtype, gpu):
    layer = Layer(2, 33, 50, 160, c_out, kernel=kernel, dtype=dtype, device=gpu)
    run_all_gradients(layer)
    run_all_gradients(layer, layer.beside(c_out), layer.beside(c_out))
    run_all_gradients(layer, layer.beside(24), layer.beside(40))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("c_in", [768, 1472, 2144])
def test_gpu_1x1_over_a_concat_buffer(c_in, gpu):
    run_all(Layer(2, 25, 42, c_in, 768, kernel=1, device=gpu), pool=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (17, 9), (200, 336), (13, 21)])
def test_gpu_odd_sizes(size, kernel, gpu):
    for crop in (False, True):
        run_all(Layer(2, *size, 160, 160, kernel=kernel, crop=crop, device=gpu), pool=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_results_do_not_change_from_run_to_run(gpu):
    """Many launches in a row: a race would show as a difference some time."""
    layer = Layer(4, 50, 84, 192, 192, device=gpu)
    for engine in conv_sm90.engines(layer.x, layer.weight, layer.out):
        sums = conv_sm90.run(engine, *layer.tensors, pool=True)
        first = layer.out.clone()
        for _ in range(200):
            again = conv_sm90.run(engine, *layer.tensors, pool=True)
            assert torch.equal(layer.out, first)
            assert torch.equal(again, sums)
