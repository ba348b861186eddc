"""Launches, FLOP and bytes of forward passes, counted on meta tensors: no GPU, no interpreter.

Triton is imported inside the tests only: tests/kernels chooses its interpreter on import.
"""

import contextlib
import functools
import importlib
import inspect
import json
import pkgutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vovnet_fast import VoVNet, _optional, backends, specs
from vovnet_fast.arithmetic import DTYPES
from vovnet_fast.quantization import formats
from vovnet_fast.tools import cli, plan
from vovnet_fast.tools.plan import Plan, Rates, Row, Tally, plan_forward, quantized_work

_MISSING = _optional.why_not("triton")
needs_triton = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))

SMALL = (2, 64, 96)
SIDES = ("fused", "eager")
NAMES = ("launches", "flop", "bytes_read", "bytes_written", "floor_seconds")


@functools.cache
def planned(name, shape=SMALL, dtype="bf16"):
    return plan_forward(name, shape, dtype=dtype)


def launches(tally):
    return {row.kind: row.launches for row in tally.rows}


# GFLOP; GB fused and eager; floor of the fused path in ms. From an independent count that
# left out pool partials and the indices that eager's max pool writes: hence the tolerance.
KNOWN = {
    ("V-39-eSE", (1, 800, 1344)): (303, 0.95, 2.54, 0.44),
    ("V-39-eSE", (8, 800, 1344)): (2424, 7.3, 20.0, 3.54),
    ("V-99-eSE", (1, 800, 1344)): (707, 1.8, 4.8, 1.01),
    ("V-99-eSE", (6, 320, 800)): (1009, 2.6, 6.9, 1.44),
    ("V-99-eSE", (6, 640, 1600)): (4037, 9.9, 27.0, 5.77),
}


@needs_triton
@pytest.mark.parametrize(("name", "shape"), KNOWN)
def test_known_figures(name, shape):
    gflop, fused, eager, floor_ms = KNOWN[name, shape]
    found = planned(name, shape)
    assert found.fused.total.flop / 1e9 == pytest.approx(gflop, rel=2e-3)
    assert found.fused.total.bytes_moved / 1e9 == pytest.approx(fused, rel=0.03)
    assert found.eager.total.bytes_moved / 1e9 == pytest.approx(eager, rel=0.03)
    assert found.fused.total.floor_seconds * 1e3 == pytest.approx(floor_ms, rel=0.02)


def expected_launches(spec):
    """What the fused path launches, from the architecture alone."""
    blocks = list(spec.blocks())
    layers = sum(block.num_layers for block in blocks)
    spatial = layers + 2 if spec.depthwise else 0
    expected = {
        "conv 3x3": 1 if spec.depthwise else 3 + layers,
        "conv 1x1": len(blocks) + sum(block.reduction for block in blocks) + spatial,
        "depthwise 3x3": spatial,
        "eSE pool + FC": 2 * sum(block.ese for block in blocks),
        "gate + identity": sum(block.ese or block.identity for block in blocks),
        "max pool": 6 - spec.first_pooled_stage,  # Stages 2 to 5.
    }
    return {kind: count for kind, count in expected.items() if count}


@needs_triton
@pytest.mark.parametrize("name", specs.names())
def test_every_architecture(name):
    spec, found = specs.get(name), planned(name)
    fused, eager = found.fused.total, found.eager.total
    expected = expected_launches(spec)
    assert launches(found.fused) == expected
    assert launches(found.eager)["batch norm"] == expected["conv 3x3"] + expected["conv 1x1"]
    assert launches(found.eager)["cat"] == len(list(spec.blocks()))
    for kind in ("conv 3x3", "conv 1x1", "depthwise 3x3", "max pool"):
        assert launches(found.eager).get(kind, 0) == expected.get(kind, 0)
    assert set(launches(found.eager)) <= set(plan.work.KINDS), "an operation without a kind"
    assert fused.flop == eager.flop
    assert fused.bytes_moved < eager.bytes_moved
    assert fused.launches < eager.launches
    assert fused.floor_seconds < eager.floor_seconds


