"""Checkpoints: one versioned file, written atomically, read strictly; as safetensors, all but the optimiser's state.

Layout (format "hopeprobe-hope", version 1): plain data and tensors only, so that `torch.load(weights_only=True)`
reads it and code hidden in a foreign file is never executed. Early checkpoints carry weights alone; those a run can
resume from carry the optimiser and generator states as well.
"""

from __future__ import annotations

import dataclasses
import io
import re
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hopeprobe.documents import parse_json
from hopeprobe.errors import BadInputError, near_names
from hopeprobe.files import write_atomically
from hopeprobe.model.config import ModelConfig, from_dict
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.init import FREQUENCIES, digest
from hopeprobe.safetensors_files import DIGEST, is_safetensors, read_safetensors
from hopeprobe.torch_files import read_torch

FORMAT = "hopeprobe-hope"
VERSION = 1
#: What `torch.compile` and DistributedDataParallel put before every key; nothing else is guessed.
_PREFIXES = ("_orig_mod.", "module.")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds."""

    config: ModelConfig
    seed: int
    step: int
    weights: dict[str, Tensor]
    init_digest: str  # of the run's step-0 weights
    tokenizer: str
    data: dict[str, Any] = field(default_factory=dict)  # identity of the training data
    train: dict[str, Any] = field(default_factory=dict)  # the training configuration
    optimizer: dict[str, Any] | None = None
    generators: dict[str, Tensor] | None = None

    def to_model(self) -> HopeModel:
        """Build the model with these weights; raises `BadInputError` for a missing, unexpected or reshaped key."""
        dtype = next(iter(self.weights.values())).dtype
        model = HopeModel(self.config, None, dtype)
        model.seed = self.seed
        check_keys(model.state_dict(), self.weights)
        model.load_state_dict(self.weights)
        return model


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies: `DIR/step-000200.pt`."""
    return folder / f"step-{step:06d}.pt"


def run_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, by step; a file of another name, as a copy has, is none."""
    named = (
        (re.fullmatch(r"step-(\d{6,})\.pt", path.name, re.ASCII), path) for path in folder.glob("step-*.pt")
    )
    return [path for _, path in sorted((int(found[1]), path) for found, path in named if found)]


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically."""
    content = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}
    content |= {"format": FORMAT, "version": VERSION, "config": checkpoint.config.to_dict()}
    content["weights"] = {k: v.detach().cpu() for k, v in checkpoint.weights.items()}
    buffer = io.BytesIO()
    torch.save(_anew(content), buffer)
    write_atomically(path, buffer.getvalue())


