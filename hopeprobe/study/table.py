"""A table to read and to compute with: HTML in a notebook, Markdown when printed, numbers in `frame`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Table:
    """Lines of text under a header.

    Attributes:
        header: names of the columns.
        lines: a text a column.
        notes: what must be known to read it, shown above.
        numbers: makes the same table for computing; None where the texts are all there is.

    """

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    numbers: Callable[[], pd.DataFrame] | None = None

    @property
    def frame(self) -> pd.DataFrame:
        """A DataFrame, a row a line: numbers as numbers, where there are any."""
        if self.numbers is not None:
            return self.numbers()
        import pandas as pd

        frame: pd.DataFrame = pd.DataFrame(list(self.lines), columns=list(self.header))
        return frame

    def __len__(self) -> int:
        return len(self.lines)

    def __repr__(self) -> str:
        table = markdown(self.header, self.lines) if self.lines else ""
        return "\n\n".join(filter(None, ("\n".join(self.notes), table.rstrip())))

    def _repr_html_(self) -> str:
        from hopeprobe.notebook import html_table

        return html_table(self.header, self.lines, self.notes)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
