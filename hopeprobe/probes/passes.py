"""One pass over the data that feeds all probes at once.

Hook points are cached a batch at a time and let go once every probe has read them: memory is that of one
batch, whatever the number of tokens. A probe that cannot be measured falls out alone, with the reason; the
others go on.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hopeprobe.errors import HopeprobeError, MeasurementError
from hopeprobe.hooks import ActivationCache, resolve
from hopeprobe.subject import MissingCapability

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from hopeprobe.probes.base import Accumulator, Probe
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalBatch, EvalWindows


@dataclass
class Pass:
    """What one pass gave: an accumulator for each probe that ran through, a reason for each that did not."""

    accumulators: dict[str, Accumulator] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run_pass(
    subject: Subject,
    windows: EvalWindows,
    probes: Sequence[Probe],
    condition: str,
    on_batch: Callable[[int, int], None] | None = None,
) -> Pass:
    """Run the model over `windows` once and feed every probe.

    condition: "live", or "frozen" for all write gates closed. on_batch: called with the batches done and in
    all. Raises MissingCapability when the model cannot be run so at all (no write gates to close).
    """
    import torch

    freeze = list(subject.freeze_hooks()) if condition == "frozen" else []
    result, names = Pass(), dict[str, list[str]]()
    points = subject.module.hook_dict
    for probe in probes:
        try:
            names[probe.name] = resolve(points, hooks) if (hooks := probe.hooks(subject)) else []
            result.accumulators[probe.name] = probe.accumulator(subject, condition)
        except HopeprobeError as error:
            _drop(result, probe.name, str(error))
    closed: Counter[str] = Counter()
    fired: set[str] = set()
    could_write = False
    for done, batch in enumerate(windows):
        if not result.accumulators:
            break
        wanted = sorted({name for probe in result.accumulators for name in names[probe]})
        # Whether a point fired is checked for each probe below: one that did not must not take others along.
        try:
            with ExitStack() as stack:
                handle = stack.enter_context(subject.module.hooks(freeze, allow_unfired=True))
                cache = (
                    stack.enter_context(subject.module.caching(wanted, allow_unfired=True))
                    if wanted
                    else ActivationCache(())
                )
                out = subject.run(torch.from_numpy(batch.tokens), torch.from_numpy(batch.lengths))
        except MissingCapability:
            raise
        except MeasurementError as error:
            for name in list(result.accumulators):
                _drop(result, name, str(error))
            break
        closed.update(handle.fired)
        could_write |= batch.tokens.shape[1] > subject.tick
        fired |= set(cache)
        for name in list(result.accumulators):
            silent = [n for n in names[name] if n not in cache and points[n].spec.cadence == "tick"]
            _feed(result, name, silent, cache, (out.losses, out.scored), batch)
        if on_batch is not None:
            on_batch(done + 1, len(windows))
    for name in list(result.accumulators):
        silent = [n for n in names[name] if n not in fired]
        if silent:
            _drop(result, name, _never_fired(silent))
    unclosed = [name for name, count in closed.items() if not count]
    if unclosed and could_write:
        for name in list(result.accumulators):
            _drop(result, name, f"the model was not frozen: {_never_fired(unclosed)}")
    return result


def _feed(
    result: Pass,
    name: str,
    silent: Sequence[str],
    cache: Mapping[str, Tensor],
    scores: tuple[Tensor, Tensor],
    batch: EvalBatch,
) -> None:
    if silent:
        _drop(result, name, _never_fired(silent))
        return
    try:
        result.accumulators[name].update(cache, *scores, batch)
    except MeasurementError as error:
        _drop(result, name, str(error))


def _drop(result: Pass, name: str, reason: str) -> None:
    result.accumulators.pop(name, None)
    result.failed[name] = reason


def _never_fired(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"hooks never fired, so nothing was measured there: {shown}"
