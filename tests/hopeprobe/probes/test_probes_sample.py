"""The sample of windows, and the nulls of what is measured on it."""

import math

import numpy as np
import pytest
import torch

from hopeprobe.errors import MeasurementError
from hopeprobe.probes import sample
from hopeprobe.probes.base import Place
from hopeprobe.probes.sample import Kind, Reading, findings, sampled
from hopeprobe.stats import Verdict, judge
from hopeprobe.stats.verdict import Evidence
from hopeprobe.subject import MissingCapability
from hopeprobe.tokens import EvalWindows, TokenData

PLACE = Place("level")
KINDS = {"level": Kind("1", 0.1)}


def text_of(lengths):
    documents = [np.arange(i, i + n) % 97 for i, n in enumerate(lengths)]
    return TokenData.from_documents(documents, name="made", vocab_size=97, end_of_text=0)


def windows_of(lengths, context=128, carry="window", batch=3):
    return EvalWindows(text_of(lengths), "all", context=context, tokens=None, batch=batch, carry=carry)


def rows_of(batches):
    return [
        (int(d), int(g), int(n), list(t[: n + 1]))
        for b in batches
        for d, g, n, t in zip(b.document, b.group, b.lengths, b.tokens, strict=True)
    ]


def test_long_documents_give_32_windows_of_64_tokens():
    found = sampled(windows_of([200] * 100), 0)
    assert [len(b.lengths) for b in found] == [1] * 32
    for i, (document, group, n, tokens) in enumerate(rows_of(found)):
        assert (document, group, n) == (i, i, 64)
        assert tokens == [(i + t) % 97 for t in range(65)], "the beginning of its document"


@pytest.mark.parametrize("carry", ["window", "document"])
def test_short_documents_give_more_windows_one_a_group(carry):
    found = rows_of(sampled(windows_of([31] * 200, carry=carry), 0))
    assert [g for _, g, _, _ in found] == list(range(64))
    assert {n for *_, n, _ in found} == {30}


def test_a_group_is_stood_for_by_its_first_long_document_or_its_longest():
    lengths = [20] * 64 + [90] * 8 + [25] * 56 + [99] * 8
    found = rows_of(sampled(windows_of(lengths), 0))
    assert [(d, n) for d, _, n, _ in found[:10]] == [(64 + i, 64) for i in range(8)] + [(72, 24), (73, 24)]


def test_longer_windows_are_fewer_and_never_longer_than_the_context():
    assert [n for _, _, n, _ in rows_of(sampled(windows_of([600] * 50, context=512), 256))] == [256] * 16
    assert {n for _, _, n, _ in rows_of(sampled(windows_of([600] * 50, context=128), 4096))} == {128}
    assert [n for _, _, n, _ in rows_of(sampled(windows_of([6000] * 2, context=5000), 5000))] == [5000], (
        "never none"
    )


def test_batches_hold_the_same_windows():
    windows = windows_of([20, 90, 40, 70] * 10)
    alone, together = sampled(windows, 0), sampled(windows, 0, batch=8)
    assert rows_of(alone) == rows_of(together)
    assert max(len(b.lengths) for b in together) == 8
    for batch in together:
        assert batch.tokens.shape[1] == batch.lengths.max() + 1
        assert not batch.tokens[np.arange(batch.tokens.shape[1]) > batch.lengths[:, None]].any()
        assert list(batch.index) == list(batch.document), "the first windows come first"


class Levelled:
    """What is read of a model here: one number of its own, and a wave over the windows that all models share."""

    calls = 0

    def __call__(self, subject, batches):
        self.calls += 1
        if (level := float(subject.module.norm.bias.detach()[0])) > 90:
            raise MeasurementError("it exploded")
        rows = [row for b in batches for row in zip(b.document, b.lengths, strict=True)]
        return {PLACE: [Reading(level + math.sin(d), int(n)) for d, n in rows]}


@pytest.fixture
def model_of(subject_of):
    def make(level, seed=0, fresh=0.0):
        subject = subject_of(seed=seed)
        with torch.no_grad():
            subject.module.norm.bias[0] = level
        subject.reinitialised = lambda s: model_of_seed(s, fresh)
        return subject

    def model_of_seed(seed, fresh):
        subject = subject_of(seed=seed)
        with torch.no_grad():
            subject.module.norm.bias[0] = fresh + (seed % 7) / 100
        return subject

    return make


@pytest.fixture
def found_for():
    def find(subject, initial, read=None, lengths=(80, 70, 50, 75) * 20):
        read = read or Levelled()
        batches = sampled(windows_of(lengths), 0)
        (finding,) = findings(read(subject, batches), KINDS, subject, initial, batches, read)
        return finding, batches

    return find


