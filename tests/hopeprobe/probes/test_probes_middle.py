"""Who continues with whose fast weights, and that nothing else waits to be moved."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hopeprobe.conditions import FROZEN, LIVE, as_tensors
from hopeprobe.errors import MeasurementError
from hopeprobe.model.config import CMSLevel
from hopeprobe.probes import middle as module
from hopeprobe.probes.middle import (
    BATCH,
    HALVES,
    mean_weights,
    middle_of,
    planned,
    repeated,
    swap_weights,
    why_no_middle,
    why_no_states,
)
from hopeprobe.tokens import EvalWindows

ROWS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 4)), min_size=1, max_size=9)


@given(ROWS)
def test_weights_are_those_of_a_loop_over_rows(rows):
    lengths, document = (np.array(column) for column in zip(*rows, strict=True))
    n, middle = len(rows), 12
    swap, mean = np.zeros((n, n)), np.zeros((n, n))
    for r in range(n):
        others = [
            s % n
            for s in range(r + 1, r + n)
            if lengths[r] > middle and lengths[s % n] > middle and document[s % n] != document[r]
        ]
        for s in others or [r]:
            mean[r, s] = 1 / max(len(others), 1)
        swap[r, (others or [r])[0]] = 1
    np.testing.assert_array_equal(swap_weights(lengths, document, middle), swap)
    np.testing.assert_allclose(mean_weights(lengths, document, middle), mean, atol=1e-15)


@given(st.integers(2, 9))
def test_where_all_documents_differ_it_is_a_permutation_without_a_fixed_point(n):
    weights = swap_weights(np.full(n, 20), np.arange(n), 12)
    np.testing.assert_array_equal(weights.sum(axis=0), 1)
    assert not weights.diagonal().any()


@pytest.mark.parametrize(
    ("context", "periods", "middle"),
    [(512, (8, 8, 32), 256), (512, (8, 64, 32), 256), (128, (8, 8, 32), 64), (100, (8, 8, 32), 64),
     (48, (8, 8, 32), 32), (33, (8, 8, 32), 32), (32, (8, 8, 32), None), (100, (8, 24, 32), 96)],
)  # fmt: skip
def test_the_middle_is_a_common_multiple_of_all_periods_inside_the_context(
    subject_of, configs, context, periods, middle
):
    chunk, memory, slow = periods
    levels = CMSLevel("fast", 8), CMSLevel("slow", slow)
    changes = {"context": context, "chunk": chunk, "chunk_memory": memory, "cms_levels": levels}
    subject = subject_of(dataclasses.replace(configs["toy"], **changes))
    assert middle_of(subject) == middle
    assert bool(why_no_middle(subject)) == (middle is None)
    assert why_no_states(subject) == ""


def two_levels(configs):
    levels = CMSLevel("fast", 8), CMSLevel("slow", 16)
    return dataclasses.replace(configs["toy"], dim=8, layers=1, cms_levels=levels, chunk_memory=16)


def test_nothing_waits_in_the_middle_and_elsewhere_something_does(subject_of, configs, toy_data):
    subject = subject_of(two_levels(configs))
    (batch, *_) = EvalWindows(toy_data, "all", context=32, tokens=300, batch=8)
    tokens, lengths = as_tensors(batch)

    def waiting(position):
        state = subject.run(tokens[:, : position + 1], lengths.clamp(max=position)).state
        (layer,) = state.layers
        held = [level.grad_hidden.shape[1] + level.grad_delta.shape[1] for level in layer.cms]
        return bool(state.pending.shape[1]) or any(layer.selfmod.pending) or any(held)

    assert not waiting(middle_of(subject))
    assert waiting(8)


@pytest.mark.parametrize("wrong", [8, 24, None])
def test_no_other_place_is_taken(subject_of, configs, toy_data, monkeypatch, wrong):
    subject = subject_of(two_levels(configs))
    (batch, *_) = EvalWindows(toy_data, "all", context=32, tokens=300, batch=8)
    HALVES[1].run(subject, None, batch)
    monkeypatch.setattr(module, "middle_of", lambda _: wrong)
    for condition in (*HALVES, repeated(LIVE)):
        with pytest.raises(MeasurementError, match="multiples of 16, the model's common write period"):
            condition.run(subject, None, batch)


def test_the_plan_is_that_of_the_fixed_batches_whatever_the_windows_come_in(subject_of, configs, toy_data):
    subject = subject_of(two_levels(configs))
    plans = [
        planned(subject, EvalWindows(toy_data, "all", context=32, tokens=None, batch=batch))
        for batch in (3, 50)
    ]
    np.testing.assert_array_equal(plans[0].late, plans[1].late)
    windows = list(EvalWindows(toy_data, "all", context=32, tokens=None, batch=BATCH))
    lengths = np.concatenate([batch.lengths for batch in windows])
    assert plans[0].middle == 16
    np.testing.assert_array_equal(plans[0].early, lengths >= 16)
    expected = [
        n > 16 and any(m > 16 and d != e for m, e in zip(b.lengths, b.document, strict=True))
        for b in windows
        for n, d in zip(b.lengths, b.document, strict=True)
    ]
    np.testing.assert_array_equal(plans[0].late, expected)
    assert not plans[0].late.all()
    assert plans[0].late.any()
    assert len(planned(subject_of(), EvalWindows(toy_data, "all", context=32, tokens=300)).late) == 0


def test_what_is_read_again_stands_in_its_own_places_and_nothing_else_is_scored(
    subject_of, configs, toy_data
):
    subject = subject_of(two_levels(configs))
    (batch, *_) = EvalWindows(toy_data, "all", context=20, tokens=None, batch=500, carry="window")
    assert (batch.lengths < 16).any()
    out = repeated(LIVE).run(subject, None, batch)
    expected = (batch.lengths >= 16)[:, None] & (np.arange(out.scored.shape[1]) < 16)
    np.testing.assert_array_equal(out.scored.numpy(), expected)
    assert not out.losses[~out.scored].any()
    short = dataclasses.replace(batch, tokens=batch.tokens[:, :11], lengths=batch.lengths.clip(max=10))
    assert not repeated(LIVE).run(subject, None, short).scored.any()
    assert repeated(FROZEN).hooks is FROZEN.hooks
    assert [repeated(one).name for one in (LIVE, FROZEN)] == ["repeated", "repeated-frozen"]
    torch.testing.assert_close(
        HALVES[0].run(subject, None, batch).losses, subject.run(*as_tensors(batch)).losses
    )
