"""Predictions of the cost model against what the rules of the hardware say, without a GPU.

Nothing here is a measurement: the file of times is made up, and says so.
"""

import dataclasses
import functools
import itertools
import json
import math
import types

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="predictions are of Triton's configurations")

from vovnet_fast import specs, tuning
from vovnet_fast.backends import _predict, conv_sm90
from vovnet_fast.compat import zip
from vovnet_fast.kernels import cost, device, resources
from vovnet_fast.kernels.conv_config import ConvConfig
from vovnet_fast.kernels.cost import WEIGHT_GRAD, Layer
from vovnet_fast.kernels.device import H100, H200
from vovnet_fast.kernels.resources import Resources
from vovnet_fast.tools import cli, regret
from vovnet_fast.tools.plan import Rates

KINDS = ("forward", "statistics", "gradient", WEIGHT_GRAD)
NETWORKS = [
    (spec, shape) for spec in ("V-39-eSE", "V-99-eSE") for shape in ((1, 800, 1344), (6, 640, 1600))
]


def half(side):
    return (side - 1) // 2 + 1


def convolutions(spec, shape):
    """(batch, height, width of the output, C_in, C_out, kernel, stride) of a network's layers."""
    plan, (n, h, w) = specs.get(spec), shape
    stem = (3, *plan.stem_channels)
    for c_in, c_out, stride in zip(stem, stem[1:], plan.stem_strides, strict=False):
        h, w = (half(h), half(w)) if stride == 2 else (h, w)
        yield n, h, w, c_in, c_out, 3, stride
    stage = None
    for block in plan.blocks():
        if block.stage != stage and stage is not None:
            h, w = half(h), half(w)
        stage = block.stage
        yield n, h, w, block.in_channels, block.mid_channels, 3, 1
        yield n, h, w, block.mid_channels, block.mid_channels, 3, 1
        yield n, 1, h * w, block.concat_channels, block.out_channels, 1, 1


@functools.cache
def layers(spec, shape, kinds=KINDS):
    """As the launchers ask for them, each once."""
    found = {}
    for n, h, w, c_in, c_out, kernel, stride in convolutions(spec, shape):
        for kind in kinds:
            layer = Layer(
                n, h, w, c_in, c_out, kernel, stride, torch.bfloat16, kind=kind,
                tma=stride == 1 and c_in > 3,
            )  # fmt: skip
            if kind == "gradient":
                if c_in == 3:
                    continue
                layer = dataclasses.replace(
                    layer, height=h * stride, width=w * stride, c_in=c_out, c_out=c_in,
                    transposed=stride == 2, added=c_in, masked=c_in,
                )  # fmt: skip
            found[layer] = None
    return tuple(found)


EVERY = tuple(dict.fromkeys(layer for network in NETWORKS for layer in layers(*network)))


def best(layer, card=H200):
    return cost.static_choice(layer, card)


def predicted(layer, card=H200):
    """By configuration."""
    return dict(
        zip(
            cost.configurations(layer, card.capability),
            cost.predictions(layer, card),
            strict=True,
        )
    )


# --------------------------------------------------------------------------------------
# Rules
# --------------------------------------------------------------------------------------

TILE = ConvConfig("tma", 8, 16, (128,), 64, 8, 3)
TWO = Resources(warps=8, registers=90, shared=98328)
"""Two programs a processor."""


def rows_of(tiles):
    """A layer of so many tiles of 8 x 16 pixels by 128 channels."""
    return Layer(1, 8, 16 * tiles, 128, 128)


def test_a_tile_too_many_is_a_wave_too_many():
    """525 tiles are 1.99 waves of 264; 265 are 1.004."""
    assert TWO.resident((9, 0)) == 2
    seconds = {
        tiles: cost.predict(TILE, rows_of(tiles), H200, TWO).seconds - cost.LAUNCH
        for tiles in (264, 265, 525, 528)
    }
    assert seconds[265] > 1.2 * seconds[264]
    assert seconds[525] == pytest.approx(seconds[528], rel=0.02)
    assert seconds[525] / 525 < 0.8 * seconds[265] / 265
    good = cost.predict(TILE, rows_of(525), H200, TWO)
    assert good.waves == pytest.approx(525 / 264)
    assert (good.programs, good.resident) == (525, 2)


