"""Training: AdamW over packed windows, checkpoints on a schedule, metrics a line a step, resumable bit for bit.

The data order is a function of seed and step, nothing in the forward pass draws random numbers, and a checkpoint holds
the optimiser: a run that was killed and resumed writes the same bytes as one that was not (on one machine and thread
count).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import hopeprobe
from hopeprobe.errors import BadInputError, DivergedError
from hopeprobe.files import write_atomically
from hopeprobe.hooks import HookPoint
from hopeprobe.model.checkpoint import Checkpoint, read, run_checkpoints, save, step_path
from hopeprobe.model.config import MEMORIES, ModelConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.init import digest
from hopeprobe.model.measure import Watch, held_out, norm_ratio
from hopeprobe.model.metrics import MetricsFile
from hopeprobe.model.state import detach_state
from hopeprobe.model.subject import HopeSubject
from hopeprobe.model.truncation import check_memory, segments
from hopeprobe.tokens import EvalWindows, TokenData, TrainWindows, Unigram

EARLY_STEPS = (0, 1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. AdamW, linear warm-up, then a constant rate: any run can be extended."""

    steps: int = 2000
    batch: int = 8
    learning_rate: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # on matrices; not on gate biases, norms and other vectors
    clip: float = 1.0  # largest norm of the gradient
    warmup: int = 20  # steps
    seed: int = 0
    checkpoint_every: int = 200
    eval_every: int = 100
    eval_tokens: int = 8192

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "learning_rate",
            "clip",
            "checkpoint_every",
            "eval_every",
            "eval_tokens",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInputError(f"{name} is {getattr(self, name)!r}, must be above zero and finite")
        for name in ("warmup", "seed", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise BadInputError(f"{name} is {getattr(self, name)!r}, must not be negative")

    def rate(self, step: int) -> float:
        """Learning rate of the update that makes step `step` (1, 2, ...)."""
        return self.learning_rate * min(1.0, step / max(1, self.warmup))

    def checkpoint_steps(self) -> set[int]:
        """Steps after which a checkpoint is written."""
        regular = range(0, self.steps + 1, self.checkpoint_every)
        return {s for s in (*EARLY_STEPS, *regular, self.steps) if s <= self.steps}

    def resumable(self, step: int) -> bool:
        """Does the checkpoint of this step carry the optimiser's state."""
        return step > 0 and (step == self.steps or step % self.checkpoint_every == 0)


class Progress(Protocol):
    """Told after every step; a progress bar, as a rule."""

    def __call__(self, step: int, metrics: dict[str, float], /) -> None:
        """`step` is done; its line of `metrics.jsonl`."""


@dataclass
class Run:
    """A training run in a folder; `train` makes and drives it."""

    model: HopeModel
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    data: TokenData
    folder: Path
    init_digest: str
    step: int = 0

    def subject(self) -> HopeSubject:
        """A copy of the model as it is now, for probes; its own initial weights are the run's."""
        model = copy.deepcopy(self.model)
        model.zero_grad(set_to_none=True)
        record = dataclasses.replace(self._record(full=False), weights=dict(model.state_dict()))
        found = HopeSubject(model, record)
        found.name = f"step {self.step}"
        return found

    def checkpoint(self) -> Path:
        """Write the checkpoint of the current step; `DivergedError` instead where a weight is not finite."""
        bad = [n for n, p in self.model.named_parameters() if not p.isfinite().all()]
        if bad:  # finite gradients can do that, where the rate is absurd
            raise _diverged(self, self.step, f"the update made {', '.join(bad[:3])} not finite")
        path = step_path(self.folder, self.step)
        save(path, self._record(full=self.config.resumable(self.step)))
        return path

    def _record(self, full: bool) -> Checkpoint:
        """The current step; `full`: with what training goes on from."""
        return Checkpoint(
            config=self.model.config,
            seed=self.config.seed,
            step=self.step,
            weights=dict(self.model.state_dict()),
            init_digest=self.init_digest,
            tokenizer=self.data.tokenizer,
            data=self.data.identity(),
            train=dataclasses.asdict(self.config),
            optimizer=self.optimizer.state_dict() if full else None,
            generators={"torch": torch.get_rng_state()} if full else None,
        )


def make_optimizer(model: HopeModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; decay on matrices only: vectors and scalars (norms, gate biases, biases) are left alone."""
    named = list(model.named_parameters())
    decayed = [p for _, p in named if p.ndim >= 2]
    plain = [p for _, p in named if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )


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
        BadInputError: the folder holds a run already (without `resume`) or none (with it); the configuration differs.
        DivergedError: the loss or a gradient is not finite; the message says where that began, the last good
        checkpoint stays.
    """
    check_memory(model_config, config.batch)
    train_windows = TrainWindows(data, model_config.context, config.batch, config.seed)
    unseen = _unseen(data, model_config, config)
    run = (
        _resumed(model_config, config, data, folder) if resume else _fresh(model_config, config, data, folder)
    )
    due = config.checkpoint_steps()
    metrics_file = MetricsFile(folder, run.step)
    _write_run_json(run, train_windows)
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
                raise _diverged(run, step, f"the loss is {loss}; the first value that is not finite: {where}")
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
        raise _diverged(
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


def _diverged(run: Run, step: int, what: str) -> DivergedError:
    good = run_checkpoints(run.folder)
    kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
    return DivergedError(f"training stopped at step {step}: {what}. {kept}")


@torch.no_grad()
def first_not_finite(model: HopeModel, tokens: Tensor) -> str | None:
    """Run a batch again and name the first hook point whose value is not finite, with its layer and memory, if any."""
    found: list[str] = []

    def look(tensor: Tensor, hook: HookPoint) -> None:
        if not found and not bool(tensor.isfinite().all()):
            found.append(hook.name)

    with model.hooks(fwd_hooks=[(lambda _: True, look)], allow_unfired=True):
        model(tokens)
    if not found:
        return None
    parts = found[0].split(".")
    place = f"layer {parts[1]}" if parts[0] == "blocks" else "outside the layers"
    owner = ""
    if len(parts) == 5:
        owner = f", {parts[2]} level {parts[3]}" if parts[2] == "cms" else f", memory {parts[3]}"
    elif len(parts) == 4:
        memory = {"out": "memory"}.get(parts[3].removeprefix("hook_"), parts[3].removeprefix("hook_"))
        owner = f", memory {memory}" if parts[2] == "selfmod" and memory in MEMORIES else f", {parts[2]}"
    return f"{place}{owner} ({found[0]})"


def _unseen(data: TokenData, model_config: ModelConfig, config: TrainConfig) -> EvalWindows | None:
    available = int((data.lengths("heldout") - 1).sum())
    if available < 1:
        return None
    return EvalWindows(
        data, context=model_config.context, tokens=min(config.eval_tokens, available), batch=config.batch
    )


def _made(model_config: ModelConfig, config: TrainConfig, data: TokenData) -> HopeModel:
    model = HopeModel(model_config, config.seed)
    if model.unigram is not None:
        unigram = Unigram.fit(data.split_tokens("train"), model_config.vocab_size)
        model.set_frequencies(torch.from_numpy(unigram.surprisal))
    return model


def _fresh(model_config: ModelConfig, config: TrainConfig, data: TokenData, folder: Path) -> Run:
    if run_checkpoints(folder):
        raise BadInputError(
            f"{folder} holds a run already: continue it with --resume, or choose another --out"
        )
    model = _made(model_config, config, data)
    return Run(model, make_optimizer(model, config), config, data, folder, digest(model.state_dict().items()))


def _resumed(model_config: ModelConfig, config: TrainConfig, data: TokenData, folder: Path) -> Run:
    for path in reversed(run_checkpoints(folder)):
        try:
            checkpoint = read(path)
        except BadInputError as error:
            raise BadInputError(f"{error}: delete it, and --resume goes on from the one before") from None
        if checkpoint is not None and checkpoint.optimizer is not None:
            break
    else:
        if not run_checkpoints(folder):
            raise BadInputError(f"{folder} holds no run to resume; start one without --resume")
        return _restart(model_config, config, data, folder)
    _check_same(path, checkpoint, model_config, config, data)
    if checkpoint.step > config.steps:
        raise BadInputError(
            f"{folder} has gone {checkpoint.step} steps already, more than the {config.steps} asked for: take at "
            "least as many, or choose another --out"
        )
    model = checkpoint.to_model()
    optimizer = make_optimizer(model, config)
    optimizer.load_state_dict(checkpoint.optimizer or {})
    if checkpoint.generators:
        torch.set_rng_state(checkpoint.generators["torch"])
    return Run(model, optimizer, config, data, folder, checkpoint.init_digest, checkpoint.step)


#: What a resumed run may have different without ceasing to be the same run.
_MAY_CHANGE = ("steps", "checkpoint_every", "eval_every", "eval_tokens")


def _check_same(
    path: Path, checkpoint: Checkpoint, model_config: ModelConfig, config: TrainConfig, data: TokenData
) -> None:
    """`BadInputError` says what differs between the run that wrote a checkpoint and the one that would continue it."""
    instead = "Go on with the options it was begun with, or choose another --out"
    if checkpoint.config != model_config:
        raise BadInputError(
            f"{path} was trained with another model configuration: {_difference(checkpoint, model_config)}. {instead}"
        )
    before = {k: v for k, v in checkpoint.train.items() if k not in _MAY_CHANGE}
    now = {k: v for k, v in dataclasses.asdict(config).items() if k not in _MAY_CHANGE}
    if before != now:
        changed = [f"{k} was {before.get(k)!r}, is {now[k]!r}" for k in now if before.get(k) != now[k]]
        raise BadInputError(
            f"{path} was trained in another way: {'; '.join(changed)}. Only {', '.join(_MAY_CHANGE)} may change. "
            f"{instead}"
        )
    if checkpoint.data.get("fingerprint") != data.identity()["fingerprint"]:
        raise BadInputError(
            f"{path} was trained on {checkpoint.data.get('name')!r}, whose tokens differ from those of {data.name!r} "
            f"as it is here and now. {instead}"
        )


def _restart(model_config: ModelConfig, config: TrainConfig, data: TokenData, folder: Path) -> Run:
    """A run killed before its first resumable checkpoint begins again, from the same step 0."""
    path = run_checkpoints(folder)[0]
    first = read(path)
    if first is None:
        raise BadInputError(f"{path} is not a checkpoint of a run; choose another --out")
    _check_same(path, first, model_config, config, data)
    model = _made(model_config, config, data)
    run = Run(model, make_optimizer(model, config), config, data, folder, digest(model.state_dict().items()))
    if first.init_digest != run.init_digest:
        raise BadInputError(f"{path} began from other initial weights than these; choose another --out")
    return run


def _difference(checkpoint: Checkpoint, config: ModelConfig) -> str:
    before, now = dataclasses.asdict(checkpoint.config), dataclasses.asdict(config)
    return "; ".join(f"{k} was {before[k]!r}, is {now[k]!r}" for k in now if before[k] != now[k])


def _write_run_json(run: Run, windows: TrainWindows) -> None:
    content = {
        "hopeprobe": hopeprobe.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": run.model.config.to_dict(),
        "train": dataclasses.asdict(run.config),
        "data": run.data.identity(),
        "epochs": run.config.steps
        * run.config.batch
        / max(1, run.data.n_tokens("train") // run.model.config.context),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "init_digest": run.init_digest,
        "first_batch": hashlib.sha256(windows.batch_at(0).astype("<i8").tobytes()).hexdigest(),
    }
    write_atomically(run.folder / "run.json", (json.dumps(content, indent=2) + "\n").encode())
