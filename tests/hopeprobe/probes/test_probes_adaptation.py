"""Adaptation: losses in closed form, a reference window by window, and mechanisms that only seem to help."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from hopeprobe.analysis import analyze, missing_from
from hopeprobe.conditions import LIVE, as_tensors
from hopeprobe.hooks import Hooked, HookRegistry, HookSpec
from hopeprobe.model.config import CMSLevel
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.subject import HopeSubject
from hopeprobe.probes import PROBES
from hopeprobe.probes.adaptation import SHARED, Adaptation, cells_of, mechanisms_of, position_bins
from hopeprobe.probes.measure import VALUES, measure
from hopeprobe.probes.middle import HALVES, middle_of, repeated
from hopeprobe.subject import MissingCapability, Subject, WindowLosses
from hopeprobe.tokens import EvalWindows, TokenData

PROBE = Adaptation()
TICK, PERIODS, CONTEXT, MIDDLE = 4, {"selfmod.k": 4, "cms.fast": 8}, 16, 8
VOCAB = 97
BASE = 3.0  # nats; ln 97 is 4.57


class Effects(NamedTuple):
    """Nats by which the loss falls once a mechanism has written, and for knowing which sequence it reads."""

    selfmod: float = 0.0
    cms: float = 0.0
    own: float = 0.0  # of self-modification, where what it holds is of this sequence
    both: float = 0.0
    own_cms: float = 0.0
    base: float = BASE


FAST = ("selfmod", "cms", "key", "cms_key")


class Gates(Hooked):
    def __init__(self):
        registry = HookRegistry()
        for name in ("selfmod", "cms.fast"):
            registry.add(
                f"blocks.0.{name}.hook_write_gate", HookSpec(("batch", "pos"), "tick", True, "1: it writes")
            )
        self._register_hooks(registry)


class Written(NamedTuple):
    selfmod: torch.Tensor  # (B,): 1 once written
    cms: torch.Tensor
    key: torch.Tensor  # (B,): -1 or 1, the kind of the sequence that self-modification wrote last
    cms_key: torch.Tensor
    waiting: torch.Tensor  # (B,): gate of the first half of a CMS period
    position: int


class Writer(Subject):
    """Loss BASE less what is known so far, in closed form; self-modification writes every 4, the CMS every 8."""

    vocab_size, context, tick, trained_steps, seed = VOCAB, CONTEXT, TICK, 100, 0
    name, dtype, start = "writer", "float64", Effects()

    def __init__(self, effects, start=None):
        self.effects, self.module = effects, Gates()
        self.start = effects if start is None else start

    def init_state(self, batch):
        return Written(*(torch.zeros(batch, dtype=torch.float64) for _ in range(5)), 0)

    def run(self, tokens, lengths=None, state=None):
        rows, width = tokens.shape[0], tokens.shape[1] - 1
        state = self.init_state(rows) if state is None else state
        scored = torch.arange(width) < lengths[:, None]
        parts, e = [], self.effects
        kind = (tokens % 2 * 2 - 1).double()
        for t in range(0, width, TICK):
            here, mask = tokens[:, t : t + TICK][:, : width - t], scored[:, t : t + TICK]
            x = kind[:, t : t + TICK][:, : width - t]
            of_cms = torch.where(state.cms != 0, e.cms * state.cms, 0.0)
            known = e.selfmod * state.selfmod + of_cms + e.both * state.selfmod * state.cms
            own = e.own * state.selfmod * state.key + e.own_cms * state.cms * state.cms_key
            loss = e.base + 0.01 * (here % 7) - known[:, None] - own[:, None] * x
            parts.append(loss * mask)
            if width - t >= TICK:
                state = self.written(state, mask.all(1), x[:, 0])
        return WindowLosses(torch.cat(parts, 1), scored, state)

    def written(self, state, complete, kind):
        points = self.module.hook_dict
        gate = complete[:, None].double().expand(-1, TICK)
        s, c = (points[f"blocks.0.{n}.hook_write_gate"](gate)[:, 0] for n in ("selfmod", "cms.fast"))
        full = (state.position + TICK) % 8 == 0
        waiting = state.waiting + c
        now = (waiting == 2).double() * full
        return Written(
            torch.maximum(state.selfmod, s),
            torch.maximum(state.cms, now),
            torch.where(s > 0, kind, state.key),
            torch.where(now > 0, kind, state.cms_key),
            waiting * 0 if full else waiting,
            state.position + TICK,
        )

    def select_rows(self, state, rows):
        return Written(*(t[list(rows)] for t in state[:5]), state.position)

    def reset_rows(self, state, rows):
        keep = torch.ones(len(state.key), dtype=torch.float64)
        keep[list(rows)] = 0
        return state._replace(**{n: getattr(state, n) * keep for n in FAST})

    def average_rows(self, state, weights):
        return state._replace(**{n: weights.to(state.key) @ getattr(state, n) for n in FAST})

    def write_periods(self):
        return PERIODS

    def freeze_hooks(self, mechanism=None):
        gates = {"selfmod": "blocks.*.selfmod.hook_write_gate", "cms": "blocks.*.cms.*.hook_write_gate"}
        return [(gates[m], lambda gate, hook: gate * 0) for m in ([mechanism] if mechanism else gates)]

    def own_init(self):
        made = type(self)(self.start)
        made.trained_steps = 0
        return made

    def reinitialised(self, seed):
        change = np.random.default_rng(seed).normal(0, 0.002, 6)
        return type(self)(Effects(*(a + b for a, b in zip(self.start, change, strict=True))))


@pytest.fixture(scope="module")
def text():
    """64 documents of 17 tokens, one window each; odd and even documents alternate, and so do their tokens."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 48, 17) * 2 + i % 2 for i in range(64)]
    return TokenData.from_documents(documents, name="kinds", vocab_size=VOCAB, end_of_text=0)


