"""Training: AdamW over packed windows, checkpoints on a schedule, metrics a line a step, resumable bit for bit.

The data order is a function of seed and step, nothing in the forward pass draws random numbers, and a checkpoint holds
the optimiser: a run that was killed and resumed writes the same bytes as one that was not (on one machine, thread
count and number of ranks; on a device, whose sums may come in any order, within their rounding).

Several ranks (`hopeprobe.ranks`) cut each batch over themselves; rank 0 writes. A run may be resumed by another number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from hopeprobe import ranks
from hopeprobe.devices import find_device
from hopeprobe.locks import run_lock
from hopeprobe.model import parallel
from hopeprobe.model.captured import step_of
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.measure import held_out
from hopeprobe.model.metrics import MetricsFile, Unwritten
from hopeprobe.model.run import Run, fresh, on_all_ranks, resumed, write_run_json
from hopeprobe.model.train_config import TrainConfig
from hopeprobe.model.truncation import check_memory
from hopeprobe.tokens import EvalWindows, TokenData, TrainWindows

__all__ = ["Progress", "Run", "TrainConfig", "train"]


class Progress(Protocol):
    """Told after every step; a progress bar, as a rule."""

    def __call__(self, step: int, metrics: dict[str, float], /) -> None:
        """`step` is done; its line of `metrics.jsonl`."""


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    data: TokenData,
    folder: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    callbacks: tuple[Callable[[Run], None], ...] = (),
    each_step: Callable[[Run], Mapping[str, Any] | None] | None = None,
    device: str | torch.device = "auto",
    capture: bool = True,
) -> Run:
    """Train a model in a folder: checkpoints, `metrics.jsonl`, `run.json`.

    `callbacks` are called with the run after every checkpoint, so that probes can run inside training; `each_step`
    after every step, and what it gives goes into that step's line of metrics; on several ranks all call all of them.
    `device` is auto, cpu, cuda or cuda:N; a run that is resumed may be on another one than before, and is then the same
    but for roundings. `capture` lets a CUDA device record a step and repeat it, which is proved on the first ones
    (`captured.py`).

    Raises:
        BadInputError: the folder holds a run already (without `resume`) or none (with it); the configuration differs;
        another process trains there.
        DivergedError: the loss or a gradient is not finite; the message says where that began, the last good
        checkpoint stays.
    """
    where = find_device(device)
    parallel.rows(config.batch)  # which refuses more ranks than windows
    check_memory(model_config, parallel.rows_together(config.batch, where), where)
    forked = [where] if where.type == "cuda" else []
    lock = run_lock(folder) if ranks.first() else nullcontext()
    with lock, torch.random.fork_rng(forked):  # the caller's generators stay as they were
        torch.manual_seed(
            config.seed
        )  # torch's own is another in every process, and checkpoints hold its state
        return _train(
            model_config, config, data, folder, where, capture, resume, progress, callbacks, each_step
        )


def _train(
    model_config: ModelConfig,
    config: TrainConfig,
    data: TokenData,
    folder: Path,
    device: torch.device,
    capture: bool,
    resume: bool,
    progress: Progress | None,
    callbacks: tuple[Callable[[Run], None], ...],
    each_step: Callable[[Run], Mapping[str, Any] | None] | None,
) -> Run:
    train_windows = TrainWindows(data, model_config.context, config.batch, config.seed)
    unseen = _unseen(data, model_config, config)
    begin = resumed if resume else fresh
    run = on_all_ranks(begin, model_config, config, data, folder, device)
    due = config.checkpoint_steps()
    metrics_file = MetricsFile(folder, run.step) if ranks.first() else Unwritten()
    if ranks.first():  # the first that is written: where it is, the run goes on with `resume`
        write_run_json(run, train_windows)
    if run.step == 0:
        run.checkpoint()
        for callback in callbacks:
            callback(run)
    make_step = parallel.RankStep(run) if ranks.size() > 1 else step_of(run, capture)
    with metrics_file as write_line:
        while run.step < config.steps:
            started = time.perf_counter()
            tokens = torch.from_numpy(train_windows.batch_at(run.step))
            rate = config.rate(run.step + 1)
            look = make_step(tokens, rate)
            run.step += 1
            elapsed = time.perf_counter() - started
            metrics = {
                "loss": look.loss,
                "grad_norm": look.norm,
                "learning_rate": rate,
                "surprise_min": look.lowest,
                "gate_rate": look.gate,
                "retention": look.retention,
                "norm_ratio": look.ratio,
                "tokens_per_s": tokens[:, 1:].numel() / elapsed,
            }
            if unseen is not None and (run.step % config.eval_every == 0 or run.step == config.steps):
                metrics |= _of_unseen(run.model, unseen)
            seen = None if each_step is None else each_step(run)
            write_line({"step": run.step, **metrics, **(seen or {})})
            if progress is not None:
                progress(run.step, metrics)
            if run.step in due:
                parallel.check_weights(run.model)
                metrics_file.sync()
                run.checkpoint()
                for callback in callbacks:
                    callback(run)
    return run


def _of_unseen(model: HopeModel, windows: EvalWindows) -> dict[str, Any]:
    """Losses of text that is not trained on; of one that is not finite also why."""
    found: dict[str, Any] = {}
    for name, frozen in (("held_out_live", False), ("held_out_frozen", True)):
        seen = held_out(model, windows, frozen)
        found[name] = seen.loss
        if seen.not_finite:
            shown = "; ".join(seen.not_finite[:3])
            found[f"{name}_not_finite"] = f"{len(seen.not_finite)} of {windows.n_windows} windows: {shown}"
    return found


def _unseen(data: TokenData, model_config: ModelConfig, config: TrainConfig) -> EvalWindows | None:
    available = int((data.lengths("heldout") - 1).sum())
    if available < 1:
        return None
    return EvalWindows(
        data, context=model_config.context, tokens=min(config.eval_tokens, available), batch=config.batch
    )
