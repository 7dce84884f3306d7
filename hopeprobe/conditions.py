"""Conditions: how a model is run while probes look on, live or with something in it changed.

A condition is hooks that edit, a way to run a batch, or both, and a measurement that has to come first. One
pass under a condition serves all probes that ask for it; they ask for the same object, and the name is what
results show. Everything that a condition needs of the model it asks of the `Subject`, so that a mechanism
which is not there makes rows `n/a` (`MissingCapability`), never a pass with nothing changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from hopeprobe.subject import Subject, WindowLosses
    from hopeprobe.tokens import EvalBatch, EvalWindows

HookRequests: TypeAlias = "Sequence[tuple[Any, Callable[..., Any]]]"
"""Pairs (selector, fn) as `Hooked.hooks` takes them."""


@dataclass(frozen=True, eq=False)
class Condition:
    """How to run a model. Two conditions are the same only when they are one object.

    Functions use the subject that they are given, which may be a replica, and keep nothing from one batch to
    the next: batches may be run in any order, or side by side.

    Attributes:
        name: the `condition` column of results; different conditions of one analysis have different names.
        hooks: `hooks(subject, prepared, batch)` gives the forward hooks of one batch; it is called anew for
            every batch, so that a hook may count its firings from the window's start. Every one of them must
            fire, or the pass is no measurement.
        run: `run(subject, prepared, batch)` scores one batch, losses and scored [R, L] as `Subject.run`; None
            runs it from a fresh state.
        prepare: `prepare(subject, windows)` measures what must be known before the pass; its result is the
            `prepared` above, None without. Done once for a model, also where several conditions name the same
            function.
        batch: rows at a time where rows of a batch act on each other; results must not depend on the batch
            size that a person chose. None: theirs.
        exact: whether windows in which a rounding could have turned a gate (`Subject.doubts`) are run again in
            float64 (`Subject.exact`) where the model can, so that neither batches nor threads choose what is written.
            Probes may read points that fire every tick then, whole, and no others.

    """

    name: str
    hooks: Callable[[Subject, Any, EvalBatch], HookRequests] | None = None
    run: Callable[[Subject, Any, EvalBatch], WindowLosses] | None = None
    prepare: Callable[[Subject, EvalWindows], Any] | None = None
    batch: int | None = None
    exact: bool = False

    def windows(self, windows: EvalWindows) -> EvalWindows:
        """Draw the windows in this condition's batches."""
        return windows if self.batch is None else windows.with_batch(self.batch)


LIVE = Condition("live")
"""The model as it is."""


def frozen(mechanism: str | None = None) -> Condition:
    """All write gates closed, or those of one mechanism (`selfmod`, `cms`, `cms.fast`): "cms-frozen".

    The same object every time, so that probes share its pass. A name that the model does not have raises
    MissingCapability when it is run.
    """
    return _frozen(mechanism)


@functools.cache  # called with one argument always: to the cache, f() and f(None) are two calls
def _frozen(mechanism: str | None) -> Condition:
    name = "frozen" if mechanism is None else f"{mechanism}-frozen"
    return Condition(name, hooks=lambda subject, _prepared, _batch: subject.freeze_hooks(mechanism))


FROZEN = frozen()
"""Every write gate closed."""


def as_tensors(batch: EvalBatch) -> tuple[Tensor, Tensor]:
    """Tokens [R, L + 1] and lengths [R] of a batch, as `Subject.run` takes them."""
    import torch

    return torch.from_numpy(batch.tokens), torch.from_numpy(batch.lengths)
