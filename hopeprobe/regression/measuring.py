"""From checkpoints to a baseline: measured once, what rounding can do found by measuring again in other batches."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from hopeprobe.analysis import analyze, chosen_probes
from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.opening import WindowMaker, as_list, open_checkpoint, told_apart
from hopeprobe.results import Address
from hopeprobe.stats.drift import spread
from hopeprobe.stats.histogram import RESOLUTION
from hopeprobe.subject import MissingCapability
from hopeprobe.tokens import TokenData

from .baseline import Baseline, Settings, Tracked, current_versions, with_tolerances

if TYPE_CHECKING:
    import os
    from collections.abc import Container, Mapping, Sequence

    import torch

    from hopeprobe.analysis import Progress
    from hopeprobe.opening import Checkpoints
    from hopeprobe.probes.base import Probe
    from hopeprobe.results import ResultRow, Results
    from hopeprobe.subject import GateRule, Subject

DEFAULT_PROBES = ("integrity", "cms-similarity", "meta-fast", "gate-selectivity", "surprise")
"""What a baseline holds unless asked otherwise: one probe a mechanism, and whether these are the trained weights."""

_SPREADS = 2.0  # between seeds, the tolerance where none is given
_RELATIVE = 1e-5  # of a number in float32, summed in another order
_OF_ERROR = 1e-3  # of a standard error over documents: for numbers about 0
_AGAIN = 10.0  # times what another batch size changed: it is one draw of what can happen
_BIN = 2.5 * RESOLUTION  # a value is within RESOLUTION of its bin's middle, so that bins are twice as wide
_TOKENS = 2.0  # that fall on the other side of a line


def make_baseline(
    checkpoints: Checkpoints,
    probes: str | Probe | Sequence[str | Probe] = DEFAULT_PROBES,
    data: str | Sequence[str] | TokenData = "builtin",
    tokens: int | None = 32_768,
    split: str = "heldout",
    carry: str = "window",
    gate: GateRule | None = None,
    tolerances: Mapping[str, float] | None = None,
    fresh: int = 10,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
) -> Baseline:
    """Measure one checkpoint, or one of each of several seeds, for later checks.

    Args:
        checkpoints: one: checks ask whether the same numbers come out of the same tokens. Several, each of another
            seed: whether those of another training run differ from them by more than they do from each other. Two
            seeds are the least, and find next to nothing; of sixty numbers ten seeds find a change of 10 standard
            deviations between seeds, five of 19.
        probes: as in `hopeprobe.analyze`.
        data: as there; tokens that are loaded already are not found again by a check, which must be given them.
        tokens: as there.
        split: as there.
        carry: as there.
        gate: as there.
        tolerances: by statistic, or PROBE/STATISTIC, in its unit: changes up to it are none. Without: 0 for one
            checkpoint; for several twice their standard deviation, or the probe's smallest effect if that is more.
        fresh: as there; the verdicts of a baseline rest on it, checks do without.
        cache_dir: as there.
        progress: as there.
        device: as there.

    Raises:
        BadInputError: as `hopeprobe.analyze`; several checkpoints of one seed, or that differ in more than their
            seed; a tolerance for no statistic.
        MeasurementError: something could not be measured: a baseline with holes would check less than it says.

    """
    given, chosen = as_list(checkpoints), chosen_probes(probes)
    check_seeds(given)
    results = analyze(
        given,
        probes,
        data,
        tokens,
        split,
        carry,
        gate=gate,
        fresh=fresh,
        cache_dir=cache_dir,
        progress=progress,
        device=device,
    )
    if results.missing:
        raise MeasurementError(f"no baseline was made: {'; '.join(results.missing)}")
    described = results.checkpoints
    if any(one.get("data") != described[0].get("data") for one in described) or "windows" not in results.data:
        raise BadInputError("the checkpoints read different tokens: one baseline cannot hold them")
    again = None
    if len(given) == 1:
        batch = _other_batch(given[0], split, carry, tokens, data, cache_dir)
        again = analyze(
            given, chosen, data, tokens, split, carry, batch, gate=gate, fresh=0, cache_dir=cache_dir,
            progress=progress, device=device,
        )  # fmt: skip
    names = tuple(probe.name for probe in chosen)
    source = (
        () if isinstance(data, TokenData) else (data,) if isinstance(data, str) else tuple(map(str, data))
    )
    counting = {probe.name for probe in chosen if probe.counts}
    tracked, unmeasured = _tracked(results, again, counting)
    if not tracked:
        raise MeasurementError("no baseline was made: these probes have no number of these checkpoints")
    return Baseline(
        Settings(names, source, tokens, split, carry, gate),
        results.data,
        tuple(described),
        with_tolerances(tracked, tolerances or {}),
        unmeasured,
        current_versions(),
    )


def renewed(old: Baseline, checkpoints: Checkpoints, **given: Any) -> Baseline:
    """The same baseline of other checkpoints: settings as they were unless `given`, tolerances that a person set.

    Errors as `make_baseline`.
    """
    settings = {name: getattr(old.settings, name) for name in Settings.__dataclass_fields__}
    settings["data"] = list(settings["data"])
    if not settings["data"] and "data" not in given:
        raise BadInputError("the baseline was made from tokens in memory: give them to renew it")
    made = make_baseline(checkpoints, **{**settings, **given})
    set_by_hand = {one.address: one.tolerance for one in old.tracked if one.tolerance != _tolerance(one)}
    tracked = tuple(
        dataclasses.replace(one, tolerance=set_by_hand.get(one.address, one.tolerance))
        for one in made.tracked
    )
    return dataclasses.replace(made, tracked=with_tolerances(tracked, given.get("tolerances") or {}))


def changed(old: Baseline, settings: Mapping[str, Any]) -> list[str]:
    """Names of those settings, arguments of `make_baseline`, by which a baseline would be measured differently."""
    asked = dict(settings)
    if "probes" in asked:
        asked["probes"] = tuple(probe.name for probe in chosen_probes(asked["probes"]))
    # `data` is left out: the tokens' fingerprint says more than where they are.
    known = Settings.__dataclass_fields__.keys() - {"data"}
    found = [name for name in sorted(asked.keys() & known) if asked[name] != getattr(old.settings, name)]
    tolerances = asked.get("tolerances") or {}
    return found + ["tolerances"] * (with_tolerances(old.tracked, tolerances) != old.tracked)


def by_address(results: Results) -> dict[Address, list[ResultRow]]:
    """Rows of each address, one a checkpoint in their order."""
    found: dict[Address, list[ResultRow]] = defaultdict(list)
    for row in results.rows:
        found[Address.of(row)].append(row)
    return dict(found)


def check_seeds(given: Sequence[str | os.PathLike[str] | Subject]) -> None:
    """Raise BadInputError unless checkpoints differ in their seed alone: else their spread is of something else."""
    if len(given) == 1:
        return
    seeds: dict[int, str] = {}
    first, names = open_checkpoint(given[0]), told_apart(given)
    must = "several checkpoints must differ in their seed alone. Give one of each seed, of the same step and model"
    for checkpoint, name in zip(given, names, strict=True):
        subject = open_checkpoint(checkpoint)
        if subject.trained_steps != first.trained_steps:
            raise BadInputError(
                f"{names[0]} is of step {first.trained_steps} and {name} of {subject.trained_steps}: {must}"
            )
        if _identity(subject) != _identity(first):
            raise BadInputError(f"{names[0]} and {name} are of models with different configurations: {must}")
        if subject.seed is None:
            continue
        if subject.seed in seeds:
            raise BadInputError(
                f"{seeds[subject.seed]} and {name} are both of seed {subject.seed}: what several "
                "checkpoints tell is how much seeds differ, so each must be of another"
            )
        seeds[subject.seed] = name


def _identity(subject: Subject) -> object:
    try:
        return subject.identity()
    except MissingCapability:
        return None


def _other_batch(
    checkpoint: str | os.PathLike[str] | Subject,
    split: str,
    carry: str,
    tokens: int | None,
    data: str | Sequence[str] | TokenData,
    cache_dir: str | os.PathLike[str] | None,
) -> int:
    windows = WindowMaker(data, tokens, split, carry, None, cache_dir).windows(open_checkpoint(checkpoint))
    return max(1, windows.batch // 2) if windows.batch > 1 else 2


def _tracked(
    results: Results, again: Results | None, counting: Container[str]
) -> tuple[tuple[Tracked, ...], tuple[Address, ...]]:
    n = len(results.checkpoints)
    seen_again = {} if again is None else by_address(again)
    tracked, unmeasured = [], []
    for address, rows in by_address(results).items():
        if len(rows) < n or any(math.isnan(row.value) for row in rows):
            unmeasured.append(address)
            continue
        counts = rows[0].probe in counting
        noise = max(_rounding(row, counts) for row in rows)
        if n > 1 and counts:  # of rare tokens other seeds have other ones, as other documents do
            noise = max(noise, *(_error(row) for row in rows))
        if again is not None:
            other = seen_again.get(address)
            if other is None or math.isnan(other[0].value):
                raise MeasurementError(f"{address} is a number in one batch size and none in another")
            noise = max(noise, _AGAIN * abs(other[0].value - rows[0].value))
        one = Tracked(
            address,
            rows[0].unit,
            tuple(row.value for row in rows),
            tuple(row.verdict for row in rows),
            tuple(row.ci_low for row in rows),
            tuple(row.ci_high for row in rows),
            rows[0].smallest_effect,
            noise,
            0.0,
        )
        tracked.append(dataclasses.replace(one, tolerance=_tolerance(one)))
    return tuple(tracked), tuple(unmeasured)


def _tolerance(one: Tracked) -> float:
    if len(one.values) == 1:
        return 0.0
    of_interest = one.smallest_effect if math.isfinite(one.smallest_effect) else 0.0
    return max(_SPREADS * spread(one.values), of_interest)


def _error(row: ResultRow) -> float:
    """Standard error over documents, 0 where no interval is claimed."""
    return 0.0 if math.isnan(row.ci_low) else (row.ci_high - row.ci_low) / 4


def _rounding(row: ResultRow, counting: bool) -> float:
    """What another order of sums can do to a number, and to one that counts tokens, one or two across a line."""
    parts = [_RELATIVE * abs(row.value)]
    if row.n_tokens and math.isnan(row.ci_low):
        parts.append(_BIN * abs(row.value))  # a quantile: its histogram's next bin
    elif row.n_tokens:
        error = _error(row)
        parts.append(_OF_ERROR * error)
        if counting:  # one of n tokens moves a mean by 1/n of their range, 2/√n of its error or so
            parts.append(2 * _TOKENS * error / math.sqrt(row.n_tokens))
        if counting and row.unit == "1" and 0 < row.value < 1:
            parts.append(_TOKENS / row.n_tokens)
    return max(parts)
