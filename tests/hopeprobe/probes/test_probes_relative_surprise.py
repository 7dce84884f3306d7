"""The probe of gate rules: finds the rule that must win, calls none where none may, and says what it measured."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from planted_gates import CONTEXT, GATE, TICK, VOCAB, Planted, carriers, exchangeable, text, unrelated

from hopeprobe.analysis import analyze
from hopeprobe.conditions import as_tensors
from hopeprobe.errors import BadInputError
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.subject import HopeSubject
from hopeprobe.probes.gated import (
    Cell,
    GatedLosses,
    Prepared,
    area_weights,
    cells_of,
    gate_of,
    less_random,
    prepare,
    still,
)
from hopeprobe.probes.relative_surprise import BEATS, LOSES, NOT_TOLD, RelativeSurprise
from hopeprobe.probes.sample import sampled as sampled_windows
from hopeprobe.probes.write_utility import _correlated, _read, of_sample, utilities
from hopeprobe.stats import GroupedMean, Verdict
from hopeprobe.subject import GateRule, load
from hopeprobe.tokens import EvalWindows
from hopeprobe.tokens.windows import EvalBatch

FEW = RelativeSurprise(budgets=(0.25, 0.1), rules=("quantile", "zscore", "momentum"), sample=False)


def measured(subject, data, probe=FEW, fresh=0, **more):
    probes = probe if isinstance(probe, list) else [probe]
    return analyze([subject], probes=probes, data=data, tokens=None, split="all", fresh=fresh, **more)


def rows_of(results, statistic, component=None):
    return [r for r in results.rows if r.statistic == statistic and component in (None, r.component)]


def test_the_rule_that_must_win_is_found(tmp_path):
    results = measured(carriers(0), text(0), fresh=4, cache_dir=tmp_path)
    found = rows_of(results, "loss_difference", "quantile")
    assert len(found) == 2
    for row in found:
        assert row.verdict == "learned", row.note
        assert BEATS in row.note
        assert row.ci_high < -0.3
    (area,) = rows_of(results, "area_difference", "quantile")
    assert area.verdict == "learned"


def test_without_worth_nothing_depends_on_the_gate(tmp_path):
    results = measured(Planted(np.linspace(1, 9, VOCAB), np.ones(VOCAB), 0.0), text(1), cache_dir=tmp_path)
    assert {r.verdict for r in rows_of(results, "loss_difference")} == {"no-signal"}


def called(seed, tmp_path, probe=FEW):
    results = measured(exchangeable(), text(seed), probe, cache_dir=tmp_path)
    compared = [r for r in results.rows if r.statistic in ("loss_difference", "area_difference")]
    assert all(any(word in r.note for word in (BEATS, LOSES, NOT_TOLD)) for r in compared)
    return any(BEATS in r.note for r in compared)


@pytest.mark.slow
def test_no_winner_is_called_among_equals(tmp_path):
    """In 8 streams of exchangeable tokens; in 400 in the slow test. More than 2 of 8 has probability 0.006."""
    assert sum(called(seed, tmp_path) for seed in range(8)) <= 2


@pytest.mark.slow
def test_at_most_one_in_twenty_streams_of_equals_has_a_winner(tmp_path):
    assert sum(called(seed, tmp_path) for seed in range(400)) <= 20


def test_a_winner_among_equals_would_be_called_if_random_were_not_random(tmp_path, monkeypatch):
    """Were `random` to write the worst tokens, every rule would look good: the comparison is what decides."""
    subject = unrelated(3)
    monkeypatch.setattr("hopeprobe.model.gate._chance", lambda chains, salt, seen: worst(subject, seen))
    results = measured(subject, text(3), cache_dir=tmp_path)
    assert any(BEATS in r.note for r in rows_of(results, "loss_difference"))


def worst(subject, seen):
    worth = subject.worth[seen.targets.clamp_min(0)]
    return (1.0 / (1.0 + worth))[:, None]


def test_utilities_are_what_later_tokens_lose():
    subject, data = unrelated(5), text(5)
    batch = next(iter(EvalWindows(data, "all", context=CONTEXT, tokens=CONTEXT, batch=1)))
    targets = batch.tokens[0, 1:]
    own, worth = subject.own.numpy()[targets], subject.worth.numpy()[targets]

    def losses(kept):
        starts = np.arange(CONTEXT) // TICK * TICK
        return np.array(
            [own[t] - (worth[:s] * kept[:s]).sum() / max(worth[:s].sum(), 1e-9) for t, s in enumerate(starts)]
        )

    everything = np.ones(CONTEXT)
    expected = []
    for t in range(CONTEXT - TICK):
        without = everything.copy()
        without[t] = 0.0
        expected.append((losses(without) - losses(everything))[t + 1 :].sum())
    found = utilities(subject, batch, "all")
    assert np.isnan(found[-TICK:]).all()
    assert np.allclose(found[:-TICK], expected, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    probe = RelativeSurprise(budgets=(0.25, 0.1), rules=("quantile",))
    return measured(unrelated(6), text(6), probe, cache_dir=tmp_path_factory.mktemp("cache"))


def test_the_oracle_gains_where_rules_correlate_with_nothing(sampled):
    oracle = rows_of(sampled, "oracle_difference")
    assert [r.position for r in oracle] == ["0.25", "0.1"]
    assert all(r.value < -0.1 and BEATS in r.note for r in oracle)
    correlations = {r.component: r for r in rows_of(sampled, "utility_correlation")}
    assert set(correlations) == {"quantile", "zscore", "ratio", "excess", "entropy-gap", "momentum"}
    assert abs(correlations["quantile"].value) < 0.15  # of 400 kinds of token, drawn once


def test_rules_of_one_score_overlap_and_chance_is_the_budget(sampled):
    rows = {(r.component, r.position): r for r in rows_of(sampled, "overlap")}
    # Without frequencies and entropies to speak of, three rules here have one score.
    assert rows["quantile & entropy-gap", "0.25"].value == pytest.approx(1.0, abs=0.02)
    assert 0.25 < rows["quantile & zscore", "0.25"].value < 1.0
    nulls = [n for n in sampled.null_rows if n.statistic == "overlap" and n.null_kind == "random-gate"]
    assert {float(n.position): n.value for n in nulls} == {0.25: 0.25, 0.1: 0.1}


def test_scores_that_know_the_worth_correlate_with_it():
    subject, data = carriers(6), text(6)
    batch = next(iter(EvalWindows(data, "all", context=CONTEXT, tokens=CONTEXT, batch=1)))
    utility = utilities(subject, batch, "all")[:-TICK]
    surprise = subject.own.numpy()[batch.tokens[0, 1 : CONTEXT + 1 - TICK]]
    assert _correlated(surprise, utility).value > 0.3


def fed(pairs):
    """Moments of (loss, written) of each group."""
    mean = GroupedMean((2,))
    for group, (loss, written) in enumerate(pairs):
        mean.update(np.array([[[loss, written]]]), np.array([[True]]), np.array([group]))
    return mean.compute()


def test_losses_are_compared_at_equal_shares():
    rng = np.random.default_rng(0)
    shares = [np.zeros(4), np.full(4, 0.1), np.full(4, 0.3), np.ones(4)]
    losses = [rng.normal(size=4) for _ in shares]
    curve = [fed(zip(y, x, strict=True)) for x, y in zip(shares, losses, strict=True)]
    at, mine = np.array([0.0, 0.2, 0.65, 1.0]), rng.normal(size=4)
    rule = fed(zip(mine, at, strict=True))
    expected = [mine[g] - np.interp(at[g], [x[g] for x in shares], [y[g] for y in losses]) for g in range(4)]
    assert np.allclose(less_random([1.0], 1, rule, *curve)[:4], expected)
    assert np.allclose(less_random([0.5, 0.25], 2, rule, rule, *curve)[:4], 0.75 * np.array(expected))


def test_the_area_is_the_mean_over_budgets():
    budgets = (0.5, 0.25, 0.1, 0.05)
    weights = area_weights(budgets)
    difference = np.array([0.3, -0.2, 0.7, 0.1])
    expected = np.trapezoid([*difference[::-1], 0.0], [*budgets[::-1], 1.0]) / 0.95
    assert np.dot(weights, difference) == pytest.approx(expected)


@pytest.fixture(scope="module")
def toy_results(toy_run, toy_data, toy_cache):
    probe = RelativeSurprise(budgets=(0.25,), rules=("excess", "assoc"), sample=False)
    return analyze(
        [toy_run / "step-000040.pt"],
        probes=[probe],
        data=toy_data,
        tokens=1200,
        split="all",
        fresh=2,
        cache_dir=toy_cache,
    )


def test_a_model_is_measured_under_rules(toy_results):
    assert toy_results.missing == []
    compared = rows_of(toy_results, "loss_difference")
    assert {(r.condition, r.component) for r in compared} == {
        *((writes, "excess") for writes in ("selfmod", "cms", "all")),
        ("selfmod", "assoc"),
    }
    written = {(r.condition, r.component): r.value for r in rows_of(toy_results, "written")}
    assert written["all", "everything"] > 0.7  # but for ticks that documents end in
    assert {v for (_, rule), v in written.items() if rule == "nothing"} == {0.0}
    assert all(0.1 < written[writes, "random"] < 0.35 for writes in ("selfmod", "cms", "all"))
    assert {r.component for r in rows_of(toy_results, "position_difference")} == {"excess", "assoc", "random"}
    nulls = {n.null_kind for n in toy_results.null_rows if n.statistic == "loss_difference"}
    assert nulls == {"own-init", "fresh-init", "random-gate"}
    for row in compared:
        assert math.isfinite(row.ci_low)
        assert any(word in row.note for word in (BEATS, LOSES, NOT_TOLD, "changes no loss"))


def test_every_rule_can_be_run(toy_run, toy_data):
    subject = load(toy_run / "step-000040.pt")
    windows = EvalWindows(toy_data, "all", context=32, tokens=128)
    prepared, batch = prepare(subject, windows), next(iter(windows))
    cells = cells_of(subject, (0.25,))
    rules = set(subject.gate_rules())
    assert rules == {
        "absolute",
        "quantile",
        "zscore",
        "ratio",
        "excess",
        "entropy-gap",
        "assoc",
        "momentum",
        "random",
    }
    assert {(c.rule, c.writes) for c in cells} == {
        ("everything", "all"),
        ("assoc", "selfmod"),
        *((rule, writes) for rule in rules - {"assoc"} for writes in ("selfmod", "cms", "all")),
    }
    before = subject.run(*as_tensors(batch)).losses
    for cell in cells:
        with subject.gated(gate_of(cell, prepared), prepared.surprisal):
            losses = subject.run(*as_tensors(batch)).losses
        assert losses.isfinite().all()
        assert (cell.rule == "everything") == bool((losses == before).all()), (
            cell
        )  # its own gate never closes
    assert (subject.run(*as_tensors(batch)).losses == before).all()


@pytest.mark.parametrize("writes", ["selfmod", "cms"])
def test_nothing_written_is_beside_the_others_written_by_every_token(toy_run, toy_data, writes):
    """Whatever the model's own gate lets pass: it is the end of the curve that starts with everything written."""
    subject = load(toy_run / "step-000040.pt")
    batch = next(iter(EvalWindows(toy_data, "all", context=32, tokens=128)))
    closed = subject.with_gate(GateRule("absolute", threshold=1e6))

    def losses(model):
        condition = still(writes)
        with model.module.hooks(condition.hooks(model, Prepared(None, None), batch)):
            return condition.run(model, Prepared(None, None), batch).losses

    assert torch.equal(losses(closed), losses(subject)), "the threshold of 0.02 nats is below every loss"
    assert not torch.equal(losses(closed), closed.run(*as_tensors(batch)).losses), (
        "where the others write nothing"
    )


