"""Every rule of a gate in a model: its scores and gates against NumPy, what may not depend on what, its refusals."""

import dataclasses
import json

import gate_numpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_toys import CONFIGS, TOY
from scipy.special import expit

from hopeprobe.errors import BadInputError
from hopeprobe.model.config import GATE_RULES, CMSLevel, GateConfig, ModelConfig, from_dict
from hopeprobe.model.gate import Gate
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.reference import ReferenceGates, reference_losses
from hopeprobe.model.scores import Seen

UNIGRAM = -torch.log_softmax(torch.randn(37, generator=torch.Generator().manual_seed(5)).double(), 0)
SHORT = {"budget": 0.25, "history": 16, "decay": 0.8, "seed": 3}
THRESHOLDS = {"zscore": 0.1, "ratio": 1.0, "excess": 0.2, "entropy-gap": 2.0, "momentum": 4.5}
BUDGETED = [rule for rule in GATE_RULES if rule != "absolute"]
LONG = {"chunk": 16, "chunk_memory": 32, "cms_levels": (CMSLevel("fast", 16), CMSLevel("slow", 32))}
TITANS = {"variant": "titans", "window": 24}
BY_SPLITS = {
    "quantile": (GateConfig("quantile", **SHORT), {}),
    "zscore": (GateConfig("zscore", threshold=0.4), {}),
    "excess": (GateConfig("excess", budget=0.25), {}),
    "entropy-gap": (GateConfig("entropy-gap", threshold=2.0), {}),
    "assoc": (GateConfig("assoc", budget=0.25), {}),
    "momentum": (GateConfig("momentum", **SHORT), {}),
    "random": (GateConfig("random", budget=0.25), {}),
    "long chunks": (GateConfig("ratio", budget=0.25, history=40), LONG),
    "titans": (GateConfig("assoc", **SHORT), TITANS),
}
ACTIVE = ["hook_surprise", "hook_gate_score", "hook_gate", "blocks.*.hook_write_gate"]


@pytest.fixture
def tokens():
    return torch.randint(0, TOY.vocab_size, (3, 52), generator=torch.Generator().manual_seed(0))


def make(gate, seed=1, **changes):
    model = HopeModel(dataclasses.replace(TOY, gate=gate, **changes), seed=seed, dtype=torch.float64)
    if gate.rule == "excess":
        model.set_frequencies(UNIGRAM)
    return model


@torch.no_grad()
def seen_of(model, tokens, *more, **options):
    return model.run_with_cache(tokens, names_filter=[*ACTIVE, *more], allow_unfired=True, **options)


def expected(model, tokens, cache, row):
    """Scores and gates of a row, from its surprise and what else the run shows."""
    config, targets = model.config.gate, tokens[row, 1:]
    entropy = None
    if config.rule == "entropy-gap":
        with torch.no_grad():
            logits = model.norm(cache["blocks.1.hook_resid_post"][row]) @ model.embed.T
        entropy = gate_numpy.entropies(logits.numpy())
    score = gate_numpy.scores(
        config.rule,
        cache["hook_surprise"][row],
        config.decay,
        unigram=UNIGRAM[targets],
        entropy=entropy,
        tokens=targets,
        seed=config.seed,
    )
    threshold = model.config.surprise_threshold if config.rule == "absolute" else None
    return score, gate_numpy.decided(config, score, targets, threshold)


def check_rule(model, tokens):
    _, cache = seen_of(model, tokens, "blocks.1.hook_resid_post")
    for row in range(len(tokens)):
        score, gate = expected(model, tokens, cache, row)
        error = np.abs(cache["hook_gate_score"][row].numpy() - score)
        # The variance of a single value is a rounding, its root 1e-8: 1e-7 of the 0.1 that is added.
        exact = 2 if model.config.gate.rule == "zscore" else 0
        assert error[exact:].max() <= 1e-10
        assert (error / (1 + np.abs(score)))[:exact].max(initial=0.0) <= 1e-5
        assert cache["hook_gate"][row].tolist() == gate.tolist()
        assert 0 < gate.mean() < 1
        for name in ("selfmod", "cms.fast", "cms.slow"):
            for layer in range(2):
                written = cache[f"blocks.{layer}.{name}.hook_write_gate"][row]
                assert written.tolist() == gate[:48].tolist()


