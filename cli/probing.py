"""Probes over the checkpoints of a grid's runs: resumable, a file a checkpoint, one table over seeds."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopeprobe.analysis import analyze
from hopeprobe.cli.terminal import Report
from hopeprobe.documents import parse_json, read_document
from hopeprobe.errors import BadInputError, HopeprobeError
from hopeprobe.files import write_atomically
from hopeprobe.model.cell import CellSpec
from hopeprobe.model.checkpoint import step_path
from hopeprobe.model.grid import known_cells
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.subject import HopeSubject
from hopeprobe.nulls import code_digest
from hopeprobe.probes import PROBES, get_probe
from hopeprobe.results import Results
from hopeprobe.study.probed import Probed, over_runs, write_probed
from hopeprobe.tokens import TokenData

#: Folder, in that of a cell, of what each probe measured of each checkpoint.
_KEPT = "probes"


@dataclass(frozen=True)
class ProbeOptions:
    """Which probes run on which checkpoints. `steps` empty: those that a run can resume from."""

    probes: tuple[str, ...]
    steps: tuple[int, ...]
    tokens: int

    @classmethod
    def typed(cls, probes: str, steps: str, tokens: int) -> ProbeOptions | None:
        """From lists with commas; None without probes. BadInputError for an unknown probe, or no number for a step."""
        names = (
            list(PROBES) if probes == "all" else [each.strip() for each in probes.split(",") if each.strip()]
        )
        if not names:
            return None
        for name in names:
            get_probe(name)
        try:
            at = tuple(sorted({int(each) for each in steps.split(",") if each.strip()}))
        except ValueError:
            raise BadInputError(
                f"--probe-steps is {steps!r}, must be steps with commas between, as 50,100"
            ) from None
        return cls(tuple(names), at, tokens)


def probe_cells(
    folder: Path,
    specs: Sequence[CellSpec],
    records: Sequence[dict[str, Any]],
    data: TokenData,
    options: ProbeOptions,
    report: Report,
    device: str = "cpu",
) -> list[str]:
    """Probe every cell that was run itself; what could not be measured, a sentence each.

    `probes.csv` then holds what these and earlier calls measured with as many tokens of the same text.
    """
    ran = {record["identity"] for record in records if record["status"] == "done" and not record["same_as"]}
    missing: list[str] = []
    for spec in specs:
        if spec.identity(data) not in ran:
            continue
        regular = [s for s in sorted(spec.train.checkpoint_steps()) if spec.train.resumable(s)]
        for step in options.steps or regular:
            path, what = step_path(spec.folder, step), f"{spec.name}, seed {spec.seed}"
            if path.exists():
                missing += [f"{what}: {why}" for why in _probe(path, data, options, report, what, device)]
            else:
                missing.append(f"{what}: there is no checkpoint of step {step}")
    rows: list[Probed] = []
    known = [
        r for r in known_cells(folder, records[0]["shared"]) if r["status"] == "done" and not r["same_as"]
    ]
    for name in dict.fromkeys(record["name"] for record in known):
        folders = [
            folder / name / f"seed-{record['seed']}" / _KEPT for record in known if record["name"] == name
        ]
        files = [file for each in folders for file in sorted(each.glob("*.json"))]
        found = [_kept(file, data, options.tokens) for file in files]
        rows += over_runs(name, [results for results in found if results is not None])
    if rows:
        write_probed(rows, folder)
    return missing


def _probe(
    path: Path, data: TokenData, options: ProbeOptions, report: Report, what: str, device: str
) -> list[str]:
    """Measure what is not kept yet of one checkpoint and keep each probe's results; what could not be measured."""
    files = {name: path.parent / _KEPT / f"{name}-{path.stem}.json" for name in options.probes}
    wanted = [name for name, file in files.items() if _kept(file, data, options.tokens) is None]
    if not wanted:
        return []
    try:
        results = analyze(
            [path],
            probes=wanted,
            data=data,
            tokens=options.tokens,
            device=device,
            progress=lambda text, done, total: report(f"probing: {what}, {text}, batch", done, total),
        )
    except HopeprobeError as error:  # a damaged checkpoint too: the others can still be measured
        return [str(error)]
    for name in wanted:
        rows = [row for row in results.rows if row.probe == name]
        if not rows or any(f": {name}" in why for why in results.missing):
            continue  # what is incomplete is measured again
        part = Results()
        part.extend(rows, [null for null in results.null_rows if null.probe == name])
        part.data, part.checkpoint = results.data, results.checkpoint
        document = json.loads(part.to_json()) | {"identity": _identity(path, name, data, options.tokens)}
        write_atomically(files[name], json.dumps(document).encode())
    return results.missing


def _kept(file: Path, data: TokenData, tokens: int) -> Results | None:
    """Results kept of one probe and checkpoint, if of this text, as many tokens, these weights and this code."""
    name, _, step = file.stem.rpartition("-step-")
    try:
        document = parse_json(read_document(file))
        identity = _identity(file.parent.parent / f"step-{step}.pt", name, data, tokens)
        return Results.from_json(json.dumps(document)) if document.pop("identity") == identity else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, BadInputError):
        return None  # there is none yet, or one of something else: it is measured again


def _identity(path: Path, probe: str, data: TokenData, tokens: int) -> str:
    code = code_digest(
        (HopeSubject, HopeModel, type(get_probe(probe)))
    )  # as for nulls: other code, other numbers
    content = [code, data.fingerprint, probe, tokens, _digest(path, path.stat().st_mtime_ns)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@functools.lru_cache(maxsize=1024)
def _digest(path: Path, changed: int) -> str:  # noqa: ARG001 - a file that changed is read again
    return hashlib.sha256(path.read_bytes()).hexdigest()