def test_programs_that_share_a_processor_hide_each_others_waits():
    one = dataclasses.replace(TWO, registers=255)
    assert one.resident((9, 0)) == 1
    layer = rows_of(528)
    alone, two = (cost.predict(TILE, layer, H200, r) for r in (one, TWO))
    assert two.idle < alone.idle
    assert two.seconds < alone.seconds


@pytest.mark.parametrize(
    ("c_out", "exact", "padded"), [(192, (128, 64), (256,)), (64, (64,), (128,))]
)
def test_exact_channels_win_at_equal_waves(c_out, exact, padded):
    layer = Layer(1, 8, 16 * 132, 128, c_out)
    each = Resources(warps=8, registers=200, shared=180_000)
    one, other = (
        cost.predict(dataclasses.replace(TILE, block_out=blocks), layer, H200, each)
        for blocks in (exact, padded)
    )
    assert one.waves == other.waves == 1
    assert one.seconds < other.seconds
    assert one.compute == pytest.approx(other.compute * c_out / sum(padded))


def test_small_maps_get_many_small_tiles():
    small, large = Layer(1, 25, 42, 224, 224), Layer(8, 200, 336, 128, 128)
    assert best(small).pixels == 64
    assert best(large).pixels == 256
    for layer in (small, Layer(1, 25, 42, 1024, 224)):
        taken, most = predicted(layer)[best(layer)], max(predicted(layer).values(), key=cost_of)
        assert taken.programs > most.programs


def cost_of(prediction):
    return prediction.seconds


def test_forms():
    layer = Layer(1, 200, 336, 128, 128)
    for kind in ("forward", "gradient"):
        one = dataclasses.replace(layer, kind=kind)
        assert best(one, H100).form == "tma"
        assert best(one, device.known("", (10, 0))).form == "tma"
        assert best(one, device.known("", (8, 0))).form == "pointer"
        assert best(one, device.known("", (8, 9))).form == "pointer"
        assert best(dataclasses.replace(one, tma=False), H100).form == "pointer"
    exact = dataclasses.replace(layer, dtype=torch.float32)
    assert best(exact, H100).form == "pointer"


def test_a_pass_over_memory_takes_what_memory_takes():
    """What multiplies little does; on an H100 the 1x1 over the concat comes within a half."""
    for layer, most in (
        (Layer(8, 1, 400 * 672, 64, 64, 1), 1.05),
        (Layer(1, 1, 67200, 768, 256, 1), 1.5),
    ):
        found = predicted(layer, H100)[best(layer, H100)]
        floor = found.dram
        moved = layer.pixels * (layer.c_in + layer.c_out) * 2
        assert floor == pytest.approx(moved / H100.dram, rel=0.05)
        assert floor <= found.seconds - cost.LAUNCH < most * floor


def test_what_is_slowest_bounds():
    layer = Layer(1, 200, 336, 128, 128)
    taken = cost.predict(TILE, layer, H200, TWO)
    for name, rate in (("dram", "dram"), ("l2", "l2"), ("compute", "half")):
        slow = dataclasses.replace(H200, **{rate: getattr(H200, rate) / 100})
        found = cost.predict(TILE, layer, slow, TWO)
        assert found.bound == name
        assert found.seconds > 5 * taken.seconds
    assert f"{TILE.name}: {taken.seconds * 1e6:.1f} us (compute" in str(taken)


def test_what_does_not_fit_takes_for_ever():
    found = cost.predict(TILE, rows_of(10), H200, dataclasses.replace(TWO, shared=1 << 20))
    assert found.seconds == math.inf


def test_what_spills_takes_longer():
    spilling = dataclasses.replace(TWO, spilled=8)
    seconds = [cost.predict(TILE, rows_of(525), H200, r).seconds for r in (TWO, spilling)]
    assert seconds[1] > 1.3 * seconds[0]


def test_more_work_never_takes_less():
    for kind in KINDS:
        layer = Layer(1, 50, 84, 192, 192, kind=kind)
        for config in cost.configurations(layer, H200.capability):
            sizes = [
                cost.predict(config, dataclasses.replace(layer, **more), H200).seconds
                for more in ({}, {"batch": 2}, {"batch": 8}, {"batch": 32})
            ]
            assert sizes == sorted(sizes), f"{kind} {config.name}: {sizes}"
    rows = [cost.predict(TILE, rows_of(n), H200, TWO).seconds for n in range(1, 800, 7)]
    assert all(b >= a * 0.999 for a, b in itertools.pairwise(rows))


