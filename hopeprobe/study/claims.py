"""Every published claim, what one's own runs say of it, and what the same number is before training.

Claims about differences of losses follow the rule of `summary` and `scaling`. Claims about a quantity inside the model
hold where the interval over seeds lies within 5 % of the published figure, do not hold where it lies outside, and are
not resolved where it does neither. Sections, tables and figures are those of the study.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .grid import REFERENCE, Grid
from .probed import Probed, mean_of_layers
from .published import STUDY_PASS_RATES
from .scaling import scaling
from .summary import FAILS, HOLDS, OPEN, Row, is_threshold, summarise

#: How near a published figure an interval must come.
_NEAR = 0.05


@dataclass(frozen=True)
class Claim:
    """One claim: where and what the study printed, what was measured, at initialisation too, and the answer."""

    where: str
    claim: str
    measured: str
    initial: str
    answer: str


_TABLE_1 = {
    "no-cms": "removing CMS improves the loss",
    "no-self-mod": "removing self-modification worsens the loss",
    "no-surprise": "a threshold of 0 worsens the loss",
    "transformer": "the Transformer is better than HOPE (small), worse (scaled)",
    "transformer-matched": "a Transformer of equal size is worse",
    "titans": "Titans is worse",
}
_SCALING = {
    "no-cms": "removing CMS helps more in the larger model",
    "no-self-mod": "self-modification matters 4.5 times as much in the larger model",
    "transformer": "the Transformer falls behind HOPE as models grow",
}


def claims(grids: Sequence[Grid], probed: Sequence[Probed], inside: Grid) -> list[Claim]:
    """Claims on which these grids, smaller ones first, and probes of `full` in `inside` have something to say.

    In the study's order, by section and then figure or table. Probes of another step than the last of that grid say
    nothing of it.
    """
    found = []
    for grid in grids:
        rows = summarise(grid)
        measured = [row for row in rows if row.delta is not None and row.delta.n]
        found += [_of_loss(grid, row) for row in measured if row.claim and row.name in _TABLE_1]
    for growth in scaling(grids) if len(grids) > 1 else []:
        if growth.claim and growth.name in _SCALING and not math.isnan(growth.change.difference):
            change = _text(growth.change.difference, growth.change.ci_low, growth.change.ci_high, "+.3f")
            found.append(
                Claim(
                    "4.5, Figure 4c",
                    f"{_SCALING[growth.name]} ({_printed(growth.published)})",
                    f"{growth.small} to {growth.large}: Δ by {change}{_resolving(growth.change.resolution)}",
                    "",
                    growth.claim,
                )
            )
    for grid in grids:
        found += _of_thresholds(grid, summarise(grid))
    end = [row for row in probed if row.name == REFERENCE and row.step == inside.train["steps"]]
    found += [replace(claim, measured=f"{inside.preset}: {claim.measured}") for claim in _inside(end)]
    return sorted(found, key=lambda claim: claim.where)


def _printed(published: tuple[float, float] | None) -> str:
    return "" if published is None else f"{published[0]:+.3f} → {published[1]:+.3f}"


def _of_loss(grid: Grid, row: Row) -> Claim:
    assert row.delta is not None
    if row.finding == "same":
        measured = f"{grid.preset}: the same computation as full"
    else:
        interval = _text(row.delta.mean, row.delta.ci_low, row.delta.ci_high, "+.3f")
        measured = f"{grid.preset}: Δ {interval}{_resolving(row.delta.resolution)}"
    return Claim(
        "4.1, Table 1", f"{_TABLE_1[row.name]} ({row.published_delta:+.3f})", measured, "", row.claim
    )


def _of_thresholds(grid: Grid, rows: Sequence[Row]) -> list[Claim]:
    """Table 2: does every token pass, and does the threshold change the loss."""
    found = []
    for row in rows:
        if not is_threshold(row.name) or row.published is None or math.isnan(row.gate_rate):
            continue
        share = f"{100 * row.gate_rate:.2f} % of held-out tokens"
        passing = f"{grid.preset}: {share}, lowest surprise {row.surprise_min:.3g}"
        threshold = row.name.rpartition("-")[2]
        answer = HOLDS if row.gate_rate == 1 else FAILS
        found.append(
            Claim("4.4, Table 2", f"every token passes a threshold of {threshold}", passing, "", answer)
        )
    return found


def _inside(end: Sequence[Probed]) -> list[Claim]:
    """Sections 4.2 to 4.4."""
    found = [*_norms(end)]
    for claim, statistic, component in (
        ("outputs of fast and slow have cosine 0.77, so they are redundant", "output_cosine", "fast|slow"),
        ("(not reported: what the two levels add)", "delta_cosine", "fast|slow"),
    ):
        for row in mean_of_layers(r for r in end if (r.statistic, r.component) == (statistic, component)):
            answer = _near(row, 0.77) if statistic == "output_cosine" else ""
            found.append(_value("4.2, Figure 1c", claim, row, answer))
    context = max((int(r.position) for r in end if r.statistic == "relative_drift"), default=0)
    drifts = [r for r in end if r.statistic == "relative_drift" and r.position == str(context)]
    for row in mean_of_layers(r for r in drifts if r.component == "selfmod.memory"):
        claim = f"fast weights differ from meta weights by about their norm, 1.0 (M_memory after {context} tokens)"
        found.append(_value("4.3, Figure 2b", claim, row, _near(row, 1.0)))
    means = [r for r in end if (r.probe, r.statistic) == ("surprise", "mean_loss")]
    found += [_value("4.4, Figure 3a", "mean per-token loss is 66.7 nats", r, _near(r, 66.7)) for r in means]
    for threshold, share in STUDY_PASS_RATES.items():
        passing = [r for r in end if (r.statistic, r.component) == ("pass_rate", f"tau={threshold:g}")]
        claim = f"{share} % of tokens pass a threshold of {threshold:g}"
        found += [_value("4.4, Figure 3b", claim, row, _near(row, share / 100)) for row in passing]
    return found


def _norms(end: Sequence[Probed]) -> list[Claim]:
    """The norms of the two levels lie within 0.2 % of each other: the ratio's interval from the ends of theirs."""
    norms = {row.component: row for row in mean_of_layers(r for r in end if r.statistic == "weight_norm")}
    if not {"fast", "slow"} <= set(norms):
        return []
    fast, slow = norms["fast"], norms["slow"]
    ratio, low, high = fast.value / slow.value, fast.ci_low / slow.ci_high, fast.ci_high / slow.ci_low
    answer = _within(low, high, 0.998, 1.002)
    return [
        Claim(
            "4.2, Figure 1a",
            "norms of fast and slow lie within 0.2 % of each other, at 26.15",
            f"fast / slow {_text(ratio, low, high, '.4f')}, at {fast.value:.2f}",
            ""
            if math.isnan(slow.own_init)
            else f"{fast.own_init / slow.own_init:.4f}, at {fast.own_init:.2f}",
            answer,
        )
    ]


def _near(row: Probed, published: float) -> str:
    return _within(row.ci_low, row.ci_high, published * (1 - _NEAR), published * (1 + _NEAR))


def _within(low: float, high: float, least: float, most: float) -> str:
    """Does an interval lie within a range, or outside; NaN does neither."""
    if least <= low and high <= most:
        return HOLDS
    return FAILS if high < least or low > most else OPEN


def _value(where: str, claim: str, row: Probed, answer: str) -> Claim:
    initial = "" if math.isnan(row.own_init) else f"{row.own_init:.3g}"
    return Claim(where, claim, _text(row.value, row.ci_low, row.ci_high, ".3g"), initial, answer)


def _resolving(resolution: float) -> str:
    return ", no interval" if math.isnan(resolution) else f", resolves {resolution:.2g}"


def _text(value: float, low: float, high: float, form: str) -> str:
    return f"{value:{form}}" if math.isnan(low) else f"{value:{form}} [{low:{form}}, {high:{form}}]"
