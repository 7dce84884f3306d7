"""Fuzz every reader of files: `python tests/fuzz/run.py --each 320 --record tests/fuzz/record.json`.

Each changed file must end in one clear error that names it, or in a right answer, within ten seconds and 256 MiB, with
nothing executed and nothing written outside the output folder. The same seed gives the same files; one is made again
with `--show KIND INDEX`, which also writes it to the working folder.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MOST_SECONDS = 10.0  # of a core: on shared ones a clock on the wall would count what others do
MOST_PEAK = 256 << 20
SEED = 8
_PATIENCE = 60.0  # seconds on the wall
_START = 120.0  # seconds for a process to begin, and for a whole file to be made


class _Worker:
    """A process that reads; killed where a file takes too long."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.process: subprocess.Popen[str] | None = None

    def read(self, name: str, index: int) -> dict[str, Any]:
        """What became of one file; a process that ended or went on too long is an outcome too."""
        if self.process is None:
            self._begin()
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, index]) + "\n")
        self.process.stdin.flush()
        first = self._line(_START)
        if first is None:
            raise RuntimeError(
                f"no whole file of the kind {name!r} could be made, or read: {self._said() or 'it took too long'}"
            )
        begun = time.monotonic()
        line = self._line(_PATIENCE)
        if line is not None:
            return json.loads(line)  # type: ignore[no-any-return]
        took = time.monotonic() - begun
        return self._ended(
            name, index, f"no end in {took:.0f} s" if took >= _PATIENCE else "the process ended"
        )

    def _said(self) -> str:
        """The end of what the process wrote about its own end."""
        return (self.folder / "said").read_text(errors="replace")[-2000:].strip()

    def _begin(self) -> None:
        said = (self.folder / "said").open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), str(self.folder), str(self.seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        )
        said.close()  # the process has it
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._pump, args=(self.process, self.lines), daemon=True).start()

    @staticmethod
    def _pump(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def _line(self, seconds: float) -> str | None:
        try:
            return self.lines.get(timeout=seconds)
        except queue.Empty:
            return None

    def _ended(self, name: str, index: int, why: str) -> dict[str, Any]:
        assert self.process is not None
        status, said = self.process.poll(), self._said()
        self.end()
        return {
            "kind": name, "index": index, "mutation": "?", "outcome": "WRONG", "detail": f"{why} (status {status}) {said}"[:1500],
            "seconds": MOST_SECONDS, "peak": 0, "sha256": "", "unchanged": False,
        }  # fmt: skip

    def end(self) -> None:
        """Let the process go."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def fuzz(names: Sequence[str], indices: Sequence[int], seed: int = SEED) -> Iterator[dict[str, Any]]:
    """Read the changed files of these kinds and indices, each in turn; what became of each."""
    with tempfile.TemporaryDirectory() as folder:
        worker = _Worker(Path(folder), seed)
        try:
            for name in names:
                for index in indices:
                    found = worker.read(name, index)
                    if found["outcome"] != "WRONG" and found["seconds"] > MOST_SECONDS:
                        found |= {"outcome": "WRONG", "detail": f"took {found['seconds']} s"}
                    if found["outcome"] != "WRONG" and found["peak"] > MOST_PEAK:
                        found |= {"outcome": "WRONG", "detail": f"took {found['peak'] >> 20} MiB"}
                    yield found
        finally:
            worker.end()


def summary(found: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """What is kept: counts by kind of file and outcome, the longest and the largest."""
    kinds: dict[str, Counter[str]] = {}
    for one in found:
        kinds.setdefault(one["kind"], Counter())[one["outcome"]] += 1
    longest, largest = (max(found, key=lambda one: one[key]) for key in ("seconds", "peak"))

    def named(one: dict[str, Any]) -> str:
        return f"{one['kind']} {one['index']} ({one['mutation']})"

    return {
        "seed": seed,
        "mutations": len(found),
        "wrong": sum(one["outcome"] == "WRONG" for one in found),
        "outcomes": dict(Counter(one["outcome"] for one in found).most_common()),
        "by_kind": {name: dict(counts.most_common()) for name, counts in kinds.items()},
        "by_mutation": dict(Counter(one["mutation"] for one in found).most_common()),
        "longest_seconds": longest["seconds"], "longest": named(longest),
        "most_memory_mib": round(largest["peak"] / 2**20, 1), "largest": named(largest),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--each", type=int, default=320, help="changed files of each kind")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kind", action="append")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--show", nargs=2, metavar=("KIND", "INDEX"))
    given = parser.parse_args()
    if given.show:
        return _show(given.show[0], int(given.show[1]), given.seed)
    sys.path.insert(0, str(Path(__file__).parent))
    from documents import KINDS

    found, bad = [], 0
    for one in fuzz(given.kind or list(KINDS), range(given.first, given.first + given.each), given.seed):
        if (
            given.record and found and found[-1]["kind"] != one["kind"]
        ):  # what there is so far, should it be stopped
            given.record.write_text(json.dumps(summary(found, given.seed), indent=1) + "\n", encoding="utf-8")
        found.append(one)
        if one["outcome"] == "WRONG":
            bad += 1
            print(f"{one['kind']} {one['index']} ({one['mutation']}): {one['detail']}\n", flush=True)
    told = summary(found, given.seed)
    print(json.dumps(told, indent=1))
    if given.record:
        given.record.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 1 if bad else 0


def _show(name: str, index: int, seed: int) -> int:
    sys.path.insert(0, str(Path(__file__).parent))
    from worker import Reader

    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(Path(folder), seed)
        mutation, content = reader.changed(name, index)
        (here / f"{name}-{index}").write_bytes(content)
        print(json.dumps(reader.read(name, index) | {"mutation": mutation}, indent=1))
        os.chdir(here)
    return 0


if __name__ == "__main__":
    sys.exit(main())
