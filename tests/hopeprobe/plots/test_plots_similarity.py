"""Similarity of CMS levels: every value beside its nulls, pairs told apart, measures that are there and no others."""

import math

from matplotlib.collections import LineCollection

from hopeprobe.plots import draw, draw_all
from hopeprobe.results import Results


def test_every_value_stands_beside_its_nulls(levels):
    pairs = ("fast|mid", "fast|slow", "mid|slow")
    figure = draw(levels(pairs), "cms-similarity")
    assert len(figure.axes) == 6
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["cosine", "linear CKA", "CCA"]
    assert [axes.get_title() for axes in figure.axes[:2]] == ["Outputs", "What each level adds"]
    for axes in figure.axes:
        points = [line for line in axes.lines if line.get_marker() in "osD"]
        assert sorted(round(y, 2) for line in points for y in line.get_ydata()) == sorted(
            round(0.5 + 0.02 * layer, 2) for layer in range(6) for _ in pairs
        )
        bands = [c for c in axes.collections if c.get_label() == "fresh initial weights, 95 % range"]
        assert len(bands) == 6 * len(pairs)
        bars = [
            c.get_segments()
            for c in axes.collections
            if isinstance(c, LineCollection) and c.get_zorder() == 5
        ]
        assert len(bars) == len(pairs)
        for segments in bars:
            lengths = [round(float(top[1] - bottom[1]), 3) for bottom, top in segments]
            assert lengths == [0.0, *[0.1] * 5], "layer 0 claims no interval"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:3] == [f"checkpoint, {pair.replace('|', ' – ')}, 95 % interval" for pair in pairs]
    assert set(labels[3:]) == {
        "own initial weights", "fresh initial weights, 95 % range", "tokens shuffled", "independent levels"
    }  # fmt: skip
    assert figure.get_suptitle() == "Similarity of CMS levels: step-000200.pt, step 200"


def test_only_what_was_measured_has_a_panel(levels):
    results = levels()
    older = Results([row for row in results.rows if not row.statistic.endswith("cca")], results.null_rows)
    assert len(draw(older, "cms-similarity").axes) == 4
    assert dict(draw_all(levels(value=math.nan))) == {}
