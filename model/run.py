"""A training run in its folder: begun afresh, or found again and continued, and what is written of it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import hopeprobe
from hopeprobe import ranks
from hopeprobe.devices import device_name
from hopeprobe.errors import BadInputError, DamagedFileError, DivergedError
from hopeprobe.files import write_atomically
from hopeprobe.model.checkpoint import Checkpoint, read, run_checkpoints, save, step_path
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.init import digest
from hopeprobe.model.optimizer import make_optimizer, recorded
from hopeprobe.model.precision import activation_dtype
from hopeprobe.model.resuming import restore
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
        """A copy of the model as it is now, for probes; its own initial weights are the run's.

        It computes in float32, as a checkpoint that is opened does: both are measured with the same ruler.
        """
        model = copy.deepcopy(self.model)
        model.activations = None
        model.zero_grad(set_to_none=True)
        record = dataclasses.replace(self._record(full=False), weights=dict(model.state_dict()))
        found = HopeSubject(model, record)
        found.name = f"step {self.step}"
        return found

    def checkpoint(self) -> Path:
        """Write the checkpoint of the current step, on rank 0; `DivergedError` instead where a weight is not finite."""
        bad = [n for n, p in self.model.named_parameters() if not p.isfinite().all()]
        if bad:  # finite gradients can do that, where the rate is absurd
            raise diverged(self, self.step, f"the update made {', '.join(bad[:3])} not finite")
        path = step_path(self.folder, self.step)
        if ranks.first():
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
            optimizer=recorded(self.optimizer, self.config.rate(self.step)) if full else None,
            generators={"torch": torch.get_rng_state()} if full else None,
        )


def diverged(run: Run, step: int, what: str) -> DivergedError:
    """What to raise where a run is not finite at a step; it names the last good checkpoint."""
    good = run_checkpoints(run.folder)
    kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
    return DivergedError(f"training stopped at step {step}: {what}. {kept}")


def _begun(
    model_config: ModelConfig, config: TrainConfig, data: TokenData, folder: Path, device: torch.device
) -> Run:
    """A run at step 0; its weights are made on the CPU wherever it is, so that a seed means the same."""
    model = HopeModel(model_config, config.seed)
    if model.unigram is not None:
        unigram = Unigram.fit(data.split_tokens("train"), model_config.vocab_size)
        model.set_frequencies(torch.from_numpy(unigram.surprisal))
    began = digest(model.state_dict().items())
    model = model.to(device)
    model.activations = activation_dtype(config.precision)
    return Run(model, make_optimizer(model, config), config, data, folder, began)


def fresh(
    model_config: ModelConfig, config: TrainConfig, data: TokenData, folder: Path, device: torch.device
) -> Run:
    """Begin a run at step 0. Raises `BadInputError` where the folder holds one already."""
    if run_checkpoints(folder):
        raise BadInputError(
            f"{folder} holds a run already: continue it with --resume, or choose another --out"
        )
    return _begun(model_config, config, data, folder, device)


def resumed(
    model_config: ModelConfig, config: TrainConfig, data: TokenData, folder: Path, device: torch.device
) -> Run:
    """Find a run again at its last resumable checkpoint, or at step 0 where it has none.

    Raises `BadInputError` where there is none, where it was set otherwise, or where its last file cannot be used;
    it says to delete that only where it is damaged.
    """
    for path in reversed(run_checkpoints(folder)):
        try:
            checkpoint = read(path)
        except DamagedFileError as error:
            raise DamagedFileError(f"{error}: delete it, and --resume goes on from the one before") from None
        if checkpoint is not None and checkpoint.optimizer is not None:
            break
    else:
        if not run_checkpoints(folder):
            if (folder / RECORD).is_file():  # killed before it had written its first
                return fresh(model_config, config, data, folder, device)
            raise BadInputError(f"{folder} holds no run to resume; start one without --resume")
        return _restart(model_config, config, data, folder, device)
    _check_same(path, checkpoint, model_config, config, data)
    if checkpoint.step > config.steps:
        raise BadInputError(
            f"{folder} has gone {checkpoint.step} steps already, more than the {config.steps} asked for: take at "
            "least as many, or choose another --out"
        )
    return _continued(checkpoint, config, data, folder, device)


def _continued(
    checkpoint: Checkpoint, config: TrainConfig, data: TokenData, folder: Path, device: torch.device
) -> Run:
    model = checkpoint.to_model().to(device)
    model.activations = activation_dtype(config.precision)
    optimizer = make_optimizer(model, config)
    try:
        restore(checkpoint, optimizer)
    except BadInputError as error:
        path = step_path(folder, checkpoint.step)
        raise BadInputError(f"{path}: {error}. Delete it, and --resume goes on from the one before") from None
    return Run(model, optimizer, config, data, folder, checkpoint.init_digest, checkpoint.step)


def on_all_ranks(
    begin: Callable[..., Run],
    model_config: ModelConfig,
    config: TrainConfig,
    data: TokenData,
    folder: Path,
    device: torch.device,
) -> Run:
    """Begin a run on rank 0, which alone looks into its folder, and take it over from there on all others.

    Raises `BadInputError` where ranks were told different things, or read different text; else as `begin`.
    """
    if ranks.size() == 1:
        return begin(model_config, config, data, folder, device)
    ranks.agreed(
        {
            "version of hopeprobe and torch": (hopeprobe.__version__, torch.__version__),
            "model configuration": model_config.to_dict(),
            "training configuration": dataclasses.asdict(config),
            "text": data.fingerprint,
            "kind of device": device.type,
        }
    )
    begun: list[Run] = []

    def begin_here() -> Checkpoint:
        begun.append(begin(model_config, config, data, folder, device))
        record = begun[0]._record(full=True)
        return dataclasses.replace(record, weights={k: v.cpu() for k, v in record.weights.items()})

    checkpoint = ranks.on_first(begin_here)
    return begun[0] if begun else _continued(checkpoint, config, data, folder, device)


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
    # What older versions did not write was as it is by default.
    train = dataclasses.asdict(TrainConfig()) | checkpoint.train
    before = {k: v for k, v in train.items() if k not in _MAY_CHANGE}
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


def _restart(
    model_config: ModelConfig, config: TrainConfig, data: TokenData, folder: Path, device: torch.device
) -> Run:
    """A run killed before its first resumable checkpoint begins again, from the same step 0."""
    path = run_checkpoints(folder)[0]
    first = read(path)
    if first is None:
        raise BadInputError(f"{path} is not a checkpoint of a run; choose another --out")
    _check_same(path, first, model_config, config, data)
    run = _begun(model_config, config, data, folder, device)
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
        "device": device_name(run.model.embed.device),
        "ranks": ranks.size(),
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
