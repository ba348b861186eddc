"""The pickles of torch.save: the same tensors as torch.load makes, and nothing run for the rest."""

import collections
import contextlib
import datetime
import enum
import pathlib
import random
import sys
import types

import numpy as np
import pytest
import torch

from tests.tiny import TINY
from vovnet_fast import VoVNet, checkpoints
from vovnet_fast.checkpoints import CheckpointError, archives
from vovnet_fast.checkpoints.tensors import Inert

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def read(path, mmap=False):
    return archives.load(path, mmap=mmap, part=lambda content: content)


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
        assert getattr(found, "_metadata", None) == getattr(expected, "_metadata", None)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_same(one, other)
    elif isinstance(expected, torch.Tensor):
        for told in ("dtype", "shape", "device", "requires_grad", "is_conj", "is_neg", "stride"):
            one, other = getattr(found, told), getattr(expected, told)
            assert (one() == other()) if callable(one) else one == other
        assert found.storage_offset() == expected.storage_offset()
        if not expected.is_meta:
            assert found.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
            assert found.detach().tolist() == expected.detach().tolist()
    else:
        assert found == expected


def random_tensor(rng):
    x = torch.randint(-9, 9, [rng.randint(0, 5) for _ in range(rng.randint(0, 4))])
    x = x.to(rng.choice(DTYPES))
    for _ in range(rng.randint(0, 3)):
        if x.ndim:
            axis = rng.randrange(x.ndim)
            x = rng.choice(
                (
                    lambda x=x, axis=axis: x.transpose(0, axis),
                    lambda x=x, axis=axis: x.narrow(axis, x.shape[axis] // 2, x.shape[axis] // 3),
                    lambda x=x, axis=axis: x.unsqueeze(axis).expand(
                        *x.shape[:axis], 3, *x.shape[axis:]
                    ),
                    lambda x=x, axis=axis: x.flatten()[::2],
                )
            )()
    if x.is_complex() and rng.random() < 0.5:
        x = x.conj()
    if x.is_floating_point() and rng.random() < 0.3:
        x = torch.nn.Parameter(x, rng.random() < 0.5)
    return x


def random_content(rng, deep=0):
    kind = rng.random()
    if deep < 3 and kind < 0.5:
        items = [random_content(rng, deep + 1) for _ in range(rng.randint(0, 5))]
        if kind < 0.2:
            return {f"k{i}": item for i, item in enumerate(items)}
        if kind < 0.3:
            return collections.OrderedDict(enumerate(items))
        return tuple(items) if kind < 0.4 else items
    if kind < 0.8:
        return random_tensor(rng)
    return rng.choice(
        [None, True, 7, -(1 << 70), 2.5, "ü", torch.Size([2, 3]), torch.float16, torch.bfloat16]
    )


@pytest.mark.versions
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_random_contents_are_what_torch_load_makes_of_them(tmp_path, zipped, mmap):
    path = tmp_path / "x.pth"
    for seed in range(25):
        rng = random.Random(seed)
        content = [random_content(rng)]
        shared = random_tensor(rng)
        content = {"all": content, "again": [content, shared, shared[None]]}
        torch.save(
            content,
            path,
            _use_new_zipfile_serialization=zipped,
            pickle_protocol=rng.choice([2, 3, 4]),
        )
        found = read(path, mmap)
        assert_same(found, torch.load(path, weights_only=False))
        assert found["again"][0] is found["all"]
        memory = [x.untyped_storage().data_ptr() for x in found["again"][1:]]
        assert memory[0] == memory[1]


def test_a_module_s_state_dict(tmp_path):
    """With its versions, and of a module that has parameters with attributes."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    module[0].weight.ours = True
    torch.save([module.state_dict(), module.state_dict(keep_vars=True)], tmp_path / "x.pth")
    found = read(tmp_path / "x.pth")
    assert_same(found, torch.load(tmp_path / "x.pth", weights_only=False))
    assert found[0]._metadata["1"] == {"version": 2}


def test_dtypes_of_which_storages_have_no_name(tmp_path):
    for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32"):
        with contextlib.suppress(AttributeError, KeyError):  # Older ones cannot save them.
            x = torch.arange(8, dtype=torch.uint8).view(getattr(torch, name))
            torch.save({"x": x}, tmp_path / "x.pth")
            found = read(tmp_path / "x.pth")["x"]
            assert found.dtype == x.dtype
            assert found.view(torch.uint8).tolist() == [*range(8)]


# --------------------------------------------------------------------------------------
# What trainers put beside the weights
# --------------------------------------------------------------------------------------


class HistoryBuffer:
    """As mmengine's: an object with a state."""

    def __init__(self):
        self._log_history = np.arange(6.0)
        self._statistics = {"mean": None}


class Registered(list):
    """A list with items and attributes."""


class Colour(enum.Enum):
    RED = 1


class Slots:
    __slots__ = ("x",)

    def __init__(self):
        self.x = 1


class ByArguments:
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (1,), {"two": 2}


def beside():
    several = Registered([1, 2])
    several.name = "x"
    return {
        "message_hub": {
            "log_scalars": collections.OrderedDict(loss=HistoryBuffer()),
            "runtime_info": {"epoch": np.int64(3), "seed": np.uint32(7), "time": np.float64(0.5)},
        },
        "meta": {
            "time": datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
            "path": pathlib.PurePosixPath("/a"),
            "classes": {"car", "bus"},
            "frozen": frozenset([1]),
            "kind": Colour.RED,
            "complex": 1j,
            "slots": Slots(),
            "arguments": ByArguments(),
            "several": several,
            "counts": collections.defaultdict(int, a=1),
            "counter": collections.Counter("aab"),
            "queue": collections.deque([1], maxlen=2),
            "function": collections.namedtuple,
            "bytes": b"abc",
            "range": range(3),
            (0, 1): "a key that is no string",
        },
        "objects": np.array([{}, None], dtype=object),
        "rng": np.random.default_rng(0).bit_generator.state["state"],
        "module": torch.nn.Linear(2, 2),
        "sparse": torch.eye(3).to_sparse(),
        "device": torch.device("cpu"),
        "generator": torch.get_rng_state(),
    }


@pytest.mark.versions
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_trainers_files(tmp_path, zipped, protocol):
    module = torch.nn.Conv2d(3, 4, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.ones(1, 3, 2, 2)).sum().backward()
    optimizer.step()
    whole = {**beside(), "state_dict": module.state_dict(), "optimizer": optimizer.state_dict()}
    path = tmp_path / "epoch_1.pth"
    torch.save(whole, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = read(path)
    assert list(found) == list(whole)
    assert_same(found["state_dict"], module.state_dict())
    assert_same(found["optimizer"], optimizer.state_dict())
    assert isinstance(found["module"], Inert)
    assert found["meta"]["time"].name == "datetime.datetime"
    assert repr(found["sparse"]) == "<torch._utils._rebuild_sparse_tensor, which was not made>"
    assert checkpoints.read(path).keys() == module.state_dict().keys()


def test_no_module_is_imported(tmp_path):
    made = types.ModuleType("imported_by_a_trainer")
    made.Thing = type("Thing", (), {"__module__": made.__name__})
    sys.modules[made.__name__] = made
    torch.save({"x": torch.ones(2), "thing": made.Thing()}, tmp_path / "x.pth")
    del sys.modules[made.__name__]
    found = read(tmp_path / "x.pth")
    assert found["thing"].name == "imported_by_a_trainer.Thing"
    assert made.__name__ not in sys.modules


def test_a_whole_module_is_no_state_dict(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError, match=r"got <torch\.nn\.modules\.linear\.Linear, which was"
    ):
        checkpoints.read(tmp_path / "x.pth")


def test_a_weight_that_was_not_made_is_named(tmp_path):
    model = VoVNet(TINY["detectron2"])
    state = {
        k: v.to_sparse() if "stage3" in k and v.ndim else v for k, v in model.state_dict().items()
    }
    torch.save(state, tmp_path / "x.pth")
    words = r"'stage3.*' is a sparse tensor, expected a plain tensor: to_dense\(\) it, and save"
    with pytest.raises(CheckpointError, match=words):
        checkpoints.load(model, tmp_path / "x.pth")
