"""Reading: by several threads, in little memory, and whatever lies under the name."""

import os
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from tests import straight_line
from tests.tiny import TINY
from vovnet_fast import VoVNet, checkpoints
from vovnet_fast.checkpoints import CheckpointError, load
from vovnet_fast.tools import cli

SPEC = TINY["detectron2"]
LINUX = Path("/proc/self/clear_refs")


def filled():
    return straight_line.randomise(VoVNet(SPEC)).state_dict()


# --------------------------------------------------------------------------------------
# Threads
# --------------------------------------------------------------------------------------


@pytest.fixture
def trainers(tmp_path):
    """Files of eight trainers, each with a class beside the weights that nobody else has."""
    made, paths = types.ModuleType("trainers_own"), []
    sys.modules[made.__name__] = made
    for i in range(8):
        buffer = type(f"Buffer{i}", (), {"__module__": made.__name__})
        setattr(made, buffer.__name__, buffer)
        paths.append(tmp_path / f"epoch_{i}.pth")
        torch.save(dict(state_dict=filled(), hub={"buffer": buffer()}), paths[-1])
    del sys.modules[made.__name__]
    return paths


def test_eight_threads_read_trainers_files(trainers):
    """And change nothing that PyTorch keeps for all threads."""
    allowed = getattr(torch.serialization, "get_safe_globals", list)  # From torch 2.4 on.
    before = allowed()
    errors, start = [], threading.Barrier(len(trainers))

    def reading(path):
        try:
            start.wait()
            for _ in range(4):
                checkpoints.read(path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=reading, args=(path,)) for path in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert allowed() == before


# --------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------


def peak_growth(call):
    """Bytes of memory that a call needs at its peak, pages of files among them."""

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    LINUX.write_text("5")  # Forgets the peak.
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


needs_proc = pytest.mark.skipif(not os.access(LINUX, os.W_OK), reason="Linux tells the peak")


@needs_proc
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_what_else_is_in_a_file_is_not_read(tmp_path, ending):
    """An optimizer's state, say, which is twice as large as the weights."""
    path, name = tmp_path / f"epoch{ending}", "V-19-slim-dw-eSE"
    model = VoVNet(name)
    checkpoints.write({**model.state_dict(), "head.weight": torch.zeros(32 << 20)}, path)
    size = path.stat().st_size
    words = ["convert", str(path), str(tmp_path / f"v{ending}"), "--spec", name, "--force"]
    for call in (lambda: load(model, path), lambda: cli.main(words)):
        call()  # For what is imported and made once.
        assert peak_growth(call) < 0.25 * size
    assert (tmp_path / f"v{ending}").stat().st_size < 0.25 * size


@needs_proc
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_reading_and_writing_stream(tmp_path, ending):
    """The file's own pages, which the system may take back, and not a second copy of them.

    Of views on one memory, too, as a flattened optimizer leaves them.
    """
    source, target = tmp_path / f"source{ending}", tmp_path / f"target{ending}"
    flat = torch.ones(24 << 20)
    state = {f"x{i}": part.view(64, 64, 3, 128) for i, part in enumerate(flat.chunk(16))}
    assert peak_growth(lambda: checkpoints.write(state, source)) < 0.3 * flat.nbytes
    size = source.stat().st_size

    def copy():
        checkpoints.write(checkpoints.read(source, mmap=True), target)

    assert peak_growth(copy) < 1.3 * size
    assert target.stat().st_size == size


# --------------------------------------------------------------------------------------
# What lies under the name
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_windows_on_a_file_do_not_change_it(tmp_path, ending):
    path = tmp_path / f"weights{ending}"
    checkpoints.write({"x": torch.ones(5000)}, path)
    before = path.read_bytes()
    state = checkpoints.read(path, mmap=True)
    state["x"].zero_()
    assert path.read_bytes() == before
    checkpoints.write(state, path)  # In place of the file that it is a window on.
    assert not checkpoints.read(path)["x"].any()


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_what_is_read_is_one_s_own(tmp_path, ending):
    """Whatever becomes of the file: a window on one that was cut would end the process."""
    path = tmp_path / f"weights{ending}"
    checkpoints.write({"x": torch.ones(5000)}, path)
    state = checkpoints.read(path)
    os.truncate(path, 0)
    assert state["x"].sum() == 5000


@pytest.mark.parametrize("mmap", [True, False])
def test_cut_anywhere(tmp_path, mmap):
    for ending in (".pth", ".safetensors"):
        path = tmp_path / f"weights{ending}"
        checkpoints.write(filled(), path)
        whole = path.read_bytes()
        for share in (0, 0.00005, 0.001, 0.3, 0.9, 0.99999):
            path.write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(CheckpointError, match=r"cannot read .*weights"):
                checkpoints.read(path, mmap=mmap)


@pytest.mark.skipif(os.name != "posix", reason="pipes are POSIX's")
def test_folders_pipes_and_devices(tmp_path):
    """Refused, where opening a pipe would wait for ever."""
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "folder.pth", tmp_path / "pipe.pth", "/dev/zero"):
        with pytest.raises(CheckpointError, match="it is no file"):
            load(VoVNet(SPEC), path)
    os.symlink(tmp_path / "gone", tmp_path / "link.pth")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*link\.pth"):
        load(VoVNet(SPEC), tmp_path / "link.pth")
