"""The loss curve is written whole, from a file or from records, and refuses to draw nothing."""

import json

import pytest

from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.plots import plot_loss_curve

PNG = b"\x89PNG\r\n\x1a\n"

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
