"""A grid of runs that differ in variant, threshold and seed: independent, resumable, several at a time.

Cells that turn out to be the computation of one that is done are not run (`cell.same_computation`): with every gate
open, `full`, `no-surprise` and all thresholds under the lowest surprise are one. Workers are processes of their own and
keep to `threads` threads each, one by default, so that a cell's numbers do not depend on how many run beside it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hopeprobe.errors import BadInputError
from hopeprobe.model.cell import (
    RECORD,
    CellSpec,
    computation,
    read_record,
    record_in,
    same_computation,
    write_record,
)
from hopeprobe.model.config import ModelConfig, preset, published
from hopeprobe.model.train import TrainConfig
from hopeprobe.model.truncation import fitting
from hopeprobe.model.variants import VARIANTS
from hopeprobe.tokens import TokenData

Progress = Callable[[str, int, int], None]
"""Told what is being done, and how many optimiser steps of it are done and there are."""


#: The variant that all others are compared with.
_REFERENCE = "full"
#: The working folder is not where a worker looks for modules.
_WORKER = "import sys; sys.path[:] = filter(None, sys.path); from hopeprobe.model.cell import main; main()"


@dataclass(frozen=True)
class Setting:
    """What all cells share. `train` is completed by each cell's seed; `tokens` are held out and measured at the end."""

    preset: str
    train: TrainConfig
    data: tuple[str, ...]
    tokens: int
    use_published: bool = False
    truncate_ticks: int = 0
    threads: int = 1
    device: str = "cpu"


def cells(
    setting: Setting,
    folder: Path,
    variants: Sequence[str],
    seeds: Sequence[int],
    thresholds: Sequence[float] = (),
) -> list[CellSpec]:
    """Specs of all cells, seed by seed: the variants, then `full` at each threshold. Raises BadInputError."""
    named: list[tuple[str, str, float | None]] = [(v, v, None) for v in dict.fromkeys(variants)]
    named += [(f"full-tau-{t:g}", "full", t) for t in dict.fromkeys(thresholds)]
    if len({name for name, _, _ in named}) < len(named):
        raise BadInputError("two thresholds differ in their seventh digit only: they would share a folder")
    configs = {name: _config(setting, variant, threshold) for name, variant, threshold in named}
    return [
        CellSpec(
            name,
            variant,
            seed,
            setting.preset,
            configs[name],
            dataclasses.replace(setting.train, seed=seed),
            setting.data,
            setting.tokens,
            folder / name / f"seed-{seed}",
            threshold,
            setting.threads,
            setting.device,
        )
        for seed in seeds
        for name, variant, threshold in named
    ]


def _config(setting: Setting, variant: str, threshold: float | None) -> ModelConfig:
    config = preset(setting.preset, variant)
    config = published(config) if setting.use_published else config
    config = dataclasses.replace(config, truncate_ticks=setting.truncate_ticks)
    return config if threshold is None else dataclasses.replace(config, surprise_threshold=threshold)


def workers_for(specs: Sequence[CellSpec]) -> int:
    """How many cells to run at once by default: one a core, as far as memory goes; on a device one."""
    if any(spec.device != "cpu" for spec in specs):
        return 1
    most = min(fitting(spec.model, spec.train.batch) for spec in specs)
    threads = max(spec.threads for spec in specs)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // threads, most))


class Ran(NamedTuple):
    """What became of a grid: records in the order of its cells, and what those that have none said."""

    records: list[dict[str, Any]]
    failures: list[str]


def run_grid(
    specs: Sequence[CellSpec],
    data: TokenData,
    workers: int,
    progress: Progress | None = None,
) -> Ran:
    """Run the cells that are not done yet, `workers` at a time; one that fails does not stop the others.

    Workers load `data` from the cache by themselves. Call it under the folder's `run_lock`.
    """
    return _Grid(list(specs), data, progress).run(workers)


