"""How far do fast weights move from meta weights as a text is read? Drift and norm, writes and decay, what it changes.

For each layer and each memory □ of it (`selfmod.k`, …) or CMS level (`cms.fast`), all its matrices as one vector θ,
after p tokens of a window; p up to 8 equally spaced multiples of the least common multiple of all write periods, where
everything that was read is written:

    relative_drift     ‖θ_fast − θ_meta‖ / ‖θ_meta‖                                              [0, ∞)
    fast_meta_cosine   ⟨θ_fast, θ_meta⟩ / (‖θ_fast‖ ‖θ_meta‖)                                     [−1, 1]
    norm_ratio         ‖θ_fast‖ / ‖θ_meta‖                                                        [0, ∞)

Decay keeps Γ of what it acts on, and the drift splits exactly into what decay did and what writes left:

    Γ = Π_{t<p} (1 − g_t (1 − α_t))        θ_fast − θ_meta = (Γ − 1)(θ_meta − θ*) + surviving writes
    retention          Γ, for the memories of a layer together                                   [0, 1]
    decay_part         ‖(Γ − 1)(θ_meta − θ*)‖ / ‖θ_meta‖                                         [0, ∞)
    write_part         ‖surviving writes‖ / ‖θ_meta‖                                             [0, ∞)
    half_life          ln 2 / −mean_t ln α_t over all scored tokens, before the gate             tokens

θ* is what the model declares: its meta weights (decay_part is then 0: all drift is writes) or zero. What does not
decay, as CMS levels, has no such rows. In the tick of C tokens after p, as `meta_fast_outputs.py` reads it:

    output_divergence  mean_t ‖y_fast,t − y_meta,t‖ / ‖y_meta,t‖ of a layer's memories together, or of what a level
                       adds, both weights at the same inputs                                     [0, ∞)
    logit_kl           mean_t KL(p_live ‖ p_reset), p_reset with all fast weights at meta for this tick   nats

Units: "1" but for the last two named. Each window is one value and counts once, and n_tokens counts windows; for
half_life, output_divergence and logit_kl it counts tokens. Smallest effects: 0.05 of ‖θ_meta‖ (an untrained model's
norms stay within that of 1) and of a cosine, a retention or an output; 0.05 of the context for half_life; 0.01 nats.
Fast weights are shown rounded to their number format: drift under its resolution, 6e-8 in float32, is not told from 0.

Nulls: own-init and fresh-init; for output_divergence and logit_kl on samples as `sample.py` says.

Verdicts. Of a memory, or of what it is part of: `diverged` where fast weights, or losses up to there, are not finite,
or the interval of norm_ratio lies above 2; `collapsed` where it lies below 0.5: decay towards zero gives a drift of 1,
which says that nothing is left, not that anything was learned; `no-signal` where the drift is 0 at every position,
never written, and for outputs that are those of meta weights. Only then the rule. Windows of which different text was
written, with one and the same fast weights, are an error, and no measurement.

Reading. Drift beside norm ratio: a drift of 1 with a ratio of 0 is a memory that is gone, one with a ratio near 1 is
one that turned. `decay_part` and `write_part` say which of the two did it, `logit_kl` whether any of it reaches the
prediction.

Fails. How far weights move says nothing of what for: only `adaptation` asks for the loss. Decay and writes are split
by the rule that the model declares; a model that declares another than it follows is measured wrongly.

Cost: in the live pass, fast weights are assembled in the ticks that end at the positions, and nowhere else. Outputs are
read in one window for each group of documents, 40 full windows at most: as many tokens read live as that, and three
readings at each position; the same for the initial model, and 8 windows for each of 4 fresh ones.

Source: "Dissecting HOPE", section 4.3, which reports a relative drift of 1.0 and takes it for adaptation. With the
published rule fast weights keep 2e-5 of their norm after 16 tokens: the drift of 1.0 is that of weights that are gone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from hopeprobe.stats import Verdict
from hopeprobe.subject import MissingCapability

from .base import Accumulator, Finding, Measurement, Place, Probe, value_without_tokens
from .meta_fast_memories import memories_of, positions_of, reducers_of
from .meta_fast_moments import DECAY, PARTS, RATIOS, FastMoments
from .meta_fast_outputs import KINDS, read_outputs
from .sample import findings, sampled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalWindows

MOST, LEAST = 2.0, 0.5  # norm ratios of fast weights that work (design, section 3)
OUTPUT_WINDOWS = 40
_BATCH = 8


class MetaFast(Probe):
    """Fast weights against meta weights; definitions at the top of this file."""

    name: ClassVar[str] = "meta-fast"
    question: ClassVar[str] = (
        "How far do fast weights move from their meta weights, by writing or by decay, and what does it change?"
    )
    statistics: ClassVar[tuple[str, ...]] = (*RATIOS, *PARTS, *DECAY, *KINDS)

    def applies(self, subject: Subject) -> str | None:
        """None, or that there is nothing that writes, or never all of it at once within a context."""
        if not subject.write_periods():
            return "nothing in this model writes"
        if not memories_of(subject):
            return "this model has no fast weights"
        if not positions_of(subject):
            period = math.lcm(*subject.write_periods().values())
            return f"all is written only every {period} tokens, and a context has {subject.context}"
        return None

    def hooks(self, subject: Subject) -> list[str]:
        """Retention of every layer, and every write gate."""
        memories = memories_of(subject)
        alphas = (f"{memory.mechanism}.hook_alpha" for memory in memories if memory.mechanism)
        return list(dict.fromkeys([*alphas, *(memory.gate for memory in memories if memory.gate)]))

    def reducers(self, subject: Subject) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Fast weights of every memory and level."""
        return reducers_of(memories_of(subject))

    def positions(self, subject: Subject, windows: EvalWindows) -> Sequence[int]:  # noqa: ARG002
        """Up to 8, equally spaced."""
        return positions_of(subject)

    def accumulator(self, subject: Subject, condition: str, windows: EvalWindows) -> Accumulator:  # noqa: ARG002
        """Make an empty accumulator."""
        return FastMoments(condition, memories_of(subject), positions_of(subject), subject.context)

    def of_model(
        self, subject: Subject, initial: Subject | None, windows: EvalWindows
    ) -> Sequence[Measurement | Finding]:
        """What fast weights change in outputs and logits, on a sample of windows."""
        last = positions_of(subject)[-1] + subject.tick
        try:
            batches = sampled(windows, last, _BATCH, OUTPUT_WINDOWS * windows.context)
            here = read_outputs(subject, batches)
        except MissingCapability as error:
            return _not_applicable(KINDS, str(error))
        missing = [name for name in KINDS if name not in {place.statistic for place in here}]
        why = "no window has a tick after a position at which all is written"
        if here:
            why = "no mechanism shows both what it reads and what it gives"
        return [
            *findings(here, KINDS, subject, initial, batches, read_outputs),
            *_not_applicable(missing, why),
        ]

    def review(self, subject: Subject, findings: Sequence[Finding]) -> Sequence[Finding]:
        """Diverged, collapsed and never written memories take along every row that they have part in."""
        resolution, fates = _resolution(subject), list[Fate]()
        for memory in memories_of(subject):
            where = (memory.layer, memory.component)
            rows = [f.measurement for f in findings if f.measurement.place[1:3] == where]
            if verdict := _verdict(rows, resolution):
                fates.append(Fate(*where, *verdict))
            elif rows:
                fates.append(Fate(*where, None, ""))
        return [_fated(finding, fates) for finding in findings]


