"""Probes inside a training loop: every N steps, on the same tokens, beside the weights that training began with.

    monitor = Monitor("cms-similarity", data="text.jsonl", every=100)
    train(config, train_config, tokens, folder, each_step=monitor)    # hopeprobe's own training: into metrics.jsonl

    with monitor.watching(subject, log="probes.jsonl") as watch:      # anybody else's
        for batch in loader:
            ...
            watch.step()

Measured is a copy of the model, so that training does not notice: not its hooks, its gradients, its mode, nor the
generators of random numbers. Without fresh re-initialisations no row is `learned`, and own-init, the weights at the
start, says how far a number has come; `hopeprobe.analyze` of a checkpoint has the whole of it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hopeprobe.analysis import analyze, chosen_probes
from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.files import advice, append_record
from hopeprobe.results import Address, Results, nan_to_null
from hopeprobe.subject import MissingCapability
from hopeprobe.tokens import TokenData, load_tokens

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from torch import Tensor
    from typing_extensions import Self

    from hopeprobe.probes.base import Probe
    from hopeprobe.subject import GateRule, Subject


class TrainingRun(Protocol):
    """What a training loop tells of itself."""

    step: int

    def subject(self) -> Subject:
        """The model as it is now, which what is done with the subject leaves alone."""


class Writer(Protocol):
    """What TensorBoard's `SummaryWriter` is, as far as it is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Keep a number of a step."""


