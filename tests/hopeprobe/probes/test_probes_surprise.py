"""Surprise: known answers, a per-token reference in NumPy, defects that must be caught, coverage."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from hopeprobe.analysis import analyze
from hopeprobe.conditions import LIVE
from hopeprobe.errors import MeasurementError
from hopeprobe.model.subject import HopeSubject
from hopeprobe.probes import get_probe
from hopeprobe.probes.base import Place
from hopeprobe.probes.passes import run_pass
from hopeprobe.probes.surprise import LossDistribution, correlation, scalar_std
from hopeprobe.stats import GROUPS, Moments, Verdict, jackknife
from hopeprobe.subject import load
from hopeprobe.tokens import EvalBatch, EvalWindows, Unigram

PROBE = get_probe("surprise")
VOCAB = 97
MEAN, STD = Place("mean_loss"), Place("loss_std")
UNIFORM, UNIGRAM = Place("excess_over_uniform"), Place("excess_over_unigram")
CORRELATION = Place("unigram_correlation")


def quantile_of(name):
    return Place("loss_quantile", component=name)


def windows_of(data, batch=50, tokens=1600):
    return EvalWindows(data, "all", context=32, tokens=tokens, batch=batch)


def toy_batch(rows=80, length=25, seed=0):
    """Random tokens, some rows shorter; padding is token 0, as in `EvalWindows`."""
    rng = np.random.default_rng(seed)
    lengths = np.where(np.arange(rows) % 3, length, rng.integers(1, length, rows))
    tokens = rng.integers(0, VOCAB, (rows, length + 1)) * (np.arange(length + 1) <= lengths[:, None])
    document = np.arange(rows)
    return EvalBatch(tokens, lengths, document, document % GROUPS, np.zeros(rows, int), document)


def rows_of(batch, rows):
    """Some rows of a batch, as if they had come alone."""
    return EvalBatch(*(getattr(batch, field.name)[rows] for field in dataclasses.fields(batch)))


@pytest.fixture(scope="module")
def unigram(toy_data):
    return Unigram.fit(toy_data.split_tokens("train"), VOCAB)


def fed(batch, losses, unigram, parts=1, cache=None, into=None):
    """An accumulator that saw these losses [R, L], the batch cut into several."""
    accumulator = into or LossDistribution("live", math.log(VOCAB), unigram)
    scored = torch.from_numpy(np.arange(losses.shape[1]) < batch.lengths[:, None])
    for rows in np.array_split(np.arange(len(losses)), parts):
        part = {} if cache is None else {name: tensor[rows] for name, tensor in cache.items()}
        accumulator.update(part, losses[rows], scored[rows], rows_of(batch, rows))
    return accumulator


def by_place(accumulator):
    return {row.place: row for row in accumulator.measurements()}


def values_of(accumulator):
    return {place: value for (_, place), value in accumulator.plug_ins().items()}


def skewed_losses(batch, seed=1):
    draw = np.random.default_rng(seed).gamma(0.7, 4.0, (len(batch.lengths), batch.tokens.shape[1] - 1))
    return torch.from_numpy(draw)


def scored_pairs(batch, losses, unigram):
    """Loss and unigram surprisal of every scored token, one by one."""
    pairs = [
        (float(losses[r, t]), float(unigram.surprisal[batch.tokens[r, t + 1]]))
        for r in range(len(batch.lengths))
        for t in range(batch.lengths[r])
    ]
    return np.array(pairs).T


def test_agrees_with_a_reference_token_by_token(unigram):
    batch = toy_batch()
    losses = skewed_losses(batch)
    s, u = scored_pairs(batch, losses, unigram)
    found = by_place(fed(batch, losses, unigram, parts=4))
    reference = {
        MEAN: s.mean(),
        STD: s.std(),
        UNIFORM: s.mean() - math.log(VOCAB),
        UNIGRAM: (s - u).mean(),
        CORRELATION: np.corrcoef(s, u)[0, 1],
    }
    for place, value in reference.items():
        assert found[place].estimate.plug_in == pytest.approx(value, abs=1e-12), place
        assert found[place].estimate.n == len(s)
        assert found[place].estimate.ci_low < value < found[place].estimate.ci_high
    nulls = {place: {null.kind: null.value for null in found[place].nulls} for place in (MEAN, STD)}
    assert nulls[MEAN]["unigram"] == pytest.approx(u.mean(), abs=1e-12)
    assert nulls[STD]["unigram"] == pytest.approx(u.std(), abs=1e-2), "bias-corrected"
    assert found[quantile_of("min")].estimate.value == s.min()
    assert found[quantile_of("max")].estimate.value == s.max()
    for name, q in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
        row = found[quantile_of(name)]
        assert row.estimate.value == pytest.approx(np.quantile(s, q, method="inverted_cdf"), rel=1e-3)
        assert (row.override, row.estimate.n) == (Verdict.INCONCLUSIVE, len(s))
        assert math.isnan(row.estimate.ci_low)
        assert "within 0.1% of an observed loss; a descriptor" in row.note


def test_a_model_that_guesses_has_no_spread_and_no_correlation(unigram):
    batch = toy_batch()
    found = by_place(fed(batch, torch.full((80, 25), math.log(VOCAB), dtype=torch.float64), unigram))
    for place, value in ((STD, 0.0), (UNIFORM, 0.0), (MEAN, math.log(VOCAB))):
        estimate = found[place].estimate
        assert [estimate.value, estimate.ci_low, estimate.ci_high] == pytest.approx([value] * 3, abs=1e-12)
    assert math.isnan(found[CORRELATION].estimate.value)
    assert found[quantile_of("p50")].estimate.value == math.log(VOCAB)


def test_a_model_that_only_counts_is_its_unigram_null(unigram):
    batch = toy_batch()
    found = by_place(fed(batch, torch.from_numpy(unigram.surprisal[batch.tokens[:, 1:]]), unigram))
    assert found[UNIGRAM].estimate.value == pytest.approx(0, abs=1e-12)
    assert found[CORRELATION].estimate.value == pytest.approx(1, abs=1e-12)
    for place in (MEAN, STD):
        (null,) = found[place].nulls
        assert (null.kind, null.value) == ("unigram", pytest.approx(found[place].estimate.value, abs=1e-12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_float64_whatever_the_losses_are(unigram, dtype):
    batch = toy_batch()
    losses = skewed_losses(batch).to(dtype)
    s, u = scored_pairs(batch, losses, unigram)
    found = values_of(fed(batch, losses, unigram, parts=3))
    assert found[MEAN] == pytest.approx(s.mean(), abs=1e-12)
    assert found[STD] == pytest.approx(s.std(), abs=1e-12)
    assert found[CORRELATION] == pytest.approx(np.corrcoef(s, u)[0, 1], abs=1e-12)
    assert found[quantile_of("p50")] == pytest.approx(np.quantile(s, 0.5, method="inverted_cdf"), rel=1e-3)


@pytest.mark.parametrize("parts", [2, 7, 80])
def test_neither_batch_size_nor_merging_changes_anything(unigram, parts):
    batch = toy_batch()
    losses = skewed_losses(batch)
    whole = values_of(fed(batch, losses, unigram))
    assert values_of(fed(batch, losses, unigram, parts=parts)) == pytest.approx(whole, abs=1e-11)
    merged = LossDistribution("live", math.log(VOCAB), unigram)
    for rows in np.array_split(np.arange(80), parts):
        merged.merge(fed(rows_of(batch, rows), losses[rows], unigram))
    assert values_of(merged) == pytest.approx(whole, abs=1e-11)
    assert by_place(merged)[quantile_of("p90")].estimate.n == batch.lengths.sum()


def test_padding_is_never_looked_at(unigram):
    batch = toy_batch()
    losses = skewed_losses(batch)
    spoiled = losses.clone()
    spoiled[torch.arange(25) >= torch.from_numpy(batch.lengths)[:, None]] = math.inf
    shown = {"hook_surprise": torch.where(spoiled.isinf(), math.nan, losses)}
    assert values_of(fed(batch, spoiled, unigram, cache=shown)) == values_of(fed(batch, losses, unigram))


def off_by(where, change):
    def spoil(losses):
        shown = losses.clone()
        shown[where] += change
        return shown

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            off_by((3, 0), 1e-3),
            r"hook_surprise is not the loss at 1 of \d+ tokens, it differs by up to 0.001",
        ),
        (off_by((3, 0), math.nan), "hook_surprise is not the loss at 1 of"),
        (lambda losses: losses.roll(1, 1), "hook_surprise is not the loss at"),
        (lambda losses: losses / math.log(2), "shows something else"),
        (lambda losses: losses[:, :-1], r"hook_surprise is \[80, 24\], the losses are \[80, 25\]"),
    ],
)
def test_a_hook_that_shows_something_else_is_refused(unigram, spoil, message):
    batch = toy_batch()
    losses = skewed_losses(batch)
    fed(batch, losses, unigram, cache={"hook_surprise": losses + 1e-5})
    fed(batch, losses, unigram, cache={"hook_surprise": losses.to(torch.bfloat16)})
    with pytest.raises(MeasurementError, match=message):
        fed(batch, losses, unigram, cache={"hook_surprise": spoil(losses)})


@pytest.mark.parametrize(
    ("value", "word"), [(math.nan, "not finite at 1"), (math.inf, "not finite at 1"), (-3.0, "negative at 1")]
)
def test_a_loss_that_is_none_is_refused(unigram, value, word):
    batch = toy_batch()
    losses = skewed_losses(batch)
    losses[2, 0] = value
    with pytest.raises(MeasurementError, match=f"the loss is {word} of"):
        fed(batch, losses, unigram)


class Lying(HopeSubject):
    """Reports losses that are not those of the hook point."""

    def run(self, tokens, lengths=None, state=None):
        out = super().run(tokens, lengths, state)
        return out._replace(losses=out.losses * 0.5)


class Deaf(HopeSubject):
    """Runs a copy of its module: no hook of its own ever fires."""

    def run(self, tokens, lengths=None, state=None):
        return HopeSubject(copy.deepcopy(self.module)).run(tokens, lengths, state)


@pytest.mark.parametrize(
    ("kind", "word"), [(Lying, "hook_surprise is not the loss"), (Deaf, "hook_surprise")]
)
def test_a_model_whose_hook_is_wrong_or_silent_gives_no_rows(subject, toy_data, settings, kind, word):
    result = run_pass(kind(subject.module), windows_of(toy_data), [PROBE], LIVE)
    assert not result.accumulators
    assert word in result.failed[PROBE.name]
    with pytest.raises(MeasurementError, match=word):
        analyze(kind(subject.module), PROBE.name, **settings)


def test_a_diverged_model_gives_no_rows(subject, settings):
    with torch.no_grad():
        subject.module.norm.weight[0] = torch.nan
    with pytest.raises(MeasurementError, match="the loss is not finite"):
        analyze(subject, PROBE.name, **settings)


def test_a_trained_checkpoint_agrees_with_its_losses_and_is_learned(toy_run, toy_data, settings):
    results = analyze(toy_run / "step-000040.pt", PROBE.name, **settings)
    frame = results.table.set_index(["statistic", "component"])
    (batch,) = windows_of(toy_data, batch=1000)
    subject = load(toy_run / "step-000040.pt")
    losses, scored, _ = subject.run(torch.from_numpy(batch.tokens), torch.from_numpy(batch.lengths))
    s = losses.double().numpy()[scored.numpy()]
    u = Unigram.fit(toy_data.split_tokens("train"), VOCAB).surprisal[batch.tokens[:, 1:]][scored.numpy()]
    for statistic, value in (
        ("mean_loss", s.mean()),
        ("excess_over_uniform", s.mean() - math.log(VOCAB)),
        ("excess_over_unigram", (s - u).mean()),
    ):
        row = frame.loc[(statistic, "")]
        assert row.value == pytest.approx(value, abs=1e-6)
        assert (row.verdict, row.condition, row.unit) == ("learned", "live", "nats")
    assert set(frame.loc["loss_quantile"].verdict) == {"inconclusive"}
    nulls = results.nulls.set_index(["statistic", "component", "null_kind"]).value
    assert nulls["mean_loss", "", "analytic"] == math.log(VOCAB)
    assert nulls["mean_loss", "", "unigram"] == pytest.approx(u.mean())
    assert nulls["loss_std", "", "analytic"] == nulls["excess_over_uniform", "", "analytic"] == 0
    assert nulls["unigram_correlation", "", "unigram"] == 1
    for component in ("min", "p10", "p50", "p90", "max"):
        assert nulls["loss_quantile", component, "own-init"] == pytest.approx(math.log(VOCAB), rel=0.1)
        assert ("loss_quantile", component, "fresh-init") in nulls


def test_weights_that_were_never_loaded_are_not_learned(toy_run, subject_of, settings):
    frame = analyze(toy_run / "step-000000.pt", PROBE.name, **settings).table
    decided = frame[frame.statistic != "loss_quantile"]
    assert set(decided.verdict) == {"at-init"}

    class Renamed(HopeSubject):
        """Another initialisation under the name of a trained checkpoint."""

        def own_init(self):
            return subject_of(seed=0)

    renamed = Renamed(subject_of(seed=3).module)
    renamed.trained_steps = 2000
    frame = analyze(renamed, PROBE.name, **settings).table
    assert "learned" not in set(frame.verdict)
    assert set(frame[frame.statistic == "mean_loss"].verdict) == {"at-init"}


def test_token_frequencies_that_are_absent_or_the_text_s_own_are_told(toy_run, toy_data, settings):
    path = toy_run / "step-000040.pt"
    held_out = dataclasses.replace(toy_data, held_out=np.ones_like(toy_data.held_out))
    frame = analyze(path, PROBE.name, **settings | {"data": held_out, "fresh": 0}).table
    rows = frame.set_index("statistic")
    for statistic in ("excess_over_unigram", "unigram_correlation"):
        assert rows.loc[statistic].verdict == "n/a"
        assert "no training split" in rows.loc[statistic].note
        assert rows.loc[statistic].n_tokens == 0
    assert rows.loc["mean_loss"].n_tokens == 1600

    told = "frequencies are those of tokens that are measured"
    for split, tokens, expected in (("all", 1600, 4), ("heldout", None, 0)):
        frame = analyze(path, PROBE.name, **settings | {"split": split, "tokens": tokens, "fresh": 0}).table
        assert frame.note.str.contains(told).sum() == expected


def test_initial_frequencies_are_not_taken_from_another_text_s_cache(toy_run, toy_data, settings, tmp_path):
    """The same windows, held out of a text whose training split differs: nulls must not be shared."""
    path, options = toy_run / "step-000040.pt", settings | {"split": "heldout", "tokens": None, "fresh": 0}
    options["cache_dir"] = tmp_path

    def own_init(data):
        nulls = analyze(path, PROBE.name, **options | {"data": data}).nulls
        nulls = nulls[(nulls.statistic == "excess_over_unigram") & (nulls.null_kind == "own-init")]
        return nulls.value.item()

    other = toy_data.tokens.copy()
    for document in toy_data.documents("train"):
        other[toy_data.offsets[document] : toy_data.offsets[document + 1]] = document % 5
    changed = dataclasses.replace(toy_data, tokens=other, fingerprint="another")
    first = own_init(toy_data)
    assert own_init(changed) < first - 1
    assert own_init(toy_data) == first


def test_a_model_without_writes_or_without_the_hook_has_losses_too(configs, subject_of, toy_data, settings):
    transformer = subject_of(dataclasses.replace(configs["toy"], variant="transformer"))
    frame = analyze(transformer, PROBE.name, **settings | {"fresh": 0}).table
    assert frame.set_index("statistic").loc["mean_loss"].value == pytest.approx(math.log(VOCAB), rel=0.05)

    subject = subject_of()
    points = subject.module.hook_dict
    del points._points["hook_surprise"]
    assert PROBE.hooks(subject) == []
    result = run_pass(subject, windows_of(toy_data), [PROBE], LIVE)
    assert MEAN in values_of(result.accumulators[PROBE.name])


def test_no_tokens_no_rows(unigram):
    empty = LossDistribution("live", math.log(VOCAB), unigram)
    assert (empty.measurements(), empty.plug_ins()) == ([], {})


def test_it_describes_itself():
    text = PROBE.describe()
    for word in (*PROBE.statistics, "Nulls", "Cost", "Source", "section 4.4"):
        assert word in text


def world(rng, documents=5 * GROUPS, noise=1.0):
    """Losses like a model's: gamma tokens, spread between documents, correlated with frequency; moments by group."""
    lengths = np.maximum(2, rng.lognormal(3, 0.5, documents).astype(int))
    document = np.repeat(np.arange(documents), lengths)
    y = rng.gamma(4.0, 1.5, document.size)
    x = 0.5 * y + np.exp(0.3 * rng.standard_normal(documents))[document] * rng.gamma(
        1.0, noise, document.size
    )
    group = document % GROUPS
    n = np.bincount(group, minlength=GROUPS)
    values = {"x": x, "y": y}
    means = {name: np.bincount(group, v, GROUPS) / n for name, v in values.items()}
    centred = {name: v - means[name][group] for name, v in values.items()}
    comoments = {
        pair: np.bincount(group, centred[pair[0]] * centred[pair[1]], GROUPS)[:, None, None]
        for pair in ("xx", "yy", "xy")
    }
    return Moments(n, {name: mean[:, None] for name, mean in means.items()}, comoments)


