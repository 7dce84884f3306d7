"""Gradients of the loss: known answers, numerical differentiation, and parameters that the loss does not reach."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from hopeprobe.analysis import analyze, missing_from
from hopeprobe.errors import MeasurementError
from hopeprobe.model.config import published
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.subject import HopeSubject
from hopeprobe.probes.base import Place
from hopeprobe.probes.learning_signal import (
    LearningSignal,
    gradients,
    log_mean_of,
    read_gradients,
)
from hopeprobe.probes.sample import sampled
from hopeprobe.stats import GroupedMean, Verdict, jackknife
from hopeprobe.subject import Subject, load
from hopeprobe.tokens import EvalWindows, TokenData

PROBE = LearningSignal()
GENERATORS = ("k", "v", "eta", "alpha")


@pytest.fixture(autouse=True)
def one_fresh_window(monkeypatch):
    """Enough for all that is tested here, and an eighth of the time."""
    monkeypatch.setattr("hopeprobe.probes.sample.FRESH_WINDOWS", 1)


class Linear(Subject):
    """loss = Σ w · x over the mean of the tokens, and a parameter that no loss sees."""

    name, vocab_size, context, tick = "linear", 97, 32, 8

    def __init__(self):
        self.module = torch.nn.Module()
        self.module.w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.module.idle = torch.nn.Parameter(torch.ones(3))

    def loss(self, tokens, lengths=None):
        return self.module.w @ torch.tensor([3.0, 4.0]) * tokens[:, : int(lengths[0])].double().mean()

    def parameter_groups(self):
        return {"linear": dict(self.module.named_parameters())}


def windows_of(data, tokens=1600):
    return EvalWindows(data, "all", context=32, tokens=tokens, batch=50)


def frame_of(subject, settings, **options):
    """Rows on three windows, enough for what needs no interval."""
    results = analyze(subject, [PROBE], **settings | {"tokens": 90} | options)
    assert not missing_from(results)
    return results.table


def of(frame, layer, component):
    rows = frame[
        (frame.component == component) & (frame.layer.isna() if layer is None else frame.layer == layer)
    ]
    assert len(rows) == 1, (layer, component)
    return rows.iloc[0]


def test_a_linear_loss_has_its_slope_for_a_gradient(toy_data):
    tokens = torch.tensor([[4, 6, 9]])
    assert gradients(Linear(), tokens, torch.tensor([2])) == {"w": pytest.approx(25 * 25), "idle": 0.0}
    batches = sampled(windows_of(toy_data), 0)
    found = read_gradients(Linear(), batches)
    expected = [5 * b.tokens[0, : b.lengths[0]].mean() for b in batches]
    place = Place("gradient_norm", component="w")
    assert [r.value for r in found[place]] == pytest.approx(expected, rel=1e-6)
    assert [r.tokens for r in found[place]] == [b.lengths[0] for b in batches]
    assert found[place] == found[Place("gradient_norm", component="linear")]
    assert {r.value for r in found[Place("gradient_norm", component="idle")]} == {0.0}


def test_norms_of_a_group_are_those_of_one_vector(toy_data):
    class Both(Linear):
        def loss(self, tokens, lengths=None):
            return super().loss(tokens, lengths) + 12.0 * self.module.idle[0]

    tokens, lengths = torch.tensor([[1, 1, 1]]), torch.tensor([2])
    assert gradients(Both(), tokens, lengths) == {"w": pytest.approx(25), "idle": pytest.approx(144)}
    (batch,) = sampled(windows_of(toy_data), 0)[:1]
    batch = dataclasses.replace(batch, tokens=np.ones_like(batch.tokens))
    found = {
        place.component: readings[0].value for place, readings in read_gradients(Both(), [batch]).items()
    }
    assert found == pytest.approx({"w": 5, "idle": 12, "linear": 13, "all": 13})


class Seldom(Linear):
    """The loss reaches `idle` in windows that hold an even first token only; something is written every `period`."""

    context, trained_steps, seed, period, even = 128, 10, 0, 8, True

    def loss(self, tokens, lengths=None):
        seen = self.even and int(tokens[0, 0]) % 2 == 0
        return super().loss(tokens, lengths) + (self.module.idle.sum() if seen else 0.0)

    def write_periods(self):
        return {"memory": self.period}

    def identity(self):
        return {"period": self.period, "even": self.even}

    def own_init(self):
        return self

    def reinitialised(self, seed):
        return self


def idle_of(length, **attributes):
    """The finding about `idle` on 40 documents of so many tokens."""
    subject = Seldom()
    for name, value in attributes.items():
        setattr(subject, name, value)
    documents = [np.arange(i, i + length + 1) % 97 for i in range(40)]
    text = TokenData.from_documents(documents, name="steps", vocab_size=97, end_of_text=0)
    found = PROBE.of_model(subject, subject, EvalWindows(text, "all", context=128, tokens=None, batch=4))
    return next(f for f in found if f.measurement.place.component == "idle")


def test_a_gradient_that_is_zero_in_some_windows_is_a_signal():
    finding = idle_of(20)
    assert finding.override is None
    assert 0 < 10**finding.measurement.estimate.plug_in < math.sqrt(3)


@pytest.mark.parametrize(
    ("length", "period", "verdict"),
    [
        (20, 8, Verdict.NO_SIGNAL),
        (32, 32, Verdict.INCONCLUSIVE),  # written at its end, and read nowhere
        (33, 32, Verdict.NO_SIGNAL),
        (100, 72, Verdict.NO_SIGNAL),  # windows are longer than usual, so that the write is read
    ],
)
def test_no_signal_takes_windows_in_which_a_write_is_read(length, period, verdict):
    assert idle_of(length, even=False, period=period).override is verdict


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.selfmod.eta_bias",
        "blocks.1.selfmod.alpha_bias",
        "blocks.0.selfmod.memories.alpha.skip",
        "blocks.1.cms.mix_bias",
    ],
)
def test_agrees_with_numerical_differentiation(configs, name):
    # CMS writes are first order: the gradient takes them for constants, differences do not. Without them both agree.
    subject = HopeSubject(HopeModel(configs["still"], 0, torch.float64))
    tokens = torch.randint(0, 97, (1, 33), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([27])
    parameter = dict(subject.module.named_parameters())[name]
    slopes, step = [], 1e-5
    for i in range(parameter.numel()):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[i] += sign * step
                losses.append(float(subject.loss(tokens, lengths)))
                parameter.view(-1)[i] -= sign * step
        slopes.append((losses[0] - losses[1]) / (2 * step))
    found = gradients(subject, tokens, lengths)[name]
    assert found > 0
    assert math.sqrt(found) == pytest.approx(np.linalg.norm(slopes), rel=1e-4)


def test_log_mean_against_numpy():
    values, group = np.random.default_rng(0).lognormal(-3, 1, 40), np.arange(40)
    mean = GroupedMean()
    mean.update(values[:, None], np.ones((40, 1), bool), group)
    estimate = jackknife(log_mean_of, mean)
    assert estimate.plug_in == pytest.approx(np.log10(values.mean()), rel=1e-12)
    zero = GroupedMean()
    zero.update(np.zeros((40, 1)), np.ones((40, 1), bool), group)
    assert math.isnan(jackknife(log_mean_of, zero).value)


def test_rows_of_a_run_that_learns(toy_run, toy_data, settings):
    frame = frame_of(toy_run / "step-000040.pt", settings, tokens=1000)
    assert len(frame) == 69 + 4, "every parameter, three groups beside embed, which is one, and all"
    assert "no-signal" not in set(frame.verdict)
    assert set(frame.n_groups) == {32}
    assert "learned" in set(frame.verdict)
    subject = load(toy_run / "step-000040.pt")
    norms, tokens = [], []
    for b in sampled(windows_of(toy_data, 1000), 0):
        subject.module.zero_grad()
        out = subject.module(torch.from_numpy(b.tokens), torch.from_numpy(b.lengths))
        (out.losses.sum() / int(b.lengths[0])).backward()
        norms.append(float(subject.module.blocks[0].selfmod.memories["k"].w1.grad.norm()))
        tokens.append(int(b.lengths[0]))
    row = of(frame, 0, "selfmod.k.w1")
    assert row.value == pytest.approx(np.log10(np.average(norms, weights=tokens)), abs=0.02)
    assert row.ci_low < row.value < row.ci_high
    assert row.n_tokens == sum(tokens)


@pytest.mark.parametrize("kind", ["published", "stop"])
def test_generators_behind_writes_outside_the_graph_are_no_signal(subject_of, configs, settings, kind):
    toy = configs["toy"]
    config = published(toy) if kind == "published" else dataclasses.replace(toy, write_grad="stop")
    frame = frame_of(subject_of(config), settings)
    for memory in GENERATORS:
        found = frame[frame.component.str.startswith(f"selfmod.{memory}.")]
        assert len(found) == 2 * (3 if memory in ("eta", "alpha") else 2)
        assert set(found.verdict) == {"no-signal"}
        assert found.value.isna().all()
        assert found.note.str.contains("exactly zero in all 3 windows").all()
    reached = frame[~frame.component.str.contains("|".join(f"selfmod.{m}" for m in GENERATORS))]
    assert "no-signal" not in set(reached.verdict)
    assert of(frame, None, "selfmod").verdict != "no-signal"


def test_a_parameter_frozen_by_hand_is_no_signal_and_says_why(subject_of, settings):
    subject = subject_of()
    subject.module.blocks[0].selfmod.conv.requires_grad_(False)
    row = of(frame_of(subject, settings), 0, "selfmod.conv")
    assert (row.verdict, row.note) == ("no-signal", "requires_grad is off: training does not move it")
    assert not subject.module.blocks[0].selfmod.conv.requires_grad


def test_windows_too_short_to_read_a_write_decide_nothing(subject_of, configs, settings):
    documents = [np.arange(i, i + 9) % 97 for i in range(70)]
    text = TokenData.from_documents(documents, name="short", vocab_size=97, end_of_text=0)
    frame = frame_of(subject_of(configs["toy"]), settings, data=text, tokens=None)
    row = of(frame, 0, "selfmod.k.w1")
    assert row.verdict == "inconclusive"
    assert "of at most 8 tokens, but what is written every 32 tokens is not read there" in row.note
    assert of(frame, 0, "selfmod.memory.w1").verdict != "no-signal"


def test_a_signal_that_only_the_trained_model_has_is_inconclusive(toy_run, subject_of, configs, settings):
    """The run's start does not reach k: no ratio to it, and fresh models alone must not decide."""
    subject = load(toy_run / "step-000040.pt")
    closed = subject_of(dataclasses.replace(configs["toy"], write_grad="stop"))
    subject.own_init = lambda: closed
    row = of(frame_of(subject, settings), 0, "selfmod.k.w1")
    assert row.verdict == "inconclusive"
    assert "own-init: it is not defined there" in row.note


