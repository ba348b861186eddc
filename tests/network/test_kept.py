"""What a network keeps between calls is right, whatever becomes of its weights."""

import concurrent.futures
import contextlib
import copy
import gc
import io
import os
import pickle
import threading
import types
import weakref

import pytest
import torch
from torch import nn

from tests import straight_line
from tests.backends.test_cpu_backend import threads
from tests.extension_cases import require
from tests.features import compared
from tests.tiny import TINY
from vovnet_fast import VoVNet, backends, ops
from vovnet_fast.backends.cpu import convolution, packing
from vovnet_fast.compat import zip
from vovnet_fast.network import decision, keeping, structure
from vovnet_fast.replay import fingerprint
from vovnet_fast.replay import kept as replay_kept

TIMES = 4
"""Calls until all that is kept is there, and one that uses it."""


@pytest.fixture(autouse=True)
def _built():
    require("cpu")
    torch.manual_seed(0)
    with threads(1):
        yield


def network(spec="detectron2", **options):
    return straight_line.randomise(VoVNet(TINY.get(spec, spec), **options)).eval()


def image(*shape):
    return torch.randn(*(shape or (1, 3, 40, 48)))


@torch.no_grad()
def run(model, x, backend="cpu"):
    with backends.use_backend(backend):
        return model(x)


