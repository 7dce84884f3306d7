"""Streaming evaluation with gates at a budget against the same model with every token written, in turn."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

import clock
import flops
import torch
from clock import Row

from hopeprobe.model.config import GateConfig, preset
from hopeprobe.model.hope import HopeModel

BATCH, LENGTH = 8, 256
GATES = {
    "50 %": GateConfig("quantile", budget=0.5),
    "25 %": GateConfig("quantile", budget=0.25),
    "10 %": GateConfig("quantile", budget=0.1),
    "10 %, by chance": GateConfig("random", budget=0.1),
    "5 %": GateConfig("quantile", budget=0.05),
}


def _streaming(name: str, gate: GateConfig) -> Callable[[], object]:
    config = dataclasses.replace(preset(name), context=LENGTH, gate=gate)
    model = HopeModel(config)
    tokens = torch.randint(
        0, config.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0)
    )

    @torch.no_grad()
    def work() -> None:
        model(tokens)

    return work


def rows(name: str, turns: int) -> list[Row]:
    """A row a budget; its ceiling is what operations alone would give, as reading and the losses are never skipped."""
    every = "100 %"
    works = {every: _streaming(name, GateConfig())}
    works |= {label: _streaming(name, gate) for label, gate in GATES.items()}
    times = clock.by_turns(works, turns)
    tokens, config = BATCH * LENGTH, preset(name)
    found = []
    for label, gate in GATES.items():
        ratios = [a / b for a, b in zip(times[every], times[label], strict=True)]
        most = flops.streaming(config) / flops.streaming(config, gate.budget or 1.0)
        found.append(
            Row(
                f"{name} full, streaming evaluation, gate at {label}", tokens / statistics.median(times[label]),
                tokens / statistics.median(times[every]), statistics.median(ratios), unit="tokens/s",
                peer_is="every token written",
                note=f"turns {min(ratios):.2f} to {max(ratios):.2f}; operations alone would give {most:.2f}x",
                turns={k: times[k] for k in (every, label)},
            )
        )  # fmt: skip
    return found
