"""Analyse checkpoints: by torchrun, on as many ranks as there are, or called in one process."""

import json
import sys
from pathlib import Path

import torch

import hopeprobe
from hopeprobe import ranks
from hopeprobe.errors import MeasurementError
from hopeprobe.probes import PROBES
from hopeprobe.probes.base import Accumulator
from hopeprobe.probes.integrity import MeanLoss
from hopeprobe.probes.relative_surprise import RelativeSurprise
from hopeprobe.tokens import TokenData


class Fails(MeanLoss):
    """Cannot go on at one window, nor at one after it."""

    def update(self, cache, losses, scored, batch):
        for window in (150, 60):
            if window in batch.index:
                raise MeasurementError(f"window {window} cannot be measured")
        super().update(cache, losses, scored, batch)


class Counts(MeanLoss):
    """Keeps and merges more than moments, and does not say how that is sent."""

    def merge(self, other: Accumulator) -> None:
        super().merge(other)


class Odd(hopeprobe.Probe):
    question = "What does not go well?"
    statistics = ("live_loss",)

    def __init__(self, name, accumulator):
        self.name, self.make = name, accumulator

    def applies(self, subject):
        return None

    def accumulator(self, subject, condition, windows):
        return self.make(condition)


def probes(which):
    """All but what reads gradients, of gate rules a few; or three, one of which does not go well."""
    if which == "few":
        return [PROBES["surprise"], PROBES["integrity"], Odd("fails", Fails)]
    known = [PROBES[name] for name in PROBES if name not in ("relative-surprise", "learning-signal")]
    return [*known, RelativeSurprise(budgets=(0.25,), rules=["quantile", "absolute"], sample=False)]


def run(documents, checkpoints, cache, chosen):
    data = TokenData.from_documents(
        json.loads(Path(documents).read_text()), name="toy", vocab_size=97, end_of_text=0
    )
    # Of some 45 windows each group of documents has few, and those on several ranks.
    return hopeprobe.analyze(
        checkpoints, chosen, data, 4000, "all", batch=7, fresh=2, fresh_tokens=400, cache_dir=cache
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    which, documents, cache, output, *checkpoints = sys.argv[1:]
    with ranks.joined():
        odd = [Odd("counts", Counts)] if which == "few" else []
        results = run(documents, checkpoints, cache, [*probes(which), *odd])
        Path(f"{output}-{ranks.rank()}.json").write_text(results.to_json())
