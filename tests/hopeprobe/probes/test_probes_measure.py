"""All conditions of one model: passes shared, contrasts paired, and what fails taking nothing else along."""

import gc
import weakref

import numpy as np
import pytest
import torch
from scipy.special import stdtrit

from hopeprobe.analysis import analyze, missing_from
from hopeprobe.conditions import FROZEN, LIVE, Condition, as_tensors, frozen
from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.model.subject import HopeSubject
from hopeprobe.probes import Finding, Place, Probe, Quantity
from hopeprobe.probes import measure as measuring
from hopeprobe.probes.base import Measurement
from hopeprobe.probes.integrity import MeanLoss
from hopeprobe.probes.measure import CONTRASTS, ESTIMATES, VALUES, measure
from hopeprobe.stats import paired_difference
from hopeprobe.subject import load
from hopeprobe.tokens import EvalWindows

#: Losses are float32, and a pass deals the windows into other batches than the loops here: a last bit differs.
ROUNDING = 1e-8
KEPT = Condition("kept", run=lambda subject, prepared, batch: subject.run(*as_tensors(batch)))


def difference(a, b):
    return a.mean() - b.mean()


class Loss(Probe):
    """Loss under some conditions, and the difference of the first two."""

    question = "What do writes do to the loss?"
    statistics = ("loss",)

    def __init__(self, name="writes", conditions=(LIVE, FROZEN)):
        self.name, self._conditions = name, conditions

    def applies(self, subject):
        return None

    def conditions(self, subject):
        return self._conditions

    def accumulator(self, subject, condition, windows):
        made = MeanLoss(condition)
        made.quantities = lambda: [
            Quantity(Place("loss"), "nats", lambda m: m.mean(), lambda: (made.moments["loss"],))
        ]
        return made


class Gain(Loss):
    def contrasts(self, accumulators):
        a, b = (accumulators[c.name].moments["loss"] for c in self._conditions[:2])
        label = " - ".join(c.name for c in self._conditions[:2])
        return [
            Quantity(Place("gain"), "nats", difference, lambda: (a, b), condition=label, smallest_effect=0.01)
        ]


@pytest.fixture
def windows(toy_data):
    return EvalWindows(toy_data, "all", context=32, tokens=1600, batch=50)


@pytest.fixture
def passes(monkeypatch):
    made = []

    def counted(subject, windows, probes, condition, *rest):
        made.append((condition.name, [probe.name for probe in probes]))
        return real(subject, windows, probes, condition, *rest)

    real = measuring.run_pass
    monkeypatch.setattr(measuring, "run_pass", counted)
    return made


def losses_of(subject, windows, hooks=()):
    """Losses by token, and the group of each, without any of the code under test."""
    losses, groups = [], []
    for batch in windows:
        with torch.no_grad(), subject.module.hooks(hooks):
            out = subject.module(*as_tensors(batch))
        for row, group, length in zip(out.losses.double().numpy(), batch.group, batch.lengths, strict=True):
            losses += list(row[:length])
            groups += [group] * length
    return np.array(losses), np.array(groups)


def test_a_contrast_is_the_paired_difference_of_its_conditions(subject, windows):
    rows = measure(subject, windows, [Gain()], ESTIMATES).found["writes"]
    live, groups = losses_of(subject, windows)
    still, _ = losses_of(subject, windows, subject.freeze_hooks())
    gain, n = live - still, len(live)
    estimate = rows["live - frozen", Place("gain")].estimate
    assert estimate.value == pytest.approx(gain.mean(), abs=ROUNDING)
    assert estimate.n == n == 1600
    # The delete-one-group jackknife, spelled out.
    share = np.array([(groups == g).mean() for g in range(64)])
    influence = np.array([(1 - share[g]) * (gain.mean() - gain[groups != g].mean()) for g in range(64)])
    influence -= share * influence.sum()
    se = np.sqrt(((influence / (1 - share)) ** 2).sum())
    used = len(set(groups))
    df = (share**2).sum() ** 2 / (share**4).sum() * (used - 1) / used
    # Losses are float32 numbers near 4, and batches of another shape round them otherwise, by some 1e-7; the interval
    # of a gain is 1e-4 wide.
    assert estimate.ci_high - estimate.value == pytest.approx(stdtrit(df, 0.975) * se, rel=2e-5)
    apart = paired_difference(rows["live", Place("loss")].estimate, rows["frozen", Place("loss")].estimate)
    assert estimate.se == pytest.approx(apart.se, rel=1e-6)
    assert estimate.se < 0.5 * rows["live", Place("loss")].estimate.se, "pairing is what narrows it"
    values = measure(subject, windows, [Gain()], VALUES).found["writes"]
    assert {key: row.estimate.plug_in for key, row in rows.items()} == values


