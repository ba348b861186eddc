"""Progress on the console: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_PLAIN_SECONDS = 10.0


class Display:
    """Shows how far each phase of the demo has come.

    Args:
        console: where to write. It must not follow ``sys.stdout`` if that is
            redirected during a phase: give ``Console(file=sys.stdout)``.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Write a line as it is, without rich's markup and line breaks."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[Callable[[str], None]]:
        """Show a phase of ``total`` steps.

        Yields:
            ``step(text)``, to be called after each step; ``text`` is shown
            behind the count, e.g. the loss.
        """
        if self.console.is_terminal:
            with self._bar() as bar:
                task = bar.add_task(title, total=total, detail="")
                yield lambda text="": bar.update(task, advance=1, detail=text)
        else:
            yield self._plain_steps(title, total)

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description:10s}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def _plain_steps(self, title: str, total: int) -> Callable[[str], None]:
        """A ``step`` that writes a line every ten seconds, and one at the end."""
        start = shown = time.monotonic()
        done = 0

        def step(text: str = "") -> None:
            nonlocal done, shown
            done += 1
            now = time.monotonic()
            if done == total or now - shown >= _PLAIN_SECONDS:
                shown = now
                left = format_seconds((now - start) / done * (total - done))
                self.say(f"{title:10s} {done:5d}/{total}  {text}  ETA {left}")

        return step


def format_seconds(seconds: float) -> str:
    """Minutes and seconds: ``4:07``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
