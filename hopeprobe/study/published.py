"""What the study printed: "Dissecting HOPE" (Kim 2025), Tables 1 and 2, sections 4.2 to 4.4, section 3 for the setting.

One seed each. Which loss Tables 1 and 2 report, of training or held out, smoothed or not, the study does not say.
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
class Published:
    """A figure printed of what happens inside the model, and the rows of a probe that are the same quantity.

    Attributes:
        key: its short name.
        where: section, and figure of the study.
        quantity: what it is of.
        printed: as the study gives it; "not reported" where it gives none and one is needed to read its neighbour.
        probe, statistic: what measures it here.
        component: a regular expression that the whole of a row's component matches.
        condition: under which it was measured, where it takes tokens.

    """

    key: str
    where: str
    quantity: str
    printed: str
    probe: str
    statistic: str
    component: str = ".*"
    condition: str = "live"


_LEVEL = r"(?!mix_).*"  # of the CMS; how levels are mixed is none
_BOTH = r"fast\|slow"
_MATRIX, _ROW = r"(k|v|q|memory)\.w[12]", r"(eta|alpha)\.(w1|skip|w_skip)"
_MEMORY = r"selfmod\..*"

_LOSSES = [loss for column in TABLE_1.values() for loss in column.values()]

#: Sections 3 and 4.2 to 4.4, in the study's order.
INSIDE: tuple[Published, ...] = (
    Published(
        "frozen_loss", "3", "loss without any write, nats a token",
        f"not reported; Table 1: {min(_LOSSES):.3f} to {max(_LOSSES):.3f}",
        "integrity", "frozen_loss", condition="frozen",
    ),
    Published(
        "distance", "3", "distance of all weights from the run's initial ones, of their norm",
        "not reported; steps 200 to 2,000", "integrity", "distance_from_init", "all",
    ),
    Published(
        "level_norm", "4.2, Figure 1a", "CMS level L2 norm", "~26.15, within 0.2 %",
        "cms-dynamics", "weight_norm", _LEVEL,
    ),
    Published(
        "level_drift", "4.2, Figure 1b", 'CMS "inter-checkpoint drift"', "29.2–29.3",
        "cms-dynamics", "displacement", _LEVEL,
    ),
    Published(
        "output_cosine", "4.2, Figure 1c", "cosine of fast and slow outputs", "mean 0.77",
        "cms-similarity", "output_cosine", _BOTH,
    ),
    Published(
        "delta_cosine", "4.2, Figure 1c", "cosine of what the levels add", "not reported",
        "cms-similarity", "delta_cosine", _BOTH,
    ),
    Published(
        "matrix_drift", "4.3, Figure 2a", "drift of large projections", "≈ 13, flat from step 200",
        "selfmod-drift", "displacement", _MATRIX,
    ),
    Published(
        "row_drift", "4.3, Figure 2a", "drift of small components: a row", "≈ 0.8",
        "selfmod-drift", "displacement", _ROW,
    ),
    Published(
        "relative_drift", "4.3, Figure 2b", "‖θ_fast − θ_meta‖ / ‖θ_meta‖", "≈ 1.0",
        "meta-fast", "relative_drift", _MEMORY,
    ),
    Published(
        "norm_ratio", "4.3, Figure 2b", "‖θ_fast‖ / ‖θ_meta‖", "not reported",
        "meta-fast", "norm_ratio", _MEMORY,
    ),
    Published("loss_mean", "4.4, Figure 3a", "per-token loss, mean", "66.7", "surprise", "mean_loss"),
    Published("loss_std", "4.4, Figure 3a", "per-token loss, standard deviation", "16.5", "surprise", "loss_std"),
    Published("loss_min", "4.4, Figure 3a", "per-token loss, smallest", "9.3", "surprise", "loss_quantile", "min"),
    Published(
        "loss_p10", "4.4, Figure 3a", "per-token loss, 10th percentile", "45.0",
        "surprise", "loss_quantile", "p10",
    ),
    Published("loss_p50", "4.4, Figure 3a", "per-token loss, median", "67.0", "surprise", "loss_quantile", "p50"),
    *(
        Published(
            f"gate_{tau:g}", "4.4, Figure 3b", f"gate open at τ = {tau:g}", f"{share:g} %",
            "gate-selectivity", "pass_rate", f"tau={tau:g}",
        )
        for tau, share in STUDY_PASS_RATES.items()
    ),
)  # fmt: skip


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