def test_a_contrast_over_other_tokens_is_refused(subject, windows):
    def shorter(subject, prepared, batch):
        out = subject.run(*as_tensors(batch))
        return out._replace(scored=out.scored & (torch.arange(out.scored.shape[1]) > 0))

    rows = measure(subject, windows, [Gain(conditions=(LIVE, Condition("late", run=shorter)))], ESTIMATES)
    assert set(rows.found["writes"]) == {("live", Place("loss")), ("late", Place("loss"))}
    (reason,) = rows.failed["writes"].values()
    assert "did not score the same tokens: 1600 and" in reason
    assert list(rows.failed["writes"]) == [CONTRASTS]


def test_as_many_tokens_in_other_groups_are_refused_too(subject, windows):
    rows = measure(subject, windows, [Gain()], ESTIMATES)
    assert not rows.failed["writes"]

    class Dealt(Gain):
        def accumulator(self, subject, condition, windows):
            made = super().accumulator(subject, condition, windows)
            if condition == "frozen":
                inner = made.update
                made.update = lambda c, x, s, b: inner(c, x, s, _regrouped(b))
            return made

    rows = measure(subject, windows, [Dealt()], ESTIMATES)
    assert "1600 and 1600, in other groups" in rows.failed["writes"][CONTRASTS]


def _regrouped(batch):
    from dataclasses import replace

    return replace(batch, group=(batch.group + 1) % 64)


def test_a_condition_is_run_once_for_all_that_ask_for_it(subject, windows, passes):
    probes = [Loss("a", (LIVE,)), Gain("b", (FROZEN, LIVE)), Loss("c", (frozen("cms"), FROZEN))]
    rows = measure(subject, windows, probes, VALUES)
    assert passes == [("live", ["a", "b"]), ("frozen", ["b", "c"]), ("cms-frozen", ["c"])]
    assert ("frozen - live", Place("gain")) in rows.found["b"]


def test_two_conditions_of_one_name_are_refused(subject, windows, settings):
    probes = [Loss("a"), Loss("b", (Condition("live"),))]
    with pytest.raises(
        BadInputError, match=r"two different conditions are called 'live', one by the probe a, one by b"
    ):
        measure(subject, windows, probes, VALUES)


def test_conditions_of_one_mechanism_are_what_they_say(subject, windows):
    rows = measure(subject, windows, [Loss(conditions=(frozen("selfmod"), frozen("cms.slow")))], VALUES)
    for name, pattern in (
        ("selfmod", "blocks.*.selfmod.hook_write_gate"),
        ("cms.slow", "blocks.*.cms.slow.hook_write_gate"),
    ):
        losses, _ = losses_of(subject, windows, [(pattern, lambda gate, hook: gate * 0)])
        assert rows.found["writes"][f"{name}-frozen", Place("loss")] == pytest.approx(
            losses.mean(), abs=ROUNDING
        )


def test_a_condition_that_fails_leaves_the_others(toy_run, settings):
    def diverges(subject, prepared, batch):
        raise MeasurementError("it diverged")

    for bad in (Condition("bad", run=diverges), Condition("bad", prepare=lambda s, w: diverges(s, w, None))):
        results = analyze(toy_run / "step-000040.pt", [Gain(conditions=(LIVE, bad)), Loss("b")], **settings)
        assert [(r.probe, r.statistic, r.condition) for r in results.rows] == [
            ("writes", "loss", "live"),
            ("b", "loss", "live"),
            ("b", "loss", "frozen"),
        ]
        assert missing_from(results) == [
            "step-000040.pt: writes (bad): it diverged",
            "step-000040.pt: writes (contrasts): bad was not measured: it diverged",
        ]


def test_hooks_of_a_condition_that_do_not_fire_are_no_measurement(subject, windows):
    never = Condition(
        "edited", hooks=lambda s, p, b: [("blocks.0.cms.slow.hook_fast_in", lambda w, hook: None)]
    )
    short = EvalWindows(windows.data, "all", context=24, tokens=300, batch=5)
    rows = measure(subject, short, [Loss(conditions=(never, LIVE))], VALUES)
    assert "the model was not edited: hooks never fired" in rows.failed["writes"]["edited"]
    assert list(rows.found["writes"]) == [("live", Place("loss"))]
    assert not measure(subject, windows, [Loss(conditions=(never,))], VALUES).failed["writes"]
    typo = Condition("typo", hooks=lambda s, p, b: [("blocks.0.cms.slw.hook_delta", lambda w, hook: None)])
    assert (
        "did you mean" in measure(subject, short, [Loss(conditions=(typo,))], VALUES).failed["writes"]["typo"]
    )


