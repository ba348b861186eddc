"""A file is there whole or not at all, whatever fails and whoever is killed in between."""

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from vovnet_fast import _files
from vovnet_fast._files import replacing

needs_locks = pytest.mark.skipif(_files.fcntl is None, reason="no locks on this system")
posix = pytest.mark.skipif(os.name != "posix", reason="modes and links are POSIX's")
no_root = pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere"
)


def write(path, text):
    with replacing(path) as temporary:
        Path(temporary).write_text(text)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@contextlib.contextmanager
def umask(value):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


# --------------------------------------------------------------------------------------
# What becomes of what was there
# --------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("bits", [0o600, 0o400, 0o640, 0o644, 0o666])
def test_a_replaced_file_hands_on_its_mode(tmp_path, bits):
    path = tmp_path / "weights"
    path.write_text("old")
    path.chmod(bits)
    with replacing(path) as temporary:
        assert mode(temporary) & ~bits & 0o077 == 0, "nobody else may read what is written"
        Path(temporary).write_text("new")
    assert mode(path) == bits
    assert path.read_text() == "new"


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_of_the_umask_which_is_not_touched(tmp_path, monkeypatch, mask):
    with umask(mask), monkeypatch.context() as patched:
        patched.setattr(os, "umask", None)  # It is every thread's.
        write(tmp_path / "new", "text")
    assert mode(tmp_path / "new") == 0o666 & ~mask


@posix
def test_a_link_stays_and_what_it_stands_for_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    link.symlink_to(target)
    for text in ("first", "second"):
        write(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert os.listdir(tmp_path / "far") == ["target"]


@posix
def test_what_is_no_file_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("folder", "a folder"), ("pipe", "a pipe"), ("/dev/null", "a device")):
        with pytest.raises(OSError, match=f"cannot write .*{name}: it is no file but {kind}"):
            write(tmp_path / name, "text")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write(tmp_path / "none" / "file", "text")


def test_the_longest_names_can_be_written(tmp_path):
    for name in ("x" * 255, "\u00e9" * 120):
        write(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name


@no_root
@posix
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="weights"):
            write(tmp_path / "weights", "text")
    finally:
        tmp_path.chmod(0o700)


# --------------------------------------------------------------------------------------
# What fails, step by step
# --------------------------------------------------------------------------------------

_COUNTED = "open close stat fstat fchown fchmod fsync replace unlink scandir"

_PROGRAM = """
import os, sys, importlib.util, types
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
from pathlib import Path
step, count, path = int(sys.argv[3]), 0, Path(sys.argv[2])

def counted(call):
    def counting(*args, **kwargs):
        global count
        if count == step:
            os.kill(os.getpid(), 9)
        count += 1
        return call(*args, **kwargs)
    return counting

known = {name: getattr(os, name) for name in dir(os)}
for name in COUNTED.split():
    known[name] = counted(known[name])
files.os = types.SimpleNamespace(**known)
files.fcntl = types.SimpleNamespace(
    **{**{n: getattr(files.fcntl, n) for n in dir(files.fcntl)},
       "flock": counted(files.fcntl.flock)})
with files.replacing(path) as temporary:
    Path(temporary).write_text("half")
    counted(lambda: None)()
    Path(temporary).write_text("new")
""".replace("COUNTED", repr(_COUNTED))


@needs_locks
@pytest.mark.parametrize("bits", [0o644, 0o400])
def test_killed_between_any_two_steps(tmp_path, bits):
    """The file is the old one or the new one, and the next write sweeps what the killed left."""
    path, left = tmp_path / "weights", 0
    for step in range(100):
        path.unlink(missing_ok=True)
        path.write_text("old")
        path.chmod(bits)
        words = [sys.executable, "-S", "-c", _PROGRAM, _files.__file__, str(path), str(step)]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        assert path.read_text() in ("old", "new")
        assert mode(path) == bits
        left += len(os.listdir(tmp_path)) > 1
        write(path, "after")
        assert os.listdir(tmp_path) == ["weights"], step
        assert path.read_text() == "after"
        if done.returncode == 0:
            break
    assert done.returncode == 0, "all steps were tried"
    assert left >= 4, "some of them left something to sweep"