def _anew(tree: Any) -> Any:
    """The same plain data with every text once and nothing else shared.

    Pickle writes what is met again as a reference, and what was loaded shares other things than what was made: a
    resumed run would write other bytes.
    """
    if isinstance(tree, str):
        return sys.intern(str(tree))
    if isinstance(tree, Mapping):
        return {_anew(key): _anew(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_anew(value) for value in tree)
    return tree


def read(path: Path) -> Checkpoint | None:
    """Read a checkpoint; None when it is a readable file of another kind.

    Raises `BadInputError` for a file that is damaged (`DamagedFileError`), holds code, is of a newer version, or does
    not fit its own config.
    """
    content = _of_safetensors(path) if is_safetensors(path) else read_torch(path)
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        return None
    if content.get("version") != VERSION:
        found = reprlib.repr(content.get("version"))
        raise BadInputError(
            f"{path} has checkpoint version {found}, this hopeprobe reads {VERSION}: update hopeprobe"
        )
    names = [f.name for f in dataclasses.fields(Checkpoint)]
    unknown = [k for k in content if k not in (*names, "format", "version")]
    missing = [k for k in names if k not in content]
    if unknown or missing:
        raise BadInputError(
            f"{path} does not have the fields of a checkpoint: "
            + "; ".join(([f"missing {', '.join(missing)}"] if missing else [])
                        + [f"unexpected {k!r:.60}{near_names(str(k)[:100], names)}" for k in unknown[:3]])
        )  # fmt: skip
    try:
        return checked({name: content[name] for name in names})
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from None


def _of_safetensors(path: Path) -> dict[str, Any]:
    """What `hopeprobe export` wrote, as the content of a checkpoint; empty where somebody else wrote the file."""
    weights, metadata = read_safetensors(path)
    if not metadata.get("checkpoint"):
        return {}
    if DIGEST not in metadata:
        raise BadInputError(f"{path} is damaged: it has no digest; export the checkpoint again")
    try:
        content = parse_json(metadata["checkpoint"])
    except ValueError as error:
        raise BadInputError(f"{path}: its metadata, checkpoint, are no JSON: {error}") from None
    if not isinstance(content, dict):
        return {}
    return {**content, "weights": weights, "optimizer": None, "generators": None}


def checked(values: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint of plain data and tensors by its fields' names. Raises `BadInputError` for what does not fit."""
    for name, kinds in _KINDS.items():
        value = values[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise BadInputError(f"its {name} is {reprlib.repr(value)}, which it cannot be")
    if values["step"] < 0:
        raise BadInputError(f"its step is {values['step']}, below 0")
    if not all(isinstance(key, str) for part in ("data", "train") for key in values[part]):
        raise BadInputError("its data or train have keys that are no text")
    config = from_dict(ModelConfig, values["config"])
    weights = _without_prefix(values["weights"])
    if config.layers * max(1, len(config.levels)) > len(weights):  # each has weights of its own
        raise BadInputError(
            f"the weights do not fit the configuration: {config.layers} layers, and {len(weights)} weights in all"
        )
    try:
        expected = HopeModel.shapes(config)
    except RuntimeError as error:  # more numbers than torch can count
        raise BadInputError(f"no model is as large as its configuration: {error}") from None
    check_keys(expected, weights)
    total = sum(weight.numel() for weight in weights.values())
    owned = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in weights.values()}
    if total * next(iter(weights.values())).element_size() > sum(owned.values()):
        raise BadInputError(
            "its weights share their numbers, so that the model would be larger than the file"
        )
    return Checkpoint(**{**values, "config": config, "weights": weights})


#: What the fields can be; `config` and `weights` are looked at more closely.
_KINDS: dict[str, tuple[type, ...]] = {
    "seed": (int,), "step": (int,), "init_digest": (str,), "tokenizer": (str,), "data": (dict,), "train": (dict,),
    "optimizer": (dict, type(None)), "generators": (dict, type(None)),
}  # fmt: skip


def _without_prefix(weights: object) -> dict[str, Tensor]:
    if (
        not isinstance(weights, Mapping)
        or not weights
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items())
    ):
        raise BadInputError("its weights are not a mapping from names to tensors")
    named = dict(weights)
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in named)), None):
        named = {k[len(prefix) :]: v for k, v in named.items()}
    return named


def check_keys(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Compare names and shapes strictly; one `BadInputError` names what differs, with near names."""
    missing = [k for k in expected if k not in given]
    unexpected = [k for k in given if k not in expected]
    reshaped = [k for k in expected if k in given and expected[k].shape != given[k].shape]
    parts = []
    if missing:
        parts.append(f"missing weights: {_some(missing)}")
    if unexpected:
        parts.append(
            f"unexpected weights: {_some(unexpected)}{near_names(unexpected[0][:200], missing or list(expected))}"
        )
    if reshaped:
        k = reshaped[0]
        parts.append(f"{k} has shape {tuple(given[k].shape)}, expected {tuple(expected[k].shape)}"
                     + (f" (and {len(reshaped) - 1} more)" if len(reshaped) > 1 else ""))  # fmt: skip
    if not parts:
        wrong = [k for k, v in given.items() if not v.is_floating_point()]
        if wrong:
            parts.append(f"{_some(wrong)} are not floating point")
        elif any(v.dtype not in (torch.float32, torch.float64) for v in given.values()):
            half = next(v.dtype for v in given.values() if v.dtype not in (torch.float32, torch.float64))
            parts.append(f"weights of {half}: save them as float32, which state and solves need")
        elif len({v.dtype for v in given.values()}) > 1:
            parts.append(
                f"weights of several dtypes: {', '.join(sorted({str(v.dtype) for v in given.values()}))}"
            )
    if parts:
        raise BadInputError("the weights do not fit the configuration: " + "; ".join(parts))


def _some(names: list[str]) -> str:
    return ", ".join(name[:200] for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def initial_model(checkpoint: Checkpoint) -> HopeModel | None:
    """The run's step-0 model rebuilt from config and seed, or None when its digest is not the stored one."""
    dtype = next(iter(checkpoint.weights.values())).dtype
    model = HopeModel(checkpoint.config, checkpoint.seed, dtype)
    if model.unigram is not None:
        model.set_frequencies(checkpoint.weights[FREQUENCIES])
    return model if digest(model.state_dict().items()) == checkpoint.init_digest else None
