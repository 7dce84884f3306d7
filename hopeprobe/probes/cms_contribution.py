"""What does each level of the CMS buy? Loss with what a level adds replaced by its mean, alone and with another.

A level ℓ adds Δ_ℓ,t to the residual stream at token t. Ablated, it adds in every layer the mean of Δ_ℓ over all
scored tokens of the live model, one vector a layer: what it adds to any text stays, what it says about this token
goes. L is the mean loss live, L_a and L_ab those with a ablated, with a and b both; nats a token, on the same tokens:

    loss_change   a, b     L − L_a              negative: the loss is lower for the level
                  a+b      L − L_ab             for both
    redundancy    a+b      L_ab − L_a − L_b + L     positive: they stand in for each other, both together are worth
                                                    more than one alone and the other alone; negative: each needs
                                                    the other; 0: what they buy adds up
    loss          live, and under each ablation, to be read beside the differences

A level is ablated in all layers at once; each layer alone would take as many passes as there are layers and levels.
The mean is a constant to the inner gradient: an ablated level writes nothing, and the others get their gradient
without what would have come through it. So the row says what the whole level buys, its meta weights and its writes;
what its writes alone buy is `adaptation`'s.

Nulls: own-init and fresh-init of the same difference. Smallest effect, 0.01 nats, and verdicts: `effects.py`; where
ablation changes no loss there is `no-signal`. The redundancy is as undecided as what the pair buys. A model with one
level has no pair: `n/a`.

Reading. A negative `loss_change` of a level is what the loss gains by it; a positive redundancy, that one would do
for both. Levels that are alike (`cms-similarity`) and not redundant here add to each other.

Fails. A mean in the place of an activation is a state that the model never met: a large change can be that shock, and
not what the level knew. Small differences of large losses need many documents: see `min_detectable`.

Cost: a pass live, a pass for the means, a pass for each level and each pair of levels; as many for the initial model
and, on 4,096 tokens, for each fresh one. Memory: 64·8·d bytes a layer and level. Source: "Dissecting HOPE", section
4.2, which calls levels redundant because their outputs are alike, and 4.1, which trains without any.
"""

from __future__ import annotations

import functools
import itertools
import math
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from hopeprobe import ranks
from hopeprobe.conditions import LIVE, Condition, as_tensors
from hopeprobe.stats import GroupedMean, Verdict
from hopeprobe.stats.arrays import as_bool

from .base import Accumulator, Measurement, Place, Probe, value_without_tokens
from .cms_similarity import finite_vectors, levels_of
from .effects import EFFECT, WHOLE, PartLosses, contrast, directed, diverged, joint, overridden, unchanged
from .workers import replicas, side_by_side

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from hopeprobe.conditions import HookRequests
    from hopeprobe.hooks import ActivationCache, HookPoint
    from hopeprobe.stats.arrays import FloatArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalBatch, EvalWindows

    from .base import Finding, Quantity

CHANGE, REDUNDANCY = "loss_change", "redundancy"

_ABLATED = "ablated:"


def level_names(subject: Subject) -> tuple[str, ...]:
    """Levels of all layers, in the model's order."""
    of_layers = levels_of(subject.module.hook_dict).values()
    return tuple(dict.fromkeys(name for names in of_layers for name in names))


def mean_deltas(subject: Subject, windows: EvalWindows) -> dict[str, FloatArray]:
    """What each level adds on average over the scored tokens, live: hook point → float64 [d].

    Raises MeasurementError for what is not finite, and where a level's point does not fire.
    """
    names = [
        _point(layer, level) for layer, of in levels_of(subject.module.hook_dict).items() for level in of
    ]

    def run(one: Subject, batch: EvalBatch) -> tuple[Tensor, ActivationCache]:
        with one.module.caching(names) as cache:
            scored = one.run(*as_tensors(batch)).scored
        return scored, cache

    workers = replicas(subject, windows.n_windows)
    own = ranks.shared(windows.shared_by(ranks.on_first(lambda: len(workers))))

    def gather() -> dict[str, GroupedMean]:
        means: dict[str, GroupedMean] = {}
        for batch, (scored, cache) in side_by_side(run, workers, own):
            for name in names:
                mask = as_bool(scored)
                delta = finite_vectors(cache, name, mask)
                mean = means.setdefault(name, GroupedMean((delta.shape[-1],)))
                mean.update(delta, mask, batch.group)
        return means

    means = ranks.folded(gather, _merged)
    return {name: mean.compute().pooled().mean()[0] for name, mean in means.items()}


def _merged(means: dict[str, GroupedMean], others: dict[str, GroupedMean]) -> dict[str, GroupedMean]:
    for name, mean in others.items():  # those of a rank that had no windows are not there
        means[name].merge(mean)
    return means


