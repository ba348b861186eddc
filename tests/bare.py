"""Python as on Windows, as far as that can be had here; run as a script it tries the package.

There is no Triton, no extension, no compiler on the path, no module, function or constant that
POSIX alone has, and text is cp1252. ``sys.platform`` says win32. ``os.name`` stays, by which
pathlib makes its paths. torch and the standard library are imported before: they know Windows.

``python -m tests.bare FOLDER`` prints a line of JSON for each step: what went wrong, or null.
"""

import builtins
import contextlib
import importlib
import io
import json
import os
import platform
import signal
import sys
import sysconfig
import traceback
from pathlib import Path

ABSENT = (
    "_posixshmem", "crypt", "fcntl", "grp", "nis", "ossaudiodev",
    "posix", "pty", "pwd", "readline", "resource", "spwd", "syslog", "termios", "tty",
)  # fmt: skip

_OF_OS = (
    "chroot", "fchmod", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getgroups",
    "getpgid", "getpgrp", "getpriority", "getsid", "getuid", "killpg", "lchown", "mkfifo", "mknod",
    "nice", "openpty", "pread", "pwrite", "register_at_fork", "sched_getaffinity",
    "sched_setaffinity", "setsid", "statvfs", "sysconf", "ttyname", "uname", "wait3", "wait4",
    "chown", "posix_spawn", "sendfile", "writev", "readv", "fchdir", "fstatvfs", "confstr",
    "O_CLOEXEC", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC",
)  # fmt: skip

_OF_SIGNAL = ("SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "setitimer", "alarm")

_BINARY = 1 << 40  # Above all flags that the system has.


class _Absent:
    """A finder of modules that does not find some."""

    def __init__(self, finder, names):
        self.finder, self.names = finder, names

    def find_spec(self, name, path=None, target=None):
        return None if name in self.names else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):  # Of distributions.
        return getattr(self.finder, name)


def _take(names):
    sys.meta_path = [_Absent(finder, names) for finder in sys.meta_path]
    for name in sys.modules.keys() & names:
        del sys.modules[name]


def _in_text_mode(path):
    """What Windows makes of a file that is not opened as a binary one."""
    raise AssertionError(f"{path} is opened without O_BINARY: Windows changes its line ends")


def _open(system):
    def opened(path, flags, *args, **kwargs):
        if not flags & _BINARY:
            _in_text_mode(path)
        return system(path, flags & ~_BINARY, *args, **kwargs)

    return opened


def _text(system):
    """``open`` with the encoding of a Windows in the West, where none is named."""

    def opened(file, mode="r", buffering=-1, encoding=None, *args, **kwargs):
        if "b" not in mode and encoding in (None, "locale"):
            encoding = "cp1252"
        return system(file, mode, buffering, encoding, *args, **kwargs)

    return opened


def pretend(folder):
    """Take away from this process what Windows has not."""
    import multiprocessing

    _take({"triton", "vovnet_fast._C"})
    # What Windows has forms of its own of: of these, and of what they have found out by now.
    for name in ("numpy", "rich.progress", "safetensors.torch"):
        importlib.import_module(name)
    platform.platform()
    sysconfig.get_config_vars()
    _take(set(ABSENT))
    for module, names in ((os, _OF_OS), (signal, _OF_SIGNAL)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    os.O_BINARY = _BINARY
    os.open = _open(os.open)
    builtins.open = io.open = _text(open)
    multiprocessing.get_all_start_methods = lambda: ["spawn"]
    os.environ["PATH"] = str(folder / "nothing")
    sys.platform = "win32"


# --------------------------------------------------------------------------------------
# What is tried
# --------------------------------------------------------------------------------------


def _found(module):
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    return True


def _console():
    """What a command prints to: a file, or a terminal, of a Windows in the West."""
    return io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="")


