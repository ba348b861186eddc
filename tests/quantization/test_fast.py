"""A network in int8 by the extension: the features of plain PyTorch, bit for bit."""

import copy
import pickle
import threading

import pytest
import torch

import vovnet_fast
from tests.extension_cases import require
from tests.quantization import cases
from tests.tiny import TINY
from vovnet_fast import use_backend
from vovnet_fast.backends import BackendError
from vovnet_fast.backends.cpu import int8


@pytest.fixture(autouse=True)
def _it_runs_here():
    require("cpu")
    reason = int8.why_not(torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)


def features(quantized, x, backend="cpu"):
    with use_backend(backend):
        return quantized(x)


def assert_exact(quantized, x):
    theirs, ours = features(quantized, x, "reference"), features(quantized, x)
    assert len(theirs) == len(ours)
    assert all(map(torch.equal, theirs, ours))


@pytest.mark.parametrize("stem", ["int8", "wide"])
@pytest.mark.parametrize("name", TINY)
def test_features_are_exact(name, stem):
    """On the first call, the recorded one, and those after it; of one size and another."""
    quantized = copy.deepcopy(cases.quantized(name, stem=stem))
    for seed in range(4):
        assert_exact(quantized, cases.images(seed=seed))
    assert_exact(quantized, cases.images(1, height=65, width=33))
    assert_exact(quantized, cases.images(seed=5).to(memory_format=torch.channels_last))


def test_more_levels_are_exact_too():
    quantized = copy.deepcopy(cases.quantized(levels=255))
    for seed in range(3):
        assert_exact(quantized, cases.images(seed=seed))


@pytest.mark.parametrize(
    "out_features", [("stem_2",), ("stem_2", "stem"), ("stem", "stage3"), ("stage4",)]
)
@pytest.mark.parametrize("name", ["seed", "torchhub", "depthwise"])
def test_any_features(name, out_features):
    model = cases.model(name, out_features=out_features)
    quantized = vovnet_fast.quantize(model, [cases.images(6)], report=False, **cases.QUICK)
    for seed in range(3):
        assert_exact(quantized, cases.images(seed=seed))


def test_calls_are_recorded():
    quantized = copy.deepcopy(cases.quantized())
    for seed in range(3):
        features(quantized, cases.images(seed=seed))
    made = quantized._caches.made
    workspace = made.workspaces.take(cases.images().permute(0, 2, 3, 1).shape)
    assert workspace.replay.calls > len(quantized.network.layers)


def test_calls_of_wide_layers_are_recorded():
    """What their weights allow is looked up, not computed: of a recorded call nothing may be."""
    model = vovnet_fast.VoVNet("V-39-eSE", out_features=("stage5",)).eval()
    images = torch.randn(1, 3, 64, 64)
    options = dict(calibrator="minmax", report=False)
    quantized = vovnet_fast.quantize(model, [images], **options)
    for _ in range(3):
        features(quantized, images)
    workspace = quantized._caches.made.workspaces.take(images.permute(0, 2, 3, 1).shape)
    assert workspace.replay.calls > len(quantized.network.layers)


def test_results_are_kept():
    """What was returned stays as it is while others are made."""
    quantized = copy.deepcopy(cases.quantized())
    found = [features(quantized, cases.images(seed=seed)) for seed in range(5)]
    for seed, ours in enumerate(found):
        assert all(
            map(torch.equal, features(quantized, cases.images(seed=seed), "reference"), ours)
        )


def test_weights_may_change():
    """In place, by a state dict, by assignment: the next call is of what is there."""
    quantized, x = copy.deepcopy(cases.quantized()), cases.images(seed=1)
    before = [features(quantized, x) for _ in range(3)][-1]
    other = vovnet_fast.quantize(
        cases.model(), [cases.images(6, seed=3) * 2], stem="int8", report=False, **cases.QUICK
    )
    if other.wide_stem == quantized.wide_stem:
        quantized.load_state_dict(other.state_dict())
        assert_exact(quantized, x)
        assert not all(map(torch.equal, before, features(quantized, x)))
    quantized.weight_1.neg_()
    assert_exact(quantized, x)
    quantized.bias_2 = quantized.bias_2 + 1000
    assert_exact(quantized, x)
    quantized.scales.mul_(2)
    assert_exact(quantized, x)
    quantized.weight_1.numpy()[:] = 3  # Nobody counts this.
    quantized.refresh()
    assert_exact(quantized, x)


def test_copies_and_pickles_run():
    quantized, x = copy.deepcopy(cases.quantized()), cases.images(seed=1)
    for _ in range(3):
        wanted = features(quantized, x)
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        for _ in range(3):
            assert all(map(torch.equal, wanted, features(other, x)))


def test_buffers_made_in_inference_mode():
    """They count no writes: nothing is kept."""
    with torch.inference_mode():
        quantized = vovnet_fast.quantize(
            cases.model(), [cases.images(6)], report=False, **cases.QUICK
        )
        for seed in range(3):
            assert_exact(quantized, cases.images(seed=seed))


def test_several_threads():
    quantized = copy.deepcopy(cases.quantized())
    images = [cases.images(seed=seed) for seed in range(4)]
    wanted = [features(quantized, x, "reference") for x in images]
    wrong = []

    def work(i):
        for _ in range(10):
            if not all(map(torch.equal, features(quantized, images[i]), wanted[i])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_auto_is_the_fast_way():
    quantized, x = copy.deepcopy(cases.quantized()), cases.images(seed=1)
    features(quantized, x, "auto")
    assert quantized._caches.made is not None
    with torch.device("meta"), pytest.raises(ValueError, match="the image is on meta"):
        features(quantized, torch.empty(1, 3, 40, 48), "auto")


def test_who_watches_functions_sees_them():
    from torch.utils.flop_counter import FlopCounterMode

    quantized, x = copy.deepcopy(cases.quantized()), cases.images(seed=1)
    with FlopCounterMode(display=False) as counter:
        features(quantized, x, "auto")
    assert counter.get_total_flops() > 0


@pytest.mark.skipif("fp8" not in cases.DTYPES, reason="this torch has no fp8")
def test_fp8_has_no_fast_way():
    quantized, x = cases.quantized(dtype="fp8"), cases.images()
    features(quantized, x, "auto")
    with pytest.raises(BackendError, match="cpu backend cannot run a VoVNet in fp8: it has no ops"):
        features(quantized, x, "cpu")