def test_values_and_differences_against_numpy(model_of, found_for):
    finding, batches = found_for(model_of(2.0), model_of(0.5))
    d, n = (np.array([getattr(b, c)[0] for b in batches]) for c in ("document", "lengths"))
    estimate = finding.measurement.estimate
    assert estimate.value == pytest.approx(np.average(2 + np.sin(d), weights=n), rel=1e-12)
    assert (estimate.n, estimate.n_groups) == (n.sum(), len(n))
    assert finding.difference.value == pytest.approx(1.5)
    assert finding.difference.se == pytest.approx(0, abs=1e-9), "what both models share cancels"
    assert estimate.se > 0.01
    seeds = sample._SEEDS[:4]
    fresh = [np.average(s % 7 / 100 + np.sin(d[:8]), weights=n[:8]) for s in seeds]
    np.testing.assert_allclose(finding.fresh.values, fresh)
    assert finding.fresh.checkpoint == pytest.approx(np.average(2 + np.sin(d[:8]), weights=n[:8]))
    kinds = {null.kind: null.value for null in finding.nulls}
    assert kinds["own-init"] == pytest.approx(np.average(0.5 + np.sin(d), weights=n))
    assert kinds["fresh-init"] == pytest.approx(np.mean(fresh))


@pytest.mark.parametrize(("level", "verdict"), [(2.0, Verdict.LEARNED), (0.02, Verdict.AT_INIT)])
def test_the_rule_decides(model_of, found_for, level, verdict):
    finding, _ = found_for(model_of(level), model_of(0.0))
    evidence = Evidence(finding.measurement.estimate, finding.difference, finding.fresh, finding.override)
    assert judge([evidence], 0.1)[0].verdict is verdict


def test_too_few_windows_claim_nothing(model_of, found_for):
    finding, batches = found_for(model_of(2.0), model_of(0.0), lengths=[80] * 20)
    assert len(batches) == 20
    assert math.isnan(finding.measurement.estimate.ci_low)
    evidence = Evidence(finding.measurement.estimate, finding.difference, finding.fresh, finding.override)
    assert judge([evidence], 0.1)[0].verdict is Verdict.INCONCLUSIVE


def test_without_initial_weights_fresh_ones_decide_alone(model_of, found_for):
    finding, _ = found_for(model_of(2.0), None)
    assert (finding.difference, finding.override) == (None, None)
    assert "own-init: the run's own initial weights are not known" in finding.note
    assert finding.fresh is not None


def test_a_null_that_failed_never_lets_the_other_decide(model_of, found_for):
    finding, _ = found_for(model_of(2.0), model_of(99.0))
    assert finding.override is Verdict.INCONCLUSIVE
    assert "own-init: not measured: it exploded" in finding.note
    finding, _ = found_for(model_of(2.0, fresh=99.0), model_of(0.0))
    assert finding.override is Verdict.INCONCLUSIVE
    assert "fresh-init: not measured: it exploded" in finding.note
    subject = model_of(2.0)
    subject.reinitialised = lambda seed: (_ for _ in ()).throw(MissingCapability("no seeds here"))
    finding, _ = found_for(subject, model_of(0.0))
    assert finding.override is Verdict.INCONCLUSIVE
    assert "no seeds here" in finding.note


def test_nulls_are_kept_and_the_checkpoint_is_always_read(model_of, found_for):
    read = Levelled()
    found_for(model_of(2.0), model_of(0.0), read)
    assert read.calls == 6
    found_for(model_of(3.0), model_of(0.0), read)
    assert read.calls == 7
    finding, _ = found_for(model_of(3.0), model_of(0.1), read)
    assert read.calls == 9, "other initial weights"
    assert finding.difference.value == pytest.approx(2.9, rel=1e-6)
    found_for(model_of(3.0), model_of(0.1), read, lengths=[70] * 40)
    assert read.calls == 9 + 6, "other windows"
    assert len(sample._kept) <= sample._MOST_KEPT


def test_a_model_that_is_its_own_start_is_read_as_it_is_now(model_of, found_for):
    subject, read = model_of(2.0), Levelled()
    finding, _ = found_for(subject, subject, read)
    assert finding.difference.value == 0
    assert read.calls == 5, "the checkpoint and four fresh ones"


def test_a_window_that_one_model_alone_has_a_value_for_takes_no_other_statistic_along(model_of):
    other = Place("other")

    def read(subject, batches):
        rows = [row for b in batches for row in zip(b.document, b.lengths, strict=True)]
        level = float(subject.module.norm.bias.detach()[0])
        readings = [Reading(level + math.sin(d), int(n)) for d, n in rows]
        holed = [Reading(0.0, 0) if i == 5 and level > 1 else one for i, one in enumerate(readings)]
        return {PLACE: holed, other: readings}

    batches, subject = sampled(windows_of((80, 70, 50, 75) * 20), 0), model_of(2.0)
    here = read(subject, batches)
    holed, whole = findings(here, KINDS | {"other": Kind("1", 0.1)}, subject, model_of(0.5), batches, read)
    assert holed.difference is None
    assert holed.override is Verdict.INCONCLUSIVE
    assert "not comparable with own-init: a paired difference needs the same tokens" in holed.note
    assert whole.difference.value == pytest.approx(1.5)
    assert whole.override is None


def test_a_statistic_that_is_defined_nowhere_is_nan(model_of, found_for):
    def read(subject, batches):
        return {PLACE: [Reading(0.0, 0) for _ in batches]}

    finding, _ = found_for(model_of(2.0), model_of(0.0), read)
    assert math.isnan(finding.measurement.estimate.value)
    assert finding.difference is None
    assert finding.override is None
