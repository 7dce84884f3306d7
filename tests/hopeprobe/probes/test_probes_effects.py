"""Differences between conditions, and what is never called learned whatever the rule would say."""

import dataclasses
import math
import re

import numpy as np
import pytest

from hopeprobe.errors import MeasurementError
from hopeprobe.probes.base import Finding, Measurement, Place
from hopeprobe.probes.effects import (
    EFFECT,
    LOSS,
    WHOLE,
    PartLosses,
    contrast,
    directed,
    diverged,
    group_values,
    joint,
    unchanged,
)
from hopeprobe.stats import (
    Evidence,
    FreshInit,
    GroupedMean,
    Verdict,
    jackknife,
    judge,
    mean_of,
    paired_difference,
)
from hopeprobe.tokens import EvalBatch

CHANGE = Place("loss_change", component="cms")
RNG = np.random.default_rng(3)
NOISE = RNG.normal(0, 0.002, (64, 20))


class Model:
    vocab_size, dtype = 97, "float32"


def estimate(value, noise, rows):
    mean = GroupedMean()
    mean.update(value + noise[:rows], np.ones((rows, 20), dtype=bool), np.arange(rows))
    return jackknife(mean_of, mean)


def finding(now, start, place=CHANGE, condition="live - cms-frozen", noise=NOISE, rows=64):
    """Both nulls at `start`, with enough tokens to tell 0.001 nats."""
    here, before = estimate(now, noise, rows), estimate(start, np.roll(noise, 1, axis=0), rows)
    null = FreshInit(tuple(start + RNG.normal(0, 0.0005, 10)), here.value)
    return Finding(Measurement(place, condition, "nats", here, EFFECT), paired_difference(here, before), null)


def verdict_of(one):
    row = one.measurement
    (found,) = judge([Evidence(row.estimate, one.difference, one.fresh, one.override)], row.smallest_effect)
    return found.verdict


@pytest.mark.parametrize(
    ("now", "start", "verdict", "by_rule", "said"),
    [
        (-0.30, -0.05, "learned", "learned", ""),
        (-0.30, 0.20, "learned", "learned", ""),
        (-0.30, -0.30, "at-init", "at-init", ""),
        (0.30, 0.30, "at-init", "at-init", ""),
        (0.001, -0.97, "collapsed", "learned", "-0.970 nats at initialisation, now nothing"),
        (-0.30, -0.97, "inconclusive", "learned", r"helps less than at initialisation \(-0.970"),
        (0.40, -0.02, "inconclusive", "learned", "does not help, and is worse than at initialisation"),
        (0.40, 0.02, "inconclusive", "learned", "does not help, and is worse than at initialisation"),
        (0.10, 0.50, "inconclusive", "learned", "not shown to lower the loss"),
        (0.0, 0.50, "inconclusive", "learned", "not shown to lower the loss"),
    ],
)
def test_learned_is_what_helps_and_more_than_at_initialisation(now, start, verdict, by_rule, said):
    one = finding(now, start)
    assert verdict_of(one) == by_rule, "else this would show nothing"
    found = directed(one, may_collapse=True)
    assert verdict_of(found) == verdict
    assert (found.override is None) == (verdict == by_rule)
    assert re.search(said, found.note)


def test_collapse_takes_a_mechanism_that_can_die_and_was_alive():
    assert directed(finding(0.001, -0.97), may_collapse=False).override == Verdict.INCONCLUSIVE
    assert directed(finding(0.009, -0.009), may_collapse=True).override == Verdict.INCONCLUSIVE
    wide = finding(0.0, -0.97, noise=100 * NOISE)
    assert directed(wide, may_collapse=True).override == Verdict.INCONCLUSIVE
    here, before = estimate(0.001, NOISE, 64), estimate(-0.97, 20_000 * (NOISE - NOISE.mean()), 64)
    unsure = dataclasses.replace(finding(0.001, -0.97), difference=paired_difference(here, before))
    assert directed(unsure, may_collapse=True).override == Verdict.INCONCLUSIVE


def test_without_own_init_fresh_models_say_where_it_started():
    one = dataclasses.replace(finding(-0.3, -0.97), difference=None)
    assert verdict_of(one) == "learned"
    assert "less than at initialisation (-0.97" in directed(one, may_collapse=True).note
    assert directed(dataclasses.replace(one, fresh=None), may_collapse=True).override is None


def test_few_groups_are_left_to_the_rule_and_an_override_is_kept():
    few = finding(-0.3, -0.97, rows=20)
    assert directed(few, may_collapse=True) is few
    failed = dataclasses.replace(finding(-0.3, -0.97), override=Verdict.INCONCLUSIVE, note="no null")
    assert directed(failed, may_collapse=True) is failed


