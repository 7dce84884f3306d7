"""What levels buy: losses in closed form, a reference by hand, and levels that only seem to buy something."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch

from hopeprobe.analysis import analyze, missing_from
from hopeprobe.conditions import LIVE
from hopeprobe.errors import MeasurementError
from hopeprobe.hooks import Hooked, HookRegistry, HookSpec
from hopeprobe.model.config import CMSLevel
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.subject import HopeSubject
from hopeprobe.probes import PROBES
from hopeprobe.probes.cms_contribution import CMSContribution, ablated, level_names, mean_deltas
from hopeprobe.probes.measure import VALUES, measure
from hopeprobe.subject import Subject, WindowLosses
from hopeprobe.tokens import EvalWindows, TokenData

PROBE = CMSContribution()
VOCAB = 97


class Points(Hooked):
    def __init__(self, levels):
        registry = HookRegistry()
        for level in levels:
            spec = HookSpec(("batch", "pos", "d_model"), "tick", True, "delta")
            registry.add(f"blocks.0.cms.{level}.hook_delta", spec)
        self._register_hooks(registry)


class Levels(Subject):
    """Loss in closed form of what levels add, one number a token; x is -1 or 1 by the token to predict."""

    vocab_size, context, tick, trained_steps, seed = VOCAB, 16, 16, 100, 0
    name, dtype = "levels", "float64"

    def __init__(self, rule, deltas, start=None):
        """deltas: level -> function of (x, tokens); rule: from x and the deltas to nats."""
        self.rule, self.deltas, self.module = rule, deltas, Points(deltas)
        self.start = start

    def run(self, tokens, lengths=None, state=None):
        targets = tokens[:, 1:]
        x = (targets % 2 * 2 - 1).double()
        points = self.module.hook_dict
        made = [
            points[f"blocks.0.cms.{name}.hook_delta"](fn(x, targets.double())[..., None])[..., 0]
            for name, fn in self.deltas.items()
        ]
        scored = torch.arange(x.shape[1]) < lengths[:, None]
        return WindowLosses((self.rule(x, *made) + 0.01 * (targets % 7)) * scored, scored, None)

    def own_init(self):
        return Levels(self.rule, self.start or self.deltas)

    def reinitialised(self, seed):
        scale = 1 + np.random.default_rng(seed).normal(0, 0.01)
        start = {n: (lambda x, t, fn=fn: scale * fn(x, t)) for n, fn in (self.start or self.deltas).items()}
        return Levels(self.rule, start)


def logistic(x, *deltas):
    return torch.nn.functional.softplus(-x * sum(deltas))


def knows(weight):
    return lambda x, t: weight * x


def says_nothing(x, t):
    return 0 * x


def noise(x, t):
    return torch.sin(t * 12.9898) * 2


UNTRAINED = {"fast": says_nothing, "slow": says_nothing}


@pytest.fixture(scope="module")
def text():
    """70 documents of 9 to 17 tokens; half the tokens to predict are even."""
    rng = np.random.default_rng(0)
    documents = []
    for n in rng.integers(4, 9, 70):
        targets = np.stack([rng.integers(0, 48, n) * 2, rng.integers(0, 48, n) * 2 + 1], axis=1).ravel()
        documents.append(np.r_[5, targets])
    return TokenData.from_documents(documents, name="parity", vocab_size=VOCAB, end_of_text=0)


def rows_of(text, rule, deltas, start=None, **settings):
    options = {"tokens": None, "split": "all", "fresh": 5, "cache_dir": None} | settings
    results = analyze(Levels(rule, deltas, start), [PROBE], data=text, **options)
    assert missing_from(results) == []
    return {(r.statistic, r.component): r for r in results.rows if r.statistic != "loss"}


def softplus(x):
    return math.log1p(math.exp(x))


def test_losses_of_ablated_levels_in_closed_form(text):
    rows = rows_of(text, logistic, {"fast": knows(1.5), "slow": knows(0.5)}, fresh=0)
    # x is -1 as often as 1, so both means are 0.
    live, a, b, ab = (softplus(-w) for w in (2.0, 0.5, 1.5, 0.0))
    expected = {
        ("loss_change", "fast"): live - a,
        ("loss_change", "slow"): live - b,
        ("loss_change", "fast+slow"): live - ab,
        ("redundancy", "fast+slow"): ab - a - b + live,
    }
    assert {key: row.value for key, row in rows.items()} == pytest.approx(expected, abs=1e-12)
    assert (
        rows["redundancy", "fast+slow"].condition == "ablated:fast+slow - ablated:fast - ablated:slow + live"
    )
    assert rows["loss_change", "slow"].condition == "live - ablated:slow"
    assert expected["redundancy", "fast+slow"] > 0


def test_the_mean_of_a_level_stays(text):
    """What does not depend on the token is no contribution: 3 is added live and ablated."""
    rows = rows_of(text, logistic, {"fast": lambda x, t: 3 + x, "slow": says_nothing}, fresh=0)
    live = (softplus(-4) + softplus(2)) / 2
    ablated_loss = (softplus(-3) + softplus(3)) / 2
    assert rows["loss_change", "fast"].value == pytest.approx(live - ablated_loss, abs=1e-12)


def test_what_training_taught_is_learned_and_an_untrained_model_has_not(text):
    trained = {"fast": knows(1.5), "slow": knows(0.5)}
    assert {r.verdict for r in rows_of(text, logistic, trained, UNTRAINED).values()} == {"learned"}
    assert {r.verdict for r in rows_of(text, logistic, trained).values()} == {"at-init"}


def test_tied_levels_are_redundant(text):
    tied = {"fast": knows(0.8), "slow": knows(0.8)}
    assert rows_of(text, logistic, tied, UNTRAINED)["redundancy", "fast+slow"].value > 0.01

    def either(x, fast, slow):
        return 3.0 - 0.5 * ((fast * x > 0.1) | (slow * x > 0.1)).double()

    rows = rows_of(text, either, tied, UNTRAINED)
    assert rows["redundancy", "fast+slow"].value == pytest.approx(0.5)
    assert rows["redundancy", "fast+slow"].verdict == "learned"
    assert rows["loss_change", "fast"].value == rows["loss_change", "slow"].value == 0
    assert rows["loss_change", "fast"].verdict == "no-signal"
    assert rows["loss_change", "fast+slow"].value == pytest.approx(-0.5)


def test_levels_that_need_each_other_are_the_opposite(text):
    def together(x, fast, slow):
        return 3.0 - 0.4 * fast * slow

    rows = rows_of(text, together, {"fast": knows(1.0), "slow": knows(1.0)}, UNTRAINED)
    assert rows["redundancy", "fast+slow"].value == pytest.approx(-0.4)


def test_a_level_of_noise_buys_nothing(text):
    rows = rows_of(text, logistic, {"fast": knows(1.5), "slow": noise}, UNTRAINED)
    assert rows["loss_change", "slow"].value > 0.05
    assert rows["loss_change", "slow"].verdict == "inconclusive"
    assert "does not help" in rows["loss_change", "slow"].note
    assert rows["loss_change", "fast"].verdict == "learned"


def test_a_constant_level_is_no_signal(text):
    constant = {"fast": knows(1.5), "slow": lambda x, t: 0 * x + 0.3}
    rows = rows_of(text, logistic, constant, UNTRAINED)
    assert rows["loss_change", "slow"].value == 0
    assert rows["loss_change", "slow"].verdict == "no-signal"
    assert rows["loss_change", "slow"].note.startswith("without what slow adds, no loss changes")
    assert rows["loss_change", "fast"].verdict == "learned"
    rows = rows_of(text, logistic, dict.fromkeys(("fast", "slow"), constant["slow"]), UNTRAINED)
    assert {row.verdict for row in rows.values()} == {"no-signal"}


def test_a_level_that_died_or_buys_less_has_not_learned(text):
    start = {"fast": knows(1.0), "slow": knows(1.0)}
    rows = rows_of(text, logistic, {"fast": knows(0.02), "slow": knows(1.0)}, start)
    assert rows["loss_change", "fast"].verdict == "collapsed"
    assert rows["loss_change", "fast+slow"].verdict == "inconclusive"
    assert "helps less than at initialisation" in rows["loss_change", "fast+slow"].note
    assert rows["redundancy", "fast+slow"].verdict == "inconclusive"


def test_a_diverged_model_has_no_contributions(text):
    def far(x, *deltas):
        return 6.0 + logistic(x, *deltas)

    subject = Levels(far, {"fast": knows(1.5), "slow": knows(0.5)})
    subject.own_init = lambda: Levels(logistic, UNTRAINED)
    results = analyze(subject, [PROBE], data=text, tokens=None, split="all", fresh=0, cache_dir=None)
    assert {r.verdict for r in results.rows if r.statistic != "loss"} == {"diverged"}


def test_a_level_that_is_not_finite_is_named(text):
    subject = Levels(logistic, {"fast": knows(math.nan), "slow": knows(0.5)})
    with pytest.raises(MeasurementError) as raised:
        analyze(subject, [PROBE], data=text, tokens=None, split="all", fresh=0, cache_dir=None)
    point = re.escape("blocks.0.cms.fast.hook_delta")
    expected = rf"\(ablated:fast\): {point} is not finite at (\d+) of \1 tokens: the model diverged"
    assert re.search(expected, str(raised.value))


def test_one_level_has_no_pair_and_three_have_three(text):
    rows = rows_of(text, logistic, {"only": knows(1.0)}, {"only": says_nothing})
    assert rows["loss_change", "only"].verdict == "learned"
    assert (rows["redundancy", ""].verdict, "one level only (only)" in rows["redundancy", ""].note) == (
        "n/a",
        True,
    )
    rows = rows_of(text, logistic, dict(zip("abc", map(knows, (1.0, 2.0, 3.0)), strict=True)), fresh=0)
    names = [component for statistic, component in rows if statistic == "redundancy"]
    assert names == ["a+b", "a+c", "b+c"]
    assert rows["loss_change", "b+c"].value == pytest.approx(softplus(-6) - softplus(-1))


def test_a_model_without_a_cms_is_not_asked(subject_of, configs, settings):
    still = subject_of(dataclasses.replace(configs["toy"], variant="transformer"))
    rows = [
        r
        for r in analyze(still, ["integrity", PROBE], **settings | {"fresh": 0}).rows
        if r.probe == PROBE.name
    ]
    assert {(row.statistic, row.verdict, row.note) for row in rows} == {
        (statistic, "n/a", "this model has no CMS levels") for statistic in PROBE.statistics
    }


def test_levels_that_may_only_be_watched_cannot_be_ablated(text):
    subject = Levels(logistic, {"fast": knows(1.0), "slow": knows(2.0)})
    point = subject.module.hook_dict["blocks.0.cms.slow.hook_delta"]
    point.spec = dataclasses.replace(point.spec, editable=False)
    results = analyze(
        subject, ["surprise", PROBE], data=text, tokens=None, split="all", fresh=0, cache_dir=None
    )
    rows = [row for row in results.rows if row.probe == PROBE.name]
    assert [row.verdict for row in rows] == ["n/a", "n/a"]
    assert all("blocks.0.cms.slow.hook_delta may be watched, not replaced" in row.note for row in rows)
    assert not missing_from(results)


def test_points_that_do_not_fire_are_no_measurement(subject, settings):
    class Deaf(HopeSubject):
        def run(self, tokens, lengths=None, state=None):
            return HopeSubject(HopeModel(subject.module.config)).run(tokens, lengths)

    results = analyze(Deaf(subject.module), [PROBE], **settings | {"fresh": 0, "tokens": 300})
    assert {(row.statistic, row.condition) for row in results.rows} == {("loss", "live")}
    messages = missing_from(results)
    assert any("(ablated:fast): hooks never fired" in m for m in messages)
    assert any("(contrasts): ablated:fast was not measured" in m for m in messages)


# -- a HOPE model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ragged():
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, VOCAB, n) for n in (45, *rng.integers(6, 30, 7))]
    return TokenData.from_documents(documents, name="ragged", vocab_size=VOCAB, end_of_text=0)


def exact(configs, **changes):
    levels = CMSLevel("fast", 8, 3.0), CMSLevel("slow", 16, 3.0)
    config = dataclasses.replace(configs["toy"], dim=8, cms_levels=levels, **changes)
    return HopeSubject(HopeModel(config, 0, torch.float64))


@pytest.mark.parametrize("mode", ["gated", "chain"])
def test_a_hope_model_agrees_with_a_loop_over_windows(configs, ragged, mode):
    subject = exact(configs, cms_mode=mode)
    model = subject.module
    windows = EvalWindows(ragged, "all", context=32, tokens=None, batch=7)
    rows = measure(subject, windows, [PROBE], VALUES)
    assert not rows.failed[PROBE.name]
    alone = [
        torch.from_numpy(row[None, : n + 1])
        for batch in windows
        for row, n in zip(batch.tokens, batch.lengths, strict=True)
    ]
    seen = {}
    for tokens in alone:
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter="blocks.*.cms.*.hook_delta")
        for name in cache:
            seen.setdefault(name, []).append(cache[name][0])
    means = {name: torch.cat(parts).mean(0) for name, parts in seen.items()}
    loss = {}
    for levels in ((), ("fast",), ("slow",), ("fast", "slow")):
        hooks = [
            (name, lambda delta, hook: means[hook.name].expand_as(delta))
            for name in means
            if name.split(".")[3] in levels
        ]
        with torch.no_grad(), model.hooks(hooks):
            loss[levels] = torch.cat([model(tokens).losses[0] for tokens in alone]).mean().item()
    live, a, b, ab = loss.values()
    found = {
        (p.statistic, p.component): v for (_, p), v in rows.found[PROBE.name].items() if p.statistic != "loss"
    }
    expected = {
        ("loss_change", "fast"): live - a,
        ("loss_change", "slow"): live - b,
        ("loss_change", "fast+slow"): live - ab,
        ("redundancy", "fast+slow"): ab - a - b + live,
    }
    assert found == pytest.approx(expected, abs=1e-10)
    assert min(map(abs, expected.values())) > 1e-6


def test_an_ablated_level_writes_nothing(configs, ragged):
    subject = exact(configs)
    windows = EvalWindows(ragged, "all", context=32, tokens=100, batch=20)
    (batch, *_) = windows
    hooks = ablated(("fast",)).hooks(subject, mean_deltas(subject, windows), batch)
    tokens, lengths = torch.from_numpy(batch.tokens), torch.from_numpy(batch.lengths)
    with subject.module.hooks(hooks):
        states = [layer.cms for layer in subject.run(tokens, lengths).state.layers]
    for fast, slow in states:
        assert not fast.w_in.any()
        assert not fast.w_out.any()
        assert slow.w_out.any()


def test_batch_size_changes_nothing(configs, ragged):
    subject = exact(configs)
    found = []
    for batch in (3, 20):
        windows = EvalWindows(ragged, "all", context=32, tokens=120, batch=batch)
        found.append(measure(subject, windows, [PROBE], VALUES).found[PROBE.name])
    assert found[0] == pytest.approx(found[1], abs=1e-9)


def test_a_constant_level_of_a_hope_model_is_no_signal(subject_of, configs, settings):
    subject = subject_of(dataclasses.replace(configs["still"], dim=8, layers=1))
    level = subject.module.blocks[0].cms.levels["slow"]
    level.w_out.data.zero_()
    level.b_out.data.normal_()
    rows = {
        (r.statistic, r.component): r
        for r in analyze(subject, [PROBE], **settings | {"fresh": 0, "tokens": 800}).rows
    }
    assert rows["loss_change", "slow"].verdict == "no-signal"
    assert rows["loss_change", "fast"].verdict != "no-signal"


def test_untrained_models_have_learned_nothing(toy_run, subject_of, settings):
    class Impostor(HopeSubject):
        def own_init(self):
            return subject_of(seed=0)

    subject = Impostor(subject_of(seed=1).module)
    subject.trained_steps = 200
    for untrained in (subject, toy_run / "step-000000.pt"):
        rows = analyze(untrained, [PROBE], **settings | {"tokens": 1200}).rows
        assert {row.verdict for row in rows if row.statistic != "loss"} <= {"at-init", "inconclusive"}
        assert "at-init" in {row.verdict for row in rows}, "else it could not decide anything"


def test_it_is_registered_and_its_conditions_are_shared(subject):
    assert isinstance(PROBES["cms-contribution"], CMSContribution)
    assert level_names(subject) == ("fast", "slow")
    conditions = PROBE.conditions(subject)
    assert [one.name for one in conditions] == ["live", "ablated:fast", "ablated:slow", "ablated:fast+slow"]
    assert conditions == PROBE.conditions(subject)
    assert conditions[0] is LIVE
    assert {one.prepare for one in conditions[1:]} == {mean_deltas}
