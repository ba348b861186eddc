"""What is written of a state dict: each tensor's own elements, all of them, and nothing else."""

import contextlib
import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.network.test_filling import BAD
from vovnet_fast import checkpoints
from vovnet_fast.checkpoints import CheckpointError

ENDINGS = (".pth", ".safetensors")
SECRET = b"what else lay there"


def written(tmp_path, state, ending):
    path = tmp_path / f"weights{ending}"
    checkpoints.write(state, path)
    back = load_file(path) if ending == ".safetensors" else torch.load(path, weights_only=True)
    assert set(back) == set(state)
    for key, value in state.items():
        assert back[key].dtype == value.dtype, key
        assert torch.equal(back[key], value.detach()), key
    return path, back


def shared(size):
    """Memory that many tensors lie in, with something in it that is nobody else's business."""
    flat = torch.arange(size, dtype=torch.float32)
    flat[-5:] = torch.frombuffer(bytearray(SECRET.ljust(20)), dtype=torch.float32)
    return flat


VIEWS = {
    "slice": lambda flat: flat[100:400],
    "block": lambda flat: flat[256:512].view(4, 4, 4, 4),
    "channels_last": lambda flat: flat[64:320].view(4, 4, 4, 4).permute(0, 3, 1, 2),
    "transposed": lambda flat: flat[:600].view(20, 30).t(),
    "every other": lambda flat: flat[:600:2],
    "column": lambda flat: flat[:600].view(20, 30)[:, 3],
    "expanded": lambda flat: flat[5].expand(7, 9),
    "overlapping": lambda flat: flat.as_strided((10, 10), (1, 1)),
    "scalar": lambda flat: flat[7],
    "empty": lambda flat: flat[:0],
    "empty matrix": lambda flat: flat[10:10].view(0, 5),
    "as bytes": lambda flat: flat[3:50].view(torch.uint8),
    "negative": lambda flat: torch.view_as_complex(flat[:8].view(4, 2)).conj().imag,
    "parameter": lambda flat: nn.Parameter(flat[10:20]),
    "part of a graph": lambda flat: nn.Parameter(flat[10:20]) * 2,
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_s_own_elements_are_written(tmp_path, kind, ending):
    flat = shared(1 << 16)
    value = VIEWS[kind](flat)
    path, back = written(tmp_path, {"x": value}, ending)
    assert path.stat().st_size < 4096 + value.numel() * value.element_size()
    assert SECRET not in path.read_bytes()
    if kind == "channels_last" and ending == ".pth":
        assert back["x"].stride() == value.stride()


@pytest.mark.parametrize("ending", ENDINGS)
def test_whatever_the_default_device_is(tmp_path, ending):
    flat = shared(1 << 10)
    checkpoints.write({"x": flat[100:400]}, tmp_path / f"here{ending}")
    with torch.device("meta"):
        checkpoints.write({"x": flat[100:400]}, tmp_path / f"there{ending}")
    here, there = (checkpoints.read(tmp_path / f"{n}{ending}")["x"] for n in ("here", "there"))
    assert torch.equal(here, there)


def test_dense_views_are_not_copied():
    flat = shared(1 << 16)
    for kind in ("slice", "block", "channels_last", "transposed", "scalar", "as bytes"):
        value = VIEWS[kind](flat)
        own = checkpoints.writing._own_elements({"x": value})["x"]
        assert own.data_ptr() == value.data_ptr(), kind
        assert own.untyped_storage().nbytes() == value.numel() * value.element_size()
    del flat, value
    assert own[0] == own[0], "the memory lives as long as the window on it"


def test_windows_on_a_file_lie_as_pytorch_lays_tensors(tmp_path):
    """As many as can: gemm adds in another order where a matrix begins elsewhere."""
    path = tmp_path / "weights.safetensors"
    shapes = {"odd": (3,), "a": (16, 16), "b": (5,), "c": (64, 3, 3), "d": (2, 8)}
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    state |= {"half": torch.ones(7).half(), "bytes": torch.ones(64, dtype=torch.uint8)}
    checkpoints.write(state, path)
    back = checkpoints.read(path, mmap=True)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert all(back[name].data_ptr() % 64 == 0 for name in ("a", "c", "d", "bytes"))
    assert all(value.data_ptr() % value.element_size() == 0 for value in back.values())


@pytest.mark.parametrize("ending", ENDINGS)
def test_tied_tensors(tmp_path, ending):
    """The same tensor under two names, and two tensors that share a part of their memory."""
    weight = torch.randn(64, 64)
    flat = torch.randn(100)
    state = {"a": weight, "b": weight, "c": weight.t(), "d": flat[:60], "e": flat[40:]}
    path, back = written(tmp_path, state, ending)
    tied = back["a"].data_ptr() == back["b"].data_ptr()
    assert tied == (ending == ".pth")
    assert path.stat().st_size < (3 - tied) * weight.numel() * 4 + 8192


@pytest.mark.parametrize("dtype", checkpoints.writing._NAMES)
def test_every_dtype_that_safetensors_has_a_word_for(tmp_path, dtype):
    torch.manual_seed(0)
    odd = {"x": (torch.randn(3, 5) * 3).to(dtype), "y": torch.ones(3, dtype=torch.bool)}
    checkpoints.write(odd, tmp_path / "ours.safetensors")
    save_file(odd, tmp_path / "theirs.safetensors")
    ours, theirs = (load_file(tmp_path / f"{who}.safetensors") for who in ("ours", "theirs"))
    for key in odd:
        assert ours[key].dtype == odd[key].dtype
        assert torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8))


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_tensors_and_odd_names(tmp_path, ending):
    written(tmp_path, {}, ending)
    written(tmp_path, {"": torch.ones(1), 'q"\\\n\u00e9/\u4e2d': torch.ones(2)}, ending)


