"""One pass feeds all probes; one that cannot be measured falls out alone."""

import copy

import pytest
import torch

from hopeprobe.conditions import FROZEN, LIVE
from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.model import gate as gate_module
from hopeprobe.model.gate import Gate
from hopeprobe.model.subject import HopeSubject
from hopeprobe.probes import PROBES, Probe, gated, get_probe
from hopeprobe.probes.base import Accumulator
from hopeprobe.probes.passes import run_pass
from hopeprobe.subject import MissingCapability, WindowLosses
from hopeprobe.tokens import EvalWindows


class Seen(Accumulator):
    def __init__(self, condition, fail_at=None):
        super().__init__(condition)
        self.batches, self.fail_at = [], fail_at

    def update(self, cache, losses, scored, batch):
        if len(self.batches) == self.fail_at:
            raise MeasurementError("could not go on")
        self.batches.append(({k: tuple(v.shape) for k, v in cache.items()}, int(scored.sum())))

    def quantities(self):
        return []


class Watching(Probe):
    """A probe that only looks."""

    question = "What comes by?"
    statistics = ()

    def __init__(self, name, hooks=(), fail_at=None):
        self.name, self._hooks, self._fail_at = name, list(hooks), fail_at

    def applies(self, subject):
        return None

    def hooks(self, subject):
        return self._hooks

    def accumulator(self, subject, condition, windows):
        return Seen(condition, self._fail_at)


class Deaf(HopeSubject):
    """Runs a copy of its module, as a compiled graph without guards would: no hook of its own ever fires."""

    def run(self, tokens, lengths=None):
        return HopeSubject(copy.deepcopy(self.module)).run(tokens, lengths)


@pytest.fixture
def windows(toy_data):
    return EvalWindows(toy_data, "all", context=32, tokens=300, batch=5)


def test_every_probe_sees_every_batch(subject, windows):
    told = []
    probes = [Watching("none"), Watching("one", ["blocks.0.cms.*.hook_out"]), Watching("two", ["hook_embed"])]
    result = run_pass(subject, windows, probes, LIVE, on_batch=lambda done, total: told.append((done, total)))
    assert not result.failed
    assert told == [(i + 1, len(windows)) for i in range(len(windows))]
    for name in ("none", "one", "two"):
        assert sum(n for _, n in result.accumulators[name].batches) == 300
    shapes = result.accumulators["one"].batches[0][0]
    assert shapes["blocks.0.cms.slow.hook_out"] == (5, 32, 16)


def test_a_probe_that_fails_falls_out_alone(subject, windows):
    probes = [Watching("well"), Watching("ill", fail_at=1), Watching("unknown", ["hook_embedding"])]
    result = run_pass(subject, windows, probes, LIVE)
    assert list(result.accumulators) == ["well"]
    assert len(result.accumulators["well"].batches) == len(windows)
    assert result.failed["ill"] == "could not go on"
    assert "did you mean 'hook_embed'" in result.failed["unknown"]


def test_hooks_that_never_fire_are_no_success(subject, windows):
    deaf = Deaf(subject.module)
    result = run_pass(deaf, windows, [Watching("well"), Watching("deaf", ["hook_embed"])], LIVE)
    assert list(result.accumulators) == ["well"]
    assert "never fired" in result.failed["deaf"]
    assert "hook_embed" in result.failed["deaf"]


def test_a_write_point_may_rest_for_a_batch_but_not_for_all(configs, subject_of, toy_data):
    # A window shorter than a period of 32 tokens never writes the slow level.
    windows = EvalWindows(toy_data, "all", context=24, tokens=300, batch=5)
    probes = [Watching("slow", ["blocks.0.cms.slow.hook_fast_in"]), Watching("fast", ["*.fast.hook_fast_in"])]
    result = run_pass(subject_of(), windows, probes, LIVE)
    assert list(result.accumulators) == ["fast"]
    assert "blocks.0.cms.slow.hook_fast_in" in result.failed["slow"]


def test_write_gates_rest_where_a_batch_is_too_short_to_write_and_nothing_else_does(subject, toy_data):
    gate = "blocks.*.hook_write_gate"
    windows = EvalWindows(toy_data, "all", context=32, tokens=32 + 5, batch=1)
    assert [batch.tokens.shape[1] - 1 for batch in windows] == [32, 5]
    result = run_pass(
        subject, windows, [Watching("gate", [gate]), Watching("both", [gate, "hook_embed"])], LIVE
    )
    assert not result.failed
    widths = [
        shapes.get("blocks.0.selfmod.hook_write_gate") for shapes, _ in result.accumulators["gate"].batches
    ]
    assert widths == [(1, 32), None]
    short = EvalWindows(toy_data, "all", context=5, tokens=10, batch=1)
    assert "never fired" in run_pass(subject, short, [Watching("gate", [gate])], LIVE).failed["gate"]

    class Shallow(HopeSubject):
        def run(self, tokens, lengths=None):
            whole = tokens.shape[1] > 8
            return (super() if whole else HopeSubject(copy.deepcopy(self.module))).run(tokens, lengths)

    failed = run_pass(Shallow(subject.module), windows, [Watching("deaf", [gate, "hook_embed"])], LIVE).failed
    assert "measured there: hook_embed" in failed["deaf"]


