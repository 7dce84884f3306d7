"""Any probe's rows: places become lines, positions run along, and nothing that was not measured has a mark."""

import itertools
import math

import pytest

from hopeprobe.plots import draw
from hopeprobe.stats import Verdict


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}


def values(axes, marker="osX", across=True):
    """Where the values stand, as (line, value)."""
    found = []
    for line in axes.lines:
        if line.get_marker() in marker and line.get_zorder() > 5:
            x, y = float(line.get_xdata()[0]), float(line.get_ydata()[0])
            found.append((y, x) if across else (x, y))
    return sorted(found)


def test_each_place_has_a_line_and_statistics_of_the_same_places_share_labels(make):
    measured, results_of = make
    made = [
        measured(statistic=statistic, layer=layer, component=component, value=i + 10 * layer)
        for i, (statistic, layer, component) in enumerate(
            itertools.product(("a", "b"), (0, 1), ("fast", "slow"))
        )
    ]
    figure = draw(results_of(*made), "demo-probe")
    assert set(panels(figure)) == {"a", "b"}
    for title, axes in panels(figure).items():
        expected = [row.value for row, _ in made if row.statistic == title]
        assert values(axes) == [(float(line), value) for line, value in enumerate(expected)]
    labels = [text.get_text() for text in panels(figure)["a"].get_yticklabels()]
    assert labels == ["layer 0 · fast", "layer 0 · slow", "layer 1 · fast", "layer 1 · slow"]
    assert panels(figure)["a"].get_shared_y_axes().joined(*panels(figure).values())


def test_statistics_of_other_places_do_not_borrow_labels(make):
    measured, results_of = make
    made = [
        measured(statistic="a", component="x"),
        measured(statistic="b"),
        measured(statistic="c", component="y"),
    ]
    shown = panels(draw(results_of(*made), "demo-probe"))
    assert [[t.get_text() for t in axes.get_yticklabels()] for axes in shown.values()] == [["x"], [""], ["y"]]


def test_what_differs_by_condition_says_so(make):
    measured, results_of = make
    made = [measured(condition="live"), measured(condition="frozen")]
    (axes,) = panels(draw(results_of(*made), "demo-probe")).values()
    assert [t.get_text() for t in axes.get_yticklabels()] == ["live", "frozen"]


def test_a_row_without_a_value_is_named_by_its_verdict_and_has_no_mark(make):
    measured, results_of = make
    made = [
        measured(component="x"),
        measured(component="y", value=math.nan, verdict=Verdict.DIVERGED),
        measured(statistic="other", value=math.nan, verdict=Verdict.NOT_APPLICABLE),
    ]
    figure = draw(results_of(*made), "demo-probe")
    (axes,) = panels(figure).values()
    assert values(axes) == [(0.0, 0.5)]
    assert [text.get_text() for text in axes.texts] == ["diverged"]
    assert axes.texts[0].get_position()[1] == 1
    assert figure.legends[0].get_title().get_text() == "nothing measured: other"


def test_nulls_and_verdicts_that_are_there_are_in_the_legend_and_no_others(make):
    measured, results_of = make
    nulls = {
        "own-init": 0.1,
        "fresh-init": (0.3, 0.2, 0.4),
        "analytic": 1.0,
        "something-new": 0.7,
        "unigram": math.nan,
    }
    made = [
        measured(component="x", nulls=nulls, verdict=Verdict.LEARNED),
        measured(component="y", nulls={}, verdict=Verdict.COLLAPSED),
    ]
    figure = draw(results_of(*made), "demo-probe")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "learned", "collapsed", "own initial weights", "fresh initial weights, 95 % range", "analytic", "something-new"
    ]  # fmt: skip
    (axes,) = panels(figure).values()
    assert [(round(y), x) for y, x in values(axes)] == [(0, 0.5), (1, 0.5)]
    others = sorted(float(line.get_xdata()[0]) for line in axes.lines if line.get_zorder() == 4)
    assert others == [0.1, 0.7, 1.0]
    (band,) = [c for c in axes.collections if c.get_zorder() == 1]
    assert band.get_paths()[0].get_extents().x0 == pytest.approx(0.2)
    assert band.get_paths()[0].get_extents().x1 == pytest.approx(0.4)
    learned, collapsed = (
        next(line for line in axes.lines if line.get_marker() == marker and line.get_zorder() > 5)
        for marker in "oX"
    )
    assert learned.get_color() != collapsed.get_color()


def test_positions_run_along_with_layers_side_by_side(make):
    measured, results_of = make
    positions = ("8", "16", "24")
    made = [
        measured(component=component, layer=layer, position=position, value=i + layer)
        for component, layer, (i, position) in itertools.product(("k", "v"), (0, 1), enumerate(positions))
    ]
    shown = panels(draw(results_of(*made), "demo-probe"))
    assert list(shown) == ["size · k", "size · v"]
    for axes in shown.values():
        assert [t.get_text() for t in axes.get_xticklabels()] == list(positions)
        found = values(axes, across=False)
        assert [value for _, value in found] == [0, 1, 1, 2, 2, 3]
        assert len({x for x, _ in found}) == 6, "no mark stands on another"
        assert [round(x) for x, _ in found] == [0, 0, 1, 1, 2, 2]
        assert [text.get_text().strip() for text in axes.texts] == ["0", "1"]


def test_values_over_decades_have_a_logarithmic_axis_and_others_do_not(make):
    measured, results_of = make

    def scale(*numbers):
        made = [
            measured(component=str(i), value=v, ci_low=v, ci_high=v, nulls={}) for i, v in enumerate(numbers)
        ]
        (axes,) = panels(draw(results_of(*made), "demo-probe")).values()
        return axes.get_xscale()

    assert scale(1e-4, 1.0, 2.0) == "log"
    assert scale(0.0, 1e-4, 2.0) == "linear"
    assert scale(-1e4, 1e-4) == "linear"
    assert scale(0.5, 2.0) == "linear"


def test_units_are_named(make):
    measured, results_of = make
    made = [measured(statistic="loss", unit="nats"), measured(statistic="ratio")]
    shown = panels(draw(results_of(*made), "demo-probe"))
    assert (shown["loss"].get_xlabel(), shown["ratio"].get_xlabel()) == ("nats", "")


def test_a_hundred_places_are_readable(make):
    measured, results_of = make
    made = [measured(layer=layer, component=f"memory.{i}") for layer in range(6) for i in range(20)]
    figure = draw(results_of(*made), "demo-probe")
    figure.canvas.draw()
    (axes,) = panels(figure).values()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == 120
    assert all(lower.y1 <= upper.y0 + 1 for upper, lower in itertools.pairwise(boxes)), "labels overlap"
