"""Pickles in files of torch.save that are there to do harm, or damaged."""

import contextlib
import io
import os
import pathlib
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest
import torch

from tests.checkpoints.test_tensors import HistoryBuffer, assert_same, read
from vovnet_fast import checkpoints
from vovnet_fast.checkpoints import CheckpointError
from vovnet_fast.checkpoints.tensors import Inert


def archive(tmp_path, pickled, storages=None, compression=zipfile.ZIP_STORED):
    """A file with a pickle and storages of one's own."""
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", pickled)
        for key, content in ({"0": bytes(32)} if storages is None else storages).items():
            file.writestr(f"x/data/{key}", content)
    return path


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def tensor(
    stride, size=b"K\x02\x85", offset=0, numel=8, key="0", kind=b"ctorch\nFloatStorage\n",
    name=b"ctorch._utils\n_rebuild_tensor_v2\n", more=b"", times=1,
):  # fmt: skip
    """A pickle of a tensor; of several, one after another, of which the last one is the result."""
    stride = b"K\x01\x85" if stride == b"\x85" else stride
    storage = (
        b"((X\x07\0\0\0storage" + kind + number(key) + b"X\x03\0\0\0cpu" + number(numel) + b"tQ"
    )
    one = name + storage + number(offset) + size + stride + b"\x89}" + more + b"tR"
    return b"\x80\x02" + b"0".join([one] * times) + b"."


def refused(path):
    with pytest.raises(CheckpointError) as caught:
        checkpoints.read(path)
    assert str(caught.value).startswith(f"cannot read {path}: ")
    with pytest.raises(CheckpointError) as mapped:
        checkpoints.read(path, mmap=True)
    assert str(mapped.value) == str(caught.value)
    return str(caught.value)


def test_the_pickles_of_these_tests_are_ones(tmp_path):
    found = read(archive(tmp_path, tensor(b"\x85"), {"0": struct.pack("<8f", *range(8))}))
    assert_same(found, torch.tensor([0.0, 1.0]).new_tensor(range(8))[:2])


class Calls:
    """Names a function, with arguments."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


@pytest.mark.versions
@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (Calls(os.system, "touch ran"), f"{os.system.__module__}.system"),
        (Calls(eval, "open('ran', 'w')"), ".eval"),
        (Calls(exec, "open('ran', 'w')"), ".exec"),
        (Calls(open, "ran", "w"), "io.open"),
        (Calls(__import__, "ran"), ".__import__"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_there_to_run_is_refused_by_its_name(tmp_path, monkeypatch, evil, name, protocol):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": torch.ones(1), "evil": evil}, "x.pth", pickle_protocol=protocol)
    said = refused(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()
    assert f"{name}, for which weights have no use" in said
    assert "was not run" in said


@pytest.mark.parametrize("protocol", [2, 4])
def test_others_are_called_by_nobody(tmp_path, monkeypatch, protocol):
    """Functions that trainers might have a use for, in a list and as a tensor's hooks."""
    monkeypatch.chdir(tmp_path)
    evils = [
        Calls(getattr, "", "format"),
        Calls(np.fromfile, "x.pth"),
        Calls(torch.load, "x.pth"),
        Calls(torch.hub.load, "a/b"),
        Calls(pathlib.Path.touch, pathlib.PurePosixPath("ran")),
        Calls(HistoryBuffer),
    ]
    hooked = Calls(torch._utils._rebuild_parameter, torch.ones(2), False, {"0": evils})
    torch.save({"evils": evils, "x": hooked}, "x.pth", pickle_protocol=protocol)
    found = read(tmp_path / "x.pth")
    assert all(isinstance(evil, Inert) for evil in found["evils"])
    assert found["x"].tolist() == [1, 1]
    assert os.listdir(tmp_path) == ["x.pth"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(stride=b"\x85", size=b"K\x09\x85"), "storage that has 8"),
        (dict(stride=b"J\xff\xff\xff\xff\x85"), "expected none below 0"),
        (dict(stride=b"\x85", size=b"J\xff\xff\xff\xff\x85"), "expected none below 0"),
        (dict(stride=b"\x85", offset=-1), "begins at element -1"),
        (dict(stride=b"\x85", offset=7), "begins at element 7 of a storage that has 8"),
        (dict(stride=b"\x85", offset=1 << 80), "begins at element"),
        (dict(stride=number(1 << 62) + b"\x85"), "expected none below 0"),
        (dict(stride=number((1 << 62) - 1) + b"\x85"), "storage that has 8"),
        (dict(stride=b"\x85", size=number(1 << 61) + b"\x85"), "storage that has 8"),
        (dict(stride=b"K\0\x85", size=number(1 << 50) + b"\x85"), "again and again"),
        (dict(stride=b"K\0\x85", size=number(1 << 22) + b"\x85", times=100), "again and again"),
        (dict(stride=b"K\0K\0\x86", size=number((1 << 40, 1 << 40))), "again and again"),
        (dict(stride=number((1,) * 65), size=number((1,) * 65)), "at most 64"),
        (dict(stride=number((1, 1))), "1 axes and 2 strides"),
        (dict(stride=number("ab")), "strides are no tuple"),
        (dict(stride=number((1.0,))), "expected none below 0"),
        (dict(stride=number((True,))), "expected none below 0"),
        (dict(stride=b"\x85", numel=9), "has 32 bytes, expected 36"),
        (dict(stride=b"\x85", numel=7), "has 32 bytes, expected 28"),
        (dict(stride=b"\x85", numel=-1), "has -1 elements"),
        (dict(stride=b"\x85", numel=1 << 61), "has 2305843009213693952 elements"),
        (dict(stride=b"\x85", numel=1 << 50), "larger than the file"),
        (dict(stride=b"\x85", numel=8.0), "in another way than PyTorch does"),
        (dict(stride=b"\x85", key="1"), "no member data/1"),
        (dict(stride=b"\x85", key="../data.pkl"), r"no member data/../data.pkl"),
        (dict(stride=b"\x85", kind=b"ctorch\nfloat32\n"), "which is none"),
        (dict(stride=b"\x85", kind=b"chere\nThing\n"), "here.Thing"),
        (dict(stride=b"\x85", more=b"NN"), "with other arguments than PyTorch does"),
    ],
)
def test_tensors_that_lie_elsewhere(tmp_path, changed, words):
    path = archive(tmp_path, tensor(**changed))
    assert words in refused(path)


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"\x80\x02K\x01K\x02b.", "sets the state of a int"),
        (b"\x80\x02]}b.", "sets the state of a list"),
        (b"\x80\x02K\x01K\x02a.", "appends to a int"),
        (b"\x80\x02K\x01K\x02K\x03s.", "sets items of a int"),
        (b"\x80\x02K\x01)R.", "calls 1, expected a function"),
        (b"\x80\x02ctorch\nTensor\nK\x01R.", "calls something with a int"),
        (b"\x80\x02ctorch\nfloat32\n)R.", "calls torch.float32"),
        (b"\x80\x02K\x01Q.", "refers to something in another way"),
        (b"\x80\x02P0\n.", "instruction PERSID"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
        (b"\x80\x02(.", "takes a mark for a value"),
        (b"\x80\x02R.", "empty stack"),
        (b"\x80\x02h\x01.", "remembers nothing under the number 1"),
        (b"\x80\x04]\x90.", "empty stack"),
        (b"\x80\x04](\x90.", "adds to a list"),
        (b"\x80\x02(iposix\nsystem\n.", "it names posix.system"),
    ],
)
def test_instructions_that_make_no_sense(tmp_path, pickled, words):
    assert words in refused(archive(tmp_path, pickled))