def test_a_gate_that_never_or_hardly_opens_decides_nothing():
    """What it keeps is compared with what it drops: of no tokens, or of those of three groups, nothing is told."""
    rng = np.random.default_rng(0)
    batch = EvalBatch(
        rng.integers(0, 500, size=(64, 129)), np.full(64, 128), np.arange(64), np.arange(64), np.zeros(64, int),
        np.arange(64),
    )  # fmt: skip

    def remarks(gate):
        made = GatedLosses(Cell("absolute", "all", 0.05), ["g"], None, describes=True)
        shown = {"g": torch.from_numpy(gate.astype(float))}
        made.update(shown, torch.zeros(64, 128), torch.ones(64, 128, dtype=torch.bool), batch)
        rows = {row.place: row for row in made.measurements()}
        assert set(made.remarks()) <= set(rows)
        return {place.statistic: (rows[place].override, why) for place, (_, why) in made.remarks().items()}

    few = np.where(np.arange(64)[:, None] < 3, rng.random((64, 128)) < 0.9, False)
    for gate, verdict, why in (
        (np.zeros((64, 128)), Verdict.NO_SIGNAL, "never opens"),
        (np.ones((64, 128)), Verdict.NO_SIGNAL, "never closes"),
        (few, Verdict.INCONCLUSIVE, "an interval needs"),
        (rng.random((64, 128)) < 0.05, None, ""),
    ):
        found = remarks(gate)
        assert set(found) == {"gate_entropy", "position_difference", "repeat_difference"}, found
        for override, said in found.values():
            assert override is verdict
            assert why in said
            assert "threshold" not in said, "it is a rule's gate, whatever decides"


