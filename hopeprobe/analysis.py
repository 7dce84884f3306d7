"""`analyze`: from checkpoints, probes and a text to rows with intervals, nulls and verdicts.

One pass over the data for each model and condition feeds all probes. A probe that cannot be measured leaves
its rows out and says why (`missing_from`); everything else is still there. Cost, in passes over the tokens:
one for the checkpoint, one for its own initial weights, and K + 1 times 4,096 tokens for the fresh ones and
the checkpoint beside them; all but the first are cached.

Several ranks share all passes out (`hopeprobe.ranks`), and have the same results.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from hopeprobe import ranks
from hopeprobe.errors import BadInputError, HopeprobeError, MeasurementError
from hopeprobe.notebook import progress_of
from hopeprobe.nulls import (
    FRESH_TOKENS,
    Beside,
    NullCache,
    Nulls,
    fresh_init_values,
    fresh_seeds,
    most_fresh_tokens,
    own_init_estimates,
    plain_values,
)
from hopeprobe.opening import (
    Checkpoints,
    WindowMaker,
    as_list,
    check_alike,
    check_no_hooks,
    labelled,
    open_checkpoint,
)
from hopeprobe.probes import PROBES, get_probe
from hopeprobe.probes.base import Finding, Measurement, Place, Probe, value_without_tokens
from hopeprobe.probes.left_out import MOST, LeftOut, WindowsNotFiniteError, check_live, noted, said
from hopeprobe.probes.measure import ESTIMATES, Told, measure, silent
from hopeprobe.probes.surprise import token_surprisal
from hopeprobe.probes.workers import blas_threads
from hopeprobe.results import NullRow, ResultRow, Results
from hopeprobe.stats import Evidence, Verdict, judge
from hopeprobe.subject import GateRule, MissingCapability, Subject
from hopeprobe.tokens import EvalWindows, TokenData

if TYPE_CHECKING:
    import torch

    from hopeprobe.tokens.sources import DataSpec

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being done, and how many batches of it are done and there are."""


def analyze(
    checkpoints: Checkpoints,
    probes: str | Probe | Sequence[str | Probe] = ("cms-similarity",),
    data: DataSpec | Sequence[DataSpec] | TokenData = "builtin",
    tokens: int | None = 32_768,
    split: str = "heldout",
    carry: str = "window",
    batch: int | None = None,
    gate: GateRule | None = None,
    fresh: int = 10,
    fresh_tokens: int = FRESH_TOKENS,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
) -> Results:
    """Measure `probes` on `checkpoints` over the first `tokens` tokens of a split of `data`.

    Args:
        checkpoints: paths or subjects, one or several.
        probes: one or several, by name or as objects of your own; "all" takes every one that has a name here.
        data: what `hopeprobe.tokens.load_tokens` takes, or tokens that are loaded already.
        tokens: how many targets to score, None for all of the split.
        split: "heldout", "train" or "all".
        carry: "window" starts afresh at each window of the model's context, "document" at each document.
        batch: windows at a time, None for what suits the context; the results do not depend on it.
        gate: a gate in place of each checkpoint's own, its nulls then gated by it too; None leaves them theirs.
        fresh: re-initialisations of the fresh-init null, 0 for none; without them nothing is `learned`.
        fresh_tokens: tokens that each of them is measured on, at most.
        cache_dir: where tokens and nulls are kept.
        progress: told what is being done; None for a bar in a notebook, and nothing elsewhere.
        device: where to measure: cpu, cuda, cuda:N, or auto, an accelerator where there is one; None leaves subjects
            where they are, and files on the CPU. What is read comes to the host where it is accumulated.

    Returns:
        One row for each statistic, layer and component, its nulls beside it. `missing_from(results)` lists
        what could not be measured.

    Raises:
        BadInputError: an unknown probe, a file that cannot be read, data that do not fit the model, a model
            with hooks on it. All checkpoints are opened before the first is measured.
        MeasurementError: nothing at all could be measured.

    """
    if fresh < 0 or fresh == 1:
        raise BadInputError(
            f"fresh is {fresh}; it takes at least two re-initialisations, or 0 for no such null"
        )
    chosen = chosen_probes(probes)
    results, described = Results(), []
    given = as_list(checkpoints)
    labels = labelled(given)
    # Whatever is wrong with the last of them is told before hours are spent on the others.
    made = WindowMaker(data, tokens, split, carry, batch, cache_dir)
    windows_of = []
    for checkpoint in given:
        subject = open_checkpoint(checkpoint, device)
        check_no_hooks(subject)
        windows_of.append(made.windows(subject))
        subject = _gated(subject, gate, windows_of[-1])
    for checkpoint, label, windows in zip(given, labels, windows_of, strict=True):
        # Opened again when there are several: they need not all fit into memory at once.
        subject = subject if len(given) == 1 else _gated(open_checkpoint(checkpoint, device), gate, windows)
        cache = NullCache.default(cache_dir)
        with progress_of(progress) as told, blas_threads(1):
            run = _Run(subject, label, windows, fresh, fresh_tokens, cache, told, gate)
            run.measure(chosen)
        results.extend(run.rows, run.null_rows)
        described.append(run.describe())
    results.data = _in_common([_describe_data(windows) for windows in windows_of])
    results.checkpoint = described[0] if len(described) == 1 else {"checkpoints": described}
    missing = missing_from(results)
    if missing and all(math.isnan(row.value) for row in results.rows):
        raise MeasurementError("nothing could be measured: " + "; ".join(missing))
    return results


