"""A network is filled completely or not at all, whoever fills it and whatever with."""

import collections
import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import straight_line
from tests.tiny import TINY
from vovnet_fast import VoVNet, checkpoints, compat, freeze
from vovnet_fast.checkpoints import CheckpointError

SPEC = TINY["detectron2"]
KEY = "stage5.OSA5_2.concat.OSA5_2_concat/conv.weight"
"""Of the last block: what fails here finds everything before it copied, if it was."""
COUNTER = "stage5.OSA5_2.concat.OSA5_2_concat/norm.num_batches_tracked"


def quantised(value):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)


def nested(value):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(list(value))


def compressed(value):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return value.flatten(1).to_sparse_csr()


def huge(value):
    value = value.double()
    value.flatten()[3] = 1e300
    return value


BAD = {
    "int8": (lambda v: v.to(torch.int8), "is torch.int8, expected one of torch.float32"),
    "uint8": (lambda v: v.to(torch.uint8), "is torch.uint8, expected one of"),
    "int32": (lambda v: v.to(torch.int32), "is torch.int32, expected one of"),
    "int64": (lambda v: v.to(torch.int64), "is torch.int64, expected one of"),
    "bool": (lambda v: v > 0, "is torch.bool, expected one of"),
    "complex64": (lambda v: v.to(torch.complex64), "is torch.complex64, expected one of"),
    "complex128": (lambda v: v.to(torch.complex128), "is torch.complex128, expected one of"),
    "fp8": (lambda v: v.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, expected one of"),
    "fp8 e5m2": (lambda v: v.to(torch.float8_e5m2), "Dequantise them with their scales"),
    "quantised": (quantised, r"is quantised (torch.qint8), expected a plain tensor: dequantize()"),
    "sparse": (lambda v: v.to_sparse(), "is torch.sparse_coo, expected torch.strided: to_dense()"),
    "sparse rows": (compressed, "is torch.sparse_csr, expected torch.strided: to_dense()"),
    "nested": (nested, "is a nested tensor, expected a plain one: unbind()"),
    "meta": (lambda v: v.to("meta"), "is on the meta device, and has a shape but no values"),
    "list": (lambda v: v.tolist(), "is no tensor but list"),
    "array": (lambda v: v.numpy(), "is no tensor but ndarray"),
    "none": (lambda v: None, "is no tensor but NoneType"),
    "huge": (huge, "holds 1 values that are finite in torch.float64 and infinite in torch.float32"),
}


@functools.cache
def network(dtype=torch.float32):
    """One for all that is refused, which leaves it as it is."""
    return VoVNet(SPEC).to(dtype)


@functools.cache
def published():
    return straight_line.randomise(VoVNet(SPEC)).state_dict()


def filled():
    return {key: value.clone() for key, value in published().items()}


def in_dtype(dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in filled().items()}


def by_load(model, state):
    checkpoints.load(model, state)


def by_module(model, state):
    model.load_state_dict(state)


def by_module_not_strict(model, state):
    model.load_state_dict(state, strict=False)


def by_detector(model, state):
    detector = nn.ModuleDict({"backbone": model})
    detector.load_state_dict({f"backbone.{key}": value for key, value in state.items()})


WAYS = (by_load, by_module, by_module_not_strict, by_detector)


def assert_refused(model, way, state, words):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as raised:
        way(model, state)
    for word in words:
        assert word in str(raised.value)
    assert_same(model.state_dict(), before)
    model.load_state_dict(before)


def assert_same(state, other):
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_weight_is_refused_and_nothing_is_written(kind, way):
    damage, words = BAD[kind]
    state = filled()
    state[KEY] = damage(state[KEY])
    assert_refused(network(), way, state, [KEY, words])


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind not in ("meta", "huge")])
def test_what_is_no_weight_is_not_converted(kind):
    damage, words = BAD[kind]
    state = filled()
    state[KEY] = damage(state[KEY])
    with pytest.raises(CheckpointError) as raised:
        checkpoints.convert(state, SPEC)
    assert KEY in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize("way", WAYS)
def test_what_overflows_in_the_network_s_dtype_is_refused(way):
    for dtype, value in ((torch.float16, 1e5), (torch.bfloat16, 3.4e38)):
        state = filled()
        state[KEY].flatten()[:2] = value
        assert_refused(network(dtype), way, state, [KEY, "holds 2 values", str(dtype)])
        state[KEY].flatten()[:2] = 1
        way(network(dtype), state)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_of_weights_is_taken(way, dtype):
    state = in_dtype(dtype)
    model = VoVNet(SPEC)
    way(model, state)
    assert_same(model.state_dict(), {k: v.to(model.state_dict()[k]) for k, v in state.items()})


@pytest.mark.parametrize("way", WAYS[:3])  # The other one joins names before they are seen.
@pytest.mark.parametrize("wrong", [7, ("stem", 0), None, b"stem.stem_1/conv.weight"])
def test_keys_that_are_no_strings(way, wrong):
    state = filled()
    state[wrong] = state[KEY]
    assert_refused(network(), way, state, [f"the key {wrong!r} is no string"])


def test_a_shape_that_differs_stops_the_others():
    for way in WAYS[1:]:
        state = filled()
        state[KEY] = state[KEY][:-1]
        words = [KEY, f"is {list(state[KEY].shape)}, expected {list(published()[KEY].shape)}"]
        assert_refused(network(), way, state, words)


def test_a_strict_load_compares_names_first():
    missing, surplus = filled(), filled()
    del missing[KEY]
    surplus["head.weight"] = torch.zeros(1)
    for state, words in (
        (missing, f'1 Missing key(s) in state_dict: "{KEY}"'),
        (surplus, '1 Unexpected key(s) in state_dict: "head.weight"'),
    ):
        assert_refused(network(), by_module, state, [words, "checkpoints.load"])
        VoVNet(SPEC).load_state_dict(state, strict=False)


