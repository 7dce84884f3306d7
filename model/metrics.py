"""The record of a run, `metrics.jsonl`: a line a step, cut back to where the run is resumed from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hopeprobe.errors import BadInputError
from hopeprobe.files import write_atomically

_MEND = "mend it, or delete the file, and --resume goes on without what it held"


class MetricsFile:
    """`metrics.jsonl`, cut back to the step a run resumes from, then a line a step."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for at, line in self._lines() if at <= step] if step and self.path.exists() else []
        write_atomically(self.path, "".join(f"{line}\n" for line in kept).encode())

    def _lines(self) -> Iterator[tuple[int, str]]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise BadInputError(f"{self.path} is not a record of training ({error}): {_MEND}") from None
        for number, line in enumerate(lines, 1):
            try:
                yield int(json.loads(line)["step"]), line
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):  # the last may be cut off where the run was killed
                    return
                what = f"is not the record of a step ({type(error).__name__}: {error})"
                raise BadInputError(f"{self.path}, line {number}, {what}: {_MEND}") from None

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        self.file = self.path.open("a", encoding="utf-8")

        def write(metrics: dict[str, Any]) -> None:
            plain = {
                k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in metrics.items()
            }
            try:
                self.file.write(json.dumps(plain) + "\n")
                self.file.flush()
            except OSError as error:
                raise BadInputError(
                    f"cannot write {self.path}: {error.strerror or error}; the run stops here, its checkpoints are "
                    "complete. Free some space and continue with --resume"
                ) from None

        return write

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a line that was refused and said so already
            self.file.close()
