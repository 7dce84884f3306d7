"""Does the surprise gate select? How many tokens pass, over thresholds too, and which ones it keeps.

A token passes where g_t = 1. The gate in use is what `hook_gate` shows; a gate at threshold τ (nats) would be
g_t = [s_t > τ], s_t the token's loss. Over the scored tokens t, p the share that pass:

    pass_rate             p = mean_t g_t                                               "1", [0, 1]
    gate_entropy          −p log2 p − (1 − p) log2(1 − p)                              bits, [0, 1]
    surprisal_difference  mean of u_t over tokens kept, less that over tokens dropped  nats
    position_difference   the same of (t + ½)/L, L the tokens of the window            "1", (−1, 1)
    repeat_difference     the same of [the predicted token occurs earlier in its window]   "1", [−1, 1]
    selecting_loss        mean_t s_t · τ / q_05(s)                                     nats

Rate and entropy have the components "in use" and "tau=0.005" … "tau=50"; the others are of the gate in use. u_t is
the unigram surprisal of the token predicted at t (see `surprise`), t counts from 0 in each window. selecting_loss is
the mean loss at which the gate's own τ would drop 5 % of the tokens, if the distribution of the loss kept its shape
and only shrank or grew by one factor: q_05 is the loss that 5 % of the tokens lie at or below. Above today's mean
loss: the gate drops more than that already. τ is what `hook_gate` declares; a gate that declares none has no such
row. A descriptor: q_05 is within 0.1 % of an observed loss, there is no interval and no verdict.

Smallest effects: 0.05 of all tokens, 0.05 bits, 0.1 nats, 0.05 of the window, 0.05.

Nulls: own-init and fresh-init for all. `analytic` for rate and entropy: every token equally likely, so that all
losses are ln V and all tokens pass or none. `random-gate` for the differences: a gate that opens equally often at
random keeps tokens like those it drops, so 0; the note says on which side of the interval that lies. Where the
gates of initial models never close, differences have no other null, and the rule leaves them `inconclusive`.

Verdicts are the rule's, but a gate that passes every token, or none, is `no-signal`: it selects nothing, and what
it keeps and drops cannot be compared. Only the pass rate of a gate that never closes goes to the rule, which may find
it as it was at initialisation: in G groups of documents without a dropped token p is at least 0.05^(1/G), with 95 %
confidence and if groups drop all or nothing. That takes the 59 groups in which it is 0.95. A gate that is not 0 or
1, or is not what it declares, is not measured.

Reading. A rate of 1 is no gate. Where it selects, the differences say what it keeps, against a gate at random: rare
tokens, as a rule, since those surprise. `selecting_loss` beside the mean loss says how far training is from where
this threshold would begin to.

Fails. That a gate selects does not say that it selects well: `relative-surprise` asks what the loss gains. Rates over
thresholds are those of a gate that would not change what is written, and so the losses that follow.

Cost: one pass. Memory: 64 groups of some forty numbers. Source: "Dissecting HOPE", section 4.4, where all tokens
pass at every threshold in use, and its limitation (a), that lower losses could let the gate select.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from hopeprobe.errors import MeasurementError
from hopeprobe.stats import (
    GroupedCovariance,
    GroupedMean,
    GroupedMoments,
    Histogram,
    Verdict,
    as_float64,
)
from hopeprobe.stats.arrays import as_bool
from hopeprobe.stats.histogram import RESOLUTION

from .base import Accumulator, Finding, Measurement, NullValue, Place, Probe, Quantity, value_without_tokens
from .gate_rates import (
    AT,
    IN_USE,
    RATE_EFFECT,
    SHARE,
    OfEntropy,
    OfGate,
    gate_entropy,
    kept_less_dropped,
    pass_rate,
)
from .surprise import HOOK as SURPRISE_HOOK
from .surprise import checked_losses, descriptor, slack, surprisal_of, train_unigram, unigram_note

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from hopeprobe.stats.arrays import BoolArray, FloatArray, IntArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalBatch, EvalWindows, Unigram

    from .base import RowKey

HOOK = "hook_gate"
LADDER = (0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)  # nats
SELECTING = 0.05  # share of tokens dropped at which a gate counts as selecting

ENTROPY_EFFECT = 0.05  # bits
DIFFERENCES = {
    "surprisal_difference": ("nats", 0.1, (-math.inf, math.inf)),
    "position_difference": ("1", 0.05, (-1.0, 1.0)),
    "repeat_difference": ("1", 0.05, (-1.0, 1.0)),
}
"""Unit, smallest effect and range of what is compared between tokens kept and dropped."""

_Moments = TypeVar("_Moments", bound=GroupedMoments)
_SELECTING_LOSS = Place("selecting_loss", component=IN_USE)
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_RULE = re.compile(rf"g(?:_t)?\s*=\s*\[\s*s(?:_t)?\s*>\s*({_NUMBER})\s*\]")


def declared_threshold(subject: Subject) -> float | None:
    """Find τ, nats, in what `hook_gate` declares ("g_t = [s_t > 0.02]"); None for a rule of another kind."""
    found = _RULE.fullmatch(subject.module.hook_dict[HOOK].spec.equation.strip())
    return float(found[1]) if found else None


def earlier_in_window(tokens: IntArray) -> BoolArray:
    """Whether each predicted token, tokens[r, t + 1], is among tokens[r, 0 … t]: [R, L + 1] → bool [R, L]."""
    repeat = np.zeros(tokens.shape, dtype=np.bool_)
    for row, of_row in zip(tokens, repeat, strict=True):
        _, first, token = np.unique(row, return_index=True, return_inverse=True)
        of_row[:] = first[token] < np.arange(len(row))
    return repeat[:, 1:]


class GateSelectivity(Probe):
    """What the surprise gate lets pass; definitions at the top of this file."""

    name: ClassVar[str] = "gate-selectivity"
    question: ClassVar[str] = "Does the surprise gate select, and which tokens does it keep?"
    counts: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = (
        "pass_rate",
        "gate_entropy",
        *DIFFERENCES,
        "selecting_loss",
    )

    def applies(self, subject: Subject) -> str | None:
        """None, or that the model has no gate."""
        return None if HOOK in subject.module.hook_dict else "this model has no surprise gate"

    def hooks(self, subject: Subject) -> list[str]:
        """The gate, and the surprise that it should rest on where the model shows that."""
        return [name for name in (HOOK, SURPRISE_HOOK) if name in subject.module.hook_dict]

    def accumulator(self, subject: Subject, condition: str, windows: EvalWindows) -> Accumulator:
        """Make an empty accumulator; token frequencies are counted here."""
        threshold = declared_threshold(subject)
        return GateMoments(condition, threshold, train_unigram(subject, windows), unigram_note(windows))

    def reference_nulls(self, place: Place, subject: Subject, windows: EvalWindows) -> tuple[NullValue, ...]:  # noqa: ARG002
        """A model that guesses has losses of ln V; a gate at random keeps tokens like those it drops."""
        if place.statistic in DIFFERENCES:
            return (NullValue("random-gate", 0.0),)
        if place.statistic == "gate_entropy":
            return (NullValue("analytic", 0.0),)
        if place.statistic != "pass_rate":
            return ()
        threshold = declared_threshold(subject) if place.component == IN_USE else _threshold(place.component)
        passes = None if threshold is None else float(math.log(subject.vocab_size) > threshold)
        return () if passes is None else (NullValue("analytic", passes),)

    def review(self, subject: Subject, findings: Sequence[Finding]) -> Sequence[Finding]:  # noqa: ARG002
        """Say of each difference whether a random gate lies within its interval."""
        return [_beside_random(finding) for finding in findings]


class GateMoments(Accumulator):
    """Moments of the gate with what it may select by; pass rates over the ladder; a histogram of the loss."""

    def __init__(
        self, condition: str, threshold: float | None, unigram: Unigram | None, note: str = ""
    ) -> None:
        """threshold: τ as declared, nats. unigram: None makes its row `n/a`. note: what is to be said of it."""
        super().__init__(condition)
        self.threshold, self.unigram, self.note = threshold, unigram, note
        self.histogram = Histogram()

    def update(self, cache: Mapping[str, Tensor], losses: Tensor, scored: Tensor, batch: EvalBatch) -> None:
        """Add one batch; reads `hook_gate` and, if it is there, `hook_surprise`, [R, T].

        Raises MeasurementError as `checked_losses`, and for a gate that is not 0 or 1, or not what it declares.
        """
        mask = as_bool(scored)
        loss = checked_losses(cache, losses, mask)
        gate = self._gate(cache[HOOK], losses, loss, mask)
        position = (np.arange(loss.shape[1]) + 0.5) / np.maximum(batch.lengths, 1)[:, None]
        selects_by = surprisal_of(batch, self.unigram), position, earlier_in_window(batch.tokens)
        seen = np.stack([gate, *selects_by], axis=-1)
        self._of("gate", GroupedCovariance(1 + len(DIFFERENCES))).update(seen, mask, batch.group)
        self._of("ladder", GroupedMean((len(LADDER),))).update(loss[..., None] > LADDER, mask, batch.group)
        self._of("loss", GroupedMean()).update(loss, mask, batch.group)
        self.histogram.update(loss[mask])

    def _gate(self, shown: Tensor, losses: Tensor, loss: FloatArray, mask: BoolArray) -> FloatArray:
        gate, n = as_float64(shown), int(mask.sum())
        if gate.shape != loss.shape:
            raise MeasurementError(f"{HOOK} is {list(gate.shape)}, the losses are {list(loss.shape)}")
        gate = np.where(mask, gate, 0.0)
        if bad := int(((gate != 0) & (gate != 1)).sum()):
            raise MeasurementError(
                f"{HOOK} is neither 0 nor 1 at {bad} of {n} tokens: no token passes in part"
            )
        if self.threshold is not None:
            # A token as near to τ as rounding goes may fall on either side.
            clear = mask & (np.abs(loss - self.threshold) > slack(self.threshold, losses))
            if bad := int((clear & ((loss > self.threshold) != (gate == 1))).sum()):
                raise MeasurementError(
                    f"{HOOK} declares [s > {self.threshold:g}] and shows something else at {bad} of {n} tokens: "
                    "the model and its hook registry disagree"
                )
        return gate

    def _of(self, name: str, empty: _Moments) -> _Moments:
        found = self.moments.setdefault(name, empty)
        assert isinstance(found, type(empty))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Moments and the histogram."""
        return super().state_dict() | {"histogram": self.histogram}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace both."""
        super().load_state_dict(state)
        self.histogram = state["histogram"]

    def merge(self, other: Accumulator) -> None:
        """Add another's tokens, those of its histogram too."""
        super().merge(other)
        assert isinstance(other, GateMoments)
        self.histogram.merge(other.histogram)

    def quantities(self) -> list[Quantity]:
        """Rates and entropies of the gate in use and of the ladder, then what the gate in use selects by."""
        if not self.moments:
            return []
        gates = {IN_USE: ("gate", 0)} | {f"{AT}{tau:g}": ("ladder", k) for k, tau in enumerate(LADDER)}
        kinds = (
            (OfGate, "pass_rate", "1", pass_rate, RATE_EFFECT),
            (OfEntropy, "gate_entropy", "bits", gate_entropy, ENTROPY_EFFECT),
        )
        rows: list[Quantity] = []
        for (make, statistic, unit, function, effect), (component, (name, column)) in itertools.product(
            kinds, gates.items()
        ):
            place, sources = Place(statistic, component=component), partial(self._one, name)
            of = partial(function, column=column)
            rows.append(make(place, unit, of, sources, SHARE, effect, column=column))
        for k, (statistic, (unit, effect, bounds)) in enumerate(DIFFERENCES.items(), start=1):
            if statistic != "surprisal_difference" or self.unigram is not None:
                place = Place(statistic, component=IN_USE)
                compared = partial(kept_less_dropped, of=k)
                rows.append(OfGate(place, unit, compared, partial(self._one, "gate"), bounds, effect))
        return rows

    def remarks(self) -> Mapping[Place, tuple[Verdict | None, str]]:
        """`no-signal` where all or no tokens pass, and where too few are on one side for an interval."""
        found: dict[Place, tuple[Verdict | None, str]] = {}
        for row in self.quantities():
            assert isinstance(row, OfGate)
            verdict, why = row.indecision()
            beside_unigram = row.place.statistic == "surprisal_difference"
            found[row.place] = verdict, "; ".join(filter(None, (why, self.note if beside_unigram else "")))
        return found

    def measurements(self) -> list[Measurement]:
        """All rows: with intervals, without a unigram model, and the loss at which the gate would select."""
        rows = super().measurements()
        if rows and self.unigram is None:
            unit, effect, _ = DIFFERENCES["surprisal_difference"]
            rows.append(
                Measurement(
                    Place("surprisal_difference", component=IN_USE),
                    self.condition,
                    unit,
                    value_without_tokens(math.nan),
                    effect,
                    Verdict.NOT_APPLICABLE,
                    self.note,
                )
            )
        return [*rows, self._selecting_row()] if rows else []

    def plug_ins(self) -> dict[RowKey, float]:
        """Values of all rows without their intervals."""
        found = super().plug_ins()
        if found:
            found[self.condition, _SELECTING_LOSS] = self._selecting_loss()[0]
        return found

    def _selecting_row(self) -> Measurement:
        value, note = self._selecting_loss()
        return descriptor(_SELECTING_LOSS, self.condition, "nats", value, self.histogram.n, note)

    def _selecting_loss(self) -> tuple[float, str]:
        if self.threshold is None:
            return math.nan, f"{HOOK} declares no threshold on the loss"
        if self.threshold <= 0:
            return math.nan, f"no loss lies below a threshold of {self.threshold:g} nats"
        low = self.histogram.quantile(SELECTING)
        if low <= 0:
            return math.nan, f"{SELECTING:.0%} of the tokens have no loss at all"
        mean = float(self.moments["loss"].compute().pooled().mean()[0])
        value = mean * self.threshold / low
        return value, (
            f"the mean loss is {mean:.3g} nats, {SELECTING:.0%} of the tokens lie at or below {low:.3g}; within "
            f"{RESOLUTION:.1%}; a descriptor: no interval, so this decides nothing"
        )

    def _one(self, name: str) -> tuple[GroupedMoments]:
        return (self.moments[name],)


def _threshold(component: str) -> float:
    return float(component.removeprefix(AT))


def _beside_random(finding: Finding) -> Finding:
    row = finding.measurement
    if row.place.statistic not in DIFFERENCES or math.isnan(row.estimate.ci_low):
        return finding
    within = row.estimate.ci_low <= 0 <= row.estimate.ci_high
    note = (
        f"a gate that opens equally often at random gives 0, {'within' if within else 'outside'} the interval"
    )
    return replace(finding, note="; ".join(filter(None, (finding.note, note))))
