"""What the study printed: "Dissecting HOPE" (Kim 2025), Tables 1 and 2, section 3 for the setting. One seed each.

Which loss Tables 1 and 2 report, of training or held out, smoothed or not, the study does not say.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Table 1: loss after 2,000 steps, nats a token, by variant; columns `small` and `scaled`.
TABLE_1: dict[str, dict[str, float]] = {
    "small": {
        "full": 7.216,
        "no-cms": 7.201,
        "no-self-mod": 7.532,
        "no-surprise": 7.322,
        "transformer": 6.880,
        "titans": 7.578,
    },
    "scaled": {
        "full": 7.237,
        "no-cms": 7.079,
        "no-self-mod": 8.649,
        "transformer": 7.830,
        "transformer-matched": 7.936,
    },
}

#: Table 2: loss by surprise threshold (nats), at `small`; every token passed the gate.
TABLE_2: dict[float, float] = {0.005: 7.289, 0.01: 7.243, 0.02: 7.222, 0.05: 7.222, 0.1: 7.304}

#: Per cent of tokens that pass the gate, by threshold (nats): section 4.4, Figure 3b.
STUDY_PASS_RATES: dict[float, float] = {5.0: 100.0, 10.0: 99.97, 20.0: 99.8, 50.0: 83.6}

#: Standard deviation, nats, of the seven figures above that are one computation: `full`, `no-surprise`, all of Table 2.
NOISE = 0.044


@dataclass(frozen=True)
class Setting:
    """How the study's runs were set; sizes by the column of Table 1."""

    dim: int
    layers: int
    context: int = 512  # tokens
    steps: int = 2000
    batch: int = 8
    learning_rate: float = 3e-4
    data: str = "openwebtext"


SETTINGS = {"small": Setting(dim=256, layers=6), "scaled": Setting(dim=512, layers=8)}


def column(dim: int) -> str:
    """Which column of Table 1 a model of width `dim` is set beside: `scaled` from its width on, else `small`."""
    return "scaled" if dim >= SETTINGS["scaled"].dim else "small"


def published_loss(column_name: str, variant: str, threshold: float | None) -> float | None:
    """The figure printed for a variant, or for `full` at another threshold; None where there is none."""
    if threshold is not None:
        return TABLE_2.get(threshold) if column_name == "small" and variant == "full" else None
    return TABLE_1[column_name].get(variant)


def published_delta(column_name: str, variant: str, threshold: float | None) -> float | None:
    """The same less that of `full`, as the study subtracts them."""
    loss = published_loss(column_name, variant, threshold)
    if loss is None or (variant == "full" and threshold is None):
        return None
    return round(loss - TABLE_1[column_name]["full"], 3)
