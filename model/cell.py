"""One cell of a grid of runs: train a variant with a seed, measure its held-out loss, leave a record.

`run_cell` is a pure function of a `CellSpec` and its data but for the times it notes; `cell.json`, written last, says
that the cell is done. A cell that was killed goes on from its last resumable checkpoint. As a program this file is a
worker: it reads a spec from its standard input, a line of JSON, prints a line a step, and ends when that input ends, so
that it never outlives whoever started it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hopeprobe
from hopeprobe.devices import device_name, find_device
from hopeprobe.documents import parse_json, read_document
from hopeprobe.errors import BadInputError, DivergedError, HopeprobeError
from hopeprobe.files import write_atomically
from hopeprobe.model.checkpoint import run_checkpoints
from hopeprobe.model.config import PRESETS, ModelConfig, from_dict
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.measure import held_out
from hopeprobe.model.metrics import read_metrics, read_timings
from hopeprobe.model.train import Run, TrainConfig, train
from hopeprobe.tokens import EvalWindows, TokenData, TrainWindows, load_tokens

RECORD = "cell.json"
#: What every record has, and others read.
_FIELDS = (
    *("name", "variant", "threshold", "seed", "status", "same_as", "why", "identity", "shared", "evaluation"),
    *("machine", "threads", "versions", "train_s", "curve", "epochs"),
)
#: Points of a cell's training curve, at most.
_POINTS = 100
#: Windows at once when the held-out loss is measured: sums in another order would differ in the last digit.
_EVAL_BATCH = 8

Told = Callable[[int, float], None]
"""Called after each step with its number and loss."""


@dataclass(frozen=True)
class CellSpec:
    """What a cell is. `threshold`: where it is not the variant's own; `tokens`: how many are measured at the end."""

    name: str
    variant: str
    seed: int
    preset: str
    model: ModelConfig
    train: TrainConfig
    data: tuple[str, ...]
    tokens: int
    folder: Path
    threshold: float | None = None
    threads: int = 1
    device: str = "cpu"

    def to_json(self) -> str:
        """One line."""
        return json.dumps({**dataclasses.asdict(self), "folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str) -> CellSpec:
        """The spec of such a line."""
        content = json.loads(text)
        content |= {
            "model": from_dict(ModelConfig, content["model"]),
            "train": from_dict(TrainConfig, content["train"]),
            "data": tuple(content["data"]),
            "folder": Path(content["folder"]),
        }
        return cls(**content)

    def shared(self, data: TokenData) -> dict[str, Any]:
        """What cells of one grid have in common, as plain data: all but variant, threshold and seed."""
        trained = dataclasses.asdict(self.train)
        for name in ("seed", "checkpoint_every", "eval_every", "eval_tokens"):
            del trained[name]
        if trained["precision"] == TrainConfig.precision:
            del trained["precision"]  # as records have it from before there was a choice
        text = {
            key: value for key, value in data.identity().items() if key != "source"
        }  # which is a path, as a rule
        model = self.model.to_dict()
        for name in ("variant", "surprise_threshold"):
            del model[name]
        if self.variant == "transformer-matched":
            for name in ("dim", "layers", "heads"):  # its own
                model[name] = getattr(PRESETS[self.preset], name)
        content = {
            "preset": self.preset,
            "model": model,
            "train": trained,
            "data": text,
            "tokens": self.tokens,
        }
        plain: dict[str, Any] = json.loads(json.dumps(content))  # as it will be read from a record
        return plain

    def identity(self, data: TokenData) -> str:
        """Digest (hex) of all that the record depends on."""
        content = [self.name, self.seed, self.model.to_dict(), self.shared(data)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def computation(config: ModelConfig) -> dict[str, Any]:
    """What a configuration computes while every token passes its gate: equal for equal computations.

    Names, thresholds and what the variant does not have are left out.
    """
    parts = dataclasses.asdict(config.parts)
    content = config.to_dict() | {"levels": [dataclasses.asdict(level) for level in config.levels]}
    for key in ("variant", "surprise_threshold", "cms_levels"):
        del content[key]
    for key in ("one_period", "no_threshold"):
        del parts[key]
    return content | {"parts": parts}


def same_computation(done: dict[str, Any], config: ModelConfig) -> str | None:
    """Why a finished cell, by its record, is what `config` would compute with its seed; None where it is not."""
    other = from_dict(ModelConfig, done["model"])
    if done["status"] != "done" or computation(other) != computation(config):
        return None
    if not config.writes:
        return "nothing is written in either"
    if config.gate.rule != "absolute":
        return "the gate is the same in both"
    if config.threshold == other.threshold:
        return f"the threshold is {config.threshold:g} in both"
    highest, lowest = max(config.threshold, other.threshold), done["surprise_min"]
    if lowest is None or not lowest > highest:
        return None
    return (
        f"every gate was open: the lowest surprise of any token was {lowest:.4g} nats, "
        f"the thresholds are {config.threshold:g} and {other.threshold:g}"
    )


def record_in(path: Path) -> dict[str, Any]:
    """The record of a cell as its file has it. Raises OSError, or ValueError or TypeError for a file that is none."""
    content = parse_json(read_document(path))
    if not isinstance(content, dict):
        raise TypeError("no JSON object")
    if missing := [name for name in _FIELDS if name not in content]:
        raise ValueError(f"it has no {', '.join(missing[:3])}")
    return content


def read_record(spec: CellSpec, data: TokenData) -> dict[str, Any] | None:
    """The record of a cell that is done as `spec` asks, else None; BadInputError for a file that cannot be read."""
    path = spec.folder / RECORD
    try:
        content = record_in(path)
        return content if content["identity"] == spec.identity(data) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise BadInputError(
            f"{path} is not the record of a cell ({error}): delete it, and the cell goes on from its checkpoints"
        ) from None


def run_cell(spec: CellSpec, data: TokenData, told: Told | None = None) -> dict[str, Any]:
    """Train a cell as far as `spec` says, or on from where it was left, measure it, write its record.

    A run that diverges has a record too: the same seed would diverge again. Raises BadInputError where the folder holds
    a run that is set otherwise or has gone further.
    """
    record = {
        "name": spec.name, "variant": spec.variant, "threshold": spec.threshold, "seed": spec.seed,
        "steps": spec.train.steps, "status": "done", "same_as": None, "why": "",
        "threads": torch.get_num_threads(),
        "model": spec.model.to_dict(), "shared": spec.shared(data), "identity": spec.identity(data),
        "machine": machine(spec.device), "parameters": sum(w.numel() for w in HopeModel.shapes(spec.model).values()),
        "versions": {"hopeprobe": hopeprobe.__version__, "torch": torch.__version__},
    }  # fmt: skip
    windows = EvalWindows(data, context=spec.model.context, tokens=spec.tokens, batch=_EVAL_BATCH)
    record["evaluation"] = {
        "tokens": windows.n_tokens, "documents": windows.n_documents, "windows": windows.fingerprint,
    }  # fmt: skip
    try:
        run = train(
            spec.model,
            spec.train,
            data,
            spec.folder,
            resume=bool(run_checkpoints(spec.folder)),
            device=spec.device,
            progress=None if told is None else lambda step, metrics: told(step, metrics["loss"]),
        )
        record |= _measured(spec, run, windows)
    except DivergedError as error:
        why = str(error).replace(f"{spec.folder}{os.sep}", "")  # a record may be published
        record |= {"status": "diverged", "why": why}
    record |= _of_run(spec, data)
    return write_record(spec.folder, record)


def write_record(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write `cell.json`, whole or not at all; gives the record as it will be read."""
    text = json.dumps(record, indent=1, allow_nan=False)
    write_atomically(folder / RECORD, f"{text}\n".encode())
    plain: dict[str, Any] = json.loads(text)
    return plain


def machine(device: str) -> dict[str, Any]:
    """Where this runs; `device` as `find_device` takes it."""
    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {"processor": processor, "cores": os.cpu_count(), "device": device_name(find_device(device))}


def _measured(spec: CellSpec, run: Run, windows: EvalWindows) -> dict[str, Any]:
    live = held_out(run.model, windows)
    frozen = held_out(run.model, windows, frozen=True) if spec.model.writes else live
    trained = [line["surprise_min"] for line in _lines(spec.folder) if line.get("surprise_min") is not None]
    known = len(trained) == spec.train.steps
    if not (math.isfinite(live.loss) and math.isfinite(frozen.loss)):
        raise DivergedError(
            f"after the last step the held-out loss is {live.loss} live, {frozen.loss} frozen"
            + "".join(f"; {name}" for name in (*live.not_finite, *frozen.not_finite)[:1])
        )
    return {
        "live": live.loss,
        "frozen": frozen.loss,
        "gate_rate": live.share_written if spec.model.writes else None,
        "surprise_min": min([live.lowest, *trained]) if known else None,
    }


def _of_run(spec: CellSpec, data: TokenData) -> dict[str, Any]:
    lines = _lines(spec.folder)
    per_step = spec.train.batch * spec.model.context
    last = [line["loss"] for line in lines[-max(1, spec.train.steps // 10) :] if line["loss"] is not None]
    began = _began(spec.folder / "run.json")
    return {
        "train_loss": math.fsum(last) / len(last) if last else None,
        "train_s": _seconds(spec.folder, per_step, lines),
        "curve": _curve(lines, spec.train.steps),
        "epochs": TrainWindows(data, spec.model.context, spec.train.batch, 0).epochs(spec.train.steps),
        "first_batch": began["first_batch"],
    }


def _seconds(folder: Path, per_step: int, lines: list[dict[str, Any]]) -> float:
    """What the clock says that the steps took; those that it does not know took nothing."""
    timed = read_timings(folder)
    rates = [(timed.get(line["step"]) or line).get("tokens_per_s") for line in lines]  # else of an older run
    return math.fsum(per_step / rate for rate in rates if rate)


def _began(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(read_document(path))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} is not the description of a run ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("first_batch"), str):
        raise BadInputError(f"{path} is not the description of a run: it has no first_batch")
    return found


def _curve(lines: list[dict[str, Any]], steps: int) -> dict[str, list[Any]]:
    size = max(1, math.ceil(steps / _POINTS))
    blocks = [lines[i : i + size] for i in range(0, len(lines), size)]
    held = [line for line in lines if None not in (line.get("held_out_live"), line.get("held_out_frozen"))]
    return {
        "step": [block[-1]["step"] for block in blocks],
        "loss": [round(math.fsum(line["loss"] for line in block) / len(block), 5) for block in blocks],
        "held_out_step": [line["step"] for line in held],
        "live": [round(line["held_out_live"], 5) for line in held],
        "frozen": [round(line["held_out_frozen"], 5) for line in held],
    }


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [record for _, _, record in read_metrics(path)] if path.exists() else []


def main() -> None:
    """Be a worker."""
    spec = CellSpec.from_json(sys.stdin.readline())
    sys.argv[:] = [
        "hopeprobe",
        f"worker of a grid, {spec.name}, seed {spec.seed}",
    ]  # for whoever finds its lock
    threading.Thread(target=_end_with_input, daemon=True).start()
    torch.set_num_threads(spec.threads)

    def told(step: int, loss: float) -> None:
        print(json.dumps({"step": step, "loss": loss}), flush=True)

    try:
        run_cell(spec, load_tokens(spec.data), told)
    except HopeprobeError as error:
        print(str(error), flush=True)
        sys.exit(error.exit_code)


def _end_with_input() -> None:
    """Whoever started this has gone: files are written whole or not at all, so now is as good as any time."""
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin, whose lock must be free when the program ends
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
