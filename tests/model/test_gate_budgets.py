"""A gate alone, without a model: does it meet its budget, is chance chance, what a loss that is not a number does."""

import dataclasses

import gate_numpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from hopeprobe.model import gate as gate_module
from hopeprobe.model.config import GateConfig
from hopeprobe.model.gate import DOUBT, Gate
from hopeprobe.model.scores import Seen, hash_start, hash_tick, uniform

BUDGETS = [0.5, 0.25, 0.1, 0.05]
WITH_BUDGET = ["quantile", "zscore", "ratio", "excess", "entropy-gap", "assoc", "momentum", "random"]
WITH_THRESHOLD = {
    "zscore": 0.0,
    "ratio": 1.0,
    "excess": 1.0,
    "entropy-gap": 1.0,
    "assoc": 1.0,
    "momentum": 1.5,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def tokens_for(surprise, seed=1):
    return torch.randint(0, 50257, surprise.shape, generator=generator(seed))


def shown(surprise, targets):
    nothing = torch.zeros_like(surprise)
    return Seen(surprise, targets, nothing, nothing, surprise[:, None])


def decide(config, surprise, targets=None, tick=256):
    """Gates (B, T) of streams from their beginning, a tick at a time."""
    targets = tokens_for(surprise) if targets is None else targets
    gate = Gate(config, 1.5, 1)
    state, gates = gate.init_state(len(surprise), surprise), []
    for start in range(0, surprise.shape[1], tick):
        part = slice(start, start + tick)
        made = gate.decide(shown(surprise[:, part], targets[:, part]), state, start)
        gates.append(made.gate[:, 0])
        state = made.state
    return torch.cat(gates, 1)


def autocorrelated(noise, keep=0.98):
    """AR(1) with deviation 1."""
    out, now = np.empty(noise.shape), np.zeros(len(noise))
    for t, step in enumerate(noise.numpy().T):
        now = keep * now + (1 - keep**2) ** 0.5 * step
        out[:, t] = now
    return torch.from_numpy(out)


def streams(total, rows=1):
    """Exchangeable, falling as text's loss does with position, and autocorrelated scores, (3 rows, total)."""
    noise = draw(3 * rows, total)
    falling = 10 - torch.arange(1, total + 1).double().log() + noise[rows : 2 * rows]
    return torch.cat([noise[:rows], falling, autocorrelated(noise[2 * rows :])])


def misses(gates, budget):
    return (gates.mean(1) / budget - 1).abs()


# -- budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "total"),
    [(0.25, 20_000), (0.1, 20_000)]
    + [pytest.param(b, 100_000, marks=pytest.mark.slow) for b in (0.5, 0.25, 0.1, 0.05)],
)
def test_one_stream_meets_its_budget_however_scores_move(budget, total):
    assert misses(decide(GateConfig("quantile", budget), streams(total)), budget).max() < 0.01


@pytest.mark.parametrize("budget", BUDGETS)
def test_64_streams_meet_their_budget(budget):
    gates = decide(GateConfig("quantile", budget), draw(64, 1600))
    assert float(misses(gates.reshape(1, -1), budget)) < 0.01
    assert (gates.sum(1) - budget * 1600).abs().max() < 12


@pytest.mark.parametrize("budget", BUDGETS)
def test_windows_that_start_afresh_meet_their_budget(budget):
    gates = decide(GateConfig("quantile", budget), draw(200, 512), tick=512)
    assert float(misses(gates.reshape(1, -1), budget)) < 0.01


@pytest.mark.parametrize("rule", WITH_BUDGET)
def test_every_rule_meets_its_budget(rule):
    surprise = 4 + draw(50, 512)
    gates = decide(GateConfig(rule, 0.1, history=64, decay=0.9), surprise)
    assert float(misses(gates.reshape(1, -1), 0.1)) < 0.02


def test_without_feedback_a_drifting_stream_would_miss(monkeypatch):
    falling = streams(20_000)[1:2]
    monkeypatch.setattr(gate_module, "_PATIENCE", float("inf"))
    assert float(misses(decide(GateConfig("quantile", 0.05), falling), 0.05)) > 0.01


