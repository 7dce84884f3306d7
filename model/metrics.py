"""The record of a run, `metrics.jsonl`: a line a step, cut back to where the run is resumed from.

The same run on the same machine writes the same bytes. What a clock said is not the same twice: it goes into
`timings.jsonl` beside it, of which no number depends.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hopeprobe.documents import read_records
from hopeprobe.errors import BadInputError
from hopeprobe.files import append_whole, write_atomically
from hopeprobe.locks import is_at

CLOCKS = ("tokens_per_s",)
"""Metrics that a clock gives."""

_MEND = "mend it, or delete the file, and --resume goes on without what it held"


def read_metrics(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Step, text and content of each line of a `metrics.jsonl`. Raises BadInputError for what is no such record."""
    try:
        for number, (line, record) in enumerate(read_records(path), 1):
            step = record.get("step")
            if not isinstance(step, int) or isinstance(step, bool) or step < 0:
                raise BadInputError(
                    f"{path} is not a record of training (line {number}: its step is {step!r:.40}): {_MEND}"
                )
            yield step, line, record
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} is not a record of training ({error}): {_MEND}") from None


def read_timings(folder: Path) -> dict[int, dict[str, Any]]:
    """What clocks said of a run, by step; of a step that was made twice the last time. Empty without a record."""
    path, found = folder / "timings.jsonl", dict[int, dict[str, Any]]()
    if path.exists():
        found.update((step, record) for step, _, record in read_metrics(path))
    return found


class MetricsFile:
    """`metrics.jsonl`; entered, it is cut back to the step a run resumes from, then gets a line a step.

    Raises BadInputError for a file that is no record of a run, before anything is written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path, self.clocks = folder / "metrics.jsonl", folder / "timings.jsonl"
        self.kept = [line for at, line in self._lines() if at <= step] if step and self.path.exists() else []

        self.timed = [line for at, line in self._times() if at <= step] if step else []

    def _lines(self) -> Iterator[tuple[int, str]]:
        return ((step, line) for step, line, _ in read_metrics(self.path))

    def _times(self) -> Iterator[tuple[int, str]]:
        return ((step, json.dumps(record)) for step, record in read_timings(self.path.parent).items())

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        write_atomically(self.path, "".join(f"{line}\n" for line in self.kept).encode())
        write_atomically(self.clocks, "".join(f"{line}\n" for line in self.timed).encode())
        self.file, self.times = self.path.open("ab", buffering=0), self.clocks.open("ab", buffering=0)

        def write(metrics: dict[str, Any]) -> None:
            plain = {
                k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in metrics.items()
            }
            times = {k: plain.pop(k) for k in CLOCKS if k in plain}
            with self._writing():
                append_whole(self.file, json.dumps(plain).encode() + b"\n")
                if times:
                    append_whole(self.times, json.dumps({"step": plain["step"], **times}).encode() + b"\n")

        return write

    def sync(self) -> None:
        """Wait until all lines are on the disk: a checkpoint is never there without those that lead to it.

        Raises BadInputError where the file was removed or replaced by another.
        """
        if not is_at(self.file.fileno(), self.path):
            raise BadInputError(
                f"{self.path} was removed or replaced while the run wrote it: the run stops here. Leave its folder "
                "alone, and --resume goes on from the last checkpoint that is there"
            )
        with self._writing():
            os.fsync(self.file.fileno())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BadInputError(
                f"cannot write {self.path}: {error.strerror or error}; the run stops here, its checkpoints are "
                "complete. Free some space and continue with --resume"
            ) from None

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.times.close()


class Unwritten:
    """The record that another rank keeps."""

    def sync(self) -> None:
        """Nothing is there to reach the disk."""

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        return self._ignore

    def __exit__(self, *_: object) -> None:
        pass

    def _ignore(self, metrics: dict[str, Any]) -> None:
        pass