def rows_of(text, effects, start=None, kind=Writer, fresh=5, **settings):
    options = {"tokens": None, "split": "all", "fresh": fresh, "cache_dir": None} | settings
    results = analyze(kind(effects, start), [PROBE], data=text, **options)
    assert missing_from(results) == []
    return {(r.statistic, r.component, r.position): r for r in results.rows}


A, B, OWN, X = 0.2, 0.3, 0.14, 0.05


def test_every_row_is_what_the_closed_form_gives(text):
    # Known before each tick of a window: nothing; a; a, b and x; the same. `own` goes with a.
    rows = rows_of(text, Effects(A, B, OWN, X), fresh=0)
    late = A + B + OWN + X  # at each token of the second half
    expected = {
        ("loss_change", "selfmod", ""): -(12 * (A + OWN) + 8 * X) / 16,
        ("loss_change", "cms", ""): -(B + X) / 2,
        ("loss_change", "both", ""): -(12 * (A + OWN) + 8 * (B + X)) / 16,
        ("loss_change", "interaction", ""): -X / 2,
        ("loss_change_by_position", "selfmod", "4-7"): -(A + OWN),
        ("loss_change_by_position", "selfmod", "8-11"): -(A + OWN + X),
        ("loss_change_by_position", "selfmod", "12-15"): -(A + OWN + X),
        ("loss_change_by_position", "cms", "4-7"): 0,
        ("loss_change_by_position", "cms", "8-11"): -(B + X),
        ("loss_change_by_position", "cms", "12-15"): -(B + X),
        ("loss_change_by_position", "both", "4-7"): -(A + OWN),
        ("loss_change_by_position", "both", "8-11"): -late,
        ("loss_change_by_position", "both", "12-15"): -late,
        # After a reset: nothing for a tick, then self-modification has written again, the CMS not.
        ("state_loss_change", "reset", ""): -(late + B + X) / 2,
        ("state_loss_change_by_position", "reset", "8-11"): -late,
        ("state_loss_change_by_position", "reset", "12-15"): -(B + X),
        # Neighbours are of the other kind: own turns round, until the next write.
        ("state_loss_change", "swapped", ""): -OWN,
        ("state_loss_change_by_position", "swapped", "8-11"): -2 * OWN,
        ("state_loss_change_by_position", "swapped", "12-15"): 0,
        # Of 7 others, 3 are of the same kind: the mean key is -1/7 of one's own.
        ("state_loss_change", "mean-state", ""): -OWN * (8 / 7) / 2,
        ("state_loss_change_by_position", "mean-state", "8-11"): -OWN * 8 / 7,
        ("state_loss_change_by_position", "mean-state", "12-15"): 0,
        ("state_loss_change", "offset", ""): -(late - OWN * 8 / 7 + B + X) / 2,
        # Read again, all is known at once; the first time nothing was for a tick, then a.
        ("recall", "both", ""): -(late + late - A - OWN) / 2,
        ("recall", "selfmod", ""): -(late + late - A - OWN) / 2 + B,
        ("recall", "cms", ""): -(late + late - A - OWN) / 2 + (A + OWN) / 2,
        ("continuation_gap", "", ""): 0,
    }
    changes = {key: row.value for key, row in rows.items() if key[0] != "loss"}
    assert changes == pytest.approx(expected, abs=1e-12)
    conditions = {key[1]: row.condition for key, row in rows.items() if key[2] == ""}
    assert conditions["interaction"] == "live - selfmod-frozen - cms-frozen + frozen"
    assert rows["recall", "cms", ""].condition == "repeated - live - repeated-cms-frozen + cms-frozen"
    assert conditions["mean-state"] == "continued - mean-state"
    assert rows["state_loss_change", "swapped", ""].n_tokens == 64 * 8
    assert rows["recall", "both", ""].n_tokens == 64 * 8
    assert rows["loss_change_by_position", "cms", "8-11"].n_tokens == 64 * 4
    for key in (
        ("loss_change_by_position", "cms", "4-7"),
        ("state_loss_change_by_position", "swapped", "12-15"),
    ):
        assert rows[key].verdict == "no-signal"