def at_once(model, x, backend="cpu"):
    """As it is where nothing is kept: weights are folded and packed for this call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOVNET_FAST_KEEP_WEIGHTS", "0")
        return run(model, x, backend)


def settle(model, x):
    for _ in range(TIMES):
        found = run(model, x)
    assert form(model) is not None
    return found


def form(model):
    kept = keeping._kept.get(model)
    return None if kept is None else kept._form


def recorded(model):
    return [w.replay.calls for _, w in form(model).workspaces._spare]


def same(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def norm_of(model):
    return model.stage3._modules["OSA3_2"].layers[1]._modules["OSA3_2_1/norm"]


def conv_of(model):
    return model.stage3._modules["OSA3_2"].layers[1]._modules["OSA3_2_1/conv"]


# --------------------------------------------------------------------------------------
# The same bits
# --------------------------------------------------------------------------------------


@pytest.mark.versions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", TINY)
def test_every_call_gives_the_same_bits(spec, dtype):
    """As calls that keep nothing: in any layout, on any number of threads, in inference mode."""
    model = network(spec, out_features=("stem", "stage3", "stage5")).to(dtype)
    for shape in ((1, 3, 40, 48), (2, 3, 33, 47)):
        x = image(*shape).to(dtype)
        expected = at_once(model, x)
        for _ in range(TIMES):
            found = run(model, x)
            assert same(found, expected)
            assert [f.stride() for f in found] == [f.stride() for f in expected]
            assert not any(f.requires_grad or f.is_inference() for f in found)
        with torch.inference_mode():
            assert same(run(model, x), expected)
        with threads(3):
            assert same(run(model, x), expected)
        last = x.contiguous(memory_format=torch.channels_last)
        wide = torch.zeros(shape[0], 5, shape[2], shape[3] + 3, dtype=dtype)
        wide[:, 1:4, :, 2:-1] = x
        negative = [torch._neg_view(-t) for t in (x, last)]
        for view in (last, wide[:, 1:4, :, 2:-1], *negative):
            assert same(run(model, view), expected)
        assert same(run(model, 2 * x), at_once(model, 2 * x))


def test_from_the_third_call_on_nothing_is_folded_packed_or_launched_by_python(monkeypatch):
    if convolution.choose_engine(torch.float32) == "aten":
        pytest.skip("no engine of the extension takes float32 on this processor")
    model, x = network(), image()
    for _ in range(3):
        run(model, x)
    [calls] = recorded(model)
    assert calls > len(form(model).params.convs())

    def never(*args, **options):
        raise AssertionError("it was to be kept")

    for module, name in (
        (model, "fold"), (ops, "features"), (packing, "pack"), (replay_kept, "run"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, never)
    run(model, x)
    run(model, x.contiguous(memory_format=torch.channels_last))


@pytest.mark.versions
def test_autocast_and_other_dtypes():
    model, x = network(), image()
    # Where no fp16 is convolved, there is no autocast to it either.
    for dtype in compared((torch.bfloat16, torch.float16, torch.bfloat16)):
        context = torch.autocast("cpu", dtype)
        for enabled in (True, False):
            for given in (x, x.double()) if enabled else (x,):
                with context if enabled else contextlib.nullcontext():
                    expected = at_once(model, given)
                    for _ in range(TIMES):
                        assert same(run(model, given), expected)


def test_what_is_returned_stays_as_it_is():
    model, x = network(), image()
    settle(model, x)
    first = run(model, x)
    values = [f.clone() for f in first]
    for _ in range(3):
        run(model, image())
    assert same(first, values)
    first[0].zero_()
    assert same(run(model, x), values)


def test_images_without_elements_and_of_wrong_kinds():
    model, x = network(), image()
    settle(model, x)
    assert [f.shape[0] for f in run(model, x[:0])] == [0] * 4
    with pytest.raises(ValueError, match="channels"):
        run(model, image(1, 4, 40, 48))
    with pytest.raises(TypeError, match="parameters"):
        run(model, x.half())
    with pytest.raises(ValueError, match="too small"):
        run(model, image(1, 3, 8, 8))
    assert form(model) is not None


# --------------------------------------------------------------------------------------
# Weights that change
# --------------------------------------------------------------------------------------


def step(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    with backends.use_backend("reference"):
        sum(f.square().mean() for f in model(image(2, 3, 40, 48))).backward()
    optimiser.step()


def train_step(model):
    model.norm_eval = False
    model.train()
    step(model)
    model.eval()


def statistics_alone(model):
    model.norm_eval = False
    model.train()
    run(model, image(2, 3, 40, 48), "reference")
    model.eval()


def load(model):
    model.load_state_dict(network().state_dict())


def load_assigned(model):
    model.load_state_dict(network().state_dict(), assign=True)


def copy_into_data(model):
    conv_of(model).weight.data.copy_(torch.randn_like(conv_of(model).weight))


def assign_data(model):
    conv_of(model).weight.data = torch.randn_like(conv_of(model).weight)


def one_element_by_numpy(model):
    conv_of(model).weight.detach().numpy()[3, 2, 1, 0] += 1


def one_bit_by_numpy(model):
    conv_of(model).weight.detach().numpy().view("int32")[5, 4, 1, 1] ^= 1 << 22


def by_dlpack(model):
    torch.from_dlpack(norm_of(model).running_var.__dlpack__()).mul_(2)


def in_inference_mode(model):
    with torch.inference_mode():
        norm_of(model).bias.add_(0.5)


def by_view(model):
    with torch.no_grad():
        conv_of(model).weight[0].flatten().mul_(3)


def swap_rows(model):
    weight = conv_of(model).weight.data
    weight[[0, 1]] = weight[[1, 0]]


def swap_tensors(model):
    a, b = norm_of(model).weight, norm_of(model).bias
    a.data, b.data = b.data, a.data


def swap_roles(model):
    """The same tensors in the same order under other names."""
    norm = norm_of(model)
    weight, bias = norm.weight, norm.bias
    del norm.weight, norm.bias
    norm.bias, norm.weight = weight, bias


def swap_layers(model):
    block = model.stage4._modules["OSA4_1"]
    first, second = block.layers[0], block.layers[1]
    convs = first._modules["OSA4_1_0/conv"], second._modules["OSA4_1_1/conv"]
    with torch.no_grad():
        convs[1].weight.copy_(convs[0].weight[:, : convs[1].weight.shape[1]])


def zero(model):
    conv_of(model).weight.data.zero_()


def change_eps(model):
    norm_of(model).eps = 0.3


def replace_module(model):
    block = model.stage3._modules["OSA3_2"]
    new = nn.BatchNorm2d(norm_of(model).num_features).eval()
    block.layers[1]._modules["OSA3_2_1/norm"] = new


def replace_parameter(model):
    conv_of(model).weight = nn.Parameter(torch.randn_like(conv_of(model).weight))


def replace_buffer(model):
    norm_of(model).running_mean = torch.randn_like(norm_of(model).running_mean)


def without_affine(model):
    norm_of(model).weight = None


def with_conv_bias(model):
    conv_of(model).bias = nn.Parameter(torch.randn(conv_of(model).out_channels))


def frozen_norms(model):
    model.load_state_dict(network(norm_cfg=dict(type="FrozenBN")).state_dict(), strict=False)


def strange_strides(model):
    weight = conv_of(model).weight
    wide = torch.randn(*weight.shape[:3], 2 * weight.shape[3])
    weight.data = wide[..., ::2]


def expanded(model):
    norm = norm_of(model)
    norm.running_mean = torch.full((1,), 0.3).expand(norm.num_features)


def channels_last_and_new(model):
    model.to(memory_format=torch.channels_last)
    conv_of(model).weight.data.mul_(1.5)


def shared(model):
    model.share_memory()
    conv_of(model).weight.data[1].neg_()


def average(model):
    """As ``torch.optim.swa_utils`` has it."""
    averaged = torch.optim.swa_utils.AveragedModel(model)
    step(model)
    averaged.update_parameters(model)
    model.load_state_dict(averaged.module.state_dict())


def vector_to_parameters(model):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 1.1, model.parameters())


def reset(model):
    model.reset_parameters()


CHANGES = [
    step, train_step, statistics_alone, load, load_assigned, copy_into_data, assign_data,
    one_element_by_numpy, one_bit_by_numpy, by_dlpack, in_inference_mode, by_view, swap_rows,
    swap_tensors, swap_roles, swap_layers, zero, change_eps, replace_module, replace_parameter,
    replace_buffer, without_affine, with_conv_bias, frozen_norms, strange_strides, expanded,
    channels_last_and_new, shared, average, vector_to_parameters, reset,
]  # fmt: skip


@pytest.mark.versions
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_followed(change):
    model, x = network(), image()
    before = settle(model, x)
    change(model)
    expected = at_once(model, x)
    assert not same(expected, before)
    for _ in range(TIMES):
        assert same(run(model, x), expected)
    assert form(model) is not None


@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_a_change_at_any_time_is_followed(times):
    """Also where what is kept is only half made; and changed back, everything is as before."""
    model, x = network(), image()
    expected = at_once(model, x)
    weight = conv_of(model).weight.data
    for _ in range(times):
        run(model, x)
    for _ in range(3):
        weight.neg_()
        assert same(run(model, x), at_once(model, x))
        weight.neg_()
        assert same(run(model, x), expected)


@pytest.mark.parametrize("spec", TINY)
def test_a_flipped_bit_of_any_tensor_is_seen(spec):
    model = network(spec)
    assert model.why_not_one_op() is None
    tensors = structure.known(model).tensors()
    layout = fingerprint.layout(tensors, fingerprint.places(tensors))
    before = fingerprint.content(tensors, layout)
    for tensor in model.state_dict().values():
        if not tensor.is_floating_point():  # Batches that were counted, which nothing depends on.
            continue
        bits = tensor.numpy().reshape(-1).view("int32")
        place = int(torch.randint(0, bits.size, ()))
        bits[place] ^= 1
        assert fingerprint.content(tensors, layout) != before
        bits[place] ^= 1
    assert fingerprint.content(tensors, layout) == before


def test_two_that_take_turns_by_data_are_followed():
    """As hooks do that swap averages in before every validation, and out after it."""
    pytest.importorskip("mmengine")
    from mmengine.hooks import EMAHook
    from mmengine.model import ExponentialMovingAverage

    model, x = network(), image()
    hook = EMAHook()
    hook.src_model, hook.ema_model = model, ExponentialMovingAverage(model, momentum=0.3)
    for _ in range(2):  # The first time it copies.
        hook.ema_model.update_parameters(model)
        step(model)
    versions = [p._version for p in model.parameters()]
    own = settle(model, x)
    for _ in range(2):
        hook._swap_ema_parameters()
        averaged = at_once(model, x)
        assert not same(averaged, own)
        for _ in range(TIMES):
            assert same(run(model, x), averaged)
        hook._swap_ema_parameters()
        for _ in range(TIMES):
            assert same(run(model, x), own)
    assert [p._version for p in model.parameters()] == versions


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, copy.deepcopy])
def test_other_forms_of_it_are_right(convert):
    model, x = network(), image()
    expected = settle(model, x)
    other = convert(model).eval()  # torch 2.1 makes norms in training mode.
    conv_of(other).weight.data.mul_(2)
    for _ in range(TIMES):
        assert same(run(other, x), at_once(other, x))
    if other is not model:
        assert same(run(model, x), expected)
        assert form(other) is not form(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_right(dtype):
    model, x = network(), image()
    expected = settle(model, x)
    model.to(dtype)
    for _ in range(TIMES):
        assert same(run(model, x.to(dtype)), at_once(model, x.to(dtype)))
    assert form(model).dtype == dtype
    model.float()
    assert not same(run(model, x), expected)  # What was rounded stays so.
    assert same(run(model, x), at_once(model, x))


def test_other_features_and_shapes_of_one_network():
    model, x = network(), image()
    settle(model, x)
    model.out_features = ("stage2", "stage4")
    for _ in range(TIMES):
        assert same(run(model, x), at_once(model, x))


def test_weights_that_change_at_every_call_are_never_packed_for_later():
    """An average that follows a training step by step: nothing is kept that is not used."""
    model, x = network(), image()
    for write in (lambda p: p.mul_(1.01), lambda p: p.data.mul_(1.01)):
        for i in range(5):
            with torch.no_grad():
                write(conv_of(model).weight)
            assert same(run(model, x), at_once(model, x))
            assert i == 0 or form(model) is None


def test_weights_that_are_written_to_while_they_are_packed_are_not_kept(monkeypatch):
    model, x = network(), image()
    run(model, x)
    pack = packing.pack

    def written(engine, weight, **options):
        conv_of(model).weight.data.mul_(1.0001)
        return pack(engine, weight, **options)

    monkeypatch.setattr(packing, "pack", written)
    run(model, x)
    if convolution.choose_engine(torch.float32) != "aten":
        assert form(model) is None
    monkeypatch.undo()
    for _ in range(TIMES):
        assert same(run(model, x), at_once(model, x))


# --------------------------------------------------------------------------------------
# What it is no part of
# --------------------------------------------------------------------------------------


def test_copies_pickles_and_state_dicts_know_nothing_of_it():
    model, x = network(), image()
    before, keys, attributes = len(pickle.dumps(model)), list(model.state_dict()), set(vars(model))
    expected = settle(model, x)
    assert len(pickle.dumps(model)) == before
    assert list(model.state_dict()) == keys
    assert set(vars(model)) == attributes
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), copy.copy(model), torch.load(stream, weights_only=False)):
        assert twin not in keeping._kept
        assert same(run(twin, x), expected)
    assert model._replicate_for_data_parallel() not in keeping._kept


def test_it_goes_with_the_module():
    model, x = network(), image()
    settle(model, x)
    gone = weakref.ref(form(model).params.stem[0].scale)
    packed = len(packing._kept)
    del model
    gc.collect()
    assert gone() is None
    assert len(packing._kept) < packed or convolution.choose_engine(torch.float32) == "aten"


@pytest.mark.parametrize("begin", ["train", "gradient"])
def test_it_goes_when_training_begins(begin):
    model, x = network(), image()
    expected = settle(model, x)
    if begin == "train":
        model.train()
    else:
        with backends.use_backend("cpu"):
            model(x)
    assert model not in keeping._kept
    model.eval()
    assert same(run(model, x), expected)


def test_weights_are_kept_once_more_and_not_twice():
    """What is packed has taken the place of what it was packed of."""
    if convolution.choose_engine(torch.float32) == "aten":
        pytest.skip("no engine of the extension takes float32 on this processor")
    model, x = network(), image()
    settle(model, x)
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    for layer in form(model).params.convs():
        assert layer.weight.is_meta
        for t in (layer.scale, layer.shift, layer.depthwise):
            assert t is None or t.untyped_storage().data_ptr() not in own
    assert all(t.untyped_storage().data_ptr() not in own for t in form(model).params.fcs())


def test_it_can_be_switched_off(monkeypatch):
    model, x = network(), image()
    expected = settle(model, x)
    for name, value in (("KEEP_WEIGHTS", "0"), ("CHECK", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(f"VOVNET_FAST_{name}", value)
            other = copy.deepcopy(model)
            for _ in range(TIMES):
                assert same(run(other, x), expected)
            assert other not in keeping._kept
    monkeypatch.setenv("VOVNET_FAST_KEEP_WEIGHTS", "no")
    with pytest.raises(ValueError, match="VOVNET_FAST_KEEP_WEIGHTS must be one of 0, 1"):
        run(model, x)


# --------------------------------------------------------------------------------------
# Shapes, threads, processes
# --------------------------------------------------------------------------------------


def test_a_few_shapes_that_come_again_have_arenas():
    model = network()
    settle(model, image())
    sides = range(40, 40 + 2 * replay_kept.KEPT_ARENAS)
    for side in sides:
        run(model, image(1, 3, side, side))
    assert len(recorded(model)) == 1  # Shapes that come once have none.
    for side in sides:
        x = image(1, 3, side, side)
        assert same(run(model, x), at_once(model, x))
    assert len(recorded(model)) == replay_kept.KEPT_ARENAS
    assert keeping._kept[model]._shapes.maxlen == replay_kept.KNOWN_SHAPES


@pytest.mark.parametrize("known", [True, False])
def test_threads_do_not_share_memory(known):
    model = network()
    images = [image() for _ in range(4)]
    expected = [at_once(model, x) for x in images]
    if known:
        settle(model, images[0])
    barrier = threading.Barrier(4)

    def work(i):
        torch.set_num_threads(1)
        barrier.wait()
        return all(same(run(model, images[i]), expected[i]) for _ in range(10))

    with threads(1), concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_it_works_after_a_fork_while_others_held_its_lock():
    model, x = network(), image()
    with threads(1):
        expected = settle(model, x)
        kept = keeping._kept[model]
        with kept._lock, packing._lock:  # As if another thread were about to pack.
            child = os.fork()
            if child == 0:
                fine = all(same(run(model, x), expected) for _ in range(TIMES))
                os._exit(0 if fine and form(model) is not None else 1)
        for _ in range(3000):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            threading.Event().wait(0.01)
        else:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child waits for a lock that nobody holds there")
    assert status == 0
    assert same(run(model, x), expected)


# --------------------------------------------------------------------------------------
# Who goes other ways
# --------------------------------------------------------------------------------------


def test_small_images_run_as_modules_until_the_weights_are_packed(monkeypatch, tmp_path):
    """So that under ``auto`` no call is slower than plain PyTorch, whatever changes."""
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    model, x = network(), image()
    with torch.no_grad(), backends.use_backend("auto"):
        decided = model.decide(x)
    if not decided.op:
        pytest.skip(f"auto runs no op here: {decided.why}")
    assert decided is decision.SMALL_AT_FIRST
    plain, packed = at_once(model, x, "auto"), at_once(model, x)
    assert not same(plain, packed)
    assert same(run(model, x, "auto"), plain)
    for _ in range(TIMES):
        assert same(run(model, x, "auto"), packed)
    conv_of(model).weight.data.mul_(2)
    assert same(run(model, x, "auto"), at_once(model, x, "auto"))
    monkeypatch.setenv("VOVNET_FAST_KEEP_WEIGHTS", "0")
    with torch.no_grad(), backends.use_backend("auto"):
        assert model.decide(x) is decision.SMALL


def test_who_is_watching_sees_what_ran_before():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    model, x = network(), image()
    expected = settle(model, x)
    with Names() as names:
        assert same(run(model, x), expected)
    assert "vovnet_fast::features" in names.names
    called = []
    hook = conv_of(model).register_forward_hook(lambda *_: called.append(1))
    run(model, x, "auto")
    assert called
    hook.remove()
    with nn.modules.module.register_module_forward_hook(lambda *_: called.append(1)):
        run(model, x, "auto")
    assert len(called) > 2
    for a, b in zip(torch.func.vmap(model, randomness="error")(x[None]), expected, strict=True):
        torch.testing.assert_close(a[0], b, rtol=1e-3, atol=1e-3)
    assert same(settle(model, x), expected)


def test_changed_modules_run_as_modules():
    model, x = network(), image()
    settle(model, x)
    norm = norm_of(model)
    forward = norm.forward
    norm.forward = types.MethodType(lambda self, x: 2 * forward(x), norm)
    assert same(run(model, x, "auto"), at_once(model, x, "auto"))
    del norm.forward
    model.stem._modules["stem_1/conv"].stride = (1, 1)
    assert same(run(model, x, "auto"), at_once(model, x, "auto"))
