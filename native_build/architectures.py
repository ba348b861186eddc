"""The GPU architectures that the CUDA half is compiled for."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from setuptools.errors import OptionError

ENVIRONMENT = "VOVNET_FAST_CUDA_ARCHS"

_MINIMUM = 80
_SUFFIXED_FROM = {"": _MINIMUM, "a": 90, "f": 100}


class Architecture(NamedTuple):
    """One of them.

    Attributes:
        number: compute capability, times ten.
        suffix: "a" where only this very capability is served, "f" for its family.
        ptx: whether PTX is kept as well, which newer GPUs compile for themselves.
    """

    number: int
    suffix: str = ""
    ptx: bool = False

    @property
    def name(self) -> str:
        return f"{self.number}{self.suffix}"

    def __str__(self) -> str:
        return self.name + ("+PTX" if self.ptx else "")

    def flags(self) -> list[str]:
        """What tells nvcc."""
        codes = [f"sm_{self.name}"] + ([f"compute_{self.name}"] if self.ptx else [])
        return [
            word for code in codes for word in ("-gencode", f"arch=compute_{self.name},code={code}")
        ]


_DEFAULT = (
    Architecture(80),
    Architecture(86),
    Architecture(87),
    Architecture(89),
    # The Hopper convolution's instructions belong to this one alone; all GPUs 9.x are 9.0.
    Architecture(90, "a"),
    Architecture(100),
    Architecture(120),
)


_WITH_ARM = frozenset({87})
"""Jetson Orin, which runs nothing that is compiled for 80, and is never without Arm's processor."""


def default(known: Collection[int], machine: str) -> tuple[Architecture, ...]:
    """All that an nvcc knows of the usual ones, and PTX of the newest that is not special.

    Args:
        known: numbers of the architectures that it knows.
        machine: the processor that is compiled for. Only ``aarch64`` meets GPUs that are on a
            board with it.
    """
    found = [
        arch
        for arch in _DEFAULT
        if arch.number in known and (machine == "aarch64" or arch.number not in _WITH_ARM)
    ]
    newest = max((arch for arch in found if not arch.suffix), default=None)
    return tuple(arch._replace(ptx=True) if arch == newest else arch for arch in found)


def parse(text: str, known: Collection[int]) -> tuple[Architecture, ...]:
    """Architectures from ``VOVNET_FAST_CUDA_ARCHS``.

    Args:
        text: separated by semicolons, commas or blanks: ``90a``, ``9.0a``, ``sm_90a``, each also
            with ``+PTX``.
        known: numbers of the architectures that nvcc knows.

    Raises:
        OptionError: one is not written so, is not known, or is older than the kernels allow.
    """
    words = re.split(r"[;,\s]+", text.strip(";, \t"))
    found: dict[str, Architecture] = {}
    for word in words:
        arch = _parse_one(word, known)
        before = found.get(arch.name, arch)
        found[arch.name] = arch._replace(ptx=arch.ptx or before.ptx)
    return tuple(sorted(found.values()))


def _parse_one(word: str, known: Collection[int]) -> Architecture:
    match = re.fullmatch(r"(?:sm_)?(?:(\d+)\.(\d)|(\d{2,3}))([af]?)(\+ptx)?", word.lower())
    if match is None:
        raise OptionError(
            f"{ENVIRONMENT}: {word!r} is no architecture; write compute capabilities as in "
            "80;90a or 8.0;9.0a+PTX"
        )
    major, minor, number, suffix, ptx = match.groups()
    arch = Architecture(int(number or major + minor), suffix, ptx is not None)
    if arch.number < _MINIMUM:
        raise OptionError(f"{ENVIRONMENT}: the kernels need sm_80 (Ampere) or newer, got {word!r}")
    if arch.number < _SUFFIXED_FROM[suffix]:
        raise OptionError(f"{ENVIRONMENT}: there is no sm_{arch.name}")
    if arch.number not in known:
        raise OptionError(
            f"{ENVIRONMENT}: this nvcc does not know sm_{arch.number}, only "
            f"{', '.join(f'sm_{n}' for n in sorted(known))}; leave it out, or take another nvcc "
            "(CUDA_HOME=folder)"
        )
    return arch


def written(architectures: Sequence[Architecture]) -> str:
    """In words, as :func:`parse` reads them."""
    return " ".join(map(str, architectures))
