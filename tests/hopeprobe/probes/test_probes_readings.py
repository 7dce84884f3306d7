"""Reducers see every write, or those at the positions asked for, and nobody else notices."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hopeprobe.conditions import FROZEN, LIVE, Condition, as_tensors
from hopeprobe.hooks import HookRegistry, HookSpec
from hopeprobe.probes import Probe
from hopeprobe.probes.base import Accumulator
from hopeprobe.probes.passes import run_pass
from hopeprobe.probes.readings import Reducing
from hopeprobe.subject import WindowLosses
from hopeprobe.tokens import EvalWindows, TokenData

FAST, SLOW = "blocks.0.cms.fast.hook_fast_in", "blocks.1.cms.slow.hook_fast_out"
KEYS = "blocks.1.selfmod.k.hook_fast_w2"
OUT = "blocks.1.cms.slow.hook_out"


def first_and_norm(weights):
    return torch.stack([weights[:, 0, 0], weights.flatten(1).norm(dim=1)], dim=1)


class Kept(Accumulator):
    def __init__(self, condition, names):
        super().__init__(condition)
        self.names, self.batches = names, []

    def update(self, cache, losses, scored, batch):
        tensors = {name: cache[name] for name in self.names if name in cache}
        self.batches.append((tensors, dict(cache.positions), dict(cache.reached), losses, batch))

    def quantities(self):
        return []


class Reading(Probe):
    question = "What do the writes leave?"
    statistics = ()

    def __init__(self, name, reducers=(), hooks=(), positions=None, reduce=first_and_norm):
        self.name, self._reducers, self._hooks = name, list(reducers), list(hooks)
        self._positions, self._reduce = positions, reduce

    def applies(self, subject):
        return None

    def hooks(self, subject):
        return self._hooks

    def reducers(self, subject):
        return dict.fromkeys(self._reducers, self._reduce)

    def positions(self, subject, windows):
        return self._positions

    def accumulator(self, subject, condition, windows):
        return Kept(condition, [*self._reducers, *self._hooks])


@pytest.fixture
def windows():
    """Rows of 2 to 100 targets, so that some end before a position, on it and behind it."""
    rng = np.random.default_rng(3)
    lengths = [33, 65, 64, 32, 97, 70, 3, 101, 40, 66]
    documents = [rng.integers(0, 97, n) for n in lengths]
    data = TokenData.from_documents(documents, name="rows", vocab_size=97, end_of_text=0)
    return EvalWindows(data, "all", context=200, tokens=None, batch=4)


def by_hand(subject, batch, name):
    """All firings of a point, [R, firings, ...], as the cache of hooks has them."""
    with torch.no_grad(), subject.module.caching(name) as cache:
        subject.run(*as_tensors(batch))
    return cache[name]


def test_every_firing_is_reduced_and_knows_its_position(subject, windows):
    probe = Reading("all", [FAST, SLOW, KEYS])
    result = run_pass(subject, windows, [probe], LIVE)
    assert not result.failed
    for tensors, positions, reached, _, batch in result.accumulators["all"].batches:
        longest = int(batch.lengths.max())
        for name, period in ((FAST, 8), (SLOW, 32), (KEYS, 8)):
            assert list(positions[name]) == list(range(period, longest + 1, period))
            whole = by_hand(subject, batch, name)
            for row, length in enumerate(batch.lengths):
                there = positions[name] <= length
                assert (reached[name][row] == there).all()
                for i in np.flatnonzero(there):
                    expected = [float(whole[row, i, 0, 0]), float(whole[row, i].norm())]
                    assert tensors[name][row, i].tolist() == pytest.approx(expected, abs=1e-6)
                assert tensors[name][row, torch.from_numpy(~there)].isnan().all()


def test_positions_pick_firings_and_change_nothing_else(subject, windows):
    chosen = [32, 96]
    few = Reading("few", [FAST, SLOW, KEYS], positions=chosen)
    every = Reading("every", [FAST, SLOW, KEYS])
    watching = Reading("watching", hooks=[OUT, "hook_embed"])
    alone = run_pass(subject, windows, [watching], LIVE).accumulators["watching"].batches
    result = run_pass(subject, windows, [few, watching, every], LIVE)
    assert not result.failed
    gathered = {name: one.batches for name, one in result.accumulators.items()}
    for before, beside in zip(alone, gathered["watching"], strict=True):
        assert torch.equal(before[3], beside[3])
        assert all(torch.equal(before[0][name], beside[0][name]) for name in (OUT, "hook_embed"))
    for a, b in zip(gathered["few"], gathered["every"], strict=True):
        for name in (FAST, SLOW, KEYS):
            want = [p for p in b[1][name] if p in chosen]
            assert list(a[1].get(name, ())) == want
            if want:
                index = np.flatnonzero(np.isin(b[1][name], chosen))
                torch.testing.assert_close(a[0][name], b[0][name][:, index], rtol=0, atol=0, equal_nan=True)


def test_hooks_at_write_points_are_on_for_the_ticks_asked_for_alone(subject, windows):
    point, active = subject.module.hook_dict[FAST], []
    watch = [("blocks.0.hook_resid_post", lambda x, hook: active.append(point.active))]
    with subject.module.hooks(watch):
        (batch, *_) = windows.with_batch(100)
        assert (
            run_pass(subject, windows.with_batch(100), [Reading("x", [FAST], positions=[64])], LIVE).failed
            == {}
        )
    ticks = -(-(batch.tokens.shape[1] - 1) // 8)
    assert active == [tick == 7 for tick in range(ticks)]
    assert not any(p.active for p in subject.module.hook_dict.values())


def test_two_probes_reduce_one_point_each_in_its_own_way(subject, windows):
    other = Reading("other", [FAST], reduce=lambda w: w.flatten(1)[:, :1] * 2)
    result = run_pass(subject, windows, [Reading("one", [FAST]), other], LIVE)
    for a, b in zip(result.accumulators["one"].batches, result.accumulators["other"].batches, strict=True):
        assert b[0][FAST].shape[2] == 1
        torch.testing.assert_close(a[0][FAST][..., :1] * 2, b[0][FAST], equal_nan=True)


def test_what_was_not_reduced_is_no_success(subject, windows):
    probes = [
        Reading("late", [FAST], positions=[320]),
        Reading("between", [FAST], positions=[32, 40]),
        Reading("none", [FAST], positions=[]),
        Reading("both", [FAST], hooks=[FAST]),
        Reading("wide", [FAST], reduce=lambda w: w),
        Reading("short", [FAST], reduce=lambda w: first_and_norm(w)[:1]),
        Reading("typo", ["blocks.0.cms.fast.hook_fst_in"]),
        Reading("well", [FAST]),
    ]
    failed = run_pass(subject, windows, probes, LIVE).failed
    assert "never fired" in failed.pop("late")
    assert "multiples of 32" in failed["between"]
    assert "not 40" in failed.pop("between")
    assert "there is none" in failed.pop("none")
    assert "both whole and reduced" in failed.pop("both")
    assert "one row each" in failed.pop("short")
    assert "did you mean" in failed.pop("typo")
    assert "not floats [R, k]" in failed.pop("wide")
    assert failed == {}


def test_a_model_that_writes_nothing_shows_what_it_began_with(subject, windows):
    meta = subject.meta_weights()[FAST].detach()
    result = run_pass(subject, windows, [Reading("x", [FAST])], FROZEN)
    assert not result.failed
    for tensors, positions, reached, _, batch in result.accumulators["x"].batches:
        assert list(positions[FAST]) == list(range(8, int(batch.lengths.max()) + 1, 8))
        if len(positions[FAST]):
            shown = tensors[FAST][torch.from_numpy(reached[FAST])]
            assert shown[:, 0].tolist() == [float(meta[0, 0])] * len(shown)


def test_a_reducer_that_hands_back_what_it_saw_is_not_overwritten():
    """A foreign model may show the very weights that its next write goes into."""
    registry = HookRegistry()
    tick = registry.add("hook_x", HookSpec(("batch", "pos"), "tick", True, "x"))
    write = registry.add("hook_fast", HookSpec(("batch", "out"), "write", True, "W"))
    model = SimpleNamespace(module=SimpleNamespace(hook_dict=registry))
    reducing, weights = Reducing(model, {"hook_fast": lambda w: w}, None), torch.zeros(2, 3)
    with reducing.watching():
        for _ in range(2):
            tick(torch.zeros(2, 8))
            write(weights.add_(1.0))
    batch = SimpleNamespace(lengths=np.array([16, 16]), tokens=np.zeros((2, 17)))
    readings = reducing.readings(batch, {})
    assert readings["hook_fast"][:, :, 0].tolist() == [[1.0, 2.0], [1.0, 2.0]]
    assert list(readings.positions["hook_fast"]) == [8, 16]
    assert (len(readings), list(readings)) == (1, ["hook_fast"])


def test_a_run_that_reads_tokens_twice_has_no_positions(subject, windows):
    def twice(subject, prepared, batch):
        subject.run(*as_tensors(batch))
        return subject.run(*as_tensors(batch))

    result = run_pass(subject, windows, [Reading("x", [FAST])], Condition("twice", run=twice))
    assert "they cannot be told" in result.failed["x"]


def test_a_run_in_segments_is_the_same_run(subject, windows):
    """What `Subject.run` with a state promises, seen by everybody who watches."""

    def segments(subject, prepared, batch):
        tokens, lengths = as_tensors(batch)
        losses, scored, state = [], [], None
        for start in range(0, tokens.shape[1] - 1, 32):
            part = subject.run(tokens[:, start : start + 33], (lengths - start).clamp(0, 32), state)
            losses.append(part.losses)
            scored.append(part.scored)
            state = part.state
        return WindowLosses(torch.cat(losses, 1), torch.cat(scored, 1), state)

    probe = Reading("x", [FAST, SLOW, KEYS], hooks=[OUT], positions=[32, 64])
    whole = run_pass(subject, windows, [probe], LIVE).accumulators["x"].batches
    parts = run_pass(subject, windows, [probe], Condition("segments", run=segments)).accumulators["x"].batches
    for a, b in zip(whole, parts, strict=True):
        assert a[0].keys() == b[0].keys()
        for name in a[0]:
            torch.testing.assert_close(a[0][name], b[0][name], rtol=0, atol=0, equal_nan=True)
        assert all((a[1][name] == b[1][name]).all() for name in a[1])
        assert torch.equal(a[3], b[3])
