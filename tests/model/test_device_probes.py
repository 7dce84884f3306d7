"""Probes of a model on a device give the numbers of the CPU: what they read comes to the host by itself."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from model_toys import TOY
from pretend import DEVICE

import hopeprobe
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.monitor import Monitor
from hopeprobe.subject import GateRule
from hopeprobe.tokens import TokenData

MODEL = dataclasses.replace(TOY, vocab_size=53, context=32, embed_std=0.1, layers=1)
CONFIG = TrainConfig(steps=3, batch=2, learning_rate=1e-2, checkpoint_every=3, eval_every=3, eval_tokens=64)
RNG = np.random.default_rng(0)
DATA = TokenData.from_documents(
    [RNG.integers(0, 52, 40) for _ in range(200)], name="random", vocab_size=53, end_of_text=52
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(MODEL, CONFIG, DATA, folder, device="cpu")
    return folder / "step-000003.pt"


def same(ours, theirs):
    assert [row.key for row in ours.rows] == [row.key for row in theirs.rows]
    assert ours.missing == theirs.missing
    measured = 0
    for a, b in zip(ours.rows, theirs.rows, strict=True):
        assert math.isclose(a.value, b.value, rel_tol=1e-3, abs_tol=1e-5) or (
            math.isnan(a.value) and math.isnan(b.value)
        ), (a, b)
        assert (a.dtype, a.n_tokens, a.n_groups) == (b.dtype, b.n_tokens, b.n_groups)
        measured += not math.isnan(a.value)
    assert measured
    assert len(ours.null_rows) == len(theirs.null_rows)


def analyzed(where, checkpoint, tmp_path, **options):
    return hopeprobe.analyze(
        checkpoint,
        data=DATA,
        fresh=2,
        cache_dir=tmp_path,
        device=where,
        **{"tokens": 128, "batch": 4} | options,
    )


def test_a_probe_on_a_device(checkpoint, tmp_path):
    ours, theirs = (analyzed(where, checkpoint, tmp_path, probes="surprise") for where in ("cpu", DEVICE))
    same(ours, theirs)


def test_numbers_of_a_device_are_not_kept_as_those_of_a_cpu(checkpoint, tmp_path):
    analyzed("cpu", checkpoint, tmp_path, probes="surprise")
    kept = set(tmp_path.rglob("*.json"))
    analyzed(DEVICE, checkpoint, tmp_path, probes="surprise")
    added = set(tmp_path.rglob("*.json")) - kept
    assert len(added) == len(kept) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", list(hopeprobe.PROBES))
def test_every_probe_on_a_device(checkpoint, tmp_path, name):
    ours, theirs = (analyzed(where, checkpoint, tmp_path, probes=name) for where in ("cpu", DEVICE))
    same(ours, theirs)


@pytest.mark.slow
def test_another_gate_and_carried_states_on_a_device(checkpoint, tmp_path):
    options = {
        "probes": ["surprise", "gate-selectivity"],
        "gate": GateRule("excess", 0.5),
        "carry": "document",
    }
    same(*(analyzed(where, checkpoint, tmp_path, **options) for where in ("cpu", DEVICE)))


@pytest.mark.slow
def test_probes_inside_training_on_a_device(tmp_path):
    found = []
    for where in ("cpu", DEVICE):
        monitor = Monitor("cms-similarity", DATA, tokens=128, every=3, cache_dir=tmp_path / "cache")
        run = train(MODEL, CONFIG, DATA, tmp_path / str(where)[:3], each_step=monitor, device=where)
        assert run.model.embed.device.type == ("cpu" if where == "cpu" else "pretend")
        found.append(monitor.results)
    same(*found)


def test_a_subject_moves_with_what_is_made_of_it(checkpoint):
    subject = hopeprobe.load(checkpoint, device=DEVICE)
    others = [
        subject, subject.own_init(), subject.reinitialised(7), subject.with_gate(GateRule("quantile", 0.5)),
        subject.sibling(checkpoint), subject.replica(), subject.exact(),
    ]  # fmt: skip
    tokens = torch.randint(0, 53, (2, 17))
    for one in others:
        assert one.device == DEVICE
        assert {p.device for p in one.module.parameters()} == {DEVICE}
        out = one.run(tokens, torch.tensor([16, 9]))
        assert out.losses.device == DEVICE
        state = one.reset_rows(one.average_rows(out.state, torch.eye(2)), [0])
        assert one.logits(one.select_rows(state, [1, 0]), tokens[:, :8]).device == DEVICE
        one.loss(tokens)