def test_every_window_has_a_reading_of_the_oracle(toy_run, toy_data):
    """One of a tick's tokens has no candidates: without a reading of its own, others would slip into its place."""
    subject = load(toy_run / "step-000040.pt")
    whole = sampled_windows(EvalWindows(toy_data, "all", context=32, tokens=None), 0)[:3]
    tick = subject.tick
    short = [
        dataclasses.replace(b, tokens=b.tokens[:, : tick + 1], lengths=np.array([tick])) for b in whole[1:2]
    ]
    windows = EvalWindows(toy_data, "all", context=32, tokens=512)
    found = _read((0.25,), windows, subject, [whole[0], *short, whole[2]])
    oracle = [readings for place, readings in found.items() if place.statistic == "oracle_difference"]
    assert oracle
    assert all([reading.tokens > 0 for reading in readings] == [True, False, True] for readings in oracle)


def test_a_window_of_one_tick_says_nothing_of_utility(toy_run, toy_data):
    """No token there has a later one: its window is left out, and not a warning."""
    subject = load(toy_run / "step-000040.pt")
    windows = EvalWindows(toy_data, "all", context=32, tokens=5)
    found = of_sample(subject, None, windows, (0.25,))
    assert {f.measurement.place.statistic for f in found} == {
        "utility_correlation",
        "oracle_difference",
        "overlap",
    }
    for finding in found:
        if finding.measurement.place.statistic == "utility_correlation":
            assert math.isnan(finding.measurement.estimate.value)