@pytest.mark.parametrize("budget", [0.25, 0.05])
def test_scores_that_are_all_the_same_meet_the_budget(budget):
    gates = decide(GateConfig("quantile", budget), torch.full((64, 1600), 2.5, dtype=torch.float64))
    assert float(misses(gates.reshape(1, -1), budget)) < 0.01


@pytest.mark.parametrize("rule", ["zscore", "ratio", "momentum"])
def test_a_constant_loss_meets_the_budget_under_running_means(rule):
    """Its scores are then roundings, which may drift: to within a few tokens."""
    gates = decide(GateConfig(rule, 0.25), torch.full((16, 800), 2.5, dtype=torch.float64))
    assert (gates.sum(1) - 0.25 * 800).abs().max() < 8


@pytest.mark.parametrize("feedback", [2.0, float("inf")])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_first_tokens_pass_at_the_budget_s_rate(budget, feedback, monkeypatch):
    """Exactly the budget's without feedback; with it, but for what cannot be less than never."""
    monkeypatch.setattr(gate_module, "_PATIENCE", feedback)
    n = 40_000
    surprise = draw(n, 5)
    targets = torch.randint(0, 2**40, surprise.shape, generator=generator(3))
    gates = decide(GateConfig("quantile", budget, history=8), surprise, targets)
    bound = 4 * (budget * (1 - budget) / n) ** 0.5
    assert (gates.mean(0) - budget).abs().max() < bound
    assert (gates[:, :1] == gates[:, 1:]).double().mean() < 1


def test_ranks_are_uniform_from_the_first_token_on(monkeypatch):
    """p_t is at most b as often as b says, for every b at once: found by asking the gate for each of 19."""
    monkeypatch.setattr(gate_module, "_PATIENCE", float("inf"))
    n, budgets = 20_000, np.arange(1, 20) / 20
    surprise = draw(n, 5)
    targets = torch.randint(0, 2**40, surprise.shape, generator=generator(3))
    configs = [GateConfig("quantile", float(b), history=8) for b in budgets]
    shares = [decide(config, surprise, targets).mean(0).numpy() for config in configs]
    assert np.abs(np.array(shares) - budgets[:, None]).max() < 4 * 0.5 / n**0.5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0]), min_size=1, max_size=40),
    st.floats(0.01, 1.0),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(0, 2**63 - 1),
)
def test_a_budget_is_its_equations_for_numbers_with_ties(scores, budget, history, tick, seed):
    config = GateConfig("quantile", budget, history=history, seed=seed)
    surprise = torch.tensor([scores], dtype=torch.float64)
    targets = tokens_for(surprise, 4)
    gates = decide(config, surprise, targets, tick)
    assert gates[0].tolist() == gate_numpy.decided(config, scores, targets[0]).tolist()


def doubted(config, surprise, targets, tick=8):
    """Gates and doubts (B, T)."""
    gate = Gate(config, 1.0, 1)
    state, found = gate.init_state(len(surprise), surprise), []
    for start in range(0, surprise.shape[1], tick):
        part = slice(start, start + tick)
        made = gate.decide(shown(surprise[:, part], targets[:, part]), state, start, doubting=True)
        found.append((made.gate[:, 0], made.doubt))
        state = made.state
    return tuple(torch.cat(parts, 1) for parts in zip(*found, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        GateConfig("quantile", 0.25, history=16),
        GateConfig("quantile", 0.6, history=4),
        GateConfig("assoc", 0.25, history=16),
        GateConfig("excess", threshold=1.0),
        GateConfig(),
    ],
    ids=lambda config: f"{config.rule} {config.budget}",
)
def test_the_first_gate_that_a_rounding_turns_is_one_in_doubt(config):
    """Scores on a grid, so that many are as near as roundings; moved by less than a doubt, in the same streams."""
    base = torch.randint(1, 6, (400, 40), generator=generator(1)).double() / 2
    near = base + 0.4 * DOUBT * torch.randn(base.shape, generator=generator(2), dtype=torch.float64).clamp(
        -1, 1
    )
    moved = near + 0.2 * DOUBT * torch.randn(base.shape, generator=generator(3), dtype=torch.float64).clamp(
        -1, 1
    )
    targets = tokens_for(base, 4)
    (gates, doubt), (others, _) = (doubted(config, x, targets) for x in (near, moved))
    turned = gates != others
    rows = turned.any(1).nonzero()[:, 0]
    assert len(rows) > 20
    first = turned.int().argmax(1)
    assert bool(doubt[rows, first[rows]].all())
    apart = torch.rand(400, 40, generator=generator(5), dtype=torch.float64) + base  # no two as near
    assert doubted(config, apart, targets)[1].double().mean() < 0.002
    assert doubt.double().mean() < 0.9


