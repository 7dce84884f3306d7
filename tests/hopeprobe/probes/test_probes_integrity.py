"""Integrity: trained weights are told from untrained ones, from another run's, and from none at all."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from hopeprobe.analysis import analyze, missing_from
from hopeprobe.errors import MeasurementError
from hopeprobe.model.config import published
from hopeprobe.model.subject import HopeSubject
from hopeprobe.probes import Finding, Measurement, Place, get_probe
from hopeprobe.probes.integrity import adamw_reach, relative_distance
from hopeprobe.stats import FreshInit, GroupedMean, Verdict, jackknife, mean_of
from hopeprobe.subject import MissingCapability, load
from hopeprobe.tokens import EvalWindows, TokenData, Unigram

PROBE = get_probe("integrity")


class Impostor(HopeSubject):
    """Weights that are not what the file says: another start, step or record of training."""

    start = told = None

    def own_init(self):
        if self.start is None:
            raise MissingCapability("nobody kept the initial weights")
        return self.start

    def training(self):
        return self.told


def impostor(model, start, step=200, **told):
    subject = Impostor(model)
    subject.trained_steps, subject.start, subject.name = step, start, "impostor"
    subject.told = {"learning_rate": 3e-4, "warmup": 0, "weight_decay": 0.1, "keys": 69, **told}
    return subject


def frame_of(subject, settings, **options):
    results = analyze(subject, PROBE.name, **settings | options)
    return results.table.set_index(["statistic", "component"]), results


def test_a_trained_checkpoint_is_learned(toy_run, settings):
    frame, results = frame_of(toy_run / "step-000040.pt", settings)
    loss = frame.loc[("frozen_loss", "")]
    assert loss.verdict == "learned"
    assert "nats against the unigram model" in loss.note
    distances = frame.loc["distance_from_init"]
    assert set(distances.index) == {"embed", "selfmod", "cms", "norm", "all"}
    assert set(distances.verdict) == {"inconclusive"}, "a distance alone decides nothing"
    assert distances.note.str.contains("decides nothing").all()
    nulls = results.nulls.set_index(["statistic", "component", "null_kind"]).value
    for group, row in distances.iterrows():
        assert 0 < row.value <= nulls["distance_from_init", group, "optimiser"]
    assert frame.loc[("keys_loaded", "")].value == nulls["keys_loaded", "", "analytic"] == 69


def test_loss_and_its_nulls_agree_with_a_reference(toy_run, toy_data, settings):
    frame, results = frame_of(toy_run / "step-000040.pt", settings)
    (batch,) = EvalWindows(toy_data, "all", context=32, tokens=1600, batch=1000)
    tokens, lengths = torch.from_numpy(batch.tokens), torch.from_numpy(batch.lengths)

    def frozen(subject):
        with subject.module.hooks(fwd_hooks=list(subject.freeze_hooks())):
            losses, scored, _ = subject.run(tokens, lengths)
        return float(losses.double()[scored].mean())

    subject = load(toy_run / "step-000040.pt")
    assert frame.loc[("frozen_loss", "")].value == pytest.approx(frozen(subject), abs=1e-6)
    nulls = results.nulls.set_index(["statistic", "null_kind"]).value
    assert nulls["frozen_loss", "own-init"] == pytest.approx(frozen(subject.own_init()), abs=1e-6)
    assert nulls["frozen_loss", "analytic"] == pytest.approx(math.log(97))
    targets = np.concatenate([r[1 : n + 1] for r, n in zip(batch.tokens, batch.lengths, strict=True)])
    unigram = Unigram.fit(toy_data.split_tokens("train"), 97)
    assert nulls["frozen_loss", "unigram"] == pytest.approx(unigram.surprisal[targets].mean())


def test_a_unigram_model_scored_on_its_own_text_says_so(toy_run, settings):
    told = "fit on tokens that it is scored on"
    for split, tokens, expected in (("all", 1600, True), ("train", 1600, True), ("heldout", None, False)):
        frame, _ = frame_of(toy_run / "step-000040.pt", settings, split=split, tokens=tokens, fresh=0)
        assert (told in frame.loc[("frozen_loss", "")].note) == expected
        assert frame.note.str.contains(told).sum() == expected


def test_step_zero_is_untrained_in_every_row(toy_run, settings):
    frame, _ = frame_of(toy_run / "step-000000.pt", settings)
    assert set(frame.verdict) == {"untrained"}
    assert frame.note.str.contains("the checkpoint is of step 0; every weight is that of the init").all()


@pytest.mark.parametrize("seed", range(1, 7))
def test_another_seed_passed_off_as_trained_is_untrained(subject_of, settings, seed):
    frame, _ = frame_of(impostor(subject_of(seed=seed).module, subject_of(seed=0)), settings)
    assert set(frame.verdict) == {"untrained"}
    note = frame.loc[("frozen_loss", "")].note
    assert "from its value at initialisation" in note
    assert "the optimiser reaches" in note


def test_another_seed_with_a_lower_loss_is_untrained_all_the_same(configs, subject_of, settings):
    """With N(0, 1) embeddings initialisations differ by more than the smallest effect: none of that is training."""
    config = published(configs["toy"])
    fake = impostor(subject_of(config, 0).module, subject_of(config, 4))
    frame, results = frame_of(fake, settings)
    nulls = results.nulls.set_index(["statistic", "null_kind"])
    own = nulls.loc[("frozen_loss", "own-init")]
    assert frame.loc[("frozen_loss", "")].ci_high < own.low - 0.05, "lower than its alleged start, surely"
    assert set(frame.verdict) == {"untrained"}


def test_another_seed_is_seen_by_its_distance_where_the_optimiser_could_go_anywhere(subject_of, settings):
    fake = impostor(subject_of(seed=3).module, subject_of(seed=0), learning_rate=1.0)
    frame, _ = frame_of(fake, settings)
    assert "as far from the initialisation as another initialisation is" in frame.note.iloc[0]
    assert set(frame.verdict) == {"untrained"}


def test_another_seed_is_untrained_without_initial_weights_too(subject_of, settings):
    frame, results = frame_of(impostor(subject_of(seed=3).module, None), settings)
    loss = frame.loc[("frozen_loss", "")]
    assert loss.verdict == "untrained"
    assert "from that of fresh initialisations" in loss.note
    assert "nobody kept" in loss.note
    distance = frame.loc[("distance_from_init", "all")]
    assert (distance.verdict, distance.n_tokens) == ("n/a", 0)
    assert results.checkpoint["own_init"].startswith("absent: nobody kept")


def test_a_first_step_is_trained_a_little_and_not_called_untrained(toy_run, settings):
    frame, _ = frame_of(toy_run / "step-000001.pt", settings)
    assert set(frame.verdict) == {"inconclusive"}
    assert "nats from its value at initialisation" in frame.loc[("frozen_loss", "")].note
    assert frame.note.str.contains("the weights moved by .* of their norm, but on this text").all()


def test_a_text_of_another_kind_does_not_make_weights_untrained(toy_run, settings):
    rng = np.random.default_rng(1)
    noise = [rng.integers(0, 97, 40) for _ in range(100)]
    text = TokenData.from_documents(noise, name="noise", vocab_size=97, end_of_text=0)
    frame, _ = frame_of(toy_run / "step-000040.pt", settings, data=text)
    assert set(frame.verdict) == {"inconclusive"}
    assert "but on this text the frozen loss is +" in frame.loc[("frozen_loss", "")].note


@pytest.mark.parametrize(("tokens", "verdict"), [(300, "inconclusive"), (1600, "untrained")])
def test_without_initial_weights_too_few_documents_call_nothing_untrained(
    subject_of, settings, tokens, verdict
):
    frame, _ = frame_of(impostor(subject_of(seed=3).module, None), settings, tokens=tokens)
    assert frame.loc[("frozen_loss", "")].verdict == verdict


def test_without_initial_weights_the_whole_interval_must_lie_above(subject_of):
    def loss(spread):
        values = np.random.default_rng(0).standard_normal((64, 1)) * spread
        accumulator = GroupedMean()
        accumulator.update(4.5 + values - values.mean(), np.ones((64, 1), bool), np.arange(64))
        row = Measurement(Place("frozen_loss"), "frozen", "nats", jackknife(mean_of, accumulator))
        return Finding(row, fresh=FreshInit((4.5, 4.51), 4.5))

    subject = impostor(subject_of().module, None)
    (sure,) = PROBE.review(subject, [loss(0.01)])
    assert sure.override is Verdict.UNTRAINED
    (unsure,) = PROBE.review(subject, [loss(5.0)])
    assert unsure.override is None


def test_trained_weights_beside_another_start_are_not_called_untrained(toy_run, subject_of, settings):
    trained = load(toy_run / "step-000040.pt")
    frame, _ = frame_of(impostor(trained.module, subject_of(seed=5), step=40), settings)
    assert set(frame.verdict) == {"inconclusive"}
    assert frame.note.str.contains("the initial weights are not this run's").all()


def test_few_documents_claim_nothing(toy_run, toy_data, settings):
    frame, _ = frame_of(toy_run / "step-000040.pt", settings, tokens=300)
    assert frame.loc[("frozen_loss", "")].verdict == "inconclusive"
    assert "groups of documents" in frame.loc[("frozen_loss", "")].note


def test_missing_keys_are_told(subject_of, settings):
    for keys, verdict, word in (
        (0, "untrained", "no weight was loaded"),
        (60, "inconclusive", "model has 69"),
    ):
        trained = subject_of()
        with torch.no_grad():
            trained.module.norm.weight.add_(0.01)
        frame, _ = frame_of(impostor(trained.module, None, keys=keys), settings | {"fresh": 0})
        row = frame.loc[("keys_loaded", "")]
        assert row.verdict == verdict
        assert word in row.note


def test_a_loss_that_is_not_finite_is_missing_and_never_a_verdict(subject, settings):
    with torch.no_grad():
        subject.module.blocks[1].cms.levels["slow"].b_out[0] = torch.nan
    with pytest.raises(
        MeasurementError, match=r"integrity \(frozen\): the loss is not finite at .* the model diverged"
    ):
        analyze(subject, PROBE.name, **settings)


def test_a_spoiled_loss_leaves_the_rows_of_weights(toy_run, settings, monkeypatch):
    subject = load(toy_run / "step-000040.pt")
    run = subject.run
    monkeypatch.setattr(
        subject, "run", lambda *args: (out := run(*args))._replace(losses=out.losses * torch.nan)
    )
    frame, results = frame_of(subject, settings)
    assert any("(frozen): the loss is not finite" in message for message in missing_from(results))
    assert "frozen_loss" not in frame.index.get_level_values("statistic")
    assert "learned" not in set(frame.verdict)


def test_relative_distance():
    start = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    assert relative_distance(start, start) == 0
    moved = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[4.0]])}
    assert relative_distance(moved, start) == pytest.approx(0.2)
    assert math.isnan(relative_distance({"a": torch.ones(2)}, {"a": torch.zeros(2)}))
    with pytest.raises(MeasurementError, match="other names or shapes"):
        relative_distance(start, {"a": start["a"]})
    with pytest.raises(MeasurementError, match="not finite"):
        relative_distance({"a": torch.tensor([math.inf])}, {"a": torch.ones(1)})


@pytest.mark.parametrize("kind", ["constant", "noise", "growing", "late"])
def test_adamw_never_goes_further_than_its_reach(kind):
    told = {"learning_rate": 1e-2, "warmup": 5, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
    generator = torch.Generator().manual_seed(0)
    theta = torch.nn.Parameter(torch.randn(500, generator=generator))
    start = theta.detach().clone()
    optimiser = torch.optim.AdamW([theta], betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 61):
        optimiser.param_groups[0]["lr"] = 1e-2 * min(1, step / 5)
        theta.grad = {
            "constant": torch.ones(500),
            "noise": torch.randn(500, generator=generator),
            "growing": torch.full((500,), 1.05**step),
            "late": torch.full((500,), float(step == 60) + 1e-6),
        }[kind]
        optimiser.step()
        a, b = adamw_reach(told, step)
        bound = a * math.sqrt(500) + b * float(start.norm())
        assert float((theta.detach() - start).norm()) <= bound * (1 + 1e-5)
    if kind in ("constant", "growing"):
        assert float((theta.detach() - start).norm()) > 0.6 * bound, "the bound is not idle"


def test_reach_holds_for_weights_that_are_not_decayed():
    told = {"learning_rate": 1e-2, "weight_decay": 10.0}
    free, decayed = torch.nn.Parameter(torch.zeros(100)), torch.nn.Parameter(torch.ones(100, 2))
    starts = [free.detach().clone(), decayed.detach().clone()]
    groups = [{"params": [free], "weight_decay": 0.0}, {"params": [decayed], "weight_decay": 10.0}]
    optimiser = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(1, 61):
        free.grad, decayed.grad = torch.ones(100), torch.ones(100, 2)
        optimiser.step()
        a, b = adamw_reach(told, step)
        moved = [float((p.detach() - s).norm()) for p, s in zip((free, decayed), starts, strict=True)]
        norms = [float(s.norm()) for s in starts]
        for n, start, distance in ((100, norms[0], moved[0]), (200, norms[1], moved[1])):
            assert distance <= (a * math.sqrt(n) + b * start) * (1 + 1e-5)
        assert math.hypot(*moved) <= a * math.sqrt(300) + b * math.hypot(*norms)


def test_reach_needs_a_learning_rate():
    assert adamw_reach({}, 10) is None
    assert adamw_reach({"learning_rate": 1e-3}, 0) == (0, 0)


def test_a_model_that_never_writes_has_a_frozen_loss_too(configs, subject_of, settings):
    frame, _ = frame_of(subject_of(dataclasses.replace(configs["toy"], variant="transformer")), settings)
    assert frame.loc[("frozen_loss", "")].value == pytest.approx(math.log(97), rel=0.05)
    assert frame.loc[("frozen_loss", "")].verdict == "untrained"