class Steps:
    """In their order; each may use what those before it made.

    Args:
        folder: to write in.
    """

    def __init__(self, folder):
        self.folder = folder

    def run(self):
        for name, step in vars(Steps).items():
            if name.startswith("_") or name in ("run", "command"):
                continue
            problem = None
            try:
                with contextlib.redirect_stdout(_console()):
                    step(self)
            except BaseException:
                problem = traceback.format_exc()
            print(json.dumps({"step": name, "problem": problem}), flush=True)

    def command(self, *words):
        from vovnet_fast.tools import cli

        told = _console()
        with contextlib.redirect_stdout(told):
            status = cli.main(list(map(str, words)))
        told.flush()
        said = told.buffer.getvalue().decode("cp1252")
        assert not status, said
        return said

    def is_bare(self):
        """What was taken away was there, and is not any more."""
        left = [name for name in _OF_OS if hasattr(os, name)]
        left += [name for name in _OF_SIGNAL if hasattr(signal, name)]
        left += [name for name in ("fcntl", "triton", "vovnet_fast._C") if _found(name)]
        assert left == []
        for wrong in (lambda: os.open(__file__, os.O_RDONLY), lambda: os.fork()):
            try:
                wrong()
            except (AssertionError, AttributeError):
                continue
            raise AssertionError("it can be done here")
        assert self.folder.joinpath("text").write_text("\N{LATIN SMALL LETTER E WITH ACUTE}") == 1
        assert self.folder.joinpath("text").read_bytes() == b"\xe9"

    def imports(self):
        import vovnet_fast

        assert vovnet_fast.available_backends()["reference"] is None
        others = {k: v for k, v in vovnet_fast.available_backends().items() if k != "reference"}
        assert all(isinstance(reason, str) for reason in others.values()), others

    def builds(self):
        import torch

        import vovnet_fast

        torch.manual_seed(0)
        self.model = vovnet_fast.VoVNet("V-19-slim-dw-eSE")
        self.images = torch.randn(1, 3, 64, 64)

    def forwards(self):
        import torch

        with torch.no_grad():
            features = self.model.eval()(self.images)
        assert all(bool(feature.isfinite().all()) for feature in features)

    def trains(self):
        import torch

        sum(feature.square().mean() for feature in self.model.train()(self.images)).backward()
        # torch's optimizers import its compiler, whose support of Windows is its own matter.
        with torch.no_grad():
            for parameter in self.model.parameters():
                assert bool(parameter.grad.isfinite().all())
                parameter -= 1e-3 * parameter.grad

    def saves_weights(self):
        import torch

        torch.save(self.model.state_dict(), self.folder / "weights.pth")

    def converts(self):
        written = self.folder / "renamed.safetensors"
        for _ in range(2):  # The second one replaces a file.
            self.command("convert", self.folder / "weights.pth", written, "--to", "timm", "--force")
        assert written.is_file()

    def loads_weights(self):
        import vovnet_fast

        model = vovnet_fast.VoVNet("V-19-slim-dw-eSE")
        vovnet_fast.checkpoints.load(model, self.folder / "renamed.safetensors")

    def freezes(self):
        import torch

        import vovnet_fast

        frozen = vovnet_fast.freeze(self.model.eval())
        with torch.no_grad():
            expected = frozen(self.images)
        path = self.folder / "frozen.safetensors"
        for _ in range(2):
            frozen.save(path)
        with torch.no_grad():
            found = vovnet_fast.load_frozen(path)(self.images)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))

    def remembers(self):
        from vovnet_fast import tuning

        choices = {"a machine": {"a problem": tuning.Choice("an engine")}}
        path = self.folder / "cache" / "tuning.json"
        for _ in range(2):
            tuning.Table(path).keep(choices)
            assert tuning.Table(path).choices() == choices

    def shares_what_it_remembers(self):
        self.command("tuning", "export", self.folder / "choices.json")
        self.command("tuning", "import", self.folder / "choices.json")
        assert "an engine" in self.command("tuning", "show", "--json")

    def lists_specs(self):
        assert "V-99-eSE" in self.command("specs")

    def asks_the_doctor(self):
        said = self.command("doctor")
        assert "reference" in said

    def explains(self):
        self.command("explain", "V-19-slim-dw-eSE", "1x64x64")

    def refuses_what_takes_triton(self):
        from vovnet_fast.tools import cli

        for words in (("bench", "--plan"), ("compile",)):
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                status = cli.main([*words, "V-19-slim-dw-eSE", "1x64x64"])
            assert status == 1
            assert "not installed" in said.getvalue(), said.getvalue()

    def names_files_as_windows_can(self):
        for path in self.folder.rglob("*"):
            assert not set(path.name) & set('<>:"|?*\\'), path
            assert path.name[-1] not in ". ", path


if __name__ == "__main__":
    made = Path(sys.argv[1])
    os.environ["VOVNET_FAST_CACHE"] = str(made / "cache")
    pretend(made)
    Steps(made).run()
