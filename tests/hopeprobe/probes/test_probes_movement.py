"""Movement: distances against NumPy, and weights that never moved, only decayed, or are not this run's."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from hopeprobe.errors import MeasurementError
from hopeprobe.model.subject import HopeSubject
from hopeprobe.probes.base import Finding
from hopeprobe.probes.movement import (
    DISTANCES,
    TIMES,
    Part,
    Weights,
    alike,
    fresh_null,
    gathered,
    located,
    movement_rows,
)
from hopeprobe.probes.selfmod_drift import parts_of
from hopeprobe.stats import Evidence, Verdict, judge
from hopeprobe.subject import MissingCapability, load

W1 = "blocks.0.selfmod.memories.k.w1"
W2 = "blocks.0.selfmod.memories.k.w2"
BIAS = "blocks.1.selfmod.eta_bias"


class Trained(HopeSubject):
    """A model said to be trained for some steps, from the weights of another."""

    told = None

    def training(self):
        if self.told is None:
            raise MissingCapability("nobody kept a record")
        return self.told


@pytest.fixture
def pair(subject_of):
    """A checkpoint whose weights are still the initial ones, and these."""

    def make(steps=200, seed=0, **told):
        checkpoint = Trained(subject_of(seed=seed).module)
        checkpoint.trained_steps = steps
        checkpoint.told = {"learning_rate": 3e-4, "warmup": 0, "weight_decay": 0.1, **told}
        return checkpoint, subject_of(seed=0)

    return make


def parameter(subject, name):
    return dict(subject.module.named_parameters())[name]


def set_to(subject, name, values):
    with torch.no_grad():
        parameter(subject, name).copy_(torch.as_tensor(values))


def array(subject, name):
    return parameter(subject, name).detach().numpy().astype(np.float64)


def rows_of(checkpoint, initial, *names, layer=None, component="it"):
    rows = movement_rows(Weights(checkpoint, initial), [Part(layer, component, names)])
    return {row.place.statistic: row for row in map(measurement, rows)}


def measurement(row):
    return row.measurement if isinstance(row, Finding) else row


def verdicts_of(checkpoint, initial, *names):
    """What the rule says of both distances."""
    rows = movement_rows(Weights(checkpoint, initial), [Part(None, "it", names)])
    found = {}
    for row in rows:
        if isinstance(row, Finding):
            m = row.measurement
            evidence = Evidence(m.estimate, row.difference, row.fresh, m.override, m.note)
            found[m.place.statistic] = judge([evidence], m.smallest_effect)[0].verdict
    assert list(found) == list(DISTANCES)
    return set(found.values())


def null(row, kind):
    return next(n for n in row.nulls if n.kind == kind)


def test_distances_agree_with_numpy(pair):
    checkpoint, initial = pair()
    noise = np.random.default_rng(0)
    for name in (W1, W2):
        set_to(checkpoint, name, array(initial, name) + 0.01 * noise.standard_normal((16, 16)))
    rows = rows_of(checkpoint, initial, W1, W2)
    now, start = (np.concatenate([array(s, n).ravel() for n in (W1, W2)]) for s in (checkpoint, initial))
    assert rows["displacement"].estimate.value == pytest.approx(np.linalg.norm(now - start), rel=1e-12)
    relative = np.linalg.norm(now - start) / np.linalg.norm(start)
    assert rows["distance_from_init"].estimate.value == pytest.approx(relative, rel=1e-12)
    assert {rows[s].override for s in DISTANCES} == {None}
    for row in (rows[s] for s in DISTANCES):
        assert row.estimate.ci_low == row.estimate.value == row.estimate.ci_high
    assert (rows["displacement"].note, rows["displacement"].estimate.n) == ("", 0)
    assert {rows[s].override for s in TIMES} == {Verdict.NOT_APPLICABLE}


def test_fresh_init_is_the_distance_of_independent_initialisations(pair):
    checkpoint, initial = pair()
    set_to(checkpoint, W1, array(initial, W1) + 0.01)
    rows = rows_of(checkpoint, initial, W1)
    # Uniform on ±1/√d: each of d² entries has variance 1/(3d), the difference of two twice that.
    assert null(rows["displacement"], "fresh-init").value == pytest.approx(math.sqrt(2 * 16 / 3), rel=0.05)
    relative = null(rows["distance_from_init"], "fresh-init")
    assert relative.value == pytest.approx(math.sqrt(2), rel=0.1)
    assert (relative.n, relative.low < relative.value < relative.high) == (5, True)


def test_the_optimiser_null_is_that_of_integrity(pair):
    checkpoint, initial = pair(steps=1)
    set_to(checkpoint, W1, array(initial, W1) + 1e-4)
    rows = rows_of(checkpoint, initial, W1)
    start = np.linalg.norm(array(initial, W1))
    # One step: rate · 1 · √n for the step, rate · decay · ‖θ0‖ for decay, and a rounding.
    assert null(rows["displacement"], "optimiser").value == pytest.approx(3e-4 * 16 + 3e-5 * start, rel=1e-2)


@pytest.mark.parametrize(("share", "verdict"), [(0.049, Verdict.AT_INIT), (0.051, Verdict.LEARNED)])
def test_what_moved_by_more_than_the_smallest_effect_is_learned(pair, share, verdict):
    checkpoint, initial = pair(learning_rate=1.0)
    start, noise = array(initial, W1), np.random.default_rng(0).standard_normal((16, 16))
    set_to(checkpoint, W1, start + share * np.linalg.norm(start) * noise / np.linalg.norm(noise))
    assert verdicts_of(checkpoint, initial, W1) == {verdict}


def test_a_parameter_that_never_moved_is_no_signal(pair):
    checkpoint, initial = pair()
    set_to(checkpoint, W2, array(initial, W2) + 0.01)
    rows = rows_of(checkpoint, initial, W1)
    assert {rows[s].override for s in DISTANCES} == {Verdict.NO_SIGNAL}
    assert {rows[s].estimate.value for s in DISTANCES} == {0.0}
    assert "never moved: the loss does not reach it, or it was not trained" in rows["displacement"].note
    both = rows_of(checkpoint, initial, W1, W2)["displacement"]
    assert both.override is None
    assert f"no signal in 1 of 2 parameters: {W1}" in both.note


@pytest.mark.parametrize("steps", [1, 200, 2000])
def test_a_parameter_that_weight_decay_alone_moved_is_no_signal(pair, steps):
    checkpoint, initial = pair(steps=steps)
    weight = torch.nn.Parameter(parameter(initial, W1).detach().clone())
    optimiser = torch.optim.AdamW([weight], lr=3e-4, weight_decay=0.1)
    for _ in range(steps):
        weight.grad = torch.zeros_like(weight)  # what autograd gives where a use is there and the loss is not
        optimiser.step()
    set_to(checkpoint, W1, weight)
    row = rows_of(checkpoint, initial, W1)["distance_from_init"]
    assert row.estimate.value == pytest.approx(1 - (1 - 3e-5) ** steps, rel=2e-2)
    assert row.override is Verdict.NO_SIGNAL
    assert "as weight decay does without any gradient" in row.note


@pytest.mark.parametrize("steps", [1, 200, 2000])
def test_the_faintest_gradient_is_told_from_weight_decay(pair, steps):
    checkpoint, initial = pair(steps=steps)
    weight = torch.nn.Parameter(parameter(initial, W1).detach().clone())
    optimiser = torch.optim.AdamW([weight], lr=3e-4, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        weight.grad = 1e-7 * torch.randn(weight.shape, generator=generator)
        optimiser.step()
    set_to(checkpoint, W1, weight)
    assert rows_of(checkpoint, initial, W1)["displacement"].override is None


def test_shrinking_more_than_decay_can_is_movement(pair):
    checkpoint, initial = pair(steps=200)
    set_to(checkpoint, W1, 0.9 * array(initial, W1))
    row = rows_of(checkpoint, initial, W1)["displacement"]
    assert (row.override, row.note) == (None, "")


def test_a_single_number_may_shrink(pair):
    checkpoint, initial = pair()
    set_to(checkpoint, BIAS, torch.tensor(-2.999))
    assert rows_of(checkpoint, initial, BIAS)["displacement"].override is None


def test_another_initialisation_is_seen(pair):
    checkpoint, initial = pair(seed=3, learning_rate=1.0)
    rows = rows_of(checkpoint, initial, W1, W2)
    assert rows["displacement"].override is Verdict.INCONCLUSIVE
    assert "another initialisation, as its distance and norm look" in rows["displacement"].note
    # One number alone, here the same in every initialisation, tells nothing: all weights together do.
    set_to(checkpoint, BIAS, torch.tensor(-2.9))
    bias = rows_of(checkpoint, initial, BIAS)["displacement"]
    assert bias.override is Verdict.INCONCLUSIVE
    assert "all weights together: another initialisation" in bias.note
    checkpoint.told["learning_rate"] = 3e-4
    assert "further than the optimiser can go" in rows_of(checkpoint, initial, W1, W2)["displacement"].note


def test_the_rule_alone_would_call_few_distances_of_other_seeds_learned(subject_of, monkeypatch):
    """What stands behind that check: 40 initialisations, none of which is the run's own."""
    monkeypatch.setattr("hopeprobe.probes.movement.Distance.strange", lambda self: "")
    own, families = subject_of(seed=0), []
    for seed in range(1, 41):
        other = subject_of(seed=seed)
        other.trained_steps = 200
        weights = Weights(other, own)
        parts = parts_of(other.parameter_groups()["selfmod"])
        rows = [row for row in movement_rows(weights, parts) if isinstance(row, Finding)]
        evidence = [
            Evidence(row.measurement.estimate, row.difference, row.fresh, row.measurement.override)
            for row in rows
            if row.measurement.place.statistic == "distance_from_init"
        ]
        families.append({judged.verdict for judged in judge(evidence, 0.05)})
    assert sum(Verdict.LEARNED in found for found in families) <= 0.05 * len(families)
    assert all(Verdict.INCONCLUSIVE in found for found in families)


