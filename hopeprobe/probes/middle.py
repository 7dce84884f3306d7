"""Half of a window read, fast weights changed, and the rest read; or the same half read again.

The middle m of a window is the multiple of the least common multiple of all write periods nearest to half the model's
context: at no other place is all that was read also written, and nothing waits that belongs to a row. There

    continued    nothing is done: what the others are compared with
    reset        fast weights go back to meta weights
    swapped      a window continues with the fast weights of the next one of another document in its batch; where all
                 documents differ that is a permutation
    mean-state   with the mean of the fast weights of all others of other documents in its batch
    repeated     its first half is read a second time, from the state that reading it left; the losses shown in the
                 places of the first half are those of the second time, and nothing else is scored

Fast weights move, those of all mechanisms together; convolution tails and attention caches stay. Only windows longer
than m, beside one of another document that is too, take part in the first four, which come in batches of 8 windows
whatever was asked for, as windows act on each other; windows of m tokens or more in the last. `Plan` says which, so
that other conditions can be compared on the same tokens.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hopeprobe.conditions import LIVE, Condition, as_tensors
from hopeprobe.subject import MissingCapability, WindowLosses

from .readings import check_positions

if TYPE_CHECKING:
    from collections.abc import Callable

    from hopeprobe.stats.arrays import BoolArray, FloatArray, IntArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalBatch, EvalWindows

    Change: TypeAlias = "Callable[[Subject, Any, EvalBatch, int], Any]"

BATCH = 8


def middle_of(subject: Subject) -> int | None:
    """Tokens before the middle; None where no multiple of all write periods lies inside the context."""
    period = math.lcm(*subject.write_periods().values())
    middle = max(1, round(subject.context / 2 / period)) * period
    return middle if middle < subject.context else None


def why_no_middle(subject: Subject) -> str:
    """Why nothing can be done in the middle of a window; "" when it can."""
    if middle_of(subject) is not None:
        return ""
    period = math.lcm(*subject.write_periods().values())
    return f"everything has been written together only every {period} tokens, a window has {subject.context}"


def why_no_stream(subject: Subject) -> str:
    """Why a window cannot go on from where another ended; "" when it can."""
    try:
        subject.init_state(1)
    except MissingCapability as error:
        return str(error)
    return ""


def why_no_states(subject: Subject) -> str:
    """Why fast weights cannot be moved from window to window; "" when they can."""
    import torch

    try:
        state = subject.init_state(1)
        subject.average_rows(subject.reset_rows(state, [0]), torch.ones(1, 1))
    except MissingCapability as error:
        return str(error)
    return ""


def swap_weights(lengths: IntArray, document: IntArray, middle: int) -> FloatArray:
    """Weights [R, R] that give each window what the next of another document has; its own without any."""
    others = _others(lengths, document, middle)
    rows = np.arange(len(lengths))
    turned = (rows[:, None] + rows) % len(rows)  # row r: r, r + 1, …, r − 1
    nearest = np.argmax(np.take_along_axis(others, turned, axis=1), axis=1)  # 0, itself, where there is none
    weights: FloatArray = np.eye(len(rows))[turned[rows, nearest]]
    return weights


def mean_weights(lengths: IntArray, document: IntArray, middle: int) -> FloatArray:
    """Weights [R, R] that average, for each window, over all others of other documents; its own without any."""
    others = _others(lengths, document, middle)
    count = others.sum(axis=1, keepdims=True)
    return np.where(count > 0, others / np.maximum(count, 1), np.eye(len(lengths)))


def _others(lengths: IntArray, document: IntArray, middle: int) -> BoolArray:
    """Bool [R, R]: both are longer than the middle, and of different documents."""
    fits = lengths > middle
    others: BoolArray = fits & fits[:, None] & (document != document[:, None])
    return others


@dataclass(frozen=True, eq=False)
class Plan:
    """Which windows take part, bool by their ordinal among all: the same in every condition and batch size.

    early: in `repeated`. late: in the other four. Both are empty where there is no middle; it is 0 then.
    """

    middle: int
    early: BoolArray
    late: BoolArray


def planned(subject: Subject, windows: EvalWindows) -> Plan:
    """Plan for all windows."""
    middle = middle_of(subject) or 0
    batches = list(windows.with_batch(BATCH)) if middle else []
    early: list[BoolArray] = [batch.lengths >= middle for batch in batches]
    late: list[BoolArray] = [
        np.asarray(_others(batch.lengths, batch.document, middle).any(axis=1)) for batch in batches
    ]
    nothing = np.zeros(0, dtype=np.bool_)
    return Plan(middle, np.concatenate([nothing, *early]), np.concatenate([nothing, *late]))


def _checked_middle(subject: Subject) -> int:
    """The middle. Raises MeasurementError unless all was just written there: what still waits would not move."""
    middle = middle_of(subject)
    check_positions(subject, () if middle is None else (middle,))
    assert middle is not None
    return middle


def _from_middle(change: Change, subject: Subject, _prepared: Any, batch: EvalBatch) -> WindowLosses:
    import torch

    tokens, lengths = as_tensors(batch)
    middle = _checked_middle(subject)
    if tokens.shape[1] - 1 <= middle:
        return subject.run(tokens, lengths)
    early = subject.run(tokens[:, : middle + 1], lengths.clamp(max=middle))
    state = change(subject, early.state, batch, middle)
    late = subject.run(tokens[:, middle:], (lengths - middle).clamp(min=0), state)
    return WindowLosses(
        torch.cat([early.losses, late.losses], dim=1),
        torch.cat([early.scored, late.scored], dim=1),
        late.state,
    )


def _again(subject: Subject, _prepared: Any, batch: EvalBatch) -> WindowLosses:
    import torch

    tokens, lengths = as_tensors(batch)
    middle = _checked_middle(subject)
    shape = (len(lengths), tokens.shape[1] - 1)
    losses, scored = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    if shape[1] < middle:
        return WindowLosses(losses, scored, subject.run(tokens, lengths).state)
    half = tokens[:, : middle + 1]
    first = subject.run(half, lengths.clamp(max=middle))
    second = subject.run(half, torch.where(lengths >= middle, middle, 0), first.state)
    losses[:, :middle], scored[:, :middle] = second.losses, second.scored
    return WindowLosses(losses, scored, second.state)


def _kept(_subject: Subject, state: Any, _batch: EvalBatch, _middle: int) -> Any:
    return state


def _reset(subject: Subject, state: Any, batch: EvalBatch, _middle: int) -> Any:
    return subject.reset_rows(state, range(len(batch.lengths)))


def _averaged(
    weights: Callable[[IntArray, IntArray, int], FloatArray],
    subject: Subject,
    state: Any,
    batch: EvalBatch,
    middle: int,
) -> Any:
    import torch

    return subject.average_rows(state, torch.from_numpy(weights(batch.lengths, batch.document, middle)))


CONTINUED, RESET, SWAPPED, MEAN_STATE = HALVES = tuple(
    Condition(name, run=partial(_from_middle, change), batch=BATCH)
    for name, change in (
        ("continued", _kept),
        ("reset", _reset),
        ("swapped", partial(_averaged, swap_weights)),
        ("mean-state", partial(_averaged, mean_weights)),
    )
)


@functools.cache
def repeated(cell: Condition) -> Condition:
    """The first half once more, under a condition that only sets hooks: "repeated", "repeated-cms-frozen"."""
    return Condition(repeated_name(cell.name), hooks=cell.hooks, run=_again)


def repeated_name(cell: str) -> str:
    """Name of the condition `repeated` of the condition called `cell`."""
    return "repeated" if cell == LIVE.name else f"repeated-{cell}"