def test_short_windows_have_no_write_to_stop_but_an_edit_must_happen(subject, windows):
    class Deaf(HopeSubject):
        def run(self, tokens, lengths=None, state=None):
            return subject.run(tokens, lengths)

    deaf = Deaf(HopeSubject.reinitialised(subject, 5).module)
    tiny = EvalWindows(windows.data, "all", context=4, tokens=300, batch=5)
    edit = Condition("edited", hooks=lambda s, p, b: [("hook_embed", lambda x, hook: x * 0)])
    rows = measure(deaf, tiny, [Loss(conditions=(FROZEN, edit))], VALUES)
    assert list(rows.found["writes"]) == [("frozen", Place("loss"))]
    assert "the model was not edited" in rows.failed["writes"]["edited"]


def test_a_mechanism_that_is_not_there_is_not_applicable(toy_run, settings):
    subject = load(toy_run / "step-000040.pt")
    results = analyze(subject, [Gain(conditions=(LIVE, frozen("attention")))], **settings)
    rows = {row.condition: row for row in results.rows}
    assert set(rows) == {"live", "attention-frozen"}
    assert rows["attention-frozen"].verdict == "n/a"
    assert "no write gate for 'attention' alone" in rows["attention-frozen"].note
    assert missing_from(results) == []


def test_preparation_reaches_hooks_and_runs_and_is_done_once(subject, windows):
    calls = []

    def prepare(subject, windows):
        calls.append(windows)
        return 0.0

    def scaled(subject, prepared, batch):
        return [("blocks.*.cms.fast.hook_delta", lambda delta, hook: delta * prepared)]

    def ran(subject, prepared, batch):
        with subject.module.hooks(scaled(subject, prepared, batch)):
            return subject.run(*as_tensors(batch))

    conditions = Condition("a", hooks=scaled, prepare=prepare), Condition("b", run=ran, prepare=prepare)
    rows = measure(subject, windows, [Loss(conditions=conditions)], VALUES).found["writes"]
    assert len(calls) == 1
    losses, _ = losses_of(subject, windows, [("blocks.*.cms.fast.hook_delta", lambda d, hook: d * 0)])
    assert rows["a", Place("loss")] == rows["b", Place("loss")] == pytest.approx(losses.mean(), abs=ROUNDING)


def test_hooks_are_made_anew_for_each_batch_which_they_know(subject, windows):
    seen = []

    def hooks(subject, prepared, batch):
        ticks = []
        seen.append((list(batch.index), ticks))
        return [("hook_embed", lambda x, hook: ticks.append(len(ticks)))]

    measure(subject, windows, [Loss(conditions=(Condition("counted", hooks=hooks),))], VALUES)
    assert sorted(i for index, _ in seen for i in index) == list(range(sum(len(b.index) for b in windows)))
    assert all(ticks == list(range(len(ticks))) and ticks for _, ticks in seen)


def test_rows_that_act_on_each_other_come_in_fixed_batches(subject, windows):
    def swapped(subject, prepared, batch):
        tokens, lengths = as_tensors(batch)
        if tokens.shape[1] <= 17:
            return subject.run(tokens, lengths)
        order = list(np.roll(np.arange(len(lengths)), 1))
        state = subject.select_rows(subject.run(tokens[:, :17], lengths.clamp(max=16)).state, order)
        late = subject.run(tokens[:, 16:], (lengths - 16).clamp(min=0), state)
        early = subject.run(tokens[:, :17], lengths.clamp(max=16))
        return late._replace(
            losses=torch.cat([early.losses, late.losses], 1), scored=torch.cat([early.scored, late.scored], 1)
        )

    values = []
    for batch, fixed in ((50, 6), (7, 6), (50, None), (7, None)):
        probe = Loss(conditions=(Condition("swapped", run=swapped, batch=fixed),))
        rows = measure(subject, windows.with_batch(batch), [probe], VALUES)
        values.append(rows.found["writes"]["swapped", Place("loss")])
    assert values[0] == values[1]
    assert values[2] != values[3]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda out: out._replace(losses=out.losses[:, 1:]), "losses .* of a batch of"),
        (lambda out: out._replace(scored=torch.ones_like(out.scored)), "behind a window's end"),
    ],
)
def test_a_run_that_scores_something_else_is_refused(subject, windows, broken, message):
    condition = Condition("own", run=lambda s, p, b: broken(s.run(*as_tensors(b))))
    rows = measure(subject, windows, [Loss(conditions=(condition,))], VALUES)
    with pytest.raises(MeasurementError, match=message):
        raise MeasurementError(rows.failed["writes"]["own"])


