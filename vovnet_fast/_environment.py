"""The environment variables of the package, and what they may say: no typing error is ignored."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PREFIX = "VOVNET_FAST_"


class Variable(NamedTuple):
    """A variable that is read while the package runs.

    Attributes:
        expected: what it may say, in words.
        allows: whether it may say this. Empty is as if it were not set.
    """

    expected: str
    allows: Callable[[str], bool]


def _one_of(*values: str) -> Variable:
    return Variable(f"one of {', '.join(values)}", values.__contains__)


VARIABLES = {
    "BACKEND": _one_of("auto", "reference", "cpu", "triton", "cuda"),
    "CPU_ISA": _one_of("baseline", "avx2", "avx512", "neon"),
    "CHECK": _one_of("0", "1"),
    "KEEP_WEIGHTS": _one_of("0", "1"),
    "CONV_SM90": _one_of("0", "1"),
    "WINOGRAD": _one_of("0", "2", "4"),
    "TUNE": _one_of("0", "1", "all"),
    "TUNING_TABLE": Variable(
        "a file that `vovnet-fast tuning export` wrote", lambda value: Path(value).is_file()
    ),
    "COMPILE_WORKERS": Variable("a number of processes, 0 for none", str.isdecimal),
    "COMPILE_LOG": Variable(
        "a file in a folder that exists", lambda value: Path(value).absolute().parent.is_dir()
    ),
}
"""What is read, without :data:`PREFIX`, but for folders and words that may be anything."""

_OTHERS = ("CACHE", "COMMIT", "EXTENSION", "CUDA", "CUDA_ARCHS", "BUILD_ISAS")
"""Read as well, the last ones while pip builds."""

_log = logging.getLogger("vovnet_fast")
_warned: set[str] = set()


def require() -> None:
    """Refuse values that nothing can be made of; names that nobody reads are said once.

    Raises:
        ValueError: a variable says something else than it may.
    """
    for name in sorted(os.environ):
        if not name.startswith(PREFIX):
            continue
        short, value = name.removeprefix(PREFIX), os.environ[name]
        variable = VARIABLES.get(short)
        if variable is not None and value and not variable.allows(value):
            raise ValueError(f"{name} must be {variable.expected}, got {value!r}")
        known = (*VARIABLES, *_OTHERS)
        if short not in known and not short.startswith("EVIDENCE") and name not in _warned:
            _warned.add(name)
            near = difflib.get_close_matches(short, known, 1)
            hint = f"is {PREFIX}{near[0]} meant?" if near else "unset it"
            _log.warning("the environment variable %s is read by nobody: %s", name, hint)


def flag(name: str, default: str = "0") -> bool:
    """Whether a variable that may be 0 or 1 is 1.

    Args:
        name: of the variable, without :data:`PREFIX`.
        default: what it says where it is not set.

    Raises:
        ValueError: it is something else.
    """
    return _value(name, default) == "1"


def number(name: str, default: str) -> int:
    """What a variable says that is one of several numbers.

    Args:
        name: of the variable, without :data:`PREFIX`.
        default: what it says where it is not set.

    Raises:
        ValueError: it is none of them.
    """
    return int(_value(name, default))


def given(name: str) -> str:
    """What a variable says; nothing where it is not set.

    Args:
        name: of the variable, without :data:`PREFIX`.

    Raises:
        ValueError: it is nothing that it may say.
    """
    return _value(name, "") if os.environ.get(PREFIX + name) else ""


def _value(name: str, default: str) -> str:
    value = os.environ.get(PREFIX + name) or default
    if not VARIABLES[name].allows(value):
        raise ValueError(f"{PREFIX}{name} must be {VARIABLES[name].expected}, got {value!r}")
    return value
