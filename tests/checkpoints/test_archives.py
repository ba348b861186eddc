"""Where the storages of a file of torch.save lie, and files that say otherwise."""

import contextlib
import copy
import io
import random
import struct
import sys
import zipfile

import pytest
import torch

from tests.checkpoints.test_files import needs_proc, peak_growth
from vovnet_fast import checkpoints
from vovnet_fast.checkpoints import CheckpointError

STATE = {"x": torch.arange(6.0).view(2, 3).t(), "y": torch.arange(5), "z": torch.ones(3).bfloat16()}
STATE["tied"] = STATE["x"][1:]


def save(path, state, zipped=True):
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


def packed_again(path, change=lambda name, content: content, pad=b"", **options):
    """The same members, each of which may change, with ``pad`` before the first."""
    with zipfile.ZipFile(path) as file:
        members = [(name, file.read(name)) for name in file.namelist()]
    with zipfile.ZipFile(path, "w", **options) as file:
        if pad:
            file.writestr("x/.pad", pad)
        for name, content in members:
            content = change(name.partition("/")[2], content)
            if content is not None:
                file.writestr(name, content)
    return path


def assert_reads(path, state, **options):
    found = checkpoints.read(path, **options)
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert found[key].dtype == value.dtype
        assert found[key].stride() == value.stride()
        assert torch.equal(found[key], value)
    return found


def refused(path):
    with pytest.raises(CheckpointError) as caught:
        checkpoints.read(path)
    assert str(caught.value).startswith(f"cannot read {path}: ")
    return str(caught.value)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_ties_stay(tmp_path, zipped, mmap):
    found = assert_reads(save(tmp_path / "x.pth", STATE, zipped), STATE, mmap=mmap)
    found["tied"].zero_()
    assert found["x"].tolist() == [[0, 3], [0, 0], [0, 0]]


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("pad", [bytes(n) for n in (1, 2, 3, 4, 5, 8)], ids=len)
def test_members_anywhere(tmp_path, pad, mmap):
    """Packed by somebody else, at no multiple of an element's size."""
    path = packed_again(save(tmp_path / "x.pth", STATE), pad=pad)
    found = assert_reads(path, STATE, mmap=mmap)
    assert all(x.data_ptr() % x.element_size() == 0 for x in found.values())


def swapped(name, content):
    if name == "byteorder":
        return b"big" if sys.byteorder == "little" else b"little"
    width = {"data/0": 4, "data/1": 8, "data/2": 2}.get(name)
    if width is None:
        return content
    return b"".join(content[i : i + width][::-1] for i in range(0, len(content), width))


@pytest.mark.parametrize("mmap", [False, True])
def test_the_other_byte_order(tmp_path, mmap):
    path = packed_again(save(tmp_path / "x.pth", STATE), swapped)
    assert_reads(path, STATE, mmap=mmap)
    path = packed_again(path, lambda name, content: b"both" if name == "byteorder" else content)
    assert "byteorder says b'both', expected little or big" in refused(path)


@pytest.mark.skipif(sys.byteorder != "little", reason="what is written here is little-endian")
def test_files_of_before_byte_orders_were_written(tmp_path):
    path = save(tmp_path / "x.pth", STATE)
    path = packed_again(path, lambda name, content: None if name == "byteorder" else content)
    assert_reads(path, STATE)


@needs_proc
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_an_optimizer_s_state_is_not_read(tmp_path, zipped):
    """Without windows on the file, too."""
    large = {0: {"exp_avg": torch.zeros(24 << 20)}}
    path = save(tmp_path / "x.pth", {"state_dict": STATE, "optimizer": {"state": large}}, zipped)
    assert_reads(path, STATE)
    assert peak_growth(lambda: checkpoints.read(path)) < 0.1 * path.stat().st_size


# --------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------


def test_other_archives(tmp_path):
    path = tmp_path / "x.pth"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    assert "a program of TorchScript, expected tensors by name" in refused(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/b.txt", "c")
    assert "with 0 members data.pkl, expected one" in refused(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02}.")
        file.writestr("b/data.pkl", b"\x80\x02}.")
    assert "with 2 members data.pkl, expected one" in refused(path)
    save(path, STATE)
    packed_again(path, compression=zipfile.ZIP_DEFLATED)
    assert "compressed or encrypted, and torch.save does neither: unpack it" in refused(path)
    packed_again(save(path, STATE), lambda name, content: None if name == "data/1" else content)
    assert "it has no member data/1: it is damaged" in refused(path)
    packed_again(
        save(path, STATE), lambda name, content: content[1:] if name == "data/1" else content
    )
    assert "its member data/1 has 39 bytes, expected 40" in refused(path)
    path.write_bytes(b"<html>404</html>")
    assert "it does not begin as a file of torch.save does" in refused(path)


def test_a_bomb(tmp_path):
    """A thousand times as large, or a thousand members that are one."""
    path = tmp_path / "x.pth"
    state = {str(i): torch.zeros(1 << 12) for i in range(50)}
    packed_again(save(path, state), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 16
    assert "compressed" in refused(path)
    save(path, state)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            if "/data/" not in name or name.endswith("/data/0"):
                file.writestr(name, content)
        first = file.getinfo(next(name for name in members if name.endswith("/data/0")))
        for name in members.keys() - {*file.namelist()}:
            other = copy.copy(first)
            other.filename = name
            file.filelist.append(other)
    assert "larger than the file" in refused(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_damaged_anywhere(tmp_path, zipped):
    """Every cut is an error of ours, and every changed byte that or other values."""
    buffer = io.BytesIO()
    torch.save({"x": torch.arange(6.0), "y": {"z": torch.ones(2, 2).t()}}, buffer,
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    whole, path, rng = buffer.getvalue(), tmp_path / "x.pth", random.Random(0)
    for length in range(0, len(whole), 1 + len(whole) // 150):
        path.write_bytes(whole[:length])
        refused(path)
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(whole))
            changed[at] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256), changed[at] ^ 1])
        path.write_bytes(changed)
        for mmap in (False, True):
            with contextlib.suppress(CheckpointError):
                for value in checkpoints.read(path, mmap=mmap).values():
                    if isinstance(value, torch.Tensor) and not value.is_meta:
                        value.sum()


def test_lists_of_storages_of_before_1_6(tmp_path):
    path = save(tmp_path / "x.pth", {"x": torch.arange(4.0)}, False)
    whole = path.read_bytes()
    key = whole.index(b"X", whole.index(b"FloatStorage"))
    assert whole.count(whole[key : key + 8]) == 2
    numel = struct.pack("<q", 4)
    assert whole.endswith(numel + torch.arange(4.0).numpy().tobytes())
    for other in (3, 5, -1, 1 << 40):
        path.write_bytes(whole[:-24] + struct.pack("<q", other) + whole[-16:])
        assert f"has {other} elements, which nothing refers to" in refused(path)
    at = whole.rindex(whole[key : key + 8]) + 5
    path.write_bytes(whole[:at] + b"Q" + whole[at + 1 :])
    assert "which nothing refers to" in refused(path)
    path.write_bytes(whole.replace(whole[whole.rindex(b"]") : -24], b"]."))
    assert "it has no storage" in refused(path)
    path.write_bytes(whole[:-1])
    assert "goes beyond its end: it was cut" in refused(path)