def test_weights_trained_as_far_as_that_are_not_called_so(pair):
    checkpoint, initial = pair(learning_rate=1.0)
    start, away = array(initial, W1), np.random.default_rng(0).standard_normal((16, 16))
    step = math.sqrt(2) * np.linalg.norm(start) * away / np.linalg.norm(away)
    set_to(checkpoint, W1, start + step)
    row = rows_of(checkpoint, initial, W1)["distance_from_init"]
    assert row.estimate.value == pytest.approx(math.sqrt(2), rel=1e-6)
    assert (row.override, row.note) == (None, "")
    assert verdicts_of(checkpoint, initial, W1) == {Verdict.INCONCLUSIVE}, "as far as another initialisation"


def test_at_step_zero_all_is_as_at_initialisation(pair):
    checkpoint, initial = pair(steps=0)
    row = rows_of(checkpoint, initial, W1)["displacement"]
    assert "step 0: nothing could move yet" in row.note
    assert verdicts_of(checkpoint, initial, W1) == {Verdict.AT_INIT}


def test_a_start_of_zero_has_no_relative_distance(pair):
    checkpoint, initial = pair()
    name = "blocks.0.cms.mix_weight"
    set_to(checkpoint, name, torch.full((2, 16), 0.5))
    rows = rows_of(checkpoint, initial, name)
    assert rows["displacement"].estimate.value == pytest.approx(math.sqrt(8))
    assert rows["distance_from_init"].override is Verdict.NOT_APPLICABLE
    assert rows["displacement"].override is Verdict.INCONCLUSIVE
    assert "its initial value is 0" in rows["distance_from_init"].note


