"""Probes: one question about a model each, one file each.

base            the interface: `Probe`, `Accumulator`, `Quantity`, `Measurement`
readings        what a probe reads of one batch: hook points, whole or reduced
one_batch       one batch of a pass, run for all probes
passes          one pass over the data, under one condition, that feeds all probes
measure         all conditions of one model, then what compares them
integrity       are these the trained weights?
effects         what a mechanism changes in the loss, and when that may be called help
middle          half of a window read, fast weights changed, and the rest read
series          a run's checkpoints: how far weights moved, and when they stopped
movement        rows about that
sample          a few windows, for what costs too much to measure on all
selfmod_drift   which of the memories' parameters moved, and when?
learning_signal which parameters does the loss reach at all?
cms_dynamics    how do levels move in training, and are they written when they are due?
cms_similarity  do levels repeat each other?
cms_contribution  what does each level of the CMS buy?
adaptation      which mechanism's writes help?
meta_fast       how far do fast weights move from meta weights, by writing or by decay, and what does it change?
surprise        how surprising is the text to the model, token by token?
gate_selectivity  does the surprise gate select, and which tokens does it keep?
relative_surprise  does any rule choose the tokens worth writing, better than chance?
gated           a model under another gate, and losses at equal write budgets
write_utility   what a write is worth, and which rules know
"""

from __future__ import annotations

from hopeprobe.errors import BadInputError, near_names

from .adaptation import Adaptation
from .base import Accumulator, Finding, Measurement, NullValue, Place, Probe, Quantity
from .cms_contribution import CMSContribution
from .cms_dynamics import CMSDynamics
from .cms_similarity import CMSSimilarity
from .gate_selectivity import GateSelectivity
from .integrity import Integrity
from .learning_signal import LearningSignal
from .meta_fast import MetaFast
from .relative_surprise import RelativeSurprise
from .selfmod_drift import SelfModDrift
from .surprise import Surprise

PROBES: dict[str, Probe] = {
    probe.name: probe
    for probe in (
        Integrity(),
        CMSSimilarity(),
        CMSDynamics(),
        CMSContribution(),
        SelfModDrift(),
        MetaFast(),
        Adaptation(),
        LearningSignal(),
        Surprise(),
        GateSelectivity(),
        RelativeSurprise(),
    )
}
"""Every probe, by name, in the order in which reports show them."""


def get_probe(name: str) -> Probe:
    """Find the probe called `name`. Raises BadInputError, with the nearest names, when there is none."""
    if name not in PROBES:
        known = ", ".join(PROBES)
        raise BadInputError(f"no probe is called {name!r}{near_names(name, PROBES)} (there are: {known})")
    return PROBES[name]


__all__ = [
    "PROBES",
    "Accumulator",
    "Finding",
    "Measurement",
    "NullValue",
    "Place",
    "Probe",
    "Quantity",
    "get_probe",
]