def test_chance_is_never_in_doubt():
    surprise = draw(50, 40)
    assert not doubted(GateConfig("random", 0.25), surprise, tokens_for(surprise))[1].any()


def test_nobody_who_does_not_ask_pays_for_doubts():
    surprise = draw(2, 8)
    gate = Gate(GateConfig("quantile", 0.25), 1.0, 1)
    made = gate.decide(shown(surprise, tokens_for(surprise)), gate.init_state(2, surprise), 0)
    assert made.doubt is None


def test_the_whole_budget_passes_every_token():
    assert bool(decide(GateConfig("quantile", 1.0), draw(4, 600)).all())


def test_a_rank_of_just_the_budget_passes():
    targets = torch.arange(9)[:, None]
    for row, first in zip(targets, chance(targets, gate_numpy.OF_RANKS)[:, 0], strict=True):
        budget = float(first)
        assert decide(GateConfig("quantile", budget), draw(1, 1), row[None]).tolist() == [[1.0]]
        assert decide(GateConfig("quantile", budget - 1e-9), draw(1, 1), row[None]).tolist() == [[0.0]]


@pytest.mark.parametrize(
    "config",
    [GateConfig("quantile", 0.25), GateConfig("excess", threshold=-99.0)],
    ids=["budget", "threshold"],
)
def test_a_token_without_a_target_is_not_written_and_owes_nothing(config):
    surprise = draw(20, 60)
    targets = tokens_for(surprise)
    targets[:, 40:] = -1
    gates = decide(config, surprise, targets, tick=8)
    assert bool(gates[:, :40].any())
    assert not gates[:, 40:].any()
    if config.budget is not None:
        gate = Gate(config, 0.0, 1)
        made = gate.decide(shown(surprise, targets), gate.init_state(20, surprise), 0)
        owed = 40 * config.budget - gates.sum(1)
        assert torch.allclose(made.state.owed[:, 0], owed, rtol=0, atol=1e-12)


# -- chance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.5, 0.05])
def test_chance_meets_its_budget(budget):
    gates = decide(GateConfig("random", budget), draw(64, 1600))
    assert float(misses(gates.reshape(1, -1), budget)) < 0.01


def test_chance_knows_only_the_sequence_and_the_seed():
    targets = tokens_for(draw(8, 512))
    config = GateConfig("random", 0.25)
    gates = decide(config, draw(8, 512), targets)
    assert torch.equal(gates, decide(config, 4 + draw(8, 512, seed=9), targets))
    others = [decide(dataclasses.replace(config, seed=1), draw(8, 512), targets)]
    others += [decide(config, draw(8, 512), targets + 1), gates.roll(1, 0)]
    for other in others:
        agree = float((gates == other).double().mean())
        assert abs(agree - (0.25**2 + 0.75**2)) < 0.05


def chance(targets, salt, seed=0):
    start = torch.full((len(targets),), hash_start(seed), dtype=torch.int64)
    return uniform(hash_tick(start, targets)[0], salt, torch.float64)