def truth(noise):
    """Standard deviation and correlation in `world`, in closed form; e² and e⁴ of the document's factor e."""
    e, e2 = math.exp(0.045), math.exp(0.18)
    variance = 0.25 * 4 * 1.5**2 + 2 * noise**2 * e2 - (noise * e) ** 2
    return math.sqrt(variance), 0.5 * 4 * 1.5**2 / math.sqrt(variance * 4 * 1.5**2)


def covered(noise, data_sets, seed):
    rng, hits = np.random.default_rng(seed), np.zeros(2)
    for _ in range(data_sets):
        moments = world(rng, noise=noise)
        for i, (statistic, bounds) in enumerate(((scalar_std, (0, np.inf)), (correlation, (-1, 1)))):
            estimate = jackknife(statistic, moments, bounds=bounds)
            hits[i] += estimate.ci_low <= truth(noise)[i] <= estimate.ci_high
    print(
        f"noise {noise}: standard deviation {hits[0] / data_sets:.3f}, correlation {hits[1] / data_sets:.3f}"
    )
    return hits / data_sets


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_coverage_of_spread_and_correlation(noise):
    assert all(0.93 <= rate <= 0.97 for rate in covered(noise, 2000, seed=1))


def test_coverage_quickly():
    assert all(rate >= 0.9 for rate in covered(1.0, 100, seed=2))
