"""What was chosen by measurement, and the times it was chosen by, in memory and in files.

A file is JSON, of format 2. Of each machine and problem it has the choice, and where they are
known the seconds of what was measured and what it was measured on:

    {"format": 2, "choices": {MACHINE: {PROBLEM: {"choice": NAME, "seconds": {NAME: SECONDS},
    "layer": {...}}, PROBLEM: NAME}}}

Format 1, which has names alone, is read as well.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._files import locked, read_text, replacing

FORMAT = 2
_READABLE = (1, FORMAT)

_log = logging.getLogger("vovnet_fast.tuning")


@dataclass(frozen=True)
class Choice:
    """What was chosen for a problem.

    Attributes:
        name: of it.
        seconds: of everything that was measured, by name; empty where that is not known.
        layer: what it was measured on, as JSON can hold it; empty where that is not known.
    """

    name: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    layer: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> str | dict[str, Any]:
        """The name alone where there is no more."""
        if not self.seconds:
            return self.name
        return {"choice": self.name, "seconds": dict(self.seconds), "layer": dict(self.layer)}

    @classmethod
    def from_json(cls, content: Any) -> Choice:
        """The reverse of :meth:`as_json`.

        Raises:
            ValueError: ``content`` is something else.
        """
        if isinstance(content, str):
            return cls(content)
        if not isinstance(content, dict) or not isinstance(content.get("choice"), str):
            raise ValueError(f"no choice: {content!r}")
        seconds, layer = content.get("seconds", {}), content.get("layer", {})
        if not isinstance(layer, dict) or not _times(seconds):
            raise ValueError(f"no times of what was measured: {content!r}")
        return cls(content["choice"], seconds, layer)


def _times(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(value, (int, float)) and 0 < value < math.inf for value in found.values()
    )


Choices = dict[str, dict[str, Choice]]
"""By machine and problem."""


class Table:
    """Choices by machine and problem, in memory and in a file.

    Args:
        path: the file, or None where there can be none and choices are kept in memory alone.
            It is read on first use, and written after each new choice; processes that write at
            the same time lose nothing. One that is damaged or of another format is never
            written: it may be a newer version's.
        beneath: what is asked for problems that the file does not know. It is not
            written into the file.
    """

    def __init__(self, path: Path | None, beneath: Choices | None = None) -> None:
        self.path = path
        self._beneath = beneath or {}
        self._lock = threading.RLock()
        self._choices: Choices | None = None
        self._refused = False

    def get(self, machine: str, problem: str) -> str | None:
        """The choice for a problem, or None."""
        with self._lock:
            own = self._loaded().get(machine, {}).get(problem)
        known = own or self._beneath.get(machine, {}).get(problem)
        return None if known is None else known.name

    def put(self, machine: str, problem: str, choice: str | Choice) -> None:
        """Remember a choice, and write the file.

        Where that is impossible it is said once, and not tried again: whoever waited for a lock
        would wait for it at every layer.
        """
        found = Choice(choice) if isinstance(choice, str) else choice
        self.keep({machine: {problem: found}})

    def keep(self, choices: Choices, what: str = "choices") -> None:
        """:meth:`put` of several, called ``what`` in the warning."""
        with self._lock:
            if self._refused:
                self._choices = merge(self._loaded(), choices)
                return
            try:
                self.add(choices, replace=True)
            except (OSError, ValueError) as error:
                self._refused = True
                _log.warning("cannot keep %s in %s: %s", what, self.path, error)

    def add(self, choices: Choices, *, replace: bool = False) -> None:
        """Remember choices, and write the file. Known ones stay, unless ``replace``.

        Raises:
            OSError: the file cannot be read or written, or another process holds the folder.
            ValueError: the file is damaged or of another format, and is left as it is.
                Either way the choices are remembered in memory.
        """
        with self._lock:
            own = self._loaded()
            self._choices = merge(own, choices) if replace else merge(choices, own)
            if self.path is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Without a lock, what two processes write at the same moment may be lost: it is found
            # out again.
            with locked(self.path.parent):
                self._choices = merge(_for_writing(self.path), self._choices)
                export(self._choices, self.path)

    def choices(self) -> Choices:
        """A copy of everything known."""
        with self._lock:
            return merge(self._beneath, self._loaded())

    def _loaded(self) -> Choices:
        if self._choices is None:
            self._choices = {} if self.path is None else read(self.path)
        return self._choices


def merge(first: Choices, second: Choices) -> Choices:
    """Both, and the second where both know a problem."""
    merged = {machine: dict(found) for machine, found in first.items()}
    for machine, found in second.items():
        merged.setdefault(machine, {}).update(found)
    return merged


def load(path: Path) -> Choices:
    """Choices from a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged or of another format.
    """
    try:
        content = json.loads(read_text(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError("it names no format")
    if content["format"] not in _READABLE:
        expected = " or ".join(map(str, _READABLE))
        raise ValueError(f"its format is {content['format']!r}, expected {expected}")
    choices = content.get("choices")
    if not isinstance(choices, dict) or not all(isinstance(f, dict) for f in choices.values()):
        raise ValueError("its choices are not by machine and problem")
    return {
        machine: {problem: Choice.from_json(choice) for problem, choice in found.items()}
        for machine, found in choices.items()
    }


def read(path: Path) -> Choices:
    """Choices from a file; none, and a warning, where it is damaged or of another format."""
    try:
        return load(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning("ignoring the file %s: %s", path, error)
        return {}


def _for_writing(path: Path) -> Choices:
    """What a file has that is about to be replaced.

    Raises:
        OSError, ValueError: as :func:`load`, unless there is no file.
    """
    try:
        return load(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or a newer version's, and is left as it is: {error}; move it away "
            "or delete it"
        ) from error


def export(choices: Choices, path: Path) -> None:
    """Write choices to a file that :func:`load` understands, all of it or nothing.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    with replacing(path) as temporary:
        found = {
            machine: {problem: choice.as_json() for problem, choice in problems.items()}
            for machine, problems in choices.items()
        }
        content = {"format": FORMAT, "choices": found}
        text = json.dumps(content, indent=1, sort_keys=True)
        Path(temporary).write_text(text, encoding="utf-8")
