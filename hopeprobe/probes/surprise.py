"""How surprising is the text to the model? The distribution of per-token loss in the live model.

s_t = CE_t, nats, is the cross-entropy of the token that is predicted at t; u_t = −ln p(that token), p the token
frequencies of the training split, smoothed (`hopeprobe.tokens.Unigram`). Over the scored tokens t:

    mean_loss             mean_t s_t                                          nats, [0, ∞)
    loss_std              √(mean_t s_t² − (mean_t s_t)²)                      nats, [0, ∞)
    excess_over_uniform   mean_t s_t − ln V                                   nats; below 0: better than guessing
    excess_over_unigram   mean_t (s_t − u_t)                                  nats; below 0: context is used
    unigram_correlation   cov(s, u) / (σ_s σ_u)                               "1", [−1, 1]
    loss_quantile         min, p10, p50, p90, max of s_t                      nats

Smallest effects: 0.05 nats, and 0.05 for the correlation. Quantiles are descriptors: no interval, no verdict; p10,
p50 and p90 are within 0.1 % of an observed loss (`hopeprobe.stats.histogram`), the smallest and the largest exact.

Nulls: own-init and fresh-init for all. `analytic`: every token equally likely, so ln V, no spread, no excess over
it. `unigram`: the same statistic of u_t, a model that knows frequencies alone. Without a training split, or where
the tokens measured belong to it, the row says so. A correlation with a loss that does not vary is `n/a`.

Verdicts are the rule's. Where the model has a `hook_surprise`, it must show the losses that the pass gives (to
1e-4 nats and what its number format rounds): else nothing is reported, as that point measures something else.

Reading. `excess_over_unigram` below 0 is the least that a model of text must reach; above it no gate's surprise means
much. Beside ln V it shows a loss that only the scale of an initialisation gives.

Fails. The mean is that of this text: another text, or other windows, move it by more than most mechanisms do. Compare
checkpoints on the same tokens.

Cost: one pass. Memory: 64 groups of five numbers, and some thousand counts. Source: "Dissecting HOPE", section 4.4:
mean 66.7, standard deviation 16.5, smallest 9.3, p10 45.0, where ln V is 10.8: what an untrained model with a tied
N(0, 1) embedding gives.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hopeprobe.errors import MeasurementError
from hopeprobe.stats import (
    COSINE_BOUNDS,
    GROUPS,
    Estimate,
    GroupedCrossCovariance,
    GroupedMoments,
    Histogram,
    Moments,
    Verdict,
    as_float64,
    varies,
)
from hopeprobe.stats.arrays import as_bool
from hopeprobe.stats.histogram import RESOLUTION
from hopeprobe.tokens import Unigram

from .base import (
    Accumulator,
    Measurement,
    NullValue,
    Place,
    Probe,
    Quantity,
    finite_losses,
    value_without_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from hopeprobe.stats.arrays import BoolArray, FloatArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalBatch, EvalWindows, TokenData

    from .base import RowKey

HOOK = "hook_surprise"
LOSS_EFFECT = 0.05  # nats
CORRELATION_EFFECT = 0.05
QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}

_POSITIVE = (0.0, math.inf)
_NEGATIVE = 0.1  # nats; what rounding may leave of a loss of 0, in any format
_SLACK = 1e-4  # nats
_ULPS = 4  # roundings of the number format between a loss and the point that shows it


def scalar_mean(moments: Moments, name: str = "x") -> FloatArray:
    """Mean of a scalar held as a vector of one: float64 [B]; NaN where n = 0."""
    mean: FloatArray = moments.mean(name)[:, 0]
    return mean


def scalar_std(moments: Moments, name: str = "x") -> FloatArray:
    """Standard deviation √(C/n) of a scalar held as a vector of one: float64 [B]; NaN where n = 0."""
    # What is left of the comoment of a constant can round to just below 0.
    return np.sqrt(np.maximum(moments.covariance(name * 2)[:, 0, 0], 0.0))


def correlation(moments: Moments) -> FloatArray:
    """Pearson's correlation of scalars x and y: float64 [B] in [−1, 1]; NaN where one does not vary."""
    defined = varies(moments, "x") & varies(moments, "y")
    spread = scalar_std(moments, "x") * scalar_std(moments, "y")
    covariance = moments.covariance("xy")[:, 0, 0]
    r = np.divide(covariance, spread, out=np.full_like(spread, np.nan), where=defined)
    return np.clip(r, -1.0, 1.0)


@functools.lru_cache(maxsize=1)
def _fitted(data: TokenData, vocab_size: int) -> Unigram | None:
    train = data.split_tokens("train")
    return Unigram.fit(train, vocab_size) if len(train) else None