@pytest.mark.parametrize("options", [SHORT, {"budget": 0.25}], ids=["short-history", "default"])
@pytest.mark.parametrize("rule", [rule for rule in BUDGETED if rule != "assoc"])
def test_a_rule_with_a_budget_is_its_equations(rule, options, tokens):
    check_rule(make(GateConfig(rule, **options)), tokens)


@pytest.mark.parametrize("decay", [0.95, 0.5])
@pytest.mark.parametrize("rule", THRESHOLDS)
def test_a_rule_with_a_threshold_is_its_equations(rule, decay, tokens):
    check_rule(make(GateConfig(rule, threshold=THRESHOLDS[rule], decay=decay)), tokens)


def test_the_absolute_rule_compares_the_loss_with_tau(tokens):
    check_rule(make(GateConfig(), surprise_threshold=4.6), tokens)


def check_assoc(model, row):
    gate, mixer = model.config.gate, model.config.mechanisms[0]
    shown = [f"blocks.*.{mixer}.{name}" for name in ("*hook_fast_*", "hook_k", "hook_v")]
    _, cache = seen_of(model, row, *shown)
    scores = []
    for layer in range(2):
        scores.append(gate_numpy.assoc_scores(model, cache, layer))
        written = cache[f"blocks.{layer}.{mixer}.hook_write_gate"][0].tolist()
        assert written == gate_numpy.decided(gate, scores[-1], row[0, 1:])[: len(written)].tolist()
        assert 0.05 < np.mean(written) < 0.95
    assert np.abs(cache["hook_gate_score"][0].numpy() - np.mean(scores, axis=0)).max() <= 1e-10
    assert np.abs(scores[0] - scores[1]).min() > 0
    return cache


@pytest.mark.parametrize("threshold", [True, False], ids=["threshold", "budget"])
@pytest.mark.parametrize(
    ("changes", "middle"),
    [
        ({}, 0.22),
        (LONG, 0.22),
        (TITANS, 0.6),
        ({"objective": "dot"}, 0.9),
        ({"objective": "l2", "query": "static"}, 0.38),
        ({"variant": "no-self-mod"}, 0.13),
    ],
    ids=["full", "long-chunks", "titans", "dot", "l2-static", "no-self-mod"],
)
def test_assoc_gates_each_layer_by_the_gradient_of_its_own_losses(changes, middle, threshold, tokens):
    gate = GateConfig("assoc", threshold=middle) if threshold else GateConfig("assoc", **SHORT)
    cache = check_assoc(make(gate, **changes), tokens[:1])
    assert bool(cache["hook_gate"].all())
    if changes is not TITANS:
        assert bool(cache["blocks.0.cms.fast.hook_write_gate"].all())


@pytest.mark.parametrize("changes", [{}, TITANS], ids=["full", "titans"])
def test_assoc_follows_keys_that_were_edited(changes, tokens):
    """Which then have no unit norm."""
    model = make(GateConfig("assoc", **SHORT), **changes)
    with model.hooks(fwd_hooks=[("blocks.*.hook_k", lambda k, hook: 1.5 * k)]):
        check_assoc(model, tokens[:1])


@pytest.mark.parametrize(
    ("rule", "writes"),
    [(rule, writes) for rule in ("quantile", "absolute") for writes in ("all", "selfmod", "cms")]
    + [("assoc", "all"), ("assoc", "selfmod")],
)
def test_a_gate_for_one_mechanism_leaves_the_other_open(rule, writes, tokens):
    options = {} if rule == "absolute" else SHORT
    model = make(GateConfig(rule, writes=writes, **options), surprise_threshold=4.6)
    _, cache = seen_of(model, tokens)
    for layer in range(2):
        memories, *levels = (
            cache[f"blocks.{layer}.{name}.hook_write_gate"] for name in ("selfmod", "cms.fast", "cms.slow")
        )
        assert bool(memories.all()) == (writes == "cms")
        assert all(bool(level.all()) == (writes == "selfmod" or rule == "assoc") for level in levels)
        if rule != "assoc":
            gated = memories if writes == "selfmod" else levels[0]
            assert torch.equal(gated, cache["hook_gate"][:, :48])


