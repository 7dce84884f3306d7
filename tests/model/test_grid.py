"""Grids of runs: twins, workers in processes of their own, kills, and one process a folder."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hopeprobe.errors import BadInputError
from hopeprobe.locks import run_lock
from hopeprobe.model import grid as grid_module
from hopeprobe.model.cell import RECORD, CellSpec, run_cell
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.grid import Setting, cells, known_cells, run_grid, workers_for
from hopeprobe.model.train import TrainConfig
from hopeprobe.tokens import load_tokens

MODEL = ModelConfig(dim=8, layers=1, context=16, heads=2)
TRAIN = TrainConfig(steps=4, batch=2, warmup=1, checkpoint_every=2, eval_every=4, eval_tokens=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The tokens of a small text, and their cache for workers of their own."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": " ".join(f"w{rng.randrange(40)}" for _ in range(60))}) for _ in range(60)]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOPEPROBE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield path, load_tokens(str(path))


def specs(folder, text, variants=("full",), seeds=(0,), thresholds=(), steps=4):
    named = [(v, v, None) for v in variants] + [(f"full-tau-{t:g}", "full", t) for t in thresholds]
    made = []
    for seed in seeds:
        for name, variant, threshold in named:
            model = dataclasses.replace(MODEL, variant=variant)
            model = model if threshold is None else dataclasses.replace(model, surprise_threshold=threshold)
            train = dataclasses.replace(TRAIN, seed=seed, steps=steps)
            made.append(
                CellSpec(
                    name,
                    variant,
                    seed,
                    "tiny",
                    model,
                    train,
                    (str(text[0]),),
                    64,
                    folder / name / f"seed-{seed}",
                    threshold,
                )
            )
    return made


@pytest.fixture
def here(monkeypatch):
    """Cells run in this process; the names of those that did."""
    ran = []

    def run(self, spec):
        ran.append((spec.name, spec.seed))
        self._done(spec, run_cell(spec, self.data))
        return True

    monkeypatch.setattr(grid_module._Grid, "_run", run)
    return ran


def test_cells_of_a_setting(tmp_path):
    setting = Setting("tiny", TRAIN, ("builtin",), 64)
    made = cells(setting, tmp_path, ["full", "titans", "full"], [0, 1], [0.5, 0.5, 3])
    assert [(c.name, c.seed) for c in made] == [
        (name, seed) for seed in (0, 1) for name in ("full", "titans", "full-tau-0.5", "full-tau-3")
    ]
    assert made[2].model.surprise_threshold == 0.5
    assert made[7].train.seed == 1
    assert made[7].folder == tmp_path / "full-tau-3" / "seed-1"
    assert len({c.folder for c in made}) == 8
    with pytest.raises(BadInputError, match="ful"):
        cells(setting, tmp_path, ["ful"], [0])


def test_what_is_one_computation_runs_once_and_nothing_is_repeated(here, text, tmp_path):
    asked = specs(tmp_path, text, ("full", "no-surprise", "transformer"), (0, 1), (0.05, 10.83))
    ran = run_grid(asked, text[1], 1)
    assert ran.failures == []
    assert sorted(here) == sorted(
        (name, seed) for seed in (0, 1) for name in ("full", "transformer", "full-tau-10.83")
    )
    by_name = {(r["name"], r["seed"]): r for r in ran.records}
    assert [by_name[c.name, c.seed]["name"] for c in asked] == [c.name for c in asked]
    for name in ("no-surprise", "full-tau-0.05"):
        assert by_name[name, 1]["same_as"] == "full"
        assert "every gate was open" in by_name[name, 1]["why"]
        assert by_name[name, 1]["live"] == by_name["full", 1]["live"]
        assert not list((tmp_path / name / "seed-1").glob("*.pt"))
    assert by_name["full-tau-10.83", 0]["same_as"] is None
    assert by_name["full-tau-10.83", 0]["gate_rate"] < 1

    here.clear()
    assert run_grid(asked, text[1], 1).records == ran.records
    assert here == []
    more = run_grid([*asked, *specs(tmp_path, text, ("titans",))], text[1], 1)
    assert here == [("titans", 0)]
    assert len(more.records) == 11
    known = known_cells(tmp_path, ran.records[0]["shared"])
    assert [(r["seed"], r["name"]) for r in known][:6] == [
        (0, "full"), (0, "full-tau-0.05"), (0, "full-tau-10.83"), (0, "no-surprise"), (0, "transformer"), (0, "titans"),
    ]  # fmt: skip
    assert len(known) == 11


def test_a_longer_grid_forgets_twins_of_the_shorter(here, text, tmp_path):
    run_grid(specs(tmp_path, text, ("full", "no-surprise"), steps=2), text[1], 1)
    ran = run_grid(specs(tmp_path, text, ("full", "no-surprise")), text[1], 1)
    assert here == [("full", 0), ("full", 0)]
    assert [r["steps"] for r in ran.records] == [4, 4]
    assert [r["steps"] for r in known_cells(tmp_path, ran.records[0]["shared"])] == [4, 4]


@pytest.mark.slow  # processes of their own load torch
def test_workers_are_processes_and_their_numbers_those_of_one(text, tmp_path):
    asked = specs(tmp_path / "several", text, ("full", "transformer", "no-surprise"))
    said = []
    ran = run_grid(asked, text[1], 2, lambda what, done, total: said.append((done, total)))
    assert ran.failures == []
    assert said[-1] == (12, 12)
    assert [done for done, _ in said] == sorted(done for done, _ in said)
    for spec, record in zip(asked[:2], ran.records[:2], strict=True):
        alone = run_cell(dataclasses.replace(spec, folder=tmp_path / "alone" / spec.name), text[1])
        assert record["live"] == alone["live"]
        assert record["curve"] == alone["curve"]
        assert record["threads"] == 1


@pytest.mark.slow  # processes of their own load torch
def test_a_cell_that_fails_stops_no_other(text, tmp_path):
    asked = specs(tmp_path, text, ("full", "transformer"))
    asked[0] = dataclasses.replace(asked[0], tokens=10**9)
    ran = run_grid(asked, text[1], 2)
    assert [r["name"] for r in ran.records] == ["transformer"]
    (failure,) = ran.failures
    assert failure.startswith("full, seed 0: the split 'heldout'")


# A program started where interrupts are ignored (in the background, by nohup) ignores them too.
_PROGRAM = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_grid import specs
from hopeprobe.locks import run_lock
from hopeprobe.model.grid import run_grid
from hopeprobe.tokens import load_tokens
text = Path({text!r})
folder = Path({folder!r})
with run_lock(folder):
    run_grid(specs(folder, (text,), ("full", "transformer"), steps=400), load_tokens(str(text)), 2)
"""


