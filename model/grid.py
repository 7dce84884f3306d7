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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hopeprobe.errors import BadInputError
from hopeprobe.model.cell import RECORD, CellSpec, computation, read_record, same_computation, write_record
from hopeprobe.model.config import ModelConfig, preset, published
from hopeprobe.model.train import TrainConfig
from hopeprobe.model.truncation import fitting
from hopeprobe.model.variants import VARIANTS
from hopeprobe.tokens import TokenData

Progress = Callable[[str, int, int], None]
"""Told what is being done, and how many optimiser steps of it are done and there are."""


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
    """How many cells to run at once by default: one a core, as far as memory goes."""
    most = min(fitting(spec.model, spec.train.batch) for spec in specs)
    return max(
        1,
        min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, most),
    )


class Ran(NamedTuple):
    """What became of a grid: records in the order of its cells, and what those that have none said."""

    records: list[dict[str, Any]]
    failures: list[str]


def run_grid(
    specs: Sequence[CellSpec],
    folder: Path,
    data: TokenData,
    workers: int,
    progress: Progress | None = None,
) -> Ran:
    """Run the cells that are not done yet, `workers` at a time; one that fails does not stop the others.

    Workers load `data` from the cache by themselves. Raises BadInputError where another process works in the folder.
    """
    with _locked(folder):
        return _Grid(list(specs), data, progress).run(workers)


def known_cells(folder: Path, like: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of all cells in a folder that share the setting of `like`, a record: by seed, variant, threshold."""
    found = []
    for path in folder.glob(f"*/seed-*/{RECORD}"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["shared"] == like["shared"]:
                found.append(record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInputError(f"{path} is not the record of a cell ({error}): delete it") from None
    order = list(VARIANTS)
    return sorted(found, key=lambda r: (r["seed"], order.index(r["variant"]), r["threshold"] or 0.0))


@dataclass
class _Grid:
    """One run of a grid."""

    specs: list[CellSpec]
    data: TokenData
    progress: Progress | None
    records: dict[Path, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    failed: set[Path] = field(default_factory=set)
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
                    waiting |= {pool.submit(self._run, spec) for spec in future.result()}
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

    def _first_of(self, group: list[CellSpec]) -> list[CellSpec]:
        """Run one cell of a group, unless one is done; give those that turn out to be computations of their own."""
        left = self._without_twins(group)
        if len(left) == len(group):
            self._run(left[0])
            left = self._without_twins(group)
        return [] if self.stopped else [spec for spec in left if spec.folder not in self.failed]

    def _without_twins(self, group: list[CellSpec]) -> list[CellSpec]:
        """Cells of a group that are not done, once those that are the computation of one that is have its record."""
        done = [self.records[spec.folder] for spec in group if spec.folder in self.records]
        left = []
        for spec in group:
            if spec.folder in self.records:
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

    def _run(self, spec: CellSpec) -> list[CellSpec]:
        """Run one cell in a process of its own; nothing follows from it."""
        environment = os.environ | {
            name: str(spec.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        }
        with self.lock:
            if self.stopped:
                return []
            process = subprocess.Popen(
                [sys.executable, "-m", "hopeprobe.model.cell"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,  # an interrupt at the terminal is ours to pass on
            )
            self.processes.add(process)
        assert process.stdin is not None
        assert process.stdout is not None
        said: collections.deque[str] = collections.deque(maxlen=20)
        with contextlib.suppress(BrokenPipeError), process:  # one that ended at once has said why
            process.stdin.write(spec.to_json() + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith('{"step"'):
                    step = json.loads(line)
                    self._tell(spec, step["step"], f"{spec.name}, seed {spec.seed}: loss {step['loss']:.3f}")
                else:
                    said.append(line.rstrip())
            process.wait()
        with self.lock:
            self.processes.discard(process)
        record = read_record(spec, self.data) if process.returncode == 0 else None
        if record is not None:
            self._done(spec, record)
        elif not self.stopped:
            why = " ".join(said) or f"its process ended with status {process.returncode}"
            self.failures.append(f"{spec.name}, seed {spec.seed}: {why}")
            self.failed.add(spec.folder)
        return []

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


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one process; a process that dies lets go of it."""
    try:
        import fcntl
    except ImportError:  # a system without: nothing is held
        yield
        return
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise BadInputError(f"cannot write in {folder}: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BadInputError(
                f"{folder} is in use by process {file.read().strip() or 'of unknown number'}: let it end, or choose "
                "another --out"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
