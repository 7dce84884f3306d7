"""A step on a device: one look, a CPU's numbers, nothing changed by what is not finite, and a run that moves."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from model_toys import TOY
from pretend import DEVICE, here, looks

from hopeprobe.errors import DivergedError
from hopeprobe.model.captured import step_of
from hopeprobe.model.checkpoint import read, step_path
from hopeprobe.model.run import fresh
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.model.update import HostStep
from hopeprobe.tokens import TokenData

MODEL = dataclasses.replace(TOY, vocab_size=53, context=16, embed_std=0.1, layers=1)
CONFIG = TrainConfig(
    steps=5, batch=2, learning_rate=1e-2, warmup=2, checkpoint_every=3, eval_every=3, eval_tokens=64, seed=5
)
CPU = torch.device("cpu")


def documents():
    rng = np.random.default_rng(0)
    return TokenData.from_documents(
        [rng.integers(0, 52, 30) for _ in range(40)], name="random", vocab_size=53, end_of_text=52
    )


DATA = documents()
BATCHES = torch.randint(0, 53, (4, 2, 17), generator=torch.Generator().manual_seed(1))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def begun(folder, device=DEVICE, model=MODEL, config=CONFIG):
    run = fresh(model, config, DATA, folder, device)
    return run, step_of(run)


def close(one, other, within=1e-5):
    assert set(one) == set(other)
    for key, value in one.items():
        a, b = here(value), here(other[key])
        assert torch.allclose(a, b, rtol=within, atol=within), (key, (a - b).abs().max())


@pytest.mark.parametrize(
    "model",
    [MODEL, dataclasses.replace(MODEL, truncate_ticks=1), dataclasses.replace(MODEL, variant="titans")],
)
def test_steps_on_a_device_are_those_of_a_cpu(tmp_path, model):
    (a, host), (b, device) = begun(tmp_path / "a", CPU, model), begun(tmp_path / "b", DEVICE, model)
    assert isinstance(host, HostStep)
    assert not isinstance(device, HostStep)
    for i, tokens in enumerate(BATCHES[:3]):
        ours, theirs = host(tokens, 1e-2 * (i + 1)), device(tokens, 1e-2 * (i + 1))
        assert np.allclose(np.hstack(ours), np.hstack(theirs), rtol=1e-5, equal_nan=True)
        assert len(ours.parts) == (2 if model.truncate_ticks else 1)
    close(a.model.state_dict(), b.model.state_dict())


def test_a_step_has_one_look(tmp_path):
    _, step = begun(tmp_path)
    for tokens in BATCHES:
        with looks() as seen:
            step(tokens, 1e-2)
            assert seen == {"to the host": 1}


def test_another_look_would_be_counted(tmp_path):
    run, step = begun(tmp_path)
    with (
        looks() as seen,
        run.model.hooks(fwd_hooks=[("hook_surprise", lambda s, hook: bool(s.any()) and None)]),
    ):
        step(BATCHES[0], 1e-2)
        assert sum(seen.values()) == 1 + 2  # ticks


def kept(run):
    held = [{k: here(v).clone() for k, v in state.items()} for state in run.optimizer.state.values()]
    return {k: here(v).clone() for k, v in run.model.state_dict().items()}, held


@pytest.mark.parametrize("device", [CPU, DEVICE])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing_and_says_where(tmp_path, device, value, where):
    run, step = begun(tmp_path, device)
    run.checkpoint()
    step(BATCHES[0], 1e-2)
    before = kept(run)
    if where == "loss":
        handle = run.model.add_hook("blocks.0.cms.slow.hook_delta", lambda delta, hook: delta * value)
        words = "layer 0, cms level slow (blocks.0.cms.slow.hook_delta)"
    else:
        handle = run.model.norm.bias.register_hook(lambda g: g * value)
        words = "the gradient is not finite, in norm.bias"
    with pytest.raises(DivergedError) as caught:
        step(BATCHES[1], 1e-2)
    assert words in str(caught.value)
    assert f"the last good checkpoint is {step_path(tmp_path, 0)}" in str(caught.value)
    after = kept(run)
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert all(
        torch.equal(v, new[k]) for old, new in zip(before[1], after[1], strict=True) for k, v in old.items()
    )
    handle.remove()
    step(BATCHES[2], 1e-2)  # goes on as if the step had not been
    other, again = begun(tmp_path / "other", device)
    again(BATCHES[0], 1e-2)
    again(BATCHES[2], 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(kept(run)[0].values(), kept(other)[0].values(), strict=True))


def test_an_update_that_is_not_held_would_be_seen(tmp_path, monkeypatch):
    """What the test above rests on: without the flag the weights do change."""
    run, step = begun(tmp_path)
    step(BATCHES[0], 1e-2)
    before = kept(run)[0]
    monkeypatch.setattr(torch, "where", lambda condition, one, other: one if other == 1.0 else one * 1.0)
    run.model.norm.bias.register_hook(lambda g: g * float("nan"))
    with pytest.raises(DivergedError):
        step(BATCHES[1], 1e-2)
    assert not all(torch.equal(v, kept(run)[0][k]) for k, v in before.items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run on both."""
    folders = {}
    for name, device in (("cpu", "cpu"), ("device", DEVICE)):
        folders[name] = tmp_path_factory.mktemp(name)
        train(MODEL, CONFIG, DATA, folders[name], device=device)
    return folders


def test_a_run_on_a_device_is_that_of_a_cpu(runs):
    for ours, theirs in zip(lines(runs["cpu"]), lines(runs["device"]), strict=True):
        assert set(ours) == set(theirs)
        for key in ours:
            assert math.isclose(ours[key], theirs[key], rel_tol=1e-4), key
    records = [json.loads((runs[name] / "run.json").read_text()) for name in ("cpu", "device")]
    assert [record.pop("device") for record in records] == ["cpu", "pretend"]
    assert records[0] == records[1]  # the digest of the initial weights too


def test_its_checkpoints_are_those_of_a_cpu(runs):
    for step in (0, 3, 5):
        ours, theirs = (read(step_path(runs[name], step)) for name in ("cpu", "device"))
        close(ours.weights, theirs.weights, within=1e-4)
        assert ours.train == theirs.train
        assert (ours.optimizer is None) == (theirs.optimizer is None) == (step == 0)
        if ours.optimizer:
            a, b = ours.optimizer, theirs.optimizer
            assert a["param_groups"] == b["param_groups"]
            for at, held in a["state"].items():
                close(held, b["state"][at], within=1e-4)


@pytest.mark.parametrize(("began", "goes_on"), [("cpu", DEVICE), ("device", "cpu"), ("device", DEVICE)])
def test_a_run_moves(runs, tmp_path, began, goes_on):
    """From where it was to another place, by its last resumable checkpoint."""
    for name in ("step-000000.pt", "step-000003.pt", "metrics.jsonl"):
        (tmp_path / name).write_bytes((runs[began] / name).read_bytes())
    train(MODEL, CONFIG, DATA, tmp_path, resume=True, device=goes_on)
    close(read(step_path(runs["cpu"], 5)).weights, read(step_path(tmp_path, 5)).weights, within=1e-4)
    counts = [held["step"] for held in read(step_path(tmp_path, 5)).optimizer["state"].values()]
    assert all(count == 5 for count in counts)


def test_tokens_that_the_model_does_not_have_are_refused_before_they_are_moved(tmp_path):
    _, step = begun(tmp_path)
    with pytest.raises(Exception, match=r"token ids range over 0\.\.99, the vocabulary over 0\.\.52"):
        step(torch.tensor([[0, 99]]), 1e-2)