def test_what_training_taught_is_learned_beside_own_and_fresh_nulls(text):
    rows = rows_of(text, Effects(A, B, OWN, X), Effects())
    whole = [row for key, row in rows.items() if not key[2] and key[0] not in ("loss", "continuation_gap")]
    assert {row.verdict for row in whole} == {"learned"}
    assert {row.verdict for key, row in rows.items() if key[0] in ("loss", "continuation_gap")} == {
        "inconclusive"
    }


def test_an_untrained_model_has_learned_nothing_however_much_its_writes_help(text):
    verdicts = {key: row.verdict for key, row in rows_of(text, Effects(0.01, 0.97, 0.02)).items()}
    assert verdicts["loss_change", "cms", ""] == "at-init"
    assert set(verdicts.values()) <= {"at-init", "no-signal", "inconclusive"}


@pytest.mark.slow
def test_no_toy_model_of_another_seed_has_learned(subject_of, configs, settings):
    class Impostor(HopeSubject):
        def own_init(self):
            return subject_of(halved(configs), seed=0)

    verdicts = []
    for seed in (1, 2):
        subject = Impostor(subject_of(halved(configs), seed=seed).module)
        subject.trained_steps = 200
        results = analyze(subject, [PROBE], **settings | {"tokens": 1200})
        verdicts += [row.verdict for row in results.rows]
    assert verdicts.count("learned") <= 0.05 * len(verdicts)
    assert verdicts.count("at-init") > 20, "else it could not decide anything"


def halved(configs):
    """A smaller toy, with levels that write every 8 and 16 of 32 tokens, so that there is a middle."""
    levels = CMSLevel("fast", 8, 3.0), CMSLevel("slow", 16, 3.0)
    return dataclasses.replace(configs["toy"], dim=8, layers=1, cms_levels=levels, chunk_memory=16)


@pytest.mark.parametrize("tiny", [0.0, 0.003])
def test_self_modification_gets_no_credit_for_what_the_cms_does(text, tiny):
    rows = rows_of(text, Effects(selfmod=tiny, cms=0.3, own_cms=0.1), Effects())
    assert rows["loss_change", "cms", ""].verdict == "learned"
    assert rows["loss_change", "both", ""].verdict == "learned"
    assert rows["loss_change", "selfmod", ""].verdict == ("at-init" if tiny else "no-signal")
    assert rows["recall", "selfmod", ""].verdict == ("at-init" if tiny else "no-signal")
    assert rows["loss_change", "interaction", ""].verdict == "no-signal"
    if not tiny:
        assert rows["loss_change", "selfmod", ""].note.startswith("what selfmod writes changes no loss")