# -- what a gate may not depend on -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_SPLITS)
def test_each_row_has_the_gates_of_its_own_run(name, tokens):
    gate, changes = BY_SPLITS[name]
    model = make(gate, **changes)
    out, together = seen_of(model, tokens)
    for row in range(3):
        alone_out, alone = seen_of(model, tokens[row : row + 1])
        assert all(torch.equal(together[n][row], alone[n][0]) for n in together if n.endswith("gate"))
        assert torch.allclose(out.losses[row], alone_out.losses[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BY_SPLITS)
@settings(max_examples=3, deadline=None)
@given(cuts=st.lists(st.integers(0, 52), max_size=6).map(sorted), split=st.sampled_from([1, 2, 3]))
def test_any_split_of_a_stream_gives_the_same_losses(name, cuts, split):
    gate, changes = BY_SPLITS[name]
    model = make(gate, **changes)
    tokens = torch.randint(0, TOY.vocab_size, (2, 52), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        state, pieces = model.init_state(2), []
        for start, stop in zip([0, *cuts], [*cuts, 52], strict=True):
            losses, state = model.feed(state, tokens[:, start:stop])
            pieces.append(losses)
        whole = model(tokens)
        assert torch.equal(torch.cat([*pieces, model.finalize(state)], 1), whole.losses)
        at = split * model.config.tick
        first = model(tokens[:, : at + 1])
        second = model(tokens[:, at:], state=first.state)
        assert torch.equal(torch.cat([first.losses, second.losses], 1), whole.losses)
    if whole.state.gate is not None:
        for mine, theirs in zip(whole.state.gate, second.state.gate, strict=True):
            assert torch.equal(mine.nan_to_num(9e9), theirs.nan_to_num(9e9))


@pytest.mark.parametrize("name", BY_SPLITS)
def test_a_token_changes_no_loss_and_no_gate_before_it(name, tokens):
    gate, changes = BY_SPLITS[name]
    model = make(gate, **changes)
    before_out, before = seen_of(model, tokens)
    for at in (5, 27, 46):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % TOY.vocab_size
        after_out, after = seen_of(model, changed)
        assert torch.equal(before_out.losses[:, : at - 1], after_out.losses[:, : at - 1])
        assert not torch.equal(before_out.losses[:, at - 1 :], after_out.losses[:, at - 1 :])
        for point in before:
            assert torch.equal(before[point][:, : at - 1], after[point][:, : at - 1]), point


@pytest.mark.parametrize("name", BY_SPLITS)
def test_padding_changes_nothing_of_other_rows_nor_before_it(name, tokens):
    gate, changes = BY_SPLITS[name]
    model = make(gate, **changes)
    garbage = tokens.clone()
    garbage[1, 20:] = 5
    whole, open_ended = seen_of(model, tokens)
    out, cut = seen_of(model, garbage, lengths=torch.tensor([51, 19, 51]))
    for row in (0, 2):
        assert torch.allclose(out.losses[row], whole.losses[row], rtol=0, atol=1e-12)
        assert all(torch.equal(cut[n][row], open_ended[n][row]) for n in cut if n.endswith("gate"))
    assert torch.allclose(out.losses[1, :19], whole.losses[1, :19], rtol=0, atol=1e-12)
    assert torch.equal(cut["hook_gate"][1, :19], open_ended["hook_gate"][1, :19])
    assert not cut["hook_gate"][1, 19:].any()
    ended = 19 // model.config.tick * model.config.tick
    assert not any(cut[n][1, ended:].any() for n in cut if n.endswith("hook_write_gate"))


def test_chance_does_not_look_at_the_loss(tokens):
    gate = GateConfig("random", budget=0.25)
    (_, one), (_, other) = (seen_of(make(gate, seed), tokens) for seed in (1, 2))
    assert not torch.allclose(one["hook_surprise"], other["hook_surprise"])
    assert all(torch.equal(one[n], other[n]) for n in one if n.endswith("gate") or n == "hook_gate_score")
    _, reseeded = seen_of(make(dataclasses.replace(gate, seed=1)), tokens)
    assert not torch.equal(one["hook_gate"], reseeded["hook_gate"])


@pytest.mark.parametrize("rule", BUDGETED)
def test_a_loss_that_is_not_a_number_disturbs_no_other_row(rule, tokens):
    model = make(GateConfig(rule, **SHORT))

    def spoil(x, hook):
        x = x.clone()
        if model.spoiled == 2:
            x[1, 3] = float("nan")
        model.spoiled += 1
        return x

    model.spoiled = 0
    clean_out, clean = seen_of(model, tokens)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", spoil)]):
        out, cache = seen_of(model, tokens)
    assert bool(cache["hook_surprise"][1, 19].isnan())
    for row in (0, 2):
        assert torch.allclose(out.losses[row], clean_out.losses[row], rtol=0, atol=1e-12)
        assert all(torch.equal(cache[n][row], clean[n][row]) for n in cache if n.endswith("gate"))
    if rule not in ("random", "assoc"):  # which do not look at the loss
        assert not cache["hook_gate"][1, 19]


# -- what is written under a gate --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "changes"),
    [
        (GateConfig("quantile", **SHORT), {}),
        (GateConfig("quantile", writes="selfmod", **SHORT), {}),
        (GateConfig("quantile", writes="cms", **SHORT), {}),
        (GateConfig("assoc", **SHORT), {}),
        (GateConfig("zscore", budget=0.25), TITANS),
    ],
    ids=["all", "selfmod", "cms", "assoc", "titans"],
)
def test_gated_writes_are_those_of_the_reference(gate, changes, tokens):
    model = make(gate, **changes)
    row, total = tokens[0, :34], 33
    mixer = "titans" if changes else "selfmod"
    out, cache = model.run_with_cache(row[None], names_filter=ACTIVE)

    def shown(name):
        return torch.cat([cache[name][0], torch.zeros(total % 8, dtype=torch.float64)])

    memories = torch.stack([shown(f"blocks.{i}.{mixer}.hook_write_gate") for i in range(2)])
    levels = memories[0] if changes else shown("blocks.0.cms.fast.hook_write_gate")
    assert 0 < (levels if gate.writes == "cms" else memories).mean() < 0.6
    out.losses.sum().backward()
    fast = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    losses, _ = reference_losses(model, row, ReferenceGates(memories, levels))
    losses.sum().backward()
    assert (out.losses[0] - losses).abs().max() <= 1e-11
    with torch.no_grad():  # where work is skipped, also beside rows that are open elsewhere
        assert (model(tokens[:, :34]).losses[0] - losses).abs().max() <= 1e-11
    for name, parameter in model.named_parameters():
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        got = torch.zeros_like(parameter) if fast[name] is None else fast[name]
        assert (got - want).abs().max() <= 1e-12 * want.abs().max().clamp_min(1e-9), name


def test_the_reference_with_other_gates_gives_other_losses(tokens):
    model = make(GateConfig("quantile", **SHORT))
    row = tokens[0, :18]
    with torch.no_grad():
        fast = model(row[None]).losses[0]
    everything = torch.ones(17, dtype=torch.float64)
    losses, _ = reference_losses(model, row, ReferenceGates(everything.expand(2, -1), everything))
    assert (losses - fast).abs().max() > 1e-6


# -- straight through --------------------------------------------------------------------------------------------


def gate_of(rule, position=0, **options):
    """A gate alone after `position` tokens of two streams, what the next tick shows it, and the past of row 0."""
    rng = torch.Generator().manual_seed(7)
    surprise = 4 * torch.rand(2, position + 16, dtype=torch.float64, generator=rng)
    targets = torch.randint(0, 37, surprise.shape, generator=rng)
    gate = Gate(GateConfig(rule, straight_through=True, **options), 2.0, 2)
    state = gate.init_state(2, surprise)

    def shown(part):
        return Seen(surprise[:, part], targets[:, part], UNIGRAM[targets[:, part]], None, None)

    if position:
        state = gate.decide(shown(slice(0, position)), state, 0).state
    return gate, state, shown(slice(position, None)), surprise[0].numpy(), targets[0]


@pytest.mark.parametrize("position", [0, 24])
@pytest.mark.parametrize("rule", ["zscore", "ratio", "excess", "momentum", "absolute"])
def test_a_straight_through_gradient_is_the_sigmoid_s(rule, position):
    options = {} if rule == "absolute" else {"threshold": {"momentum": 2.0}.get(rule, THRESHOLDS.get(rule))}
    gate, state, seen, surprise, targets = gate_of(rule, position, temperature=0.7, decay=0.9, **options)
    leaf = seen.surprise.clone().requires_grad_()
    soft = gate.decide(seen, state, position, leaf)
    hard = gate.decide(seen, state, position)
    assert torch.equal(soft.gate, hard.gate)
    assert 0 < hard.gate.mean() < 1
    (found,) = torch.autograd.grad(soft.gate.sum(), leaf)
    score = gate_numpy.scores(rule, surprise, 0.9, unigram=UNIGRAM[targets])
    share = expit((score - gate.threshold) / 0.7)
    want = share * (1 - share) / 0.7 * gate_numpy.slopes(rule, surprise, 0.9)
    assert np.abs(found[0].numpy() - want[position:])[2:].max() <= 1e-12
    assert np.abs(found[0].numpy() - want[position:]).max() <= 1e-5


def test_with_a_budget_the_sigmoid_turns_where_the_budget_s_share_of_the_past_lies():
    gate, state, seen, surprise, _ = gate_of("quantile", 24, budget=0.25, history=16, temperature=0.7)
    leaf = seen.surprise.clone().requires_grad_()
    (found,) = torch.autograd.grad(gate.decide(seen, state, 24, leaf).gate.sum(), leaf)
    share = expit((surprise[24:] - np.quantile(surprise[8:24], 0.75)) / 0.7)
    assert np.abs(found[0].numpy() - share * (1 - share) / 0.7).max() <= 1e-12


def test_a_token_without_a_target_has_no_gradient():
    gate, state, seen, *_ = gate_of("zscore", 24, threshold=0.4)
    seen = seen._replace(targets=torch.where(torch.arange(16) < 10, seen.targets, -1))
    leaf = seen.surprise.clone().requires_grad_()
    (found,) = torch.autograd.grad(gate.decide(seen, state, 24, leaf).gate.sum(), leaf)
    assert bool(found[:, :10].all())
    assert not found[:, 10:].any()


@pytest.mark.parametrize(
    ("gate", "changes"),
    [
        (GateConfig("zscore", threshold=0.4), {}),
        (GateConfig("quantile", **SHORT), {}),
        (GateConfig("ratio", threshold=1.0), TITANS),
    ],
    ids=["threshold", "budget", "titans"],
)
def test_straight_through_changes_gradients_and_no_value(gate, changes, tokens):
    row, grads, losses = tokens[:, :34], [], []
    for straight_through in (False, True):
        model = make(dataclasses.replace(gate, straight_through=straight_through), **changes)
        losses.append(model(row).losses)
        losses[-1].sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*losses)
    assert all(bool(g.isfinite().all()) for g in grads[1].values())
    assert max(float((grads[1][n] - g).abs().max()) for n, g in grads[0].items()) > 1e-6


