"""A pickle is a program. Here it is read as a list of instructions, and nothing of it is run.

:class:`Machine` carries out those that make numbers, strings, lists, tuples and dicts. What stands
for the names in a pickle, and what comes of calling them, its subclasses decide. Nothing that a
pickle names is imported or called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

MARK = object()


class Machine:
    """The stack and the memo of a pickle. A subclass says what its names mean.

    Args:
        size: bytes of the file. What is made of them is bounded by it: the same bytes can be used
            many times.
    """

    steps: ClassVar[Mapping[str, Callable[[Any, Any], None]]]
    """What is done at an instruction, by its name in pickletools, with its argument."""

    remedy: ClassVar[str]
    """What to do about a file that has something else in it."""

    def __init__(self, size: int) -> None:
        self._room = size
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    # What a subclass decides

    def named(self, name: str) -> Any:
        """What stands for a name, its module and itself with a space between them."""
        raise NotImplementedError

    def called(self, named: Any, arguments: tuple[Any, ...]) -> Any:
        """What comes of calling that."""
        raise NotImplementedError

    def built(self, value: Any, state: Any) -> None:
        """Give a value its state."""
        raise NotImplementedError

    def finished(self, value: Any) -> Any:
        """A value as it goes into a container."""
        if value is MARK:
            raise ValueError("it takes a mark for a value: it is damaged")
        return value

    def key(self, key: Any) -> bool:
        """Whether a dict takes an item of this key; without it the item is left out."""
        if not isinstance(key, (str, int)):
            raise ValueError(f"a dict has a {type(key).__name__} for a key, expected a string")
        return True

    # The machine

    def run(self, file: Any) -> Any:
        """What a pickle holds.

        Args:
            file: a binary file, or a map of one; it is left after the pickle's end.

        Raises:
            ValueError: it is damaged, or has something in it that is not read.
        """
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in _CONSTANTS:
                self._stack.append(argument)
            elif opcode.name in self.steps:
                self.steps[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "FRAME", "STOP"):
                raise ValueError(
                    f"it has the instruction {opcode.name}, for which there is no use. "
                    f"{self.remedy}"
                )
        return self.finished(self.pop())  # genops raises where there is no STOP.

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if not self._stack:
            raise ValueError("it takes something from an empty stack: it is damaged")
        return self._stack.pop()

    def top(self) -> Any:
        self.push(value := self.pop())
        return value

    def since_mark(self) -> list[Any]:
        found = []
        while (value := self.pop()) is not MARK:
            found.append(self.finished(value))
        return found[::-1]

    def some(self, number: int) -> list[Any]:
        return [self.finished(self.pop()) for _ in range(number)][::-1]

    def put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self.top()

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"it remembers nothing under the number {index}: it is damaged")
        self.push(self._memo[index])

    def extend(self, values: list[Any]) -> None:
        into = self.top()
        if not isinstance(into, list):
            raise ValueError(f"it appends to a {type(into).__name__}: it is damaged")
        into.extend(values)

    def update(self, values: list[Any]) -> None:
        into = self.top()
        if not isinstance(into, dict) or len(values) % 2:
            raise ValueError(f"it sets items of a {type(into).__name__}: it is damaged")
        for i in range(0, len(values), 2):
            key, value = values[i : i + 2]
            if self.key(key):
                into[key] = value

    def spend(self, size: int) -> None:
        """Count bytes that something takes in memory."""
        self._room -= size
        if self._room < 0:
            raise ValueError("it uses the same bytes again and again: it is no file of weights")


# --------------------------------------------------------------------------------------
# Instructions
# --------------------------------------------------------------------------------------


def _new_dict(machine: Machine) -> None:
    values = machine.since_mark()
    machine.push({})
    machine.update(values)


def _name(machine: Machine) -> None:
    module, name = machine.some(2)
    machine.push(machine.named(f"{module} {name}"))


def _call(machine: Machine) -> None:
    arguments, named = machine.pop(), machine.pop()
    if not isinstance(arguments, tuple):
        raise ValueError(
            f"it calls something with a {type(arguments).__name__}, expected a tuple: it is damaged"
        )
    machine.push(machine.called(named, arguments))


def _build(machine: Machine) -> None:
    state = machine.finished(machine.pop())
    machine.built(machine.top(), state)


# Whose argument is the value.
_CONSTANTS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)

STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "MARK": lambda machine, _: machine.push(MARK),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "POP": lambda machine, _: (machine.pop(), None)[1],
    "POP_MARK": lambda machine, _: (machine.since_mark(), None)[1],
    "DUP": lambda machine, _: machine.push(machine.top()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "DICT": lambda machine, _: _new_dict(machine),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.some(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.some(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.some(3))),
    "APPEND": lambda machine, _: machine.extend(machine.some(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.update(machine.some(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.since_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine.get),
    "GLOBAL": lambda machine, name: machine.push(machine.named(name)),
    "STACK_GLOBAL": lambda machine, _: _name(machine),
    "REDUCE": lambda machine, _: _call(machine),
    "BUILD": lambda machine, _: _build(machine),
}
