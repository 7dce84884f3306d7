"""Accumulators and pooling: exact, order-free, and deaf to nothing under the mask."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hopeprobe.errors import MeasurementError
from hopeprobe.stats import GROUPS, GroupedCovariance, GroupedCrossCovariance, GroupedMean, as_float64

KINDS = ("mean", "covariance", "cross")


def make(kind):
    return {
        "mean": lambda: GroupedMean((3, 2)),
        "covariance": lambda: GroupedCovariance(5),
        "cross": lambda: GroupedCrossCovariance(4, 3),
    }[kind]()


def batch_for(kind, rng, rows=6, tokens=7, offset=100.0):
    def draw(*shape):
        return offset + rng.standard_normal((rows, tokens, *shape))

    values = {"mean": lambda: draw(3, 2), "covariance": lambda: draw(5), "cross": lambda: (draw(4), draw(3))}
    return values[kind](), rng.random((rows, tokens)) < 0.7, rng.integers(0, 5, rows)


def select(batch, rows):
    return tuple(part[rows] for part in batch) if isinstance(batch, tuple) else batch[rows]


def assert_same(a, b, rtol=1e-10, atol=1e-8):
    a, b = a.compute(), b.compute()
    np.testing.assert_array_equal(a.n, b.n)
    for left, right in ((a.means, b.means), (a.comoments, b.comoments)):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_allclose(left[name], right[name], rtol=rtol, atol=atol)


def filled(kind, seed=0):
    accumulator = make(kind)
    accumulator.update(*batch_for(kind, np.random.default_rng(seed)))
    return accumulator


def test_mean_matches_numpy_per_group():
    rng = np.random.default_rng(0)
    batch, mask, group = batch_for("mean", rng)
    accumulator = make("mean")
    accumulator.update(batch, mask, group)
    moments = accumulator.compute()
    for g in range(GROUPS):
        tokens = batch[group == g][mask[group == g]]
        assert moments.n[g] == len(tokens)
        if len(tokens):
            np.testing.assert_allclose(moments.mean()[g], tokens.mean(axis=0))
        else:
            assert np.isnan(moments.mean()[g]).all()


def test_cross_covariance_matches_numpy_cov():
    rng = np.random.default_rng(1)
    (x, y), mask, group = batch_for("cross", rng, rows=12)
    accumulator = GroupedCrossCovariance(4, 3)
    accumulator.update((x, y), mask, group)
    moments = accumulator.compute()
    assert moments.n.dtype == np.int64
    for g in np.unique(group):
        tokens = np.concatenate([x, y], axis=-1)[group == g][mask[group == g]]
        expected = np.cov(tokens.T, bias=True)
        np.testing.assert_allclose(moments.covariance("xx")[g], expected[:4, :4], atol=1e-10)
        np.testing.assert_allclose(moments.covariance("xy")[g], expected[:4, 4:], atol=1e-10)
        np.testing.assert_allclose(moments.covariance("yy")[g], expected[4:, 4:], atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_and_leave_out_equal_recomputation(kind):
    rng = np.random.default_rng(2)
    batch, mask, group = batch_for(kind, rng, rows=10)
    accumulator = make(kind)
    accumulator.update(batch, mask, group)
    together = make(kind)
    together.update(batch, mask, np.zeros_like(group))
    moments = accumulator.compute()
    pooled, expected = moments.pooled(), together.compute()
    for name, value in {**pooled.means, **pooled.comoments}.items():
        np.testing.assert_allclose(value[0], {**expected.means, **expected.comoments}[name][0], atol=1e-9)
    replicates = moments.leave_out(np.unique(group))
    for i, g in enumerate(np.unique(group)):
        without = make(kind)
        without.update(select(batch, group != g), mask[group != g], np.zeros(int((group != g).sum()), int))
        expected = without.compute()
        assert replicates.n[i] == expected.n[0]
        for name, value in {**replicates.means, **replicates.comoments}.items():
            np.testing.assert_allclose(value[i], {**expected.means, **expected.comoments}[name][0], atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_split_in_any_order_merges_to_the_same(kind, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    batch, mask, group = batch_for(kind, rng)
    whole = make(kind)
    whole.update(batch, mask, group)
    order = data.draw(st.permutations(range(6)))
    parts = data.draw(st.lists(st.integers(0, 2), min_size=6, max_size=6))
    accumulators = [make(kind) for _ in range(3)]
    for row, part in zip(order, parts, strict=True):
        accumulators[part].update(select(batch, [row]), mask[[row]], group[[row]])
    first, second, third = (accumulators[i] for i in data.draw(st.permutations(range(3))))
    second.merge(third)
    first.merge(second)
    assert_same(first, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_with_an_empty_accumulator_changes_nothing(kind):
    accumulator, empty = filled(kind), make(kind)
    accumulator.merge(make(kind))
    assert_same(accumulator, filled(kind), rtol=0, atol=0)
    empty.merge(accumulator)
    assert_same(empty, accumulator, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_and_pickle_round_trip_exactly(kind):
    accumulator = filled(kind)
    restored = make(kind)
    restored.load_state_dict(pickle.loads(pickle.dumps(accumulator.state_dict())))
    assert_same(restored, accumulator, rtol=0, atol=0)
    assert_same(pickle.loads(pickle.dumps(accumulator)), accumulator, rtol=0, atol=0)
    restored.load_state_dict(make(kind).state_dict())
    assert restored.n_tokens == 0
    assert_same(restored, make(kind), rtol=0, atol=0)


def test_load_state_dict_refuses_what_does_not_fit():
    state = filled("covariance").state_dict()
    target = make("covariance")
    with pytest.raises(ValueError, match="needs"):
        target.load_state_dict({name: part for name, part in state.items() if name != "xx"})
    with pytest.raises(ValueError, match="does not fit"):
        GroupedCovariance(4).load_state_dict(state)
    with pytest.raises(ValueError, match="distinct"):
        target.load_state_dict({**state, "groups": np.zeros_like(state["groups"])})
    with pytest.raises(ValueError, match="positive"):
        target.load_state_dict({**state, "n": state["n"] * 0})
    assert target.n_tokens == 0


@pytest.mark.parametrize("kind", KINDS)
def test_compute_is_pure(kind):
    accumulator = filled(kind)
    before = accumulator.compute()
    for part in [before.n, *before.means.values(), *before.comoments.values()]:
        part += 1
    assert_same(accumulator, filled(kind), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_under_the_mask_raises_and_counts_nothing(bad):
    batch, mask, group = np.zeros((2, 3, 5)), np.ones((2, 3), bool), np.array([0, 1])
    batch[1, 2, 4] = bad
    accumulator = GroupedCovariance(5)
    with pytest.raises(MeasurementError, match="1 of 6 tokens, first at row 1, token 2"):
        accumulator.update(batch, mask, group)
    assert accumulator.n_tokens == 0
    mask[1, 2] = False
    accumulator.update(batch, mask, group)
    assert accumulator.n_tokens == 5


def test_shapes_groups_and_dtypes_are_checked():
    accumulator = GroupedMean((2,))
    good = np.zeros((1, 3, 2)), np.ones((1, 3), bool), np.array([0])
    accumulator.update(*good)
    with pytest.raises(ValueError, match=r"x must be \[R, T"):
        accumulator.update(np.zeros((1, 3, 4)), *good[1:])
    with pytest.raises(ValueError, match="mask must be"):
        accumulator.update(good[0], good[1], np.array([0, 1]))
    for group in (-1, GROUPS):
        with pytest.raises(ValueError, match="groups must be in"):
            accumulator.update(*good[:2], np.array([group]))
    with pytest.raises(TypeError, match="bool mask"):
        accumulator.update(good[0], good[1].astype(int), good[2])
    with pytest.raises(TypeError, match="integers"):
        accumulator.update(*good[:2], np.array([0.0]))
    with pytest.raises(TypeError, match="real numbers"):
        accumulator.update(good[0] + 1j, *good[1:])
    with pytest.raises(ValueError, match="at least 1"):
        GroupedCovariance(0)
    with pytest.raises(ValueError, match="cannot merge"):
        accumulator.merge(GroupedMean((3,)))
    with pytest.raises(ValueError, match="cannot merge"):
        accumulator.merge(GroupedCovariance(2))
    assert accumulator.n_tokens == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_torch_tensors_are_upcast(dtype):
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    from_torch, from_numpy = GroupedCovariance(4), GroupedCovariance(4)
    from_torch.update(values, torch.ones(2, 3, dtype=torch.bool), torch.tensor([3, 63]))
    from_numpy.update(values.detach().double().numpy(), np.ones((2, 3), bool), np.array([3, 63]))
    assert_same(from_torch, from_numpy, rtol=0, atol=0)
    assert as_float64(values).dtype == np.float64


def test_a_constant_has_exactly_its_mean_and_no_variance():
    accumulator = GroupedCovariance(2)
    for rows in (1, 5, 3):
        accumulator.update(np.full((rows, 7, 2), 0.1), np.ones((rows, 7), bool), np.arange(rows))
    moments = accumulator.compute().pooled()
    assert (moments.mean() == 0.1).all()
    assert (moments.covariance() == 0).all()


def test_large_offsets_do_not_cost_precision():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((40, 50, 3))
    accumulator = GroupedCovariance(3)
    accumulator.update(x + 1e8, np.ones((40, 50), bool), np.arange(40))
    expected = np.cov(x.reshape(-1, 3).T, bias=True)
    np.testing.assert_allclose(accumulator.compute().pooled().covariance()[0], expected, rtol=1e-6, atol=1e-7)


def test_memory_does_not_grow_with_tokens():
    accumulator = GroupedCovariance(3)
    sizes = []
    for _ in range(3):
        accumulator.update(np.random.default_rng(0).random((4, 9, 3)), np.ones((4, 9), bool), np.arange(4))
        sizes.append(len(pickle.dumps(accumulator.state_dict())))
    assert len(set(sizes)) == 1


def test_nothing_under_the_mask_counts_nothing():
    accumulator = GroupedMean()
    accumulator.update(np.full((2, 3), np.nan), np.zeros((2, 3), bool), np.array([0, 1]))
    assert (accumulator.n_tokens, accumulator.n_groups) == (0, 0)
    assert np.isnan(accumulator.compute().pooled().mean()).all()
