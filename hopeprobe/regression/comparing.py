"""`check`: the numbers of other checkpoints set against a baseline, and what became of each.

    moved   its interval lies wholly outside the tolerance, or its mechanism is dead that was not: a regression
    lost    a number in the baseline, and none now that can be compared
    same    neither: within what the tolerance and the noise allow

One that is not in the baseline is named, and not checked.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from hopeprobe.analysis import analyze
from hopeprobe.cells import NONE, number
from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.opening import WindowMaker, as_list, check_no_hooks, open_checkpoint
from hopeprobe.probes import PROBES
from hopeprobe.results import Address

from .baseline import DEAD, Baseline, Tracked, current_versions
from .measuring import by_address, check_seeds

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    import pandas as pd
    import torch

    from hopeprobe.analysis import Progress
    from hopeprobe.opening import Checkpoints
    from hopeprobe.probes.base import Probe
    from hopeprobe.results import ResultRow, Results
    from hopeprobe.stats.drift import Drift
    from hopeprobe.tokens import EvalWindows, TokenData

COLUMNS = ("statistic", "baseline", "now", "difference", "interval", "tolerance", "finds", "outcome")


class Outcome(str, Enum):
    """What became of a number."""

    SAME = "same"
    MOVED = "moved"
    LOST = "lost"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Compared:
    """One number of a baseline beside what it is now.

    values: one a checkpoint, NaN where there is none; drift: None where it cannot be told; found: the smallest change
    that is found 95 times in a hundred, of a number that is lost by a check of one checkpoint; why: in words.
    """

    tracked: Tracked
    values: tuple[float, ...]
    drift: Drift | None
    found: float
    outcome: Outcome
    why: str

    @property
    def before(self) -> float:
        """Mean of the baseline's values."""
        return math.fsum(self.tracked.values) / len(self.tracked.values)

    @property
    def now(self) -> float:
        """Mean of the values."""
        return math.fsum(self.values) / len(self.values) if self.values else math.nan


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Attributes:
        compared: every number of the baseline, in its order.
        new: addresses that have a number now and are not in the baseline.
        notes: what else a reader must know.
        missing: what could not be measured, a sentence each.
        baseline: what was compared with.
        checkpoints: what results record of each.

    """

    compared: tuple[Compared, ...]
    new: tuple[Address, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    baseline: Baseline
    checkpoints: tuple[Mapping[str, Any], ...]

    def of(self, outcome: Outcome | str) -> tuple[Compared, ...]:
        """Those that it became of."""
        return tuple(one for one in self.compared if one.outcome == outcome)

    @property
    def exit_code(self) -> int:
        """1 when something moved, else 3 when something could not be measured, else 0."""
        if self.of(Outcome.MOVED):
            return 1
        return MeasurementError.exit_code if self.of(Outcome.LOST) or self.missing else 0

    @property
    def passed(self) -> bool:
        """Whether all was measured and nothing moved."""
        return self.exit_code == 0

    @property
    def summary(self) -> str:
        """One sentence."""
        counts = Counter(str(one.outcome) for one in self.compared)
        n = len(self.compared)
        what = f"{n} statistics" if n != 1 else "1 statistic"
        found = [f"{counts[word]} {word}" for word in ("moved", "lost") if counts[word]]
        return f"{what}: {', '.join(found) or 'all as in the baseline'}"

    @property
    def table(self) -> pd.DataFrame:
        """A line a number, those that moved first."""
        import pandas as pd

        frame: pd.DataFrame = pd.DataFrame(self.records()).astype({"layer": "Int64"})
        return frame

    def records(self) -> list[dict[str, Any]]:
        """A dictionary a number, those that moved first; NaN where there is none."""
        return [
            {
                **one.tracked.address._asdict(),
                "baseline": one.before,
                "now": one.now,
                "difference": math.nan if one.drift is None else one.drift.difference,
                "low": math.nan if one.drift is None else one.drift.low,
                "high": math.nan if one.drift is None else one.drift.high,
                "tolerance": one.tracked.tolerance,
                "found": one.found,
                "unit": one.tracked.unit,
                "outcome": str(one.outcome),
                "why": one.why,
            }
            for one in self.ordered()
        ]

    def ordered(self) -> list[Compared]:
        """What moved, then what is lost, then the rest; within each in the baseline's order."""
        order = [Outcome.MOVED, Outcome.LOST, Outcome.SAME]
        return sorted(self.compared, key=lambda one: order.index(one.outcome))

    def lines(self, every: bool = False) -> Iterator[tuple[str, ...]]:
        """Cells under `COLUMNS` of all that moved or is lost, or of `every` number."""
        for one in self.ordered():
            if every or one.outcome is not Outcome.SAME:
                yield cells(one)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `hopeprobe check --format json` prints."""
        return {
            "kind": "hopeprobe-check",
            "schema_version": 2,
            "exit_code": self.exit_code,
            "summary": self.summary,
            "checkpoints": [dict(one) for one in self.checkpoints],
            "statistics": self.records(),
            "new": [one._asdict() for one in self.new],
            "missing": list(self.missing),
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return f"<Check: {self.summary}>"

    def _repr_html_(self) -> str:
        from hopeprobe.notebook import html_table

        shown = list(self.lines())
        notes = [self.summary, *self.notes, *(f"not measured: {message}" for message in self.missing)]
        return html_table(COLUMNS, shown, notes)


def check(
    checkpoints: Checkpoints,
    baseline: Baseline | str | os.PathLike[str],
    data: str | Sequence[str] | TokenData | None = None,
    probes: Sequence[Probe] = (),
    batch: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
) -> Check:
    """Measure checkpoints as a baseline was measured, and set them against it.

    Args:
        checkpoints: one; or of a baseline of several seeds also several, whose mean is compared.
        baseline: a file, or what `make_baseline` gave.
        data: where the tokens are now; None for where they were. They must be the same tokens.
        probes: objects of your own for names in the baseline that hopeprobe does not have.
        batch: as in `hopeprobe.analyze`.
        cache_dir: as there.
        progress: as there.
        device: as there.

    Raises:
        BadInputError: a file that is no baseline, other tokens than the baseline's, several checkpoints beside a
            baseline of one or that differ in more than their seed, a checkpoint that cannot be read.
        MeasurementError: nothing at all could be measured.

    """
    kept = baseline if isinstance(baseline, Baseline) else Baseline.read(baseline)
    given = as_list(checkpoints)
    if len(given) > 1 and not kept.of_seeds:
        raise BadInputError(
            f"{len(given)} checkpoints, and a baseline of one: check one at a time, or make a baseline of several seeds"
        )
    check_seeds(given)
    chosen = _probes(kept, probes)
    settings = kept.settings
    source = data if data is not None else list(settings.data)
    if data is None and not settings.data:
        raise BadInputError("the baseline was made from tokens in memory: give them to the check")
    made = WindowMaker(source, settings.tokens, settings.split, settings.carry, batch, cache_dir)
    for checkpoint in given:
        subject = open_checkpoint(checkpoint)
        check_no_hooks(subject)
        _check_text(kept, made.text(subject.tokenizer))
        windows = made.windows(subject)
        _check_windows(kept, windows)
    results = analyze(
        given, chosen, windows.data, settings.tokens, settings.split, settings.carry, batch, settings.gate,
        fresh=0, cache_dir=cache_dir, progress=progress, device=device,
    )  # fmt: skip
    return compare(kept, results)


def compare(baseline: Baseline, results: Results) -> Check:
    """Set results, measured on the baseline's tokens with its settings, against it."""
    now = by_address(results)
    described = results.checkpoints
    kept = baseline.data.get("windows")
    # Some were left out, as `missing` says: numbers of the others are of another text.
    partly = any(one.get("windows", kept) != kept for one in described)
    known = {one.address for one in baseline.tracked} | set(baseline.unmeasured)
    compared = tuple(
        _compared(baseline, one, now.get(one.address, []), len(described), partly) for one in baseline.tracked
    )
    moved = any(one.outcome is Outcome.MOVED for one in compared)
    return Check(
        compared,
        tuple(a for a, rows in now.items() if a not in known and not math.isnan(rows[0].value)),
        tuple(_notes(baseline, described, moved)),
        tuple(results.missing),
        baseline,
        tuple(described),
    )