def test_a_hope_model_whose_memories_hardly_write_gives_them_no_credit(subject_of, configs, settings):
    subject = subject_of(halved(configs))
    for block in subject.module.blocks:
        block.selfmod.eta_bias.data.fill_(-200.0)
        block.selfmod.alpha_bias.data.fill_(200.0)
    results = analyze(subject, [PROBE], **settings | {"fresh": 0, "tokens": 600})
    rows = {(r.statistic, r.component): r for r in results.rows if not r.position}
    assert rows["loss_change", "selfmod"].verdict == "no-signal"
    assert rows["loss_change", "selfmod"].value == 0
    assert rows["loss_change", "interaction"].verdict == rows["recall", "selfmod"].verdict == "no-signal"
    assert abs(rows["loss_change", "cms"].value) > 1e-5
    assert rows["state_loss_change", "swapped"].verdict != "no-signal"


def test_a_mechanism_that_died_or_hurts_or_helps_less_has_not_learned(text):
    before = Effects(selfmod=0.2, cms=0.97, own=0.1)
    rows = rows_of(text, Effects(selfmod=-0.2, cms=0.001, own=0.1), before)
    assert rows["loss_change", "cms", ""].verdict == "collapsed"
    assert rows["loss_change", "selfmod", ""].verdict == "inconclusive"
    assert "worse than at initialisation" in rows["loss_change", "selfmod", ""].note
    assert rows["loss_change", "interaction", ""].verdict == "no-signal"
    rows = rows_of(text, Effects(selfmod=0.2, cms=0.4, own=0.1, both=0.3), before)
    assert "helps less than at initialisation (-0.485" in rows["loss_change", "cms", ""].note
    assert rows["loss_change", "interaction", ""].verdict == "inconclusive"
    assert rows["loss_change", "interaction", ""].note.rpartition("; ")[2].startswith("both: helps less")
    assert rows["loss_change", "selfmod", ""].verdict == "learned"


def test_memory_of_a_sequence_that_is_gone_is_no_collapse_of_what_writes(text):
    before = Effects(selfmod=0.2, cms=0.3, own=0.1)
    rows = rows_of(text, Effects(selfmod=0.4, cms=0.5, own=0.001), before)
    row = rows["state_loss_change", "swapped", ""]
    assert row.value == pytest.approx(-0.001)
    assert row.verdict == "inconclusive"
    assert "helps less than at initialisation (-0.1" in row.note


@pytest.mark.parametrize("both", [0.1, -0.1])
def test_neither_direction_of_the_interaction_is_better(text, both):
    rows = rows_of(text, Effects(selfmod=0.4, cms=0.5, own=0.1, both=both), Effects())
    assert rows["loss_change", "interaction", ""].value == pytest.approx(-both / 2)
    assert rows["loss_change", "interaction", ""].verdict == "learned"


def test_a_diverged_model_adapts_to_nothing(text):
    rows = rows_of(text, Effects(selfmod=1.0, cms=1.0, own=0.5, base=14.0), Effects())
    judged = {row.verdict for key, row in rows.items() if key[0] not in ("loss", "continuation_gap")}
    assert judged == {"diverged"}
    with_nan = Writer(Effects(cms=math.nan))
    results = analyze(
        with_nan, ["integrity", PROBE], data=text, tokens=None, split="all", fresh=0, cache_dir=None
    )
    assert {row.probe for row in results.rows if row.statistic == "loss_change"} == set()
    assert any("adaptation (live): the loss is not finite at" in m for m in missing_from(results))


class Shared(Writer):
    """Fast weights are those of the whole batch."""

    def written(self, state, complete, kind):
        state = super().written(state, complete, kind)
        return self.average_rows(state, torch.full((len(kind), len(kind)), 1 / len(kind)))