# --------------------------------------------------------------------------------------
# The networks
# --------------------------------------------------------------------------------------


def test_choices_are_near_the_best_and_spill_nothing():
    """A choice may cost what sharing kernels is held to be worth, and hardly ever does."""
    for card in (H100, H200, device.known("", (8, 0))):
        excess = []
        for layer in EVERY:
            if card.capability < (9, 0):
                layer = dataclasses.replace(layer, tma=False)
            found = predicted(layer, card)
            taken = found[best(layer, card)]
            excess.append(taken.seconds / min(map(cost_of, found.values())))
            assert taken.resources.spilled == 0
            assert taken.resident >= 1
            assert taken.resources.source == f"compiled for sm_{card.capability[0]}0", layer
        assert max(excess) <= max(cost.STEADY, cost.FAVOUR) * cost.TIE
        assert math.exp(sum(map(math.log, excess)) / len(excess)) < 1.06


def test_many_sizes_share_few_kernels():
    """Over 24 sizes of a multi-scale training: forward, at most a quarter more.

    A training step of V-99 needs a tenth more, which ``benchmarks/guard.py`` counts.
    """

    def kernels(sides):
        found = set()
        for side in sides:
            shape = (2, side, min(1344, -(-side * 5 // 96) * 32))
            for layer in layers("V-39-eSE", shape, ("forward",)):
                found.add((layer.kernel, layer.stride, best(layer).name))
        return found

    one, many = kernels([800]), kernels(range(480, 800, 14))
    assert len(many | one) <= 1.25 * len(one)


def test_the_choice_is_steady_under_small_changes_of_size():
    changed = 0
    sizes = [(196, 332), (200, 336), (204, 340), (200, 344), (208, 336)]
    for c_in, c_out in ((128, 128), (64, 64), (256, 160)):
        changed += len({best(Layer(2, *size, c_in, c_out)).name for size in sizes}) - 1
    assert changed <= 1


def test_never_below_the_floor(monkeypatch):
    """Of every launch of a forward and a backward pass, as :mod:`vovnet_fast.tools.plan` has it."""
    counts = pytest.importorskip("benchmarks.counts")
    rates = Rates(H100.half / 1e12, H100.dram / 1e12)
    asked = []

    def choose(on, problem, candidates, static, run, timer=None, prepare=None):
        asked.append((problem, candidates, static))
        return static

    monkeypatch.setattr(tuning, "choose", choose)
    shape = (2, 160, 224)
    step = counts.training_step("V-39-eSE", shape)
    kinds = ("conv 3x3", "conv 1x1", "conv 3x3 weights", "conv 1x1 weights")
    works = [work for work in (*step.forward, *step.backward) if work.kind in kinds]
    assert len(works) == len(asked)
    for work, (problem, candidates, static) in zip(works, asked, strict=True):
        for name, seconds in candidates.items():
            assert seconds >= rates.floor(work) or name != static, f"{problem}: {name}"
        layer, card = _predict.recall(candidates.layer)
        assert card == H100
        if layer.kind != WEIGHT_GRAD and not layer.transposed:
            assert layer.flop == work.flop
        assert seconds > 0


@pytest.mark.parametrize("card", [H100, H200], ids=["H100", "H200"])
def test_what_favourites_cost(card):
    """By how much predicted time is longer where sizes share kernels, as docs/performance.md says.

    How few kernels that makes of 24 sizes is in tests/benchmarks/test_guard.py.
    """
    longer = []
    for layer in EVERY:
        seconds = {config: one.seconds for config, one in predicted(layer, card).items()}
        longer.append(seconds[best(layer, card)] / min(seconds.values()))
    assert math.exp(math.fsum(map(math.log, longer)) / len(longer)) < 1.06
    assert max(longer) < 1.67


# --------------------------------------------------------------------------------------
# Devices and resources
# --------------------------------------------------------------------------------------


def properties(name, major, minor, count, **more):
    return types.SimpleNamespace(
        name=name, major=major, minor=minor, multi_processor_count=count, **more
    )


def test_known_devices():
    assert device.derive(properties("NVIDIA H100 80GB HBM3", 9, 0, 132)) is H100
    assert device.derive(properties("NVIDIA H200", 9, 0, 132)) is H200
    pcie = device.derive(properties("NVIDIA H100 PCIe", 9, 0, 114))
    assert pcie.half == pytest.approx(H100.half * 114 / 132)
    assert pcie.processors == 114


def test_a_board_is_known_and_its_smaller_sisters_are_part_of_it():
    """Jetson Orin: torch says that of all of them, and Linux hides the rate of their memory."""
    agx = device.derive(properties("Orin", 8, 7, 16))
    assert (agx.name, agx.capability) == ("Orin", (8, 7))
    nano = device.derive(properties("Orin", 8, 7, 8))
    assert nano.half == agx.half / 2
    assert nano.capability == (8, 7)


def test_an_unknown_device_is_derived_from_its_properties():
    """The memory of an L4: 6.25 GHz, 192 bits."""
    found = device.derive(
        properties(
            "NVIDIA L4", 8, 9, 58,
            memory_clock_rate=6_251_000, memory_bus_width=192, L2_cache_size=48 << 20,
        )
    )  # fmt: skip
    assert found.dram == pytest.approx(300e9 * device.REACHED, rel=0.01)
    assert found.l2_size == 48 << 20
    assert (found.name, found.capability, found.processors) == ("NVIDIA L4", (8, 9), 58)
    assert "RTX 4090's by the processor" in found.source
    bare = device.derive(properties("a card of tomorrow", 13, 0, 200))
    assert bare.dram == device.known("", (12, 0)).dram
    assert bare.capability == (13, 0)


def test_estimates_stand_in_for_the_compiler():
    """Within a quarter of the table, for nearly all of what it has, and marked as estimates."""
    wrong, seen = [], 0
    for layer in EVERY:
        for config in cost.configurations(layer, (9, 0)):
            options = dict(kind=layer.kind, precision="half")
            compiled = resources.of(config, (9, 0), kernel=layer.kernel, **options)
            guessed = resources.estimate(config, (9, 0), **options)
            assert guessed.source == "estimated"
            seen += 1
            pairs = ((compiled.registers, guessed.registers), (compiled.shared, guessed.shared))
            if any(abs(b / a - 1) > 0.35 for a, b in pairs):
                wrong.append((config.name, layer.kind, pairs))
    assert len(wrong) <= seen / 10, wrong[:20]


def test_unknown_configurations_are_estimated():
    config = dataclasses.replace(TILE, block_k=16)
    found = cost.predict(config, rows_of(100), H200)
    assert found.resources.source == "estimated"
    assert "resources estimated" in str(found)


# --------------------------------------------------------------------------------------
# Engines of libraries, and what is measured
# --------------------------------------------------------------------------------------

LAYER = Layer(1, 200, 336, 128, 128, dtype=torch.bfloat16)
GRAPHS = ("cudnn-graph eng8", "cudnn-graph eng9")
OWN = ("conv-sm90 256x128", "conv-sm90 128x128")


def test_engines_of_libraries():
    found = _predict.predict(("aten", *GRAPHS, *OWN), LAYER, H200)
    floor = max(LAYER.flop / H200.half, LAYER.activation_bytes / H200.dram)
    assert list(found) == ["aten", *GRAPHS, *OWN]
    assert all(one.seconds > floor for one in found.values())
    # ATen's convolution is the graph's, and passes besides.
    passes = found["aten"].seconds - found[GRAPHS[0]].seconds
    assert passes > 2 * LAYER.activation_bytes / H200.dram
    # A strip that three taps share asks less of L2.
    triton = _predict.order(LAYER, H200)["tma-256x128-k64-w8-s3"]
    assert found[OWN[0]].l2 < 0.75 * triton.l2
    grad = dataclasses.replace(LAYER, kind=WEIGHT_GRAD)
    wide = _predict.predict(["aten"], grad, H200)["aten"]
    assert wide.compute == pytest.approx(2 * LAYER.flop / H200.half / _predict.CUDNN_EFFICIENCY)


def test_parts_of_small_maps_are_predicted_to_be_faster():
    """And measured beside the best whole tiles, whose kind is another."""
    small = Layer(1, 25, 42, 768, 224, dtype=torch.bfloat16)
    split, whole = "conv-sm90 split 5 128x112", "conv-sm90 128x224"
    found = _predict.predict([split, whole, "conv-sm90 split 2 128x96"], small, H200)
    assert list(found) == [split, whole]  # 96 channels are no tiles of 224.
    assert found[split].seconds < 0.5 * found[whole].seconds
    names = ("aten", split, "conv-sm90 split 8 256x112", whole)
    likely = _predict._candidates(small, H200, names).likely
    assert {split, whole} <= set(likely)
    assert _predict.family(split) == "conv-sm90 split"
    # What is handed over, and CTAs that wait for each other, cost where there is nothing to gain.
    large = [f"conv-sm90{parts} 256x128" for parts in ("", " split 2")]
    found = _predict.predict(large, LAYER, H200)
    assert found[large[0]].seconds < found[large[1]].seconds


def test_the_hopper_convolution_in_fp8():
    """Tiles of e4m3, half the bytes, twice the products, and sums that are added beside them."""
    half = _predict.predict(OWN, LAYER, H200)[OWN[0]]
    layer = dataclasses.replace(LAYER, dtype=torch.float8_e4m3fn)
    found = _predict.predict((*OWN, "conv-sm90 256x192", "conv-sm90 128x256"), layer, H200)
    assert list(found) == list(OWN)
    eight = found[OWN[0]]
    assert eight.compute == pytest.approx(half.compute / 2, rel=0.01)
    assert eight.l2 == pytest.approx(half.l2 / 2, rel=0.01)
    assert half.issue == 0 < eight.issue < eight.compute
    # Of 192 channels, in chunks of 128, only those that there are.
    wide = dataclasses.replace(layer, c_in=192)
    more = _predict.predict(OWN, wide, H200)[OWN[0]]
    assert more.compute == pytest.approx(1.5 * eight.compute, rel=0.01)
    # A feature that is written beside takes longer, and one in its place nearly as long.
    both, alone = (
        _predict.predict(OWN, dataclasses.replace(layer, **beside), H200)[OWN[0]].seconds
        for beside in (dict(added=4 * 128), dict(masked=3 * 128))
    )
    assert eight.seconds < alone < both
    names = ("conv-sm90 split 2 128x128", *OWN)
    likely = _predict._candidates(layer, H200, names).likely
    assert [_predict.family(name) for name in likely][:2] == ["conv-sm90 split", "conv-sm90"]


def test_an_epilogue_under_the_next_tile_is_predicted_to_cost_less():
    """Where a CTA has several tiles. Both kinds are measured, each by its best."""
    alike = [f"conv-sm90{turns} 128x128 cluster 2x1" for turns in ("", " turns")]
    found = _predict.predict(alike, LAYER, H200)
    together, turns = (found[name] for name in alike)
    assert turns.waves > 2
    assert turns.seconds < together.seconds
    # Products of all tiles but for those of the last round: nothing is faster than they are.
    assert turns.seconds > turns.compute
    assert set(alike) <= set(_predict._candidates(LAYER, H200, tuple(alike)).likely)
    assert _predict.family(alike[1]) == "conv-sm90 turns"
    # A single tile of a CTA has no next one.
    small = dataclasses.replace(LAYER, height=50, width=84, c_in=192, c_out=192)
    found = _predict.predict(["conv-sm90 128x192", "conv-sm90 turns 128x192"], small, H200)
    assert len({one.seconds for one in found.values()}) == 1
    # And larger tiles, which fetch less, are for both together.
    wide = dataclasses.replace(LAYER, height=100, width=168, c_in=160, c_out=160)
    names = [config.name for config in conv_sm90.configs(160)]
    found = _predict.predict(names, wide, H200)
    assert min(found, key=lambda name: found[name].seconds) == "conv-sm90 256x160"


def test_the_likely_ones_are_few():
    names = ("aten", *GRAPHS, *OWN)
    found = _predict._candidates(LAYER, H200, names)
    assert list(found)[: len(names)] == list(names)
    own = [name for name in found.likely if _predict.family(name) == "triton"]
    assert 1 <= len(own) <= _predict.MEASURED
    assert best(LAYER).name in own
    others = [name for name in found.likely if name not in own]
    assert [_predict.family(name) for name in others] == ["aten", "cudnn-graph", "conv-sm90"]
    assert others[1] == GRAPHS[0]
    assert _predict.recall(json.loads(json.dumps(found.layer))) == (LAYER, H200)


@pytest.mark.parametrize("described", [{}, {"device": "H100", "capability": [9, 0], "wings": 2}])
def test_a_layer_described_in_another_way_is_refused(described):
    with pytest.raises(ValueError, match="no layer and device"):
        _predict.recall(described)


def test_few_configurations_are_measured_for_a_network():
    """Of V-99 on six cameras."""
    measured = total = 0
    for layer in layers("V-99-eSE", (6, 640, 1600), ("forward",)):
        found = _predict._candidates(layer, H200, ("aten",))
        measured += len(found.likely)
        total += len(found)
    assert measured < total / 2


# --------------------------------------------------------------------------------------
# Regret
# --------------------------------------------------------------------------------------

MACHINE = "NVIDIA H200 sm_90; a test"


@pytest.fixture
def times(tmp_path):
    """A file of times that nobody measured: the predictions', but for one engine in two.

    There the last by prediction, which tuning would not measure, is made twice as fast as
    the first, and where it is made slow the first stays the best.
    """
    choices = {}
    for number, layer in enumerate((LAYER, dataclasses.replace(LAYER, kind="gradient"))):
        predicted = _predict.order(layer, H200)
        seconds = {name: found.seconds for name, found in predicted.items()}
        first, *_, last = seconds
        seconds[first] = 40e-6
        seconds |= {name: 50e-6 for name in seconds if name not in (first, last)}
        seconds[last] = 20e-6 if number else 100e-6
        best = min(seconds, key=lambda name: seconds[name])
        described = _predict.describe(layer, H200)
        choices[f"conv {number}"] = tuning.Choice(best, seconds, described)
    choices["known by name"] = tuning.Choice("aten")
    choices["on unknown tensors"] = tuning.Choice("a", {"a": 1e-6, "b": 2e-6})
    gone = dict(choices["conv 0"].seconds) | {"tma-a-tile-of-yesterday": 1e-6}
    described = _predict.describe(LAYER, H200)
    choices["conv 2"] = tuning.Choice("tma-a-tile-of-yesterday", gone, described)
    file = tmp_path / "made_up.json"
    tuning.export({MACHINE: choices}, file)
    return file


def test_regret(times):
    right, wrong, gone = regret.rows(tuning.load(times))
    assert (right.static_regret, right.tuned_regret) == (1, 1)
    assert right.best == right.static == right.tuned == best(LAYER).name
    assert wrong.static_regret == pytest.approx(2)
    assert wrong.tuned_regret == pytest.approx(2)
    assert (wrong.seconds, wrong.measured) == (20e-6, len(_predict.order(LAYER, H200)) - 1)
    assert gone.best == right.best  # What is not shipped any more does not count.
    summary = regret.Summary.of([right, wrong])
    assert summary.static_mean == pytest.approx(math.sqrt(2))
    assert summary.static_worst == summary.tuned_worst == pytest.approx(2)


def test_regret_is_printed(times, capsys):
    assert cli.main(["tuning", "regret", str(times)]) == 0
    out = capsys.readouterr().out
    assert "2.000" in out
    assert "regret static: geometric mean 1.260, worst 2.000, of 3 problems" in out
    assert cli.main(["tuning", "regret", str(times), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["rows"]) == 3
    assert content["summary"]["static_worst"] == pytest.approx(2)


def test_times_are_shown_beside_predictions(times, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VOVNET_FAST_TUNING_TABLE", raising=False)
    tuning._table.cache_clear()
    assert cli.main(["tuning", "regret"]) == 0
    assert "No problem has the times of several engines" in capsys.readouterr().out
    assert cli.main(["tuning", "import", str(times)]) == 0
    assert cli.main(["tuning", "show"]) == 0
    out = capsys.readouterr().out
    [row] = [line for line in out.splitlines() if line.strip().startswith("conv 0")]
    expected = _predict.order(LAYER, H200)[best(LAYER).name].seconds
    assert row.split()[-2:] == ["40.0", f"{expected * 1e6:.1f}"]
    assert cli.main(["tuning", "regret"]) == 0
    assert "regret tuned: geometric mean 1.260, worst" in capsys.readouterr().out
    tuning._table.cache_clear()