class Monitor:
    """Chosen probes, the tokens they are measured on, and how often.

    Args:
        probes: as in `hopeprobe.analyze`.
        data: as there; loaded at the first measurement.
        tokens: how many are scored each time.
        every: steps between measurements.
        split: as in `hopeprobe.analyze`.
        gate: as there.
        batch: as there.
        writer: also told every number, by `add_scalar(tag, value, step)`, as TensorBoard's `SummaryWriter` is.
        cache_dir: as in `hopeprobe.analyze`.

    Raises:
        BadInputError: a probe that there is not, or `every` under 1.

    """

    def __init__(
        self,
        probes: str | Probe | Sequence[str | Probe] = ("cms-similarity",),
        data: str | Sequence[str] | TokenData = "builtin",
        tokens: int = 4096,
        every: int = 100,
        split: str = "heldout",
        gate: GateRule | None = None,
        batch: int | None = None,
        writer: Writer | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if every < 1:
            raise BadInputError(f"every is {every}, must be at least 1 step")
        self.probes = chosen_probes(probes)
        self.data, self.tokens, self.every, self.split = data, tokens, every, split
        self.gate, self.batch, self.writer, self.cache_dir = gate, batch, writer, cache_dir
        self.results, self.last = Results(), -1

    def __call__(self, run: TrainingRun) -> dict[str, Any] | None:
        """Measure a run where a measurement is due: what goes into the step's line of `metrics.jsonl`, or None."""
        return self.measure(run.subject(), run.step) if run.step % self.every == 0 else None

    def measure(self, subject: Subject, step: int) -> dict[str, Any]:
        """Measure now: {"probes": {address: numbers}} in plain data, and "missing" where there is something.

        Rows are added to `results` too, which holds those of the latest run. What could not be measured ends no
        training. Raises BadInputError where nothing could ever be: other tokens than the model's, hooks on the model.
        """
        if not isinstance(self.data, TokenData):
            self.data = load_tokens(self.data, tokenizer=subject.tokenizer, cache_dir=self.cache_dir)
        with _untouched():
            try:
                results = analyze(
                    subject, self.probes, self.data, self.tokens, self.split, batch=self.batch, gate=self.gate,
                    fresh=0, cache_dir=self.cache_dir, progress=silent,
                )  # fmt: skip
            except MeasurementError as error:
                return {"probes": {}, "missing": [str(error)]}
        if step <= self.last:  # another run, or this one from an earlier step
            self.results = Results()
        self.last = step
        self.results.extend(results)
        if self.writer is not None:
            for row in results.rows:
                if not math.isnan(row.value):
                    self.writer.add_scalar(str(Address.of(row)), row.value, step)
        nulls = results.nulls_by_row()
        numbers = {
            str(Address.of(row)): {
                "value": row.value,
                "ci_low": row.ci_low,
                "ci_high": row.ci_high,
                "own_init": nulls[row.key]["own-init"].value
                if "own-init" in nulls.get(row.key, {})
                else math.nan,
                "verdict": str(row.verdict),
            }
            for row in results.rows
        }
        missing = {"missing": results.missing} if results.missing else {}
        found: dict[str, Any] = nan_to_null({"probes": numbers, **missing})
        return found

    def watching(
        self, subject: Subject, log: str | os.PathLike[str] | None = None, start: int = 0
    ) -> Watching:
        """A context around a loop of one's own; see `Watching`."""
        return Watching(self, subject, log, start)


class Watching:
    """A training loop under watch: `step()` after each of its steps.

    The weights on entry are the own-init of everything: `untrained` says untrained by this loop. They are measured
    too, and so is the last step unless an error ends the loop. What a file says of the model, how it was trained and
    which checkpoints its run has, does not hold for the loop, and is not there for probes that ask.

    Args:
        monitor: what is measured and when.
        subject: around the module that is trained; a copy is measured.
        log: a file that gets one line of JSON a measurement, added to what it holds; a line that a kill cut off goes.
        start: steps done before.

    """

    def __init__(
        self, monitor: Monitor, subject: Subject, log: str | os.PathLike[str] | None, start: int
    ) -> None:
        self.monitor, self.subject, self.steps = monitor, subject, start
        self.log = None if log is None else Path(log)
        self.measured: int | None = None

    def __enter__(self) -> Self:
        self.first = _copied(self.subject, self.steps)
        self._measure()
        return self

    def step(self) -> dict[str, Any] | None:
        """Count a step, and measure where that is due: what was found, or None."""
        self.steps += 1
        return self._measure() if self.steps % self.monitor.every == 0 else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.measured != self.steps:
            self._measure()

    def _measure(self) -> dict[str, Any]:
        now = self.first if self.measured is None else _copied(self.subject, self.steps)
        _live(now, self.first, self.steps)
        found = self.monitor.measure(now, self.steps)
        self.measured = self.steps
        if self.log is not None:
            line = json.dumps({"step": self.steps, **found}, allow_nan=False, ensure_ascii=False)
            try:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                # A pipe has nothing to read back; opened for both it would not wait for its reader.
                with self.log.open("ab" if self.log.is_fifo() else "a+b", buffering=0) as file:
                    append_record(file, line.encode())
            except OSError as problem:
                raise BadInputError(
                    f"cannot write {self.log}: {problem.strerror or problem}. {advice(problem)}"
                ) from None
        return found


def silent(_what: str, _done: int, _total: int) -> None:
    """Tell nobody: training has a bar of its own."""


def _copied(subject: Subject, step: int) -> Subject:
    """A copy that shares nothing with what is trained. Raises BadInputError where the model cannot be copied."""
    import torch

    try:
        made = copy.deepcopy(subject)
    except (RuntimeError, TypeError) as error:
        raise BadInputError(
            f"{subject.name} cannot be copied, and what is measured must not touch what is trained: {error}"
        ) from error
    if isinstance(made.module, torch.nn.Module):
        made.module.zero_grad(set_to_none=True)
        made.module.eval()
    return _live(made, made, step)


def _live(now: Subject, first: Subject, step: int) -> Subject:
    """Make of a copy what a loop has at this step: its initial weights, and no file's word for anything.

    With another gate it is still that: its class alone would take the weights of now for the initial ones.
    """

    def gone() -> Any:
        raise MissingCapability(f"{now.name}: what is trained in a loop is no checkpoint of a run")

    def with_gate(gate: GateRule, surprisal: Tensor | None = None) -> Subject:
        make = type(now).with_gate
        start = _live(make(first, gate, surprisal), first, 0)
        return _live(make(now, gate, surprisal), start, step)

    now.trained_steps, now.name, now.path = step, f"step {step}", None
    now.own_init, now.siblings, now.training = (lambda: first), gone, gone  # type: ignore[method-assign]
    now.with_gate = with_gate  # type: ignore[method-assign]
    return now


@contextlib.contextmanager
def _untouched() -> Iterator[None]:
    """Leave the generators of random numbers, and whether gradients are recorded, as they are."""
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        yield