def test_frozen_closes_the_gates_and_a_deaf_model_is_not_frozen(subject, windows):
    name = "blocks.0.cms.fast.hook_fast_in"
    meta = subject.meta_weights()[name]
    moved = {"live": [], "frozen": []}
    for name_of, condition in (("live", LIVE), ("frozen", FROZEN)):
        seen = moved[name_of]
        watch = (name, lambda w, hook, seen=seen: seen.append(float((w - meta).norm())))
        with subject.module.hooks([watch], allow_unfired=True):  # a frozen level may have no write to show
            assert not run_pass(subject, windows, [Watching("well")], condition).failed
    assert max(moved["frozen"], default=0) == 0 < min(moved["live"])
    deaf = run_pass(Deaf(subject.module), windows, [Watching("well")], FROZEN)
    assert "the model was not frozen" in deaf.failed["well"]
    assert not deaf.accumulators


def test_a_model_that_cannot_be_run_fails_every_probe(subject, windows):
    class Broken(HopeSubject):
        def run(self, tokens, lengths=None) -> WindowLosses:
            raise MeasurementError("no such device")

        def freeze_hooks(self, mechanism=None):
            raise MissingCapability("this model has no write gates")

    result = run_pass(Broken(subject.module), windows, [Watching("a"), Watching("b")], LIVE)
    assert result.failed == {"a": "no such device", "b": "no such device"}
    with pytest.raises(MissingCapability, match="write gates"):
        run_pass(Broken(subject.module), windows, [Watching("a")], FROZEN)


def test_no_hook_is_left_behind(subject, windows):
    run_pass(subject, windows, [Watching("ill", ["hook_embed"], fail_at=0)], FROZEN)
    assert not any(point.active for point in subject.module.hook_dict.values())
    assert torch.is_grad_enabled()


def test_the_registry_names_every_probe_and_offers_near_names():
    assert list(PROBES)[:2] == ["integrity", "cms-similarity"]
    for name, probe in PROBES.items():
        assert (probe.name, probe.version) == (name, 1)
        assert probe.question.endswith("?")
        for word in ("cost:", "reading. ", "fails. ", "null", "source:"):
            assert word in probe.describe().lower(), (name, word)
    with pytest.raises(BadInputError, match="did you mean 'cms-similarity'"):
        get_probe("cms_similarity")


class Keeping(Watching):
    """Keeps losses and what it reads, by the window's ordinal."""

    def accumulator(self, subject, condition, windows):
        return Kept(condition)


class Kept(Seen):
    def update(self, cache, losses, scored, batch):
        for row, index in enumerate(batch.index):
            read = {name: tensor[row].clone() for name, tensor in cache.items()}
            self.batches.append((int(index), losses[row].clone(), read))


GATES = "blocks.1.selfmod.hook_write_gate"


@pytest.mark.parametrize("doubt", [0.0, 0.02, 100.0])
def test_windows_in_which_a_gate_is_in_doubt_are_run_in_float64_and_no_others(
    subject, windows, doubt, monkeypatch
):
    monkeypatch.setattr(gate_module, "DOUBT", doubt)
    condition = gated.condition(gated.Cell("quantile", "all", 0.25))
    prepared = condition.prepare(subject, windows)
    result = run_pass(subject, windows, [Keeping("kept", [GATES])], condition, prepared)
    assert not result.failed
    assert subject.dtype == "float32"
    assert subject.module.embed.dtype == torch.float32
    rows = {index: (losses, read[GATES]) for index, losses, read in result.accumulators["kept"].batches}
    assert len(rows) == windows.n_windows
    doubted = 0
    for batch in windows:
        with subject.module.caching([GATES, "hook_gate_doubt"]) as cache:
            single = condition.run(subject, prepared, batch)
        precise = subject.exact()
        with precise.module.caching([GATES]) as exact_cache:
            double = condition.run(precise, prepared, batch)
        assert double.losses.dtype == torch.float64
        again = cache["hook_gate_doubt"].any(1)
        doubted += int(again.sum())
        for row, index in enumerate(batch.index):
            losses, gates = rows[int(index)]
            want, seen = (double, exact_cache) if again[row] else (single, cache)
            # Of float32 another order of rows is another rounding; of float64 that is ten millions as small.
            error = (losses.double() - want.losses[row].double()).abs().max()
            assert error < (1e-13 if again[row] else 5e-6)
            assert again[row] or (losses.double() - double.losses[row]).abs().max() > 1e-9
            assert torch.equal(gates.double(), seen[GATES][row].double())
    assert {0.0: doubted == 0, 0.02: 0 < doubted < windows.n_windows, 100.0: doubted == windows.n_windows}[
        doubt
    ]


def test_what_is_run_again_cannot_be_read_reduced(subject, windows):
    condition = gated.condition(gated.Cell("quantile", "all", 0.25))
    probe = get_probe("meta-fast")
    assert probe.reducers(subject)
    result = run_pass(subject, windows, [probe], condition, condition.prepare(subject, windows))
    assert "reads writes, or points reduced" in result.failed["meta-fast"]
    reads = Keeping("writes", ["blocks.0.cms.fast.hook_fast_in"])
    result = run_pass(subject, windows, [reads], condition, condition.prepare(subject, windows))
    assert "reads writes" in result.failed["writes"]


def test_doubts_that_nobody_told_are_no_success(subject, windows, monkeypatch):
    condition = gated.condition(gated.Cell("quantile", "all", 0.25))
    prepared = condition.prepare(subject, windows)
    monkeypatch.setattr(HopeSubject, "replica", lambda self: None)
    monkeypatch.setattr(Gate, "decide", lambda self, *given: decide(self, *given)._replace(doubt=None))
    result = run_pass(subject, windows, [Keeping("kept", [GATES])], condition, prepared)
    assert "hook_gate_doubt" in result.failed["kept"]
    assert "never fired" in result.failed["kept"]


decide = Gate.decide
