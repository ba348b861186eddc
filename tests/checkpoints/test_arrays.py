"""Pickles of NumPy arrays, as detectron2 writes them: read, and never run."""

import collections
import contextlib
import io
import os
import pickle
import struct
import sys
import types

import numpy as np
import pytest
import torch

from tests import straight_line
from tests.tiny import TINY
from vovnet_fast import VoVNet, checkpoints
from vovnet_fast.checkpoints import CheckpointError, load
from vovnet_fast.tools import cli

SPEC = TINY["detectron2"]
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@pytest.fixture(scope="module")
def state():
    return straight_line.randomise(VoVNet(SPEC)).state_dict()


def published(state, prefix="backbone.bottom_up."):
    arrays = {prefix + k: v.numpy() for k, v in state.items() if "num_batches" not in k}
    return {"model": arrays, "__author__": "somebody", "matching_heuristics": True}


def assert_filled(path, state):
    model = VoVNet(SPEC)
    load(model, path)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if "num_b" not in k)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("prefix", ["", "backbone.bottom_up."])
def test_detectron2s_files(tmp_path, state, protocol, prefix):
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(published(state, prefix), protocol))
    assert_filled(path, state)
    path.write_bytes(pickle.dumps(collections.OrderedDict(published(state)["model"]), protocol))
    assert_filled(path, state)


@pytest.mark.parametrize(
    "names", [(b"numpy.core", b"numpy._core"), (b"numpy._core", b"numpy.core")]
)
@pytest.mark.parametrize("protocol", [0, 2])  # Later ones have the lengths of frames and names.
def test_the_names_of_either_numpy(tmp_path, state, protocol, names):
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(published(state), protocol).replace(*names))
    assert_filled(path, state)


def test_strings_of_python_2(tmp_path):
    """Which were bytes: an array's contents are one, and so are the keys."""
    path, x = tmp_path / "w.pkl", np.arange(6, dtype="<f4").reshape(2, 3)

    def text(value):
        return b"U" + bytes([len(value)]) + value

    dtype = b"cnumpy\ndtype\n(" + text(b"f4") + b"K\x00K\x01tR(K\x03" + text(b"<")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    array += b"(K\x01(K\x02K\x03t" + dtype + b"\x89" + text(x.tobytes()) + b"tb"
    path.write_bytes(b"\x80\x02}" + text(b"x") + array + b"s.")
    assert pickle.loads(path.read_bytes(), encoding="latin1")["x"].tolist() == x.tolist()
    assert checkpoints.read(path)["x"].tolist() == x.tolist()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_layout_of_memory_and_dtype(tmp_path, protocol):
    x = np.arange(24).reshape(2, 3, 4)
    arrays = {
        **{code: x.astype(code) for code in ("<f2", "<f4", ">f4", "<f8", "<i8", ">i2", "u1", "?")},
        "fortran": np.asfortranarray(x.astype("f4")),
        "sliced": x.astype("f4")[:, ::2],
        "broadcast": np.broadcast_to(np.float32(2), (3, 3)),
        "none": np.zeros((0, 3), "f4"),
        "one": np.array(2.5, "f4"),
    }
    beside = {
        "iteration": np.int64(7),
        "scores": [np.float32(0.5), (1, None, True, False, -2.5, 1 << 70)],
    }
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"model": {**arrays, **beside}}, protocol))
    found = checkpoints.read(path)
    for key, array in arrays.items():
        assert found[key].shape == array.shape
        np.testing.assert_array_equal(found[key].numpy(), array)
        assert found[key].numpy().dtype == array.dtype.newbyteorder("=")
    assert found["iteration"] == 7
    assert found["scores"] == [0.5, (1, None, True, False, -2.5, 1 << 70)]
    found["fortran"].add_(1)  # It is one's own.


def test_convert_takes_them(tmp_path):
    name = "V-19-slim-dw-eSE"
    model = straight_line.randomise(VoVNet(name))
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(published(model.state_dict())))
    out = tmp_path / "w.pth"
    words = ["convert", str(tmp_path / "w.pkl"), str(out), "--spec", name]
    assert cli.main([*words, "--add-prefix", "img_backbone."]) == 0
    found = checkpoints.read(out)
    key = "stem.stem_1/conv.weight"
    assert torch.equal(found[f"img_backbone.{key}"], model.state_dict()[key])


def test_all_or_nothing(tmp_path, state):
    content = published(state)
    content["model"].pop("backbone.bottom_up.stage5.OSA5_2.ese.fc.bias")
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    model = VoVNet(SPEC)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"1 parameters left unfilled: stage5\.OSA5_2\.ese"):
        load(model, tmp_path / "w.pkl")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --------------------------------------------------------------------------------------
