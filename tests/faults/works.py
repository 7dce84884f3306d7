"""What is killed, and what must hold after every kill: training, tokenising, a baseline, a report.

Each piece of work has a reference, what it leaves when nobody kills it. After a kill every file is absent, as it was
before, or has the bytes of the reference; after the next run that is left alone all are there, and nothing else.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.hopeprobe")
LOCK = re.compile(r"\.(.+\.)?lock")
OLD = b"what was there before\n"
STEPS = 9
TRAIN = (
    "--preset",
    "nano",
    "--batch",
    "1",
    "--steps",
    str(STEPS),
    "--checkpoint-every",
    "3",
    "--eval-every",
    "6",
)
DUE = (0, 1, 2, 3, 5, 6, 9)
FEW = ("--tokens", "200", "--probe", "surprise")


def write_text(path: Path, documents: int, words: int) -> Path:
    rng = random.Random(0)
    lines = (
        json.dumps({"text": " ".join(f"w{rng.randrange(40)}" for _ in range(words))})
        for _ in range(documents)
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder by their path in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def is_hidden(name: str) -> bool:
    last = name.rpartition("/")[2]
    return bool(PARTIAL.fullmatch(last) or LOCK.fullmatch(last))


class Work:
    """One kind of work in a folder, `out`, with a cache of its own."""

    name = ""

    def __init__(self, inputs: Path) -> None:
        self.inputs = inputs
        self.reference: dict[str, bytes] = {}
        self.cached: dict[str, bytes] = {}

    def begin(self, out: Path, fresh: bool) -> None:
        """Make the folder; unless `fresh`, with an earlier file in place of each that will be written."""
        out.mkdir(parents=True)

    def words(self, out: Path) -> list[str]:
        raise NotImplementedError

    def same(self, name: str, content: bytes) -> bool:
        """Is a file that of the reference."""
        return content == self.reference.get(name)

    def check_killed(self, out: Path, cache: Path) -> list[str]:
        """What is wrong after a kill."""
        wrong = [
            f"{out.name}/{n}"
            for n, c in files(out).items()
            if not is_hidden(n) and not (c == OLD or self.same(n, c))
        ]
        wrong += [
            f"cache/{n}" for n, c in files(cache).items() if not is_hidden(n) and c != self.cached.get(n)
        ]
        left = [
            n for folder in (out, cache) for n in files(folder) if PARTIAL.fullmatch(n.rpartition("/")[2])
        ]
        by_folder = [n.rpartition("/")[0] for n in left]
        wrong += [f"leftovers pile up: {left}"] if len(set(by_folder)) < len(by_folder) else []
        return wrong

    def check_done(self, out: Path, cache: Path) -> list[str]:
        """What is wrong after a run that was left alone."""
        found = files(out)
        wrong = [f"missing: {n}" for n in self.reference if n not in found]
        wrong += [f"not as it should be: {n}" for n, c in found.items() if not self.same(n, c)]
        wrong += [
            f"not as it should be: {n}"
            for n, c in files(cache).items()
            if c != self.cached.get(n) and not is_hidden(n)
        ]
        return wrong


class Training(Work):
    name = "training"

    def words(self, out: Path) -> list[str]:
        resume = ["--resume"] if (out / "run.json").exists() else []  # as the page of interrupts says
        return ["train", *TRAIN, "--data", str(self.inputs / "text.jsonl"), "--out", str(out), *resume]

    def same(self, name: str, content: bytes) -> bool:
        if name not in ("metrics.jsonl", "timings.jsonl"):
            return super().same(name, content)
        kept, should = _lines(content), _lines(self.reference.get(name, b""))
        return kept == should[: len(kept)]

    def check_killed(self, out: Path, cache: Path) -> list[str]:
        wrong = super().check_killed(out, cache)
        path = out / "metrics.jsonl"
        steps = [line["step"] for line in _lines(path.read_bytes())] if path.exists() else []
        reached = max(steps, default=0)  # its line comes after the checkpoints of all steps before
        missing = [s for s in DUE if s < reached and not (out / f"step-{s:06d}.pt").exists()]
        return wrong + [f"the checkpoint of step {s} is missing, {reached} were done" for s in missing]

    def check_done(self, out: Path, cache: Path) -> list[str]:
        steps = [line["step"] for line in _lines((out / "metrics.jsonl").read_bytes())]
        wrong = [] if steps == list(range(1, STEPS + 1)) else [f"steps in metrics.jsonl: {steps}"]
        return wrong + super().check_done(out, cache)


def _lines(content: bytes) -> list[dict]:
    """Whole lines, without clocks."""
    lines = [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


class Tokenising(Work):
    name = "tokenising"

    def words(self, out: Path) -> list[str]:
        return ["tokenise", str(self.inputs / "long.jsonl")]


class Writing(Work):
    """Work whose files replace those that were there."""

    written: tuple[str, ...] = ()

    def begin(self, out: Path, fresh: bool) -> None:
        super().begin(out, fresh)
        for name in () if fresh else self.written:
            (out / name).write_bytes(OLD)


class Baseline(Writing):
    name = "baseline"
    written = ("mech.json",)

    def words(self, out: Path) -> list[str]:
        model, text = self.inputs / "run" / f"step-{STEPS:06d}.pt", self.inputs / "text.jsonl"
        return [
            "baseline",
            str(model),
            "--data",
            str(text),
            *FEW,
            "--split",
            "all",
            "--output",
            str(out / "mech.json"),
        ]


class Reporting(Writing):
    name = "reporting"
    written = ("page.html", "results.csv", "surprise.svg", "surprise.tex")

    def words(self, out: Path) -> list[str]:
        given = ["--data", str(self.inputs / "text.jsonl"), "--tokens", "400", "--probe", "surprise"]
        return [
            "report",
            str(self.inputs / "run"),
            *given,
            "--output",
            str(out / "page.html"),
            "--files",
            str(out),
        ]


WORKS = (Training, Tokenising, Baseline, Reporting)


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
