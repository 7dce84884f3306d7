"""Figures are written whole, from any results, and refuse to draw nothing."""

import itertools
import json
import math

import pytest

from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.plots import plot_loss_curve, plot_similarity
from hopeprobe.results import NullRow, ResultRow, Results
from hopeprobe.stats import Verdict

PNG = b"\x89PNG\r\n\x1a\n"


def similarity(pairs=("fast|slow",), layers=6, checkpoint="step-000200.pt", value=0.5):
    rows, nulls = [], []
    for kind, statistic, layer, pair in itertools.product(
        ("output", "delta"), ("cosine", "cka"), range(layers), pairs
    ):
        at = value + 0.02 * layer
        key = {
            "probe": "cms-similarity",
            "statistic": f"{kind}_{statistic}",
            "checkpoint": checkpoint,
            "step": 200,
            "layer": layer,
            "component": pair,
            "condition": "live",
        }
        interval = {"ci_low": at - 0.05, "ci_high": at + 0.05} if layer else {}
        measured = {"value": at, "unit": "1", "n_tokens": 9, "n_groups": 64, "dtype": "float32"}
        rows.append(ResultRow(**key, **measured, **interval, verdict=Verdict.INCONCLUSIVE))
        nulls += [NullRow(**key, null_kind=k, value=v) for k, v in (("own-init", 0.3), ("shuffled", 0.1))]
        nulls.append(NullRow(**key, null_kind="fresh-init", value=0.35, low=0.2, high=0.5, n=10))
        if (kind, statistic) == ("delta", "cosine"):
            nulls.append(NullRow(**key, null_kind="analytic", value=0.0))
    return Results(rows, nulls)


@pytest.fixture
def drawn(monkeypatch):
    """Keeps the figures that are saved."""
    import matplotlib.figure

    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    return figures


def test_similarity_shows_every_value_beside_its_nulls(tmp_path, drawn):
    pairs = ("fast|mid", "fast|slow", "mid|slow")
    path = plot_similarity(similarity(pairs), tmp_path / "deep" / "similarity.png")
    assert path.read_bytes().startswith(PNG)
    assert [p.name for p in path.parent.iterdir()] == ["similarity.png"]
    (figure,) = drawn
    assert figure.dpi == 100  # saved at 150 all the same
    titles = [axes.get_title() for axes in figure.axes]
    assert len(set(titles)) == 4
    for axes in figure.axes:
        points = [line for line in axes.lines if line.get_marker() in "osD"]
        assert sorted(round(y, 2) for line in points for y in line.get_ydata()) == sorted(
            round(0.5 + 0.02 * layer, 2) for layer in range(6) for _ in pairs
        )
        assert axes.get_ylabel() in ("cosine", "CKA")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:3] == [f"checkpoint, {pair.replace('|', ' – ')}, 95 % interval" for pair in pairs]
    assert set(labels[3:]) == {
        "own initial weights", "fresh initial weights, 95 % range", "tokens shuffled", "independent levels"
    }  # fmt: skip


def test_of_several_checkpoints_one_must_be_named(tmp_path):
    both = similarity(checkpoint="a.pt")
    both.extend(similarity(checkpoint="b.pt"))
    with pytest.raises(BadInputError, match=r"name one: a\.pt, b\.pt"):
        plot_similarity(both, tmp_path / "x.png")
    with pytest.raises(BadInputError, match=r"no similarity was measured of 'c\.pt'"):
        plot_similarity(both, tmp_path / "x.png", checkpoint="c.pt")
    assert plot_similarity(both, tmp_path / "x.png", checkpoint="b.pt").exists()


def test_nothing_measured_is_nothing_drawn(tmp_path):
    for results in (Results(), similarity(value=math.nan)):
        with pytest.raises(MeasurementError, match="no similarity"):
            plot_similarity(results, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


RECORDS = [
    {"step": 1, "loss": 10.8},
    {"step": 2, "loss": None, "held_out_live": 9.0, "held_out_frozen": 9.1},
    {"step": 3, "loss": 8.0, "held_out_live": 8.0, "held_out_frozen": float("nan")},
]


@pytest.mark.parametrize("from_file", [True, False])
def test_the_loss_curve_shows_losses_and_their_lines(tmp_path, drawn, from_file):
    metrics = RECORDS
    if from_file:
        metrics = tmp_path / "metrics.jsonl"
        metrics.write_text("\n".join(map(json.dumps, RECORDS)) + '\n{"step": 4, "lo')
    path = plot_loss_curve(metrics, tmp_path / "loss.png", unigram=7.5, ln_vocab=10.82)
    assert path.read_bytes().startswith(PNG)
    (axes,) = drawn[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["training, live"] == [10.8, 8.0]
    assert lines["held-out, live"] == [9.0, 8.0]
    assert lines["held-out, frozen (no writes)"] == [9.1]
    assert lines["ln V: every token equally likely (10.82)"] == [10.82, 10.82]
    assert lines["unigram: token frequencies alone (7.50)"] == [7.5, 7.5]


def test_a_loss_curve_without_losses_is_refused(tmp_path):
    with pytest.raises(MeasurementError, match="no record"):
        plot_loss_curve([{"step": 1, "loss": None}], tmp_path / "x.png", ln_vocab=3.0)
    with pytest.raises(BadInputError, match="cannot read"):
        plot_loss_curve(tmp_path / "none.jsonl", tmp_path / "x.png")
    (tmp_path / "bad.jsonl").write_text("not json}\n")
    with pytest.raises(BadInputError, match="not a record of training"):
        plot_loss_curve(tmp_path / "bad.jsonl", tmp_path / "x.png")
    assert not list(tmp_path.glob("*.png"))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInputError, match="cannot write"):
        plot_loss_curve(RECORDS, tmp_path / "file" / "x.png")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(BadInputError, match="cannot write"):
        plot_loss_curve(RECORDS, tmp_path / "x.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "x.png"]
