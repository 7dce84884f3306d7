"""Numbers beside those printed: which rows a figure is of, what becomes of several, and what was not measured."""

import math
import re

import pytest

from hopeprobe.errors import BadInputError
from hopeprobe.probes import PROBES
from hopeprobe.results import NullRow, ResultRow, Results
from hopeprobe.study import inside
from hopeprobe.study.probed import Probed
from hopeprobe.study.published import INSIDE, STUDY_PASS_RATES, TABLE_1

KEYS = {figure.key: figure for figure in INSIDE}


def row(probe, statistic, value, layer=None, component="", half=0.0, verdict="untrained", **more):
    key = {
        "probe": probe,
        "statistic": statistic,
        "checkpoint": "a.pt",
        "layer": layer,
        "component": component,
    }
    key |= {"condition": "live"} | more
    ends = (value, value) if half is None else (value - half, value + half)
    result = ResultRow(
        **key, value=value, unit="1", n_tokens=9, n_groups=64, dtype="float32", ci_low=ends[0], ci_high=ends[1],
        verdict=verdict,
    )  # fmt: skip
    own = NullRow(**key, null_kind="own-init", value=value + 1)
    fresh = NullRow(**key, null_kind="fresh-init", value=value, low=value - 2, high=value + 2)
    return result, own, fresh


def results(*made):
    return Results([one[0] for one in made], [null for one in made for null in one[1:]])


def line(table, quantity, of=None):
    """Cells of a line by column; those left blank are of the line above."""
    last, found = "", []
    for cells in table.lines:
        cell = dict(zip(table.header, cells, strict=True))
        last = cell["quantity"] or last
        if last == quantity and of in (None, cell["of"]):
            found.append(cell)
    (one,) = found
    return one


def test_several_rows_are_their_mean_and_range_and_their_nulls_a_range():
    norms = [
        row("cms-dynamics", "weight_norm", v, i, c)
        for i, (v, c) in enumerate(((26.1, "fast"), (26.3, "slow")))
    ]
    other = row("cms-dynamics", "weight_norm", 99.0, 0, "mix_bias")
    table = inside({"package": results(*norms, other)}, "4.2")
    cell = line(table, "CMS level L2 norm")
    assert (cell["study"], cell["printed"]) == ("4.2, Figure 1a", "~26.15, within 0.2 %")
    assert cell["measured by"] == "cms-dynamics: weight_norm"
    assert (cell["of"], cell["here"]) == ("package", "26.2 (26.1 to 26.3)")
    assert (cell["own-init"], cell["fresh-init"]) == ("27.1 … 27.3", "24.1 … 28.3")
    assert cell["verdict"] == "untrained 2"
    number = table.frame.set_index("key").loc["level_norm"]
    assert (number.rows, number["low"], number["high"]) == (2, 26.1, 26.3)
    assert number["mean"] == pytest.approx(26.2)
    assert number.fresh_init_high == pytest.approx(28.3)
    assert number.verdicts == {"untrained": 2}


def test_one_row_is_its_value_and_interval_and_an_exact_one_its_value():
    table = inside({"a": results(row("surprise", "mean_loss", 66.7, half=0.5))}, "4.4")
    assert line(table, "per-token loss, mean")["here"] == "66.7 [66.2, 67.2]"
    exact = inside({"a": results(row("surprise", "mean_loss", 66.7, half=0.0))}, "4.4")
    assert line(exact, "per-token loss, mean")["here"] == "66.7"


def test_shares_are_per_cent():
    table = inside({"a": results(row("gate-selectivity", "pass_rate", 0.99954, component="tau=10"))}, "4.4")
    cell = line(table, "gate open at τ = 10")
    assert (cell["printed"], cell["here"]) == ("99.97 %", "99.95 %")


def test_rows_of_layers_without_a_value_count_their_verdict_alone():
    nothing = row("cms-similarity", "output_cosine", math.nan, 0, "fast|slow", verdict="no-signal")
    some = row("cms-similarity", "output_cosine", 0.5, 1, "fast|slow", half=0.1, verdict="learned")
    cell = line(inside({"a": results(nothing, some)}, "4.2"), "cosine of fast and slow outputs")
    assert cell["verdict"] == "no-signal 1, learned 1"
    assert cell["here"] == "0.5 [0.4, 0.6]"
    alone = line(inside({"a": results(nothing)}, "4.2"), "cosine of fast and slow outputs")
    assert (alone["here"], alone["own-init"], alone["verdict"]) == ("–", "–", "no-signal 1")


