"""Coverage of the 95 % intervals and error rates of the rule, by simulation of worlds whose truth is known.

Every world has 64 groups of documents with lognormal lengths, document effects (tokens of one document are
alike) and, where it says so, lognormal values. The aim is 93–97 %, over at least 2,000 data sets a world. Two
kinds of world are known to miss it or to sit at its edge; they keep their own, stated range rather than being
left out.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from hopeprobe.stats import (
    CCA_BOUNDS,
    CKA_BOUNDS,
    COSINE_BOUNDS,
    GROUPS,
    Evidence,
    FreshInit,
    Moments,
    Verdict,
    cca,
    cca_of,
    cka_of,
    effective_rank,
    effective_rank_of,
    jackknife,
    jackknife_each,
    judge,
    linear_cka,
    mean_of,
    paired_difference,
    second_order,
    token_cosine,
)

DIM = 8


def document_lengths(rng, documents, mean_length, sigma=1.0):
    draw = mean_length * np.exp(sigma * rng.standard_normal(documents) - sigma**2 / 2)
    return np.maximum(2, np.round(draw)).astype(int)


def unit_latents(rng, shape, *, skewed):
    """Independent latents of mean 0 and variance 1, standard normal or lognormal (σ = 0.5, skewness 1.75)."""
    z = rng.standard_normal(shape)
    if not skewed:
        return z
    s2 = 0.25
    return (np.exp(0.5 * z) - np.exp(s2 / 2)) / np.sqrt(np.expm1(s2) * np.exp(s2))


def group_moments(x, y, group):
    """Moments by group, as the accumulators compute them (tested elsewhere), for many tokens at once."""
    order = np.argsort(group, kind="stable")
    edges = np.searchsorted(group[order], np.arange(GROUPS + 1))
    n = np.diff(edges)
    values = {"x": x[order], "y": y[order]}
    means = {name: np.add.reduceat(v, edges[:-1]) / n[:, None] for name, v in values.items()}
    centred = {name: v - np.repeat(means[name], n, axis=0) for name, v in values.items()}
    slices = [slice(*pair) for pair in pairwise(edges)]
    comoments = {
        pair: np.stack([centred[pair[0]][s].T @ centred[pair[1]][s] for s in slices])
        for pair in ("xx", "yy", "xy")
    }
    return Moments(n, means, comoments)


def mean_moments(sums, lengths):
    """Per group the mean of documents given by their sums; document i goes to group i mod 64."""
    n = lengths.reshape(-1, GROUPS).sum(axis=0)
    mean = sums.reshape(-1, GROUPS).sum(axis=0) / n
    return Moments(n, {"x": mean}, {})


def gaussian_mean_world(rng, per_group):
    """Values with a document effect as large as the token noise; truth 0."""
    lengths = document_lengths(rng, GROUPS * per_group, 100)
    effects = rng.standard_normal(lengths.size)
    return mean_moments(
        effects * lengths + np.sqrt(lengths) * rng.standard_normal(lengths.size), lengths
    ), 0.0


def skewed_mean_world(rng, per_group):
    """Lognormal document means (σ = 0.5), gamma tokens of coefficient of variation 1.3; truth exp(1/8)."""
    lengths = document_lengths(rng, GROUPS * per_group, 100)
    means = np.exp(0.5 * rng.standard_normal(lengths.size))
    shape = lengths / 1.3**2
    return mean_moments(means * lengths * rng.gamma(shape) / shape, lengths), float(np.exp(1 / 8))


def cosine_world(rng, per_group, *, truth, agreement):
    """Cosines of token pairs that agree more or less, by document and by token."""
    lengths = document_lengths(rng, GROUPS * per_group, 20)
    document = np.repeat(np.arange(lengths.size), lengths)
    strength = agreement * np.exp(0.5 * rng.standard_normal(lengths.size))[document]
    x, noise = rng.standard_normal((2, document.size, DIM))
    cosine = token_cosine(x, strength[:, None] * x + noise).value
    return mean_moments(np.bincount(document, cosine), lengths), truth


def feature_world(rng, per_group, *, shared, spectrum, skewed, length=20):
    """Features x = z₁A, y = (shared·z₁ + √(1 − shared²)·z₂)B, latents 80 % token and 20 % document."""
    fixed, dim = np.random.default_rng(0), len(spectrum)
    a, b = (np.sqrt(spectrum)[:, None] * np.linalg.qr(fixed.standard_normal((dim, dim)))[0] for _ in range(2))
    lengths = document_lengths(rng, GROUPS * per_group, length, sigma=0.5)
    document = np.repeat(np.arange(lengths.size), lengths)
    token = unit_latents(rng, (document.size, 2 * dim), skewed=skewed)
    effect = unit_latents(rng, (lengths.size, 2 * dim), skewed=skewed)[document]
    z = np.sqrt(0.8) * token + np.sqrt(0.2) * effect
    shared = np.broadcast_to(shared, dim)
    x, y = z[:, :dim] @ a, (shared * z[:, :dim] + np.sqrt(1 - shared**2) * z[:, dim:]) @ b
    return group_moments(x, y, document % GROUPS), (a.T @ a, b.T @ b, a.T @ (shared[:, None] * b))


def population_cosine(agreement):
    """Mean cosine over 4 million tokens; lengths do not depend on agreement, so no documents are drawn."""
    rng = np.random.default_rng(12345)
    total, count = 0.0, 20
    for _ in range(count):
        strength = agreement * np.exp(0.5 * rng.standard_normal(200_000))
        x, noise = rng.standard_normal((2, 200_000, DIM))
        total += float(token_cosine(x, strength[:, None] * x + noise).value.mean())
    return total / count


@dataclass
class Coverage:
    """Counts how often an interval misses, and on which side."""

    replicates: int = 0
    below: int = 0
    above: int = 0

    def add(self, estimate, truth, bounds):
        assert bounds[0] <= estimate.ci_low <= estimate.value <= estimate.ci_high <= bounds[1]
        self.replicates += 1
        self.below += truth < estimate.ci_low - 1e-9
        self.above += truth > estimate.ci_high + 1e-9

    def rate(self, name):
        rate = 1 - (self.below + self.above) / self.replicates
        print(
            f"{name}: coverage {rate:.4f}, truth below {self.below}, above {self.above} of {self.replicates}"
        )
        return rate


def coverage_of_mean(name, world, replicates, seed, bounds=(-np.inf, np.inf)):
    rng, count = np.random.default_rng(seed), Coverage()
    for _ in range(replicates):
        moments, truth = world(rng)
        count.add(jackknife(mean_of, moments, bounds=bounds), truth, bounds)
    return count.rate(name)


AIM = (0.93, 0.97)
# One document to a group with lengths that span orders of magnitude: Satterthwaite's degrees of freedom are
# on the safe side (97–98 %). The alternative, Kish's, is 2 points lower there, and as much too low for skewed
# values.
WIDE = (0.93, 0.985)
# Cosines that nearly all lie against 1, five short documents to a group: 93.2 % over 3,000 data sets, at the
# edge.
EDGE = (0.92, 0.97)

MEAN_WORLDS = {
    "gaussian, 1 document a group": (gaussian_mean_world, 1, WIDE),
    "gaussian, 10 documents a group": (gaussian_mean_world, 10, AIM),
    "lognormal, 1 document a group": (skewed_mean_world, 1, AIM),
    "lognormal, 10 documents a group": (skewed_mean_world, 10, AIM),
}
DECAYING = 1 / np.arange(1, DIM + 1.0)
STEEP = 0.5 ** np.arange(DIM)
FEATURE_WORLDS = {
    "cka 0.02": {"shared": 0.15, "spectrum": DECAYING, "skewed": False},
    "cka 0.36, lognormal": {"shared": 0.6, "spectrum": DECAYING, "skewed": True},
    "cka 0.36, steep": {"shared": 0.6, "spectrum": STEEP, "skewed": False},
    "cka 0.96, steep, lognormal": {"shared": 0.98, "spectrum": STEEP, "skewed": True},
}
MIXED = {"shared": np.linspace(0.99, 0.05, 32), "spectrum": 1 / np.arange(1, 33.0), "skewed": False}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEAN_WORLDS)
def test_coverage_of_means(name):
    world, per_group, (low, high) = MEAN_WORLDS[name]
    assert low <= coverage_of_mean(name, partial(world, per_group=per_group), 8000, seed=1) <= high


@pytest.mark.slow
@pytest.mark.parametrize(("agreement", "accepted"), [(0.1, AIM), (1.0, AIM), (10.0, EDGE)])
def test_coverage_of_cosines(agreement, accepted):
    world = partial(cosine_world, per_group=5, truth=population_cosine(agreement), agreement=agreement)
    rate = coverage_of_mean(f"cosine, agreement {agreement}", world, 2000, seed=2, bounds=COSINE_BOUNDS)
    assert accepted[0] <= rate <= accepted[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURE_WORLDS)
def test_coverage_of_cka_and_effective_rank(name):
    rng, cka, rank = np.random.default_rng(3), Coverage(), Coverage()
    for _ in range(2000):
        moments, population = feature_world(rng, per_group=8, **FEATURE_WORLDS[name])
        cka.add(jackknife(cka_of, moments, bounds=CKA_BOUNDS), linear_cka(*population), CKA_BOUNDS)
        rank.add(
            jackknife(effective_rank_of, moments, bounds=(1, DIM)), effective_rank(population[0]), (1, DIM)
        )
    rates = cka.rate(f"{name}: cka"), rank.rate(f"{name}: effective rank")
    assert all(AIM[0] <= rate <= AIM[1] for rate in rates)


def correlations_with_intervals(world, replicates, seed):
    """Coverage of CCA by the plain jackknife and by that of second order, where that claims an interval."""
    rng, plain, claimed = np.random.default_rng(seed), Coverage(), Coverage()
    for _ in range(replicates):
        moments, population = world(rng)
        truth, found = float(cca(*population)), jackknife_each(column_of_cca, moments, bounds=CCA_BOUNDS)
        plain.add(found[0], truth, CCA_BOUNDS)
        (estimate,) = second_order(column_of_cca, moments, found, CCA_BOUNDS)
        if np.isfinite(estimate.se):
            claimed.add(estimate, truth, CCA_BOUNDS)
    return plain, claimed


def column_of_cca(moments):
    return cca_of(moments)[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURE_WORLDS)
def test_coverage_of_cca(name):
    world = partial(feature_world, per_group=8, **FEATURE_WORLDS[name])
    _, claimed = correlations_with_intervals(world, 2000, seed=9)
    assert claimed.replicates >= 1980
    assert AIM[0] <= claimed.rate(f"{name}: cca") <= AIM[1]


@pytest.mark.slow
@pytest.mark.parametrize(("per_group", "length"), [(4, 20), (8, 20), (4, 60)])
def test_coverage_of_cca_of_many_dimensions(per_group, length):
    """32 dimensions, and 160, 320 and 480 tokens for each."""
    world = partial(feature_world, per_group=per_group, length=length, **MIXED)
    plain, claimed = correlations_with_intervals(world, 400, seed=10)
    plain.rate("plain jackknife")
    assert claimed.replicates >= 390
    assert claimed.rate(f"cca, {per_group} documents of {length} a group") >= 0.92


@pytest.mark.slow
def test_cca_of_few_documents_has_no_interval():
    """64 documents, 115 tokens for each of 32 dimensions: the plain jackknife covers 80 %, so nothing is claimed."""
    world = partial(feature_world, per_group=1, length=60, **(MIXED | {"shared": 0.3}))
    plain, claimed = correlations_with_intervals(world, 200, seed=11)
    assert plain.rate("plain jackknife") < 0.9
    assert claimed.replicates <= 10


def test_coverage_of_a_mean_quickly():
    world = partial(skewed_mean_world, per_group=10)
    assert 0.92 <= coverage_of_mean("lognormal", world, 600, seed=4) <= 0.98


def row_of_a_family(rng, effect, *, skewed):
    """One row: trained, own-init and 10 fresh models differ by seed, the trained one by `effect` too."""

    def seed_value():
        return float(np.exp(0.5 * rng.standard_normal())) if skewed else float(rng.standard_normal())

    def estimate(level):
        means = level + documents + 0.1 * rng.standard_normal(GROUPS)
        return jackknife(mean_of, Moments(np.full(GROUPS, 100), {"x": means}, {}))

    documents = 0.5 * rng.standard_normal(GROUPS)
    level = seed_value() + effect
    trained, own = estimate(level), estimate(seed_value())
    fresh = FreshInit(tuple(seed_value() for _ in range(10)), level)
    return Evidence(trained, paired_difference(trained, own), fresh)


def learned(effects, families, seed, *, skewed=False):
    """Whether each row is called learned, bool [families, rows]."""
    rng = np.random.default_rng(seed)
    found = np.zeros((families, len(effects)), dtype=bool)
    for i in range(families):
        rows = [row_of_a_family(rng, effect, skewed=skewed) for effect in effects]
        found[i] = [j.verdict is Verdict.LEARNED for j in judge(rows, smallest_effect=0.1)]
    return found


def assert_at_most(limit, found):
    """Compare a rate with the limit, give or take two standard errors of the simulation."""
    print(f"learned in {found.mean():.4f} of {found.size}, limit {limit}")
    assert found.mean() <= limit + 2 * np.sqrt(limit * (1 - limit) / found.size)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 10])
def test_at_most_5_percent_of_null_families_hold_a_learned_row(rows):
    found = learned([0.0] * rows, 6000 // rows, seed=5)
    assert_at_most(0.05, found.any(axis=1))
    assert found.mean() <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "limit"), [(1, 0.07), (10, 0.22)])
def test_skewed_seeds_are_a_known_limit_of_the_prediction_test(rows, limit):
    """Lognormal values between seeds: 6.5 % of single rows, 21 % of families of ten, where 5 % is promised.

    The t prediction test takes seed-to-seed values for normal, and Benjamini–Hochberg needs it far out in the
    tail. This holds the limit where it was measured: it may shrink, it may not grow.
    """
    assert_at_most(limit, learned([0.0] * rows, 6000 // rows, seed=6, skewed=True).any(axis=1))


@pytest.mark.slow
def test_a_planted_effect_is_found_among_nulls():
    found = learned([8.0, 8.0] + [0.0] * 8, 400, seed=7)
    false = found[:, 2:].sum(axis=1) / np.maximum(found.sum(axis=1), 1)
    print(f"planted rows learned {found[:, :2].mean():.4f}, false discovery rate {false.mean():.4f}")
    assert found[:, :2].mean() >= 0.95
    assert false.mean() <= 0.05


def test_the_rule_quickly():
    found = learned([8.0] + [0.0] * 4, 40, seed=8)
    assert found[:, 0].mean() >= 0.9
    assert found[:, 1:].mean() <= 0.06