def known_cells(folder: Path, like: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of all cells in a folder that share the setting `like`: by seed, variant, threshold.

    Cells of another number of steps or tokens are left out. Raises BadInputError for those that differ in anything
    else, and for a damaged record.
    """
    found = []
    order = list(VARIANTS)
    for path in sorted(folder.glob(f"*/seed-*/{RECORD}")):
        try:
            record = record_in(path)
            key = (record["seed"], order.index(record["variant"]), record["threshold"] or 0.0)
            _check_shared(path, record["shared"], like)
            if record["shared"] == like:
                found.append((key, record))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(f"{path} is not the record of a cell ({error}): delete it") from None
    return [record for _, record in sorted(found, key=lambda pair: pair[0])]


def _check_shared(path: Path, shared: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """BadInputError for a cell that no extension of the grid could have left."""

    def fixed(setting: Mapping[str, Any]) -> dict[str, Any]:
        train = {key: value for key, value in setting["train"].items() if key != "steps"}
        return {key: value for key, value in setting.items() if key != "tokens"} | {"train": train}

    before, now = fixed(shared), fixed(like)
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        raise BadInputError(
            f"{path} is of a grid set otherwise ({', '.join(changed)} differ): choose another --out. Only the number "
            "of steps and of held-out tokens may change"
        )


@dataclass
class _Grid:
    """One run of a grid."""

    specs: list[CellSpec]
    data: TokenData
    progress: Progress | None
    records: dict[Path, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    steps: collections.Counter[Path] = field(default_factory=collections.Counter)
    processes: set[subprocess.Popen[str]] = field(default_factory=set)
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, workers: int) -> Ran:
        for spec in self.specs:
            record = read_record(spec, self.data)
            if record is not None:
                self._done(spec, record)
        groups: dict[str, list[CellSpec]] = {}  # of cells that may be one computation
        for spec in self.specs:
            key = json.dumps([spec.seed, computation(spec.model)], sort_keys=True)
            groups.setdefault(key, []).append(spec)
        pool = concurrent.futures.ThreadPoolExecutor(workers)
        try:
            waiting = {pool.submit(self._first_of, group) for group in groups.values()}
            while waiting:
                ended, waiting = concurrent.futures.wait(
                    waiting, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in ended:
                    waiting |= {pool.submit(self._first_of, rest) for rest in future.result()}
        except BaseException:  # an interrupt: every file a worker writes is whole, so it can end at once
            self.stopped = True
            with self.lock:
                for process in self.processes:
                    process.kill()
            pool.shutdown(cancel_futures=True)
            raise
        pool.shutdown()
        found = [self.records[spec.folder] for spec in self.specs if spec.folder in self.records]
        return Ran(found, self.failures)

    def _first_of(self, group: list[CellSpec]) -> list[list[CellSpec]]:
        """Run one cell of a group, unless one is done; what is left, as groups that may yet be one computation.

        Thresholds that the lowest surprise does not exceed close their gates, each in its own way; those below it may
        be one computation, even if it is not that of the cell that ran.
        """
        left = self._without_twins(group)
        if len(left) == len(group) or any(spec.name == _REFERENCE for spec in left):
            if not self._run(left[0]):
                return [left[1:]] if left[1:] and not self.stopped else []
            left = self._without_twins(group)
        lowest = [
            self.records[spec.folder].get("surprise_min") for spec in group if spec.folder in self.records
        ]
        surely = max((value for value in lowest if value is not None), default=0.0)
        closing = [[spec] for spec in left if spec.model.threshold >= surely]
        others = [spec for spec in left if spec.model.threshold < surely]
        return [*closing, *([others] if others else [])]

    def _without_twins(self, group: list[CellSpec]) -> list[CellSpec]:
        """Cells of a group that are not done, once those that are the computation of one that is have its record."""
        done = [self.records[spec.folder] for spec in group if spec.folder in self.records]
        left = []
        for spec in group:
            if spec.folder in self.records:
                continue
            if (
                spec.name == _REFERENCE
            ):  # what others are compared with, and its probes and curves, are its own
                left.append(spec)
                continue
            reasons = {
                other["name"]: why
                for other in done
                if not other["same_as"] and (why := same_computation(other, spec.model)) is not None
            }
            if not reasons:
                left.append(spec)
                continue
            name, why = next(iter(reasons.items()))
            other = next(record for record in done if record["name"] == name)
            record = other | {
                "name": spec.name, "variant": spec.variant, "threshold": spec.threshold,
                "model": spec.model.to_dict(), "identity": spec.identity(self.data),
                "same_as": name, "why": why, "train_s": 0.0, "curve": {},
            }  # fmt: skip
            self._done(spec, write_record(spec.folder, record))
        return left

    def _run(self, spec: CellSpec) -> bool:
        """Run one cell in a process of its own; whether it left a record."""
        environment = os.environ | {
            name: str(spec.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        }
        with self.lock:
            if self.stopped:
                return False
            process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-c", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                env=environment,
                start_new_session=True,  # an interrupt at the terminal is ours to pass on
            )
            self.processes.add(process)
        assert process.stdin is not None
        assert process.stdout is not None
        said: collections.deque[str] = collections.deque(maxlen=20)
        with contextlib.suppress(BrokenPipeError), process:  # closing the pipe of one that has ended
            with contextlib.suppress(BrokenPipeError):  # one that ended at once says why
                process.stdin.write(spec.to_json() + "\n")
                process.stdin.flush()
            for line in process.stdout:
                if line.startswith('{"step"'):
                    step = json.loads(line)
                    self._tell(spec, step["step"], f"{spec.name}, seed {spec.seed}: loss {step['loss']:.3f}")
                else:
                    said.append(line.rstrip())
        with self.lock:
            self.processes.discard(process)
        record = read_record(spec, self.data) if process.wait() == 0 else None
        if record is not None:
            self._done(spec, record)
        elif not self.stopped:
            why = " ".join(said) or f"its process ended with status {process.returncode}"
            self.failures.append(f"{spec.name}, seed {spec.seed}: {why}")
        return record is not None

    def _done(self, spec: CellSpec, record: dict[str, Any]) -> None:
        self.records[spec.folder] = record
        self._tell(spec, spec.train.steps, f"{spec.name}, seed {spec.seed}: {record['status']}")

    def _tell(self, spec: CellSpec, step: int, text: str) -> None:
        with self.lock:
            self.steps[spec.folder] = step
            if self.progress is not None:
                total = sum(each.train.steps for each in self.specs)
                done = f"{len(self.records)} of {len(self.specs)} cells done"
                self.progress(f"training: {done}; {text}, step", sum(self.steps.values()), total)