def test_the_gate_s_gradient_reaches_weights_as_the_loss_s_does(tokens):
    """dg/dw = sigma' slope / T ds/dw; excess has slope 1, so the factor is the score's alone."""
    model = make(GateConfig("excess", threshold=-0.1, straight_through=True, temperature=0.7))
    out, cache = model.run_with_cache(tokens[:1], names_filter=ACTIVE, detach=False)
    weight = model.blocks[0].selfmod.conv
    for t in (0, 11, 22):
        share = expit((float(cache["hook_gate_score"][0, t]) + 0.1) / 0.7)
        (of_gate,) = torch.autograd.grad(cache["hook_gate"][0, t], weight, retain_graph=True)
        (of_loss,) = torch.autograd.grad(out.losses[0, t], weight, retain_graph=True)
        assert bool(of_gate.any())
        assert torch.allclose(of_gate, share * (1 - share) / 0.7 * of_loss, rtol=1e-10, atol=1e-14)


def test_a_loss_that_is_not_a_number_has_a_closed_gate_straight_through_too():
    gate, state, seen, *_ = gate_of("zscore", 24, threshold=0.4)
    surprise = seen.surprise.clone()
    surprise[0, 9] = float("nan")
    leaf = surprise.clone().requires_grad_()
    found = gate.decide(seen._replace(surprise=surprise), state, 24, leaf).gate
    assert not found[0, 0, 9]