def train_unigram(subject: Subject, windows: EvalWindows) -> Unigram | None:
    """Token frequencies of the training split, None where that is empty; fit once a text, as passes are many."""
    return _fitted(windows.data, subject.vocab_size)


def token_surprisal(subject: Subject, windows: EvalWindows) -> Tensor | None:
    """-ln p (V,) of every token by its frequency in the training split, float64; None where that is empty."""
    import torch

    unigram = train_unigram(subject, windows)
    return None if unigram is None else torch.from_numpy(unigram.surprisal)


def unigram_note(windows: EvalWindows) -> str:
    """Say what is wrong with the unigram model that `train_unigram` gives for these windows; "" for nothing."""
    if not windows.data.n_tokens("train"):
        return "the text has no training split, from which token frequencies would come"
    if windows.split != "heldout":
        return f"token frequencies are those of tokens that are measured here (split {windows.split})"
    return ""


def surprisal_of(batch: EvalBatch, unigram: Unigram | None) -> FloatArray:
    """Unigram surprisal, nats, of the tokens to predict: [R, L + 1] → float64 [R, L]; zeros without a model."""
    targets = batch.tokens[:, 1:]
    return np.zeros(targets.shape) if unigram is None else unigram.surprisal[targets]


def checked_losses(cache: Mapping[str, Tensor], losses: Tensor, scored: BoolArray) -> FloatArray:
    """Losses, float64 [R, T], 0 where not scored, that are what `hook_surprise` shows, where that was read.

    Raises MeasurementError for a loss that is not finite, or negative, and where the hook point differs.
    """
    values, n = finite_losses(losses, scored), int(scored.sum())
    if bad := int((values < -_NEGATIVE).sum()):
        raise MeasurementError(f"the loss is negative at {bad} of {n} tokens: that is no cross-entropy")
    if HOOK in cache:
        shown = as_float64(cache[HOOK])
        if shown.shape != values.shape:
            raise MeasurementError(f"{HOOK} is {list(shown.shape)}, the losses are {list(values.shape)}")
        away = np.abs(np.where(scored, shown, 0.0) - values)
        if bad := int((~(away <= slack(values, losses, cache[HOOK]))).sum()):
            raise MeasurementError(
                f"{HOOK} is not the loss at {bad} of {n} tokens, it differs by up to {away.max():.3g} nats: it "
                "shows something else"
            )
    return values


def slack(values: FloatArray | float, *formats: Tensor) -> FloatArray:
    """How far from `values`, nats, these tensors may show the same losses, by the rounding of their formats."""
    import torch

    rounding: float = max(torch.finfo(tensor.dtype).eps for tensor in formats)
    return as_float64(_SLACK + _ULPS * rounding * np.abs(values))


class Surprise(Probe):
    """The distribution of per-token loss; definitions at the top of this file."""

    name: ClassVar[str] = "surprise"
    question: ClassVar[str] = "How surprising is the text to the model, token by token?"
    statistics: ClassVar[tuple[str, ...]] = (
        "mean_loss",
        "loss_std",
        "excess_over_uniform",
        "excess_over_unigram",
        "unigram_correlation",
        "loss_quantile",
    )

    def applies(self, subject: Subject) -> str | None:  # noqa: ARG002
        """None: every model has a loss."""
        return None

    def hooks(self, subject: Subject) -> list[str]:
        """`hook_surprise`, where the model has it."""
        return [HOOK] if HOOK in subject.module.hook_dict else []

    def accumulator(self, subject: Subject, condition: str, windows: EvalWindows) -> Accumulator:
        """Make an empty accumulator; token frequencies are counted here."""
        unigram, note = train_unigram(subject, windows), unigram_note(windows)
        return LossDistribution(condition, math.log(subject.vocab_size), unigram, note)

    def reference_nulls(self, place: Place, subject: Subject, windows: EvalWindows) -> tuple[NullValue, ...]:  # noqa: ARG002
        """What a model that guesses has, and, where that is known without a token, one that counts."""
        return {
            "mean_loss": (NullValue("analytic", math.log(subject.vocab_size)),),
            "loss_std": (NullValue("analytic", 0.0),),
            "excess_over_uniform": (NullValue("analytic", 0.0),),
            "excess_over_unigram": (NullValue("unigram", 0.0),),
            "unigram_correlation": (NullValue("unigram", 1.0),),
        }.get(place.statistic, ())


