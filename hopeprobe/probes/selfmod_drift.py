"""Movement of the self-modifying memories' parameters from their own initialisation: which, how far, when.

Each parameter of each layer (k.w1, eta.skip, conv, …), each memory over all layers, and all of them as one:
`distance_from_init`, `displacement`, `settled_step`, `moved_by_step_200`; definitions, nulls and verdicts are those
of `movement.py`. Layer and component say which; a memory over all layers has no layer.

The weights measured here are the slow ones, which the optimiser trains; what a memory writes while it reads is
not in them.

Reading. A distance near the range of `fresh-init` is that of another initialisation: the trained weights were not
loaded, or the start is not this run's. Where parameters settle within a few steps, `learning-signal` says whether the
loss still reaches them.

Fails. A distance says how far weights went, not whether that helped, which is `adaptation`'s to say; weight decay
alone moves them too.

Cost: no pass; K + 1 = 6 initial models, and each earlier checkpoint of the run is read once.

Source: "Dissecting HOPE", section 4.3, which follows 84 parameters and finds drift of 13 in the large
projections, flat from step 200. 13.06 = √(2d/3) is the distance between two initialisations at d = 256: weights
that were never loaded, set against another seed, have it from the first checkpoint on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .base import Probe
from .movement import DISTANCES, TIMES, Part, Weights, gathered, located, movement_rows, not_applicable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hopeprobe.conditions import Condition
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalWindows

    from .base import Finding, Measurement

MECHANISM = "selfmod"
ALL = "all"


def parts_of(names: Iterable[str]) -> list[Part]:
    """Each parameter by layer, then each memory over all layers, then all as one.

    >>> [part[:2] for part in parts_of(["blocks.0.selfmod.memories.k.w1", "blocks.0.selfmod.memories.k.w2"])]
    [(0, 'k.w1'), (0, 'k.w2'), (None, 'k'), (None, 'all')]
    """
    names = list(names)
    places = [(name, *located(name, MECHANISM)) for name in names]
    return [
        *gathered((layer, component, name) for name, layer, component in places),
        *gathered(
            (None, component.split(".")[0], name) for name, layer, component in places if layer is not None
        ),
        Part(None, ALL, tuple(names)),
    ]


class SelfModDrift(Probe):
    """Movement of the self-modifying memories' slow weights; definitions at the top of this file."""

    name: ClassVar[str] = "selfmod-drift"
    question: ClassVar[str] = (
        "Which of the memories' parameters moved from their own initialisation, and when?"
    )
    statistics: ClassVar[tuple[str, ...]] = (*DISTANCES, *TIMES)

    def applies(self, subject: Subject) -> str | None:
        """None, or that the model has no such layers."""
        return (
            None if subject.parameter_groups().get(MECHANISM) else "this model has no self-modifying memories"
        )

    def conditions(self, subject: Subject) -> Sequence[Condition]:  # noqa: ARG002
        """No pass: weights alone."""
        return ()

    def of_model(
        self,
        subject: Subject,
        initial: Subject | None,
        windows: EvalWindows,  # noqa: ARG002
    ) -> Sequence[Measurement | Finding]:
        """All rows."""
        if initial is None:
            return not_applicable(self.statistics, "the run's own initial weights are not known")
        return movement_rows(Weights(subject, initial), parts_of(subject.parameter_groups()[MECHANISM]))