class Failing:
    """A module of which the ``step``-th call of a counted function fails."""

    def __init__(self, step, error):
        self.step, self.error, self.calls, self.failed = step, error, 0, None

    def module(self, module, counted):
        known = {name: getattr(module, name) for name in dir(module)}
        known.update({name: self._counting(name, known[name]) for name in counted.split()})
        return types.SimpleNamespace(**known)

    def _counting(self, name, call):
        def counting(*args, **kwargs):
            self.calls += 1
            if self.calls - 1 != self.step:
                return call(*args, **kwargs)
            self.failed = name
            if name == "close":  # Which closes all the same.
                call(*args, **kwargs)
            raise self.error

        return counting


@needs_locks
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_step_fails_once(tmp_path, monkeypatch, error):
    """The error comes out or did not matter; the file is whole and no descriptor is left open."""
    path = tmp_path / "weights"
    came_out = set()
    # A system without locks, an owner that stays, a folder that may be written but not read.
    harmless = (None, "flock", "fchown", "scandir") if isinstance(error, OSError) else (None,)
    for step in range(100):
        path.write_text("old")
        failing = Failing(step, error)
        with monkeypatch.context() as patched:
            patched.setattr(_files, "os", failing.module(os, _COUNTED))
            patched.setattr(_files, "fcntl", failing.module(_files.fcntl, "flock"))
            before = open_files()
            raised = what_is_raised(lambda: write(path, "new"))
            assert open_files() == before
        if raised is None:
            assert path.read_text() == "new"
            assert failing.failed in harmless
        else:
            assert raised is error
            came_out.add(failing.failed)
            # Closing comes after it has its name.
            assert path.read_text() == ("new" if failing.failed == "close" else "old")
        if failing.failed is None:
            break
        left = [name for name in os.listdir(tmp_path) if name != "weights"]
        assert not left, failing.failed
    assert failing.failed is None, "all steps were tried"
    assert {"open", "fchmod", "fsync", "replace"} <= came_out


def what_is_raised(call):
    try:
        call()
    except BaseException as error:
        return error
    return None


def open_files():
    folder = "/proc/self/fd"
    return len(os.listdir(folder)) if os.path.isdir(folder) else 0


def test_what_the_body_raises_comes_out_even_if_its_file_is_gone(tmp_path):
    path = tmp_path / "weights"

    def body():
        with replacing(path) as temporary:
            os.unlink(temporary)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert os.listdir(tmp_path) == []


def test_what_is_written_to_is_the_file_that_is_locked(tmp_path):
    """Another one in its place would be nobody's, and of another mode."""

    def body():
        (tmp_path / "other").write_text("text")
        with replacing(tmp_path / "weights") as temporary:
            os.replace(tmp_path / "other", temporary)

    with pytest.raises(RuntimeError, match=r"\.part must be written to"):
        body()
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------
# Several at once
# --------------------------------------------------------------------------------------


@needs_locks
def test_what_a_live_process_writes_is_never_swept(tmp_path):
    """Not by this process, and not by another one."""
    path = tmp_path / "weights"
    program = _PROGRAM.replace('"new")', '"other")')
    with replacing(path) as temporary:
        Path(temporary).write_text("mine")
        write(path, "in between")
        words = [sys.executable, "-S", "-c", program, _files.__file__, str(path), "1000"]
        subprocess.run(words, check=True)
        assert path.read_text() == "other"
        assert Path(temporary).read_text() == "mine"
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["weights"]


@needs_locks
def test_what_another_machine_or_program_left_is_not_touched(tmp_path, monkeypatch):
    """A lock says nothing about processes of other machines that share the folder."""
    path = tmp_path / "weights"
    with monkeypatch.context() as patched:
        patched.setattr(_files, "_machine", lambda: "elsewhere")
        handle, _ = _files._create(path, 0o600)
    os.close(handle)  # As the end of its process would.
    (tmp_path / "weights.part").write_text("a browser's")
    left = sorted(os.listdir(tmp_path))
    assert len(left) == 2
    write(path, "mine")
    assert sorted(os.listdir(tmp_path)) == ["weights", *left]


def test_many_writers_at_once(tmp_path):
    """Readers see one of the texts, whole, at all times."""
    path = tmp_path / "weights"
    texts = [str(i) * 5000 for i in range(4)]
    write(path, texts[0])
    errors = []

    def writing(text):
        try:
            for _ in range(15):
                write(path, text)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=writing, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_text() in texts
    for thread in threads:
        thread.join()
    assert not errors
    assert os.listdir(tmp_path) == ["weights"]
