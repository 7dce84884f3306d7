"""CKA, CCA, effective rank and cosine against independent definitions, known answers and degenerate input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orth, subspace_angles
from scipy.spatial.distance import cosine as cosine_distance
from scipy.stats import entropy, ortho_group

from hopeprobe.errors import MeasurementError
from hopeprobe.stats import (
    GroupedCovariance,
    GroupedCrossCovariance,
    cca,
    cca_of,
    cka_of,
    effective_rank,
    effective_rank_of,
    linear_cka,
    token_cosine,
)


def covariances(x, y):
    joint = np.cov(np.concatenate([x, y], axis=1).T, bias=True)
    d = x.shape[1]
    return joint[:d, :d], joint[d:, d:], joint[:d, d:]


def cka_from_gram_matrices(x, y):
    n = len(x)
    centring = np.eye(n) - 1 / n
    k, m = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    return np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))


def cross(x, y):
    accumulator = GroupedCrossCovariance(x.shape[-1], y.shape[-1])
    accumulator.update((x[None], y[None]), np.ones((1, len(x)), bool), np.array([0]))
    return accumulator.compute().pooled()


def covariance(x):
    accumulator = GroupedCovariance(x.shape[-1])
    accumulator.update(x[None], np.ones((1, len(x)), bool), np.array([0]))
    return accumulator.compute().pooled()


def test_cka_matches_centred_gram_matrices():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 5)) + 3
    y = x @ rng.standard_normal((5, 7)) + rng.standard_normal((60, 7))
    expected = cka_from_gram_matrices(x, y)
    np.testing.assert_allclose(linear_cka(*covariances(x, y)), expected)
    np.testing.assert_allclose(cka_of(cross(x, y)), [expected])


def test_cka_of_identical_features_is_exactly_1():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 17)).astype(np.float32)
    assert cka_of(cross(x, x))[0] == 1.0
    assert cka_of(cross(x, 3 * x + 5))[0] == 1.0


def test_cka_of_uncorrelated_features_is_0():
    signs = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], float)
    assert linear_cka(*covariances(signs[:, :1], signs[:, 1:])) == 0.0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-12, 1e12))
def test_cka_does_not_see_rotation_or_scale(seed, scale):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((30, 4)), rng.standard_normal((30, 4))
    rotation = ortho_group.rvs(4, random_state=seed)
    value = linear_cka(*covariances(x, y))
    assert 0 <= value <= 1
    np.testing.assert_allclose(linear_cka(*covariances(scale * x @ rotation, y)), value, rtol=1e-8)


def centred(x):
    return x - x.mean(axis=0)


@pytest.mark.parametrize("width", [5, 3])
def test_cca_matches_the_principal_angles_of_the_centred_data(width):
    rng = np.random.default_rng(10)
    x = rng.standard_normal((60, 5)) * [0.1, 1, 2, 5, 100] + 3
    y = x @ rng.standard_normal((5, width)) + rng.standard_normal((60, width))
    cosines = np.cos(subspace_angles(centred(x), centred(y)))
    assert len(cosines) == width
    expected = np.sum(cosines**2) / np.sqrt(5 * width)
    np.testing.assert_allclose(cca(*covariances(x, y)), expected, rtol=1e-6)
    np.testing.assert_allclose(cca_of(cross(x, y)), [expected], rtol=1e-6)


def invertible(seed, width=4):
    rng = np.random.default_rng(seed)
    left, right = ortho_group.rvs(width, size=2, random_state=seed)
    return left @ np.diag(10 ** rng.uniform(-1.5, 1.5, width)) @ right


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-12, 1e12))
def test_cca_does_not_see_invertible_linear_maps(seed, scale):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((40, 4))
    y = 0.5 * x + rng.standard_normal((40, 4))
    value = cca(*covariances(x, y))
    assert 0 < value < 1
    mapped = cca(*covariances(scale * x @ invertible(seed), y @ invertible(seed + 1)))
    np.testing.assert_allclose(mapped, value, rtol=1e-6)
    np.testing.assert_allclose(cca(*covariances(y, x)), value, rtol=1e-9)
    np.testing.assert_allclose(cca(*covariances(x, scale * x @ invertible(seed))), 1.0, atol=1e-6)


def test_cca_of_identical_features_is_1_and_of_uncorrelated_ones_0():
    x = np.random.default_rng(11).standard_normal((300, 17)).astype(np.float32)
    np.testing.assert_allclose(cca_of(cross(x, x)), [1.0], atol=1e-12)
    signs = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], float)
    assert cca(*covariances(signs[:, :1], signs[:, 1:])) == 0.0


def test_cca_of_independent_features_is_as_small_as_tokens_are_many():
    """Its known bias: a mean of D/(n − 1) where the truth is 0."""
    rng = np.random.default_rng(12)
    for n in (100, 400):
        values = [cca(*covariances(*rng.standard_normal((2, n, 10)))) for _ in range(100)]
        np.testing.assert_allclose(np.mean(values), 10 / (n - 1), rtol=0.05)


def test_cca_counts_live_directions_and_not_what_float32_rounds():
    """Three directions shared by a set of three and a set of eight: 3/√24, with or without rounding noise."""
    rng = np.random.default_rng(13)
    latent = orth(centred(rng.standard_normal((500, 8)))) * np.sqrt(500)
    embed = rng.standard_normal((3, 8))
    for dtype in (np.float64, np.float32):
        x = (latent[:, :3] @ embed + 5).astype(dtype)
        assert np.linalg.matrix_rank(centred(x.astype(np.float64)), tol=1e-9) == (
            3 if dtype == np.float64 else 8
        )
        np.testing.assert_allclose(cca_of(cross(x, latent)), [3 / np.sqrt(24)], rtol=1e-3)
        np.testing.assert_allclose(cca_of(cross(x, 2 * x)), [1.0], atol=1e-3)


def test_cca_is_not_defined_under_five_tokens_a_dimension():
    rng = np.random.default_rng(14)
    for n, defined in ((8, False), (39, False), (40, True)):
        x, y = rng.standard_normal((2, n, 4))
        assert np.isfinite(cca_of(cross(x, y)))[0] == defined
    x, y = rng.standard_normal((2, 8, 4))
    assert subspace_angles(centred(x), centred(y)).min() < 1e-6, "one shared direction in 7 is certain"
    assert np.isnan(cca_of(cross(x, y)))


def test_effective_rank_matches_singular_values_of_centred_data():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((80, 6)) * [1, 2, 3, 0.1, 0.5, 4] + 10
    variances = np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2
    expected = np.exp(entropy(variances / variances.sum()))
    np.testing.assert_allclose(effective_rank(np.cov(x.T)), expected)
    np.testing.assert_allclose(effective_rank_of(covariance(x)), [expected])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_counts_equal_directions(rank, scale):
    basis = ortho_group.rvs(8, random_state=0)[:, :rank]
    value = effective_rank(scale * basis @ basis.T)
    np.testing.assert_allclose(value, rank, rtol=1e-10)
    assert 1 <= value <= 8


def test_batched_functions_match_single_calls():
    rng = np.random.default_rng(3)
    pairs = [covariances(rng.standard_normal((20, 3)), rng.standard_normal((20, 2))) for _ in range(4)]
    stacked = [np.stack(parts) for parts in zip(*pairs, strict=True)]
    np.testing.assert_array_equal(linear_cka(*stacked), [linear_cka(*pair) for pair in pairs])
    np.testing.assert_allclose(effective_rank(stacked[0]), [effective_rank(pair[0]) for pair in pairs])
    np.testing.assert_allclose(cca(*stacked), [cca(*pair) for pair in pairs])


def test_no_variance_is_nan_not_0():
    x = np.random.default_rng(4).standard_normal((50, 3))
    constant = np.full((50, 3), 0.1)
    assert np.isnan(cka_of(cross(x, constant))).all()
    assert np.isnan(cka_of(cross(constant, constant))).all()
    assert np.isnan(cca_of(cross(x, constant))).all()
    assert np.isnan(cca_of(cross(constant, constant))).all()
    assert np.isnan(cca(np.eye(3), np.zeros((3, 3)), np.zeros((3, 3))))
    assert np.isnan(cca(np.full((3, 3), np.nan), np.eye(3), np.full((3, 3), np.nan)))
    assert np.isnan(effective_rank_of(covariance(constant))).all()
    assert np.isnan(effective_rank(np.zeros((3, 3))))
    assert np.isnan(effective_rank(np.full((3, 3), np.nan)))


def test_float32_rounding_of_a_constant_is_not_variance():
    noise = np.random.default_rng(5).standard_normal((200, 3)) * np.finfo(np.float32).eps
    assert np.isnan(effective_rank_of(covariance(1.0 + noise))).all()
    assert np.isfinite(effective_rank_of(covariance(noise))).all()


def test_an_overflowed_covariance_raises():
    with pytest.raises(MeasurementError, match="overflowed"):
        effective_rank(np.diag([np.inf, 1.0]))


def test_cosine_matches_scipy_and_known_answers():
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((2, 5, 7)), rng.standard_normal((2, 5, 7))
    expected = [
        [1 - cosine_distance(a, b) for a, b in zip(p, q, strict=True)] for p, q in zip(x, y, strict=True)
    ]
    result = token_cosine(x, y)
    np.testing.assert_allclose(result.value, expected)
    assert result.n_undefined == 0
    assert (token_cosine(x, x).value == 1).all()
    assert (token_cosine(x, -x).value == -1).all()
    assert token_cosine([1.0, 0.0], [0.0, 2.0]).value == 0


@pytest.mark.parametrize("scale", [1e-200, 1e-40, 1e200])
def test_cosine_survives_extreme_lengths(scale):
    x = np.array([3.0, 4.0]) * scale
    np.testing.assert_allclose(token_cosine(x, [4.0, 3.0]).value, 24 / 25)


def test_cosine_of_a_zero_vector_is_flagged():
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]], dtype=torch.bfloat16)
    result = token_cosine(x, torch.ones(3, 2))
    assert result.n_undefined == 1
    np.testing.assert_array_equal(result.zero_norm, [False, True, False])
    np.testing.assert_array_equal(np.isnan(result.value), [False, True, False])


def test_cosine_of_what_is_not_finite_is_nan_but_not_zero_length():
    result = token_cosine([[np.nan, 1.0], [np.inf, 1.0]], [[1.0, 1.0], [1.0, 1.0]])
    assert np.isnan(result.value).all()
    assert result.n_undefined == 0


def test_cosine_refuses_different_shapes():
    with pytest.raises(ValueError, match="one shape"):
        token_cosine(np.ones((2, 3)), np.ones((2, 4)))
