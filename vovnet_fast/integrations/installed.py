"""Which distributions of OpenMMLab's packages are installed, and whether they go together.

mmcv, mmdet and mmengine are published by OpenMMLab, and, maintained further, as ``onedl-mmcv``,
``onedl-mmdetection`` and ``onedl-mmengine``, which are imported by the same names: pip lays one
over the other without a word. Nothing is imported here: what cannot be imported can be told apart
too.
"""

from __future__ import annotations

import csv
import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

MODULES = ("mmengine", "mmcv", "mmdet", "mmdet3d")
"""Folders that both own."""

_ONEDL = "onedl-"


class Installed(NamedTuple):
    """A distribution that brings a module.

    Attributes:
        name: as pip knows it.
        version: in words.
        gone: files of the module that are not there, although the distribution says so.
    """

    name: str
    version: str
    gone: tuple[str, ...] = ()

    @property
    def onedl(self) -> bool:
        """Whether it is of those that are maintained further."""
        return self.name.startswith(_ONEDL)

    @property
    def release(self) -> tuple[int, ...]:
        """The numbers of its version."""
        return tuple(map(int, re.findall(r"\d+", self.version)[:3]))

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def installed(module: str) -> list[Installed]:
    """The distributions that bring a module, by their metadata. Of one name the first counts."""
    found: dict[str, Installed] = {}
    for distribution in importlib.metadata.distributions():
        if module in _top_level(distribution):
            name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "?").lower()
            gone = tuple(_gone(distribution, module))
            found.setdefault(name, Installed(name, distribution.version, gone))
    return [found[name] for name in sorted(found)]


def _top_level(distribution: importlib.metadata.Distribution) -> set[str]:
    """The modules that it brings."""
    names = (distribution.read_text("top_level.txt") or "").split()
    files = set(_recorded(distribution))
    return {*names, *(module for module in MODULES if f"{module}/__init__.py" in files)}


def _recorded(distribution: importlib.metadata.Distribution) -> list[str]:
    """What was installed; ``distribution.files`` leaves out what is gone, from Python 3.12 on."""
    record = distribution.read_text("RECORD") or ""
    return [row[0] for row in csv.reader(record.splitlines()) if row]


def _gone(distribution: importlib.metadata.Distribution, module: str) -> Iterator[str]:
    for file in _recorded(distribution):
        ours = file.startswith(f"{module}/") and file.endswith(".py")
        if ours and not Path(str(distribution.locate_file(file))).exists():
            yield file


def problems() -> list[str]:
    """What is amiss with them, each with what to do about it."""
    found = {module: installed(module) for module in MODULES}
    twice = [_twice(module, them) for module, them in found.items() if len(them) > 1]
    if twice:  # What else is amiss follows from that.
        return twice
    alone = {module: them[0] for module, them in found.items() if them}
    half = [_half(module, it) for module, it in alone.items() if it.gone]
    mmcv, mmdet = alone.get("mmcv"), alone.get("mmdet")
    other = None if mmcv is None or mmdet is None else _of_other_times(mmcv, mmdet)
    return half + ([other] if other else [])


def _twice(module: str, them: list[Installed]) -> str:
    names = " ".join(it.name for it in them)
    choice = " or ".join(f'"{it.name}=={it.version}"' for it in them)
    return (
        f"{' and '.join(map(str, them))} are both installed and own the same folder {module}, in "
        f"which one has overwritten files of the other. Remove both, and install the one that you "
        f"want: pip uninstall -y {names}, then pip install --no-deps {choice}"
    )


def _half(module: str, it: Installed) -> str:
    return (
        f"{it} is there by half: {len(it.gone)} files of it are gone, {it.gone[0]} for one, as "
        f"happens when another distribution that owned the folder {module} too is uninstalled. "
        f'pip install --force-reinstall --no-deps "{it.name}=={it.version}"'
    )


def _of_other_times(mmcv: Installed, mmdet: Installed) -> str | None:
    """Why two do not go together, or None."""
    if mmdet.release < (3,) and mmcv.release >= (2,):
        return (
            f"{mmdet} was written for mmcv 1.x, and {mmcv} is installed: pip install "
            '"mmcv-full==1.7.2" for this mmdet, or mmdet 3.x for this mmcv'
        )
    if mmdet.release < (3,):
        return None
    if mmcv.release < (2,):
        return (
            f"{mmdet} needs mmcv 2.x, and {mmcv} is installed: pip install "
            '"mmdet==2.28.2" for this mmcv, or mmcv 2.1 (mim install "mmcv==2.1.0") for this mmdet'
        )
    if not mmdet.onedl and mmdet.release < (3, 4) and mmcv.release >= (2, 2):
        return (
            f"{mmdet} refuses mmcv 2.2 and newer, and {mmcv} is installed: mim install "
            f'"mmcv==2.1.0". Where there is no wheel of that for your torch, remove both (pip '
            f"uninstall -y {mmcv.name} {mmdet.name}) and take the maintained ones, which go "
            "together: pip install --no-build-isolation onedl-mmcv onedl-mmdetection"
        )
    return None


def remedy(module: str) -> str:
    """What to install for a module that is missing, beside what is there."""
    found = {name: next(iter(installed(name)), None) for name in MODULES}
    upstreams = [it for it in found.values() if it is not None and not it.onedl]
    mmcv = found["mmcv"]
    if not upstreams or (mmcv is not None and mmcv.onedl):
        return 'pip install "vovnet-fast[onedl]" (see the README for mmcv and its compiled ops)'
    old, there = _of_mmcv_1(found), mmcv or upstreams[-1]
    if mmcv is None and module in ("mmcv", "mmcv._ext"):
        full = f"mmcv-full=={'1.7.0' if found['mmdet3d'] else '1.7.2'}"
        return f'mim install "{full if old else "mmcv==2.1.0"}" for {there}'
    if mmcv is not None and module == "mmcv._ext":
        full = "mmcv-full" if mmcv.release < (2,) else "mmcv"
        return (
            f"pip uninstall -y {mmcv.name}, then mim install "
            f'"{full}=={mmcv.version}", which has its operators'
        )
    if module == "mmdet":
        return f'pip install "mmdet=={"2.28.2" if old else "3.3.0"}" for {there}'
    return f"pip install {module} for {there}"


def _of_mmcv_1(found: Mapping[str, Installed | None]) -> bool:
    """Whether what is there is of the times of mmcv 1.x, as the first that is there tells."""
    for module, first in (("mmcv", (2,)), ("mmdet", (3,)), ("mmdet3d", (1, 1))):
        it = found[module]
        if it is not None:
            return it.release < first
    return False