def test_without_a_record_or_other_initialisations_there_are_no_such_nulls(pair, monkeypatch):
    checkpoint, initial = pair()
    checkpoint.told = None
    set_to(checkpoint, W1, torch.zeros(16, 16))
    assert [n.kind for n in rows_of(checkpoint, initial, W1)["displacement"].nulls] == ["fresh-init"]

    def refuse(seed):
        raise MissingCapability("no way")

    monkeypatch.setattr(initial, "reinitialised", refuse)
    assert rows_of(checkpoint, initial, W1)["displacement"].nulls == ()


def test_what_is_not_finite_or_does_not_fit_is_refused(pair, subject_of, configs):
    checkpoint, initial = pair()
    set_to(checkpoint, W1, torch.full((16, 16), torch.inf))
    with pytest.raises(MeasurementError, match=rf"{W1} not finite"):
        Weights(checkpoint, initial)
    other = subject_of(dataclasses.replace(configs["toy"], dim=8))
    with pytest.raises(MeasurementError, match="other names or shapes"):
        Weights(other, initial)


def test_times_of_a_run(toy_run):
    subject = load(toy_run / "step-000040.pt")
    weights = Weights(subject, subject.own_init())
    rows = movement_rows(weights, [Part(0, "k.w1", (W1,))])
    rows = list(map(measurement, rows))
    (settled,) = (row for row in rows if row.place.statistic == "settled_step")
    assert settled.estimate.value == weights.series.movement([W1]).settled_step() == 40
    assert "still on its way after step 20" in settled.note
    assert null(settled, "analytic").value == 40
    assert settled.override is Verdict.INCONCLUSIVE
    (share,) = (row for row in rows if row.place.statistic == "moved_by_step_200")
    assert (share.override, share.place.component) == (Verdict.NOT_APPLICABLE, "")
    assert "no checkpoint of step 200 lies before this one, of step 40" in share.note


