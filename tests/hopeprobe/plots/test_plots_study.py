"""The study's figures: what is drawn is what the rows hold."""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from hopeprobe.errors import MeasurementError
from hopeprobe.plots.canvas import PALETTE
from hopeprobe.plots.study_losses import draw_curves, draw_importance
from hopeprobe.plots.study_probes import draw_cms, draw_gate, draw_memories
from hopeprobe.study import summarise
from hopeprobe.study.probed import Probed

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))

from study_toys import cell, grid


def made(preset="tiny", parameters=1000, seeds=3):
    cells = []
    for seed in range(seeds):
        full = 7 + 0.1 * seed
        cells += [
            cell("full", seed, full, parameters=parameters),
            cell("no-cms", seed, full + 0.3 + 0.001 * seed, parameters=parameters),
            cell("no-self-mod", seed, full + 0.05 * (seed - 1), parameters=parameters),
        ]
    return grid(cells, preset=preset)


def texts(figure):
    return " ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))


def test_importance_shows_differences_intervals_and_whether_they_are_resolved():
    whole = made()
    figure = draw_importance([whole])
    (axis,) = figure.axes
    rows = {row.name: row for row in summarise(whole) if row.delta is not None}
    drawn = {bars.lines[0].get_ydata()[0]: bars for bars in axis.containers}
    assert [label.get_text() for label in axis.get_yticklabels()] == list(rows)
    for at, row in enumerate(rows.values()):
        point, _, (bar,) = drawn[at].lines
        assert point.get_xdata()[0] == row.delta.mean
        np.testing.assert_allclose(sorted(bar.get_segments()[0][:, 0]), [row.delta.ci_low, row.delta.ci_high])
    colours = [to_hex(drawn[at].lines[0].get_color()) for at in (0, 1)]
    assert colours == [to_hex(PALETTE[0]), to_hex(PALETTE[7])]
    crosses = {line.get_ydata()[0]: line.get_xdata()[0] for line in axis.lines if line.get_marker() == "x"}
    assert crosses == {0: -0.015, 1: 0.316}
    for said in ("not resolved", "one run, other setting, noise 0.044", "3 seeds, 200 steps"):
        assert said in texts(figure)
    assert figure.png()[:4] == b"\x89PNG"


def test_importance_is_of_variants_and_not_of_thresholds():
    whole = made()
    more = [cell("full-tau-3", s, 7.2, variant="full", threshold=3.0) for s in range(3)]
    (axis,) = draw_importance([dataclasses.replace(whole, cells=(*whole.cells, *more))]).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["no-cms", "no-self-mod"]


def test_importance_of_two_sizes_has_a_panel_for_both():
    figure = draw_importance([made("tiny", 2000), made("nano", 1000)])
    assert [axis.get_title().partition(":")[0] for axis in figure.axes] == ["nano", "tiny", "by size"]


def test_importance_of_one_seed_has_points_and_no_intervals():
    (axis,) = draw_importance([made(seeds=1)]).axes
    assert all(not bars.has_xerr for bars in axis.containers)


def test_without_variants_there_is_nothing_to_draw():
    with pytest.raises(MeasurementError, match="nothing to draw"):
        draw_importance([grid([cell("full", 0, 7.0)])])


def test_curves_are_means_over_seeds_and_late_ones_paired():
    whole = made()
    twin = cell("no-surprise", 0, 7.0, same_as="full", why="open", curve={})
    whole = dataclasses.replace(whole, cells=(*whole.cells, twin))
    figure = draw_curves(whole)
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines) == ["full", "no-cms", "no-self-mod"]
    np.testing.assert_allclose(lines["full"].get_ydata(), [8.1, 7.6, 7.1])
    late = {line.get_label(): line for line in right.lines if len(line.get_xdata()) == 1}
    assert late["no-cms"].get_xdata()[0] == 200
    assert abs(late["no-cms"].get_ydata()[0] - 0.301) < 1e-9


def test_a_run_that_diverged_is_in_no_curve():
    whole = made()
    broken = dataclasses.replace(
        whole.of("no-cms")[1], status="diverged", curve={"step": [100], "loss": [9.0]}
    )
    rest = [c for c in whole.cells if (c.name, c.seed) != ("no-cms", 1)]
    left, right = draw_curves(dataclasses.replace(whole, cells=(*rest, broken))).axes
    line = next(line for line in left.lines if line.get_label() == "no-cms")
    np.testing.assert_allclose(line.get_ydata(), np.array([7.3, 7.502]).mean() + np.array([1, 0.5, 0]))
    assert any(line.get_label() == "no-cms" for line in right.lines)


