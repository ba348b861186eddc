"""Running compilers with ninja: in parallel, and only for what has changed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from setuptools.errors import CompileError, ExecError, OptionError

_HEADER = """\
ninja_required_version = 1.5

rule compile
  command = $words -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $what

rule link
  command = $words
  description = $what

"""


class Step(NamedTuple):
    """One run of a compiler.

    Attributes:
        rule: ``compile`` or ``link``.
        output: the file it makes.
        inputs: the files it makes it from.
        words: the command. That of ``compile`` ends before its input and output.
        what: for people.
        needs: other files that it reads.
    """

    rule: str
    output: Path
    inputs: tuple[Path, ...]
    words: tuple[str, ...]
    what: str
    needs: tuple[Path, ...] = ()


def build(steps: Sequence[Step], folder: Path) -> None:
    """Carry out what is not done yet. All that is printed is in ``build.log`` as well.

    Args:
        steps: the last one makes what is wanted.
        folder: for ninja's files.

    Raises:
        CompileError: a compiler fails, with the names of the sources.
        ExecError: there is no ninja.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "build.ninja"
    header = f"builddir = {_path(folder)}\n{_HEADER}"
    file.write_text(header + "\n".join(map(_statement, steps)), encoding="utf-8")
    words = [_program(), "-f", str(file), *_jobs(), str(steps[-1].output)]
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    lines = []
    with (
        open(folder / "build.log", "w", encoding="utf-8") as log,
        subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            log.write(line)
            lines.append(line)
    if process.returncode != 0:
        raise CompileError(
            f"{' and '.join(_failed(steps, lines)) or 'ninja'} failed; what the compiler said is "
            f"above, and in {folder / 'build.log'}"
        )


def _statement(step: Step) -> str:
    inputs = " ".join(map(_path, step.inputs))
    needs = " | " + " ".join(map(_path, step.needs)) if step.needs else ""
    return (
        f"build {_path(step.output)}: {step.rule} {inputs}{needs}\n"
        f"  words = {shlex.join(step.words).replace('$', '$$')}\n"
        f"  what = {step.what.replace('$', '$$')}\n"
    )


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _failed(steps: Iterable[Step], lines: Iterable[str]) -> list[str]:
    """What the failed steps were to do."""
    outputs = {name for line in lines for name in _outputs_of_failure(line)}
    return [step.what for step in steps if str(step.output) in outputs]


def _outputs_of_failure(line: str) -> list[str]:
    """The files in ninja's ``FAILED: [code=1] a.o``, whose code older ones do not say."""
    match = re.match(r"FAILED: (?:\[code=\d+\] )?(.*)", line)
    return [match[1].strip()] if match else []


def _program() -> str:
    """ninja, of the package or on the path."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise ExecError(
                "ninja, which is needed to build the extension, was not found: pip install ninja"
            ) from None
        return found
    return str(Path(ninja.BIN_DIR, "ninja"))


def _jobs() -> list[str]:
    """How many at a time. By itself ninja takes a few more than there are cores."""
    text = os.environ.get("MAX_JOBS", "")
    if not text:
        return ["-j", str(len(os.sched_getaffinity(0)))] if hasattr(os, "sched_getaffinity") else []
    if not text.isdecimal() or int(text) < 1:
        raise OptionError(f"MAX_JOBS must be a number from 1 on, got {text!r}")
    return ["-j", text]