def test_a_straight_through_gradient_reaches_a_chunk_that_is_closed(tokens):
    """Else it would depend on the other rows of a batch, and on the device."""
    gate = GateConfig(straight_through=True, temperature=9.0)
    found = []
    for one in (gate, GateConfig()):
        model = make(one, surprise_threshold=20.0)
        model(tokens[:, :18]).losses.sum().backward()
        found.append(model.blocks[0].norm.weight.grad)
    assert not torch.equal(*found)


# -- configurations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rule": "oracle"}, "no model can gate by it: the probe relative-surprise"),
        ({"rule": "quantil", "budget": 0.1}, "gate rule is 'quantil'.*did you mean 'quantile'"),
        ({"rule": "absolute", "budget": 0.1}, "'quantile' writes a budget of the same surprise"),
        ({"rule": "absolute", "threshold": 0.1}, "is surprise_threshold"),
        ({"rule": "quantile"}, "'quantile' needs a budget"),
        ({"rule": "random"}, "'random' needs a budget"),
        ({"rule": "quantile", "threshold": 1.0}, "'quantile' needs a budget"),
        ({"rule": "random", "budget": 0.1, "threshold": 1.0}, "'random' needs a budget"),
        ({"rule": "zscore"}, "'zscore' needs a budget or a threshold, one of the two"),
        ({"rule": "assoc", "budget": 0.1, "threshold": 1.0}, "one of the two"),
        ({"rule": "quantile", "budget": 0}, "budget is 0, must be above 0 and at most 1"),
        ({"rule": "quantile", "budget": -0.1}, "budget is -0.1"),
        ({"rule": "quantile", "budget": 1.5}, "budget is 1.5"),
        ({"rule": "quantile", "budget": float("nan")}, "budget is nan"),
        ({"rule": "momentum", "budget": 0.1, "decay": 1}, "decay is 1, must lie between 0 and 1"),
        ({"rule": "momentum", "budget": 0.1, "decay": 0.0}, "decay is 0.0"),
        ({"rule": "quantile", "budget": 0.1, "history": 0}, "history is 0, must be above zero"),
        ({"rule": "quantile", "budget": 0.1, "history": 16.0}, "history is 16.0, must be a whole number"),
        ({"rule": "random", "budget": 0.1, "seed": 0.5}, "seed is 0.5, must be a whole number"),
        (
            {"rule": "random", "budget": 0.1, "seed": 2**63},
            "seed is a whole number of 64 bits, must be at most",
        ),
        ({"rule": "quantile", "budget": 0.1, "history": 10**5000}, "history is a whole number of 16610 bits"),
        ({"temperature": 0.0}, "temperature is 0.0, must be above zero"),
        ({"writes": "cmss"}, "gate writes is 'cmss'.*did you mean 'cms'"),
        ({"rule": "assoc", "budget": 0.1, "straight_through": True}, "a rule on the loss, not 'assoc'"),
        ({"rule": "random", "budget": 0.1, "straight_through": True}, "a rule on the loss, not 'random'"),
    ],
)
def test_gates_that_cannot_work(values, message):
    with pytest.raises(BadInputError, match=message):
        GateConfig(**values)