def _compared(baseline: Baseline, one: Tracked, rows: Sequence[ResultRow], n: int, partly: bool) -> Compared:
    """Set rows of `n` checkpoints against a number; one that some of them do not have is lost.

    partly: windows were left out: a verdict that fell is told, and what else there is cannot be compared.
    """
    values, found = tuple(row.value for row in rows), baseline.found(one)
    if len(rows) < n or any(map(math.isnan, values)):
        notes = "; ".join(dict.fromkeys(row.note for row in rows if math.isnan(row.value) and row.note))
        verdicts = ", ".join(dict.fromkeys(str(row.verdict) for row in rows if math.isnan(row.value)))
        why = ": ".join(filter(None, (verdicts, notes))) or "no such row"
        return Compared(one, values, None, found, Outcome.LOST, why)
    drift = None if partly else baseline.drift(one, values)
    found = found if drift is None else one.tolerance + drift.resolution
    fallen = [str(row.verdict) for row in rows if row.verdict in DEAD and row.verdict not in one.verdicts]
    if fallen:
        was = ", ".join(dict.fromkeys(map(str, one.verdicts)))
        return Compared(one, values, drift, found, Outcome.MOVED, f"{fallen[0]}, in the baseline {was}")
    if drift is None:
        return Compared(
            one, values, None, found, Outcome.LOST, "measured without some of the baseline's windows"
        )
    if drift.beyond(one.tolerance):
        return Compared(one, values, drift, found, Outcome.MOVED, "beyond the tolerance")
    return Compared(one, values, drift, found, Outcome.SAME, "")


