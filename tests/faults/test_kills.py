"""Killed at any moment nothing is lost: a few of the kills of `kills.py`, and that what looks for losses finds them."""

import json
import shutil

import pytest
from kills import as_json, kill
from works import OLD, Baseline, Tokenising, Training

KILLS = 12


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some seconds a kill, many times that where others compute
def test_nothing_is_lost_at_random_and_aimed_moments(tmp_path):
    found = kill(KILLS, seed=8, folder=tmp_path, told=False)
    assert found["problems"] == []
    assert found["kills"] == KILLS
    assert {name: work["kills"] for name, work in found["by_work"].items()} == {
        "training": 3, "tokenising": 3, "baseline": 3, "reporting": 3,
    }  # fmt: skip
    assert all(work["ended_as_unkilled_after_kills"] for work in found["by_work"].values())
    assert len({one["kind"] for one in found["each"]}) >= 4
    assert json.loads(as_json(found)) == found


def line(step, loss=1.0):
    return json.dumps({"step": step, "loss": loss, "tokens_per_s": step * 7.5}).encode() + b"\n"


def seen(work, folder):
    """What is wrong after a kill, without the place."""
    return work.check_killed(folder / "out", folder / "cache")


@pytest.fixture
def training(tmp_path):
    """Training whose checkpoints are words, killed after its fourth step."""
    work = Training(tmp_path)
    work.reference = {f"step-{step:06d}.pt": f"weights {step}".encode() for step in (0, 1, 2, 3, 5, 6, 9)}
    work.reference |= {"run.json": b"{}", "metrics.jsonl": b"".join(map(line, range(1, 10)))}
    (tmp_path / "cache").mkdir()
    (tmp_path / "out").mkdir()
    for name, content in work.reference.items():
        if name[5:11] < "000004":
            (tmp_path / "out" / name).write_bytes(content)
    (tmp_path / "out" / "metrics.jsonl").write_bytes(b"".join(map(line, (1, 2, 3, 4))) + line(5)[:9])
    (tmp_path / "out" / "run.json").write_bytes(b"{}")
    (tmp_path / "out" / ".step-000005.pt.0123abcd.hopeprobe").write_bytes(b"wei")
    (tmp_path / "out" / ".lock").touch()
    assert seen(work, tmp_path) == []
    return work


def test_losses_are_seen(training, tmp_path):
    out = tmp_path / "out"
    for spoil, what in (
        (lambda: (out / "step-000003.pt").write_bytes(b"weig"), "out/step-000003.pt"),
        (lambda: (out / "step-000003.pt").write_bytes(b""), "out/step-000003.pt"),
        ((out / "step-000003.pt").unlink, "the checkpoint of step 3 is missing, 4 were done"),
        (lambda: (out / "run.json").write_bytes(b"{"), "out/run.json"),
        (lambda: (out / "metrics.jsonl").write_bytes(line(1) + line(2, 1.5)), "out/metrics.jsonl"),
        (lambda: (out / "metrics.jsonl").write_bytes(line(1) + line(3)), "out/metrics.jsonl"),
        ((out / "something").touch, "out/something"),
        ((out / ".step-000006.pt.0123abcd.hopeprobe").touch, "leftovers pile up"),
        ((tmp_path / "cache" / "x.tokens").touch, "cache/x.tokens"),
    ):
        shutil.copytree(out, tmp_path / "before")
        spoil()
        (wrong,) = seen(training, tmp_path)
        assert wrong.startswith(what)
        shutil.rmtree(out)
        (tmp_path / "before").rename(out)
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").mkdir()
    assert seen(training, tmp_path) == []


def test_an_end_that_is_not_that_of_an_unkilled_run_is_seen(training, tmp_path):
    out = tmp_path / "out"
    shutil.rmtree(out)
    out.mkdir()
    for name, content in training.reference.items():
        (out / name).write_bytes(content)
    assert training.check_done(out, tmp_path / "cache") == []
    (out / "metrics.jsonl").write_bytes(b"".join(map(line, range(1, 9))))
    assert training.check_done(out, tmp_path / "cache") == [f"steps in metrics.jsonl: {list(range(1, 9))}"]
    (out / "metrics.jsonl").write_bytes(training.reference["metrics.jsonl"])
    (out / "step-000009.pt").unlink()
    assert training.check_done(out, tmp_path / "cache") == ["missing: step-000009.pt"]
    (out / "step-000009.pt").write_bytes(b"other weights")
    assert training.check_done(out, tmp_path / "cache") == ["not as it should be: step-000009.pt"]


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    for work, name in ((Baseline(tmp_path), "out/mech.json"), (Tokenising(tmp_path), "cache/a.tokens")):
        path = tmp_path / name
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "cache").mkdir(exist_ok=True)
        work.reference, work.cached = {"mech.json": b"new"}, {"a.tokens": b"new"}
        assert seen(work, tmp_path) == []
        path.write_bytes(b"new")
        assert seen(work, tmp_path) == []
        path.write_bytes(b"ne")
        assert seen(work, tmp_path) == [name]
        path.write_bytes(OLD)
        assert seen(work, tmp_path) == ([] if "mech" in name else [name])
        path.unlink()