@pytest.mark.parametrize("batch", [8, 64])
def test_fast_weights_shared_across_a_batch_are_found_out(text, batch):
    rows = rows_of(text, Effects(A, B, OWN), Effects(), kind=Shared, batch=batch)
    for other in ("swapped", "mean-state"):
        row = rows["state_loss_change", other, ""]
        assert (row.value, row.verdict) == (pytest.approx(0, abs=1e-12), "no-signal")
        assert SHARED in row.note
    others = [row for key, row in rows.items() if key[1] not in ("swapped", "mean-state", "")]
    assert {row.verdict for row in others if abs(row.value) > 1e-9} == {"inconclusive"}
    assert SHARED in rows["loss_change", "both", ""].note


def test_fast_weights_of_a_hope_model_shared_across_a_batch_are_found_out(subject_of, configs, settings):
    class Averaging(HopeSubject):
        def run(self, tokens, lengths=None, state=None):
            if state is not None:
                state = self.average_rows(state, torch.full((len(tokens), len(tokens)), 1 / len(tokens)))
            return super().run(tokens, lengths, state)

    subject = Averaging(subject_of(halved(configs)).module)
    # Whole batches only: rows that ended before the middle are averaged too.
    results = analyze(subject, [PROBE], **settings | {"fresh": 0, "tokens": 32 * 16})
    rows = {(r.statistic, r.component): r for r in results.rows if not r.position}
    for other in ("swapped", "mean-state"):
        assert rows["state_loss_change", other].verdict == "no-signal"
        assert "are they shared?" in rows["state_loss_change", other].note
    assert rows["loss_change", "both"].verdict == "inconclusive"


def test_a_state_that_does_not_hold_everything_is_found_out(text):
    class Forgetful(Writer):
        def run(self, tokens, lengths=None, state=None):
            state = None if state is None else state._replace(selfmod=state.selfmod * 0.5)
            return super().run(tokens, lengths, state)

    rows = rows_of(text, Effects(A, B, OWN), Effects(), kind=Forgetful)
    judged = [row for key, row in rows.items() if key[0] != "loss" and row.value]
    assert {row.verdict for row in judged} == {"inconclusive"}
    assert "go on changes the loss by" in rows["loss_change", "selfmod", ""].note


# -- a reference, window by window -----------------------------------------------------------------------------


def by_hand(model, windows, middle):
    """Losses of every condition: name → list of float64 arrays, one a window; no code of the probes."""
    batches = list(windows.with_batch(8))
    gates = {
        "live": None,
        "frozen": "blocks.*.hook_write_gate",
        "selfmod-frozen": "blocks.*.selfmod.hook_write_gate",
        "cms-frozen": "blocks.*.cms.*.hook_write_gate",
    }
    out = {}
    for cell, pattern in gates.items():
        hooks = [(pattern, lambda gate, hook: gate * 0)] if pattern else []
        out[cell], out[f"again-{cell}"] = [], []
        for batch in batches:
            for row, length in zip(batch.tokens, batch.lengths, strict=True):
                tokens = torch.from_numpy(row[None, : length + 1])
                with torch.no_grad(), model.hooks(hooks, allow_unfired=True):
                    out[cell].append(model(tokens).losses[0].numpy())
                    again = None
                    if length >= middle:
                        state = model(tokens[:, : middle + 1]).state
                        again = model(tokens[:, : middle + 1], state=state).losses[0].numpy()
                    out[f"again-{cell}"].append(again)
    halves = ("continued", "reset", "swapped", "mean-state")
    out |= {name: [] for name in halves}
    meta = HopeSubject(model).meta_weights()
    for batch in batches:
        rows = [
            torch.from_numpy(row[None, : n + 1]) for row, n in zip(batch.tokens, batch.lengths, strict=True)
        ]
        fast = [written(model, t, middle)[1] if t.shape[1] - 1 > middle else None for t in rows]
        for r, (tokens, own) in enumerate(zip(rows, fast, strict=True)):
            order = [(r + i) % len(rows) for i in range(1, len(rows))]
            others = [fast[s] for s in order if fast[s] and batch.document[s] != batch.document[r]]
            if own is None or not others:
                for name in halves:
                    out[name].append(None)
                continue
            assert set(own) == set(meta)
            change = {
                "continued": own,
                "reset": {name: weight[None].clone() for name, weight in meta.items()},
                "swapped": others[0],
                "mean-state": {name: sum(one[name] for one in others) / len(others) for name in own},
            }
            for name in halves:
                out[name].append(written(model, tokens, middle, change[name])[0][middle:].numpy())
    return out


