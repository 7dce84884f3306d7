"""Checkpoints: one versioned file, written atomically, read strictly.

Layout (format "hopeprobe-hope", version 1): plain data and tensors only, so that `torch.load(weights_only=True)`
reads it and code hidden in a foreign file is never executed. Early checkpoints carry weights alone; those a run can
resume from carry the optimiser and generator states as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hopeprobe.errors import BadInputError, near_names
from hopeprobe.files import write_atomically
from hopeprobe.model.config import ModelConfig, from_dict
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.init import FREQUENCIES, digest

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
    """All checkpoints of a run, by step."""
    return sorted(
        folder.glob("step-[0-9][0-9][0-9][0-9][0-9][0-9]*.pt"), key=lambda p: int(p.stem.split("-")[1])
    )


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically."""
    content = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}
    content |= {"format": FORMAT, "version": VERSION, "config": checkpoint.config.to_dict()}
    content["weights"] = {k: v.detach().cpu() for k, v in checkpoint.weights.items()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def read(path: Path) -> Checkpoint | None:
    """Read a checkpoint; None when it is a readable file of another kind.

    Raises `BadInputError` for a file that is damaged, holds code, is of a newer version, or does not fit its
    own config.
    """
    content = _load_plain(path)
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        return None
    if content.get("version") != VERSION:
        raise BadInputError(
            f"{path} has checkpoint version {content.get('version')}, this hopeprobe reads {VERSION}: update hopeprobe"
        )
    names = [f.name for f in dataclasses.fields(Checkpoint)]
    unknown = [k for k in content if k not in (*names, "format", "version")]
    missing = [k for k in names if k not in content]
    if unknown or missing:
        raise BadInputError(
            f"{path} does not have the fields of a checkpoint: "
            + "; ".join(([f"missing {', '.join(missing)}"] if missing else [])
                        + [f"unexpected {k!r}{near_names(k, names)}" for k in unknown])
        )  # fmt: skip
    try:
        values = {name: content[name] for name in names}
        values["config"] = from_dict(ModelConfig, content["config"])
        values["weights"] = _without_prefix(content["weights"])
        checkpoint = Checkpoint(**values)
        check_keys(HopeModel.shapes(checkpoint.config), checkpoint.weights)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from None
    return checkpoint


def _load_plain(path: Path) -> object:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror or error}") from None
    if size == 0:
        raise BadInputError(
            f"{path} is empty (0 bytes): the run that wrote it was cut off, take an earlier checkpoint"
        )
    if (wrong := _wrong_member(path)) is not None:
        raise BadInputError(f"{path} is damaged: {wrong}; take another checkpoint of the run")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the formats that foreign files come in
            return cast(object, torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # noqa: BLE001 - torch raises many kinds for a damaged or foreign file, each means the same
        if isinstance(error, pickle.UnpicklingError) and _names_code(path):
            raise BadInputError(
                f"{path} is a pickle that wants to run code when it is opened; it was refused and nothing was "
                "executed. hopeprobe reads plain tensors and data only: save a state dict"
            ) from None
        if b"PK\x03\x04".startswith(magic):
            raise BadInputError(
                f"{path} is damaged: it begins like a checkpoint but cannot be read to its end ({size} bytes). "
                "It was cut off or changed; take another checkpoint of the run"
            ) from None
        raise BadInputError(
            f"{path} is not a checkpoint: neither a torch file nor anything else that is known here"
        ) from None


def _wrong_member(path: Path) -> str | None:
    """What is wrong with an archive: torch reads its members without checking their checksums."""
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
            folders = [i.filename for i in archive.infolist() if i.external_attr & 0x10]
    except Exception as error:  # noqa: BLE001 - zipfile raises eight kinds for a directory that was changed
        return f"its directory cannot be read ({error})"
    if folders:  # one bit, and torch would take what is in memory for the member's content
        return f"{folders[0]} is marked as a folder"
    return None if wrong is None else f"the checksum of {wrong} is wrong"


def _names_code(path: Path) -> bool:
    """Does a pickle that torch refused name things to import; it is only taken apart, never executed."""
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(path.open("rb"))
            if zipfile.is_zipfile(file):
                archive = stack.enter_context(zipfile.ZipFile(file))
                file = io.BytesIO(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
            else:
                file.seek(0)
            for _ in range(4):  # torch's old format has three small pickles ahead of the content
                names = {opcode.name for opcode, _, _ in pickletools.genops(file)}
                if names & {"GLOBAL", "STACK_GLOBAL", "INST"}:
                    return True
    except Exception:  # noqa: BLE001 - no whole pickle: damaged, or another thing
        return False
    return False


def _without_prefix(weights: object) -> dict[str, Tensor]:
    if (
        not isinstance(weights, Mapping)
        or not weights
        or not all(isinstance(v, Tensor) for v in weights.values())
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
            f"unexpected weights: {_some(unexpected)}{near_names(unexpected[0], missing or list(expected))}"
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
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def initial_model(checkpoint: Checkpoint) -> HopeModel | None:
    """The run's step-0 model rebuilt from config and seed, or None when its digest is not the stored one."""
    dtype = next(iter(checkpoint.weights.values())).dtype
    model = HopeModel(checkpoint.config, checkpoint.seed, dtype)
    if model.unigram is not None:
        model.set_frequencies(checkpoint.weights[FREQUENCIES])
    return model if digest(model.state_dict().items()) == checkpoint.init_digest else None