@needs_triton
@pytest.mark.parametrize("name", ["V-39-eSE", "vovnet-19-slim-dw", "vovnet39a"])
def test_flop_are_those_that_torch_counts(name):
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        VoVNet(name).eval()(torch.empty(SMALL[0], 3, *SMALL[1:]))
    assert planned(name).eager.total.flop == counter.get_total_flops()


@needs_triton
def test_totals_are_sums():
    found = planned("V-39-eSE")
    for tally in (found.fused, found.eager):
        for name in NAMES:
            assert getattr(tally.total, name) == sum(getattr(row, name) for row in tally.rows)
        moved = [row.bytes_moved for row in tally.rows]
        assert tally.total.bytes_moved == sum(moved)


@needs_triton
def test_dtypes():
    bf16, fp16, fp32 = (planned("V-19-slim-eSE", dtype=dtype) for dtype in plan.DTYPES)
    assert fp16.fused == bf16.fused
    assert fp32.fused.total.flop == bf16.fused.total.flop
    assert launches(fp32.eager) == launches(bf16.eager)
    # Indices of the pools stay 8 bytes, and scales and pool partials 4.
    for name in ("fused", "eager"):
        ratio = getattr(fp32, name).total.bytes_moved / getattr(bf16, name).total.bytes_moved
        assert 1.8 < ratio < 2


@needs_triton
def test_rates():
    rates = Rates(tflops=100, tbs=1)
    slow = plan_forward("V-19-slim-eSE", SMALL, rates=rates)
    fast = plan_forward("V-19-slim-eSE", SMALL, rates=Rates(tflops=200, tbs=2))
    assert slow.rates == rates
    assert fast.fused.total.floor_seconds == pytest.approx(slow.fused.total.floor_seconds / 2)
    # A pool computes nothing: its floor is its traffic.
    pool = next(row for row in slow.fused.rows if row.kind == "max pool")
    assert pool.floor_seconds == pytest.approx(pool.bytes_moved / 1e12)


