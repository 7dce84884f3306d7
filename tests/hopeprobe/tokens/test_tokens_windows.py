from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hopeprobe.errors import BadInputError
from hopeprobe.tokens import N_GROUPS, EvalWindows, TokenData, TrainWindows

END = 255


def make(lengths: list[int], *, seed: int = 0) -> TokenData:
    generator = np.random.default_rng(seed)
    contents = [generator.integers(0, END, n) for n in lengths]
    return TokenData.from_documents(contents, name="t", vocab_size=256, end_of_text=END)


def targets(windows: EvalWindows) -> list[tuple[int, int, int]]:
    """(document, position, token) of every scored target, in the order they are given."""
    return [
        (int(document), int(start) + i, int(row[i]))
        for batch in windows
        for row, document, start, length in zip(
            batch.tokens, batch.document, batch.start, batch.lengths, strict=True
        )
        for i in range(1, length + 1)
    ]


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=20)


def stream_of(data: TokenData) -> list[int]:
    joined: list[int] = []
    for document in data.documents("train"):
        joined += [END] * bool(joined) + data.document_tokens(document).tolist()
    return joined


@settings(deadline=None)  # shared machines stall
@given(lengths, st.integers(1, 12), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_has_every_window_of_the_joined_documents_once(sizes, context, batch, seed):
    data = make([*sizes, 14, 14, 14], seed=seed)
    stream = stream_of(data)
    n_windows = (len(stream) - 1) // context
    if n_windows < 1:
        return
    windows = TrainWindows(data, context, batch, seed)
    assert windows.n_windows == n_windows
    steps = 2 * n_windows  # the least common multiple with the batch size, at most
    rows = np.concatenate([windows.batch_at(step) for step in range(steps)])
    assert rows.dtype == np.int64
    expected = sorted(tuple(stream[i * context : (i + 1) * context + 1]) for i in range(n_windows))
    for epoch in range(len(rows) // n_windows):
        assert sorted(map(tuple, rows[epoch * n_windows : (epoch + 1) * n_windows].tolist())) == expected


def test_a_step_depends_on_the_seed_and_its_number_alone():
    data = make([50] * 30)
    forwards, backwards = TrainWindows(data, 8, 4, 7), TrainWindows(data, 8, 4, 7)
    expected = [forwards.batch_at(step) for step in range(100)]
    for step in reversed(range(100)):
        assert np.array_equal(backwards.batch_at(step), expected[step])
    assert not np.array_equal(TrainWindows(data, 8, 4, 8).batch_at(0), expected[0])


def test_epochs_are_ordered_differently():
    data = make([50] * 30)
    windows = TrainWindows(data, 8, 1, 0)
    n = windows.n_windows
    first, second = ([windows.batch_at(e * n + i).tolist() for i in range(n)] for e in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    assert windows.epochs(3 * n) == 3.0


def test_held_out_documents_are_never_trained_on():
    data = make([5] * 200)
    assert data.held_out.any()
    seen = {
        tuple(row[i : i + 5]) for row in TrainWindows(data, 64, 20, 0).batch_at(0).tolist() for i in range(60)
    }
    held_out = {tuple(data.document_tokens(i).tolist()) for i in data.documents("heldout")}
    assert not seen & held_out


def test_too_little_text_says_how_much_there_is():
    data = make([4, 4])
    n = len(stream_of(data))
    assert TrainWindows(data, n - 1, 1, 0).n_windows == 1
    with pytest.raises(BadInputError, match=f"t has {n} training tokens in .* needs {n + 1}"):
        TrainWindows(data, n, 1, 0)


@pytest.mark.parametrize(("context", "batch", "seed"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_senseless_numbers_are_refused(context, batch, seed):
    with pytest.raises(BadInputError, match="must be at least"):
        TrainWindows(make([9] * 9), context, batch, seed)
    with pytest.raises(BadInputError, match="step is -1"):
        TrainWindows(make([9] * 9), 4, 1, 0).batch_at(-1)


@settings(deadline=None)  # shared machines stall
@given(lengths, st.integers(1, 50), st.integers(1, 7), st.sampled_from(["window", "document"]))
def test_every_token_but_the_first_of_a_document_is_scored_once(sizes, context, batch, carry):
    data = make(sizes)
    windows = EvalWindows(data, "all", context=context, tokens=None, batch=batch, carry=carry)
    scored = targets(windows)
    expected = [(d, i, int(data.document_tokens(d)[i])) for d, n in enumerate(sizes) for i in range(1, n)]
    assert sorted(scored) == expected
    assert windows.n_tokens == len(expected)


@settings(deadline=None)  # shared machines stall
@given(lengths, st.integers(1, 50), st.data(), st.sampled_from(["window", "document"]))
def test_fewer_tokens_are_a_prefix_of_the_same_windows(sizes, context, draw, carry):
    data = make(sizes)
    everything = EvalWindows(data, "all", context=context, tokens=None, batch=3, carry=carry)
    n = draw.draw(st.integers(1, everything.n_tokens))
    fewer = everything.take(n)
    assert fewer.n_tokens == n
    assert targets(fewer) == targets(everything)[:n]
    for short, long in zip(list(fewer)[:-1], everything, strict=False):
        assert np.array_equal(short.tokens, long.tokens)
        assert np.array_equal(short.start, long.start)


@settings(deadline=None)  # shared machines stall
@given(lengths, st.integers(1, 20), st.integers(1, 5))
def test_the_batch_is_masked_and_labelled(sizes, context, batch):
    data = make(sizes)
    windows = EvalWindows(data, "all", context=context, tokens=None, batch=batch)
    batches = list(windows)
    assert len(batches) == len(windows)
    for b in batches:
        rows, width = b.tokens.shape
        assert {x.dtype for x in (b.tokens, b.lengths, b.document, b.group, b.start)} == {np.dtype(np.int64)}
        assert {x.shape for x in (b.lengths, b.document, b.group, b.start)} == {(rows,)}
        assert width == b.lengths.max() + 1 <= context + 1
        assert b.lengths.min() >= 1
        assert not b.tokens[np.arange(width) > b.lengths[:, None]].any()
        assert np.array_equal(b.group, b.document % N_GROUPS)
    assert all(b.tokens.shape[0] == batch for b in batches[:-1])


def test_windows_go_round_robin_over_documents():
    windows = EvalWindows(make([10, 3, 6]), "all", context=4, tokens=None, batch=100)
    (batch,) = windows
    assert batch.document.tolist() == [0, 1, 2, 0, 2, 0]
    assert batch.start.tolist() == [0, 0, 0, 4, 4, 8]
    assert batch.lengths.tolist() == [4, 2, 4, 4, 1, 1]
    assert (windows.n_documents, windows.n_groups) == (3, 3)
    few = windows.take(5)
    assert (few.n_documents, few.n_groups) == (2, 2)
    assert next(iter(few)).lengths.tolist() == [4, 1]


def test_a_carried_document_is_one_row_cut_where_the_budget_ends():
    windows = EvalWindows(make([10, 3, 6]), "all", context=4, tokens=12, carry="document")
    (batch,) = windows
    assert batch.document.tolist() == [0, 1, 2]
    assert batch.start.tolist() == [0, 0, 0]
    assert batch.lengths.tolist() == [9, 2, 1]


def test_ordinals_count_within_the_split_and_groups_wrap_at_64():
    data = make([5] * 1200)
    windows = EvalWindows(data, "heldout", context=4, tokens=None, batch=1000)
    (batch,) = windows
    held_out = data.documents("heldout")
    assert len(held_out) > 70
    assert batch.document.tolist() == list(range(len(held_out)))
    assert [row.tolist() for row in batch.tokens] == [data.document_tokens(i).tolist() for i in held_out]
    assert windows.n_groups == 64


def test_the_fingerprint_is_of_the_content_not_of_the_batches():
    data = make([30] * 10)
    one = EvalWindows(data, "all", context=8, tokens=None, batch=1)
    assert one.fingerprint == EvalWindows(data, "all", context=8, tokens=None, batch=7).fingerprint
    others = [
        one.take(one.n_tokens - 1),
        EvalWindows(data, "all", context=9, tokens=None),
        EvalWindows(data, "all", context=8, tokens=None, carry="document"),
        EvalWindows(make([30] * 10, seed=1), "all", context=8, tokens=None),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_more_tokens_than_there_are_is_refused_with_advice():
    data = make([5] * 100)
    available, everything = data.n_tokens("heldout") - len(data.documents("heldout")), 400
    with pytest.raises(
        BadInputError, match=rf"'heldout' of t has {available} tokens.*32768.*{everything} \(--split all\)"
    ):
        EvalWindows(data, context=4)
    with pytest.raises(
        BadInputError, match=f"'all' of t has {everything} tokens to predict, fewer than the 500 asked for$"
    ):
        EvalWindows(data, "all", context=4, tokens=500)
    with pytest.raises(BadInputError, match="cannot take 401 tokens"):
        EvalWindows(data, "all", context=4, tokens=None).take(401)


def test_other_batches_hold_the_same_windows():
    windows = EvalWindows(make([9, 30, 4, 17] * 5), "all", context=8, tokens=150, batch=7)
    other = windows.with_batch(3)
    assert (windows.batch, other.batch) == (7, 3)
    assert windows.fingerprint == other.fingerprint
    for drawn in (windows, other):
        assert [len(b.index) for b in drawn][:-1] == [drawn.batch] * (len(drawn) - 1)
        index = np.concatenate([b.index for b in drawn])
        assert list(index) == list(range(len(index)))
    rows = [[(i, d, s, n) for b in w for i, d, s, n in zip(b.index, b.document, b.start, b.lengths, strict=True)]
            for w in (windows, other)]  # fmt: skip
    assert rows[0] == rows[1]
    with pytest.raises(BadInputError, match="batch is 0"):
        windows.with_batch(0)


def test_a_text_without_held_out_documents_points_to_all():
    contents = next(
        c for c in ([[i, 1, 2]] for i in range(50)) if not TokenData.from_documents(c, name="t").held_out[0]
    )
    with pytest.raises(BadInputError, match=r"'heldout' of t has 0 tokens to predict; the split 'all' has 2"):
        EvalWindows(TokenData.from_documents(contents, name="t"), context=4, tokens=None)


def test_senseless_arguments_are_refused():
    data = make([9] * 9)
    with pytest.raises(
        BadInputError, match="carry is window or document, not 'documents'; did you mean 'document'"
    ):
        EvalWindows(data, "all", context=4, tokens=1, carry="documents")
    with pytest.raises(BadInputError, match="no split"):
        EvalWindows(data, "test", context=4)
    for bad in ({"context": 0}, {"batch": 0}, {"tokens": 0}, {"tokens": -5}):
        with pytest.raises(BadInputError, match="must be at least 1"):
            EvalWindows(data, "all", **{"context": 4, "tokens": 1, "batch": 1, **bad})


@settings(deadline=None)  # shared machines stall
@given(lengths, st.integers(1, 20), st.integers(1, 5), st.integers(1, 4))
def test_a_pass_in_any_order_takes_like_lengths_together(sizes, context, batch, workers):
    windows = EvalWindows(make(sizes), "all", context=context, tokens=None, batch=batch)
    shared = windows.shared_by(workers)
    assert (windows.fingerprint, windows.n_windows) == (shared.fingerprint, shared.n_windows)
    assert sorted(targets(shared)) == sorted(targets(windows))
    rows = {
        int(b.index[i]): b.tokens[i, : b.lengths[i] + 1].tolist()
        for b in windows
        for i in range(len(b.index))
    }
    batches = list(shared)
    assert len(batches) == len(shared)
    assert all(len(b.index) <= batch for b in batches)
    assert len({len(b.index) for b in batches}) <= 2  # as even as can be
    assert len(batches) % workers == 0 or len(batches) == windows.n_windows
    assert len(batches) >= len(windows)
    in_order = np.concatenate([b.lengths for b in batches])
    assert (np.diff(in_order) <= 0).all()
    for b in batches:
        for i, row in enumerate(b.tokens):
            assert row[: b.lengths[i] + 1].tolist() == rows[int(b.index[i])]
    assert [len(b.index) for b in shared.with_batch(batch)] == [
        len(b.index) for b in windows
    ]  # in order again
    with pytest.raises(BadInputError, match="workers is 0"):
        windows.shared_by(0)