def test_accumulators_are_let_go_before_the_next_pass(subject, windows):
    alive = []

    class Counting(Loss):
        def accumulator(self, subject, condition, windows):
            gc.collect()
            made = super().accumulator(subject, condition, windows)
            alive.append(sum(one() is not None for one in refs))
            refs.append(weakref.ref(made))
            return made

    class CountingGain(Gain):
        accumulator = Counting.accumulator

    refs = []
    measure(subject, windows, [Counting(conditions=(LIVE, FROZEN, KEPT))], VALUES)
    assert alive == [0, 0, 0]
    refs, alive = [], []
    CountingGain.accumulator = _counting(refs, alive)
    measure(subject, windows, [CountingGain(conditions=(LIVE, FROZEN, KEPT))], VALUES)
    assert alive == [0, 1, 2], "contrasts need them all"


def _counting(refs, alive):
    def accumulator(self, subject, condition, windows):
        gc.collect()
        made = Loss.accumulator(self, subject, condition, windows)
        alive.append(sum(one() is not None for one in refs))
        refs.append(weakref.ref(made))
        return made

    return accumulator


def test_contrasts_are_judged_beside_their_own_nulls(toy_run, settings):
    results = analyze(toy_run / "step-000040.pt", [Gain()], **settings)
    row = next(row for row in results.rows if row.statistic == "gain")
    assert row.condition == "live - frozen"
    assert row.ci_low <= row.value <= row.ci_high
    nulls = {null.null_kind: null for null in results.null_rows if null.statistic == "gain"}
    assert set(nulls) == {"own-init", "fresh-init"}
    start = load(toy_run / "step-000000.pt")
    made = EvalWindows(settings["data"], "all", context=32, tokens=1600, batch=50)
    live, _ = losses_of(start, made)
    still, _ = losses_of(start, made, start.freeze_hooks())
    assert nulls["own-init"].value == pytest.approx((live - still).mean(), abs=ROUNDING)
    assert nulls["fresh-init"].n == 5
    assert not np.isnan(row.p)


def test_rows_of_the_model_bring_evidence_of_their_own(toy_run, settings):
    class Own(Gain):
        statistics = ("loss", "gain", "moved", "slope")

        def of_model(self, subject, initial, windows):
            rows = measure(subject, windows, [Gain()], ESTIMATES).found["writes"]
            row = rows["live - frozen", Place("gain")]
            start = measure(initial, windows, [Gain()], ESTIMATES).found["writes"][
                "live - frozen", Place("gain")
            ]
            own = Measurement(Place("slope"), "", "nats", row.estimate, smallest_effect=10.0)
            plain = Measurement(Place("moved"), "", "1", row.estimate)
            return [Finding(own, difference=paired_difference(row.estimate, start.estimate)), plain]

    results = analyze(toy_run / "step-000040.pt", [Own()], **settings)
    rows = {row.statistic: row for row in results.rows}
    assert rows["slope"].verdict == "at-init"
    assert rows["moved"].verdict == "inconclusive"
    assert "no null" in rows["moved"].note

    class Failing(Gain):
        def of_model(self, subject, initial, windows):
            raise MeasurementError("no gradient")

    results = analyze(toy_run / "step-000040.pt", [Failing()], **settings)
    assert missing_from(results) == ["step-000040.pt: writes: no gradient"]
    assert {row.statistic for row in results.rows} == {"loss", "gain"}


def test_a_probe_of_weights_alone_needs_no_pass(toy_run, settings, passes):
    class Weights(Loss):
        def conditions(self, subject):
            return ()

        def of_model(self, subject, initial, windows):
            return [Measurement(Place("loss"), "", "1", self.estimate)]

    probe = Weights()
    with_tokens = measure(
        load(toy_run / "step-000040.pt"),
        EvalWindows(settings["data"], "all", context=32, tokens=1600),
        [Gain()],
        ESTIMATES,
    )
    probe.estimate = next(iter(with_tokens.found["writes"].values())).estimate
    passes.clear()
    results = analyze(toy_run / "step-000040.pt", [probe], **settings)
    assert passes == []
    assert [row.verdict for row in results.rows] == ["inconclusive"]
