"""`hopeprobe train`: from options to a run, with a progress bar."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hopeprobe import ranks
from hopeprobe.cli.terminal import Report, console, progress, say
from hopeprobe.devices import default_precision, find_device
from hopeprobe.files import check_places
from hopeprobe.locks import refuse_held
from hopeprobe.model.config import PRESET_LEARNING_RATE, GateConfig, preset, published
from hopeprobe.model.run import RECORD
from hopeprobe.model.train import Progress, Run, TrainConfig, train
from hopeprobe.tokens import TokenData, TrainWindows, load_tokens

if TYPE_CHECKING:
    import torch

    from hopeprobe.monitor import Monitor


def load_data(data: list[str], report: Report) -> TokenData:
    """Tokenise, or take from the cache."""
    return load_tokens(
        data,
        progress=lambda documents, tokens: report(f"tokenising: {tokens:,} tokens, document", documents, 0),
    )


def training_progress(report: Report, steps: int, notes: list[str]) -> Progress:
    """What `train` calls after every step; what people should know of one goes to `notes`."""

    def after(step: int, metrics: dict[str, Any]) -> None:
        for name, why in metrics.items():
            if name.endswith("_not_finite"):
                notes.append(f"step {step}: {name.removesuffix('_not_finite')} is not finite in {why}")
        text = f"training: loss {metrics['loss']:.3f}, {metrics['tokens_per_s']:,.0f} tokens/s, step"
        report(text, step, steps)

    return after


def run_training(
    out: Path,
    *,
    preset_name: str,
    variant: str,
    data: list[str],
    use_published: bool,
    truncate_ticks: int,
    gate: tuple[GateConfig, float | None],
    resume: bool,
    steps: int,
    seed: int,
    batch: int,
    learning_rate: float | None,
    checkpoint_every: int,
    eval_every: int,
    probes: list[str],
    probe_every: int,
    probe_tokens: int,
    device: str,
    precision: str | None,
    capture: bool,
) -> Run:
    """Train as the options say; say at the end what there is."""
    where = find_device(device)
    config = preset(preset_name, variant)
    config = published(config) if use_published else config
    threshold = config.surprise_threshold if gate[1] is None else gate[1]
    config = dataclasses.replace(
        config, truncate_ticks=truncate_ticks, gate=gate[0], surprise_threshold=threshold
    )
    if learning_rate is None:
        learning_rate = PRESET_LEARNING_RATE.get(preset_name, TrainConfig.learning_rate)
    train_config = TrainConfig(
        steps=steps,
        seed=seed,
        batch=batch,
        learning_rate=learning_rate,
        checkpoint_every=checkpoint_every,
        eval_every=eval_every,
        precision=_precision(precision, where, out if resume else None),
    )
    if ranks.first():
        check_places(folders=[out])
        refuse_held(out)
    monitor = _monitor(probes, data, probe_every, probe_tokens)
    notes: list[str] = []
    with progress() as report:
        tokens = load_data(data, report)
        if monitor is not None:
            monitor.data = tokens
        epochs = TrainWindows(tokens, config.context, batch, seed).epochs(steps)
        run = train(
            config,
            train_config,
            tokens,
            out,
            resume=resume,
            progress=training_progress(report, steps, notes),
            each_step=monitor,
            device=where,
            capture=capture,
        )
    screen = console()
    if monitor is not None:
        say(
            screen,
            f"probes every {probe_every} steps: {len(monitor.results.rows)} rows, in {out}/metrics.jsonl",
        )
    for note in notes[-3:]:
        say(console(stderr=True), note)
    say(screen, f"{out}: {run.step} steps, {epochs:.2g} epochs of {tokens.name}")
    say(screen, f"next: hopeprobe analyze {out}/step-{run.step:06d}.pt --all")
    return run


def _precision(asked: str | None, where: torch.device, resumed: Path | None) -> str:
    """As asked; else as the run has it that goes on, else what suits the device."""
    if asked is None and resumed is not None:
        # What is wrong with it is said where it is resumed.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            record = json.loads((resumed / RECORD).read_text(encoding="utf-8"))
            return str(record["train"].get("precision", TrainConfig.precision))
    return default_precision(where) if asked is None else asked


def _monitor(probes: list[str], data: list[str], every: int, tokens: int) -> Monitor | None:
    """What measures while it trains; imported only where it is asked for."""
    if not probes:
        return None
    from hopeprobe.monitor import Monitor

    return Monitor(probes, data, tokens, every)
