"""A recorded step: the same as without recording, made anew where it must be, and given up, aloud, where it differs.

`Tape` stands in for a CUDA graph: it does work again by telling it again, into the memory of the recording, and leaves
Python's side as it finds it, as a graph does. Its descendants each have a defect that graphs can have.
"""

import contextlib
import copy
import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from model_toys import TOY
from pretend import DEVICE, here, looks

from hopeprobe.errors import DivergedError
from hopeprobe.model import captured
from hopeprobe.model.captured import CapturedStep, CudaRecorder, step_of
from hopeprobe.model.checkpoint import read, step_path
from hopeprobe.model.run import fresh
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.model.update import DeviceStep
from hopeprobe.tokens import TokenData

MODEL = dataclasses.replace(TOY, vocab_size=53, context=16, embed_std=0.1, layers=1)
CONFIG = TrainConfig(
    steps=6, batch=2, learning_rate=1e-2, warmup=4, checkpoint_every=3, eval_every=6, eval_tokens=64
)
RNG = np.random.default_rng(0)
DATA = TokenData.from_documents(
    [RNG.integers(0, 52, 30) for _ in range(40)], name="random", vocab_size=53, end_of_text=52
)
BATCHES = torch.randint(0, 53, (6, 2, 17), generator=torch.Generator().manual_seed(1))
RATES = [2e-3, 4e-3, 6e-3, 8e-3, 8e-3, 8e-3]


class Tape:
    def __init__(self, run=None):
        self.run = run
        self.warmed = self.recorded = self.replayed = 0

    def warm_up(self, work):
        self.warmed += 1
        for _ in range(3):
            work()

    def record(self, work):
        self.recorded += 1
        seen = work()
        gradients = [p.grad for p in self.run.model.parameters()]
        self.prepare()
        for memory in (seen, *filter(lambda g: g is not None, gradients)):
            memory.fill_(float("nan"))  # while it is recorded a graph computes nothing

        def replay():
            self.replayed += 1
            outside = [p.grad for p in self.run.model.parameters()]
            with self.spoilt():
                seen.copy_(work())
            for p, memory, before in zip(self.run.model.parameters(), gradients, outside, strict=True):
                if memory is not None:
                    memory.copy_(p.grad)
                p.grad = before

        return seen, replay

    def prepare(self):
        pass

    def spoilt(self):
        return contextlib.nullcontext()


def swapped(one, name, value):
    @contextlib.contextmanager
    def inside():
        before = getattr(one, name)
        setattr(one, name, value)
        try:
            yield
        finally:
            setattr(one, name, before)

    return inside()


class StaleTokens(Tape):
    def prepare(self):
        self.tokens = self.step.tokens.clone()

    def spoilt(self):
        return swapped(self.step, "tokens", self.tokens)


class StaleRate(Tape):
    def prepare(self):
        self.rate = self.step.rate.clone()

    @contextlib.contextmanager
    def spoilt(self):
        now = self.step.rate.clone()
        self.step.rate.copy_(self.rate)
        yield
        self.step.rate.copy_(now)


class AddsGradients(Tape):
    @contextlib.contextmanager
    def spoilt(self):
        model = self.run.model
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-2)
        with swapped(model, "zero_grad", lambda set_to_none=True: None):
            yield


class ForgetsTheUpdate(Tape):
    def spoilt(self):
        return self.step._holding()


class OldWeights(Tape):
    """As where a copy of the weights was made when it was recorded."""

    def prepare(self):
        self.old = [p.detach().clone() for p in self.run.model.parameters()]

    @contextlib.contextmanager
    def spoilt(self):
        if self.replayed > 1:
            for p, old in zip(self.run.model.parameters(), self.old, strict=True):
                p.data.copy_(old)
        yield


class CannotRecord(Tape):
    def record(self, work):
        raise RuntimeError("operation not permitted when stream is capturing")


class CannotReplay(Tape):
    def spoilt(self):
        raise RuntimeError("out of memory")


def begun(folder, recorder=None, model=MODEL):
    """A step as on a device, of tensors of the CPU, where it is quick: with the optimiser that a device has."""
    run = fresh(model, CONFIG, DATA, folder, torch.device("cpu"))
    groups = [group | {"fused": True, "capturable": True} for group in run.optimizer.param_groups]
    run.optimizer = torch.optim.AdamW(groups)
    if recorder is None:
        return run, DeviceStep(run)
    step = CapturedStep(run, recorder)
    recorder.run, recorder.step = run, step
    return run, step