def test_a_model_without_the_mechanism_says_so():
    nothing = row("cms-similarity", "output_cosine", math.nan, verdict="n/a", condition="")
    cell = line(inside({"transformer": results(nothing)}, "4.2"), "cosine of fast and slow outputs")
    assert (cell["here"], cell["verdict"]) == ("–", "n/a 1")


def test_the_last_position_and_step_speak_and_no_other_condition():
    drifts = [
        row("meta-fast", "relative_drift", v, 0, "selfmod.k", position=p)
        for v, p in ((0.1, "96"), (0.2, "128"))
    ]
    frozen = row("meta-fast", "relative_drift", 9.0, 1, "selfmod.k", position="128", condition="frozen")
    levels = row("meta-fast", "relative_drift", 8.0, 0, "cms.fast", position="128")
    cell = line(inside({"a": results(*drifts, frozen, levels)}, "4.3"), "‖θ_fast − θ_meta‖ / ‖θ_meta‖")
    assert (cell["here"], cell["verdict"]) == ("0.2", "untrained 1")
    seeds = [
        Probed(
            "full", "surprise", "mean_loss", step, None, "", "live", "", "nats", 3, value, value - 0.5, value + 0.5,
            "learned 2, at-init 1", 10.8, 10.7, 10.6, 10.9,
        )
        for step, value in ((50, 9.0), (200, 7.0))
    ]  # fmt: skip
    cell = line(inside({"three": seeds}, "4.4"), "per-token loss, mean")
    assert (cell["here"], cell["verdict"]) == ("7 [6.5, 7.5]", "learned 2, at-init 1")
    assert (cell["own-init"], cell["fresh-init"]) == ("10.8", "10.6 … 10.9")


def test_sources_stand_one_below_the_other_and_what_none_measured_is_said():
    first, second = results(row("surprise", "mean_loss", 67.0)), results(row("surprise", "mean_loss", 7.0))
    table = inside({"a": first, "b": second, "c": Results(), "d": []}, "4.4")
    assert [cells[4] for cells in table.lines[:4]] == ["a", "b", "c", "d"]
    assert [cells[1] for cells in table.lines[:4]] == ["per-token loss, mean", "", "", ""]
    assert line(table, "per-token loss, mean", "b")["here"] == "7"
    for of in "cd":
        assert line(table, "per-token loss, mean", of)["verdict"] == "not measured"
    both = inside({"run": Results([one for c in "ab" for one in [_of(c)]])}, "4.4")
    assert [cells[4] for cells in both.lines[:2]] == ["run, a", "run, b"]


def _of(checkpoint):
    return row("surprise", "mean_loss", 1.0, checkpoint=checkpoint)[0]


def test_sections_are_those_of_the_study():
    made = {"a": results(row("surprise", "mean_loss", 67.0))}
    assert len(inside(made).lines) == len(INSIDE)
    assert {cells[0].partition(",")[0] for cells in inside(made, "4").lines} == {"4.2", "4.3", "4.4"}
    with pytest.raises(BadInputError, match=r"section '4.1' \(there are: 3, 4.2, 4.3, 4.4\)"):
        inside(made, "4.1")
    with pytest.raises(BadInputError, match="at least one source"):
        inside({})


def test_every_figure_is_of_a_statistic_that_a_probe_gives():
    for figure in INSIDE:
        probe = PROBES[figure.probe]
        assert figure.statistic in probe.statistics or figure.statistic in probe.describe(), figure.key
    assert len(KEYS) == len(INSIDE)
    assert re.fullmatch(KEYS["matrix_drift"].component, "eta.w1") is None
    assert re.fullmatch(KEYS["row_drift"].component, "alpha.w2") is None
    losses = [loss for column in TABLE_1.values() for loss in column.values()]
    assert KEYS["frozen_loss"].printed.endswith(f"{min(losses):.3f} to {max(losses):.3f}")
    assert {f"gate_{tau:g}" for tau in STUDY_PASS_RATES} <= set(KEYS)
