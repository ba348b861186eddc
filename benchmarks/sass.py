"""Reads the disassembly of compiled kernels: instructions, and the loop that multiplies.

The text is what ``nvdisasm -c`` prints of one kernel (:func:`vovnet_fast.aot.disassemble`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

_LABEL = re.compile(r"^\s*\.(L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TARGET = re.compile(r"`\(\.(L_\w+)\)")
PRODUCTS = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "QMMA")
"""What multiplies matrices: halves, int8 and fp8, of a warpgroup and of a warp."""

_OF_WARPGROUP = re.compile(r"[HIQ]GMMA\.(\d+)x(\d+)x(\d+)\.")
_OF_WARP = {
    "16832": 16 * 8 * 32,
    "16816": 16 * 8 * 16,
    "1688": 16 * 8 * 8,
    "1684": 16 * 8 * 4,
}
"""Multiply-adds of a warp by the shape in the name, whose digits nothing separates."""

_WARPGROUP = 4  # Warps that issue its instruction together.
_JUMPS = {"BRA", "JMP"}
_ENDS = {"EXIT", "RET"}
_COPIES = {"UTMALDG", "LDGSTS"}


@dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
        name: with its modifiers, such as ``LDG.E.128``.
        guarded: only threads for which a predicate holds do it.
        target: the label that it names, or None.
    """

    name: str
    guarded: bool = False
    target: str | None = None

    @property
    def operation(self) -> str:
        """The name without modifiers."""
        return self.name.partition(".")[0]

    @property
    def multiply_adds(self) -> int:
        """Of a tensor core instruction a warp's share; 0 of any other.

        Raises:
            ValueError: it is one of unknown shape.
        """
        if self.operation not in PRODUCTS:
            return 0
        match = _OF_WARPGROUP.match(self.name)
        if match is not None:
            rows, columns, depth = map(int, match.groups())
            return rows * columns * depth // _WARPGROUP
        for part in self.name.split("."):
            if part in _OF_WARP:
                return _OF_WARP[part]
        raise ValueError(f"{self.name} multiplies matrices of unknown shape: add it to {__name__}")


@dataclass
class Block:
    """Instructions that run one after the other.

    Attributes:
        body: the instructions.
        successors: indices of the blocks that may run next.
    """

    body: list[Instruction] = field(default_factory=list)
    successors: set[int] = field(default_factory=set)


def blocks(sass: str) -> list[Block]:
    """The basic blocks of a kernel in the order of their addresses; the first is its entry.

    Raises:
        ValueError: the text has no instructions, or a jump leads to a label that it has not.
    """
    found, labels = [Block()], {}
    for line in sass.splitlines():
        label, instruction = _LABEL.match(line), _INSTRUCTION.match(line)
        if label is not None:
            if found[-1].body:
                found.append(Block())
            labels[label[1]] = len(found) - 1
        elif instruction is not None:
            guard, name, operands = instruction.groups()
            target = _TARGET.search(operands)
            one = Instruction(name, guard is not None, None if target is None else target[1])
            found[-1].body.append(one)
            if one.operation in _JUMPS | _ENDS:
                found.append(Block())
    if not found[0].body:
        raise ValueError("no instructions in this text: is it what nvdisasm -c printed?")
    for i, block in enumerate(found):
        last = block.body[-1] if block.body else Instruction("NOP")
        leaves = last.operation in _JUMPS | _ENDS
        if i + 1 < len(found) and (last.guarded or not leaves):
            block.successors.add(i + 1)
        if last.operation in _JUMPS:
            if last.target not in labels:
                raise ValueError(f"{last.name} leads to {last.target}, which is not in this text")
            block.successors.add(labels[last.target])
    return found


def _reachable(kernel: list[Block]) -> set[int]:
    found, ahead = {0}, [0]
    while ahead:
        new = kernel[ahead.pop()].successors - found
        found |= new
        ahead += new
    return found


def _dominators(kernel: list[Block]) -> dict[int, set[int]]:
    """For each block that can be reached those that every way to it leads through."""
    reachable = _reachable(kernel)
    found = {i: set(reachable) for i in reachable} | {0: {0}}
    before: dict[int, set[int]] = {}
    while before != found:
        before = dict(found)
        for i in sorted(reachable - {0}):
            ways = [found[j] for j in reachable if i in kernel[j].successors]
            found[i] = {i} | set.intersection(*ways)
    return found


def loops(kernel: list[Block]) -> list[tuple[int, int]]:
    """The first and the last block of each loop: where a jump back leads to, and whence.

    Compilers put the waiting for a barrier out of line, behind the kernel's end, and jump
    back from there, into the middle of a loop: that is no loop, as the block does not
    dominate the jump.
    """
    dominators = _dominators(kernel)
    return [(i, j) for j in dominators for i in kernel[j].successors & dominators[j]]


def way_round(kernel: list[Block], first: int, last: int) -> list[Instruction]:
    """What one round of a loop issues where nothing but its products has to be done.

    Of the ways through its blocks it is that with the most products, then with the most
    copies to shared memory, then the shortest: a persistent kernel's loop holds the
    epilogue of a tile as well, and jumps over it in all rounds but a tile's last.

    Raises:
        ValueError: the loop is not laid out from its first block to its last.
    """
    ways: dict[int, list[Instruction]] = {}
    for i in range(first, last + 1):
        before = [ways[j] for j in ways if i in kernel[j].successors]
        if i == first or before:
            own = [one for one in kernel[i].body if one.operation != "NOP"]
            ways[i] = max(before, key=_worth, default=[]) + own
    if last not in ways:
        raise ValueError(f"no way from block {first} leads to block {last} by rising addresses")
    return ways[last]


def _worth(way: list[Instruction]) -> tuple[int, int, int]:
    copies = sum(one.operation in _COPIES for one in way)
    return multiply_adds(way), copies, -len(way)


def hot_loop(sass: str) -> list[Instruction]:
    """One round of the loop that multiplies most with tensor cores; empty where none does.

    Of loops around each other it is the innermost: the outer one multiplies no more, and
    does other things besides. Of a loop and its rest it is the loop.
    """
    kernel = blocks(sass)
    ways = [way_round(kernel, *loop) for loop in loops(kernel)]
    return max((way for way in ways if multiply_adds(way)), key=_worth, default=[])


def multiply_adds(body: list[Instruction]) -> int:
    """Of the tensor cores, for one warp."""
    return sum(one.multiply_adds for one in body)


def counts(body: list[Instruction]) -> Counter[str]:
    """Instructions by operation."""
    return Counter(one.operation for one in body)


def instructions(sass: str) -> list[Instruction]:
    """All of a kernel but what only fills it up: NOPs, and the jump to itself at its end."""
    kernel = blocks(sass)
    return [
        one
        for i, block in enumerate(kernel)
        if block.successors != {i}
        for one in block.body
        if one.operation != "NOP"
    ]
