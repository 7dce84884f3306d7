"""A blank figure, and how it becomes a PNG or SVG. Imports matplotlib and seaborn: import it where something is drawn.

Figures are made without pyplot: no window, no global state, and the backend does not matter.
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, ScalarFormatter

from hopeprobe.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

DPI = 150
PALETTE: list[Any] = sns.color_palette("colorblind")


class Canvas(Figure):
    """A figure that a notebook shows by itself, pyplot or not."""

    def _as_written(self) -> None:
        """Every name as it is: none is a formula to typeset, and no sign in it moves others; numbers of axes may be."""
        numbers: set[Text] = set()
        for axes in self.axes:
            for axis in (axes.xaxis, axes.yaxis):
                axis.get_ticklabels(which="both")  # which brings ticks and texts together
                for formatter, ticks in (
                    (axis.get_major_formatter(), axis.get_major_ticks()),
                    (axis.get_minor_formatter(), axis.get_minor_ticks()),
                ):
                    if isinstance(formatter, ScalarFormatter | LogFormatter):
                        numbers |= {label for tick in ticks for label in (tick.label1, tick.label2)}
        for text in self.findobj(Text):
            if text not in numbers:
                text.set_parse_math(False)
                text.set_text(printable(text.get_text(), lines=True))

    def png(self) -> bytes:
        """The figure as a PNG file."""
        image = io.BytesIO()
        self._as_written()
        self.savefig(image, dpi=DPI, format="png")
        return image.getvalue()

    def svg(self) -> bytes:
        """The figure as an SVG file, the same bytes every time."""
        image = io.BytesIO()
        self._as_written()
        with mpl.rc_context({"svg.hashsalt": "hopeprobe"}):
            self.savefig(image, format="svg", metadata={"Date": None})
        return image.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


@contextlib.contextmanager
def blank(width: float, height: float, scale: float = 0.85, *, arranged: bool = True) -> Iterator[Canvas]:
    """A canvas in inches, and the style to draw on it with; `scale` is that of its letters.

    arranged: axes are moved so that nothing overlaps; without it they stay where they are put.
    """
    light = {"grid.color": "0.9", "axes.edgecolor": "0.75"}
    thin = {"grid.linewidth": 0.8, "axes.linewidth": 0.8}
    with (
        sns.axes_style("whitegrid", light),
        sns.plotting_context("notebook", font_scale=scale, rc=thin),
        # Axes say their values themselves, and not what is to be added to a corner's "1e-5+9.999e-1".
        mpl.rc_context({"axes.formatter.useoffset": False}),
    ):
        yield Canvas(figsize=(width, height), layout="constrained" if arranged else None)