@pytest.mark.parametrize(
    ("gate", "changes", "message"),
    [
        (GateConfig("quantile", 0.1), {"variant": "transformer"}, "'transformer' writes nothing"),
        (GateConfig("quantile", 0.1), {"variant": "transformer-matched"}, "writes nothing"),
        (GateConfig("quantile", 0.1), {"variant": "no-surprise"}, "lets every token pass"),
        (GateConfig(writes="cms"), {"variant": "no-cms"}, "'no-cms' has no writes of 'cms'"),
        (GateConfig("ratio", 0.1, writes="cms"), {"variant": "static-mlp"}, "no writes of 'cms'"),
        (GateConfig("ratio", 0.1, writes="titans"), {}, "'full' has no writes of 'titans'"),
        (GateConfig("ratio", 0.1, writes="selfmod"), {"variant": "titans"}, "no writes of 'selfmod'"),
        (GateConfig("assoc", 0.1, writes="cms"), {}, "'assoc' gates memories by their own loss"),
        (GateConfig("assoc", 0.1), {"variant": "hope-attention"}, "'assoc' gates memories"),
        (GateConfig("assoc", 0.1), {"variant": "frozen-memory"}, "'assoc' gates memories"),
        ({"rule": "quantile", "budgets": 0.1}, {}, "unknown key 'budgets' in GateConfig.*'budget'"),
        (0.1, {}, "GateConfig is made from a mapping"),
    ],
)
def test_gates_that_do_not_fit_their_model(gate, changes, message):
    with pytest.raises(BadInputError, match=message):
        dataclasses.replace(TOY, gate=gate, **changes)