# What is no array
# --------------------------------------------------------------------------------------


class Calls:
    """Names a function, with arguments."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


class Plain:
    """Somebody's class."""


def refused(tmp_path, content):
    path = tmp_path / "w.pkl"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.read(path)
    assert str(caught.value).startswith(f"cannot read {path}: ")
    return str(caught.value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (Calls(os.system, "touch ran"), f"{os.system.__module__}.system"),
        (Calls(eval, "open('ran', 'w')"), ".eval"),
        (Calls(getattr, "", "format"), ".getattr"),
        (Calls(np.fromfile, "w.pkl"), ".fromfile"),
        (Calls(collections.Counter, "ab"), "collections.Counter"),
        (Plain(), None),
        (torch.zeros(2), "torch._utils._rebuild_tensor_v2"),
        (np.ma.zeros(2), "numpy.ma"),
        ({1, 2}, None),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_everything_else_is_refused_by_its_name(tmp_path, monkeypatch, state, protocol, evil, name):
    monkeypatch.chdir(tmp_path)
    said = refused(tmp_path, pickle.dumps({**published(state), "evil": evil}, protocol))
    assert not (tmp_path / "ran").exists()
    assert (name or "") in said
    assert "save the weights alone" in said


def test_no_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "imported_by_a_pickle.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    said = refused(tmp_path, b"\x80\x02cimported_by_a_pickle\nthing\n.")
    assert "it names imported_by_a_pickle.thing, which is no part of an array" in said
    assert "imported_by_a_pickle" not in sys.modules


def test_what_numpy_knows_and_arrays_of_numbers_are_not(tmp_path):
    for array, words in (
        (np.array([{}, None], dtype=object), "dtype 'O8'"),
        (np.array(["weights"]), "dtype 'U7'"),
        (np.zeros(2, dtype=[("a", "f4")]), "dtype 'V4'"),
        (np.array(["2020"], dtype="M8[D]"), "dtype 'M8'"),
        (np.zeros(2, "f4").view(np.recarray), "numpy"),
    ):
        assert words in refused(tmp_path, pickle.dumps({"x": array}, 2))


def array_of(shape, data, dtype="f4"):
    """A pickle of an array that says ``shape`` and has ``data``."""
    output = io.BytesIO()
    state = (1, shape, np.dtype(dtype), False, data)
    like = types.SimpleNamespace(state=state)

    class Like:
        def __reduce__(self):
            whole = np.zeros(0).__reduce__()
            return whole[0], whole[1], like.state

    pickle.Pickler(output, 4).dump({"x": Like()})
    return output.getvalue()


def test_sizes_are_what_the_bytes_are(tmp_path):
    """Nothing is made as large as a file claims."""
    for shape in ((1 << 60,), (1 << 40, 1 << 40), (3,), (-2, -1), (2.0,), [2], (True, 2), None):
        said = refused(tmp_path, array_of(shape, bytes(8)))
        assert "shape" in said
    assert "expected bytes" in refused(tmp_path, array_of((2,), [1.0, 2.0]))
    for claim in (b"\x8e" + struct.pack("<Q", 1 << 62), b"T\xff\xff\xff\x7f", b"B\xff\xff\xff\xff"):
        refused(tmp_path, b"\x80\x04" + claim + b"abc.")
    refused(tmp_path, b"\x80\x02K\x01r\xff\xff\xff\xff0j\xfe\xff\xff\xff.")


def test_the_same_bytes_again_and_again(tmp_path):
    shared = bytes(1 << 16)
    # One string of bytes, and a thousand arrays that take it out of the memo.
    body = b"\x80\x03B" + struct.pack("<I", len(shared)) + shared + b"q\x010]("
    one = b"cnumpy._core.numeric\n_frombuffer\n(h\x01"
    one += b"cnumpy\ndtype\nX\x02\0\0\0f4\x85RM\x00\x40\x85X\x01\0\0\0CtR"
    assert pickle.loads(body + one + b"e.")[0].shape == (1 << 14,)
    said = refused(tmp_path, body + one * 1000 + b"e.")
    assert "again and again" in said


def test_damaged_anywhere(tmp_path, state):
    """Every cut, and many a changed byte, is an error of ours or other numbers."""
    whole = pickle.dumps({"x": np.arange(8.0), "y": {"z": (1, [2.5, "a"])}}, 2)
    for length in range(1, len(whole)):
        refused(tmp_path, whole[:length])
    path = tmp_path / "w.pkl"
    for position in range(2, len(whole)):
        for byte in (0, 0x2E, 0x28, 0x52, 0xFF):
            path.write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
            with contextlib.suppress(CheckpointError):
                checkpoints.read(path)