def written(model, tokens, middle, instead=None):
    """Losses of one window, and its fast weights as the write at `middle` leaves them, or is made to."""
    read, seen = [0], {}

    def count(x, hook):
        read[0] += x.shape[1]

    def change(weight, hook):
        if read[0] != middle:
            return None
        seen[hook.name] = weight.clone()
        return None if instead is None else instead[hook.name].clone()

    with torch.no_grad(), model.hooks([("hook_embed", count), ("blocks.*.hook_fast_*", change)]):
        losses = model(tokens).losses[0]
    return losses, seen


@pytest.fixture(scope="module")
def ragged():
    """Documents of 6 to 40 tokens and one of 160, whose last windows have none of another beside them."""
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, VOCAB, n) for n in (*rng.integers(6, 40, 14), 160)]
    return TokenData.from_documents(documents, name="ragged", vocab_size=VOCAB, end_of_text=0)


def exact(configs, seed=0):
    return HopeSubject(HopeModel(halved(configs), seed, torch.float64))


def test_all_rows_of_a_hope_model_agree_with_a_loop_over_windows(configs, ragged):
    subject, middle = exact(configs), 16
    assert middle_of(subject) == middle
    windows = EvalWindows(ragged, "all", context=32, tokens=None, batch=7)
    found = measure(subject, windows, [PROBE], VALUES)
    assert not found.failed["adaptation"]
    assert not found.lacking["adaptation"]
    rows = {place: value for (_, place), value in found.found["adaptation"].items()}
    out = by_hand(subject.module, windows, middle)
    n = range(len(out["live"]))

    def mean(signs, pick):
        """Σ sign · mean over the tokens that `pick` leaves of each window."""
        return sum(s * np.concatenate([pick(out[name][i], i) for i in n]).mean() for name, s in signs.items())

    def whole(a, b):
        return lambda losses, i: losses[a:b]

    def late(a=0, b=99):
        nothing = np.zeros(0)
        return lambda losses, i: nothing if losses is None else losses[a:b]

    def early(losses, i):
        return losses[:middle] if losses is not None and out["again-live"][i] is not None else np.zeros(0)

    pairs = {
        "selfmod": {"live": 1, "selfmod-frozen": -1},
        "cms": {"live": 1, "cms-frozen": -1},
        "both": {"live": 1, "frozen": -1},
        "interaction": {"live": 1, "selfmod-frozen": -1, "cms-frozen": -1, "frozen": 1},
    }
    expected = {}
    for component, signs in pairs.items():
        expected["loss_change", component, ""] = mean(signs, whole(0, 99))
        if component != "interaction":
            for a, b in ((8, 16), (16, 24), (24, 32)):
                expected["loss_change_by_position", component, f"{a}-{b - 1}"] = mean(signs, whole(a, b))
            again = {f"again-{name}": s for name, s in signs.items()}
            expected["recall", component, ""] = mean(again, early) - mean(signs, early)
    for other in ("reset", "swapped", "mean-state"):
        signs = {"continued": 1, other: -1}
        expected["state_loss_change", other, ""] = mean(signs, late())
        for a, b in ((16, 24), (24, 32)):
            place = ("state_loss_change_by_position", other, f"{a}-{b - 1}")
            expected[place] = mean(signs, late(a - middle, b - middle))
    expected["state_loss_change", "offset", ""] = mean({"mean-state": 1, "reset": -1}, late())
    expected["continuation_gap", "", ""] = 0
    got = {(p.statistic, p.component, p.position): v for p, v in rows.items() if p.statistic != "loss"}
    assert got == pytest.approx(expected, abs=1e-10)
    assert abs(expected["state_loss_change", "swapped", ""]) > 1e-6
    assert any(x is None for x in out["swapped"]), "else nothing was left out"
    assert any(a is None and len(b) > middle for a, b in zip(out["swapped"], out["live"], strict=True))