class LossDistribution(Accumulator):
    """Moments of loss x and unigram surprisal y, and a histogram of the loss."""

    def __init__(self, condition: str, uniform: float, unigram: Unigram | None, note: str = "") -> None:
        """uniform: ln V. unigram: None makes its rows `n/a`. note: what is to be said of it."""
        super().__init__(condition)
        self.uniform, self.unigram, self.note = uniform, unigram, note
        self.histogram = Histogram()

    def update(self, cache: Mapping[str, Tensor], losses: Tensor, scored: Tensor, batch: EvalBatch) -> None:
        """Add one batch; reads `hook_surprise` [R, T] if it is there. Errors as `checked_losses`."""
        mask = as_bool(scored)
        loss = checked_losses(cache, losses, mask)
        surprisal = surprisal_of(batch, self.unigram)
        both = self.moments.setdefault("both", GroupedCrossCovariance(1, 1))
        assert isinstance(both, GroupedCrossCovariance)
        both.update((loss[..., None], surprisal[..., None]), mask, batch.group)
        self.histogram.update(loss[mask])

    def state_dict(self) -> dict[str, Any]:
        """Moments and the histogram."""
        return super().state_dict() | {"histogram": self.histogram}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace both."""
        super().load_state_dict(state)
        self.histogram = state["histogram"]

    def merge(self, other: Accumulator) -> None:
        """Add another's tokens, those of its histogram too."""
        super().merge(other)
        assert isinstance(other, LossDistribution)
        self.histogram.merge(other.histogram)

    def quantities(self) -> list[Quantity]:
        """Rows with intervals; mean and spread of unigram surprisal are nulls of those of the loss."""
        if "both" not in self.moments:
            return []
        nats = functools.partial(Quantity, unit="nats", sources=self._both, smallest_effect=LOSS_EFFECT)
        mean, std = Place("mean_loss"), Place("loss_std")
        rows = [
            nats(mean, function=scalar_mean),
            nats(std, function=scalar_std, bounds=_POSITIVE),
            nats(Place("excess_over_uniform"), function=lambda both: scalar_mean(both) - self.uniform),
        ]
        if self.unigram is None:
            return rows
        return [
            *rows,
            nats(mean, function=functools.partial(scalar_mean, name="y"), null_kind="unigram"),
            nats(
                std, function=functools.partial(scalar_std, name="y"), bounds=_POSITIVE, null_kind="unigram"
            ),
            nats(
                Place("excess_over_unigram"), function=lambda both: scalar_mean(both) - scalar_mean(both, "y")
            ),
            Quantity(
                Place("unigram_correlation"), "1", correlation, self._both, COSINE_BOUNDS, CORRELATION_EFFECT
            ),
        ]

    def _both(self) -> tuple[GroupedMoments]:
        return (self.moments["both"],)

    def remarks(self) -> Mapping[Place, tuple[Verdict | None, str]]:
        """Say of every row beside the unigram model what is wrong with that."""
        names = ("mean_loss", "loss_std", "excess_over_unigram", "unigram_correlation")
        return {Place(name): (None, self.note) for name in names if self.note}

    def measurements(self) -> list[Measurement]:
        """All rows: with intervals, without a unigram model, and quantiles."""
        rows = super().measurements()
        if rows and self.unigram is None:
            nothing = value_without_tokens(math.nan)
            rows += [
                Measurement(
                    Place(name), self.condition, unit, nothing, effect, Verdict.NOT_APPLICABLE, self.note
                )
                for name, unit, effect in (
                    ("excess_over_unigram", "nats", LOSS_EFFECT),
                    ("unigram_correlation", "1", CORRELATION_EFFECT),
                )
            ]
        return rows + [
            descriptor(place, self.condition, "nats", value, self.histogram.n, _how_exact(place.component))
            for place, value in self._quantiles().items()
        ]

    def plug_ins(self) -> dict[RowKey, float]:
        """Values of all rows without their intervals."""
        return super().plug_ins() | {(self.condition, place): q for place, q in self._quantiles().items()}

    def _quantiles(self) -> dict[Place, float]:
        if not self.histogram.n:
            return {}
        return {Place("loss_quantile", component=c): self.histogram.quantile(q) for c, q in QUANTILES.items()}


def descriptor(place: Place, condition: str, unit: str, value: float, n: int, note: str) -> Measurement:
    """Make the row of a number that no interval is claimed for, and that decides nothing; `n/a` for NaN."""
    nan, zeros = math.nan, np.zeros(GROUPS)
    estimate = Estimate(value, nan, nan, nan, nan, 0, n, value, zeros, zeros)
    verdict = Verdict.NOT_APPLICABLE if math.isnan(value) else Verdict.INCONCLUSIVE
    return Measurement(place, condition, unit, estimate, override=verdict, note=note)


def _how_exact(component: str) -> str:
    exact = "exact" if component in ("min", "max") else f"within {RESOLUTION:.1%} of an observed loss"
    return f"{exact}; a descriptor: no interval, so this decides nothing"
