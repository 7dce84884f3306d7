"""What every figure has in common."""

from hopeprobe.plots.canvas import blank


def test_axes_say_their_values_themselves():
    """Of values that differ in the fifth digit and later matplotlib's own axes say 1e-5 and what is to be added."""
    with blank(4, 3) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0.99991, 0.99992])
    figure.png()  # outside, as a notebook does
    assert axes.yaxis.get_offset_text().get_text() == ""
    shown = [float(label.get_text()) for label in axes.get_yticklabels()]
    assert shown == sorted(set(shown))
    assert min(shown) <= 0.99991 <= 0.99992 <= max(shown)
