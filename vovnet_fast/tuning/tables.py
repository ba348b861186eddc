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

from .._files import locked, replacing

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
        path: the file. It is read on first use, and written after each new choice;
            processes that write at the same time lose nothing.
        beneath: what is asked for problems that the file does not know. It is not
            written into the file.
    """

    def __init__(self, path: Path, beneath: Choices | None = None) -> None:
        self.path = path
        self._beneath = beneath or {}
        self._lock = threading.RLock()
        self._choices: Choices | None = None

    def get(self, machine: str, problem: str) -> str | None:
        """The choice for a problem, or None."""
        with self._lock:
            own = self._loaded().get(machine, {}).get(problem)
        known = own or self._beneath.get(machine, {}).get(problem)
        return None if known is None else known.name

    def put(self, machine: str, problem: str, choice: str | Choice) -> None:
        """Remember a choice, and write the file; only warn where that is impossible."""
        found = Choice(choice) if isinstance(choice, str) else choice
        try:
            self.add({machine: {problem: found}}, replace=True)
        except OSError as error:
            _log.warning("cannot keep choices in %s: %s", self.path, error)

    def add(self, choices: Choices, *, replace: bool = False) -> None:
        """Remember choices, and write the file. Known ones stay, unless ``replace``.

        Raises:
            OSError: the file cannot be written. They are remembered in memory all the same.
        """
        with self._lock:
            own = self._loaded()
            self._choices = merge(own, choices) if replace else merge(choices, own)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Without a lock, what two processes write at the same moment may be lost: it is found
            # out again.
            with locked(self.path.parent):
                self._choices = merge(read(self.path), self._choices)
                export(self._choices, self.path)

    def choices(self) -> Choices:
        """A copy of everything known."""
        with self._lock:
            return merge(self._beneath, self._loaded())

    def _loaded(self) -> Choices:
        if self._choices is None:
            self._choices = read(self.path)
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
    content = json.loads(path.read_text())
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
        Path(temporary).write_text(json.dumps(content, indent=1, sort_keys=True))