def test_share_moved_by_step_200(toy_run, monkeypatch):
    monkeypatch.setattr("hopeprobe.probes.movement.STUDY_STEP", 20)
    subject = load(toy_run / "step-000040.pt")
    weights = Weights(subject, subject.own_init())
    rows = map(measurement, movement_rows(weights, [Part(0, "k.w1", (W1,))]))
    (share,) = (row for row in rows if row.place.statistic == "moved_by_step_200")
    first, middle, last = (array(load(toy_run / f"step-{s:06d}.pt"), W1) for s in (0, 20, 40))
    expected = 1 - np.linalg.norm(last - middle) / np.linalg.norm(last - first)
    assert share.estimate.value == pytest.approx(expected, rel=1e-9)
    assert 0 < expected < 1
    assert null(share, "analytic").value == 0.5


def test_the_last_checkpoint_has_not_moved_by_its_own_step(toy_run, monkeypatch):
    monkeypatch.setattr("hopeprobe.probes.movement.STUDY_STEP", 40)
    subject = load(toy_run / "step-000040.pt")
    rows = movement_rows(Weights(subject, subject.own_init()), [Part(0, "k.w1", (W1,))])
    (share,) = (row for row in map(measurement, rows) if row.place.statistic == "moved_by_step_200")
    assert share.override is Verdict.NOT_APPLICABLE
    assert "no checkpoint of step 40 lies before this one, of step 40" in share.note


def test_the_runs_own_seed_is_no_other_initialisation(subject_of):
    seed = 3_000_029
    subject = subject_of(seed=seed)
    subject.trained_steps = 0
    others = Weights(subject, subject_of(seed=seed)).others[W1][:, 2]
    assert len(others) == 5
    assert (others > 1).all(), "squared distances: about 2 · 16/3"


def test_a_run_with_nothing_between_its_ends_has_no_times(toy_run):
    subject = load(toy_run / "step-000001.pt")
    rows = movement_rows(Weights(subject, subject.own_init()), [Part(0, "k.w1", (W1,))])
    found = {row.place.statistic: row for row in map(measurement, rows)}
    assert {found[s].override for s in TIMES} == {Verdict.NOT_APPLICABLE}
    assert "no checkpoint of this run lies between steps 0 and 1" in found["settled_step"].note


def test_names_of_parts():
    assert located("blocks.11.cms.levels.fast.norm.bias", "cms") == (11, "fast.norm.bias")
    assert located("blocks.0.selfmod.conv", "selfmod") == (0, "conv")
    assert located("net.weight", "selfmod") == (None, "net.weight")
    parts = gathered([(0, "a", "x"), (1, "a", "y"), (0, "a", "z")])
    assert parts == [Part(0, "a", ("x", "z")), Part(1, "a", ("y",))]


def test_fresh_null_and_alike():
    (found,) = fresh_null(np.array([1.0, 2.0, 3.0]))
    assert (found.value, found.n) == (2.0, 3)
    assert found.high - 2.0 == pytest.approx(4.302653 * 1.0 * math.sqrt(4 / 3), rel=1e-5)
    assert fresh_null(np.array([1.0])) == ()
    assert alike(1.04, np.ones(2))
    assert not alike(1.06, np.ones(2))
    assert alike(6.0, np.array([1.0, 2.0, 3.0]))
    assert not alike(8.0, np.array([1.0, 2.0, 3.0]))
    assert not alike(0.0, np.zeros(2)), "what every initialisation makes the same tells none apart"
    assert not alike(1.0, np.array([]))