def cells(one: Compared) -> tuple[str, ...]:
    """Texts under `COLUMNS`."""
    drift, unit = one.drift, "" if one.tracked.unit == "1" else f" {one.tracked.unit}"
    return (
        str(one.tracked.address),
        number(one.before) + unit,
        number(one.now) + ("" if math.isnan(one.now) else unit),
        NONE if drift is None else f"{drift.difference:+.3g}",
        NONE if drift is None else f"[{drift.low:+.3g}, {drift.high:+.3g}]",
        number(one.tracked.tolerance),
        number(one.found),
        str(one.outcome) + (f": {one.why}" if one.why and one.why != "beyond the tolerance" else ""),
    )


def _probes(baseline: Baseline, own: Sequence[Probe]) -> list[str | Probe]:
    named = {probe.name: probe for probe in own}
    unknown = [name for name in baseline.settings.probes if name not in PROBES and name not in named]
    if unknown:
        raise BadInputError(
            f"the baseline holds the probe {unknown[0]!r}, which hopeprobe does not have: give it with `probes`"
        )
    return [named.get(name, name) for name in baseline.settings.probes]


def _check_text(baseline: Baseline, text: TokenData) -> None:
    """Raise BadInputError where this is not the text of the baseline."""
    was = str(baseline.data.get("fingerprint"))
    if was == text.fingerprint:
        return
    why = f"the text is another: {text.name} ({text.fingerprint[:12]}), was {baseline.data.get('name')} ({was[:12]})"
    if baseline.data.get("name") == text.name == "builtin":
        why += ": `builtin` is the documentation of the Python that runs, so that each version has its own"
    raise _other_tokens(why)


def _check_windows(baseline: Baseline, windows: EvalWindows) -> None:
    """Raise BadInputError where the text is read in other windows."""
    if baseline.data.get("windows") != windows.fingerprint:
        was = baseline.data.get("context")
        raise _other_tokens(f"its windows are others: a context of {windows.context}, was {was}")


def _other_tokens(why: str) -> BadInputError:
    return BadInputError(
        f"these are not the tokens of the baseline, {why}. Make the baseline anew, or give the text it was made "
        "from with --data"
    )


def _notes(baseline: Baseline, described: Sequence[Mapping[str, Any]], moved: bool) -> Iterator[str]:
    if baseline.dead:
        yield baseline.dead
    identities = {one.get("identity") for one in baseline.checkpoints}
    if not {one.get("identity") for one in described} <= identities:
        yield "the model's configuration is not the baseline's"
    if baseline.of_seeds:
        seeds = {one.get("seed") for one in baseline.checkpoints} - {None}
        shared = sorted(one["seed"] for one in described if one.get("seed") in seeds)
        if shared:
            yield (
                f"seed {', '.join(map(str, shared))} is in the baseline: between seeds it should be another, or "
                "the check sees less change than there is"
            )
        short = len(baseline.unresolved)
        if short:
            yield (
                f"{short} of {len(baseline.tracked)} tolerances are below what {len(baseline.checkpoints)} seeds "
                "can show: changes of their size can go unseen"
            )
        if moved or baseline.apart:
            yield baseline.tails
    elif described[0].get("seed") != baseline.checkpoints[0].get("seed"):
        yield (
            "this is another training run than the baseline's, and a baseline of one checkpoint expects the same "
            "numbers: for runs that differ in their seed give `hopeprobe baseline` several seeds' checkpoints"
        )
    for name, version in current_versions().items():
        if baseline.versions.get(name) != version:
            yield f"measured with {name} {version}, the baseline with {baseline.versions.get(name)}"
