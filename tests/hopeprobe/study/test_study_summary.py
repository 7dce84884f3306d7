"""Rows of a grid: differences against SciPy's paired test, findings, and what becomes of the published claims."""

import math

import numpy as np
import pytest
from scipy import stats
from study_toys import cell, grid

from hopeprobe.stats import over_seeds
from hopeprobe.study import summarise
from hopeprobe.study.published import NOISE, TABLE_1, TABLE_2, published_delta, published_loss
from hopeprobe.study.summary import answer


def rows(made):
    return {row.name: row for row in summarise(made)}


def test_differences_are_paired_by_seed(made):
    found = rows(made)
    for name in ("no-cms", "no-self-mod", "transformer"):
        theirs = stats.ttest_rel(*([c.live for c in made.of(n).values()] for n in (name, "full")))
        low, high = theirs.confidence_interval(0.95)
        np.testing.assert_allclose(
            [found[name].delta.ci_low, found[name].delta.ci_high], [low, high], rtol=1e-6
        )
        np.testing.assert_allclose(found[name].delta.p, theirs.pvalue, rtol=1e-6)
    p = [found[name].delta.p for name in ("no-cms", "no-self-mod", "transformer")]
    q = stats.false_discovery_control(p)
    np.testing.assert_allclose([found[n].q for n in ("no-cms", "no-self-mod", "transformer")], q)
    assert found["full"].delta is None
    assert math.isnan(found["full"].q)


def test_pairing_makes_the_interval_narrow(made):
    row = rows(made)["no-cms"]
    assert row.live.ci_high - row.live.ci_low > 0.2
    assert row.delta.ci_high - row.delta.ci_low < 0.01


def test_findings_and_claims(made):
    found = rows(made)
    assert {name: (row.finding, row.claim) for name, row in found.items()} == {
        "full": ("", ""),
        "no-cms": ("worse", "does not hold"),  # the study: better by 0.015
        "no-self-mod": ("not resolved", "does not hold"),  # +0.316 there, nothing within its noise here
        "transformer": ("better", "holds"),
    }


def test_few_seeds_resolve_nothing(made):
    one = grid([c for c in made.cells if c.seed == 0])
    assert {row.finding for row in summarise(one)} == {"", "not resolved"}
    assert {row.claim for row in summarise(one)} == {"", "not resolved"}
    assert all(math.isnan(row.live.ci_low) for row in summarise(one))


def test_a_claim_below_the_resolution_is_not_resolved():
    wide = [cell("full", s, 7.0) for s in range(3)] + [
        cell("no-cms", s, 7.0 + d) for s, d in enumerate((0.08, 0.1, 0.12))
    ]
    row = rows(grid(wide))["no-cms"]
    assert row.delta.resolution > 0.015
    assert row.finding == "worse"
    assert row.claim == "not resolved"


@pytest.mark.parametrize(
    ("claimed", "values", "finding", "expected"),
    [
        (0.3, [0.2, 0.21, 0.19], "worse", "holds"),
        (0.3, [-0.2, -0.21, -0.19], "better", "does not hold"),
        (-0.3, [-0.2, -0.21, -0.19], "better", "holds"),
        (
            0.3,
            [0.01, 0.0, -0.01],
            "not resolved",
            "does not hold",
        ),  # within the study's noise, which 0.3 is not
        (0.3, [0.06, 0.0, -0.06], "not resolved", "not resolved"),  # wider than that noise
        (0.01, [0.2, 0.22, 0.18], "worse", "not resolved"),  # too small a claim for three seeds
        (-0.01, [0.2, 0.21, 0.19], "worse", "does not hold"),  # beyond the resolution on the other side
        (0.01, [-0.2, -0.21, -0.19], "better", "does not hold"),
        (
            0.04,
            [0.001, 0.0, -0.001],
            "not resolved",
            "not resolved",
        ),  # a claim no larger than the study's noise
        (0.3, [0.0, 0.0, 0.0], "same", "does not hold"),
        (0.3, [0.5], "not resolved", "not resolved"),
    ],
)
def test_the_rule_of_claims(claimed, values, finding, expected):
    assert answer(claimed, over_seeds(values), finding) == expected


