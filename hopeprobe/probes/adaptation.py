"""Which mechanism's writes help? Loss with writes on and off, and with fast weights reset, swapped, averaged.

Every row is a difference of mean losses over the same tokens, nats a token; negative: the loss is lower for it.

    loss_change         selfmod      live − selfmod-frozen     what its writes change, the other mechanism writing
                        cms          live − cms-frozen
                        both         live − frozen
                        interaction  live − selfmod-frozen − cms-frozen + frozen     0: what they change adds up
    state_loss_change   in the second half, for the fast weights that the window has in its middle, against
                        reset        continued − reset         meta weights
                        swapped      continued − swapped       those of another sequence
                        mean-state   continued − mean-state    their average over other sequences
                        offset       mean-state − reset        that average, against meta weights
    recall              the first half read again, second less first time, for selfmod, cms and both:
                        (repeated − live) − (repeated-cms-frozen − cms-frozen)
    …_by_position       the first two in up to 8 equal parts of the window, of whole ticks ("16-31"); not before a
                        write could have changed anything
    continuation_gap    continued − live, a control: to stop in the middle and go on must change nothing
    loss                of the cells live, frozen, …, to be read beside the differences

A learned offset, which suits any sequence, lowers `reset` and `offset`; memory of this sequence lowers `swapped`,
`mean-state` and `recall`. The average is over 7 others: a seventh of the variance
between sequences is left in it. Conditions of the middle, and who takes part: `middle.py`.

Nulls: own-init and fresh-init of the same difference, since CMS writes of an untrained model lower its loss by a lot
(0.97 nats for `small`). Smallest effect and verdicts: `effects.py`; the interaction is as undecided as `both`.
Where swapping changes nothing and resetting does, sequences share fast weights: `no-signal`, and all other rows are
undecided, as they are where the control is not 0 (0.001 nats).

Reading. Negative and `learned`: writing helps, more than it does before training. `at-init` is a result too: writes
change no more than in a model that learned nothing. `swapped` that costs as much as `reset` is memory of this
sequence; `reset` alone that costs is an offset that suits all.

Fails. It knows windows of the model's context only: a memory that pays later is not seen. Frozen is how the model was
not trained, so that a loss may rise because slow weights count on writes, not because these remember.

Cost: 12 passes, 4 without a middle; as many for the initial model and, on 4,096 tokens, for each fresh one. Memory:
some numbers for each group of documents. Source: "Dissecting HOPE", section 4.3, which reads "a learned
initialization offset rather than continual online adaptation" off the drift of meta weights alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from hopeprobe.conditions import FROZEN, LIVE, Condition, frozen
from hopeprobe.stats import Verdict
from hopeprobe.subject import MissingCapability

from .base import Accumulator, Measurement, Place, Probe, value_without_tokens
from .effects import (
    EFFECT,
    WHOLE,
    PartLosses,
    contrast,
    directed,
    diverged,
    joint,
    overridden,
    unchanged,
)
from .middle import (
    CONTINUED,
    HALVES,
    MEAN_STATE,
    RESET,
    SWAPPED,
    Plan,
    planned,
    repeated,
    repeated_name,
    why_no_middle,
    why_no_states,
    why_no_stream,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hopeprobe.stats.arrays import BoolArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalBatch, EvalWindows

    from .base import Finding, Quantity

CHANGE, STATE, RECALL, CONTROL = "loss_change", "state_loss_change", "recall", "continuation_gap"
INTERACTION, BOTH, OFFSET = "interaction", "both", "offset"
POSITIONS = 8
GAP = 0.001  # nats
SHARED = "swapping the fast weights between sequences changes nothing: are they shared?"

_EARLY, _LATE = "early", "late"
_BY_POSITION = "_by_position"


def position_bins(subject: Subject) -> dict[str, tuple[int, float]]:
    """Up to 8 equal parts of the context, of whole ticks, that a write can have changed: name → first, end.

    Tokens beyond the context, where windows are whole documents, are one more.
    """
    context, tick = subject.context, subject.tick
    width = math.ceil(context / POSITIONS / tick) * tick
    first_write = min(subject.write_periods().values())
    starts = [start for start in range(0, context, width) if start + width > first_write]
    bins: dict[str, tuple[int, float]] = {
        f"{a}-{min(a + width, context) - 1}": (a, a + width) for a in starts
    }
    return {name: (a, min(b, context)) for name, (a, b) in bins.items()} | {
        f"{context}-": (context, math.inf)
    }


def mechanisms_of(subject: Subject) -> dict[str, str]:
    """Mechanisms that write, each with the reason why it cannot be frozen alone, or ""."""
    found = {}
    for name in dict.fromkeys(name.partition(".")[0] for name in subject.write_periods()):
        try:
            subject.freeze_hooks(name)
            found[name] = ""
        except MissingCapability as error:
            found[name] = str(error)
    return found


def cells_of(subject: Subject) -> list[Condition]:
    """Live, frozen, and where several mechanisms write, those that can be frozen alone."""
    mechanisms = mechanisms_of(subject)
    alone = [name for name, why in mechanisms.items() if not why] if len(mechanisms) > 1 else []
    return [LIVE, FROZEN, *map(frozen, alone)]


class Adaptation(Probe):
    """What writes, and what was written, change in the loss; definitions at the top of this file."""

    name: ClassVar[str] = "adaptation"
    question: ClassVar[str] = "Which mechanism's writes help?"
    statistics: ClassVar[tuple[str, ...]] = (CHANGE, STATE, RECALL)

    def applies(self, subject: Subject) -> str | None:
        """None, or that nothing is ever written. Raises MissingCapability without gates that could be closed."""
        if not subject.write_periods():
            return "this model never writes"
        subject.freeze_hooks()
        return None

    def conditions(self, subject: Subject) -> Sequence[Condition]:
        """The cells; and where there is a middle, what is done there, and each cell with its first half again."""
        cells = cells_of(subject)
        if why_no_middle(subject) or why_no_stream(subject):
            return cells
        halves = () if why_no_states(subject) else HALVES
        return [*cells, *halves, *map(repeated, cells)]

    def accumulator(self, subject: Subject, condition: str, windows: EvalWindows) -> Accumulator:
        """Make an empty accumulator of the parts in which this condition is compared."""
        return AdaptationLosses(
            condition, planned(subject, windows), position_bins(subject), tuple(mechanisms_of(subject))
        )

    def contrasts(self, accumulators: Mapping[str, Accumulator]) -> list[Quantity]:
        """All rows but the cells."""
        live = accumulators[LIVE.name]
        assert isinstance(live, AdaptationLosses)
        rows = []
        for component, cells in _compared(live.mechanisms, accumulators).items():
            for position in ("",) if component == INTERACTION else ("", *live.bins):
                rows += contrast(_place(CHANGE, component, position), _part(WHOLE, position), cells)
            again = [(sign, accumulators.get(repeated_name(cell.condition))) for sign, cell in cells]
            if component != INTERACTION:
                (_, on), (_, off) = cells
                four = ((1, again[0][1]), (-1, on), (-1, again[1][1]), (1, off))
                terms = [(sign, one) for sign, one in four if one is not None]
                rows += contrast(Place(RECALL, component=component), _EARLY, terms) if len(terms) == 4 else []
        if CONTINUED.name not in accumulators:
            return rows
        continued = accumulators[CONTINUED.name]
        for other in (RESET, SWAPPED, MEAN_STATE):
            for position in ("", *live.bins):
                pair = [(1, continued), (-1, accumulators[other.name])]
                rows += contrast(_place(STATE, other.name, position), _part(_LATE, position), pair)
        pair = [(1, accumulators[MEAN_STATE.name]), (-1, accumulators[RESET.name])]
        rows += contrast(Place(STATE, component=OFFSET), _LATE, pair)
        return rows + contrast(Place(CONTROL), _LATE, [(1, continued), (-1, live)])

    def of_model(
        self,
        subject: Subject,
        initial: Subject | None,  # noqa: ARG002
        windows: EvalWindows,
    ) -> list[Measurement]:
        """Rows of what cannot be done with this model, or on these windows: `n/a`, and why."""
        plan, mechanisms = planned(subject, windows), mechanisms_of(subject)
        absent = [(CHANGE, name, why) for name, why in mechanisms.items() if why and len(mechanisms) > 1]
        if len(mechanisms) != 2:
            absent.append((CHANGE, INTERACTION, f"it takes two that write, not {', '.join(mechanisms)}"))
        elif any(mechanisms.values()):
            absent.append((CHANGE, INTERACTION, next(filter(None, mechanisms.values()))))
        none = why_no_middle(subject)
        short = f"no two of different documents in one batch are longer than {plan.middle} tokens"
        why = none or why_no_states(subject) or ("" if plan.late.any() else short)
        absent += [(STATE, one.name, why) for one in (RESET, SWAPPED, MEAN_STATE) if why]
        none = none or why_no_stream(subject)
        why = none or ("" if plan.early.any() else f"no window has {plan.middle} tokens")
        absent += [(RECALL, "", why)] if why else []
        return [
            Measurement(
                Place(statistic, component=component),
                "",
                "nats",
                value_without_tokens(math.nan),
                EFFECT,
                Verdict.NOT_APPLICABLE,
                reason,
            )
            for statistic, component, reason in absent
        ]

    def review(self, subject: Subject, findings: Sequence[Finding]) -> list[Finding]:
        """Set what the rule must not decide; see the top of this file, and `effects.py`."""
        blown = diverged(subject, findings)
        still = {f.measurement.place for f in findings if unchanged(f, subject)}
        nowhere = _undecidable(findings, still)
        decided = {f.measurement.key: _decided(f, blown, nowhere, still) for f in findings}
        cells = {
            key[1].component: key for key in decided if key[1].statistic == CHANGE and not key[1].position
        }
        if INTERACTION in cells and BOTH in cells:
            key, both = cells.pop(INTERACTION), decided[cells.pop(BOTH)]
            decided[key] = joint(decided[key], both, [decided[one] for one in cells.values()])
        return list(decided.values())


class AdaptationLosses(PartLosses):
    """Mean losses under one condition: all of it, the halves that others are compared on, and by position."""

    def __init__(
        self,
        condition: str,
        plan: Plan,
        bins: Mapping[str, tuple[int, float]],
        mechanisms: tuple[str, ...],
    ) -> None:
        super().__init__(condition)
        self.plan, self.bins, self.mechanisms = plan, dict(bins), mechanisms

    def parts(self, batch: EvalBatch, scored: BoolArray) -> Mapping[str, BoolArray]:
        """Masks [R, T]: `whole` of a cell, `early` for what is read again, `late` behind the middle."""
        position = np.arange(scored.shape[1])
        is_half = self.condition in {one.name for one in HALVES}
        is_cell = not is_half and not self.condition.startswith(repeated_name(LIVE.name))
        found = {WHOLE: scored} if is_cell else {}
        if self.plan.middle and not is_half:
            found[_EARLY] = scored & self.plan.early[batch.index][:, None] & (position < self.plan.middle)
        if self.plan.middle and (is_half or self.condition == LIVE.name):
            found[_LATE] = scored & self.plan.late[batch.index][:, None] & (position >= self.plan.middle)
        split = WHOLE if is_cell else _LATE
        binned = {
            _part(split, name): found[split] & (position >= start) & (position < end)
            for name, (start, end) in self.bins.items()
            if split in found
        }
        return found | binned


def _compared(
    mechanisms: Sequence[str], accumulators: Mapping[str, Accumulator]
) -> dict[str, list[tuple[int, Accumulator]]]:
    """Cells by component, with their signs."""
    live, still = accumulators[LIVE.name], accumulators[FROZEN.name]
    alone = {name: frozen(name).name for name in mechanisms if frozen(name).name in accumulators}
    found = {name: [(1, live), (-1, accumulators[cell])] for name, cell in alone.items()}
    found[{1: mechanisms[0], 2: BOTH}.get(len(mechanisms), "all")] = [(1, live), (-1, still)]
    if len(mechanisms) == 2 == len(alone):
        parts = [(-1, accumulators[cell]) for cell in alone.values()]
        found[INTERACTION] = [(1, live), *parts, (1, still)]
    return found


def _place(statistic: str, component: str, position: str) -> Place:
    return Place(statistic + (_BY_POSITION if position else ""), component=component, position=position)


def _part(part: str, position: str) -> str:
    return f"{part}.{position}" if position else part


def _undecidable(findings: Sequence[Finding], still: set[Place]) -> str:
    """Why no row of this model can be believed; "" when they can."""
    if Place(STATE, component=SWAPPED.name) in still and Place(STATE, component=RESET.name) not in still:
        return SHARED
    for finding in findings:
        row = finding.measurement
        if row.place.statistic == CONTROL and not abs(row.estimate.value) <= GAP:
            return (
                f"to stop in the middle and go on changes the loss by {row.estimate.value:+.3g} nats: the state does "
                "not hold all that the model carries, or sequences of a batch act on each other"
            )
    return ""


def _decided(finding: Finding, blown: str, nowhere: str, still: set[Place]) -> Finding:
    row = finding.measurement
    statistic, others = row.place.statistic, row.place.component in (SWAPPED.name, MEAN_STATE.name)
    if row.override is not None:
        return finding
    if statistic == CONTROL:
        return overridden(finding, Verdict.INCONCLUSIVE, "a control, 0 but for rounding: decides nothing")
    if blown:
        return overridden(finding, Verdict.DIVERGED, blown)
    if row.place in still or (nowhere == SHARED and others):
        reason = nowhere if others and nowhere else _nothing(row.place)
        return overridden(finding, Verdict.NO_SIGNAL, reason)
    if nowhere:
        return overridden(finding, Verdict.INCONCLUSIVE, nowhere)
    if row.place.component == INTERACTION:
        return finding  # neither direction is better
    return directed(finding, may_collapse=statistic.startswith(CHANGE))


def _nothing(place: Place) -> str:
    if place.statistic.startswith(STATE):
        return "the fast weights of the middle change no loss after it"
    what = (
        "the writes together change" if place.component == BOTH else f"what {place.component} writes changes"
    )
    return f"{what} no loss"
