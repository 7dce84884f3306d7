"""Any probe's rows: places become lines, positions run along, and nothing that was not measured has a mark."""

import itertools
import math

import pytest
from matplotlib.text import Text

from hopeprobe.plots import draw
from hopeprobe.stats import Verdict


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}


def values(axes, marker="osX", across=True):
    """Where the values stand, as (line, value)."""
    found = []
    for line in axes.lines:
        if line.get_marker() in marker and line.get_zorder() > 5:
            points = zip(line.get_xdata(), line.get_ydata(), strict=True)
            found += [(float(y), float(x)) if across else (float(x), float(y)) for x, y in points]
    return sorted(found)


def texts(figure):
    """Every piece of text that is there, and the box around it."""
    figure.draw_without_rendering()
    shown = [*figure.texts, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        ticks = [tick.label1 for axis in (axes.xaxis, axes.yaxis) for tick in axis._update_ticks()]
        titles = [text for text in axes.get_children() if isinstance(text, Text)]
        shown += [*ticks, *titles]
    shown = [text for text in shown if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in shown]


def assert_readable(figure):
    """All text is inside the figure, and none of it on another."""
    found = texts(figure)
    edge = figure.bbox
    for text, box in found:
        assert edge.x0 <= box.x0 < box.x1 <= edge.x1, text
        assert edge.y0 <= box.y0 < box.y1 <= edge.y1, text
    for (text, box), (other, beside) in itertools.combinations(found, 2):
        assert not box.shrunk(0.9, 0.8).overlaps(beside.shrunk(0.9, 0.8)), (text, other)


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
    assert [text for text, _ in texts(figure)].count("layer 0 · fast") == 1
    assert_readable(figure)


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
    assert "nothing measured: other" in [text for text, _ in texts(figure)]


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
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((0.2, 0.4))
    assert band.get_y() < 0 < band.get_y() + band.get_height() < 1
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
    assert list(shown) == ["k", "v"]
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


def test_a_component_without_a_value_has_an_empty_panel(make):
    measured, results_of = make
    rows = [
        measured(component=component, position=position, value=value, nulls={})
        for component, value in (("a", 0.5), ("b", math.nan))
        for position in ("8", "16")
    ]
    assert draw(results_of(*rows), "demo-probe").png()


def test_units_are_named(make):
    measured, results_of = make
    made = [measured(statistic="loss", unit="nats"), measured(statistic="ratio")]
    made += [measured(statistic="drift", unit="nats", position=p) for p in ("8", "16")]
    figure = draw(results_of(*made), "demo-probe")
    assert list(panels(figure)) == ["loss, nats", "ratio", ""]
    assert "drift, nats" in [text for text, _ in texts(figure)]


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_large_and_mixed_figures_stay_readable(make, layers):
    measured, results_of = make
    made = [
        measured(statistic=name, unit="nats")
        for name in ("mean_loss", "loss_std", "excess_over_uniform", "gap")
    ]
    made += [
        measured(statistic="one_alone_with_a_long_name", component="a rather long component · of two parts")
    ]
    made += [
        measured(statistic=statistic, layer=layer, component=f"memory.{i}")
        for statistic in ("distance_from_init", "displacement", "settled_step")
        for layer in range(layers)
        for i in range(20)
    ]
    made += [
        measured(statistic="change_by_position", layer=layer, component=component, position=position)
        for layer in range(layers)
        for component in ("selfmod.k", "selfmod.memory", "cms.fast", "cms.slow")
        for position in ("0-15", "16-31", "32-47", "48-63", "64-79", "80-95", "96-111", "112-127")
    ]
    made += [measured(statistic="missing", value=math.nan, verdict=Verdict.NO_SIGNAL)]
    figure = draw(results_of(*made), "demo-probe")
    assert_readable(figure)
    assert figure.get_figheight() < 30
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for box, other in itertools.combinations(boxes, 2):
        assert not box.shrunk(0.95, 0.95).overlaps(other.shrunk(0.95, 0.95))
