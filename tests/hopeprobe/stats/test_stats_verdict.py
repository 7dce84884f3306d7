"""The rule: what it accepts as learned, and everything it refuses."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from hopeprobe.errors import MeasurementError
from hopeprobe.stats import (
    GROUPS,
    Evidence,
    FreshInit,
    GroupedMean,
    Verdict,
    exactly,
    jackknife,
    judge,
    mean_of,
    paired_difference,
)


def estimate(mean, spread=1.0, seed=0, n_groups=GROUPS):
    """A mean of exactly `mean`, with a standard error near `spread` / 8 at 64 groups."""
    values = np.random.default_rng(seed).standard_normal((n_groups, 1))
    if n_groups > 1:
        values = (values - values.mean()) / values.std(ddof=1)
    accumulator = GroupedMean()
    accumulator.update(mean + spread * values, np.ones((n_groups, 1), bool), np.arange(n_groups))
    return jackknife(mean_of, accumulator)


def evidence(x, own=0.0, fresh=(-0.1, 0.0, 0.1), spread=0.1, **more):
    trained = estimate(x, spread, seed=1)
    return Evidence(
        trained,
        None if own is None else paired_difference(trained, estimate(own, spread, seed=2)),
        None if fresh is None else FreshInit(tuple(fresh), x),
        **more,
    )


def verdict(row, smallest_effect=0.1):
    return judge([row], smallest_effect)[0]


def test_a_planted_effect_is_learned():
    judgement = verdict(evidence(5.0))
    assert judgement.verdict is Verdict.LEARNED
    assert judgement.p <= judgement.q <= 0.05
    assert judgement.note == ""


def test_a_row_that_claims_no_interval_is_not_decided_by_its_difference():
    row = evidence(5.0)
    row = dataclasses.replace(
        row, estimate=dataclasses.replace(row.estimate, ci_low=math.nan, ci_high=math.nan)
    )
    judgement = verdict(row)
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert math.isnan(judgement.p)
    assert judgement.note.startswith("no interval")


def test_p_is_the_larger_of_both_tests():
    row = evidence(5.0)
    t = (5.0 - 0.0) / (np.std([-0.1, 0.0, 0.1], ddof=1) * math.sqrt(1 + 1 / 3))
    p_fresh = 2 * stats.t.sf(t, 2)
    p_own = 2 * stats.t.sf(row.own_init.value / row.own_init.se, row.own_init.df)
    assert p_fresh > p_own
    np.testing.assert_allclose(verdict(row).p, p_fresh)


@pytest.mark.parametrize(
    "row",
    [
        evidence(5.0, fresh=(-4.0, 0.0, 6.0)),  # another seed does as much
        evidence(5.0, own=5.0),  # this run began there
        evidence(5.0, spread=100.0),  # not sure enough
    ],
)
def test_both_nulls_must_be_rejected(row):
    assert verdict(row).verdict is not Verdict.LEARNED


def test_significant_but_too_small_is_not_learned():
    row = evidence(0.5, fresh=(-0.001, 0.0, 0.001), spread=0.01)
    assert verdict(row, smallest_effect=0.4).verdict is Verdict.LEARNED
    judgement = verdict(row, smallest_effect=0.6)
    assert judgement.q <= 0.05
    assert judgement.verdict is Verdict.AT_INIT


def test_at_init_needs_the_whole_interval_inside():
    assert verdict(evidence(0.0, spread=0.01)).verdict is Verdict.AT_INIT
    assert verdict(evidence(0.0, spread=3.0)).verdict is Verdict.INCONCLUSIVE


def test_exact_numbers_need_no_groups():
    """A norm of 5: only what other seeds give leaves room for chance."""

    def row(value, own, fresh):
        return Evidence(exactly(value), exactly(value - own), FreshInit(fresh, value))

    learned = verdict(row(5.0, 1.0, (0.9, 1.0, 1.1)))
    t = 4.0 / (0.1 * math.sqrt(1 + 1 / 3))
    assert learned.verdict is Verdict.LEARNED
    np.testing.assert_allclose(learned.p, 2 * stats.t.sf(t, 2))
    np.testing.assert_allclose(
        learned.min_detectable, (stats.t.ppf(0.975, 2) + stats.t.ppf(0.8, 2)) * 0.1 * math.sqrt(1 + 1 / 3)
    )
    assert verdict(row(5.0, 1.0, (-4.0, 1.0, 6.0))).verdict is Verdict.INCONCLUSIVE, (
        "another seed does as much"
    )
    assert verdict(row(1.05, 1.0, (0.9, 1.0, 1.1))).verdict is Verdict.AT_INIT
    alone = verdict(Evidence(exactly(5.0), None, FreshInit((0.9, 1.0, 1.1), 5.0)))
    assert (alone.verdict, alone.note) == (Verdict.LEARNED, "fresh-init alone decides: no own-init weights")
    assert verdict(Evidence(exactly(5.0))).verdict is Verdict.INCONCLUSIVE
    # The same without the claim to be exact: no groups, no interval.
    sampled = dataclasses.replace(exactly(5.0), exact=False, n=1)
    assert (
        verdict(Evidence(sampled, exactly(4.0), FreshInit((0.9, 1.1), 5.0))).verdict is Verdict.INCONCLUSIVE
    )


def test_rows_may_have_smallest_effects_of_their_own():
    rows = [evidence(0.5, fresh=(-0.001, 0.0, 0.001), spread=0.01)] * 2
    assert [j.verdict for j in judge(rows, [0.4, 0.6])] == [Verdict.LEARNED, Verdict.AT_INIT]
    with pytest.raises(ValueError, match="shape"):
        judge(rows, [0.1, 0.2, 0.3])


def test_q_is_benjamini_hochberg_over_rows_with_a_p():
    rows = [evidence(x, fresh=np.linspace(-1, 1, 10)) for x in (0.5, 1.5, 2.5, 9.0)]
    rows.insert(2, evidence(9.0, override=Verdict.NO_SIGNAL))
    judgements = judge(rows, 0.1)
    p = [j.p for i, j in enumerate(judgements) if i != 2]
    np.testing.assert_allclose(
        [j.q for i, j in enumerate(judgements) if i != 2], stats.false_discovery_control(p)
    )
    assert math.isnan(judgements[2].p)
    assert math.isnan(judgements[2].q)


def test_without_own_init_fresh_init_alone_decides_and_says_so():
    judgement = verdict(evidence(5.0, own=None))
    assert judgement.verdict is Verdict.LEARNED
    assert "fresh-init alone decides" in judgement.note
    assert verdict(evidence(0.0, own=None, spread=0.01)).verdict is Verdict.AT_INIT
    assert verdict(evidence(0.0, own=None, spread=3.0)).verdict is Verdict.INCONCLUSIVE


def test_without_fresh_init_nothing_is_learned_and_the_row_says_so():
    judgement = verdict(evidence(5.0, fresh=None))
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert math.isnan(judgement.p)
    assert "fresh-init was not asked for" in judgement.note
    assert verdict(evidence(0.0, fresh=None, spread=0.01)).verdict is Verdict.AT_INIT


def test_without_own_init_both_sides_of_the_difference_are_of_the_same_tokens():
    # On the prefix the value is the null's own; on all tokens, which the null never saw, it lies elsewhere.
    row = Evidence(estimate(5.0, 0.01), None, FreshInit((-0.1, 0.0, 0.1), 0.0))
    assert verdict(row).verdict is Verdict.AT_INIT
    row = Evidence(estimate(0.0, 0.01), None, FreshInit((-9.0, 0.0, 9.0), 5.0))
    assert verdict(row).verdict is Verdict.INCONCLUSIVE


def test_without_a_null_nothing_is_concluded():
    judgement = verdict(evidence(5.0, own=None, fresh=None))
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert "no null" in judgement.note
    assert math.isnan(judgement.p)
    assert math.isnan(judgement.min_detectable)


def test_under_32_groups_nothing_is_concluded():
    few, other = estimate(5.0, n_groups=31), estimate(0.0, seed=1, n_groups=31)
    judgement = verdict(Evidence(few, paired_difference(few, other), FreshInit((0.0, 0.1), 5.0)))
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert "31 groups" in judgement.note
    assert math.isnan(judgement.p)


def test_what_was_not_measured_is_not_applicable():
    nothing = jackknife(mean_of, GroupedMean())
    for row in (Evidence(nothing), Evidence(nothing, fresh=FreshInit((0.0, 0.1), 5.0))):
        judgement = verdict(row)
        assert judgement.verdict is Verdict.NOT_APPLICABLE
        assert "not measured" in judgement.note


def test_identical_fresh_values_are_handled_without_warnings():
    assert verdict(evidence(0.3, own=None, fresh=(0.1,) * 10, spread=0.01)).p == 0.0
    assert verdict(evidence(0.1, own=None, fresh=(0.1,) * 10, spread=0.01)).p == 1.0
    assert FreshInit((0.1,) * 10, 0.1).prediction_se == 0.0


def test_a_difference_without_spread_is_certain():
    trained, initial = estimate(1.0), estimate(0.0)
    shifted = paired_difference(trained, initial)
    np.testing.assert_allclose(shifted.se, 0.0, atol=1e-15)
    fresh = FreshInit((-0.1, 0.0, 0.1), 1.0)
    assert verdict(Evidence(trained, shifted, fresh)).verdict is Verdict.LEARNED
    assert verdict(Evidence(trained, paired_difference(trained, trained), fresh)).verdict is Verdict.AT_INIT


@pytest.mark.parametrize("override", [Verdict.COLLAPSED, Verdict.NO_SIGNAL, Verdict.NOT_APPLICABLE])
def test_an_override_stands_with_its_note(override):
    judgement = verdict(evidence(5.0, override=override, note="all gates stayed closed"))
    assert (judgement.verdict, judgement.note) == (override, "all gates stayed closed")


@pytest.mark.parametrize("override", [Verdict.LEARNED, Verdict.AT_INIT])
def test_a_probe_cannot_claim_by_itself(override):
    with pytest.raises(ValueError, match="takes the rule"):
        evidence(5.0, override=override)


def test_min_detectable_is_what_80_percent_power_needs():
    row = evidence(5.0, fresh=None)
    factor = stats.t.ppf(0.975, row.own_init.df) + stats.t.ppf(0.8, row.own_init.df)
    np.testing.assert_allclose(verdict(row).min_detectable, factor * row.own_init.se)
    both = evidence(5.0, fresh=(-9.0, 0.0, 9.0))
    factor = stats.t.ppf(0.975, 2) + stats.t.ppf(0.8, 2)
    np.testing.assert_allclose(verdict(both).min_detectable, factor * both.fresh.prediction_se)


def test_bad_evidence_raises():
    with pytest.raises(ValueError, match="at least two"):
        FreshInit((1.0,), 1.0)
    with pytest.raises(MeasurementError, match="not finite"):
        FreshInit((1.0, math.nan), 1.0)
    for smallest_effect in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="smallest effect"):
            judge([], smallest_effect)
    assert judge([], 0.1) == []


def test_verdicts_print_as_their_value():
    assert f"{Verdict.NOT_APPLICABLE}" == str(Verdict.NOT_APPLICABLE) == "n/a" == Verdict.NOT_APPLICABLE