def made(step, n=6):
    return [step(tokens, rate) for tokens, rate in zip(BATCHES[:n], RATES, strict=False)]


def same_weights(one, other):
    return all(
        torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )


def same_gradients(one, other):
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all((p.grad is q.grad is None) or torch.equal(p.grad, q.grad) for p, q in pairs)


@pytest.fixture(scope="module", params=["full", "transformer", "truncated"])
def reference(request, tmp_path_factory):
    model = {"full": MODEL, "truncated": dataclasses.replace(MODEL, truncate_ticks=1)}.get(
        request.param, dataclasses.replace(MODEL, variant="transformer")
    )
    run, step = begun(tmp_path_factory.mktemp("plain"), model=model)
    return model, run, made(step)


def test_a_recorded_step_is_the_step(reference, tmp_path):
    model, plain, expected = reference
    tape = Tape()
    run, step = begun(tmp_path, tape, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repr(made(step)) == repr(expected)
    assert same_weights(run, plain)
    assert (tape.warmed, tape.recorded, tape.replayed, step.proven) == (1, 1, 6, 2)
    for a, b in zip(run.optimizer.state.values(), plain.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in b)
    assert same_gradients(run, plain)


@pytest.mark.parametrize(
    ("tape", "words"),
    [
        (StaleTokens, "the recorded step is another one: the loss"),
        (StaleRate, "the recorded step is another one: the update"),
        (AddsGradients, "the recorded step is another one: the norm of the gradient"),
        (ForgetsTheUpdate, "the recorded step is another one: the update"),
        (OldWeights, "the recorded step is another one: the "),
        (CannotRecord, r"could not be recorded \(RuntimeError: operation not permitted"),
        (CannotReplay, r"could not be tried \(RuntimeError: out of memory"),
    ],
)
def test_a_recording_with_a_defect_is_given_up_once_and_aloud(tmp_path, tape, words):
    plain, without = begun(tmp_path / "plain")
    expected = made(without)
    run, step = begun(tmp_path / "run", tape())
    with pytest.warns(RuntimeWarning, match=f"{words}.*goes on without recording.*--no-capture") as said:
        assert repr(made(step)) == repr(expected)
    assert len(said) == 1
    assert same_weights(run, plain)
    assert step.recorder is None


def test_hooks_are_waited_for(tmp_path):
    plain, without = begun(tmp_path / "plain")
    expected = made(without)
    tape = Tape()
    run, step = begun(tmp_path / "run", tape)
    found, fired = made(step, 3), []
    with run.model.hooks(fwd_hooks=[("hook_surprise", lambda s, hook: fired.append(1))]):
        found.append(step(BATCHES[3], RATES[3]))
    assert len(fired) == 2
    assert tape.replayed == 3
    gone = run.model.norm.bias.register_hook(lambda g: fired.append(2))
    found.append(step(BATCHES[4], RATES[4]))
    assert fired[2:] == [2]
    gone.remove()
    found.append(step(BATCHES[5], RATES[5]))
    assert (tape.replayed, tape.recorded) == (4, 1)
    assert repr(found) == repr(expected)
    assert same_weights(run, plain)
    assert same_gradients(run, plain)  # the replay's own, not those of the step before it


CHANGES = {
    "weights elsewhere": lambda run: setattr(
        run.model.norm.weight, "data", run.model.norm.weight.data.clone()
    ),
    "no gradient for one": lambda run: run.model.norm.bias.requires_grad_(False),
    "other decay": lambda run: run.optimizer.param_groups[0].update(weight_decay=0.5),
    "an optimiser's state elsewhere": lambda run: run.optimizer.load_state_dict(
        copy.deepcopy(run.optimizer.state_dict())
    ),
    "another precision": lambda run: setattr(run.model, "activations", torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_recording_was_made_with_may_change(tmp_path, change):
    plain, without = begun(tmp_path / "plain")
    tape = Tape()
    run, step = begun(tmp_path / "run", tape)
    for one, make in ((plain, without), (run, step)):
        made(make, 3)
        CHANGES[change](one)
        rate = one.optimizer.param_groups[0]["lr"]
        for group in one.optimizer.param_groups:  # a state that is loaded brings a rate of its own
            group["lr"] = make.rate if rate is not make.rate else rate
    a, b = ([make(t, r) for t, r in zip(BATCHES[3:], RATES[3:], strict=True)] for make in (without, step))
    assert repr(a) == repr(b)
    assert same_weights(run, plain)
    assert tape.recorded == 2


@pytest.mark.parametrize("at", [0, 4])
def test_what_is_not_finite_changes_nothing_in_a_recorded_step(tmp_path, at):
    run, step = begun(tmp_path, Tape(), dataclasses.replace(MODEL, variant="transformer"))
    run.checkpoint()
    made(step, at)
    run.model.norm.weight.data[0] = float("nan")
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(DivergedError, match=r"the loss is nan.*outside the layers \(hook_surprise\)"):
        step(BATCHES[at], RATES[at])
    assert all(
        torch.equal(p.nan_to_num(), b.nan_to_num())
        for p, b in zip(run.model.parameters(), before, strict=True)
    )


def test_a_recorded_step_has_one_look(tmp_path):
    run = fresh(dataclasses.replace(MODEL, variant="transformer"), CONFIG, DATA, tmp_path, DEVICE)
    step = CapturedStep(run, Tape(run))
    made(step, 2)
    for tokens in BATCHES[2:4]:
        with looks() as seen:
            step(tokens, 1e-2)
            assert seen == {"to the host": 1}


@pytest.mark.parametrize("variant", ["transformer", pytest.param("full", marks=pytest.mark.slow)])
def test_a_run_is_the_same_recorded_or_not_and_resumed(tmp_path, monkeypatch, variant):
    model = dataclasses.replace(MODEL, variant=variant)
    tapes = []

    class Late(Tape):
        """Learns of the run by its step."""

        def record(self, work):
            self.run = work.__self__.run
            return super().record(work)

    def recorder_of(device):
        tapes.append(Late())
        return tapes[-1]

    monkeypatch.setattr(captured, "recorder_of", recorder_of)

    class Killed(BaseException):
        pass

    def kill(step, metrics):
        if step == 4:
            raise Killed

    train(model, CONFIG, DATA, tmp_path / "plain", device=DEVICE, capture=False)
    train(model, CONFIG, DATA, tmp_path / "whole", device=DEVICE)
    with pytest.raises(Killed):
        train(model, CONFIG, DATA, tmp_path / "killed", device=DEVICE, progress=kill)
    train(model, CONFIG, DATA, tmp_path / "killed", device=DEVICE, resume=True)
    assert [tape.replayed for tape in tapes] == [6, 4, 3]
    for name in ("whole", "killed"):
        for folder in (tmp_path / "plain", tmp_path / name):
            assert (folder / "step-000006.pt").exists()
        ours, theirs = (read(step_path(tmp_path / where, 6)) for where in ("plain", name))
        assert all(torch.equal(w, theirs.weights[k]) for k, w in ours.weights.items())
        records = [
            [
                json.loads(x) | {"tokens_per_s": 0}
                for x in (tmp_path / where / "metrics.jsonl").read_text().splitlines()
            ]
            for where in ("plain", name)
        ]
        assert records[0] == records[1]


def test_where_nothing_records(tmp_path):
    run = fresh(MODEL, CONFIG, DATA, tmp_path, DEVICE)
    assert type(step_of(run)) is DeviceStep
    assert here(run.model.embed).device.type == "cpu"


def test_a_cuda_graph_is_made_as_its_notes_say(monkeypatch):
    """Which calls, and in which order: what they do only a device can tell."""
    said = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            said.append("replay")

    @contextlib.contextmanager
    def block(name):
        said.append(name)
        yield
        said.append(f"/{name}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: block(stream.name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: block("graph"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: said.append("empty"))
    recorder = captured.recorder_of(torch.device("cuda", 0))
    assert isinstance(recorder, CudaRecorder)
    recorder.warm_up(lambda: said.append("work"))
    warmed = ["side waits for current", "side", "work", "work", "work", "/side", "current waits for side"]
    assert said == warmed
    seen, replay = recorder.record(lambda: said.append("work") or "seen")
    replay()
    assert seen == "seen"
    assert said[len(warmed) :] == ["empty", "graph", "work", "/graph", "replay"]
    assert captured.recorder_of(torch.device("cpu")) is None
