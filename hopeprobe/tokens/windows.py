"""Windows of tokens: packed and shuffled for training, one document each for measuring."""

from __future__ import annotations

import copy
import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from hopeprobe.errors import BadInputError, near_names

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from hopeprobe.tokens.store import TokenData

Ints = npt.NDArray[np.int64]

N_GROUPS = 64
"""Groups that documents are dealt into: the unit of every interval."""

CARRIES = ("window", "document")


class TrainWindows:
    """Batches of training windows, any of them at once: resuming needs the step's number and nothing else.

    The training documents, joined by the end-of-text token, are one stream; window i is its tokens i·context
    … (i+1)·context, so that the last target of one window is the first input of the next and every token of
    the stream but the first is a target once per epoch (fewer than `context` at the end are left over). Each
    epoch has its own order, drawn from PCG64 seeded with [seed, epoch]. The stream is never materialised.

    context, batch: at least 1; seed: at least 0. Raises BadInputError for other values, and where the stream
    is shorter than one window.
    """

    def __init__(self, data: TokenData, context: int, batch: int, seed: int) -> None:
        _at_least("context", context, 1)
        _at_least("batch", batch, 1)
        _at_least("seed", seed, 0)
        self.data, self.context, self.batch, self.seed = data, context, batch, seed
        self._lengths = data.lengths("train")
        self._offsets = data.offsets[data.documents("train")]
        # Where each document starts in the stream: every earlier one is followed by one end-of-text token.
        self._starts = np.cumsum(self._lengths + 1) - (self._lengths + 1)
        n_stream = int(self._lengths.sum()) + max(len(self._lengths) - 1, 0)
        self.n_windows = max(n_stream - 1, 0) // context
        if self.n_windows == 0:
            raise BadInputError(
                f"{data.name} has {n_stream} training tokens in {len(self._lengths)} documents, but one "
                f"window of context {context} needs {context + 1}; give more text or a smaller context"
            )
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def batch_at(self, step: int) -> Ints:
        """Gather the batch of step 0, 1, …: int64 [batch, context + 1], values 0 … vocab_size - 1.

        A function of (seed, step) alone. A batch may straddle epochs. Raises BadInputError for a negative
        step.
        """
        _at_least("step", step, 0)
        drawn = range(step * self.batch, (step + 1) * self.batch)
        windows = np.array([self._order(i // self.n_windows)[i % self.n_windows] for i in drawn])
        positions = windows[:, None] * self.context + np.arange(self.context + 1)
        document = np.searchsorted(self._starts, positions, side="right") - 1
        within = positions - self._starts[document]
        is_text = within < self._lengths[document]
        index = np.where(is_text, self._offsets[document] + within, 0)
        return np.where(is_text, self.data.tokens[index], self.data.end_of_text).astype(np.int64)

    def epochs(self, steps: int) -> float:
        """How often `steps` steps go through the training text."""
        return steps * self.batch / self.n_windows

    def _shuffled(self, epoch: int) -> Ints:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        return generator.permutation(self.n_windows)


@dataclass(frozen=True, eq=False)
class EvalBatch:
    """Windows of one document each, one a row; L is the longest row of this batch.

    tokens: int64 [B, L+1], zeros after a row's own tokens. lengths: int64 [B], 1 … L, scored targets of row
    r, which are tokens[r, 1 : lengths[r] + 1]. document: int64 [B], the document's ordinal in the evaluated
    split, 0 … D-1. group: int64 [B], document % 64. start: int64 [B], position of the row's first token in
    its document. index: int64 [B], the row's ordinal among all windows, whatever the size of the batches.
    """

    tokens: Ints
    lengths: Ints
    document: Ints
    group: Ints
    start: Ints
    index: Ints


class _Rows(NamedTuple):
    """The windows in the order they are drawn, each int64 [R]: document's ordinal, start, scored targets."""

    document: Ints
    start: Ints
    length: Ints


class EvalWindows:
    """The windows that a measurement reads: the same ones in every pass, batch size and process.

    carry "window": the first windows of all documents in order, then all second ones, and so on; windows of
    one document overlap by one token, so that each of its tokens but the first is a target exactly once.
    carry "document": whole documents in order, one a row, whatever `context` is. Either way the last row is
    cut so that the targets number exactly `tokens`; tokens=None takes all. Iterating gives `EvalBatch`es of
    `batch` rows (the last may have fewer), any number of times, in this order unless `shared_by` frees them of it.

    context, tokens, batch: at least 1. Raises BadInputError for other values, an unknown split or carry, and
    for more tokens than the split has.
    """

    def __init__(
        self,
        data: TokenData,
        split: str = "heldout",
        *,
        context: int,
        tokens: int | None = 32_768,
        batch: int = 8,
        carry: str = "window",
    ) -> None:
        _at_least("context", context, 1)
        _at_least("batch", batch, 1)
        if carry not in CARRIES:
            raise BadInputError(f"carry is {' or '.join(CARRIES)}, not {carry!r}{near_names(carry, CARRIES)}")
        self.data, self.split, self.context, self.batch, self.carry = data, split, context, batch, carry
        self._targets = data.lengths(split) - 1
        available = int(self._targets.sum())
        self.n_tokens = available if tokens is None else tokens
        if available == 0 or self.n_tokens > available:
            raise BadInputError(self._too_few(available))
        _at_least("tokens", self.n_tokens, 1)
        drawn = self._round_robin() if carry == "window" else self._whole_documents()
        self._rows = _cut(drawn, self.n_tokens)
        self._workers: int | None = None

    def __len__(self) -> int:
        """Count the batches."""
        return len(self._dealt())

    def __iter__(self) -> Iterator[EvalBatch]:
        """Yield the batches, in order."""
        starts = self.data.offsets[self.data.documents(self.split)]
        for which in self._dealt():
            rows = _Rows(*(column[which] for column in self._rows))
            columns = np.arange(int(rows.length.max()) + 1)
            valid = columns <= rows.length[:, None]
            index = np.where(valid, (starts[rows.document] + rows.start)[:, None] + columns, 0)
            yield EvalBatch(
                tokens=np.where(valid, self.data.tokens[index], 0).astype(np.int64),
                lengths=rows.length,
                document=rows.document,
                group=rows.document % N_GROUPS,
                start=rows.start,
                index=which,
            )

    def _dealt(self) -> list[Ints]:
        """Which windows go into each batch, by their ordinal."""
        n = len(self._rows.document)
        n_batches = -(-n // self.batch)
        if self._workers is None:
            return [np.arange(i * self.batch, min((i + 1) * self.batch, n)) for i in range(n_batches)]
        n_batches = min(n, -(-n_batches // self._workers) * self._workers)
        return np.array_split(np.argsort(-self._rows.length, kind="stable"), n_batches)

    def take(self, n_tokens: int) -> EvalWindows:
        """Take the first `n_tokens` targets: the same windows in the same batches, the last one cut.

        Raises BadInputError outside 1 … self.n_tokens.
        """
        if n_tokens > self.n_tokens:
            raise BadInputError(f"cannot take {n_tokens} tokens of windows that hold {self.n_tokens}")
        _at_least("tokens", n_tokens, 1)
        return self._of(_cut(self._rows, n_tokens), self.batch)

    def without(self, windows: Collection[tuple[int, int]]) -> EvalWindows:
        """Leave windows out, named by their document and where they start in it; the others stay as they are.

        Raises BadInputError where nothing is left.
        """
        places = zip(self._rows.document.tolist(), self._rows.start.tolist(), strict=True)
        kept = np.array([place not in windows for place in places])
        if not kept.any():
            raise BadInputError("no window is left of those that were to be measured")
        return self._of(_Rows(*(column[kept] for column in self._rows)), self.batch)

    def _of(self, rows: _Rows, batch: int) -> EvalWindows:
        other = copy.copy(self)
        other.__dict__.pop("fingerprint", None)
        other._rows, other.n_tokens = rows, int(rows.length.sum())
        other.batch, other._workers = batch, None
        return other

    def with_batch(self, batch: int) -> EvalWindows:
        """Draw the same windows `batch` at a time. Raises BadInputError under 1."""
        _at_least("batch", batch, 1)
        other = copy.copy(self)
        other.batch, other._workers = batch, None
        return other

    def shared_by(self, workers: int) -> EvalWindows:
        """Draw the same windows for a pass that may take them in any order: a batch waits for its longest.

        Windows of like length share a batch, the longest come first, and the batches, none of more than `batch`
        windows, are as even as can be and a multiple of `workers` (or one a window). Raises BadInputError under 1.
        """
        _at_least("workers", workers, 1)
        other = copy.copy(self)
        other._workers = workers
        return other

    @property
    def n_windows(self) -> int:
        """Windows in all."""
        return len(self._rows.document)

    @property
    def n_documents(self) -> int:
        """Documents that have a window here; at most those of the split."""
        return len(np.unique(self._rows.document))

    @property
    def n_groups(self) -> int:
        """Groups, of the 64, that have a window here."""
        return len(np.unique(self._rows.document % N_GROUPS))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over every window's place and tokens, in order; the batch size plays no part."""
        digest = hashlib.sha256()
        for batch in self.with_batch(self.batch):
            for row, document, start, length in zip(
                batch.tokens, batch.document, batch.start, batch.lengths, strict=True
            ):
                digest.update(np.array([document, start, length], dtype="<i8").tobytes())
                digest.update(row[: length + 1].astype("<i8").tobytes())
        return digest.hexdigest()

    def _round_robin(self) -> _Rows:
        rounds: list[_Rows] = []
        start = drawn = 0
        while drawn < self.n_tokens:
            document = np.flatnonzero(self._targets > start)
            length = np.minimum(self._targets[document] - start, self.context)
            rounds.append(_Rows(document, np.full_like(document, start), length))
            drawn += int(length.sum())
            start += self.context
        return _Rows(*(np.concatenate(column) for column in zip(*rounds, strict=True)))

    def _whole_documents(self) -> _Rows:
        document = np.arange(len(self._targets), dtype=np.int64)
        return _Rows(document, np.zeros_like(document), self._targets)

    def _too_few(self, available: int) -> str:
        everything = int((self.data.lengths() - 1).sum())
        advice = f"; the split 'all' has {everything} (--split all)" if everything > available else ""
        wanted = "" if available == 0 else f", fewer than the {self.n_tokens} asked for"
        return (
            f"the split {self.split!r} of {self.data.name} has {available} tokens to predict{wanted}{advice}"
        )


def _cut(rows: _Rows, n_tokens: int) -> _Rows:
    """Keep the first rows that hold exactly `n_tokens` targets, the last one shortened."""
    end = np.cumsum(rows.length)
    n_rows = int(np.searchsorted(end, n_tokens)) + 1
    length = rows.length[:n_rows].copy()
    length[-1] -= end[n_rows - 1] - n_tokens
    return _Rows(rows.document[:n_rows], rows.start[:n_rows], length)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise BadInputError(f"{name} is {value}; it must be at least {least}")
