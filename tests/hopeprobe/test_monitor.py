"""Probes inside training: what they log, beside which weights, and that training does not notice."""

import copy
import json
import math
import os
import subprocess

import pytest
import torch

from hopeprobe.analysis import analyze
from hopeprobe.documents import read_records
from hopeprobe.errors import BadInputError
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.monitor import Monitor
from hopeprobe.subject import GateRule, load

TRAIN = TrainConfig(
    steps=6, learning_rate=1e-2, warmup=1, checkpoint_every=3, eval_every=6, eval_tokens=100, batch=4
)

EVERY_KIND = (
    "integrity",
    "learning-signal",
    "adaptation",
    "gate-selectivity",
)  # weights, gradients, interventions, passes


@pytest.fixture
def monitor(toy_data, toy_cache):
    def make(probes=("surprise", "cms-similarity"), every=3, **more):
        settings = {"data": toy_data, "tokens": 1200, "split": "all", "cache_dir": toy_cache, **more}
        return Monitor(probes, every=every, **settings)

    return make


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_logs_probes_beside_its_own_initial_weights(configs, toy_data, toy_cache, monitor, tmp_path):
    watch = monitor()
    train(configs["toy"], TRAIN, toy_data, tmp_path, each_step=watch)
    logged = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6], "still a line a step"
    assert [line["step"] for line in logged if "probes" in line] == [3, 6]
    direct = analyze(
        tmp_path / "step-000006.pt",
        ["surprise", "cms-similarity"],
        toy_data,
        1200,
        "all",
        fresh=0,
        cache_dir=toy_cache,
    )
    (loss,) = [row for row in direct.rows if row.statistic == "mean_loss"]
    found = logged[-1]["probes"]["surprise/mean_loss/live"]
    assert found["value"] == pytest.approx(loss.value, rel=1e-6)
    assert found["own_init"] == pytest.approx(direct.nulls_by_row()[loss.key]["own-init"].value, rel=1e-6)
    assert found["ci_low"] < found["value"] < found["own_init"]
    assert len(logged[-1]["probes"]) == len(direct.rows)
    assert sorted({row.step for row in watch.results.rows}) == [3, 6]


@pytest.mark.slow  # two trainings, and probes of every kind
def test_training_does_not_notice(configs, toy_data, monitor, tmp_path):
    train(configs["toy"], TRAIN, toy_data, tmp_path / "plain")
    train(
        configs["toy"],
        TRAIN,
        toy_data,
        tmp_path / "watched",
        each_step=monitor(EVERY_KIND, every=5, tokens=200),
    )
    for step in (3, 6):
        plain, watched = (
            torch.load(tmp_path / name / f"step-00000{step}.pt", weights_only=True)
            for name in ("plain", "watched")
        )
        assert all(torch.equal(plain["weights"][name], watched["weights"][name]) for name in plain["weights"])
        assert torch.equal(plain["generators"]["torch"], watched["generators"]["torch"])


class Loop:
    """Somebody's own training of a subject's module."""

    def __init__(self, subject, tokens):
        self.subject, self.tokens = subject, tokens
        self.optimizer = torch.optim.SGD(subject.module.parameters(), lr=0.5)

    def step(self):
        self.optimizer.zero_grad()
        self.subject.loss(self.tokens).backward()
        self.optimizer.step()


@pytest.fixture
def loop(subject):
    generator = torch.Generator().manual_seed(0)
    return Loop(subject, torch.randint(0, 97, (4, 33), generator=generator))


def test_a_loop_of_ones_own(loop, monitor, tmp_path):
    before = copy.deepcopy(loop.subject.module.state_dict())
    watch = monitor()
    with watch.watching(loop.subject, tmp_path / "logs" / "probes.jsonl") as watching:
        found = []
        for _ in range(7):
            loop.step()
            found.append(watching.step())
    assert [one is not None for one in found] == [False, False, True, False, False, True, False]
    logged = lines(tmp_path / "logs" / "probes.jsonl")
    assert [line["step"] for line in logged] == [0, 3, 6, 7], (
        "where it began, when it was due, and where it ended"
    )
    first = [line["probes"]["surprise/mean_loss/live"] for line in logged]
    assert first[0]["value"] == first[0]["own_init"]
    assert {one["own_init"] for one in first} == {first[0]["value"]}, "the weights on entry, not those of now"
    assert first[-1]["value"] != first[0]["value"]
    assert any(not torch.equal(before[n], t) for n, t in loop.subject.module.state_dict().items())
    assert loop.subject.trained_steps == 0, "the subject itself is as it was"
    assert sorted({row.step for row in watch.results.rows}) == [0, 3, 6, 7]


@pytest.mark.parametrize("left", ['{"step": 10, "pro', '{"step": 10, "missing": ["ä'])
def test_a_line_that_a_kill_cut_off_does_not_swallow_the_next(loop, monitor, tmp_path, left):
    log = tmp_path / "probes.jsonl"
    log.write_bytes(b'{"step": 0, "probes": {}}\n' + left.encode()[:-1])
    with monitor("surprise", every=1, tokens=200).watching(loop.subject, log, start=10) as watching:
        loop.step()
        watching.step()
    assert [record["step"] for _, record in read_records(log)] == [0, 10, 11]
    assert len(lines(log)) == 3


