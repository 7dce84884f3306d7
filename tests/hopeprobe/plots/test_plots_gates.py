"""Loss against write budget: every rule has its line, random its band, and a rule that lies in it looks so."""

import math

from hopeprobe.plots import draw, draw_all
from hopeprobe.results import ResultRow, Results

BUDGETS = ("0.5", "0.25", "0.1")


def row(statistic, condition, component, position, value, half=math.nan):
    return ResultRow(
        probe="relative-surprise", statistic=statistic, checkpoint="a.pt", step=7, layer=None, component=component,
        condition=condition, position=position, value=value, unit="nats", ci_low=value - half, ci_high=value + half,
        n_tokens=100, n_groups=64, dtype="float32", min_detectable=math.nan, p=math.nan, q=math.nan,
        verdict="inconclusive", note="",
    )  # fmt: skip


def made(mechanisms=("cms", "all"), half=0.02):
    rows = [row("loss", "all", "everything", "1", 4.0), row("written", "all", "everything", "1", 1.0)]
    for mechanism in mechanisms:
        rows.append(row("loss", mechanism, "nothing", "0", 5.0))
        for rule, better in (("random", 0.0), ("quantile", 0.3)):
            for budget in BUDGETS:
                loss = 5.0 - float(budget) - better
                rows.append(row("loss", mechanism, rule, budget, loss))
                rows.append(row("written", mechanism, rule, budget, float(budget) * 1.02))
                if rule != "random":
                    rows.append(row("loss_difference", mechanism, rule, budget, -better, half))
    return Results(rows, [])


def test_lines_band_and_differences():
    figure = draw(made(), "relative-surprise")
    above, below = figure.axes[:2], figure.axes[2:]
    assert [axes.get_title() for axes in above] == ["writes of cms gated", "all writes gated"]
    for axes in above:
        lines = {line.get_label(): line for line in axes.lines}
        assert lines["quantile"].get_xdata().round(6).tolist() == [0.102, 0.255, 0.51, 1.0]
        assert lines["quantile"].get_ydata().round(6).tolist() == [4.6, 4.45, 4.2, 4.0]
        assert list(lines["nothing written"].get_ydata()) == [5.0, 5.0]
        (band,) = axes.collections
        edges = band.get_paths()[0].vertices
        assert round(edges[:, 1].max(), 6) == 4.92  # at a tenth: 4.9 and half an interval
        assert sum(abs(y - 4.0) < 1e-9 for x, y in edges if x == 1.0) >= 1  # closed where all is written
    for axes in below:
        points = [line for line in axes.lines if line.get_marker() == "o"]
        assert [list(line.get_ydata()) for line in points] == [[-0.3, -0.3, -0.3]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(labels) == {"not told from random, 95 %", "random", "quantile", "nothing written"}


def test_without_intervals_there_is_no_band_and_without_rules_no_figure():
    figure = draw(made(half=math.nan), "relative-surprise")
    assert not figure.axes[0].collections
    alone = Results([r for r in made().rows if r.statistic != "loss_difference"], [])
    assert dict(draw_all(alone)) == {}