def test_nothing_of_the_model_is_changed(subject_of, settings):
    subject = subject_of()
    module = subject.module
    marks = {name: torch.full_like(p, 7.0) for name, p in module.named_parameters()}
    for name, p in module.named_parameters():
        p.grad = marks[name]
    module.norm.eval()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    frame_of(subject, settings)
    for name, p in module.named_parameters():
        assert p.grad is marks[name]
        assert bool((p.grad == 7.0).all())
        assert bool((p == before[name]).all())
    assert module.training
    assert not module.norm.training
    assert not any(point.active for point in module.hook_dict.values())


def test_windows_side_by_side_give_the_same(subject_of, toy_data):
    subject, batches = subject_of(), sampled(windows_of(toy_data), 0)[:5]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = read_gradients(subject, batches)
        torch.set_num_threads(3)
        assert read_gradients(subject, batches) == alone
    finally:
        torch.set_num_threads(before)


def test_it_works_where_gradients_are_switched_off(subject_of, toy_data):
    batches = sampled(windows_of(toy_data), 0)[:1]
    with torch.no_grad():
        found = read_gradients(subject_of(), batches)
    assert all(readings[0].value > 0 for readings in found.values())


def test_what_is_not_finite_is_named(subject_of, settings):
    subject = subject_of()
    with torch.no_grad():
        subject.module.norm.weight[0] = torch.nan
    with pytest.raises(MeasurementError, match="the loss is nan"):
        analyze(subject, [PROBE], **settings)

    class Steep(Linear):
        def loss(self, tokens, lengths=None):
            return self.module.w.sum() + torch.sqrt(self.module.idle * 0).sum()

    with pytest.raises(MeasurementError, match="the gradient is not finite in idle"):
        gradients(Steep(), torch.zeros(1, 3, dtype=torch.int64), torch.tensor([2]))


