"""What the gate lets pass: known answers, a per-token reference, gates that select nothing, coverage."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hopeprobe.analysis import analyze
from hopeprobe.conditions import LIVE
from hopeprobe.errors import MeasurementError
from hopeprobe.hooks import HookSpec
from hopeprobe.model.checkpoint import read
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.subject import HopeSubject
from hopeprobe.probes import get_probe
from hopeprobe.probes.base import Place
from hopeprobe.probes.gate_rates import IN_USE, MIN_RARE_GROUPS, binary_entropy
from hopeprobe.probes.gate_selectivity import (
    DIFFERENCES,
    LADDER,
    GateMoments,
    declared_threshold,
    earlier_in_window,
)
from hopeprobe.probes.passes import run_pass
from hopeprobe.stats import GROUPS, Verdict
from hopeprobe.tokens import EvalBatch, EvalWindows, Unigram

PROBE = get_probe("gate-selectivity")
VOCAB = 97
RATE, ENTROPY = Place("pass_rate", component=IN_USE), Place("gate_entropy", component=IN_USE)
SELECTING = Place("selecting_loss", component=IN_USE)


def difference(name):
    return Place(f"{name}_difference", component=IN_USE)


def windows_of(data, batch=50, tokens=1600):
    return EvalWindows(data, "all", context=32, tokens=tokens, batch=batch)


def toy_batch(rows=200, length=20, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.where(np.arange(rows) % 3, length, rng.integers(1, length, rows))
    tokens = rng.integers(0, VOCAB, (rows, length + 1)) * (np.arange(length + 1) <= lengths[:, None])
    document = np.arange(rows)
    return EvalBatch(tokens, lengths, document, document % GROUPS, np.zeros(rows, int), document)


def rows_of(batch, rows):
    return EvalBatch(*(getattr(batch, field.name)[rows] for field in dataclasses.fields(batch)))


@pytest.fixture(scope="module")
def unigram(toy_data):
    return Unigram.fit(toy_data.split_tokens("train"), VOCAB)


def fed(batch, losses, unigram, gate=None, threshold=None, parts=1):
    """An accumulator that saw these losses [R, L] and this gate, by default that of the threshold."""
    accumulator = GateMoments("live", threshold, unigram)
    scored = torch.from_numpy(np.arange(losses.shape[1]) < batch.lengths[:, None])
    gate = (losses > threshold).to(losses.dtype) if gate is None else gate
    for rows in np.array_split(np.arange(len(losses)), parts):
        cache = {"hook_gate": gate[rows], "hook_surprise": losses[rows]}
        accumulator.update(cache, losses[rows], scored[rows], rows_of(batch, rows))
    return accumulator


def by_place(accumulator):
    return {row.place: row for row in accumulator.measurements()}


def values_of(accumulator):
    return {place: value for (_, place), value in accumulator.plug_ins().items()}


def skewed_losses(batch, seed=1):
    draw = np.random.default_rng(seed).gamma(0.7, 4.0, (len(batch.lengths), batch.tokens.shape[1] - 1))
    return torch.from_numpy(draw)


def tokens_one_by_one(batch, losses, gate, unigram):
    """Loss, gate, surprisal, position and repeat of every scored token: arrays [N]."""
    seen = []
    for r in range(len(batch.lengths)):
        row = batch.tokens[r].tolist()
        for t in range(batch.lengths[r]):
            position = (t + 0.5) / batch.lengths[r]
            repeat = row[t + 1] in row[: t + 1]
            seen.append(
                (float(losses[r, t]), float(gate[r, t]), unigram.surprisal[row[t + 1]], position, repeat)
            )
    return np.array(seen).T


def entropy_of(p):
    return 0.0 if p in (0, 1) else -(p * math.log2(p) + (1 - p) * math.log2(1 - p))


def test_agrees_with_a_reference_token_by_token(unigram):
    batch = toy_batch()
    losses = skewed_losses(batch)
    s, g, u, position, repeat = tokens_one_by_one(batch, losses, losses > 1.5, unigram)
    kept = g == 1
    found = by_place(fed(batch, losses, unigram, threshold=1.5, parts=3))
    reference = {
        RATE: kept.mean(),
        ENTROPY: entropy_of(kept.mean()),
        difference("surprisal"): u[kept].mean() - u[~kept].mean(),
        difference("position"): position[kept].mean() - position[~kept].mean(),
        difference("repeat"): repeat[kept].mean() - repeat[~kept].mean(),
    }
    for tau in LADDER:
        share = (s > tau).mean()
        reference[Place("pass_rate", component=f"tau={tau:g}")] = share
        reference[Place("gate_entropy", component=f"tau={tau:g}")] = entropy_of(share)
    for place, value in reference.items():
        assert found[place].estimate.plug_in == pytest.approx(value, abs=1e-12), place
        assert found[place].estimate.n == len(s)
    lowest = np.quantile(s, 0.05, method="inverted_cdf")
    assert found[SELECTING].estimate.value == pytest.approx(s.mean() * 1.5 / lowest, rel=1.1e-3)
    assert set(found) == {*reference, SELECTING}


def test_a_gate_that_keeps_repeats_late_in_the_window(unigram):
    """Known answers: every row 0 1 … 9 0 1 … 9, the gate open in the second half alone."""
    tokens = np.tile(np.r_[np.arange(10), np.arange(10)], (GROUPS, 1))
    rows = np.arange(GROUPS)
    batch = EvalBatch(tokens, np.full(GROUPS, 19), rows, rows, np.zeros(GROUPS, int), rows)
    gate = torch.tensor([0.0] * 9 + [1.0] * 10).expand(GROUPS, 19)
    found = by_place(fed(batch, gate + 1.0, unigram, gate, threshold=1.5))
    for place, value in (
        (RATE, 10 / 19),
        (difference("repeat"), 1.0),
        (difference("position"), 14 / 19 - 4.5 / 19),
    ):
        estimate = found[place].estimate
        assert [estimate.value, estimate.ci_low, estimate.ci_high] == pytest.approx([value] * 3, abs=1e-9)


@given(st.lists(st.lists(st.integers(0, 5), min_size=7, max_size=7), min_size=1, max_size=3))
def test_repeats_are_those_of_the_tokens_already_read(rows):
    found = earlier_in_window(np.array(rows))
    assert found.tolist() == [[row[t + 1] in row[: t + 1] for t in range(6)] for row in rows]


def test_binary_entropy():
    p = np.array([0.0, 0.5, 1.0, 0.11, 1 + 1e-16, np.nan])
    assert binary_entropy(p)[:5] == pytest.approx([0, 1, 0, entropy_of(0.11), 0])
    assert np.isnan(binary_entropy(p)[5])
    assert not np.signbit(binary_entropy(p[:3])).any(), "shown as 0, not as -0"


@pytest.mark.parametrize("parts", [2, 7, 200])
def test_neither_batch_size_nor_merging_changes_anything(unigram, parts):
    batch = toy_batch()
    losses = skewed_losses(batch)
    whole = values_of(fed(batch, losses, unigram, threshold=0.5))
    assert values_of(fed(batch, losses, unigram, threshold=0.5, parts=parts)) == pytest.approx(
        whole, abs=1e-11
    )
    merged = GateMoments("live", 0.5, unigram)
    for rows in np.array_split(np.arange(200), parts):
        merged.merge(fed(rows_of(batch, rows), losses[rows], unigram, threshold=0.5))
    assert values_of(merged) == pytest.approx(whole, abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_float64_whatever_the_losses_are(unigram, dtype):
    batch = toy_batch()
    losses = skewed_losses(batch).to(dtype)
    s, g, u, _, _ = tokens_one_by_one(batch, losses, losses > 1.5, unigram)
    found = values_of(fed(batch, losses, unigram, threshold=1.5))
    assert found[RATE] == pytest.approx(g.mean(), abs=1e-12)
    assert found[difference("surprisal")] == pytest.approx(u[g == 1].mean() - u[g == 0].mean(), abs=1e-11)
    lowest = np.quantile(s, 0.05, method="inverted_cdf")
    assert found[SELECTING] == pytest.approx(s.mean() * 1.5 / lowest, rel=1.1e-3)


def test_padding_is_never_looked_at(unigram):
    batch = toy_batch()
    losses = skewed_losses(batch)
    beyond = torch.arange(20) >= torch.from_numpy(batch.lengths)[:, None]
    gate = (losses > 0.5).double()
    spoiled = fed(batch, losses.masked_fill(beyond, math.nan), unigram, gate.masked_fill(beyond, 7.0), 0.5)
    assert values_of(spoiled) == values_of(fed(batch, losses, unigram, gate, 0.5))


def test_the_selecting_loss_is_where_5_percent_would_be_dropped(unigram):
    """Scaled so that their mean is the selecting loss, 5 % of the losses lie at or below τ, as defined."""
    batch = toy_batch()
    losses = skewed_losses(batch) + 0.2
    row = by_place(fed(batch, losses, unigram, threshold=0.1))[SELECTING]
    s = tokens_one_by_one(batch, losses, losses, unigram)[0]
    shrunk = s * row.estimate.value / s.mean()
    assert (shrunk <= 0.1 * (1 + 1e-3)).mean() >= 0.05 >= (shrunk < 0.1 * (1 - 1e-3)).mean()
    assert row.estimate.value < s.mean(), "the gate drops less than that today"
    assert (row.override, math.isnan(row.estimate.ci_low)) == (Verdict.INCONCLUSIVE, True)
    assert "a descriptor" in row.note


@pytest.mark.parametrize(
    ("threshold", "shift", "word"),
    [(0.0, 0.0, "no loss lies below a threshold of 0"), (None, 0.0, "declares no threshold")],
)
def test_without_a_threshold_there_is_no_selecting_loss(unigram, threshold, shift, word):
    batch = toy_batch()
    losses = skewed_losses(batch) + shift
    row = by_place(fed(batch, losses, unigram, torch.ones_like(losses), threshold))[SELECTING]
    assert (row.override, math.isnan(row.estimate.value)) == (Verdict.NOT_APPLICABLE, True)
    assert word in row.note


def test_losses_of_zero_have_no_selecting_loss(unigram):
    batch = toy_batch()
    losses = skewed_losses(batch)
    losses[:, ::2] = 0
    row = by_place(fed(batch, losses, unigram, threshold=0.02))[SELECTING]
    assert row.override is Verdict.NOT_APPLICABLE
    assert "5% of the tokens have no loss" in row.note


def trained_with(toy_run, threshold, step=40):
    """The trained toy model under another threshold; its initial weights come along."""
    checkpoint = read(toy_run / f"step-0000{step:02d}.pt")
    config = dataclasses.replace(checkpoint.config, surprise_threshold=threshold)
    checkpoint = dataclasses.replace(checkpoint, config=config)
    return HopeSubject(checkpoint.to_model(), checkpoint)


NO_SIGNAL = {f"{name}_difference" for name in ("surprisal", "position", "repeat")} | {
    "pass_rate",
    "gate_entropy",
}


@pytest.mark.parametrize(
    ("threshold", "word", "rate"),
    [
        (0.0, "the gate never closes: it selects nothing", 1),
        (1e6, "the gate never opens: it selects nothing", 0),
    ],
)
def test_a_gate_that_never_moves_selects_nothing_and_learned_nothing(
    toy_run, settings, threshold, word, rate
):
    frame = analyze(trained_with(toy_run, threshold), PROBE.name, **settings).table
    in_use = frame[(frame.component == IN_USE) & (frame.statistic != "selecting_loss")].set_index("statistic")
    assert set(in_use.index) == NO_SIGNAL
    # 45 groups of documents are too few to say that it never closes for 5 % of them.
    assert in_use.loc["pass_rate"].verdict == ("inconclusive" if rate else "no-signal")
    assert set(in_use.drop("pass_rate").verdict) == {"no-signal"}
    assert in_use.note.str.contains(word).all()
    assert in_use.loc["pass_rate"].value == rate
    assert in_use.loc["gate_entropy"].value == 0
    if rate:
        groups = in_use.loc["pass_rate"].n_groups
        assert in_use.loc["pass_rate"].ci_low == pytest.approx(0.05 ** (1 / groups))
        in_use = in_use.drop("pass_rate")
    assert in_use.ci_low.isna().all(), "what was never seen has no interval of no width"
    for name in DIFFERENCES:
        assert math.isnan(in_use.loc[name].value)


def test_no_rung_of_the_ladder_that_passes_all_or_none_is_learned(toy_run, settings):
    frame = analyze(trained_with(toy_run, 0.02), PROBE.name, **settings).table
    ladder = frame[frame.component.str.startswith("tau=")]
    assert len(ladder) == 2 * len(LADDER)
    extreme = ladder[ladder.statistic == "pass_rate"]
    extreme = extreme[extreme.value.isin((0.0, 1.0))]
    assert {"tau=0.005", "tau=50"} <= set(extreme.component)
    entropies = ladder[(ladder.statistic == "gate_entropy") & ladder.component.isin(extreme.component)]
    assert set(entropies.verdict) == set(extreme[extreme.value == 0].verdict) == {"no-signal"}
    assert set(extreme[extreme.value == 1].verdict) == {"inconclusive"}
    frame = analyze(trained_with(toy_run, 0.02), PROBE.name, **settings | {"tokens": 4000, "fresh": 2}).table
    wide = frame[(frame.statistic == "pass_rate") & (frame.component == "tau=0.005")].iloc[0]
    assert (wide.value, wide.n_groups, wide.verdict) == (1.0, GROUPS, "at-init")
    selecting = ladder[(ladder.component == "tau=5") & (ladder.statistic == "pass_rate")].iloc[0]
    assert 0 < selecting.ci_low < selecting.value < selecting.ci_high < 1
    assert selecting.verdict == "learned", "untrained losses all lie below 5 nats, trained ones do not"


def test_a_gate_that_selects(toy_run, toy_data, settings, unigram):
    subject = trained_with(toy_run, 5.0)
    results = analyze(subject, PROBE.name, **settings)
    frame = results.table.set_index(["statistic", "component"])
    (batch,) = windows_of(toy_data, batch=1000)
    losses = subject.run(torch.from_numpy(batch.tokens), torch.from_numpy(batch.lengths)).losses
    _, g, u, _, _ = tokens_one_by_one(batch, losses, losses > 5.0, unigram)
    assert frame.loc[("pass_rate", IN_USE)].value == pytest.approx(g.mean(), abs=1e-3)
    assert frame.loc[("pass_rate", IN_USE)].value == frame.loc[("pass_rate", "tau=5")].value
    row = frame.loc[("surprisal_difference", IN_USE)]
    assert row.value == pytest.approx(u[g == 1].mean() - u[g == 0].mean(), abs=0.05)
    assert row.verdict == "inconclusive", "no initial gate opens, so only the random gate is to compare with"
    assert "gives 0, outside the interval" in row.note
    nulls = results.nulls.set_index(["statistic", "component", "null_kind"]).value
    for name in DIFFERENCES:
        assert nulls[name, IN_USE, "random-gate"] == 0
    for component, passes in ((IN_USE, 0), ("tau=2", 1), ("tau=5", 0)):
        assert nulls["pass_rate", component, "analytic"] == passes, "ln 97 is 4.57"
    assert nulls["pass_rate", IN_USE, "own-init"] == 0


def test_weights_that_were_never_loaded_are_not_learned(toy_run, subject_of, configs, settings):
    for subject in (trained_with(toy_run, 4.6, step=0), trained_with(toy_run, 0.02, step=0)):
        verdicts = set(analyze(subject, PROBE.name, **settings).table.verdict)
        assert verdicts <= {"at-init", "no-signal", "inconclusive"}

    class Renamed(HopeSubject):
        """Another initialisation under the name of a trained checkpoint."""

        def own_init(self):
            return subject_of(seed=0)

    renamed = Renamed(subject_of(seed=3).module)
    renamed.trained_steps = 2000
    assert "learned" not in set(analyze(renamed, PROBE.name, **settings).table.verdict)


def failed(subject, data):
    result = run_pass(subject, windows_of(data), [PROBE], LIVE)
    assert not result.accumulators
    return result.failed[PROBE.name]


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (torch.zeros_like, "declares [s > 4] and shows something else at"),
        (torch.ones_like, "the model and its hook registry disagree"),
        (lambda gate: 1 - gate, "shows something else at"),
        (lambda gate: gate * 0.5, "neither 0 nor 1 at"),
    ],
)
def test_a_gate_that_is_not_what_it_declares_is_refused(toy_run, toy_data, edit, word):
    subject = trained_with(toy_run, 4.0)
    subject.module.add_hook("hook_gate", lambda gate, hook: edit(gate))
    assert word in failed(subject, toy_data)


def test_hooks_that_never_fire_or_show_another_surprise_are_refused(subject, toy_data):
    class Deaf(HopeSubject):
        def run(self, tokens, lengths=None, state=None):
            return HopeSubject(HopeModel(self.module.config, 0)).run(tokens, lengths, state)

    class Lying(HopeSubject):
        def run(self, tokens, lengths=None, state=None):
            out = super().run(tokens, lengths, state)
            return out._replace(losses=out.losses + 0.01)

    assert "hooks never fired" in failed(Deaf(subject.module), toy_data)
    assert "hook_surprise is not the loss" in failed(Lying(subject.module), toy_data)


def test_a_diverged_model_gives_no_rows(subject, settings):
    with torch.no_grad():
        subject.module.norm.weight[0] = torch.nan
    with pytest.raises(MeasurementError, match="the loss is not finite"):
        analyze(subject, PROBE.name, **settings)


def test_a_gate_must_be_one_of_these_tokens(unigram):
    batch = toy_batch()
    losses = skewed_losses(batch)
    gate = torch.ones_like(losses)
    gate[2, 0] = math.nan
    with pytest.raises(MeasurementError, match="neither 0 nor 1 at 1 of"):
        fed(batch, losses, unigram, gate)
    with pytest.raises(MeasurementError, match=r"hook_gate is \[200, 19\], the losses are \[200, 20\]"):
        fed(batch, losses, unigram, losses[:, :-1], threshold=None)


@pytest.mark.parametrize(
    ("equation", "threshold"),
    [
        ("g_t = [s_t > 0.02]", 0.02),
        ("g = [s > 5]", 5.0),
        ("g_t = [s_t > 1e-05]", 1e-5),
        ("g_t = [z_t > 2]", None),
        ("g_t = [s_t > 2 m_t]", None),
        ("g = [s > tau]", None),
    ],
)
def test_the_threshold_is_what_the_gate_declares(subject, toy_data, equation, threshold):
    spec = HookSpec(("batch", "pos"), "tick", True, equation)
    subject.module.hook_dict["hook_gate"].spec = spec
    assert declared_threshold(subject) == threshold
    nulls = PROBE.reference_nulls(RATE, subject, windows_of(toy_data))
    assert [null.value for null in nulls] == (
        [] if threshold is None else [float(math.log(VOCAB) > threshold)]
    )


def test_rarely_closed_gates_claim_no_interval(unigram):
    batch = toy_batch()
    for groups, claimed in ((MIN_RARE_GROUPS - 1, False), (MIN_RARE_GROUPS, True)):
        for closed in (True, False):
            gate = torch.ones(200, 20) if closed else torch.zeros(200, 20)
            gate[:groups, 0] = 1 - gate[:groups, 0]
            found = by_place(fed(batch, gate, unigram, gate, threshold=0.5))
            for place in (RATE, ENTROPY, *(difference(n) for n in ("surprisal", "position", "repeat"))):
                assert math.isnan(found[place].estimate.ci_low) != claimed, place
                assert (found[place].override is Verdict.INCONCLUSIVE) != claimed
                assert found[place].estimate.n == batch.lengths.sum()
                assert math.isfinite(found[place].estimate.value)
            if not claimed:
                kind = "are dropped" if closed else "pass"
                counted = f"15 of {batch.lengths.sum()} tokens {kind}, in 15 of 64 groups"
                assert counted in found[RATE].note


@pytest.mark.parametrize(("groups", "decided"), [(58, False), (59, True)])
def test_a_gate_that_never_closes_is_judged_where_it_was_seen_open_often_enough(unigram, groups, decided):
    batch = toy_batch()
    batch = dataclasses.replace(batch, group=batch.document % groups)
    losses = skewed_losses(batch) + 1.0
    found = by_place(fed(batch, losses, unigram, threshold=0.5))
    rate = found[RATE]
    assert rate.override is (None if decided else Verdict.INCONCLUSIVE)
    assert f"never closes: it selects nothing, in {groups} groups" in rate.note
    # Exactly: were 5 % of all groups closed throughout, so many open ones would be seen in under 5 of 100 cases.
    assert (0.95**groups <= 0.05) == decided
    assert (rate.estimate.value, rate.estimate.ci_high) == (1.0, 1.0)
    assert rate.estimate.ci_low**groups == pytest.approx(0.05)
    assert found[ENTROPY].override is Verdict.NO_SIGNAL


def test_the_interval_of_entropy_is_that_of_the_rate(unigram):
    batch = toy_batch()
    losses = skewed_losses(batch)
    found = by_place(fed(batch, losses, unigram, threshold=float(losses.median())))
    at_the_top = []
    for component in (IN_USE, "tau=0.5", "tau=2", "tau=5"):
        rate = found[Place("pass_rate", component=component)].estimate
        entropy = found[Place("gate_entropy", component=component)].estimate
        ends = sorted((entropy_of(rate.ci_low), entropy_of(rate.ci_high)))
        if rate.ci_low < 0.5 < rate.ci_high:
            at_the_top.append(component)
            ends[1] = 1.0
        assert (entropy.ci_low, entropy.ci_high) == pytest.approx(ends)
        assert entropy.ci_low <= entropy.value <= entropy.ci_high
    assert at_the_top == [IN_USE]


def test_a_token_at_the_threshold_does_not_pass(unigram):
    batch = toy_batch()
    found = values_of(fed(batch, torch.full((200, 20), 0.5, dtype=torch.float64), unigram, threshold=0.5))
    rates = [found[Place("pass_rate", component=f"tau={tau:g}")] for tau in LADDER]
    assert rates == [float(tau < 0.5) for tau in LADDER]
    assert found[RATE] == 0


def test_without_a_training_split_there_is_no_surprisal(toy_run, toy_data, settings):
    data = dataclasses.replace(toy_data, held_out=np.ones_like(toy_data.held_out))
    frame = analyze(trained_with(toy_run, 4.0), PROBE.name, **settings | {"data": data, "fresh": 0}).table
    row = frame[frame.statistic == "surprisal_difference"].iloc[0]
    assert (row.verdict, row.n_tokens) == ("n/a", 0)
    assert "no training split" in row.note
    assert (frame.statistic == "position_difference").sum() == 1


def test_a_model_without_a_gate_is_not_applicable(configs, subject_of, settings):
    subject = subject_of(dataclasses.replace(configs["toy"], variant="transformer"))
    results = analyze(subject, PROBE.name, **settings)
    assert {row.verdict for row in results.rows} == {Verdict.NOT_APPLICABLE}
    assert {row.note for row in results.rows} == {"this model has no surprise gate"}


def test_no_tokens_no_rows(unigram):
    empty = GateMoments("live", 0.02, unigram)
    assert (empty.measurements(), empty.plug_ins(), empty.remarks()) == ([], {}, {})


def test_it_describes_itself():
    text = PROBE.describe()
    for word in (*PROBE.statistics, "random-gate", "Nulls", "Cost", "Source", "section 4.4", "never close"):
        assert word in text


def world(rng, unigram, rate, selects):
    """Gates whose rate differs between documents, opening more often, or not, at rare tokens."""
    lengths = np.maximum(2, np.minimum(60, rng.lognormal(3, 0.5, 4 * GROUPS))).astype(int)
    rows = np.arange(4 * GROUPS)
    tokens = rng.integers(0, VOCAB, (len(rows), lengths.max() + 1))
    batch = EvalBatch(tokens, lengths, rows, rows % GROUPS, np.zeros(len(rows), int), rows)
    u = unigram.surprisal[tokens[:, 1:]]
    logit = rate + 0.5 * rng.standard_normal(len(rows))[:, None] + selects * (u - unigram.surprisal.mean())
    gate = torch.from_numpy((rng.random(u.shape) < 1 / (1 + np.exp(-logit))).astype(float))
    return {row.place: row for row in fed(batch, torch.ones_like(gate), unigram, gate).quantities()}


def truth(unigram, rate, selects):
    """Rate, entropy and difference in `world`, over its documents' normal effects and equally likely tokens."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    logit = rate + 0.5 * nodes[:, None] + selects * (unigram.surprisal - unigram.surprisal.mean())
    opens = weights @ (1 / (1 + np.exp(-logit))) / weights.sum()
    p, u = opens.mean(), unigram.surprisal
    return p, entropy_of(p), (opens @ u) / opens.sum() - ((1 - opens) @ u) / (1 - opens).sum()


def covered(unigram, rate, selects, data_sets, seed):
    rng, hits, claimed = np.random.default_rng(seed), np.zeros(3), np.zeros(3)
    true = truth(unigram, rate, selects)
    for _ in range(data_sets):
        found = world(rng, unigram, rate, selects)
        for i, place in enumerate((RATE, ENTROPY, difference("surprisal"))):
            estimate = found[place].estimate()
            claimed[i] += not math.isnan(estimate.ci_low)
            hits[i] += estimate.ci_low <= true[i] <= estimate.ci_high
    shares = ", ".join(f"{hit:.0f} of {n:.0f}" for hit, n in zip(hits, claimed, strict=True))
    print(f"rate {true[0]:.4f}: rate, entropy, difference covered in {shares}")
    return hits / claimed


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "selects"), [(0.0, 0.0), (2.0, 0.5), (5.0, 0.5)])
def test_coverage_of_rate_entropy_and_difference(unigram, rate, selects):
    assert all(0.93 <= share <= 0.975 for share in covered(unigram, rate, selects, 500, seed=1))


def test_coverage_quickly(unigram):
    assert all(share >= 0.85 for share in covered(unigram, 1.0, 0.5, 30, seed=2))