NOT_WRITTEN = ("quantised", "sparse", "sparse rows", "nested", "list", "array", "none")


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_has_no_elements_of_its_own_is_refused(tmp_path, ending):
    """By its name, and what was there is as it was."""
    path = tmp_path / f"weights{ending}"
    path.write_text("old")
    cases = [(BAD[kind][0](torch.randn(4, 4)), BAD[kind][1]) for kind in NOT_WRITTEN]
    cases += [
        (torch.empty(3, device="meta"), "is on the meta device and has no values to write"),
        (torch.ones(3).as_subclass(Subclass), "is a Subclass, expected a torch.Tensor"),
    ]
    for value, words in cases:
        with pytest.raises(CheckpointError) as raised:
            checkpoints.write({"fine": torch.ones(1), "stage2.x": value}, path)
        assert "cannot write 'stage2.x'" in str(raised.value)
        assert words in str(raised.value)
    with pytest.raises(CheckpointError, match="the key 3 is no string"):
        checkpoints.write({3: torch.ones(1)}, path)
    holds_itself = {}
    holds_itself["x"] = holds_itself
    with pytest.raises(CheckpointError, match="cannot write 'x': it is no tensor but dict"):
        checkpoints.write(holds_itself, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


def test_what_safetensors_has_no_word_for_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(CheckpointError, match=r"'x': it is torch\.complex128.* write a \.pth"):
        checkpoints.write({"x": torch.ones(1, dtype=torch.complex128)}, path)
    with pytest.raises(CheckpointError, match="keeps for itself"):
        checkpoints.write({"__metadata__": torch.ones(1)}, path)
    written(tmp_path, {"x": torch.ones(1, dtype=torch.complex128)}, ".pth")


@contextlib.contextmanager
def largest_file(size):
    """A disk on which files cannot grow beyond ``size``: the system refuses, as a full one does."""
    resource = pytest.importorskip("resource", reason="no limits on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("room", [0, 10, 1000, 100_000, 399_990])
def test_a_full_disk(tmp_path, ending, room):
    """Whenever it fills up: an error of the system's that names the file, and the old file."""
    path = tmp_path / f"weights{ending}"
    path.write_text("old")
    state = {"x": torch.randn(50_000), "y": torch.randn(50_000)}
    with largest_file(room), pytest.raises(OSError, match=r"cannot write: .* as it was") as raised:
        checkpoints.write(state, path)
    assert raised.value.filename == str(path)
    assert raised.value.errno is not None
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]
    written(tmp_path, state, ending)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_private_file_stays_private(tmp_path, ending):
    path = tmp_path / f"weights{ending}"
    path.write_text("old")
    path.chmod(0o600)
    written(tmp_path, {"x": torch.ones(3)}, ending)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


_PROGRAM = """
import os, sys, time, types
import torch
from vovnet_fast import _files, checkpoints
from vovnet_fast.checkpoints import writing

torch.set_num_threads(1)
torch.manual_seed(0)
folder = sys.argv[1]


def read(path):
    state = checkpoints.read(path, mmap=True)
    assert set(state) == {"a", "b", "c"}
    (value,) = {float(v) for x in state.values() for v in (x.min(), x.max())}
    return value


def state(value):
    flat = torch.full((30_000,), float(value))
    return {"a": flat[:10_000], "b": flat[::2], "c": flat[20_000:].view(100, 100)}


class Killing:
    def __init__(self, step):
        self.left = step

    def counted(self, call):
        def counting(*args, **kwargs):
            if self.left == 0:
                os.kill(os.getpid(), 9)
            self.left -= 1
            return call(*args, **kwargs)
        return counting

    def open(self, path, mode):
        file = open(path, mode)
        wrapped = types.SimpleNamespace(write=self.counted(file.write), flush=file.flush)
        class File:
            __enter__ = lambda _: wrapped
            __exit__ = lambda *_: file.close()
        return File()

    def install(self):
        for module, names in ((os, COUNTED), (_files.fcntl, ["flock"])):
            for name in names:
                setattr(module, name, self.counted(getattr(module, name)))
        writing.open = self.open


COUNTED = "open fchown fchmod fsync replace unlink scandir fstat".split()


def child(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


for ending in (".pth", ".safetensors"):
    path, step, left = os.path.join(folder, "weights" + ending), 0, 0
    checkpoints.write(state(1), path)
    while True:
        def work():
            Killing(step).install()
            checkpoints.write(state(2), path)
        status = os.waitpid(child(work), 0)[1]
        assert status in (0, 9), status
        assert read(path) in ((2,) if status == 0 else (1, 2))
        left += len(os.listdir(folder)) > 1
        checkpoints.write(state(1), path)
        assert os.listdir(folder) == [os.path.basename(path)]
        if status == 0:
            break
        step += 1
    assert step > 12 and left > 6, (step, left)

    def writing_often(value):
        for _ in range(15):
            checkpoints.write(state(value), path)
    children = {child(lambda value=value: writing_often(value)) for value in (3, 4, 5)}
    seen, statuses = set(), []
    while children:
        seen.add(read(path))
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            children.remove(done)
            statuses.append(status)
    assert statuses == [0, 0, 0]
    assert seen <= {1, 3, 4, 5}, seen
    assert os.listdir(folder) == [os.path.basename(path)]
    os.unlink(path)
print("whole")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_killed_between_any_two_steps_and_several_at_once(tmp_path):
    """The file is the old one or a new one, whole, and what the killed leave is swept."""
    words = [sys.executable, "-c", _PROGRAM, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "whole\n"
