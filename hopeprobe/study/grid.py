"""The record of a grid: what its cells share, what each gave, and how the setting differs from the study's."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hopeprobe.documents import parse_json, read_document
from hopeprobe.errors import BadInputError, near_names
from hopeprobe.files import write_atomically

from .published import SETTINGS, column

SCHEMA_VERSION = 1
RECORD = "ablation.json"
REFERENCE = "full"


@dataclass(frozen=True)
class Cell:
    """One run of a grid. Losses are means over the same held-out tokens, nats a token; NaN where it diverged.

    Attributes:
        name: the variant, and the threshold where it is not the variant's own: `full`, `full-tau-4`.
        same_as: name of the cell whose computation this one is, so that it was not run; None if it ran.
        why: how that is known, or why it diverged.
        live, frozen: held-out loss with and without writes.
        gate_rate: share of held-out tokens whose surprise exceeds the threshold; NaN where nothing is written.
        surprise_min: the lowest loss of any token, trained on or measured; NaN where the record lacks it.
        train_loss: mean over the last tenth of the steps.
        curve: `step` and mean training `loss` of the steps up to it; `held_out_step`, `live`, `frozen`.

    """

    name: str
    variant: str
    seed: int
    steps: int
    status: str  # done or diverged
    threshold: float | None = None
    same_as: str | None = None
    why: str = ""
    parameters: int = 0
    first_batch: str = ""
    live: float = math.nan
    frozen: float = math.nan
    gate_rate: float = math.nan
    surprise_min: float = math.nan
    train_loss: float = math.nan
    train_s: float = math.nan  # seconds of its steps alone
    threads: int = 0
    curve: Mapping[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if getattr(self, each.name) is None and each.type == "float":  # JSON has no NaN
                object.__setattr__(self, each.name, math.nan)

    @property
    def done(self) -> bool:
        """Did it end with a loss."""
        return self.status == "done"


@dataclass(frozen=True)
class Grid:
    """A grid of runs that share everything but variant, threshold and seed.

    Attributes:
        preset: its size's name.
        model: configuration of `full`, or of the first variant there is.
        train: training configuration, without the seed.
        data: identity of the text.
        evaluation: what the held-out losses were measured on.
        hardware: where its cells ran, with how many threads and which versions; one entry where they are alike.
        cells: in the order of the table, seed by seed.

    Raises BadInputError for cells that did not see the same data in the same order, that are there twice, that lack a
    loss, and where what the tables need is not there.
    """

    preset: str
    model: Mapping[str, Any]
    train: Mapping[str, Any]
    data: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    hardware: tuple[Mapping[str, Any], ...]
    cells: tuple[Cell, ...]

    def __post_init__(self) -> None:
        _check_parts(self)
        _check_cells(self.cells)
        first: dict[int, tuple[str, str]] = {}
        for cell in self.cells:
            name, digest = first.setdefault(cell.seed, (cell.name, cell.first_batch))
            if digest != cell.first_batch:
                raise BadInputError(
                    f"seed {cell.seed}: {cell.name} began with other tokens than {name}, so that their losses "
                    "cannot be paired: the runs are not of one grid"
                )

    @property
    def names(self) -> list[str]:
        """Names of rows, in order."""
        return list(dict.fromkeys(cell.name for cell in self.cells))

    @property
    def seeds(self) -> list[int]:
        """All seeds."""
        return sorted({cell.seed for cell in self.cells})

    def of(self, name: str) -> dict[int, Cell]:
        """Cells of one row by seed."""
        return {cell.seed: cell for cell in self.cells if cell.name == name}

    def to_dict(self) -> dict[str, Any]:
        """Plain data; NaN becomes None."""
        return {"schema_version": SCHEMA_VERSION, **_plain(dataclasses.asdict(self))}

    def write(self, folder: Path) -> Path:
        """Write `ablation.json`, a line a cell, whole or not at all."""
        content = self.to_dict()
        cells = ",\n  ".join(json.dumps(cell, allow_nan=False) for cell in content.pop("cells"))
        head = json.dumps(content, indent=1, allow_nan=False).removesuffix("\n}")
        return write_atomically(folder / RECORD, f'{head},\n "cells": [\n  {cells}\n ]\n}}\n'.encode())


#: What the tables need: numbers, and texts, by the part of a record.
_NEEDED = {
    "model": (("dim", "layers", "context"), ()),
    "train": (("steps", "batch", "learning_rate"), ()),
    "data": (("n_documents",), ("name",)),
    "evaluation": (("tokens", "documents", "epochs"), ()),
}


def _check_parts(grid: Grid) -> None:
    if not isinstance(grid.preset, str):
        raise BadInputError(f"preset is {grid.preset!r}, must be a name")
    for part, (numbers, texts) in _NEEDED.items():
        known: Any = getattr(grid, part)
        for key in (*numbers, *texts):
            value = known.get(key) if isinstance(known, Mapping) else None
            if not (isinstance(value, str) if key in texts else _is_number(value)):
                raise BadInputError(f"{part} has {value!r} for {key!r}")


#: What the types of a cell's fields allow.
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "float": (int, float),
    "float | None": (int, float, type(None)), "str | None": (str, type(None)),
}  # fmt: skip


def _check_cells(cells: Iterable[Any]) -> None:
    seen = set()
    for cell in cells:
        where = f"{cell.name!s:.60}, seed {cell.seed!s:.60}"
        whole = all(isinstance(n, int) for n in (cell.seed, cell.steps, cell.parameters))
        if not whole or not isinstance(cell.name, str) or cell.status not in ("done", "diverged"):
            raise BadInputError(f"{where}: not the name, numbers and status of a cell")
        if (cell.name, cell.seed) in seen:
            raise BadInputError(f"{where} is there twice")
        seen.add((cell.name, cell.seed))
        if cell.done and not (_is_number(cell.live) and _is_number(cell.frozen)):
            raise BadInputError(f"{where} is done and has no loss")
        curve: Mapping[str, Any] = cell.curve if isinstance(cell.curve, Mapping) else {"step": None}
        steps, losses = curve.get("step", []), curve.get("loss", [])
        if not all(isinstance(line, list) and all(map(_is_number, line)) for line in (steps, losses)):
            raise BadInputError(f"{where} has no curve of numbers")
        if len(steps) != len(losses):
            raise BadInputError(f"{where} has a curve of unequal lengths")
        for each in dataclasses.fields(Cell):
            value, kinds = getattr(cell, each.name), _KINDS.get(str(each.type))
            if kinds and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise BadInputError(f"{where}: {each.name} is {value!r:.60}, must be {each.type}")
    if not seen:
        raise BadInputError("there is no cell in it")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_grid(path: str | os.PathLike[str]) -> Grid:
    """Read the record of a grid, a file or the folder it lies in; BadInputError says what is wrong with it."""
    file = Path(path)
    if file.is_dir() or not (file.exists() or file.suffix == ".json"):
        file /= RECORD
    try:
        content = parse_json(read_document(file))
    except FileNotFoundError:
        raise BadInputError(
            f"{file} does not exist: `hopeprobe ablate --out {file.parent}` writes it"
        ) from None
    except OSError as error:
        raise BadInputError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise BadInputError(
            f"{file} is not the record of a grid: {error}; `hopeprobe ablate` writes one, {RECORD}"
        ) from None
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise BadInputError(
            f"{file} is not the record of a grid in version {SCHEMA_VERSION} (`schema_version`)"
        )
    try:
        fields = {key: value for key, value in content.items() if key != "schema_version"}
        _known(fields, Grid)
        cells = []
        for cell in fields.pop("cells"):
            _known(cell, Cell)
            cells.append(Cell(**cell))
        fields["hardware"] = tuple(fields.get("hardware", ()))
        return Grid(**fields, cells=tuple(cells))
    except (TypeError, KeyError, AttributeError) as error:
        raise BadInputError(f"{file} does not have what the record of a grid has: {error}") from None
    except BadInputError as error:
        raise BadInputError(f"{file}: {error}") from None


def _known(given: Mapping[str, Any], cls: type) -> None:
    known = [each.name for each in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            raise BadInputError(f"unknown key {key!r} in {cls.__name__}{near_names(key, known)}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def layers_of(grid: Grid) -> str:
    """How many layers, in words: 1 layer, 2 layers."""
    n = grid.model["layers"]
    return f"{n} layer{'' if n == 1 else 's'}"


def differences_to_study(grid: Grid) -> list[str]:
    """In what the setting is not the study's, one phrase each, the study's own in brackets; empty if in nothing."""
    theirs = SETTINGS[column(grid.model["dim"])]
    found = []
    for name, ours, its in (
        ("width", grid.model["dim"], theirs.dim),
        ("layers", grid.model["layers"], theirs.layers),
        ("context", grid.model["context"], theirs.context),
        ("steps", grid.train["steps"], theirs.steps),
        ("batch", grid.train["batch"], theirs.batch),
        ("learning rate", grid.train["learning_rate"], theirs.learning_rate),
    ):
        if ours != its:
            found.append(f"{name} {ours:,} ({its:,})")
    if grid.data.get("name") != theirs.data:
        found.append(f"data {grid.data.get('name')} ({theirs.data})")
    if grid.model.get("truncate_ticks"):
        found.append(f"outer gradient cut every {grid.model['truncate_ticks']} ticks (not said)")
    if grid.evaluation["epochs"] > 1:
        found.append(f"{grid.evaluation['epochs']:.1f} epochs (less than one)")
    return found
