"""Similarity of CMS levels: known answers, an independent reference, planted defects."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from hopeprobe.analysis import analyze
from hopeprobe.conditions import LIVE
from hopeprobe.errors import MeasurementError
from hopeprobe.model.config import CMSLevel
from hopeprobe.probes import get_probe
from hopeprobe.probes.base import Place
from hopeprobe.probes.cms_similarity import half_window_away, levels_of
from hopeprobe.probes.passes import run_pass
from hopeprobe.stats import Moments, Verdict, cca_of, cka_of, effective_rank_of, jackknife
from hopeprobe.tokens import EvalWindows

PROBE = get_probe("cms-similarity")


def windows_of(data, batch=50, tokens=1600):
    return EvalWindows(data, "all", context=32, tokens=tokens, batch=batch)


def accumulated(subject, data, **options):
    result = run_pass(subject, windows_of(data, **options), [PROBE], LIVE)
    assert not result.failed
    return result.accumulators[PROBE.name]


def by_place(accumulator):
    return {row.place: row for row in accumulator.measurements()}


def levels(subject, layer=0):
    return subject.module.blocks[layer].cms.levels


def activations(subject, data, name):
    """All scored vectors at a hook point, [N, d] float64, and the row of each."""
    (batch,) = windows_of(data, batch=1000)
    with subject.module.caching([name]) as cache:
        scored = subject.run(torch.from_numpy(batch.tokens), torch.from_numpy(batch.lengths)).scored.numpy()
    return cache[name].double().numpy()[scored], np.nonzero(scored)[0]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("kind", "hook"), [("output", "hook_out"), ("delta", "hook_delta")])
def test_agrees_with_a_reference_in_numpy(subject, toy_data, layer, kind, hook):
    x, rows = activations(subject, toy_data, f"blocks.{layer}.cms.fast.{hook}")
    y, _ = activations(subject, toy_data, f"blocks.{layer}.cms.slow.{hook}")
    found = by_place(accumulated(subject, toy_data))
    pair = (layer, "fast|slow")

    def cosine(a, b):
        return np.mean([u @ v / np.linalg.norm(u) / np.linalg.norm(v) for u, v in zip(a, b, strict=True)])

    assert len(x) == 1600
    measured = found[Place(f"{kind}_cosine", *pair)]
    assert measured.estimate.value == pytest.approx(cosine(x, y), abs=1e-6)
    other = np.concatenate(
        [np.roll(y[rows == r], -((rows == r).sum() // 2), axis=0) for r in np.unique(rows)]
    )
    (shuffled,) = measured.nulls
    assert shuffled.kind == "shuffled"
    assert shuffled.value == pytest.approx(cosine(x, other), abs=1e-6)

    xc, yc = x - x.mean(0), y - y.mean(0)
    cka = np.linalg.norm(xc.T @ yc) ** 2 / np.linalg.norm(xc.T @ xc) / np.linalg.norm(yc.T @ yc)
    assert found[Place(f"{kind}_cka", *pair)].estimate.plug_in == pytest.approx(cka, abs=1e-6)

    cosines = np.cos(subspace_angles(xc, yc))
    cca = found[Place(f"{kind}_cca", *pair)].estimate
    assert cca.plug_in == pytest.approx(np.mean(cosines**2), abs=1e-6)
    assert cca.value < cca.plug_in, "its bias is upwards"
    assert cca.ci_low < cca.value < cca.ci_high

    for level, centred in (("fast", xc), ("slow", yc)):
        variance = np.linalg.svd(centred, compute_uv=False) ** 2
        p = variance / variance.sum()
        rank = np.exp(-np.sum(p * np.log(p)))
        place = Place(f"{kind}_effective_rank", layer, level)
        assert found[place].estimate.plug_in == pytest.approx(rank, rel=1e-5)


def test_identical_levels_give_one(configs, subject_of, toy_data):
    subject = subject_of(configs["still"])
    levels(subject)["slow"].load_state_dict(levels(subject)["fast"].state_dict())
    found = by_place(accumulated(subject, toy_data))
    for statistic in ("output_cosine", "delta_cosine", "output_cka", "delta_cka", "output_cca", "delta_cca"):
        estimate = found[Place(statistic, 0, "fast|slow")].estimate
        assert estimate.value == pytest.approx(1.0, abs=1e-12), statistic
        assert estimate.ci_high - estimate.ci_low < 1e-9
        assert found[Place(statistic, 1, "fast|slow")].estimate.value < 0.99
    assert found[Place("delta_cosine", 0, "fast|slow")].estimate.value == 1.0


def test_levels_that_add_to_other_dimensions_have_cosine_zero(configs, subject_of, toy_data):
    subject = subject_of(configs["still"])
    with torch.no_grad():
        for name, rows in (("fast", slice(0, 8)), ("slow", slice(8, 16))):
            levels(subject)[name].w_out[rows] = 0
            levels(subject)[name].b_out[rows] = 0
    found = by_place(accumulated(subject, toy_data))
    estimate = found[Place("delta_cosine", 0, "fast|slow")].estimate
    assert (estimate.value, estimate.ci_low, estimate.ci_high) == (0, 0, 0)
    assert found[Place("output_cosine", 0, "fast|slow")].estimate.value > 0.3, "outputs share their input"


@pytest.mark.parametrize(("bias", "word"), [(0.0, "exactly zero"), (0.5, "the same at every token")])
def test_a_silent_level_is_no_signal_and_never_nan_alone(configs, subject_of, toy_data, settings, bias, word):
    subject = subject_of(configs["still"])
    with torch.no_grad():
        levels(subject)["slow"].w_out.zero_()
        levels(subject)["slow"].b_out.fill_(bias)
    frame = analyze(subject, PROBE.name, **settings).table
    touched = frame[(frame.layer == 0) & frame.component.str.contains("slow")]
    assert set(touched.verdict) == {"no-signal"}
    assert touched.note.str.contains(f"what slow adds is {word}").all()
    assert "no-signal" not in set(frame.drop(touched.index).verdict)
    delta = touched[touched.statistic == "delta_cosine"].iloc[0]
    if bias == 0:
        assert np.isnan(delta.value)
        assert "1600 of 1600 tokens have no cosine" in delta.note


def test_some_undefined_cosines_are_left_out_and_counted(subject, toy_data):
    def blank(tensor, hook):
        tensor = tensor.clone()
        tensor[:, 0] = 0
        return tensor

    subject.module.add_hook("blocks.0.cms.fast.hook_delta", blank)
    row = by_place(accumulated(subject, toy_data))[Place("delta_cosine", 0, "fast|slow")]
    ticks = 1600 - row.estimate.n
    assert 0 < ticks < 1600
    assert row.note == f"{ticks} of 1600 tokens have no cosine: a delta of length 0"
    assert row.override is None


def test_a_value_that_is_not_finite_names_its_hook_point(subject, toy_data):
    ticks = itertools.count(1)

    def plant(tensor, hook):
        if next(ticks) % 4:  # in the last tick of a window: a write would carry it to every layer
            return None
        tensor = tensor.clone()
        tensor[0, 0, 0] = torch.inf
        return tensor

    subject.module.add_hook("blocks.1.cms.slow.hook_delta", plant)
    result = run_pass(subject, windows_of(toy_data), [PROBE], LIVE)
    assert not result.accumulators
    assert "blocks.1.cms.slow.hook" in result.failed[PROBE.name]
    assert "not finite" in result.failed[PROBE.name]


def test_what_is_computed_together_is_what_each_gives_alone(configs, subject_of, toy_data):
    """CKA and ranks to the last digits, CCA but for its correction of second order; pairs are not mixed up."""
    three = (CMSLevel("fast", 8), CMSLevel("mid", 16), CMSLevel("slow", 32))
    subject = subject_of(dataclasses.replace(configs["toy"], cms_levels=three, layers=1))
    accumulator = accumulated(subject, toy_data, tokens=6400)
    names = dict(zip(("fast", "mid", "slow"), "abc", strict=True))
    for quantity in accumulator.quantities():
        if "cosine" in quantity.place.statistic:
            continue
        whole = accumulator.moments[f"{quantity.place.statistic.split('_')[0]}.0"].compute()
        x, y = ([names[level] for level in quantity.place.component.split("|")] * 2)[:2]
        of = {"x": x, "y": y}
        moments = Moments(
            whole.n,
            {name: whole.means[part] for name, part in of.items()},
            {pair: whole.comoments[of[pair[0]] + of[pair[1]]] for pair in ("xx", "yy", "xy")},
        )
        kind = quantity.place.statistic.split("_", 1)[1]
        alone = jackknife({"cka": cka_of, "cca": cca_of, "effective_rank": effective_rank_of}[kind], moments)
        found = quantity.estimate()
        assert found.plug_in == pytest.approx(alone.plug_in, abs=1e-12)
        assert quantity.plug_in() == pytest.approx(alone.plug_in, abs=1e-12)
        assert found.se == pytest.approx(alone.se, abs=1e-12)
        if kind == "cca":
            assert abs(found.value - alone.value) < abs(alone.value - alone.plug_in)
        else:
            assert found.value == pytest.approx(alone.value, abs=1e-12)
            np.testing.assert_allclose(found.influence, alone.influence, rtol=0, atol=1e-12)


def test_moments_are_pooled_once_for_all_that_is_asked_of_a_layer(subject, toy_data, monkeypatch):
    """Leave-outs eight at a time, the halves, and the whole: once for a layer and kind, however many numbers it has."""
    accumulator = accumulated(subject, toy_data)
    pools, pool = [], Moments.pool
    monkeypatch.setattr(
        Moments, "pool", lambda self, keep: (pools.append(bool(self.comoments)), pool(self, keep))[1]
    )
    accumulator.measurements()
    joint, silent = 2 * 2, 2
    chunks = -(-accumulator.moments["delta.0"].n_groups // 8)
    assert sum(pools) == joint * (1 + chunks + 1) + silent
    pools.clear()
    accumulator.plug_ins()
    assert sum(pools) == joint


def test_tokens_no_more_than_dimensions_have_no_canonical_correlation(subject, toy_data):
    found = by_place(accumulated(subject, toy_data, tokens=33))
    for kind in ("output", "delta"):
        estimate = found[Place(f"{kind}_cca", 0, "fast|slow")].estimate
        assert np.isnan(estimate.value)
        assert np.isfinite(found[Place(f"{kind}_cka", 0, "fast|slow")].estimate.value)


def test_three_levels_give_three_pairs_and_one_level_none(configs, subject_of, toy_data, settings):
    three = (CMSLevel("fast", 8), CMSLevel("mid", 16), CMSLevel("slow", 32))
    subject = subject_of(dataclasses.replace(configs["toy"], cms_levels=three, layers=1))
    assert levels_of(subject.module.hook_dict) == {0: ("fast", "mid", "slow")}
    found = by_place(accumulated(subject, toy_data))
    pairs = {place.component for place in found if place.statistic == "delta_cka"}
    assert pairs == {"fast|mid", "fast|slow", "mid|slow"}
    x, _ = activations(subject, toy_data, "blocks.0.cms.mid.hook_out")
    y, _ = activations(subject, toy_data, "blocks.0.cms.slow.hook_out")
    x, y = x - x.mean(0), y - y.mean(0)
    cka = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert found[Place("output_cka", 0, "mid|slow")].estimate.plug_in == pytest.approx(cka, abs=1e-6)

    alone = subject_of(dataclasses.replace(configs["toy"], cms_levels=three[:1], layers=1))
    frame = analyze(alone, PROBE.name, **settings | {"fresh": 0}).table
    pairs, ranks = frame[frame.component == ""], frame[frame.component == "fast"]
    assert set(pairs.verdict) == {"n/a"}
    assert len(pairs) == 6
    assert pairs.note.str.contains("one level only").all()
    assert set(ranks.verdict) == {"at-init"}


def test_a_transformer_is_not_applicable(configs, subject_of, settings):
    subject = subject_of(dataclasses.replace(configs["toy"], variant="transformer"))
    results = analyze(subject, PROBE.name, **settings)
    assert {row.verdict for row in results.rows} == {Verdict.NOT_APPLICABLE}
    assert {row.note for row in results.rows} == {"this model has no CMS levels"}
    assert all(row.n_tokens == 0 for row in results.rows)


def test_neither_batch_size_nor_merging_changes_anything(subject, toy_data):
    whole = accumulated(subject, toy_data).plug_ins()
    assert accumulated(subject, toy_data, batch=7).plug_ins() == pytest.approx(whole, abs=1e-6)

    parts = [PROBE.accumulator(subject, "live", windows_of(toy_data)) for _ in range(2)]
    for i, batch in enumerate(windows_of(toy_data, batch=10)):
        with subject.module.caching(PROBE.hooks(subject)) as cache:
            out = subject.run(torch.from_numpy(batch.tokens), torch.from_numpy(batch.lengths))
        parts[i % 2].update(cache, out.losses, out.scored, batch)
    merged = PROBE.accumulator(subject, "live", windows_of(toy_data))
    for part in parts:
        merged.merge(part)
    assert merged.plug_ins() == pytest.approx(whole, abs=1e-6)
    assert {m.estimate.n for m in merged.measurements()} == {1600}


def test_levels_of_different_widths_are_refused(subject, toy_data):
    (batch,) = windows_of(toy_data, batch=1000)
    names = PROBE.hooks(subject)
    scored = torch.ones(2, 4, dtype=torch.bool)
    cache = {name: torch.randn(2, 4, 3 if ".slow." in name else 5) for name in names}
    short = dataclasses.replace(batch, group=batch.group[:2])
    with pytest.raises((ValueError, MeasurementError)):
        PROBE.accumulator(subject, "live", windows_of(toy_data)).update(cache, scored.double(), scored, short)


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_shuffled_pairs_are_another_scored_token_of_the_row(rows):
    mask = np.array(rows)
    index, paired = half_window_away(mask)
    for r in range(len(mask)):
        scored = np.flatnonzero(mask[r])
        if len(scored) < 2:
            assert not paired[r].any()
            continue
        assert (paired[r] == mask[r]).all()
        assert sorted(index[r, scored]) == list(scored), "each scored token is used once"
        assert (index[r, scored] != scored).all()


def test_it_describes_itself():
    text = PROBE.describe()
    for word in ("output_cosine", "effective_rank", "Nulls", "Cost", "Source", "section 4.2"):
        assert word in text
    listed = {
        f"{k}_{s}"
        for k, s in itertools.product(("output", "delta"), ("cosine", "cka", "cca", "effective_rank"))
    }
    assert set(PROBE.statistics) == listed
