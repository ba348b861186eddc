"""Fresh interpreters beside this one, for what cannot be done in it.

The process that asks may hold a GPU, be a daemon, or be a script that cannot be imported twice:
``multiprocessing`` would trip over each.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys


def command(module: str, function: str) -> list[str]:
    """The words that start one, which calls a function of a module of this package.

    Raises:
        OSError: this program has none, as where it is frozen into one file.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise OSError("this program has no Python interpreter to start (sys.executable)")
    # It must find what this one has found.
    places = json.dumps([place or os.getcwd() for place in sys.path])
    code = f"import json, sys; sys.path[:] = json.loads(sys.argv.pop()); import {module} as m"
    return [sys.executable, "-c", f"{code}; m.{function}()", places]


def begin() -> None:
    """To be called first in one: it leaves Ctrl-C, and its own end, to the process that asked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Let the system end this process when the one that started it ends."""
    if sys.platform == "linux":
        set_signal_at_end_of_parent = 1
        ctypes.CDLL(None).prctl(set_signal_at_end_of_parent, signal.SIGKILL)
