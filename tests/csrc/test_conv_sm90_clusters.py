"""The Hopper convolution on a simulated GPU: CTAs and warpgroups that work together."""

import pytest
import torch

from tests.csrc.hopper import DTYPES, Layer, simulate, simulate_gradient, with_sources
from vovnet_fast.backends import conv_sm90, conv_sm90_tiles

pytestmark = with_sources

# --------------------------------------------------------------------------------------
# Clusters, on the simulator
# --------------------------------------------------------------------------------------


CLUSTERS = [(2, 1), (1, 2), (2, 2), (1, 3), (4, 2)]


@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("late_products", [False, True])
@pytest.mark.parametrize("cluster", CLUSTERS[:3])
def test_what_a_cluster_shares_arrives_at_all(cluster, late_copies, late_products, simulator):
    """However early or late, and at one of them before it arrives at another."""
    for kernel, c_in in ((3, 136), (1, 456)):
        layer = Layer(1, 17, 24, c_in, 256, kernel=kernel)
        simulate(
            simulator, layer, conv_sm90.Config(128, 64, cluster), pool=True, ctas=1, seed=kernel,
            late_copies=late_copies, late_products=late_products,
        )  # fmt: skip


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_clusters_may_reach_beyond_the_image_and_the_channels(cluster, simulator):
    """Nine tiles, of pixels and of channels, are no multiple of any cluster but one."""
    for kernel in (1, 3):
        layer = Layer(3, 20, 17, 24, 192, kernel=kernel)
        simulate(simulator, layer, conv_sm90.Config(128, 64, cluster), pool=True, ctas=8)
    add, mask = layer.beside(192), layer.beside(192)
    simulate_gradient(simulator, layer, conv_sm90.Config(128, 64, cluster), add, mask)


def test_a_cluster_shares_weights_that_stay(simulator):
    config = conv_sm90.Config(128, 64, (2, 1))
    shape = conv_sm90_tiles.Shape(2, 17, 40, 64, 64, 3)
    assert conv_sm90_tiles.work(config, shape, 4).resident
    for late in (False, True):
        simulate(simulator, Layer(2, 17, 40, 64, 64), config, ctas=4, late_copies=late)


# --------------------------------------------------------------------------------------
# Warpgroups that take turns, on the simulator
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("late_products", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_turns_hold_whatever_the_timing(late_copies, late_products, kernel, simulator):
    """Six tiles for one CTA, with more stages than the rings, and, of few channels, with fewer."""
    for c_in in (136, 24) if kernel == 3 else (712, 24):
        simulate(
            simulator, Layer(1, 17, 24, c_in, 96, kernel=kernel),
            conv_sm90.Config(128, 96, turns=True), pool=True, ctas=1, seed=c_in,
            late_copies=late_copies, late_products=late_products,
        )  # fmt: skip


@pytest.mark.parametrize("tiles", [1, 2, 3, 5])
def test_any_number_of_tiles_in_turns(tiles, simulator):
    """Of a single one the second warpgroup has nothing, of an odd number one less."""
    for kernel in (1, 3):
        layer = Layer(tiles, 7, 11, 72, 64, kernel=kernel)
        simulate(simulator, layer, conv_sm90.Config(128, 64, turns=True), pool=True, ctas=1)


def test_weights_stay_for_both_that_take_turns(simulator):
    config = conv_sm90.Config(128, 64, turns=True)
    shape = conv_sm90_tiles.Shape(2, 17, 40, 64, 64, 3)
    assert conv_sm90_tiles.work(config, shape, 3).resident
    for late in (False, True):
        simulate(simulator, Layer(2, 17, 40, 64, 64), config, ctas=3, late_copies=late)


@pytest.mark.parametrize("cluster", CLUSTERS[:4])
def test_clusters_whose_warpgroups_take_turns(cluster, simulator):
    """What CTAs share is read by whichever warpgroup of each; at any timing, and beyond the map."""
    config = conv_sm90.Config(128, 64, cluster, turns=True)
    for kernel, late in ((1, True), (3, False)):
        layer = Layer(3, 20, 17, 136, 192, kernel=kernel)
        simulate(
            simulator, layer, config, pool=True, ctas=4, seed=kernel, late_copies=late,
            late_products=not late,
        )  # fmt: skip
    add, mask = layer.beside(192), layer.beside(192)
    simulate_gradient(simulator, layer, config, add, mask, ctas=4)


def test_the_next_tile_is_multiplied_under_an_epilogue(simulator):
    """All of it, while nothing of the first is stored, in turns; where both share it nothing."""
    layer = Layer(1, 16, 24, 136, 96)
    each = 9 * (4 + 4 + 1) * 2  # Taps, steps of three chunks, and blocks of 64 pixels.
    for config, most in [
        (conv_sm90.Config(128, 96, turns=True), 2 * each),
        (conv_sm90.Config(128, 96), each),
    ]:
        fields = dict(layer.plan(config).fields, pool_partials=None)
        for late in (False, True):
            layer.out.fill_(float("nan"))
            simulator.run(fields, ctas=1, multiplied=most, late_products=late)
            layer.check()
            with pytest.raises(AssertionError, match="products under an epilogue"):
                simulator.run(fields, ctas=1, multiplied=most + 1, late_products=late)


# --------------------------------------------------------------------------------------
# Tiles whose sum CTAs of a cluster share, on the simulator
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("c_out", "tile"),
    [(64, (256, 64)), (80, (128, 80)), (96, (256, 96)), (112, (128, 112)), (128, (256, 128)),
     (160, (128, 160)), (192, (128, 192)), (224, (128, 224))],
)  # fmt: skip
def test_parts_of_every_width_add_up(c_out, tile, simulator):
    """Eighteen terms in five parts: parts end within columns, of which both fetch a strip."""
    config = conv_sm90.Config(*tile, parts=5)
    simulate(simulator, Layer(1, 9, 11, 72, c_out), config, pool=True, ctas=5)