def test_the_window_of_a_gradient_that_is_not_finite_is_named(subject_of, toy_data, monkeypatch):
    subject, batches = subject_of(), sampled(windows_of(toy_data), 0)[-3:]
    last, loss = batches[-1], HopeSubject.loss

    def steep(self, tokens, lengths=None):
        found = loss(self, tokens, lengths)
        mine = tokens.shape == last.tokens.shape and bool((tokens.numpy() == last.tokens).all())
        return found + torch.sqrt(self.module.norm.weight[0] * 0) if mine else found

    monkeypatch.setattr(HopeSubject, "loss", steep)
    where = (
        f"document {last.document[0]}, window from token {last.start[0]}: the gradient is not finite in norm"
    )
    with pytest.raises(MeasurementError, match=where):
        read_gradients(subject, batches)


def test_a_model_without_a_loss_is_not_applicable(subject_of, settings, monkeypatch):
    subject = subject_of()
    monkeypatch.setattr(type(subject), "loss", Subject.loss)
    frame = frame_of(subject, settings)
    assert list(frame.verdict) == ["n/a"]
    assert "differentiable loss" in frame.note[0]


def test_a_transformer_has_a_signal_everywhere(subject_of, configs, settings):
    frame = frame_of(subject_of(dataclasses.replace(configs["toy"], variant="transformer")), settings)
    assert frame.value.notna().all()
    assert {"embed", "attention", "mlp", "norm", "all"} <= set(frame.component[frame.layer.isna()])
