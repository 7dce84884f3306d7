"""Training: AdamW over packed windows, checkpoints on a schedule, metrics a line a step, resumable bit for bit.

The data order is a function of seed and step, nothing in the forward pass draws random numbers, and a checkpoint holds
the optimiser: a run that was killed and resumed writes the same bytes as one that was not (on one machine and thread
count).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hopeprobe.locks import run_lock
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.finite import first_not_finite
from hopeprobe.model.measure import Watch, held_out, norm_ratio
from hopeprobe.model.metrics import MetricsFile
from hopeprobe.model.run import Run, diverged, fresh, resumed, write_run_json
from hopeprobe.model.state import detach_state
from hopeprobe.model.train_config import TrainConfig
from hopeprobe.model.truncation import check_memory, segments
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
) -> Run:
    """Train a model in a folder: checkpoints, `metrics.jsonl`, `run.json`.

    `callbacks` are called with the run after every checkpoint, so that probes can run inside training; `each_step`
    after every step, and what it gives goes into that step's line of metrics.

    Raises:
        BadInputError: the folder holds a run already (without `resume`) or none (with it); the configuration differs;
        another process trains there.
        DivergedError: the loss or a gradient is not finite; the message says where that began, the last good
        checkpoint stays.
    """
    check_memory(model_config, config.batch)
    with run_lock(folder):
        return _train(model_config, config, data, folder, resume, progress, callbacks, each_step)


def _train(
    model_config: ModelConfig,
    config: TrainConfig,
    data: TokenData,
    folder: Path,
    resume: bool,
    progress: Progress | None,
    callbacks: tuple[Callable[[Run], None], ...],
    each_step: Callable[[Run], Mapping[str, Any] | None] | None,
) -> Run:
    train_windows = TrainWindows(data, model_config.context, config.batch, config.seed)
    unseen = _unseen(data, model_config, config)
    run = resumed(model_config, config, data, folder) if resume else fresh(model_config, config, data, folder)
    due = config.checkpoint_steps()
    metrics_file = MetricsFile(folder, run.step)
    write_run_json(
        run, train_windows
    )  # the first that is written: where it is, the run goes on with `resume`
    if run.step == 0:
        run.checkpoint()
        for callback in callbacks:
            callback(run)
    watch = Watch(run.model)
    with metrics_file as write_line:
        while run.step < config.steps:
            started = time.perf_counter()
            tokens = torch.from_numpy(train_windows.batch_at(run.step))
            metrics = _update(run, tokens, watch)
            elapsed = time.perf_counter() - started
            metrics["tokens_per_s"] = tokens[:, 1:].numel() / elapsed
            if unseen is not None and (run.step % config.eval_every == 0 or run.step == config.steps):
                metrics["held_out_live"] = held_out(run.model, unseen).loss
                metrics["held_out_frozen"] = held_out(run.model, unseen, frozen=True).loss
            seen = None if each_step is None else each_step(run)
            write_line({"step": run.step, **metrics, **(seen or {})})
            if progress is not None:
                progress(run.step, metrics)
            if run.step in due:
                metrics_file.sync()
                run.checkpoint()
                for callback in callbacks:
                    callback(run)
    return run


def _update(run: Run, tokens: Tensor, watch: Watch) -> dict[str, float]:
    """One optimiser step; nothing is changed when the loss or the gradient is not finite."""
    config = run.config
    step = run.step + 1
    for group in run.optimizer.param_groups:
        group["lr"] = config.rate(step)
    run.optimizer.zero_grad(set_to_none=True)
    loss, lowest, state = 0.0, math.inf, run.model.init_state(tokens.shape[0])
    with watch.on():
        for part in segments(run.model.config, tokens):
            out = run.model(part, state=state)
            mean = out.losses.sum() / tokens[:, 1:].numel()
            loss += mean.item()
            lowest = min(
                lowest, float(out.losses.detach().min())
            )  # every token of a training window is scored
            if not math.isfinite(loss):
                where = first_not_finite(run.model, tokens) or "in no hook point: the weights of the head"
                raise diverged(run, step, f"the loss is {loss}; the first value that is not finite: {where}")
            mean.backward()
            state = detach_state(out.state)
    ratio = norm_ratio(run.model, state)
    parameters = list(run.model.parameters())
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = float(total)
    if not math.isfinite(norm):  # before clipping, which would spread it over all parameters
        bad = [
            n for n, p in run.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
        ]
        hidden = first_not_finite(run.model, tokens)  # one that the loss does not see yet, as a rule
        began = f"; the first value that is not finite: {hidden}" if hidden else ""
        raise diverged(
            run, step, f"the gradient is not finite, in {', '.join(bad[:3]) or 'its norm alone'}{began}"
        )
    torch.nn.utils.clip_grads_with_norm_(parameters, config.clip, total)
    run.optimizer.step()
    run.step = step
    return {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": config.rate(step),
        "surprise_min": lowest,
        "gate_rate": watch.mean("gate"),
        "retention": watch.mean("alpha"),
        "norm_ratio": ratio,
    }


def _unseen(data: TokenData, model_config: ModelConfig, config: TrainConfig) -> EvalWindows | None:
    available = int((data.lengths("heldout") - 1).sum())
    if available < 1:
        return None
    return EvalWindows(
        data, context=model_config.context, tokens=min(config.eval_tokens, available), batch=config.batch
    )