def test_recursion(tmp_path):
    """Deep and circular values, whose readers must not go down by calling themselves."""
    many = 50_000
    deep = read(archive(tmp_path, b"\x80\x02)" + b"\x85" * many + b"."))
    for _ in range(5):
        (deep,) = deep
    deep = read(archive(tmp_path, b"\x80\x02}X\x01\0\0\0a]" + b"]" * many + b"a" * many + b"s."))
    assert isinstance(deep["a"], list)
    # A tuple that deep cannot be hashed: it is the key of nothing.
    deep = read(archive(tmp_path, b"\x80\x02})" + b"\x85" * many + b"K\x01s."))
    assert deep == {}
    circular = read(archive(tmp_path, b"\x80\x02]q\x00h\x00a."))
    assert circular[0] is circular
    with pytest.raises(CheckpointError, match="holds itself"):
        checkpoints.read(archive(tmp_path, b"\x80\x02}q\x00X\x05\0\0\0modelh\x00s."))


def damaged(whole, rng):
    """Bytes changed, put in, or taken out."""
    content = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content))
        change = rng.randrange(4)
        if change == 0:
            content[at] = rng.randrange(256)
        elif change == 1:
            content[at : at + rng.randint(1, 8)] = b""
        elif change == 2:
            content[at:at] = rng.choice([b"(", b"R", b"b", b"Q", b"\x85", b"h\x01", b"\xff" * 4])
        else:
            other = rng.randrange(len(content))
            content[at : at + 4] = content[other : other + 4]
        content = content or bytearray(b".")
    return bytes(content)


def test_damaged_pickles(tmp_path):
    """An error of ours, or other values: no crash, and nothing outside the file's own memory."""
    whole = io.BytesIO()
    torch.save({"model": {"w": torch.ones(4, 2).t(), "b": torch.nn.Parameter(torch.ones(3))},
                "meta": [HistoryBuffer(), {"a": (1, 2.5)}]}, whole)  # fmt: skip
    with zipfile.ZipFile(whole) as file:
        members = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    storages = {n[5:]: content for n, content in members.items() if n.startswith("data/")}
    rng = random.Random(0)
    for _ in range(400):
        path = archive(tmp_path, damaged(members["data.pkl"], rng), storages)
        for mmap in (False, True):
            with contextlib.suppress(CheckpointError):
                for value in checkpoints.read(path, mmap=mmap).values():
                    if isinstance(value, torch.Tensor) and not value.is_meta:
                        assert value.numel() < 1 << 30
                        value.detach().sum()


def test_a_dtype_that_this_pytorch_does_not_know(tmp_path):
    pickled = tensor(
        b"\x85", name=b"ctorch._utils\n_rebuild_tensor_v3\n", more=b"ctorch\nfloat3_e1m1\n"
    )
    made = read(archive(tmp_path, pickled))
    assert isinstance(made, Inert)
    assert made.name == "torch._utils._rebuild_tensor_v3"
