"""Kill hopeprobe at random and at aimed moments of all its work, and look each time at what is there.

    python tests/faults/kills.py --kills 100 --seed 0 [--output tests/faults/kills.json]

Status 1 where anything was lost. The moments are drawn from the seed and written down; those from outside are seconds,
which depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from killing import AIMS, NEVER, Ended, Moment, Server
from works import WORKS, Training, Work, empty, files, is_hidden, write_text

#: A share of the kills from outside, of these a share in cold processes; others are aimed.
RANDOM, COLD = 0.5, 0.3
#: Of a folder and its cache, before it is left alone to the end.
MOST_IN_A_ROW = 6


class Killer:
    """One kind of work, killed again and again in the same folder, and now and then left to end."""

    def __init__(self, work: Work, server: Server, folder: Path, seed: int) -> None:
        self.work, self.server, self.folder = work, server, folder
        self.rng = random.Random(f"{seed} {work.name}")
        self.kills: list[dict] = []
        self.problems: list[str] = []
        self.ends = 0
        self.most_left = 0
        self._reference()
        self._begin()

    def _reference(self) -> None:
        out, cache = self.folder / "reference", self.folder / "cache-reference"
        self.work.begin(out, fresh=True)
        ended = self._run(NEVER, out, cache)
        self.work.reference, self.work.cached = files(out), files(cache)
        assert not any(map(is_hidden, [*self.work.reference, *self.work.cached]))
        self.events, self.seconds = ended.events, ended.seconds
        assert self.work.reference or self.work.cached
        cold = [] if self.work.words(out)[0] == "tokenise" else [self.seconds + 4]
        self.cold_seconds = cold[0] if cold else None

    def _begin(self) -> None:
        self.out, self.cache = empty(self.folder / "out"), empty(self.folder / "cache")
        self.work.begin(self.out, fresh=self.rng.random() < 0.5)
        self.in_a_row = 0

    def _run(self, moment: Moment, out: Path, cache: Path, cold: bool = False) -> Ended:
        ended = self.server.run(self.work.words(out), cache, moment, cold)
        assert ended.killed or ended.status == 0, ended.said
        return ended

    def _drawn(self) -> tuple[Moment, bool]:
        if self.rng.random() >= RANDOM:
            aims = [aim for aim in AIMS if self.events.get(aim)]
            kind = self.rng.choice(aims)
            late = kind in ("open", "fsync") and self.rng.random() < 0.7  # in the middle of it, as a rule
            seconds = self.rng.uniform(0.0002, 0.03) if late else 0.0
            return Moment(kind, seconds, self.rng.randint(1, self.events[kind])), False
        cold = self.cold_seconds is not None and self.rng.random() < COLD
        if cold:
            return Moment("start-up", self.rng.uniform(0, self.cold_seconds)), True
        return Moment("random", self.rng.uniform(0, self.seconds)), False

    def once(self) -> bool:
        """Run, with a kill at a moment drawn; whether there was one."""
        moment, cold = self._drawn()
        try:
            ended = self._run(moment, self.out, self.cache, cold)
        except AssertionError as error:
            self._problem(moment, [f"it failed: {error}"])
            self._begin()
            return False
        if not ended.killed:  # it had ended by then
            self._done(moment)
            return False
        wrong = self.work.check_killed(self.out, self.cache)
        left = [name for folder in (self.out, self.cache) for name in files(folder) if is_hidden(name)]
        self.most_left = max(self.most_left, len(left))
        locks = sum(name.endswith("lock") for name in left)
        self.kills.append(
            {"work": self.work.name, "kind": moment.kind, "seconds": round(moment.seconds, 4), "nth": moment.nth,
             "partial": len(left) - locks, "lock": locks}
        )  # fmt: skip
        if wrong:
            self._problem(moment, wrong)
            self._begin()
        self.in_a_row += 1
        if self.in_a_row >= MOST_IN_A_ROW:
            self.finish()
        return True

    def finish(self) -> None:
        """Leave it alone to the end, and look at all of it."""
        try:
            self._run(NEVER, self.out, self.cache)
        except AssertionError as error:
            self._problem(NEVER, [f"it failed: {error}"])
            self._begin()
        else:
            self._done(NEVER)

    def _done(self, moment: Moment) -> None:
        self.ends += bool(self.in_a_row)
        wrong = self.work.check_done(self.out, self.cache)
        hidden = [name for name in files(self.out) if is_hidden(name)]
        wrong += [f"left behind: {hidden}"] if hidden else []
        if wrong:
            self._problem(moment, wrong)
        self._begin()

    def _problem(self, moment: Moment, what: list[str]) -> None:
        self.problems.append(f"{self.work.name}, kill {len(self.kills)}, {moment}: {'; '.join(what)}")
        print(self.problems[-1], file=sys.stderr, flush=True)


def kill(kills: int, seed: int, folder: Path, told: bool = True) -> dict:
    """Kill that many processes, a quarter in each kind of work; what was found."""
    started = time.monotonic()
    inputs = folder / "inputs"
    inputs.mkdir()
    write_text(inputs / "text.jsonl", 60, 40)
    write_text(inputs / "long.jsonl", 1500, 900)
    server = Server(folder)
    killers: list[Killer] = []
    try:
        for make in WORKS:
            killers.append(Killer(make(inputs), server, folder / make.name, seed))
            if make is Training:  # what is measured
                (folder / make.name / "reference").rename(inputs / "run")
        for number, killer in enumerate(killers):
            share = kills // len(killers) + (number < kills % len(killers))
            while len(killer.kills) < share and not len(killer.problems) > 5:
                if killer.once() and told:
                    one = killer.kills[-1]
                    print(f"{killer.work.name}, {len(killer.kills)} of {share}: {one}", flush=True)
            killer.finish()
    finally:
        server.close()
    done = [one for killer in killers for one in killer.kills]
    return {
        "seed": seed,
        "kills": len(done),
        "problems": [problem for killer in killers for problem in killer.problems],
        "by_work": {
            killer.work.name: {
                "kills": len(killer.kills),
                "by_moment": dict(sorted(collections.Counter(one["kind"] for one in killer.kills).items())),
                "ended_as_unkilled_after_kills": killer.ends,
                "left_a_hidden_file": sum(bool(one["partial"]) for one in killer.kills),
                "left_a_lock_file": sum(bool(one["lock"]) for one in killer.kills),
                "most_hidden_files_at_once": killer.most_left,
                "seconds_unkilled": round(killer.seconds, 2),
            }
            for killer in killers
        },
        "minutes": round((time.monotonic() - started) / 60, 1),
        "with": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "system": platform.system(),
        },
        "each": done,
    }


def as_json(found: dict) -> str:
    """With a line a kill."""
    each = ",\n  ".join(json.dumps(one) for one in found["each"])
    rest = {key: value for key, value in found.items() if key != "each"}
    return json.dumps(rest, indent=1).removesuffix("\n}") + f',\n "each": [\n  {each}\n ]\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a file for the record")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill(given.kills, given.seed, Path(folder))
    print(json.dumps({key: value for key, value in found.items() if key != "each"}, indent=1))
    if given.output is not None:
        given.output.write_text(as_json(found), encoding="utf-8")
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