def test_moving_what_was_read_too_would_show(configs, ragged):
    """Whole rows change places with `select_rows`, tails and all: not what `swapped` does."""
    subject = exact(configs)
    (batch, *_) = EvalWindows(ragged, "all", context=32, tokens=200, batch=8)
    tokens, lengths = as_tensors(batch)
    swapped = HALVES[2].run(subject, None, batch).losses[:, 16:]
    long = [r for r in range(8) if lengths[r] > 16]
    giver = dict(zip(long, long[1:] + long[:1], strict=True))
    order = [giver.get(r, r) for r in range(8)]
    state = subject.run(tokens[:, :17], lengths.clamp(max=16)).state
    state = subject.select_rows(state, order)
    whole = subject.run(tokens[:, 16:], (lengths - 16).clamp(min=0), state).losses
    moved = 0.0
    for r in long:
        _, fast = written(subject.module, tokens[giver[r], None, : lengths[giver[r]] + 1], 16)
        expected, _ = written(subject.module, tokens[r, None, : lengths[r] + 1], 16, fast)
        n = int(lengths[r]) - 16
        torch.testing.assert_close(swapped[r, :n], expected[16:], atol=1e-10, rtol=0)
        moved = max(moved, float((whole[r, :n] - expected[16:]).abs().max()))
    assert moved > 1e-6


def test_batch_size_changes_nothing(configs, ragged):
    subject = exact(configs)
    found = []
    for batch in (3, 8, 50):
        windows = EvalWindows(ragged, "all", context=32, tokens=400, batch=batch)
        found.append(measure(subject, windows, [PROBE], VALUES).found["adaptation"])
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-9)


def test_whole_documents_are_measured_beyond_the_context_too(configs, ragged):
    windows = EvalWindows(ragged, "all", context=32, tokens=None, batch=5, carry="document")
    rows = measure(exact(configs), windows, [PROBE], VALUES)
    assert not rows.failed["adaptation"]
    positions = {place.position for _, place in rows.found["adaptation"]}
    assert positions == {"", "8-15", "16-23", "24-31", "32-"}


# -- what is not there -----------------------------------------------------------------------------------------


def test_positions_are_parts_of_the_context_that_a_write_precedes(subject_of, configs):
    assert list(position_bins(subject_of())) == ["8-15", "16-23", "24-31", "32-"]
    assert list(position_bins(Writer(Effects())))[:2] == ["4-7", "8-11"]
    wide = subject_of(dataclasses.replace(configs["toy"], context=512))
    names = list(position_bins(wide))
    assert names[:2] + names[-2:] == ["0-63", "64-127", "448-511", "512-"]
    odd = position_bins(subject_of(dataclasses.replace(configs["toy"], context=100)))
    assert odd == {
        "0-15": (0, 16), "16-31": (16, 32), "32-47": (32, 48), "48-63": (48, 64), "64-79": (64, 80),
        "80-95": (80, 96), "96-99": (96, 100), "100-": (100, math.inf),
    }  # fmt: skip


def test_without_a_middle_the_cells_are_there_and_the_rest_says_why(subject, settings):
    results = analyze(subject, [PROBE], **settings | {"fresh": 0})
    assert missing_from(results) == []
    assert PROBE.conditions(subject) == cells_of(subject)
    rows = {(r.statistic, r.component, r.position): r for r in results.rows}
    assert rows["loss_change", "interaction", ""].value
    for key in (("state_loss_change", "swapped", ""), ("recall", "", "")):
        assert rows[key].verdict == "n/a"
        assert "only every 32 tokens, a window has 32" in rows[key].note


def test_windows_too_short_for_the_middle_say_so(text):
    short = TokenData.from_documents(
        [np.arange(n) for n in (7,) * 40 + (17,)], name="short", vocab_size=VOCAB, end_of_text=0
    )
    results = analyze(
        Writer(Effects(A, B)), [PROBE], data=short, tokens=None, split="all", fresh=0, cache_dir=None
    )
    rows = {(r.statistic, r.component): r for r in results.rows if not r.position}
    assert rows["state_loss_change", "reset"].verdict == "n/a", "one alone has no partner"
    assert "no two of different documents" in rows["state_loss_change", "reset"].note
    assert rows["recall", "both"].n_tokens == 8
    nothing = TokenData.from_documents([np.arange(7)] * 40, name="s", vocab_size=VOCAB, end_of_text=0)
    results = analyze(
        Writer(Effects(A, B)), [PROBE], data=nothing, tokens=None, split="all", fresh=0, cache_dir=None
    )
    rows = {(r.statistic, r.component): r for r in results.rows if not r.position}
    assert "no window has 8 tokens" in rows["recall", ""].note
    assert rows["loss_change", "both"].value == pytest.approx(-A * 2 / 6)


