"""The cuda backend's choice for depthwise layers, with its own kernels on the host."""

import types

import pytest
import torch

pytest.importorskip("triton")  # The cost model is the kernels'.

from tests.csrc import cuda_on_cpu
from tests.csrc.test_depthwise_conv import Pair, depthwise_layers
from vovnet_fast import _optional, tuning
from vovnet_fast.backends import (
    _cuda_conv,
    _cuda_depthwise,
    _extension,
    _predict_depthwise,
    conv_sm80,
    cuda,
    depthwise_conv,
    reference,
)
from vovnet_fast.kernels import cost
from vovnet_fast.kernels.device import CARDS
from vovnet_fast.network.model import VoVNet
from vovnet_fast.ops import conv
from vovnet_fast.ops.features import plan, run
from vovnet_fast.ops.memory import Arena, Memory

A100, H100 = (next(card for card in CARDS if card.name == name) for name in ("A100", "H100"))
FUSED, SEPARATE = depthwise_conv.NAME, depthwise_conv.SEPARATE
HALF = torch.float16


@pytest.fixture
def measured(once, monkeypatch, tmp_path):
    """Has depthwise layers measured as on a GPU, by a clock that says what each engine takes.

    The engines really run, on the host; the 1x1 of two passes is ATen's.
    """
    module = cuda_on_cpu.built(once)
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_extension, "CUDA", _extension.Ops(lambda: module, cuda_on_cpu.on_host))
    monkeypatch.setattr(depthwise_conv, "why_not", lambda device: None)
    monkeypatch.setattr(tuning, "may_measure", lambda device: True)
    monkeypatch.setattr(tuning, "_announce", lambda: None)
    clock, ran = {}, []

    def timer(device):
        def seconds(work):
            work()
            return clock.get(ran[-1].split(" ")[0], 1.0)

        return seconds

    run_engine = _cuda_depthwise.run_engine

    def noted(engine, *args, **options):
        ran.append(engine)
        return run_engine(engine, *args, **options)

    monkeypatch.setattr(_cuda_depthwise, "run_engine", noted)
    monkeypatch.setattr(tuning, "_device_timer", timer)
    return clock, ran


def on_host():
    """The backend, with the passes that it took from its half of the extension on the host."""
    chosen = ("conv", "conv_statistics", "depthwise_conv", "depthwise_conv_statistics")
    functions = {name: getattr(cuda, name) for name in chosen}
    passes = {name: getattr(_extension.CUDA, name) for name in ("normalize", "batch_norm_finish")}
    return types.SimpleNamespace(**functions, **passes)


class Noting(Memory):
    """New memory, and the roles that it was asked for."""

    def __init__(self):
        self.roles = []

    def scratch(self, role, like, *shape):
        self.roles.append(role)
        return super().scratch(role, like, *shape)


def params(pair, **options):
    tensors = (pair.weight, pair.scale, pair.shift)
    return conv.ConvParams(*tensors, pair.stride, pair.taps, **options)


def close(found, exact):
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("fastest", [FUSED, SEPARATE])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pool", [False, True])
def test_the_fastest_that_is_right_runs(pool, stride, fastest, measured):
    """What was found out is remembered; one kernel needs no memory for what is between."""
    clock, ran = measured
    clock[fastest] = 0.5
    pair = Pair(1, 5, 6, 16, 80, stride=stride)
    exact = pair.affine().relu()
    for _ in range(2):
        ran.clear()
        memory = Noting()
        kept = conv.run(on_host(), pair.x, params(pair), pair.out, memory, pool=pool)
        assert ran[-1].startswith(fastest)
        close(pair.out, exact)
        if pool:
            torch.testing.assert_close(
                kept.partials.double().sum(1), exact.sum((1, 2)), rtol=1e-2, atol=0.05
            )
        else:
            assert kept.partials is None
    assert len(ran) == 1
    assert memory.roles == ([] if fastest == FUSED else ["spatial"])
    [(problem, choice)] = tuning.table().choices()[tuning.machine(torch.device("cpu"))].items()
    assert problem.startswith(f"depthwise conv 1x1 stride {stride} 16>80 on")
    assert problem.endswith("float16 pool in CUDA C++" if pool else "float16 in CUDA C++")
    assert set(choice.seconds) == {SEPARATE, "depthwise-conv 128x80"}


