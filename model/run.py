"""A training run in its folder: begun afresh, or found again and continued, and what is written of it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

import hopeprobe
from hopeprobe.errors import BadInputError, DivergedError
from hopeprobe.files import write_atomically
from hopeprobe.model.checkpoint import Checkpoint, read, run_checkpoints, save, step_path
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.init import digest
from hopeprobe.model.subject import HopeSubject
from hopeprobe.model.train_config import TrainConfig
from hopeprobe.tokens import TokenData, TrainWindows, Unigram

RECORD = "run.json"
"""What a run is made of: the first of its files."""


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
            raise diverged(self, self.step, f"the update made {', '.join(bad[:3])} not finite")
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


def diverged(run: Run, step: int, what: str) -> DivergedError:
    """What to raise where a run is not finite at a step; it names the last good checkpoint."""
    good = run_checkpoints(run.folder)
    kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
    return DivergedError(f"training stopped at step {step}: {what}. {kept}")


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


def _made(model_config: ModelConfig, config: TrainConfig, data: TokenData) -> HopeModel:
    model = HopeModel(model_config, config.seed)
    if model.unigram is not None:
        unigram = Unigram.fit(data.split_tokens("train"), model_config.vocab_size)
        model.set_frequencies(torch.from_numpy(unigram.surprisal))
    return model


def fresh(model_config: ModelConfig, config: TrainConfig, data: TokenData, folder: Path) -> Run:
    """Begin a run at step 0. Raises `BadInputError` where the folder holds one already."""
    if run_checkpoints(folder):
        raise BadInputError(
            f"{folder} holds a run already: continue it with --resume, or choose another --out"
        )
    model = _made(model_config, config, data)
    return Run(model, make_optimizer(model, config), config, data, folder, digest(model.state_dict().items()))


def resumed(model_config: ModelConfig, config: TrainConfig, data: TokenData, folder: Path) -> Run:
    """Find a run again at its last resumable checkpoint, or at step 0 where it has none.

    Raises `BadInputError` where there is none, where it was set otherwise, or where its last file is damaged.
    """
    for path in reversed(run_checkpoints(folder)):
        try:
            checkpoint = read(path)
        except BadInputError as error:
            raise BadInputError(f"{error}: delete it, and --resume goes on from the one before") from None
        if checkpoint is not None and checkpoint.optimizer is not None:
            break
    else:
        if not run_checkpoints(folder):
            if (folder / RECORD).is_file():  # killed before it had written its first
                return fresh(model_config, config, data, folder)
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


def write_run_json(run: Run, windows: TrainWindows) -> None:
    """Write `run.json`: what the run is made of and trained on."""
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
    write_atomically(run.folder / RECORD, (json.dumps(content, indent=2) + "\n").encode())
