"""Calibrators on distributions of which the answer is known."""

import math

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from vovnet_fast.quantization.formats import Format
from vovnet_fast.quantization.ranges import BINS, CALIBRATORS, Histogram, Range, choose

INT8 = Format("int8", 127)


def histogram(*batches, groups=1):
    made = Histogram(groups, torch.device("cpu"))
    for batch in batches:
        made.add(batch.reshape(1, groups, -1, 1))
    return made


def high(x, calibrator, form=INT8, percentile=99.0):
    found = choose(histogram(x), calibrator, percentile, form.rounding("stem_1"))
    assert found.low.tolist() == [0]
    return found.high.item()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=5), st.integers(0, 2**31))
def test_batches_one_after_another_are_counted(sizes, seed):
    """However much larger the values of later ones are."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(64, generator=generator).relu() * size for size in sizes]
    found, every = histogram(*batches), torch.cat(batches).double()
    assert found.counts.sum() + found.zeros.sum() == every.numel()
    assert found.high.item() == every.max()
    assert found.reach.item() >= every.max()
    assert found.mean_square.item() == pytest.approx(every.square().mean().item(), rel=1e-9)
    edges = (torch.arange(2 * BINS + 1, dtype=torch.float64) - BINS) * found.width.item()
    for cut in (0.25, 0.5):
        value = edges[BINS + int(BINS * cut)]
        assert found.counts[0, : BINS + int(BINS * cut)].sum() == pytest.approx(
            ((every < value) & (every != 0)).sum().item(), abs=1 + 0.05 * every.numel()
        )


def test_values_are_in_their_bins():
    x = torch.tensor([-4.0, -1.0, 0.0, 0.0, 1.0, 4.0])
    found = histogram(x)
    assert found.zeros.tolist() == [2]
    where = found.counts[0].nonzero()[:, 0].tolist()
    assert where == [0, BINS - BINS // 4, BINS + BINS // 4, 2 * BINS - 1]
    assert found.centres()[0, where[2]].item() == pytest.approx(1.0, abs=found.width.item())


def test_values_stay_in_their_bins_when_these_become_wider():
    found = histogram(torch.tensor([0.3, -0.7, 1.0]), torch.tensor([3.0]), torch.tensor([-17.0]))
    assert found.reach.item() == 32
    values = found.centres()[0, found.counts[0].nonzero()[:, 0]]
    wanted = torch.tensor([-17.0, -0.7, 0.3, 1.0, 3.0]).double()
    assert (values - wanted).abs().max() <= found.width.item()


def test_channels_are_apart():
    x = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.25, 8.0], [0.0, 0.0, 0.0]])
    found = histogram(x, groups=3)
    assert found.low.tolist() == [-2, 0, 0]
    assert found.high.tolist() == [1, 8, 0]
    assert found.zeros.tolist() == [1, 0, 3]
    for calibrator in CALIBRATORS:
        chosen = choose(found, calibrator, 100, INT8.rounding("x/depthwise"))
        assert (chosen.low >= found.low).all()
        assert (chosen.high <= found.high).all()
        assert chosen.high[2] == chosen.low[2] == 0


def test_minmax_and_percentiles_of_a_uniform_distribution():
    x = torch.arange(1, 100_001) / 100_000
    assert high(x, "minmax") == 1
    for percentile in (99.0, 90.0, 60.0):
        assert high(x, "percentile", percentile=percentile) == pytest.approx(
            percentile / 100, abs=1 / BINS
        )
    zeros = torch.cat([x, torch.zeros(100_000)])  # They are values too.
    assert high(zeros, "percentile", percentile=99.0) == pytest.approx(0.98, abs=1 / BINS)
    assert high(x, "percentile", percentile=100.0) == 1


@pytest.mark.parametrize("calibrator", ["mse", "entropy"])
def test_a_uniform_distribution_is_hardly_cut(calibrator):
    assert high(torch.linspace(0, 1, 100_000), calibrator) > 0.95


def test_mse_is_the_best_of_all_ranges():
    """By the error itself, of the values and not of bins."""
    # Quantiles of an exponential distribution: what a seed draws is another thing in every torch.
    x = -((torch.arange(200_000) + 0.5) / 200_000).log()
    x[:20] *= 4

    def error(reach):
        step = reach / 127
        return ((x / step).round().clamp(0, 127) * step - x).square().sum().item()

    found = high(x, "mse")
    best = min(x.max().item() * k / 100 for k in range(10, 101)), x.max().item()
    grid = [x.max().item() * k / 100 for k in range(10, 101)]
    assert best[0] < found < best[1]
    assert error(found) <= min(map(error, grid)) * 1.02
    assert error(found) < 0.7 * error(high(x, "minmax"))


def test_an_outlier_is_cut_by_all_but_minmax():
    torch.manual_seed(0)
    x = torch.randn(100_000).abs()
    x[0] = 60
    assert high(x, "minmax") == 60
    for calibrator, most in (("percentile", 3), ("entropy", 30), ("mse", 45)):
        assert 2 < high(x, calibrator) < most, calibrator


def test_entropy_of_what_is_held_exactly_is_least():
    """Values that lie on 128 steps lose nothing at full reach, and something below it."""
    x = torch.arange(128).repeat(50).float() / 127
    assert high(x, "entropy") == 1
    assert high(x, "mse") == 1


def test_ranges_of_both_signs_are_cut_on_the_larger_side():
    torch.manual_seed(0)
    x = torch.randn(50_000)
    x[0], x[1] = -40, 3
    for calibrator in ("mse", "entropy", "percentile"):
        found = choose(histogram(x), calibrator, 99.9, INT8.rounding("x/depthwise"))
        assert -35 < found.low.item() < -2
        assert 2 < found.high.item() < 5


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_nothing_but_zeros(calibrator):
    assert high(torch.zeros(10), calibrator) == 0
    assert high(torch.zeros(0), calibrator) == 0


@settings(max_examples=50, deadline=None)
@given(st.floats(-100, 0), st.floats(0.01, 100), st.sampled_from([127, 255]))
def test_zero_is_a_byte_and_values_are_within_half_a_step(low, reach, levels):
    form = Format("int8", levels)
    ends = [torch.tensor([[value]], dtype=torch.float64) for value in (low, reach)]
    x = torch.linspace(low, reach, 100, dtype=torch.float64)[None]
    site = "x/depthwise"
    step = form.scale(site, Range(*ends)).item()
    found = form.rounding(site)(x, *ends)
    assert form.rounding(site)(torch.zeros(1, 1).double(), *ends).item() == 0
    # An end may lie half a step beyond the bytes, as zero has to be one of them.
    assert (found - x).abs().max() <= step * (1 + 1e-9)
    assert (found - x).abs().median() <= step / 2 * (1 + 1e-9)
    assert math.isclose(step, (reach - low) / levels)
