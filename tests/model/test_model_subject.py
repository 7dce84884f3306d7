"""Our model as probes see it: through `hopeprobe.load`, with everything the contract promises."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from model_toys import CONFIGS, TOY, differences

import hopeprobe
from hopeprobe.errors import BadInputError
from hopeprobe.model.checkpoint import read, save, step_path
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.subject import HopeSubject
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.subject import GateRule, MissingCapability, Subject
from hopeprobe.tokens import TokenData

TOKENS = torch.randint(0, 37, (3, 30), generator=torch.Generator().manual_seed(0))
RNG = np.random.default_rng(0)
DATA = TokenData.from_documents(
    [RNG.integers(0, 36, 30) for _ in range(30)], name="toy", vocab_size=37, end_of_text=36
)
CONFIG = dataclasses.replace(TOY, context=16)
LONG = CONFIGS["long-chunks"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    train(
        CONFIG, TrainConfig(steps=3, batch=2, seed=5, learning_rate=0.05, warmup=0, eval_every=9), DATA, path
    )
    return path


@pytest.fixture
def subject(folder):
    return hopeprobe.load(str(step_path(folder, 3)))


def made(config=TOY):
    return HopeSubject(HopeModel(config, 1, torch.float64))


def changed(folder, where, step=3, **values):
    """A copy of one checkpoint in another folder, with other fields."""
    where.mkdir(exist_ok=True)
    save(step_path(where, step), dataclasses.replace(read(step_path(folder, step)), **values))
    return step_path(where, step)


def weights(subject):
    return {k: v.clone() for k, v in subject.module.state_dict().items()}


def same_weights(one, other):
    return all(torch.equal(v, other[k]) for k, v in one.items()) and one.keys() == other.keys()


def test_what_is_loaded(subject, folder):
    assert isinstance(subject, Subject)
    assert isinstance(subject, HopeSubject)
    assert subject.name == "step-000003.pt"
    assert subject.path == step_path(folder, 3)
    assert (subject.trained_steps, subject.seed, subject.context, subject.tick, subject.vocab_size) == (
        3,
        5,
        16,
        8,
        37,
    )
    assert (subject.tokenizer, subject.dtype) == ("gpt2", "float32")
    assert subject.checkpoint.optimizer is None  # probes have no use for its memory
    assert same_weights(weights(subject), read(step_path(folder, 3)).weights)


def test_a_run_of_windows(subject):
    out = subject.run(TOKENS, torch.tensor([29, 10, 0]))
    assert out.losses.shape == out.scored.shape == (3, 29)
    assert out.scored.sum(1).tolist() == [29, 10, 0]
    assert not out.losses.requires_grad
    assert not out.losses[~out.scored].any()
    with torch.no_grad():
        whole = subject.module(TOKENS)
    # Rows that have ended are left out of products, which moves the last bits of others.
    torch.testing.assert_close(out.losses[0], whole.losses[0], rtol=0, atol=1e-5)
    ended, full = (each.layers[0].cms[0].w_in[0] for each in (out.state, whole.state))
    torch.testing.assert_close(ended, full, rtol=0, atol=1e-6)


def test_a_step(subject):
    state = subject.init_state(3)
    losses, state = subject.step(state, TOKENS[:, :8], TOKENS[:, 8])
    assert torch.allclose(losses.detach(), subject.run(TOKENS[:, :9]).losses, rtol=1e-6)
    assert state.position == 8


def test_the_loss_is_a_mean_over_scored_tokens(subject):
    lengths = torch.tensor([29, 10, 0])
    loss = subject.loss(TOKENS, lengths)
    out = subject.run(TOKENS, lengths)
    assert torch.isclose(loss.detach(), out.losses[out.scored].mean())
    loss.backward()
    assert all(p.grad is not None for p in subject.module.parameters())


def test_the_training_record(subject, folder):
    record = subject.training()
    assert record["steps"] == 3
    assert record["learning_rate"] == 0.05
    assert record["keys"] == len(subject.module.state_dict())
    assert record["data"]["fingerprint"] == DATA.fingerprint
    assert [p.name for p in subject.siblings()] == [f"step-00000{s}.pt" for s in (0, 1, 2, 3)]
    assert made().training() == {"steps": 0, "keys": len(made().module.state_dict())}


def test_identity_is_of_the_computation_and_not_of_the_weights(subject, folder):
    assert subject.identity() == hopeprobe.load(step_path(folder, 0)).identity()
    assert subject.identity()["config"] == CONFIG.to_dict()
    assert subject.identity() != made(CONFIG).identity()  # float64
    assert made(LONG).identity() != made().identity()


# -- initial weights ----------------------------------------------------------------------------------------------


def test_its_own_initial_weights_are_rebuilt(subject, folder):
    init = subject.own_init()
    assert same_weights(weights(init), read(step_path(folder, 0)).weights)
    assert not same_weights(weights(init), weights(subject))
    assert init.path is None
    assert init.trained_steps == 0
    assert init.own_init() is init


def test_they_need_no_sibling(folder, tmp_path):
    alone = hopeprobe.load(changed(folder, tmp_path))
    assert same_weights(weights(alone.own_init()), read(step_path(folder, 0)).weights)


def test_the_sibling_serves_where_they_cannot_be_rebuilt(folder, tmp_path):
    """As when another version of PyTorch draws other numbers: here another seed stands in the file."""
    changed(folder, tmp_path, 0, seed=6)
    init = hopeprobe.load(changed(folder, tmp_path, seed=6)).own_init()
    assert init.path == step_path(tmp_path, 0)
    assert same_weights(weights(init), read(step_path(folder, 0)).weights)


@pytest.mark.parametrize("sibling", ["none", "another run's", "damaged", "foreign"])
def test_without_either_the_capability_is_missing(folder, tmp_path, sibling):
    first = step_path(tmp_path, 0)
    if sibling == "another run's":
        other = {k: v + 1 for k, v in read(step_path(folder, 0)).weights.items()}
        changed(folder, tmp_path, 0, weights=other)
    elif sibling == "damaged":
        first.write_bytes(step_path(folder, 0).read_bytes()[:500])
    elif sibling == "foreign":
        torch.save({"weight": torch.zeros(3)}, first)
    subject = hopeprobe.load(changed(folder, tmp_path, seed=6))
    with pytest.raises(
        MissingCapability,
        match=r"cannot be rebuilt from seed 6.*no step-0 checkpoint.*put the run's step-000000",
    ):
        subject.own_init()


def test_reinitialised(subject):
    one, again, two = (subject.reinitialised(s) for s in (1, 1, 2))
    assert same_weights(weights(one), weights(again))
    assert not same_weights(weights(one), weights(two))
    assert (one.trained_steps, one.seed, one.path, one.dtype) == (0, 1, None, "float32")
    assert one.module.config == subject.module.config
    with pytest.raises(MissingCapability, match="no run"):
        one.siblings()


# -- rows of a state ----------------------------------------------------------------------------------------------


def streamed(subject):
    """Three streams with tokens, chunks and accumulated gradients pending."""
    with torch.no_grad():
        return subject.module.feed(subject.init_state(3), TOKENS)[1]


def fast(subject, state):
    """Differences of fast to meta weights."""
    out = []
    for block, layer in zip(subject.module.blocks, state.layers, strict=True):
        out += [t for group in differences(block.selfmod, layer.selfmod) for t in group]
        out += [t for lv in layer.cms for t in (lv.w_in, lv.w_out)]
    return out


def rest(state):
    out = [state.pending]
    for layer in state.layers:
        out.append(layer.selfmod.conv_tail)
        out += [t for held in layer.selfmod.pending for ticks in held for t in ticks]
        out += [t for lv in layer.cms for t in lv[2:]]
    return out


def test_resetting_rows():
    subject = made(LONG)
    state = streamed(subject)
    reset = subject.reset_rows(state, [0, 2])
    assert any(t.any() for t in fast(subject, state))
    for new, old in zip(fast(subject, reset), fast(subject, state), strict=True):
        assert not new[[0, 2]].any()
        assert torch.equal(new[1], old[1])
    assert all(torch.equal(a, b) for a, b in zip(rest(reset), rest(state), strict=True))
    assert reset.position == state.position
    untouched = subject.reset_rows(state, [])
    assert all(torch.equal(a, b) for a, b in zip(fast(subject, untouched), fast(subject, state), strict=True))


def test_resetting_a_row_that_is_not_finite():
    subject = made()
    state = streamed(subject)
    change = state.layers[0].cms[0].change_in
    (change.dense if change.dense.shape[1] else change.left)[1, 0, 0] = float("nan")
    reset = subject.reset_rows(state, [1])
    assert all(t.isfinite().all() for t in fast(subject, reset))
    assert torch.equal(reset.layers[0].cms[0].w_in[[0, 2]], state.layers[0].cms[0].w_in[[0, 2]])


def test_averaging_rows():
    subject = made(LONG)
    state = streamed(subject)
    matrix = torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    averaged = subject.average_rows(state, matrix)
    for new, old in zip(fast(subject, averaged), fast(subject, state), strict=True):
        # Differences of numbers up to 1 are rounded as those are.
        assert torch.allclose(new[0], (old[1] + old[2]) / 2, rtol=1e-14, atol=1e-15)
        assert torch.equal(new[2], old[2])
    assert all(torch.equal(a, b) for a, b in zip(rest(averaged), rest(state), strict=True))


def test_selecting_rows():
    subject = made(LONG)
    state = streamed(subject)
    for new, old in zip(
        [*fast(subject, subject.select_rows(state, (2, 0))), *rest(subject.select_rows(state, (2, 0)))],
        [*fast(subject, state), *rest(state)],
        strict=True,
    ):
        assert torch.equal(new, old[[2, 0]])


# -- what it is made of -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "published", "transformer"])
def test_parameter_groups_cover_every_parameter_once(name):
    config = dataclasses.replace(TOY, variant="transformer") if name == "transformer" else CONFIGS[name]
    subject = made(config)
    groups = subject.parameter_groups()
    named = [(n, p) for group in groups.values() for n, p in group.items()]
    assert sorted(n for n, _ in named) == sorted(n for n, _ in subject.module.named_parameters())
    assert all(p is subject.module.get_parameter(n) for n, p in named)
    mechanisms = {"attention", "mlp"} if name == "transformer" else {"selfmod", "cms"}
    assert set(groups) == {"embed", "norm"} | mechanisms
    assert all(f".{m}." in n for m in mechanisms for n in groups[m])
    assert all("norm" in n for n in groups["norm"])


@pytest.mark.parametrize("name", ["default", "static-query", "three-levels"])
def test_meta_weights_are_what_the_fast_weights_start_from(name):
    subject = made(CONFIGS[name])
    meta = subject.meta_weights()
    points = {n: p for n, p in subject.module.hook_dict.items() if ".hook_fast_" in n}
    assert set(meta) == set(points)
    assert not any(t.requires_grad for t in meta.values())
    # A write whose step is nothing leaves them: every gate open by a part in 10^300.
    tiny = [("blocks.*.hook_write_gate", lambda g, hook: g * 1e-300)]
    tokens = torch.cat([TOKENS, TOKENS], 1)
    with torch.no_grad(), subject.module.hooks(fwd_hooks=tiny):
        _, cache = subject.module.run_with_cache(tokens, names_filter=list(points))
    for name in meta:
        assert torch.equal(cache[name][:, -1], meta[name].expand_as(cache[name][:, -1])), name


def test_write_periods():
    assert made(LONG).write_periods() == {
        "selfmod.memory": 32, "selfmod.q": 16, "selfmod.k": 16, "selfmod.v": 16, "selfmod.eta": 16,
        "selfmod.alpha": 16, "cms.fast": 8, "cms.slow": 32,
    }  # fmt: skip
    assert "selfmod.q" not in made(CONFIGS["static-query"]).write_periods()


@pytest.mark.parametrize("name", ["default", "long-chunks", "three-levels"])
def test_write_periods_are_those_observed(name):
    subject = made(CONFIGS[name])
    tokens = torch.randint(0, 37, (1, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, cache = subject.module.run_with_cache(tokens, names_filter="*.hook_fast_*")
    for mechanism, period in subject.write_periods().items():
        points = [n for n in cache if n.startswith(f"blocks.1.{mechanism}.")]
        assert points
        assert all(cache[n].shape[1] == 64 // period for n in points)


def test_a_transformer_says_what_it_lacks():
    subject = made(dataclasses.replace(TOY, variant="transformer"))
    assert subject.write_periods() == {}
    assert list(subject.freeze_hooks()) == []
    assert subject.tick == subject.context
    with pytest.raises(MissingCapability, match="no fast weights"):
        subject.meta_weights()
    state = subject.module.feed(subject.init_state(3), TOKENS)[1]
    assert subject.reset_rows(state, [0]).layers[0].attention is state.layers[0].attention
    swapped = subject.select_rows(state, [1, 0, 2])
    assert torch.equal(swapped.pending, state.pending[[1, 0, 2]])


def test_freezing(subject):
    with subject.module.hooks(fwd_hooks=subject.freeze_hooks()):
        frozen = subject.run(TOKENS)
    assert not any(t.any() for t in fast(subject, frozen.state))


@pytest.mark.parametrize(
    ("mechanism", "names"),
    [("selfmod", ["selfmod"]), ("cms", ["cms.fast", "cms.slow"]), ("cms.slow", ["cms.slow"])],
)
def test_freezing_one_mechanism_closes_its_gates_and_no_other(subject, mechanism, names):
    with subject.module.hooks(fwd_hooks=subject.freeze_hooks(mechanism)) as handle:
        state = subject.run(TOKENS.repeat(1, 2)).state  # long enough for the slow level
    assert sorted(handle.fired) == sorted(f"blocks.{i}.{n}.hook_write_gate" for i in range(2) for n in names)
    for block, layer in zip(subject.module.blocks, state.layers, strict=True):
        moved = {f"cms.{n}": bool(lv.w_in.any()) for n, lv in zip(("fast", "slow"), layer.cms, strict=True)}
        moved["selfmod"] = any(bool(t.any()) for t in differences(block.selfmod, layer.selfmod)[0])
        assert moved == {name: name not in names for name in ("cms.fast", "cms.slow", "selfmod")}


def test_another_gate_while_a_context_lasts(subject):
    tokens = torch.randint(0, subject.vocab_size, (2, 65), generator=torch.Generator().manual_seed(0))
    before = subject.run(tokens).losses
    equation = subject.module.hook_dict["hook_gate"].spec.equation
    with subject.gated(GateRule("random", 0.1)):
        inside = subject.run(tokens).losses
    assert not torch.equal(inside, before)
    assert torch.equal(subject.run(tokens).losses, before)
    with pytest.raises(RuntimeError), subject.gated(GateRule("random", 0.1)):
        raise RuntimeError
    assert torch.equal(subject.run(tokens).losses, before)
    other = subject.with_gate(GateRule("random", 0.1))
    assert torch.equal(other.run(tokens).losses, inside)
    assert torch.equal(subject.run(tokens).losses, before)
    assert other.module.hook_dict["hook_gate"].spec.equation != equation
    assert other.identity() != subject.identity()
    # Its initial weights are gated so too: a null of another gate would be of another computation.
    assert other.own_init().module.config.gate.rule == "random"
    assert other.reinitialised(5).module.config.gate.rule == "random"


def test_token_frequencies_go_where_the_gate_goes(subject):
    surprisal = torch.linspace(1.0, 9.0, subject.vocab_size, dtype=torch.float64)
    with pytest.raises(BadInputError, match="needs token frequencies"):
        subject.with_gate(GateRule("excess", 0.2))
    other = subject.with_gate(GateRule("excess", 0.2), surprisal)
    for one in (other, other.own_init(), other.reinitialised(3)):
        assert torch.allclose(one.module.unigram.double(), surprisal, atol=1e-6)
    assert subject.module.unigram is None
    again = other.with_gate(GateRule("quantile", 0.2))
    assert again.module.unigram is None


def test_rules_are_offered_for_what_there_is_to_gate():
    def offered(variant):
        return HopeSubject(HopeModel(dataclasses.replace(TOY, variant=variant), seed=0)).gate_rules()

    assert offered("full")["zscore"] == ["selfmod", "cms", "all"]
    assert offered("full")["assoc"] == ["selfmod"]
    assert offered("no-cms") == {rule: ["all"] for rule in offered("full")}
    assert "assoc" not in offered("hope-attention")
    assert offered("titans")["assoc"] == ["all"]
    for variant in ("transformer", "no-surprise"):
        with pytest.raises(MissingCapability, match="gate that could follow another rule"):
            offered(variant)


def test_a_mechanism_that_has_no_gate_of_its_own_is_missing(subject):
    with pytest.raises(MissingCapability, match=r"'cms\.fats' alone.*did you mean 'cms.fast'"):
        subject.freeze_hooks("cms.fats")
    with pytest.raises(MissingCapability, match=r"'selfmod\.k' alone"):
        subject.freeze_hooks("selfmod.k")
    with pytest.raises(MissingCapability, match="'cms' alone"):
        made(dataclasses.replace(TOY, variant="transformer")).freeze_hooks("cms")


def test_a_run_continues_from_a_state(subject):
    length = TOKENS.shape[1] - 1
    lengths = torch.tensor([length, length - 3, 5])
    whole = subject.run(TOKENS, lengths)
    first = subject.run(TOKENS[:, :9], lengths.clamp(max=8))
    before = [t.clone() for t in fast(subject, first.state)]
    rest = subject.run(TOKENS[:, 8:], (lengths - 8).clamp(min=0), first.state)
    assert torch.equal(torch.cat([first.losses, rest.losses], 1), whole.losses)
    assert torch.equal(torch.cat([first.scored, rest.scored], 1), whole.scored)
    assert all(
        torch.equal(a, b) for a, b in zip(fast(subject, rest.state), fast(subject, whole.state), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(fast(subject, first.state), before, strict=True))


def test_a_folder_is_no_checkpoint(folder, tmp_path):
    with pytest.raises(BadInputError, match=r"is a folder; name a checkpoint in it.*step-000003\.pt"):
        hopeprobe.load(folder)
    with pytest.raises(BadInputError, match=rf"for instance {tmp_path / 'runs' / 'b'}/step-000001\.pt$"):
        hopeprobe.load(runs_in(tmp_path / "runs"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match=r"empty is a folder; there is no \.pt file in it$"):
        hopeprobe.load(tmp_path / "empty")


def runs_in(folder):
    for name in ("a/step-000002.pt", "b/step-000000.pt", "b/step-000001.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_logits_are_those_that_the_next_tick_is_scored_by_and_nothing_is_written():
    subject = made(LONG)
    tick = subject.tick
    state = subject.run(TOKENS[:, : 2 * tick + 1]).state
    before = copy.deepcopy(state)
    tokens, targets = TOKENS[:, 2 * tick : 3 * tick], TOKENS[:, 2 * tick + 1 : 3 * tick + 1]
    fired = []
    with subject.module.hooks([("hook_embed", lambda x, hook: fired.append(x.shape[1]))]):
        logits = subject.logits(state, tokens)
        few = subject.logits(state, tokens[:, :2])
    assert fired == [tick, 2]
    assert not logits.requires_grad
    losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    scored, _ = subject.step(state, tokens, targets[:, -1])
    torch.testing.assert_close(losses, scored.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(few, logits[:, :2], rtol=0, atol=1e-12)
    assert all(map(torch.equal, tensors_of(before), tensors_of(state)))
    with pytest.raises(BadInputError, match=f"a tick at a time, {tick} tokens, not {tick + 1}"):
        subject.logits(state, TOKENS[:, : tick + 1])
    with pytest.raises(BadInputError, match="unfinished tick"):
        subject.logits(state._replace(pending=TOKENS[:, :1]), tokens)
    assert before.position == state.position == 2 * tick


def tensors_of(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [t for part in state for t in tensors_of(part)] if isinstance(state, tuple) else []


def test_what_fast_weights_decay_towards_is_told_of_those_that_decay():
    memories = {f"selfmod.{name}" for name in ("memory", "q", "k", "v", "eta", "alpha")}
    assert made().decay_target() == dict.fromkeys(memories, "init")
    zero = made(dataclasses.replace(TOY, decay_target="zero", query="static"))
    assert zero.decay_target() == dict.fromkeys(memories - {"selfmod.q"}, "zero")
    assert made(dataclasses.replace(TOY, variant="transformer")).decay_target() == {}
    with pytest.raises(MissingCapability, match="declared decay"):
        Subject.decay_target(made())