@functools.cache
def ablated(levels: tuple[str, ...]) -> Condition:
    """Levels that add their mean, in all layers: "ablated:fast+slow"."""
    return Condition(_ABLATED + "+".join(levels), hooks=partial(_ablating, levels), prepare=mean_deltas)


def _ablating(
    levels: tuple[str, ...],
    subject: Subject,
    means: Mapping[str, FloatArray],
    _batch: EvalBatch,
) -> HookRequests:
    import torch

    def constant(delta: Tensor, hook: HookPoint) -> Tensor:
        return torch.from_numpy(means[hook.name]).to(delta).expand_as(delta)

    of_layers = levels_of(subject.module.hook_dict).items()
    return [(_point(i, level), constant) for i, names in of_layers for level in names if level in levels]


def _point(layer: int, level: str) -> str:
    return f"blocks.{layer}.cms.{level}.hook_delta"


class CMSContribution(Probe):
    """What levels of the continuum memory change in the loss; definitions at the top of this file."""

    name: ClassVar[str] = "cms-contribution"
    question: ClassVar[str] = "What does each level of the CMS buy?"
    statistics: ClassVar[tuple[str, ...]] = (CHANGE, REDUNDANCY)

    def applies(self, subject: Subject) -> str | None:
        """None, or that the model has no CMS, or none whose levels can be ablated."""
        points = subject.module.hook_dict
        names = [_point(layer, level) for layer, of in levels_of(points).items() for level in of]
        if fixed := [name for name in names if not points[name].spec.editable]:
            return f"levels cannot be ablated: {fixed[0]} may be watched, not replaced"
        return None if names else "this model has no CMS levels"

    def conditions(self, subject: Subject) -> Sequence[Condition]:
        """Live, each level ablated, each pair."""
        levels = level_names(subject)
        alone = [(name,) for name in levels]
        return [LIVE, *map(ablated, alone), *map(ablated, itertools.combinations(levels, 2))]

    def accumulator(self, subject: Subject, condition: str, windows: EvalWindows) -> Accumulator:  # noqa: ARG002
        """Make an empty accumulator of the loss."""
        return PartLosses(condition)

    def contrasts(self, accumulators: Mapping[str, Accumulator]) -> list[Quantity]:
        """What levels and pairs of levels change, and the redundancy of pairs."""
        live = accumulators[LIVE.name]
        without = {n.removeprefix(_ABLATED): one for n, one in accumulators.items() if n != LIVE.name}
        rows = []
        for component, one in without.items():
            rows += contrast(Place(CHANGE, component=component), WHOLE, [(1, live), (-1, one)])
        for component, one in without.items():
            if "+" in component:
                a, b = component.split("+")
                terms = [(1, one), (-1, without[a]), (-1, without[b]), (1, live)]
                rows += contrast(Place(REDUNDANCY, component=component), WHOLE, terms)
        return rows

    def of_model(
        self,
        subject: Subject,
        initial: Subject | None,  # noqa: ARG002
        windows: EvalWindows,  # noqa: ARG002
    ) -> list[Measurement]:
        """The redundancy of a model of one level, `n/a`."""
        levels, nothing = level_names(subject), value_without_tokens(math.nan)
        if len(levels) > 1:
            return []
        note = f"one level only ({levels[0]}): there is no pair"
        return [Measurement(Place(REDUNDANCY), "", "nats", nothing, EFFECT, Verdict.NOT_APPLICABLE, note)]

    def review(self, subject: Subject, findings: Sequence[Finding]) -> list[Finding]:
        """Set what the rule must not decide; see `effects.py`."""
        blown = diverged(subject, findings)
        decided = [_decided(finding, blown, unchanged(finding, subject)) for finding in findings]
        change = {
            f.measurement.place.component: f for f in decided if f.measurement.place.statistic == CHANGE
        }
        return [
            joint(f, change[pair], [change[level] for level in pair.split("+")])
            if f.measurement.place.statistic == REDUNDANCY and (pair := f.measurement.place.component)
            else f
            for f in decided
        ]


def _decided(finding: Finding, blown: str, still: bool) -> Finding:
    place = finding.measurement.place
    if finding.measurement.override is not None:
        return finding
    if blown:
        return overridden(finding, Verdict.DIVERGED, blown)
    if still and place.statistic == CHANGE:
        why = f"without what {place.component.replace('+', ' and ')} adds, no loss changes"
        return overridden(finding, Verdict.NO_SIGNAL, why)
    return directed(finding, may_collapse=True) if place.statistic == CHANGE else finding