def test_a_computation_that_was_not_run_is_called_the_same(made):
    twins = [
        cell("no-surprise", c.seed, c.live, same_as="full", why="every gate was open")
        for c in made.of("full").values()
    ]
    row = rows(grid([*made.cells, *twins]))["no-surprise"]
    assert (row.finding, row.claim, row.same_as) == ("same", "does not hold", "full")
    assert (row.delta.mean, row.delta.ci_low, row.delta.ci_high) == (0.0, 0.0, 0.0)
    some = [twins[0], *(cell("no-surprise", s, c.live + 0.1) for s, c in made.of("full").items() if s)]
    row = rows(grid([*made.cells, *some]))["no-surprise"]
    assert row.same_as == "full (1 of 4 seeds)"
    assert row.finding != "same"


def test_a_run_that_diverged_is_counted_and_not_averaged(made):
    broken = cell("titans", 0, math.nan, status="diverged", why="at step 3")
    fine = [cell("titans", s, made.of("full")[s].live + 0.2) for s in (1, 2)]
    row = rows(grid([*made.cells, broken, *fine]))["titans"]
    assert (row.seeds, row.diverged, row.delta.n) == (2, 1, 2)
    assert abs(row.delta.mean - 0.2) < 1e-9


def test_under_the_null_few_rows_are_findings():
    rng = np.random.default_rng(0)
    names = [f"v{i}" for i in range(8)]
    wrong = 0
    for _ in range(300):
        cells = [cell("full", s, 7 + rng.normal(0, 0.1)) for s in range(4)]
        cells += [cell(n, s, cells[s].live + rng.normal(0, 0.01)) for n in names for s in range(4)]
        wrong += any(row.finding in ("worse", "better") for row in summarise(grid(cells)))
    assert wrong / 300 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_the_study_s_figures():
    assert published_delta("small", "no-cms", None) == -0.015
    assert published_delta("scaled", "no-self-mod", None) == 1.412
    assert (
        published_delta("scaled", "transformer-matched", None) == 0.699
    )  # of the rounded losses; the study has 0.700
    assert published_delta("small", "full", None) is None
    assert published_loss("small", "full", 0.05) == 7.222
    assert published_delta("small", "full", 0.1) == 0.088
    assert published_loss("small", "full", 3.0) is published_loss("scaled", "full", 0.05) is None
    seven = [TABLE_1["small"]["full"], TABLE_1["small"]["no-surprise"], *TABLE_2.values()]
    assert round(float(np.std(seven, ddof=1)), 3) == NOISE


def test_rows_that_test_nothing_change_no_other_row(made):
    """Thresholds and variants are families of their own, and what was not run is in neither."""
    before = rows(made)
    more = [
        cell(f"full-tau-{t}", c.seed, c.live + extra, variant="full", threshold=t, same_as=same, why="open")
        for t, extra, same in ((0.01, 0.0, "full"), (0.05, 0.0, "full"), (3.0, 0.02, None))
        for c in made.of("full").values()
    ]
    twins = [
        cell("no-surprise", c.seed, c.live, same_as="full", why="open") for c in made.of("full").values()
    ]
    after = rows(grid([*made.cells, *more, *twins]))
    assert {name: after[name].q for name in ("no-cms", "transformer")} == {
        name: before[name].q for name in ("no-cms", "transformer")
    }
    assert after["full-tau-3.0"].q == after["full-tau-3.0"].delta.p
    assert math.isnan(after["full-tau-0.01"].q)


def test_parameters_and_the_lowest_surprise_are_of_cells_that_have_them(made):
    broken = cell("titans", 0, math.nan, status="diverged", parameters=0, surprise_min=math.nan)
    unknown = cell("titans", 1, 7.0, surprise_min=math.nan)
    whole = grid([*made.cells, broken, unknown, cell("titans", 2, 7.0, surprise_min=0.3)])
    row = rows(whole)["titans"]
    assert (row.parameters, row.surprise_min) == (1000, 0.3)