def test_what_never_writes_has_no_gate(toy_data, tmp_path):
    config = ModelConfig(
        variant="transformer", vocab_size=toy_data.vocab_size, dim=16, layers=1, context=32, heads=2
    )
    subject = HopeSubject(HopeModel(config, seed=0))
    results = measured(subject, toy_data, RelativeSurprise(), cache_dir=tmp_path)
    assert {r.verdict for r in results.rows} == {"n/a"}


def test_many_tokens_are_not_all_taken_unless_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr("hopeprobe.probes.relative_surprise.MOST_TOKENS", 10 * CONTEXT)
    monkeypatch.setattr("hopeprobe.probes.relative_surprise.GROUPS", 40)
    subject, data = unrelated(9), text(9)
    probe = RelativeSurprise(budgets=(0.25,), rules=("quantile",), sample=False)
    results = measured(subject, data, [probe, "surprise"], cache_dir=tmp_path)
    assert {r.n_tokens for r in rows_of(results, "loss_difference")} == {40 * CONTEXT}
    assert {r.n_tokens for r in rows_of(results, "mean_loss")} == {72 * CONTEXT}
    everything = RelativeSurprise(budgets=(0.25,), rules=("quantile",), sample=False, all_tokens=True)
    results = measured(subject, data, everything, cache_dir=tmp_path)
    assert {r.n_tokens for r in rows_of(results, "loss_difference")} == {72 * CONTEXT}


def test_wrong_settings_are_refused(toy_data, tmp_path):
    with pytest.raises(BadInputError, match="must fall"):
        RelativeSurprise(budgets=(0.1, 0.5))
    with pytest.raises(BadInputError, match="must fall"):
        RelativeSurprise(budgets=(1.0, 0.5))
    with pytest.raises(BadInputError, match="no gate rule 'quantil'; did you mean 'quantile'"):
        measured(exchangeable(), text(0), RelativeSurprise(rules=("quantil",)), cache_dir=tmp_path)


def test_a_gate_that_lets_tokens_pass_in_part_is_no_measurement(tmp_path, monkeypatch):
    subject = carriers(1)
    original = type(subject.module.memory_hook_write_gate).__call__
    monkeypatch.setattr(
        type(subject.module.memory_hook_write_gate),
        "__call__",
        lambda point, tensor: original(point, tensor * 0.5 if point.name == GATE else tensor),
    )
    results = measured(subject, text(2), cache_dir=tmp_path)
    assert any("a write gate is neither 0 nor 1" in why for why in results.missing)
    assert not rows_of(results, "loss_difference")


def test_the_absolute_rule_has_the_threshold_that_leaves_the_budget():
    subject, data = unrelated(8), text(8)
    windows = EvalWindows(data, "all", context=CONTEXT, tokens=None)
    prepared = prepare(subject, windows)
    with subject.gated(GateRule("random", 1.0)):
        losses = np.concatenate([subject.run(*as_tensors(b)).losses.numpy().ravel() for b in windows])
    threshold = gate_of(Cell("absolute", "all", 0.1), prepared).threshold
    assert (losses > threshold).mean() == pytest.approx(0.1, abs=0.002)
    assert len(cells_of(subject)) == 1 + 8 * 4
