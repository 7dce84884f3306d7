"""Timing by turns, and what the machine itself can do, measured beside it."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).parent


@dataclass
class Row:
    """One line of the table."""

    work: str
    ours: float  # in `unit`
    peer: float | None = None
    ratio: float | None = None  # the median over turns, each of neighbours in time
    unit: str = "s"
    peer_is: str = ""
    ceiling: float | None = None  # in `unit`: what arithmetic or bytes alone would take
    share: float | None = None  # ceiling over ours
    goal: str = ""
    met: bool | None = None
    note: str = ""
    turns: dict[str, list[float]] = field(default_factory=dict)


def once(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def by_turns(
    works: dict[str, Callable[[], object]], turns: int, warm: int = 1, calls: dict[str, int] | None = None
) -> dict[str, list[float]]:
    """Wall times of several works, each in every turn, after `warm` turns that do not count.

    `calls`: of a work that is short beside another, the median of so many calls is its time in a turn.
    """
    for _ in range(warm):
        for work in works.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            times[name].append(statistics.median(once(work) for _ in range((calls or {}).get(name, 1))))
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """Median over turns of one work's time over another's in the same turn."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def matrix_rate() -> Callable[[], object]:
    """A work of `MATRIX_FLOPS` operations: products of 1,024 x 1,024 float32 matrices."""
    a = torch.randn(1024, 1024)
    out = torch.empty(1024, 1024)

    def work() -> None:
        for _ in range(8):
            torch.mm(a, a, out=out)

    return work


MATRIX_FLOPS = 8 * 2 * 1024**3


def copy_rate() -> float:
    """Bytes a second that copying 128 MiB reads and writes."""
    a = torch.randn(2**25)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * 4 * a.numel() / min(once(lambda: b.copy_(a)) for _ in range(5))


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Inside, torch computes on n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_bytes(module: str, work: str) -> int:
    """What `work` of a benchmark module adds at most to what a fresh process holds that has built it (Linux)."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import importlib, clock;"
        "print(clock.watched(importlib.import_module(sys.argv[2]).WORKS[sys.argv[3]]()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(HERE), module, work], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def watched(work: Callable[[], object]) -> int:
    """The most that memory held grew by while `work` ran, looked at every millisecond."""

    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    done, before, seen = threading.Event(), held(), [0]

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen) - before


def own_peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
