"""What several test files need and takes long to make is made once in a session of tests."""

import fcntl
import shutil
from pathlib import Path


class Once:
    """Folders that the processes of a session of tests share (pytest-xdist).

    Args:
        root: the session's folder for temporary files, the same one in all of its processes.
    """

    def __init__(self, root):
        self.root = Path(root)

    def folder(self, name, make):
        """The folder of that name, filled by ``make(folder)`` where no process has done so yet.

        Another process that needs it meanwhile waits. What ``make`` raises goes to its own
        caller, and whoever asks next starts anew: a folder that is half full is never seen.
        """
        folder, made = self.root / name, self.root / f"{name}.made"
        with open(self.root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Released with the file, however the process ends.
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder


def root_of(config, factory):
    """The session's folder: workers each have one inside of it.

    The environment would not tell: a pytest that a test starts has it from its worker.
    """
    own = factory.getbasetemp()
    return own.parent if hasattr(config, "workerinput") else own