def test_excess_needs_frequencies(tokens):
    model = HopeModel(dataclasses.replace(TOY, gate=GateConfig("excess", 0.1)), seed=1, dtype=torch.float64)
    with pytest.raises(BadInputError, match=r"needs token frequencies.*set_frequencies"):
        model(tokens)
    with pytest.raises(BadInputError, match=r"must be \(37,\) finite numbers"):
        model.set_frequencies(UNIGRAM[:-1])
    with pytest.raises(BadInputError, match="finite"):
        model.set_frequencies(UNIGRAM.clone().fill_(torch.inf))
    model.set_frequencies(UNIGRAM)
    model(tokens)
    with pytest.raises(BadInputError, match="'quantile' does not ask"):
        make(GateConfig("quantile", 0.1)).set_frequencies(UNIGRAM)


def test_a_default_gate_is_left_out_of_plain_data():
    assert "gate" not in TOY.to_dict()
    assert "gate" in dataclasses.replace(TOY, gate=GateConfig(writes="selfmod")).to_dict()
    assert from_dict(ModelConfig, TOY.to_dict()).gate == GateConfig()


@given(
    st.one_of(
        st.builds(
            GateConfig,
            rule=st.sampled_from(BUDGETED),
            budget=st.floats(0.01, 1.0),
            writes=st.sampled_from(["all", "selfmod"]),
            decay=st.floats(0.1, 0.99),
            history=st.integers(1, 999),
            seed=st.integers(0, 2**40),
        ),
        st.builds(
            GateConfig,
            rule=st.sampled_from(["zscore", "ratio", "momentum"]),
            threshold=st.floats(-3, 3),
            straight_through=st.booleans(),
            temperature=st.floats(0.1, 9.0),
        ),
    )
)
def test_a_gate_round_trips_as_plain_data_and_as_json(gate):
    config = dataclasses.replace(TOY, gate=gate)
    assert from_dict(ModelConfig, config.to_dict()) == config
    assert from_dict(ModelConfig, json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_threshold_on_the_loss_remembers_nothing(name):
    model = HopeModel(CONFIGS[name], seed=None)
    assert model.init_state(2).gate is None