@needs_triton
def test_chosen_backend_does_not_matter(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT, "triton")
    assert plan_forward("V-19-slim-eSE", SMALL) == planned("V-19-slim-eSE")


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "stride", "pool", "form"),
    [(3, 1, False, "tma"), (3, 2, False, "pointer"), (1, 1, True, "tma")],
)
def test_traffic_of_a_convolution(kernel, stride, pool, form):
    """A slot of a concat buffer counts as a slot, and each operand once."""
    from vovnet_fast.kernels import conv

    x = meta(2, 20, 24, 96)[..., :32]
    weight, scale, shift = meta(64, kernel, kernel, 32), *meta(2, 64, dtype=torch.float32)
    out = meta(2, 20 // stride, 24 // stride, 128)[..., 64:]
    partials = None
    if pool:
        tiles = conv.pool_tiles(x, weight, out)
        partials = meta(2, tiles, 64, dtype=torch.float32)
    launch = conv.plan(x, weight, scale, shift, out, stride=stride, pool_partials=partials)
    assert launch.kernel.fn.__name__ == f"conv_{form}_kernel"
    work = plan.launch_work(launch)
    pixels = 2 * 20 * 24
    assert work.kind == f"conv {kernel}x{kernel}"
    assert work.flop == 2 * (pixels // stride**2) * 64 * 32 * kernel**2
    assert work.bytes_read == pixels * 32 * 2 + 64 * 32 * kernel**2 * 2 + 2 * 64 * 4
    assert work.bytes_written == pixels // stride**2 * 64 * 2 + (2 * tiles * 64 * 4 if pool else 0)


@needs_triton
@pytest.mark.parametrize("identity", [False, True])
def test_traffic_of_a_gate(identity):
    from vovnet_fast.kernels import ese

    z, buffer = meta(2, 5, 7, 64), meta(2, 5, 7, 256)
    added = buffer[..., :64] if identity else None
    gates = meta(2, 64, dtype=torch.float32)
    work = plan.launch_work(ese.plan_apply(z, gates, added, buffer[..., 64:128]))
    features = 2 * 5 * 7 * 64 * 2
    assert work.bytes_read == features * (2 if identity else 1) + 2 * 64 * 4
    assert work.bytes_written == features
    assert (work.kind, work.flop) == ("gate + identity", 0)


@needs_triton
def test_every_kernel_is_known():
    """A new kernel, or an output that was renamed, must be written down in plan/launches.py."""
    from vovnet_fast import kernels

    found = {}
    for module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel") and hasattr(value, "fn"):
                found[name] = set(inspect.signature(value.fn).parameters)
    assert set(found) == set(plan.launches._KERNELS)
    for name, kernel in plan.launches._KERNELS.items():
        assert set(kernel.outputs) <= found[name]


@needs_triton
def test_unknown_kernel():
    from vovnet_fast.kernels import max_pool
    from vovnet_fast.kernels._common import Launch

    class Unknown:
        def fn(self):
            pass

    with pytest.raises(LookupError, match=r"fn with arguments x_ptr is not what _KERNELS"):
        plan.launch_work(Launch(Unknown(), (1,), dict(x_ptr=meta(1))))
    with pytest.raises(LookupError, match="write there which of them it writes"):
        plan.launch_work(Launch(max_pool.max_pool_kernel, (1,), dict(x_ptr=meta(1))))


@needs_triton
def test_recording_ends():
    from vovnet_fast.kernels import max_pool
    from vovnet_fast.kernels._common import recording

    x, out = meta(1, 4, 4, 16), meta(1, 2, 2, 16)
    with recording() as outer:
        with contextlib.suppress(ZeroDivisionError), recording() as inner:
            max_pool.max_pool(x, out, "ceil")
            raise ZeroDivisionError
        assert (len(inner), len(outer)) == (1, 0)
        max_pool.max_pool(x, out, "ceil")
    assert (len(inner), len(outer)) == (1, 1)


def test_aten_operations():
    """Views and allocations are free; a copy does not read where it writes."""
    x, y = meta(4, 8), meta(8, 4)
    with plan.AtenRecorder() as recorder:
        view = x.t()[1:].unsqueeze(0)
        torch.empty_like(view)
        y.copy_(x.t())
        torch.cat([x, x, view[0].t()], dim=1)
        y.relu_()
        y.as_strided_((4, 8), (8, 1))
    assert recorder.works == [
        plan.Work("copy_", 0, 64, 64),
        plan.Work("cat", 0, 64 + 56, 2 * 64 + 56),  # x twice is read once.
        plan.Work("relu_", 0, 64, 64),
    ]


@needs_triton
def test_copies_of_the_fused_path_count():
    """The stem, returned as a feature, is copied into the first concat buffer."""
    names = ("stem", "stage2", "stage3", "stage4", "stage5")
    with torch.device("meta"), torch.no_grad():
        model = VoVNet("V-19-slim-eSE", out_features=names).bfloat16().eval()
        image = torch.empty(2, 3, 64, 96, dtype=torch.bfloat16)
        works = plan.forward.fused_work(model, image.to(memory_format=torch.channels_last))
    stem = 2 * 128 * 16 * 24 * 2
    assert [work for work in works if work.kind == "copy_"] == [plan.Work("copy_", 0, stem, stem)]


@needs_triton
@pytest.mark.parametrize("words", ["V-99-eSE 6x640x1600", "vovnet-19-slim-dw 99x9999x9999"])
def test_table_fits_a_terminal(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["bench", "--plan", *words.split()]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    for word in (*words.split(), "bf16", "790 TFLOP/s", "4.3 TB/s", "H200", "not measured"):
        assert word in out
    for word in ("conv 3x3", "eSE pool + FC", "batch norm", "fused, total", "fused : eager"):
        assert word in out


@needs_triton
def test_table_says_whose_rates(capsys):
    words = "bench --plan V-19-slim-eSE 1x64x64 --dtype fp32"
    assert cli.main(words.split()) == 0
    assert "for fp32 the floor is too low" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*words.split(), "--peak-tflops", "60", "--bandwidth-tbs", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "60 TFLOP/s" in out
    assert "2 TB/s" in out
    assert "H200" not in out


def rebuild(found):
    tallies = [Tally(tuple(Row(**row) for row in found[name]["rows"])) for name in SIDES]
    return Plan(
        found["spec"], tuple(found["shape"]), found["dtype"], Rates(**found["rates"]), *tallies
    )


@needs_triton
def test_json(capsys):
    words = "bench --json --plan ese_vovnet19b_slim_dw 2x64x96 --dtype fp16"
    assert cli.main(words.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured"] is False
    expected = planned("ese_vovnet19b_slim_dw", dtype="fp16")
    assert rebuild(found) == expected
    for name in SIDES:
        assert Row(**found[name]["total"]) == getattr(expected, name).total


def assert_error(capsys, words, message):
    assert cli.main(["bench", *words]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("vovnet-fast bench: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


SHAPES = ["640x1600", "6x3x640x1600", "6x640x", "0x64x64", "6X64X64", "6x64.0x64", "6", ""]


@pytest.mark.parametrize("shape", SHAPES)
def test_malformed_shapes(capsys, shape):
    message = "is written NxHxW, images by height by width, as in 6x640x1600; got " + repr(shape)
    assert_error(capsys, ["--plan", "V-39-eSE", shape], message)


@needs_triton
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--plan V-38-eSE 1x64x64", "did you mean V-39-eSE"),
        ("--plan V-39-eSE 1x20x20", "an image of 20x20 is too small"),
        ("--plan V-39-eSE 1x64x64 --peak-tflops 0", "the matrix rate must be positive"),
        ("--plan V-39-eSE 1x64x64 --bandwidth-tbs nan", "the bandwidth must be positive"),
    ],
)
def test_errors_are_one_line(capsys, words, message):
    assert_error(capsys, words.split(), message)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["V-39-eSE", "V-19-slim-dw-eSE"])
def test_eight_bits_multiply_as_often_and_move_half(name, dtype):
    """Features are in fp32 in all formats but the halves, and one launch more rounds images."""
    shape = (1, 320, 320)
    found = quantized_work(name, shape, formats.require(dtype, None))
    fused = plan_forward(name, shape).fused
    assert sum(work.flop for work in found) == fused.total.flop
    assert len(found) == fused.total.launches + 1

    def moved(works):
        return sum(w.bytes_read + w.bytes_written for w in works if w.kind.startswith("conv"))

    halves = sum(row.bytes_moved for row in fused.rows if row.kind.startswith("conv"))
    assert 0.5 < moved(found) / halves < 0.6, "vectors of channels have four bytes a number"
    with pytest.raises(ValueError, match="too small"):
        quantized_work(name, (1, 20, 20), formats.require(dtype, None))


@needs_triton
def test_errors_of_the_function():
    with pytest.raises(ValueError, match="dtype must be one of bf16, fp16, fp32, got 'int8'"):
        plan_forward("V-39-eSE", SMALL, dtype="int8")
    with pytest.raises(ValueError, match="N, H and W must be at least 1"):
        plan_forward("V-39-eSE", (0, 64, 64))


def test_without_triton(capsys, monkeypatch):
    monkeypatch.setattr(_optional, "why_not", lambda module: f"{module} is broken")
    assert_error(capsys, ["--plan", "V-39-eSE", "1x64x64"], "with Triton: triton is broken")


def test_bench_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "--help"])
    assert "--plan SPEC NxHxW" in capsys.readouterr().out