def row(probe, statistic, value, *, step=100, layer=None, component="", position="", own=0.1, fresh=0.2):
    return Probed(
        "full", probe, statistic, step, layer, component, "live", position, "1", 3, value, value - 0.01, value + 0.01,
        "learned 3", own, fresh, fresh - 0.05, fresh + 0.05,
    )  # fmt: skip


CMS = [
    r
    for step in (50, 100)
    for layer in (0, 1)
    for level in ("fast", "slow")
    for r in (
        row("cms-dynamics", "weight_norm", 13 + step / 100 + layer, step=step, layer=layer, component=level),
        row(
            "cms-dynamics",
            "checkpoint_drift",
            0.1,
            step=step,
            layer=layer,
            component=level,
            position="step 0 to 50",
        ),
        row("cms-similarity", "output_cosine", 0.6, step=step, layer=layer, component="fast|slow"),
        row(
            "cms-similarity",
            "delta_cosine",
            0.3,
            step=step,
            layer=layer,
            component="fast|slow",
            own=0.0,
            fresh=0.0,
        ),
    )
]


def test_the_figure_of_the_cms_shows_values_beside_initial_ones():
    figure = draw_cms(CMS)
    a, _, c, d = figure.axes
    level = next(bars for bars in a.containers if bars.get_label() == "fast")
    np.testing.assert_allclose(
        level.lines[0].get_ydata().astype(float), [14.0, 14.5]
    )  # means of two layers at steps 50 and 100
    assert {bars.get_label() for bars in c.containers} == {"outputs", "what the levels add"}
    dotted = [line.get_ydata()[0] for line in c.lines if line.get_linestyle() == ":"]
    np.testing.assert_allclose(sorted(dotted), [0.0, 0.1])
    assert [bars.lines[0].get_ydata()[1] for bars in d.containers] == [15.0, 15.0]
    assert "95 % intervals over seeds" in texts(figure)


def test_the_figure_of_memories_is_of_the_context_s_end():
    rows = [
        row("selfmod-drift", "displacement", 0.5, component="k.w1", layer=0, own=math.nan),
        row("selfmod-drift", "displacement", 9.0, component="k", own=math.nan),
        *(
            row("meta-fast", "relative_drift", 0.1 * n, component="selfmod.k", layer=0, position=str(32 * n))
            for n in (1, 4)
        ),
        row("meta-fast", "relative_drift", 0.7, component="cms.fast", layer=0, position="128"),
    ]
    a, b = draw_memories(rows).axes
    assert [bars.get_label() for bars in a.containers] == ["k.w1"]
    assert [(bars.get_label(), bars.lines[0].get_ydata()[0]) for bars in b.containers] == [("k", 0.4)]
    assert "after 128 tokens" in b.get_title()


def test_the_figure_of_the_gate_has_thresholds_in_order():
    rows = [
        row("gate-selectivity", "pass_rate", share, component=f"tau={tau}", own=1.0)
        for tau, share in (("10", 0.25), ("0.5", 0.97), ("5", 0.7))
    ]
    rows += [
        row("gate-selectivity", "pass_rate", 1.0, component="in use"),
        row("surprise", "loss_quantile", 7.0, component="p50"),
    ]
    _, b = draw_gate(rows).axes
    line = next(line for line in b.lines if line.get_label() == "step 100")
    np.testing.assert_allclose(line.get_xdata(), [0.5, 5, 10])
    np.testing.assert_allclose(line.get_ydata(), [97, 70, 25])


@pytest.mark.parametrize("draw", [draw_cms, draw_memories, draw_gate])
def test_a_figure_of_probes_that_did_not_run_is_refused(draw):
    with pytest.raises(MeasurementError, match="nothing to draw"):
        draw([row("integrity", "x", 1.0)])


@pytest.mark.parametrize(
    ("draw", "part"),
    [
        (draw_cms, CMS[0]),
        (draw_cms, CMS[2]),
        (draw_memories, row("selfmod-drift", "displacement", 0.5, component="k.w1", layer=0)),
        (draw_gate, row("surprise", "loss_quantile", 7.0, component="p50")),
        (draw_gate, row("gate-selectivity", "pass_rate", 0.9, component="tau=5")),
    ],
)
def test_a_panel_whose_probe_did_not_run_says_so(draw, part):
    figure = draw([part])
    assert figure.png()
    if draw is not draw_gate or part.probe == "gate-selectivity":
        assert "not measured" in texts(figure)