def test_a_log_may_be_a_pipe(loop, monitor, tmp_path):
    """It waits for whoever reads it."""
    os.mkfifo(tmp_path / "pipe")
    call = ["sh", "-c", 'sleep 0.5; exec cat "$0"', tmp_path / "pipe"]
    with subprocess.Popen(call, stdout=subprocess.PIPE) as reader:
        try:
            with monitor("surprise", tokens=200).watching(loop.subject, tmp_path / "pipe"):
                pass
            assert json.loads(reader.communicate(timeout=20)[0])["step"] == 0
        finally:
            reader.kill()


def test_another_gate_is_set_beside_the_weights_on_entry_too(loop, monitor):
    """Not beside the weights of now, which would make every number at-init."""
    watch = monitor("surprise", every=2, gate=GateRule("random", 0.5))
    with watch.watching(loop.subject) as watching:
        for _ in range(2):
            loop.step()
            found = watching.step()
    loss = found["probes"]["surprise/mean_loss/live"]
    (first,) = [row for row in watch.results.rows if (row.statistic, row.step) == ("mean_loss", 0)]
    assert loss["own_init"] == first.value != loss["value"]


def test_a_files_word_is_not_the_loops(toy_run, monitor):
    """Steps, optimiser and sibling checkpoints of the file that the loop began from say nothing of what it does."""
    learner = load(toy_run / "step-000040.pt")
    loop = Loop(learner, torch.randint(0, 97, (4, 33), generator=torch.Generator().manual_seed(0)))
    watch = monitor(("integrity", "cms-dynamics"), every=2)
    with watch.watching(learner) as watching:
        for _ in range(2):
            loop.step()
            watching.step()
    rows = [row for row in watch.results.rows if row.step == 2]
    assert not any(row.statistic == "checkpoint_drift" and math.isfinite(row.value) for row in rows)
    distances = [
        row.value for row in rows if row.statistic == "distance_from_init" and row.probe == "integrity"
    ]
    assert 0 < max(distances) < 0.5, "from the weights on entry, not from those of step 0"


def test_one_monitor_watches_a_run_after_another(subject_of, loop, monitor):
    watch = monitor("surprise", every=1)
    for _ in range(2):
        with watch.watching(loop.subject) as watching:
            loop.step()
            watching.step()
    assert sorted({row.step for row in watch.results.rows}) == [0, 1], "those of the latest"


@pytest.mark.slow  # gradients of many windows, at each of its steps
def test_a_watched_loop_trains_the_same(subject_of, loop, monitor):
    alone = Loop(subject_of(), loop.tokens)
    state = torch.get_rng_state()
    with monitor("learning-signal", every=1, tokens=200).watching(loop.subject) as watching:
        for _ in range(2):
            loop.step()
            gradients = [None if p.grad is None else p.grad.clone() for p in loop.subject.module.parameters()]
            watching.step()
            alone.step()
            for p, kept, other in zip(
                loop.subject.module.parameters(), gradients, alone.subject.module.parameters(), strict=True
            ):
                assert torch.equal(p, other)
                assert (p.grad is None) == (kept is None)
                assert kept is None or torch.equal(p.grad, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_in_the_loop_is_not_measured_after(loop, monitor, tmp_path):
    def fail():
        with monitor().watching(loop.subject, tmp_path / "log.jsonl") as watching:
            loop.step()
            watching.step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [line["step"] for line in lines(tmp_path / "log.jsonl")] == [0]


def test_what_cannot_be_measured_ends_no_training(loop, monitor, monkeypatch, tmp_path):
    watch = monitor("surprise", every=1)
    with watch.watching(loop.subject, tmp_path / "log.jsonl") as watching:
        loop.subject.module.norm.weight.data.fill_(math.nan)
        found = watching.step()
    assert found["missing"]
    assert not any(one["value"] is not None for one in found["probes"].values())
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_a_writer_is_told_every_number(loop, monitor):
    class Kept:
        def __init__(self):
            self.scalars = []

        def add_scalar(self, tag, value, step):
            self.scalars.append((tag, value, step))

    writer = Kept()
    watch = monitor("surprise", writer=writer)
    with watch.watching(loop.subject):
        pass
    assert ("surprise/mean_loss/live", watch.results.rows[0].value, 0) in writer.scalars
    assert all(math.isfinite(value) for _, value, _ in writer.scalars)


def test_tensorboard_itself(loop, monitor, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install hopeprobe[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    watch = monitor("surprise", writer=SummaryWriter(str(tmp_path)))
    with watch.watching(loop.subject):
        pass
    watch.writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (loss,) = events.Scalars("surprise/mean_loss/live")
    assert loss.value == pytest.approx(watch.results.rows[0].value, rel=1e-6)


def test_what_cannot_be_watched(loop, monitor, tmp_path):
    with pytest.raises(BadInputError, match="did you mean 'surprise'"):
        monitor("surprize")
    with pytest.raises(BadInputError, match="at least 1 step"):
        monitor(every=0)
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(BadInputError, match="cannot write"),
        monitor().watching(loop.subject, tmp_path / "file" / "log.jsonl"),
    ):
        pass
    loop.subject.module.blocks[0].register_buffer("fast", torch.ones(2, requires_grad=True) * 2)
    with pytest.raises(BadInputError, match="cannot be copied"), monitor().watching(loop.subject):
        pass