def test_counters():
    """Files of before batches were counted load; those that say that they have them must."""
    model = VoVNet(SPEC)
    without = {k: v for k, v in filled().items() if "num_batches" not in k}
    model.load_state_dict(without)
    assert model.state_dict()[COUNTER] == 0
    known = model.state_dict()
    del known[COUNTER]
    assert_refused(model, by_module, known, [f'1 Missing key(s) in state_dict: "{COUNTER}"'])
    frozen = VoVNet(SPEC, norm_cfg=dict(type="FrozenBN"))
    frozen.load_state_dict(filled())
    VoVNet(SPEC).load_state_dict(frozen.state_dict())
    for wrong in (torch.tensor(True), torch.tensor(1j), torch.tensor(1, dtype=torch.int8)):
        state = {**filled(), COUNTER: wrong}
        for way in WAYS:
            assert_refused(network(), way, state, [COUNTER, "expected torch.int64"])
    VoVNet(SPEC).load_state_dict({**filled(), COUNTER: torch.tensor([3.0])})


@pytest.mark.parametrize("way", WAYS)
def test_all_that_is_amiss_is_counted(way):
    state = {k: v.to(torch.int8) if v.ndim == 4 else v for k, v in filled().items()}
    count = sum(v.ndim == 4 for v in state.values())
    number = str(count - 1 if way is by_load else count - 4)
    assert_refused(network(), way, state, ["stem.stem_1/conv.weight", number])


def test_tensors_that_take_the_place_of_parameters():
    """assign=True: their own dtype, and skeletons; but nothing that is no weight."""
    model = VoVNet(SPEC)
    model.load_state_dict(in_dtype(torch.float64), assign=True)
    assert model.first_weight.dtype == torch.float64
    model.load_state_dict({k: v.to("meta") for k, v in filled().items()}, assign=True)
    assert model.first_weight.is_meta
    for kind in ("int8", "complex64", "quantised", "sparse", "fp8"):
        state = filled()
        state[KEY] = BAD[kind][0](state[KEY])
        before = VoVNet(SPEC)
        first = before.first_weight
        with pytest.raises(CheckpointError, match="expected"):
            before.load_state_dict(state, assign=True)
        assert before.first_weight is first


def test_a_network_on_the_meta_device_holds_nothing():
    with torch.device("meta"):
        model = VoVNet(SPEC)
    with pytest.raises(CheckpointError, match=r"on the meta device .*to_empty\(device='cpu'\)"):
        checkpoints.load(model, filled())
    model = model.to_empty(device="cpu")
    state = filled()
    checkpoints.load(model, state)
    assert_same(model.state_dict(), state)


def test_loading_under_modes():
    """Values that cannot be seen are not looked at."""
    state = filled()
    with FakeTensorMode(allow_non_fake_inputs=True):
        VoVNet(SPEC).load_state_dict(in_dtype(torch.float64))
    with torch.device("meta"):
        VoVNet(SPEC).to_empty(device="cpu").load_state_dict(state)


class Stubborn(torch.Tensor):
    """A subclass that can be looked at but not copied."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_ and not isinstance(args[0], Stubborn):
            raise NotImplementedError("only among themselves")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("way", WAYS)
def test_subclasses_are_tried_before_anything_is_copied(way):
    state = filled()
    state[KEY] = state[KEY].as_subclass(Stubborn)
    words = ["cannot be copied", "only among themselves", "set_model_state_dict"]
    assert_refused(network(), way, state, [KEY, *words])


def test_a_frozen_network_is_filled_completely_or_not_at_all():
    frozen = freeze(network())
    key = list(frozen.state_dict())[-3]
    for damage, words in BAD.values():
        state = {k: v.clone() for k, v in frozen.state_dict().items()}
        state[key] = damage(torch.stack([state[key], state[key]]))
        assert_refused(frozen, by_module, state, [key, words])
        state.pop(key)
        assert_refused(frozen, by_module, state, [key, "1 Missing"])


def test_parts_that_read_other_names_than_they_write_are_left_to_pytorch():
    model = VoVNet(SPEC)
    state = filled()

    def rename(_, state_dict, prefix, *__):
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}old")

    conv = model.stem.get_submodule("stem_1/conv")
    compat.register_load_state_dict_pre_hook(conv, rename)
    state["stem.stem_1/conv.old"] = state.pop("stem.stem_1/conv.weight")
    model.load_state_dict(state)
    assert torch.equal(model.first_weight, state["stem.stem_1/conv.old"])


class Endless(collections.UserDict):
    """A mapping that makes a new one of itself each time that it is asked."""

    def get(self, key, default=None):
        return Endless(self.data)

    __getitem__ = get


def test_state_dicts_that_hold_themselves():
    for wrapper in ("state_dict", "model"):
        state = {wrapper: {}, **filled()}
        state[wrapper] = state
        for mapping in (state, {wrapper: {"model": state}}, Endless()):
            with pytest.raises(CheckpointError, match="holds itself"):
                checkpoints.load(VoVNet(SPEC), mapping)
            with pytest.raises(CheckpointError, match="holds itself"):
                checkpoints.convert(mapping, SPEC)
            with pytest.raises(CheckpointError, match="holds itself"):
                checkpoints.identify(mapping)
    state = filled()
    for _ in range(5):
        state = {"state_dict": {"model": state}}
    checkpoints.load(VoVNet(SPEC), state)
    with pytest.raises(CheckpointError, match="no tensor but dict"):
        checkpoints.load(VoVNet(SPEC), {**filled(), KEY: state})