@pytest.mark.parametrize("fastest", [FUSED, SEPARATE])
def test_norms_of_the_batch(fastest, measured):
    clock, ran = measured
    clock[fastest] = 0.5
    pair = Pair(2, 5, 6, 16, 80, stride=2)
    conv.run(on_host(), pair.x, params(pair, eps=1e-5), pair.out, Memory())  # Which measures.
    memory = Noting()
    kept = conv.run(on_host(), pair.x, params(pair, eps=1e-5), pair.out, memory)
    assert ran[-1].startswith(fastest)
    raw = pair.product()
    close(kept.raw, raw)
    flat = raw.flatten(0, 2)
    normed = (raw - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-5).sqrt()
    exact = (normed * pair.scale.double() + pair.shift.double()).relu()
    torch.testing.assert_close(pair.out.double(), exact, rtol=1e-2, atol=1e-2)
    [choices] = tuning.table().choices().values()
    assert "statistics" in next(problem for problem in choices if "depthwise" in problem)
    assert memory.roles == (["raw"] if fastest == FUSED else ["raw", "spatial"])


def test_an_engine_that_is_wrong_is_never_chosen(measured, monkeypatch):
    clock, ran = measured
    clock[FUSED] = 0.1
    run = depthwise_conv.run

    def wrong(engine, x, taps, weight, out, **options):
        partials = run(engine, x, taps, weight, out, **options)
        out[..., -1, :] += 1
        return partials

    monkeypatch.setattr(depthwise_conv, "run", wrong)
    for eps in (None, 1e-5):
        pair = Pair(1, 5, 6, 16, 80)
        conv.run(on_host(), pair.x, params(pair, eps=eps), pair.out, Memory())
        assert ran[-1] == SEPARATE


def test_partials_that_are_wrong_are_found_out(measured, monkeypatch):
    clock, ran = measured
    clock[FUSED] = 0.1
    run = depthwise_conv.run

    def wrong(*args, **options):
        partials = run(*args, **options)
        return None if partials is None else partials.mul_(1.1)

    monkeypatch.setattr(depthwise_conv, "run", wrong)
    for options in (dict(pool=True), {}):
        pair = Pair(1, 5, 6, 16, 80)
        eps = None if options else 1e-5
        conv.run(on_host(), pair.x, params(pair, eps=eps), pair.out, Memory(), **options)
        assert ran[-1] == SEPARATE


def test_fp32_that_may_not_be_rounded_to_tf32_takes_two_passes(measured):
    """The host's tensors ask for fp32: products of TF32 do not pass, however fast."""
    clock, ran = measured
    clock[FUSED] = 0.1
    pair = Pair(1, 5, 6, 16, 80, dtype=torch.float32)
    conv.run(on_host(), pair.x, params(pair), pair.out, Memory())
    assert any(engine.startswith(FUSED) for engine in ran)
    assert ran[-1] == SEPARATE


def test_without_measurements_it_is_two_passes(measured, monkeypatch):
    _, ran = measured
    monkeypatch.setattr(tuning, "may_measure", lambda device: False)
    pair = Pair(1, 5, 6, 16, 80)
    conv.run(on_host(), pair.x, params(pair), pair.out, Memory())
    assert ran == [SEPARATE]
    close(pair.out, pair.affine().relu())


def test_without_triton_nothing_is_predicted_and_all_is_measured(measured, monkeypatch):
    clock, ran = measured
    clock[FUSED] = 0.5
    monkeypatch.setattr(_optional, "why_not", {"triton": "triton is not installed"}.get)
    monkeypatch.setattr(_predict_depthwise, "candidates", None)
    pair = Pair(1, 5, 6, 16, 224)
    conv.run(on_host(), pair.x, params(pair), pair.out, Memory())
    assert set(ran) == {SEPARATE, *(config.name for config in depthwise_conv.configs(224))}
    pair.check(pair.affine().relu())


def test_what_the_kernel_does_not_take_is_two_passes_at_once(measured):
    _, ran = measured
    for pair in (Pair(1, 5, 6, 12, 80), Pair(1, 5, 6, 16, 72), Pair(0, 5, 6, 16, 80)):
        conv.run(on_host(), pair.x, params(pair), pair.out, Memory(), pool=True)
        conv.run(on_host(), pair.x, params(pair, eps=1e-5), pair.out, Memory())
    assert set(ran) == {SEPARATE}
    assert not tuning.table().choices()