class Fate(NamedTuple):
    """What became of one memory; no verdict where the rule may decide."""

    layer: int | None
    component: str
    verdict: Verdict | None
    why: str

    def shares(self, place: Place) -> bool:
        """Whether a row is of this memory, of what it is part of, or of the whole model."""
        if place.component == "":
            return place.layer is None
        return place.layer == self.layer and f"{self.component}.".startswith(f"{place.component}.")


def _verdict(rows: Sequence[Measurement], resolution: float) -> tuple[Verdict, str] | None:
    """What the rule has not to decide, of all rows of one memory, and why."""
    for row in rows:
        if row.override is Verdict.DIVERGED:
            return (
                Verdict.DIVERGED,
                f"fast weights, or losses, are not finite after {row.place.position} tokens",
            )
    sizes = {row.place.position: row.estimate for row in rows if row.place.statistic == "norm_ratio"}
    for position, size in sizes.items():
        if size.ci_low > MOST:
            return Verdict.DIVERGED, (
                f"after {position} tokens fast weights are {size.value:.3g} times as large as meta weights: over "
                f"{MOST:g} they are taken to have diverged"
            )
    for position, size in sizes.items():
        if size.ci_high < LEAST:
            return Verdict.COLLAPSED, (
                f"after {position} tokens {size.value:.2g} of the norm of the meta weights is left: under {LEAST:g} "
                "fast weights are taken to have collapsed, which is no adaptation however far they moved"
            )
    drift = [row.estimate.plug_in for row in rows if row.place.statistic == "relative_drift"]
    if drift and max(drift) == 0:
        return (
            Verdict.NO_SIGNAL,
            "never written: at every position fast weights are the meta weights to the last bit",
        )
    if drift and max(drift) <= resolution:
        return Verdict.NO_SIGNAL, (
            f"never written, as far as can be seen: the drift is under {resolution:.2g}, to which weights are rounded"
        )
    return None


def _fated(finding: Finding, fates: Iterable[Fate]) -> Finding:
    """The finding with the worst of the verdicts of all memories that have part in it."""
    row, place = finding.measurement, finding.measurement.place
    if row.override is Verdict.NOT_APPLICABLE:
        return finding
    sharing = [fate for fate in fates if fate.shares(place)]
    for verdict in (Verdict.DIVERGED, Verdict.COLLAPSED, Verdict.NO_SIGNAL):
        bad = [fate for fate in sharing if fate.verdict is verdict]
        if bad and (verdict is not Verdict.NO_SIGNAL or len(bad) == len(sharing)):
            first, *others = bad
            whose = (
                "" if place.component == first.component else f"{first.component} of layer {first.layer}: "
            )
            more = f" (and {len(others)} more)" if others else ""
            return _overridden(finding, verdict, f"{whose}{first.why}{more}")
    if place.statistic in KINDS and row.estimate.plug_in == 0:
        return _overridden(finding, Verdict.NO_SIGNAL, "to the last bit what meta weights give")
    return finding


def _overridden(finding: Finding, verdict: Verdict, why: str) -> Finding:
    note = "; ".join(filter(None, (finding.note, why)))
    return dataclasses.replace(finding, override=verdict, note=note)


def _resolution(subject: Subject) -> float:
    """Relative: half the distance between neighbouring numbers of the format."""
    import torch

    return float(torch.finfo(getattr(torch, subject.dtype)).eps) / 2


def _not_applicable(names: Iterable[str], why: str) -> list[Measurement]:
    nothing, verdict = value_without_tokens(math.nan), Verdict.NOT_APPLICABLE
    return [Measurement(Place(name), "live", "", nothing, override=verdict, note=why) for name in names]
