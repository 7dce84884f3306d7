from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from hopeprobe.errors import BadInputError
from hopeprobe.tokens import Unigram


def leave_one_out(tokens: np.ndarray, vocab_size: int, alpha: float) -> float:
    """The definition, token by token: each predicted from the counts of all others."""
    total = 0.0
    for i, token in enumerate(tokens):
        others = np.delete(tokens, i)
        total += np.log((np.sum(others == token) + alpha) / (len(others) + alpha * vocab_size))
    return total


def test_alpha_maximises_the_leave_one_out_likelihood():
    tokens = np.random.default_rng(0).zipf(1.5, 300) % 40
    fitted = Unigram.fit(tokens, 50)
    best = optimize.minimize_scalar(
        lambda x: -leave_one_out(tokens, 50, np.exp(x)), bounds=(-9, 5), method="bounded"
    )
    assert abs(np.log(fitted.alpha) - best.x) < np.log(1e9) / 180  # one step of the grid


def test_surprisal_is_a_distribution_and_follows_the_formula():
    tokens = np.array([0, 0, 0, 1, 1, 2], dtype=np.uint16)
    fitted = Unigram.fit(tokens, 5)
    assert fitted.surprisal.dtype == np.float64
    assert np.exp(-fitted.surprisal).sum() == pytest.approx(1)
    expected = -np.log((np.array([3, 2, 1, 0, 0]) + fitted.alpha) / (6 + 5 * fitted.alpha))
    assert fitted.surprisal == pytest.approx(expected, rel=1e-12)
    assert fitted.loss(tokens) == pytest.approx(expected[tokens].mean(), rel=1e-12)


def test_uniform_tokens_cost_the_logarithm_of_the_vocabulary():
    tokens = np.tile(np.arange(16), 50)
    fitted = Unigram.fit(tokens, 16)
    assert fitted.loss(tokens) == pytest.approx(np.log(16))


def test_the_smoothing_beats_its_neighbours_on_new_text():
    generator = np.random.default_rng(1)
    probabilities = generator.dirichlet(np.full(2000, 0.05))
    train, test = (generator.choice(2000, size=n, p=probabilities) for n in (3000, 50_000))
    fitted = Unigram.fit(train, 2000)
    counts = np.bincount(train, minlength=2000)
    for alpha in (fitted.alpha / 10, fitted.alpha * 10):
        other = -np.log((counts + alpha) / (3000 + 2000 * alpha))
        assert fitted.loss(test) < other[test].mean()


def test_one_token_is_enough_and_none_is_not():
    assert np.isfinite(Unigram.fit(np.array([3]), 5).surprisal).all()
    with pytest.raises(BadInputError, match="at least one token"):
        Unigram.fit(np.array([], dtype=np.uint16), 5)


@pytest.mark.parametrize("token", [-1, 5])
def test_tokens_out_of_range_are_refused(token: int):
    with pytest.raises(BadInputError, match=r"outside 0 … 4"):
        Unigram.fit(np.array([1, token]), 5)
    with pytest.raises(BadInputError, match=r"outside 0 … 4"):
        Unigram.fit(np.array([1]), 5).loss(np.array([token]))