class NoStates(Writer):
    average_rows = Subject.average_rows


class OneGate(Writer):
    def freeze_hooks(self, mechanism=None):
        if mechanism is not None:
            raise MissingCapability("all memories share one gate")
        return super().freeze_hooks()


class Alone(Writer):
    def write_periods(self):
        return {"cms.fast": 8}


def test_what_a_model_cannot_do_leaves_the_rest(text):
    rows = rows_of(text, Effects(A, B), Effects(), kind=NoStates, fresh=2)
    assert rows["state_loss_change", "reset", ""].verdict == "n/a"
    assert "no averaging of states" in rows["state_loss_change", "reset", ""].note
    assert rows["loss_change", "selfmod", ""].verdict == rows["recall", "cms", ""].verdict == "learned"
    rows = rows_of(text, Effects(A, B, OWN), Effects(), kind=OneGate, fresh=2)
    for component in ("selfmod", "cms", "interaction"):
        row = rows["loss_change", component, ""]
        assert (row.verdict, "share one gate" in row.note) == ("n/a", True)
    assert (
        rows["loss_change", "both", ""].verdict == rows["state_loss_change", "reset", ""].verdict == "learned"
    )
    assert mechanisms_of(Alone(Effects())) == {"cms": ""}
    rows = rows_of(text, Effects(0.0, B), Effects(), kind=Alone, fresh=2)
    assert rows["loss_change", "cms", ""].value == pytest.approx(-B / 2)
    assert rows["loss_change", "interaction", ""].verdict == "n/a"
    assert ("loss_change", "both", "") not in rows


def test_a_model_that_never_writes_is_not_asked(subject_of, configs, settings):
    still = subject_of(dataclasses.replace(configs["toy"], variant="transformer"))
    results = analyze(still, ["integrity", PROBE], **settings | {"fresh": 0})
    rows = [row for row in results.rows if row.probe == "adaptation"]
    assert {(row.statistic, row.verdict, row.note) for row in rows} == {
        (statistic, "n/a", "this model never writes") for statistic in PROBE.statistics
    }


def test_writes_that_change_nothing_are_no_signal(subject_of, configs, settings):
    still = dataclasses.replace(
        halved(configs), cms_levels=(CMSLevel("fast", 8, 0.0), CMSLevel("slow", 16, 0.0))
    )
    rows = {
        (r.statistic, r.component): r
        for r in analyze(subject_of(still), [PROBE], **settings | {"fresh": 0, "tokens": 600}).rows
        if not r.position
    }
    assert rows["loss_change", "cms"].verdict == rows["recall", "cms"].verdict == "no-signal"
    nothing = rows_of(
        TokenData.from_documents([np.arange(17)] * 64, name="same", vocab_size=VOCAB, end_of_text=0),
        Effects(),
    )
    assert {r.verdict for k, r in nothing.items() if k[0] not in ("loss", "continuation_gap")} == {
        "no-signal"
    }
    assert "of the middle change no loss" in nothing["state_loss_change", "swapped", ""].note


def test_it_is_registered_and_its_conditions_are_shared(subject_of, configs):
    assert isinstance(PROBES["adaptation"], Adaptation)
    subject = subject_of(halved(configs))
    conditions = PROBE.conditions(subject)
    assert conditions == PROBE.conditions(subject)
    assert [one.name for one in conditions] == [
        "live", "frozen", "selfmod-frozen", "cms-frozen", "continued", "reset", "swapped", "mean-state",
        "repeated", "repeated-frozen", "repeated-selfmod-frozen", "repeated-cms-frozen",
    ]  # fmt: skip
    assert conditions[0] is LIVE
    assert repeated(LIVE) is conditions[8]