def test_the_1x1_of_two_passes_has_a_choice_of_its_own(measured, monkeypatch):
    """It is made in a run of the layer itself, and never in the trial, whose images are few."""
    _, ran = measured
    monkeypatch.setattr(conv_sm80, "why_not", lambda device: None)
    monkeypatch.setattr(_cuda_conv, "cudnn", lambda: True)
    trial = _cuda_depthwise.trial

    def watched(*args, **options):
        inner = trial(*args, **options)

        def tried(engine):
            found = inner(engine)
            assert not tuning.table().choices()
            return found

        return tried

    monkeypatch.setattr(_cuda_depthwise, "trial", watched)
    pair = Pair(1, 5, 6, 16, 80)
    conv.run(on_host(), pair.x, params(pair), pair.out, Memory())
    [choices] = tuning.table().choices().values()
    assert {problem.split(" 1x1")[0] for problem in choices} == {"conv", "depthwise conv"}
    assert ran


def test_backends_without_one_kernel_take_two_passes():
    pair = Pair(1, 5, 6, 16, 80, stride=2, dtype=torch.float32)
    memory = Noting()
    conv.run(reference, pair.x, params(pair), pair.out, memory)
    assert memory.roles == ["spatial"]
    torch.testing.assert_close(pair.out.double(), pair.affine().relu(), rtol=5e-3, atol=5e-3)


@torch.no_grad()
def test_a_network_in_an_arena(measured, monkeypatch):
    """All depthwise layers of V-19-slim-dw, the stem's with stride 2 too, from slot to slot."""
    _, ran = measured

    def choose(device, problem, candidates, static, run, timer=None, prepare=None):
        return next((name for name in candidates if name.startswith(FUSED)), static)

    monkeypatch.setattr(tuning, "choose", choose)
    model = VoVNet("V-19-slim-dw-eSE").eval().to(HALF)
    for norm in (module for module in model.modules() if hasattr(module, "running_var")):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
    folded = model.fold(HALF)
    image = torch.randn(1, 40, 72, 3, dtype=HALF)
    sizes = plan((1, 3, 40, 72), folded, model.out_features)
    arena = Arena(sizes, HALF, image.device)
    ops = _extension.CUDA
    passes = {name: getattr(ops, name) for name in ("gates", "apply_gates", "max_pool")}
    backend = types.SimpleNamespace(**vars(on_host()), **passes)
    found = run(backend, image, folded.packed(HALF), model.out_features, arena)
    assert len(ran) == 14
    assert all(engine.startswith(FUSED) for engine in ran)
    exact = run(reference, image.double(), model.double().fold(torch.double),
                         model.out_features)  # fmt: skip
    for ours, expected in zip(found, exact):
        error = (ours.double() - expected).norm() / expected.norm()
        assert error < 5e-3


# --------------------------------------------------------------------------------------
# What is predicted
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "statistics"])
@pytest.mark.parametrize("device", [A100, H100], ids=lambda device: device.name)
def test_a_prediction_has_a_floor(device, kind):
    """No engine is predicted to beat memory, and two passes never less than their traffic."""
    for c_in, c_out, stride in depthwise_layers():
        layer = cost.Layer(8, 100, 168, c_in, c_out, kernel=1, dtype=HALF, tma=False, kind=kind)
        read, written = stride**2 * layer.pixels * c_in * 2, layer.pixels * c_out * 2
        names = [config.name for config in depthwise_conv.configs(c_out)]
        for name in names:
            found = _predict_depthwise.predict(name, layer, stride, device)
            assert found.seconds > found.dram >= (read + written) / device.dram
            # Processors of sm_80 make half as many multiply-adds as they issue instructions.
            issued = layer.pixels * c_in * 9 * (2 if device is A100 else 1)
            assert found.issue > issued / device.lanes / device.processors
        separate = _predict_depthwise.predict(SEPARATE, layer, stride, device)
        between = layer.pixels * c_in * 2
        assert separate.seconds > (read + 2 * between + written) / device.dram


def test_wide_tiles_are_for_large_maps_and_narrow_ones_for_small():
    """Where there is work for all processors the depthwise part is not made twice."""
    for batch, height, width, first in ((8, 50, 84, 224), (1, 13, 21, 112)):
        layer = cost.Layer(batch, height, width, 224, 224, kernel=1, dtype=HALF, tma=False)
        found = {
            config.block_out: _predict_depthwise.predict(config.name, layer, 1, A100).seconds
            for config in depthwise_conv.configs(224)
        }
        assert min(found, key=lambda block: found[block]) == first, found


def test_candidates_are_two_passes_and_the_best_of_ours():
    layer = cost.Layer(1, 50, 84, 224, 224, kernel=1, dtype=HALF, tma=False)
    names = tuple(config.name for config in depthwise_conv.configs(224))
    found = _predict_depthwise._candidates(layer, 1, A100, names)
    assert tuple(found) == (SEPARATE, *names)
    assert found.likely == (SEPARATE, min(names, key=lambda name: found[name]))