def _gated(subject: Subject, gate: GateRule | None, windows: EvalWindows) -> Subject:
    """The subject with another gate. Raises BadInputError where it can have none."""
    if gate is None:
        return subject
    try:
        return subject.with_gate(gate, token_surprisal(subject, windows))
    except MissingCapability as error:
        raise BadInputError(f"--gate: {error}") from None


def missing_from(results: Results) -> list[str]:
    """List what could not be measured, one sentence each; empty when everything was."""
    return results.missing


@dataclass
class _Run:
    """The analysis of one checkpoint."""

    subject: Subject
    label: str
    windows: EvalWindows
    fresh: int
    fresh_tokens: int
    cache: NullCache
    progress: Progress | None
    gate: GateRule | None = None
    missing: list[str] = field(default_factory=list)
    missed: set[str] = field(default_factory=set)
    rows: list[ResultRow] = field(default_factory=list)
    null_rows: list[NullRow] = field(default_factory=list)
    own_init: str = "known"
    left_out: tuple[LeftOut, ...] = ()
    leaves_out: bool = True

    def measure(self, probes: Sequence[Probe]) -> None:
        """Fill `rows`, `null_rows` and `missing`; a few windows that are not finite are left out of all of it."""
        initial, whole = self._initial(), self.windows
        check_alike(self.subject, self.label, self.windows, self.own_init)
        while True:
            try:
                self._measure(probes, initial)
                break
            except WindowsNotFiniteError as error:
                self.left_out += error.found
                if len(self.left_out) > MOST * whole.n_windows:
                    self.left_out, self.leaves_out, self.windows = (), False, whole
                else:
                    self.windows = self.windows.without({(one.document, one.start) for one in error.found})
                self.missing, self.missed, self.rows, self.null_rows = [], set(), [], []
        if self.left_out:
            self.missing.insert(0, f"{self.label}: {said(self.left_out, whole.n_windows)}")
            note = noted(self.left_out, whole.n_windows)
            self.rows = [
                dataclasses.replace(row, note="; ".join(filter(None, (row.note, note))))
                if row.n_tokens
                else row
                for row in self.rows
            ]
        self._say_untrained()

    def _measure(self, probes: Sequence[Probe], initial: Subject | None) -> None:
        fitting = [probe for probe in probes if self._applies(probe)]
        limits = {probe.name: self._limit(probe) for probe in fitting}
        for limit in dict.fromkeys(limits.values()):
            windows = self.windows if limit == self.windows.n_tokens else self.windows.take(limit)
            part = dataclasses.replace(self, windows=windows)  # rows and what is missing go to the same lists
            part.measure_together([probe for probe in fitting if limits[probe.name] == limit], initial)

    def _limit(self, probe: Probe) -> int:
        most = probe.most_tokens(self.subject)
        return self.windows.n_tokens if most is None else min(most, self.windows.n_tokens)

    def measure_together(self, probes: Sequence[Probe], initial: Subject | None) -> None:
        """Measure probes that apply on the same tokens."""
        findings = self._of_tokens(probes, initial)
        of_models = ranks.dealt([partial(p.of_model, self.subject, initial, self.windows) for p in probes])
        for probe, of_model in zip(probes, of_models, strict=True):
            found = findings[probe.name]
            try:
                more = of_model.get()
                found += [one if isinstance(one, Finding) else Finding(one) for one in more]
            except MissingCapability as error:
                # Of a probe that measures something else too, this part is missing.
                if found:
                    self._miss(probe.name, "", str(error))
                else:
                    self._not_applicable(probe, "", str(error))
            except MeasurementError as error:
                if self.leaves_out:
                    check_live(self.subject, self.windows)
                self._miss(probe.name, "", str(error))
            try:
                self._judge(probe, probe.review(self.subject, found))
            except MeasurementError as error:
                self._miss(probe.name, "", str(error))
            if probe.name not in self.missed and not any(row.probe == probe.name for row in self.rows):
                self._miss(probe.name, "", "it gave no row, so it measured nothing")

    def _say_untrained(self) -> None:
        """Call `untrained` what the rule left open, or took for learned, where another row says so of the weights.

        One in twenty is `learned` by chance. What the rule found to be as at initialisation, or a probe to be
        collapsed or without any signal, says more than that.
        """
        open_to_it = {Verdict.LEARNED, Verdict.INCONCLUSIVE}
        why = "these weights are untrained, as another row says"
        if any(row.verdict is Verdict.UNTRAINED for row in self.rows):
            self.rows = [
                dataclasses.replace(
                    row, verdict=Verdict.UNTRAINED, note="; ".join(filter(None, (row.note, why)))
                )
                if row.verdict in open_to_it
                else row
                for row in self.rows
            ]

    def describe(self) -> dict[str, Any]:
        """What results record about the checkpoint."""
        subject = self.subject
        try:
            identity = json.dumps(subject.identity(), sort_keys=True, default=str)
            digest = hashlib.sha256(identity.encode()).hexdigest()
        except MissingCapability:
            digest = None
        return {
            "name": self.label,
            "path": str(subject.path) if subject.path else None,
            "step": subject.trained_steps,
            "seed": subject.seed,
            "identity": digest,
            "own_init": self.own_init,
            **({"gate": dataclasses.asdict(self.gate)} if self.gate is not None else {}),
            "data": self.windows.data.fingerprint,
            **_describe_windows(self.windows),
            "missing": self.missing,
        }

    def _initial(self) -> Subject | None:
        try:
            return self.subject.own_init()
        except HopeprobeError as error:  # a damaged step-0 file is no reason not to measure the checkpoint
            self.own_init = f"absent: {error}"
            return None

    def _applies(self, probe: Probe) -> bool:
        try:
            reason = probe.applies(self.subject)
            if reason is None:
                probe.conditions(self.subject)
        except MissingCapability as error:
            reason = str(error)
        if reason is not None:
            self._not_applicable(probe, "", reason)
        return reason is None

    def _not_applicable(self, probe: Probe, condition: str, reason: str) -> None:
        for statistic in probe.statistics:
            nothing = value_without_tokens(math.nan)
            verdict = Verdict.NOT_APPLICABLE
            found = Measurement(Place(statistic), condition, "", nothing, override=verdict, note=reason)
            self._judge(probe, [Finding(found)])

    def _of_tokens(self, probes: Sequence[Probe], initial: Subject | None) -> dict[str, list[Finding]]:
        """Measure all conditions, then their nulls, one model after the other."""
        measured = measure(self.subject, self.windows, probes, ESTIMATES, self._told(""), self.leaves_out)
        for name, reasons in measured.failed.items():
            for condition, reason in reasons.items():
                self._miss(name, condition, reason)
        for probe in probes:
            for condition, reason in measured.lacking.get(probe.name, {}).items():
                self._not_applicable(probe, condition, reason)
        found = {name: list(rows.values()) for name, rows in measured.found.items() if rows}
        seen = [probe for probe in probes if probe.name in found]
        own = Nulls()
        if initial is None:
            own.failed = {name: {"": self.own_init} for name in found}
        elif seen:
            own = own_init_estimates(initial, self.windows, seen, self.cache, self._told("own-init, "))
        prefix, fresh = self._fresh(seen, found)
        beside = Beside(
            self.subject, self.windows, initial is not None, own, self.fresh, self.fresh_tokens, prefix, fresh
        )
        return {
            probe.name: [beside.finding(probe, row) for row in found.get(probe.name, ())] for probe in probes
        }

    def _fresh(
        self, probes: Sequence[Probe], found: Mapping[str, Sequence[Measurement]]
    ) -> tuple[Nulls, list[Nulls]]:
        """Evaluate the checkpoint and the fresh re-initialisations on the same few tokens, as many as a probe wants."""
        prefix, fresh = Nulls(), [Nulls() for _ in range(self.fresh)]
        limits = {probe.name: most_fresh_tokens(probe, self.fresh_tokens) for probe in probes}
        for limit in sorted(set(limits.values()), reverse=True) if self.fresh else ():
            here, there = self._fresh_on(limit, [p for p in probes if limits[p.name] == limit], found)
            prefix.add(here)
            for one, other in zip(fresh, there, strict=True):
                one.add(other)
        return prefix, fresh

    def _fresh_on(
        self, tokens: int, probes: Sequence[Probe], found: Mapping[str, Sequence[Measurement]]
    ) -> tuple[Nulls, list[Nulls]]:
        prefix, windows = Nulls(), self.windows
        if windows.n_tokens <= tokens:
            prefix.values = {p.name: {r.key: r.estimate.plug_in for r in found[p.name]} for p in probes}
        else:
            windows = windows.take(tokens)
            told = self._told(f"first {windows.n_tokens} tokens, ")
            prefix = plain_values(self.subject, windows, probes, self.cache, told)
        fresh = []
        for i, seed in enumerate(fresh_seeds(self.fresh, self.subject.seed)):
            told = self._told(f"fresh-init {i + 1}/{self.fresh}, ")
            try:
                fresh.append(fresh_init_values(self.subject, seed, windows, probes, self.cache, told))
            except MissingCapability as error:
                prefix.failed |= {probe.name: {"": str(error)} for probe in probes}
                return prefix, [Nulls() for _ in range(self.fresh)]
        return prefix, fresh

    def _judge(self, probe: Probe, findings: Iterable[Finding]) -> None:
        """Apply the rule to all rows of a statistic together, whatever their conditions, and append the rows.

        A contrast has its conditions in its name: by condition each would be a family of one.
        """
        together: dict[str, list[Finding]] = {}
        for finding in findings:
            together.setdefault(finding.measurement.place.statistic, []).append(finding)
        for family in together.values():
            evidence = [
                Evidence(
                    f.measurement.estimate,
                    f.difference,
                    f.fresh,
                    f.measurement.override or f.override,
                    "; ".join(filter(None, (f.measurement.note, f.note))),
                )
                for f in family
            ]
            judgements = judge(evidence, [f.measurement.smallest_effect for f in family])
            for finding, judgement in zip(family, judgements, strict=True):
                row, estimate = finding.measurement, finding.measurement.estimate
                key = self._key(probe, row)
                self.rows.append(
                    ResultRow(
                        **key,
                        value=estimate.value,
                        unit=row.unit,
                        ci_low=estimate.ci_low,
                        ci_high=estimate.ci_high,
                        n_tokens=estimate.n,
                        n_groups=estimate.n_groups,
                        dtype=self.subject.dtype,
                        smallest_effect=row.smallest_effect,
                        min_detectable=judgement.min_detectable,
                        p=judgement.p,
                        q=judgement.q,
                        verdict=judgement.verdict,
                        note=judgement.note,
                    )
                )
                for null in finding.nulls or row.nulls:
                    columns = {f.name: getattr(null, f.name) for f in dataclasses.fields(null)}
                    del columns["note"]  # is in the result's own
                    self.null_rows.append(NullRow(**key, null_kind=columns.pop("kind"), **columns))

    def _key(self, probe: Probe, row: Measurement) -> dict[str, Any]:
        where = row.place._asdict()
        return {
            "probe": probe.name,
            "checkpoint": self.label,
            "step": self.subject.trained_steps,
            "condition": row.condition,
            **where,
        }

    def _miss(self, name: str, condition: str, reason: str) -> None:
        self.missed.add(name)
        self.missing.append(f"{self.label}: {name}{f' ({condition})' if condition else ''}: {reason}")

    def _told(self, null: str) -> Told:
        progress = self.progress
        if progress is None:
            return silent

        def told(condition: str) -> Callable[[int, int], None]:
            what = f"{self.label}, {null}{condition}"
            return lambda done, total: progress(what, done, total)

        return told


def chosen_probes(names: str | Probe | Sequence[str | Probe]) -> list[Probe]:
    """Probes by name or as they are, each once; "all" takes every one that has a name here.

    Raises BadInputError for a name that there is not, and for none at all.
    """
    if isinstance(names, str | Probe):
        names = tuple(PROBES) if names == "all" else (names,)
    chosen = [probe if isinstance(probe, Probe) else get_probe(probe) for probe in names]
    if not chosen:
        raise BadInputError(f"no probe was asked for (there are: {', '.join(PROBES)})")
    return list({probe.name: probe for probe in chosen}.values())


def _describe_data(windows: EvalWindows) -> dict[str, Any]:
    return {
        **windows.data.identity(),
        "split": windows.split,
        "carry": windows.carry,
        **_describe_windows(windows),
    }


def _describe_windows(windows: EvalWindows) -> dict[str, Any]:
    return {
        "windows": windows.fingerprint,
        "context": windows.context,
        "tokens": windows.n_tokens,
        "documents": windows.n_documents,
        "groups": windows.n_groups,
    }


def _in_common(described: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, *others = described
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
