"""How things look: one console, a progress bar on a terminal and plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from hopeprobe import ranks
from hopeprobe.printable import printable

#: Seconds between two plain lines where there is no terminal.
_PLAIN_EVERY = 15.0
#: Columns where the terminal does not say: tables go to files and logs whole.
PLAIN_WIDTH = 150


def console(stderr: bool = False) -> Console:
    """A console that never wraps tables to 80 columns in a file; of several ranks one is heard."""
    plain = Console(stderr=stderr, quiet=not ranks.first())
    return plain if plain.is_terminal else Console(stderr=stderr, quiet=plain.quiet, width=PLAIN_WIDTH)


def say(screen: Console, text: str, lines: bool = False) -> None:
    """Print text as it is: brackets in a path are no markup, and a long line is not broken.

    Control signs are written out, line breaks too unless `lines` says that the text is ours.
    """
    screen.print(printable(text, lines), highlight=False, soft_wrap=True, markup=False)


def shown(text: str, style: str = "default", lines: bool = False) -> Text:
    """Text of a cell or a title, as it is and never obeyed."""
    return Text(printable(text, lines), style=style)


Report = Callable[[str, int, int], None]


@contextmanager
def progress() -> Iterator[Report]:
    """Give a function `report(description, done, total)`, total 0 if unknown; it draws on standard error."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield _Lines(screen)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen) as bar:
        task = bar.add_task("starting", total=None)

        def report(description: str, done: int, total: int) -> None:
            bar.update(task, description=printable(description), completed=done, total=total or None)

        yield report


class _Lines:
    """Plain lines: one when a piece of work begins, one when it ends, and one now and then between."""

    def __init__(self, screen: Console) -> None:
        self.screen = screen
        self.last = ("", -math.inf)

    def __call__(self, description: str, done: int, total: int) -> None:
        what = description.partition(":")[0]
        now = time.monotonic()
        ended = 0 < total <= done
        if what != self.last[0] or ended or now - self.last[1] >= _PLAIN_EVERY:
            say(self.screen, f"{description} {done}" + (f"/{total}" if total else ""))
            self.last = (what, now)