@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("late_products", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_add_up_whatever_the_timing(parts, late_copies, late_products, simulator):
    """Several tiles one after the other: what is handed over takes the same place again."""
    for kernel, c_in in ((3, 72), (1, 520)):
        layer = Layer(1, 17, 24, c_in, 128, kernel=kernel)
        simulate(
            simulator, layer, conv_sm90.Config(128, 64, parts=parts), pool=True, ctas=parts,
            seed=parts, late_copies=late_copies, late_products=late_products,
        )  # fmt: skip


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (17, 9), (16, 33)])
def test_odd_sizes_in_parts(size, kernel, simulator):
    for crop in (False, True):
        layer = Layer(2, *size, 24 if kernel == 3 else 136, 64, kernel=kernel, crop=crop)
        simulate(simulator, layer, conv_sm90.Config(128, 64, parts=3), pool=True, ctas=6)


@pytest.mark.parametrize(("cluster", "parts"), [((2, 1), 4), ((1, 2), 3), ((2, 2), 2), ((1, 4), 2)])
def test_parts_of_several_tiles(cluster, parts, simulator):
    """CTAs of a part share what they fetch; clusters reach beyond the image and the channels."""
    for kernel, c_in in ((3, 24), (1, 264)):
        layer = Layer(3, 20, 17, c_in, 192, kernel=kernel)
        config = conv_sm90.Config(128, 64, cluster, parts)
        simulate(simulator, layer, config, pool=True, ctas=8, seed=kernel)
    add, mask = layer.beside(192), layer.beside(192)
    simulate_gradient(simulator, layer, config, add, mask, ctas=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("add_c", "mask_c"), [(0, 0), (80, 0), (24, 0), (0, 80), (40, 56)])
def test_what_is_added_in_parts_and_what_masks(add_c, mask_c, dtype, simulator):
    layer = Layer(2, 17, 9, 24, 80, dtype=dtype, crop=True)
    add, mask = (layer.beside(c) if c else None for c in (add_c, mask_c))
    if mask is not None:
        mask[0, 0, 0, :2] = torch.tensor([float("nan"), 0.0])
    simulate_gradient(simulator, layer, conv_sm90.Config(256, 80, parts=4), add, mask, ctas=8)


def test_the_last_block_in_parts_may_be_short(simulator):
    layer = Layer(1, 9, 15, 24, 328, relu=False)
    config = conv_sm90.Config(128, 112, parts=3)
    simulate(simulator, layer, config, pool=True, ctas=6)
    simulate_gradient(simulator, layer, config, layer.beside(328), layer.beside(328), ctas=6)


def test_parts_are_added_in_their_order(simulator):
    """Of numbers that no other order of fp32 sums gives, by whichever part, at any timing."""
    layer = Layer(1, 9, 15, 256, 64, kernel=1, relu=False)
    layer.x.zero_()
    layer.x[..., ::64] = 1
    layer.weight.zero_()
    # Only where the first two are added first is anything left of the others.
    terms = torch.tensor([2.0**15, -(2.0**15), 0.5**15, 0.5**15])
    layer.weight[:, 0, 0, ::64] = terms.half()
    layer.scale.fill_(1), layer.shift.fill_(0)
    for seed in range(3):
        for late in (False, True):
            launch = layer.plan(conv_sm90.Config(128, 64, parts=4))
            fields = dict(launch.fields, pool_partials=None)
            simulator.run(fields, ctas=4, seed=seed, late_copies=late, late_products=late)
            assert torch.equal(layer.out, torch.full_like(layer.out, 0.5**14))