def start(text, folder):
    program = _PROGRAM.format(tests=str(Path(__file__).parent), text=str(text[0]), folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)


def running(folder):
    """Worker processes of ours, by their parent's environment: those that hold a file of the folder open."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if any(str(folder) in os.readlink(f) for f in (entry / "fd").iterdir()):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_until(true, seconds=90):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


@pytest.mark.slow  # four processes load torch, and 400 steps must not end before they are killed
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at processes through /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_any_point_workers_end_and_the_rest_is_done_later(how, text, tmp_path):
    process = start(text, tmp_path)
    try:
        wait_until(lambda: list(tmp_path.glob("*/*/step-000004.pt")) or process.poll() is not None)
        assert process.poll() is None, process.stderr.read()
        assert len(running(tmp_path)) >= 2
        with pytest.raises(BadInputError, match=f"in use by process {process.pid}"), run_lock(tmp_path):
            pass
        process.send_signal(how)
        process.wait(30)
    finally:
        process.kill()
        process.stderr.close()
    wait_until(lambda: not running(tmp_path), 20)
    reached = {p.parent: int(p.stem[5:]) for p in sorted(tmp_path.glob("*/seed-0/step-*.pt"))}
    assert reached
    assert not list(tmp_path.glob(f"*/*/{RECORD}"))
    for folder in reached:  # no more than one interval between checkpoints is lost
        resumable = [s for s in range(0, 402, 2) if (folder / f"step-{s:06d}.pt").exists()]
        assert (
            len((folder / "metrics.jsonl").read_text().splitlines()) - resumable[-1] <= TRAIN.checkpoint_every
        )
    asked = specs(tmp_path, text, ("full", "transformer"), steps=max(reached.values()) // 2 * 2 + 2)
    ran = run_grid(asked, text[1], 2)
    assert ran.failures == []
    for spec, record in zip(asked, ran.records, strict=True):
        whole = run_cell(dataclasses.replace(spec, folder=tmp_path / "whole" / spec.name), text[1])
        assert record["live"] == whole["live"]
        assert record["curve"]["loss"] == whole["curve"]["loss"]


def test_a_folder_that_cannot_be_written_is_named(text, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match=r"cannot write in .*file"), run_lock(tmp_path / "file" / "grid"):
        pass


def test_workers_are_as_many_as_cores_and_memory_allow(text, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    tiny = cells(Setting("tiny", TrainConfig(), ("builtin",), 64), tmp_path, ["full"], [0])
    scaled = cells(Setting("scaled", TrainConfig(), ("builtin",), 64), tmp_path, ["transformer", "full"], [0])
    monkeypatch.setattr("hopeprobe.model.truncation._machine_bytes", lambda: 24 * 2**30)
    assert workers_for(tiny) == 6
    assert workers_for(scaled) == 1
    assert workers_for(scaled[:1]) == 6


def test_what_may_still_be_one_computation_is_tried_before_it_runs(here, text, tmp_path):
    """`full` closes its gate for some token; two thresholds below every surprise are one computation all the same."""
    asked = specs(tmp_path, text, ("full", "no-surprise"), thresholds=(0.05, 20.0))
    asked[0] = dataclasses.replace(
        asked[0], model=dataclasses.replace(asked[0].model, surprise_threshold=10.83)
    )
    ran = run_grid(asked, text[1], 1)
    same = {record["name"]: record["same_as"] for record in ran.records}
    assert same == {"full": None, "no-surprise": None, "full-tau-0.05": "no-surprise", "full-tau-20": None}


def test_full_is_never_taken_for_another_s_computation(here, text, tmp_path):
    asked = specs(tmp_path, text, ("no-surprise",))
    run_grid(asked, text[1], 1)
    ran = run_grid(specs(tmp_path, text, ("full", "no-surprise")), text[1], 1)
    assert {record["name"]: record["same_as"] for record in ran.records} == {
        "full": None,
        "no-surprise": None,
    }


def test_cells_of_another_setting_are_refused(here, text, tmp_path):
    ran = run_grid(specs(tmp_path, text), text[1], 1)
    shared = ran.records[0]["shared"]
    longer = shared | {"train": shared["train"] | {"steps": 100}, "tokens": 5}
    assert known_cells(tmp_path, longer) == []
    with pytest.raises(BadInputError, match=r"cell\.json is of a grid set otherwise \(train differ\)"):
        known_cells(tmp_path, shared | {"train": shared["train"] | {"learning_rate": 1.0}})
    record = tmp_path / "full" / "seed-0" / RECORD
    whole = record.read_text()
    for damaged in (
        '{"seed": 0}',
        "[" * 10_000,
        whole.replace('"seed": 0', '"seed": ' + "7" * 5000),
        "[]",
        "\ud800",
    ):
        record.write_bytes(damaged.encode("utf-8", "surrogatepass"))
        with pytest.raises(BadInputError, match=f"^{re.escape(str(record))} is not the record of a cell"):
            known_cells(tmp_path, shared)


def test_thresholds_that_would_share_a_folder_are_refused(tmp_path):
    with pytest.raises(BadInputError, match="seventh digit"):
        cells(Setting("tiny", TRAIN, ("builtin",), 64), tmp_path, ["full"], [0], [10.0, 10.0000001])


@pytest.mark.slow  # processes of their own load torch
def test_workers_take_nothing_from_the_folder_they_run_in(text, tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    ran = run_grid(specs(tmp_path / "grid", text), text[1], 1)
    assert ran.failures == []
