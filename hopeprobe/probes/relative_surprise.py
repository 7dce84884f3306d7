"""Does any rule choose the tokens worth writing? Loss at equal write budgets, against a gate that opens at random.

For every rule that the model can be gated by (`Subject.gate_rules`), for the writes of each mechanism alone, the other
writing every token, and for all of them, at budgets of 50, 25, 10 and 5 % of the tokens:

    loss                  mean loss of the model gated so; "everything" is the budget of 100 %      nats, [0, ∞)
    written               the share of tokens that were written                                     "1", [0, 1]
    loss_difference       loss − loss of `random` with as much written; negative: the rule is better    nats
    area_difference       its mean over budgets from 5 to 100 %, by the trapezoidal rule            nats
    gate_entropy, surprisal_difference, position_difference, repeat_difference
                          of the rule that gates all writes: as in `gate-selectivity`
    overlap               share of the budget that two rules both write                             "1", [0, 1/budget]
    utility_correlation   within windows, rank correlation of score and write utility               "1", [−1, 1]
    oracle_difference     loss − loss of `random` where the tokens of highest utility are written   nats

`gated.py` defines budgets and the comparison at equal ones, `write_utility.py` the last three, which are measured on a
small sample. The utility of a write is what later tokens lose when it alone is left out.

Nulls: `random-gate`, 0 for every difference and correlation; own-init and fresh-init of the same statistic, as
writing the surprising tokens may help a model that learned nothing. Smallest effects: 0.01 nats, 0.05.

Every difference says beside its verdict whether the rule beats random: the interval's own test against 0, at a false
discovery rate of 5 % over all rules, budgets, mechanisms and areas of the checkpoint. `learned` takes that and the
rule of `hopeprobe.stats.verdict`: better than random, and by more than in untrained models. Where no gate changes any
loss nothing depends on what is written: `no-signal`.

Reading. `loss_difference` below 0 with "beats random" is a rule that knows something; `inconclusive` rows say what
difference would have been seen. Where the oracle gains and no rule's score goes with utility, there is something to
choose and nobody knows it.

Fails. A budget counts tokens, not what they write: a surprising token's gradient is larger, so that such a rule also
takes larger steps. The oracle takes tokens one at a time and knows the losses that it is measured by. Rules are tried
on a model that was trained with another gate.

Cost: as many passes as there are cells, 104 for a model with two mechanisms; as many for its initial weights, and on
1,024 tokens for fresh ones. So of more than 8,192 tokens the first are taken that fill a window for each group of
documents; `RelativeSurprise(all_tokens=True)` takes all. Memory: some numbers for each cell and group. Source:
"Dissecting HOPE", section 6, which asks for a relative surprise and measures none.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from scipy.special import stdtrit

from hopeprobe.conditions import LIVE, Condition
from hopeprobe.errors import BadInputError
from hopeprobe.stats import GROUPS, Verdict
from hopeprobe.stats.jackknife import p_value
from hopeprobe.stats.verdict import FALSE_DISCOVERY_RATE, POWER, benjamini_hochberg

from .base import Accumulator, NullValue, Place, Probe, Quantity
from .effects import EFFECT, LEVEL_NOTE, LOSS, PartLosses, directed, diverged, overridden, unchanged
from .gate_selectivity import DIFFERENCES
from .gated import (
    BUDGETS,
    EVERYTHING,
    RANDOM,
    WRITTEN,
    Cell,
    GatedLosses,
    all_of,
    area_weights,
    cells_of,
    condition,
    less_random,
    still,
    write_gates,
)
from .surprise import train_unigram, unigram_note
from .write_utility import CORRELATION, ORACLE, of_sample

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hopeprobe.stats import Estimate
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalWindows

    from .base import Finding

DIFFERENCE, AREA = "loss_difference", "area_difference"
COMPARED = (DIFFERENCE, AREA, ORACLE)
BEATS, LOSES, NOT_TOLD = "beats random", "loses to random", "not told from random"

MOST_TOKENS = 8192


class RelativeSurprise(Probe):
    """Rules at equal write budgets; definitions at the top of this file.

    Args:
        budgets: shares of tokens to write, falling, under 1.
        rules: beside `random`; None for all that the model has.
        sample: whether utility, oracle and overlap are measured too.
        all_tokens: whether all tokens are used, however many.

    Raises:
        BadInputError: budgets that do not fall from under 1.
    """

    name: ClassVar[str] = "relative-surprise"
    question: ClassVar[str] = "Does any rule choose the tokens worth writing, better than chance?"
    statistics: ClassVar[tuple[str, ...]] = (DIFFERENCE, AREA, ORACLE, CORRELATION)
    partial: ClassVar[bool] = True
    fresh_tokens: ClassVar[int | None] = 1024
    counts: ClassVar[bool] = True

    def __init__(
        self,
        budgets: Sequence[float] = BUDGETS,
        rules: Sequence[str] | None = None,
        sample: bool = True,
        all_tokens: bool = False,
    ) -> None:
        ends = [1.0, *budgets, 0.0]
        if not budgets or any(not high > low for high, low in itertools.pairwise(ends)):
            raise BadInputError(f"budgets are {tuple(budgets)}, must fall, from under 1 and to above 0")
        self.budgets = tuple(budgets)
        self.rules = None if rules is None else tuple(rules)
        self.sample, self.all_tokens = sample, all_tokens

    def applies(self, subject: Subject) -> str | None:
        """None, or that nothing is written. Raises MissingCapability for a gate that follows no other rule."""
        if not subject.write_periods():
            return "this model never writes"
        subject.gate_rules()
        return None

    def most_tokens(self, subject: Subject) -> int | None:
        """As many as asked for, or what fills a window for each group of documents, at least 8,192."""
        return None if self.all_tokens else max(MOST_TOKENS, GROUPS * subject.context)

    def conditions(self, subject: Subject) -> list[Condition]:
        """The model as it is, every cell, and what no budget is: nothing written."""
        cells = cells_of(subject, self.budgets, self.rules)
        mechanisms = dict.fromkeys(cell.writes for cell in cells)
        return [LIVE, *map(condition, cells), *map(still, mechanisms)]

    def hooks(self, subject: Subject) -> list[str]:
        """Every write gate."""
        return write_gates(subject, "all")

    def accumulator(self, subject: Subject, condition: str, windows: EvalWindows) -> Accumulator:
        """Make an empty accumulator of the cell that the condition is for."""
        cells = cells_of(subject, self.budgets, self.rules)
        named = {cell.name: cell for cell in cells}
        named |= {still(writes).name: Cell("nothing", writes, 0.0) for writes in {c.writes for c in cells}}
        if condition not in named:
            return PartLosses(condition)
        cell = named[condition]
        most = subject.gate_rules().get(cell.rule, ["all"])[-1]
        describes = cell.rule not in (EVERYTHING, "nothing") and cell.writes == most
        return GatedLosses(
            cell, write_gates(subject, cell.writes), train_unigram(subject, windows), describes=describes
        )

    def contrasts(self, accumulators: Mapping[str, Accumulator]) -> list[Quantity]:
        """Every rule at every budget, and over all of them, less what random has."""
        cells = {one.cell: one for one in accumulators.values() if isinstance(one, GatedLosses)}
        (everything,) = [one for cell, one in cells.items() if cell.rule == EVERYTHING]
        weights, rows = area_weights(self.budgets), []
        for writes in dict.fromkeys(cell.writes for cell in cells):
            nothing = cells[Cell("nothing", writes, 0.0)]
            of_random = [cells[Cell(RANDOM, writes, budget)] for budget in sorted(self.budgets)]
            # What everything wrote is the same for every mechanism.
            curve = [nothing, *of_random, everything]
            for rule in dict.fromkeys(cell.rule for cell in cells if cell.writes == writes):
                mine = [cells.get(Cell(rule, writes, budget)) for budget in self.budgets]
                found = [one for one in mine if one is not None]
                if rule in (RANDOM, EVERYTHING, "nothing") or len(found) < len(self.budgets):
                    continue
                rows += [_less_random(one.cell.place(DIFFERENCE), [1.0], [one], curve) for one in found]
                area = Place(AREA, component=rule, position=f"{self.budgets[-1]:.3g}-1")
                rows.append(_less_random(area, weights, found, curve))
        return rows

    def of_model(self, subject: Subject, initial: Subject | None, windows: EvalWindows) -> Sequence[Finding]:
        """What is measured on a sample."""
        return of_sample(subject, initial, windows, self.budgets) if self.sample else []

    def reference_nulls(self, place: Place, subject: Subject, windows: EvalWindows) -> tuple[NullValue, ...]:  # noqa: ARG002
        """A gate at random differs from itself by nothing, and keeps tokens like those it drops."""
        if place.statistic not in (DIFFERENCE, AREA, *DIFFERENCES):
            return ()
        note = unigram_note(windows) if place.component == "excess" else ""
        return (NullValue("random-gate", 0.0, note=note),)

    def review(self, subject: Subject, findings: Sequence[Finding]) -> list[Finding]:
        """Test every difference against random, and leave to the rule only what beats it."""
        blown = diverged(subject, findings)
        compared = [f for f in findings if f.measurement.place.statistic in COMPARED]
        p = np.array([_against_random(f.measurement.estimate) for f in compared])
        q = {id(f): float(value) for f, value in zip(compared, benjamini_hochberg(p), strict=True)}
        found = []
        for finding in findings:
            statistic = finding.measurement.place.statistic
            if id(finding) in q:
                found.append(_decided(finding, q[id(finding)], blown, subject))
            elif statistic in (LOSS, WRITTEN):
                found.append(overridden(finding, Verdict.INCONCLUSIVE, _level_note(finding)))
            else:
                found.append(finding)
        return found


def _less_random(
    place: Place, weights: Sequence[float], mine: Sequence[GatedLosses], curve: Sequence[GatedLosses]
) -> Quantity:
    function = functools.partial(less_random, tuple(weights), len(mine))
    sources = functools.partial(all_of, tuple(one.moments["loss"] for one in (*mine, *curve)))
    return Quantity(place, "nats", function, sources, smallest_effect=EFFECT, condition=mine[0].cell.writes)


def _against_random(estimate: Estimate) -> float:
    """P of a difference of 0; NaN where there is no interval."""
    return p_value(estimate) if math.isfinite(estimate.ci_low) else math.nan


def _decided(finding: Finding, q: float, blown: str, subject: Subject) -> Finding:
    estimate = finding.measurement.estimate
    if finding.measurement.override is not None:
        return finding
    if blown:
        return overridden(finding, Verdict.DIVERGED, blown)
    if unchanged(finding, subject):
        return overridden(finding, Verdict.NO_SIGNAL, "what is written changes no loss")
    if math.isnan(q):
        return finding
    if q > FALSE_DISCOVERY_RATE:
        size = float(stdtrit(estimate.df, 0.975) + stdtrit(estimate.df, POWER)) * estimate.se
        why = f"{NOT_TOLD} (q {q:.2g}): {size:.2g} nats would be, four times in five"
        return _said(finding, why)
    if estimate.value > 0:
        return _said(finding, f"{LOSES} (q {q:.2g})")
    note = "; ".join(filter(None, (finding.note, f"{BEATS} (q {q:.2g})")))
    return directed(dataclasses.replace(finding, note=note), may_collapse=False)


def _said(finding: Finding, why: str) -> Finding:
    """Nothing is learned that does not beat random; whether it is as at initialisation is the rule's to say."""
    start = finding.difference
    effect = finding.measurement.smallest_effect
    if (
        start is not None
        and math.isfinite(start.ci_low)
        and -effect <= start.ci_low
        and start.ci_high <= effect
    ):
        return dataclasses.replace(finding, note="; ".join(filter(None, (finding.note, why))))
    return overridden(finding, Verdict.INCONCLUSIVE, why)


def _level_note(finding: Finding) -> str:
    place = finding.measurement.place
    if place.statistic == WRITTEN and place.component not in (EVERYTHING, "nothing"):
        return f"what the rule wrote of a budget of {place.position}"
    return LEVEL_NOTE