def test_what_changes_nothing_is_told_from_what_changes_little_or_cancels():
    zeros = np.zeros((64, 20))
    assert unchanged(finding(0.0, -0.1, noise=zeros), Model)
    assert unchanged(finding(1e-7, -0.1, noise=zeros), Model), "rounding"
    assert not unchanged(finding(1e-5, -0.1, noise=zeros), Model)
    cancelling = np.where(np.arange(64) % 2, 1e-3, -1e-3)[:, None] + zeros
    one = finding(0.0, -0.1, noise=cancelling)
    assert abs(one.measurement.estimate.plug_in) < 1e-12
    assert not unchanged(one, Model)
    np.testing.assert_allclose(group_values(one.measurement.estimate), cancelling[:, 0], atol=1e-12)
    assert unchanged(finding(0.0, -0.1, noise=zeros, rows=1), Model)
    nothing = jackknife(mean_of, GroupedMean())
    assert not unchanged(Finding(Measurement(CHANGE, "", "nats", nothing)), Model), "not measured"

    class Exact(Model):
        dtype = "float64"

    assert not unchanged(finding(1e-7, -0.1, noise=zeros), Exact)


@pytest.mark.parametrize(
    ("now", "start", "says"),
    [
        (14.0, 4.5, True),
        (4.5, 4.5, False),
        (4.0, 3.0, False),
        (66.7, 66.7, False),
        (14.0, 15.0, False),
        (4.60, 4.58, False),
    ],
)
def test_diverged_is_worse_than_guessing_and_than_the_start(now, start, says):
    # ln 97 = 4.57; an untrained model may be far above it.
    loss = finding(now, start, Place(LOSS), "live")
    assert bool(diverged(Model, [finding(-3.0, 0.0), loss])) == says
    assert diverged(Model, [finding(now, start, Place(LOSS), "frozen")]) == ""
    if says:
        assert "14 nats" in diverged(Model, [loss])
        assert not diverged(Model, [finding(14.0, 14.0, Place(LOSS), "live", rows=20)]), "no interval"
        unsure = finding(14.0, 13.9, Place(LOSS), "live", noise=3000 * NOISE)
        assert not diverged(Model, [unsure]), "the interval holds 0"
        fresh_alone = dataclasses.replace(loss, difference=None)
        assert diverged(Model, [fresh_alone])
        assert not diverged(Model, [dataclasses.replace(fresh_alone, fresh=None)])


def test_how_two_depend_on_each_other_is_as_undecided_as_both_together():
    rest, sound = finding(-0.3, 0.0), finding(-0.2, 0.0)
    gone = directed(finding(0.001, -0.97), may_collapse=True)
    worse = directed(finding(-0.3, -0.97, Place("loss_change", component="both")), may_collapse=True)
    assert joint(rest, sound, [sound, sound]) is rest
    assert joint(rest, sound, [sound, worse]) is rest, "the other may stand in for it"
    found = joint(rest, worse, [sound, sound])
    assert found.override == Verdict.INCONCLUSIVE
    assert found.note.startswith("both: helps less than at initialisation")
    found = joint(rest, sound, [sound, gone])
    assert (found.override, found.note) == (
        Verdict.COLLAPSED,
        "cms: -0.970 nats at initialisation, now nothing",
    )
    assert joint(gone, worse, []) is gone


def batch_of(lengths, groups):
    rows = len(lengths)
    return EvalBatch(
        tokens=np.zeros((rows, 11), dtype=np.int64),
        lengths=np.array(lengths),
        document=np.array(groups),
        group=np.array(groups),
        start=np.zeros(rows, dtype=np.int64),
        index=np.arange(rows),
    )


class Halves(PartLosses):
    def parts(self, batch, scored):
        return super().parts(batch, scored) | {"late": scored & (np.arange(10) >= 5)}


def filled(condition, losses, lengths=(10, 4), groups=(0, 1)):
    made = Halves(condition)
    scored = np.arange(10) < np.array(lengths)[:, None]
    made.update({}, losses, scored, batch_of(lengths, groups))
    return made


def test_a_contrast_is_the_signed_sum_over_one_part():
    losses = {name: RNG.normal(size=(2, 10)) for name in "abcd"}
    made = {name: filled(name, x) for name, x in losses.items()}
    terms = [(1, made["a"]), (-1, made["b"]), (-1, made["c"]), (1, made["d"])]
    expected = losses["a"] - losses["b"] - losses["c"] + losses["d"]
    (row,) = contrast(CHANGE, WHOLE, terms)
    assert row.condition == "a - b - c + d"
    assert (row.unit, row.smallest_effect) == ("nats", EFFECT)
    assert row.plug_in() == pytest.approx(np.r_[expected[0], expected[1, :4]].mean(), abs=1e-12)
    (row,) = contrast(CHANGE, "late", terms[:2])
    assert row.plug_in() == pytest.approx((losses["a"] - losses["b"])[0, 5:].mean(), abs=1e-12)
    assert [source.n_tokens for source in row.sources()] == [5, 5]
    assert contrast(CHANGE, "early", terms) == []
    short = [(s, filled("x", losses["a"], lengths=(4, 4))) for s in (1, -1)]
    assert contrast(CHANGE, "late", short) == [], "a part without a token"


def test_the_loss_is_a_row_that_decides_nothing():
    (row,) = filled("live", np.ones((2, 10))).measurements()
    assert (row.place, row.condition, row.override) == (Place(LOSS), "live", Verdict.INCONCLUSIVE)
    assert row.estimate.value == 1.0
    with pytest.raises(
        MeasurementError, match=r"the loss is not finite at (\d+) of \1 tokens: the model diverged"
    ):
        filled("reset", np.full((2, 10), math.nan))