@pytest.mark.parametrize("kind", ["text", "one token", "counting"])
def test_chance_is_uniform_and_independent_of_itself(kind):
    n = 20_000
    targets = {
        "text": tokens_for(torch.empty(1, n)),
        "one token": torch.full((1, n), 7),
        "counting": torch.arange(n)[None],
    }[kind]
    made = np.array([
        torch.cat(list(parts(targets, salt, seed))).numpy()
        for salt, seed in ((1, 0), (2, 0), (1, 1), (2, 1))
    ])  # fmt: skip
    assert all(kstest(row, "uniform").pvalue > 1e-3 for row in made)
    together = np.vstack([made, np.roll(made, 1, axis=1), np.roll(made[:1], 2, axis=1)])
    correlation = np.corrcoef(together) - np.eye(len(together))
    assert np.abs(correlation).max() < 4.5 / n**0.5
    assert made.min() >= 0
    assert made.max() < 1


def parts(targets, salt, seed, tick=250):
    chain = torch.full((1,), hash_start(seed), dtype=torch.int64)
    for part in torch.split(targets, tick, 1):
        chains, chain = hash_tick(chain, part)
        yield uniform(chains, salt, torch.float64)[0]


def test_first_tokens_are_uniform_over_sequences():
    first = chance(torch.arange(20_000)[:, None], 2)[:, 0].numpy()
    assert kstest(first, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 4.5 / 20_000**0.5


@given(
    st.lists(st.integers(0, 2**40), min_size=1, max_size=30), st.integers(0, 2**63 - 1), st.integers(0, 30)
)
def test_the_hash_is_that_of_whole_numbers_in_any_pieces(tokens, seed, cut):
    targets = torch.tensor([tokens, tokens[::-1]])
    start = torch.full((2,), hash_start(seed), dtype=torch.int64)
    whole, end = hash_tick(start, targets)
    cut = min(max(cut, 1), len(tokens))
    first, chain = hash_tick(start, targets[:, :cut])
    if cut < len(tokens):
        rest, chain = hash_tick(chain, targets[:, cut:])
        first = torch.cat([first, rest], 1)
    assert torch.equal(first, whole)
    assert torch.equal(chain, end)
    for salt in (1, 2):
        found = uniform(whole, salt, torch.float64)
        assert found[0].tolist() == gate_numpy.uniforms(tokens, salt, seed).tolist()
        assert torch.equal(uniform(whole, salt, torch.float32).double(), found)


# -- numbers that are none ---------------------------------------------------------------------------------------


CONFIGS = [pytest.param(GateConfig(rule, 0.25), id=f"{rule}-budget") for rule in WITH_BUDGET] + [
    pytest.param(GateConfig(rule, threshold=threshold), id=f"{rule}-threshold")
    for rule, threshold in WITH_THRESHOLD.items()
]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_loss_that_is_not_finite_disturbs_no_other_row(config, bad):
    surprise = 2 + draw(3, 80)
    spoiled = surprise.clone()
    spoiled[1, 30] = bad
    clean, gates = decide(config, surprise, tick=16), decide(config, spoiled, tick=16)
    assert torch.equal(gates[[0, 2]], clean[[0, 2]])
    assert torch.equal(gates[1, :16], clean[1, :16])
    assert bool(((gates == 0) | (gates == 1)).all())


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.values[0].rule != "random"])
def test_a_loss_that_is_not_a_number_is_not_written(config):
    spoiled = 2 + draw(200, 40)
    spoiled[:, 30] = float("nan")
    assert not decide(config, spoiled, tick=8)[:, 30].any()


@pytest.mark.parametrize("history", [1, 256])
def test_losses_that_are_no_numbers_are_not_written_first_nor_when_much_is_owed(history):
    spoiled = torch.full((50, 100), float("nan"), dtype=torch.float64)
    assert not decide(GateConfig("quantile", 0.25, history=history), spoiled).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", ["zscore", "ratio", "momentum"])
def test_a_loss_that_is_not_finite_changes_no_gate_before_it(rule, bad):
    surprise = 2 + draw(50, 16)
    spoiled = surprise.clone()
    spoiled[:, 12] = bad
    config = GateConfig(rule, 0.25)
    assert torch.equal(decide(config, surprise)[:, :12], decide(config, spoiled)[:, :12])
