"""The adapter: what runs is the package's own streaming training, a row at a time, and what it says of itself holds."""

import copy
import shutil

import pytest
from peer_toys import VOCAB, changed, train

from hopeprobe.errors import BadInputError
from hopeprobe.subject import MissingCapability, load

pytestmark = pytest.mark.peers


MEMORIES = ("k", "v", "q", "eta", "alpha", "memory")


def make(seed=0, **parts):
    from nested_learning_subject import NestedLearningSubject

    return NestedLearningSubject(changed(**parts), seed=seed)


def package_stream(model, row, tick, per_layer=False, metric=None):
    """One row as `run_training_loop` streams it (boundary targets, fast state, no outer step): losses, fast state."""
    import torch
    from nested_learning.training import (
        _compute_layer_teach_signals,
        _compute_surprise_override,
        _iter_online_boundary_chunks,
        compute_teach_signal,
    )

    state, losses = model.init_fast_state(), []
    for chunk, boundary, _ in _iter_online_boundary_chunks(row, chunk_size=tick):
        if boundary is None:  # the last token of the window is a target alone
            break
        targets = torch.cat([chunk[:, 1:], boundary[:, None]], dim=1)
        logits, _, outputs = model.forward_with_block_outputs(chunk, fast_state=state)
        loss = torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="none")
        losses.append(loss.detach())
        surprise = _compute_surprise_override(
            metric or "l2", logits=logits, tokens=chunk, loss=loss.mean(), next_tokens=boundary
        )
        if per_layer:
            signal = {"teach_signals": _compute_layer_teach_signals(loss.mean(), outputs)}
        else:
            signal = {"teach_signal": compute_teach_signal(model, logits, chunk, next_tokens=boundary)}
        with torch.no_grad():
            model(chunk, **signal, surprise_value=surprise, fast_state=state, finalize_updates=False)
    return torch.cat(losses), state


def tensors(state):
    """Everything that a fast state holds, by name, without a batch."""
    found = {}
    for i, block in enumerate(state.blocks):
        for name, memory in vars(block.selfmod_state).items():
            weights = {w: t for w, t in vars(memory).items() if t is not None}
            found |= {f"{i}.{name}.{w}": t if t.ndim == 2 else t[0] for w, t in weights.items()}
        found |= {f"{i}.{v}.{p}": t for v, named in block.cms_params.items() for p, t in named.items()}
    return found


def assert_same(state, other, but=()):
    import torch

    ours, theirs = tensors(state), tensors(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not any(part in name for part in but):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("metric", "threshold", "per_layer", "scale", "clip"),
    [
        ("l2", None, False, 1.0, 0.0),
        ("l2", None, True, 1.0, 0.0),
        ("l2", 0.66, False, 1.0, 0.0),
        ("l2", 0.32, False, 0.5, 0.4),
        ("l2", 1.7, True, 1.0, 0.0),
        ("l2", 0.85, True, 0.5, 0.6),
        ("loss", 10.2, False, 1.0, 0.0),
        ("loss", 10.2, True, 1.0, 0.0),
        ("logit_entropy", 1.4, False, 1.0, 0.0),
    ],
)
def test_windows_run_as_the_package_streams_them(tokens, metric, threshold, per_layer, scale, clip):
    """Losses, fast weights and gates of three rows; thresholds lie where some ticks pass and some do not."""
    import torch

    of_gate = {
        "surprise_metric": metric,
        "surprise_threshold": threshold,
        "teach_scale": scale,
        "teach_clip": clip,
    }
    subject = make(model=of_gate, train={"per_layer_teach_signal": per_layer})
    gates = [f"blocks.{i}.cms.fast.hook_write_gate" for i in range(2)]
    with subject.module.caching([*gates, "hook_surprise"]) as cache:
        out = subject.run(tokens)
    assert bool(out.scored.all())
    assert torch.equal(cache["hook_surprise"], out.losses)
    one_gate = "hook_gate" in subject.module.hook_dict
    assert one_gate == (threshold is None or metric != "l2" or not per_layer)
    opened = torch.stack([cache[gate] for gate in gates])[:, :, ::8]  # (block, row, tick)
    if threshold is not None:
        assert 0.1 < float(opened.mean()) < 0.9
    for r in range(3):
        # The package's own model decides about its gate by itself here.
        model = make(model=of_gate).module.peer
        losses, state = package_stream(model, tokens[r : r + 1], 8, per_layer, metric)
        torch.testing.assert_close(out.losses[r], losses, rtol=0, atol=1e-5)
        assert_same(out.state[r], state)
        for i, block in enumerate(state.blocks):
            assert block.level_manager.clock.stats()["fast"].updates == int(opened[i, r].sum())


def test_a_window_at_once_where_training_was_not_online(tokens):
    """Then no read sees a write of its window: losses are those of the plain forward pass, and the writes are there."""
    import torch

    subject = make(train={"online_updates": False}, data={"seq_len": 40})
    assert subject.tick == 40
    out = subject.run(tokens)
    with torch.no_grad():
        logits = subject.module.peer(tokens[:, :-1])
    plain = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
    torch.testing.assert_close(out.losses, plain, rtol=0, atol=1e-5)
    assert set(subject.write_periods().values()) == {40}
    _, state = package_stream(make().module.peer, tokens[:1], 40)
    assert_same(out.state[0], state)


def test_rows_do_not_touch_each_other(tokens):
    """A batch of rows of different lengths gives what each gives alone; what is beyond a row has no effect."""
    import torch

    subject = make()
    lengths = torch.tensor([40, 13, 0])
    out = subject.run(tokens, lengths)
    assert out.scored.sum(dim=1).tolist() == [40, 13, 0]
    assert not out.losses[~out.scored].any()
    for r in (0, 1):
        alone = subject.run(tokens[r : r + 1, : lengths[r] + 1])
        torch.testing.assert_close(out.losses[r, : lengths[r]], alone.losses[0], rtol=0, atol=1e-6)
        assert_same(out.state[r], alone.state[0])
    assert_same(out.state[2], subject.init_state(1)[0])


def test_a_state_is_continued_and_left_as_it_is(tokens):
    import torch

    subject = make()
    whole = subject.run(tokens)
    first = subject.run(tokens[:, :17])
    kept = copy.deepcopy(first.state)
    rest = subject.run(tokens[:, 16:], state=first.state)
    torch.testing.assert_close(torch.cat([first.losses, rest.losses], 1), whole.losses, rtol=0, atol=1e-6)
    for a, b in zip(first.state, kept, strict=True):
        assert_same(a, b)
    losses, stepped = subject.step(first.state, tokens[:, 16:24], tokens[:, 24])
    torch.testing.assert_close(losses.detach(), whole.losses[:, 16:24], rtol=0, atol=1e-6)
    assert_same(subject.select_rows(stepped, [2, 0])[1], stepped[0])
    with subject.module.caching("blocks.1.cms.slow.hook_out") as cache:
        logits = subject.logits(first.state, tokens[:, 16:24])
    read = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 17:25], reduction="none")
    torch.testing.assert_close(read, whole.losses[:, 16:24], rtol=0, atol=1e-6)
    assert cache["blocks.1.cms.slow.hook_out"].shape == (3, 8, 16)
    for a, b in zip(first.state, kept, strict=True):
        assert_same(a, b)
    with pytest.raises(BadInputError, match="8 tokens, not 9"):
        subject.logits(first.state, tokens[:, :9])
    with pytest.raises(BadInputError, match="a step takes 8 tokens, not 7"):
        subject.step(first.state, tokens[:, 16:23], tokens[:, 24])


def test_frozen_by_mechanism(tokens):
    """Every gate closed: nothing moves, nothing fires. One mechanism closed: only the other moves."""
    import torch

    subject = make()
    start = subject.init_state(1)[0]
    fast = [name for name in subject.module.hook_dict if ".hook_fast_" in name]
    with (
        subject.module.hooks(subject.freeze_hooks()),
        subject.module.caching(fast, allow_unfired=True) as cache,
    ):
        out = subject.run(tokens)
    assert_same(out.state[0], start)
    assert not set(cache)
    with torch.no_grad():
        alone = torch.cat([subject.module.peer(tokens[:, t : t + 8]) for t in range(0, 40, 8)], dim=1)
    plain = torch.nn.functional.cross_entropy(alone.mT, tokens[:, 1:], reduction="none")
    torch.testing.assert_close(out.losses, plain, rtol=0, atol=1e-5)

    def moved(mechanism):
        with subject.module.hooks(subject.freeze_hooks(mechanism)):
            after = tensors(subject.run(tokens).state[0])
        same = tensors(start)
        return {name.split(".")[1] for name, t in after.items() if not torch.equal(t, same[name])}

    memories = set(MEMORIES) - {"q"}  # static
    assert moved("cms") == memories
    assert moved("cms.slow") == {*memories, "fast"}
    assert moved("selfmod") == {"fast", "slow"}
    with pytest.raises(MissingCapability, match=r"no write gate for 'selfmod\.k' alone"):
        subject.freeze_hooks("selfmod.k")


def test_a_gate_is_of_a_whole_call(tokens):
    import torch

    subject = make()

    def half(gate, hook):
        return gate * (torch.arange(gate.shape[1]) % 2)

    with (
        pytest.raises(BadInputError, match="a whole call or nothing"),
        subject.module.hooks([("hook_gate", half)]),
    ):
        subject.run(tokens)
    with pytest.raises(BadInputError, match="cannot be edited"):
        subject.module.run_with_hooks(
            tokens, fwd_hooks=[("blocks.0.cms.fast.hook_delta", lambda d, hook: d * 0)]
        )


def test_what_the_points_show(tokens):
    """Levels chain and add; fast weights are those of the state; every one has its meta weights."""
    import torch

    subject = make()
    out, cache = subject.module.run_with_cache(tokens)
    model = subject.module.peer
    for i in range(2):
        prefix = f"blocks.{i}"
        fast, slow = (
            {k: cache[f"{prefix}.cms.{level}.hook_{k}"] for k in ("in", "delta", "out")}
            for level in ("fast", "slow")
        )
        assert torch.equal(fast["in"], cache[f"{prefix}.selfmod.hook_out"])
        assert torch.equal(slow["in"], fast["out"])
        for level in (fast, slow):
            assert torch.equal(level["out"], level["in"] + level["delta"])
        # In the first tick levels are as they were made.
        with torch.no_grad():
            added = model.blocks[i].cms.blocks["fast"].net(fast["in"][:, :8])
        torch.testing.assert_close(fast["delta"][:, :8], added, rtol=0, atol=1e-6)
        assert cache[f"{prefix}.cms.fast.hook_fast_in"].shape == (3, 5, 64, 16)  # (row, write, h, d)
        assert cache[f"{prefix}.cms.slow.hook_fast_out"].shape == (3, 2, 16, 64)
    meta = subject.meta_weights()
    assert set(meta) == {name for name in subject.module.hook_dict if ".hook_fast_" in name}
    for name, weights in meta.items():
        assert cache[name][0, 0].shape == weights.shape, name
        assert not torch.equal(cache[name][0, 0], weights), name
    end = out.state[1].blocks[1].selfmod_state.eta
    assert torch.equal(cache["blocks.1.selfmod.eta.hook_fast_skip"][1, -1], end.w_skip[0])
    assert torch.equal(cache["blocks.1.selfmod.eta.hook_fast_w1"][1, -1], end.w1[0])
    delta = out.state[1].blocks[0].cms_params["slow"]["net.1.weight"]
    assert torch.equal(
        cache["blocks.0.cms.slow.hook_fast_in"][1, -1], meta["blocks.0.cms.slow.hook_fast_in"] + delta
    )
    # The published rule's collapse: a ratio of one half a token.
    assert subject.decay_target() == {f"selfmod.{m}": "zero" for m in MEMORIES if m != "q"}
    ratio = (
        cache["blocks.0.selfmod.k.hook_fast_w2"][0, 1].norm() / meta["blocks.0.selfmod.k.hook_fast_w2"].norm()
    )
    assert 1e-6 < float(ratio) < 1e-3
    periods = subject.write_periods()
    assert periods == {
        **dict.fromkeys([f"selfmod.{m}" for m in MEMORIES if m != "q"], 8),
        "cms.fast": 8,
        "cms.slow": 16,
    }  # fmt: skip


def test_the_loss_reaches_what_training_reaches(tokens):
    """The docstring's claim: no gradient for the memories that only write, none for the static query's memory."""
    subject = make()
    subject.loss(tokens).backward()
    reached = {
        name
        for name, p in subject.module.peer.named_parameters()
        if p.grad is not None and bool(p.grad.any())
    }
    memories = {
        m for m in ("k", "v", "q", "eta", "alpha", "memory") if f"blocks.0.selfmod.m_{m}.w1.weight" in reached
    }
    assert memories == {"memory"}
    assert {"embed.weight", "blocks.0.selfmod.w_q.weight", "blocks.1.cms.blocks.slow.net.1.weight"} <= reached


# -- files --------------------------------------------------------------------------------------------------------


def test_a_file_that_the_package_saved(toy_run):
    """Found by `hopeprobe.load` through the entry point, with what the file knows."""
    subject = load(toy_run / "step_000060.pt")
    assert type(subject).__name__ == "NestedLearningSubject"
    assert (subject.name, subject.trained_steps, subject.tick, subject.context) == (
        "step_000060.pt",
        60,
        8,
        16,
    )
    assert (subject.vocab_size, subject.tokenizer, subject.seed) == (VOCAB, "gpt2", None)
    assert [p.name for p in subject.siblings()] == [f"step_{n:06d}.pt" for n in (0, 30, 60)]
    told = subject.training()
    assert told["learning_rate"] == 1e-2
    assert told["keys"] == len(subject.module.state_dict())
    groups = subject.parameter_groups()
    assert list(groups) == ["embed", "selfmod", "cms", "norm"]
    assert sum(map(len, groups.values())) == told["keys"] - 1  # the head is the embedding
    named = [f"blocks.0.selfmod.{m}.{w}" for m in MEMORIES for w in ("w1", "w2", "w_skip")]
    assert len(groups["selfmod"].keys() & set(named)) == 2 + 2 + 2 + 3 + 3 + 2
    levels = [name for name in groups["cms"] if name.startswith("blocks.1.cms.fast.")]
    assert len(levels) == 6  # LayerNorm, two matrices, two biases


def test_own_init_is_the_step_0_file_of_this_run_and_no_other(toy_run, tmp_path):
    import torch

    subject = load(toy_run / "step_000060.pt")
    initial = subject.own_init()
    assert initial.path == toy_run / "step_000000.pt"
    assert initial.own_init() is initial
    for name in ("m_q", "m_k", "m_alpha"):  # neither trained nor, with a fast state, written
        a, b = (getattr(s.module.peer.blocks[1].selfmod, name).w1.weight for s in (subject, initial))
        assert torch.equal(a, b), name
    moved = (subject.module.peer.embed.weight - initial.module.peer.embed.weight).detach()
    assert float(moved.abs().max()) > 1e-2

    shutil.copy(subject.path, tmp_path / "step_000060.pt")
    lonely = load(tmp_path / "step_000060.pt")
    with pytest.raises(MissingCapability, match=r"what train\.seed 7 gives is of another run: m_q differs"):
        lonely.own_init()
    content = torch.load(toy_run / "step_000000.pt", weights_only=True)
    content["model"] = make(seed=5).module.peer.state_dict()
    torch.save(content, tmp_path / "step_000000.pt")
    with pytest.raises(MissingCapability, match=r"step_000000\.pt beside it is of another run: m_q differs"):
        lonely.own_init()


def test_own_init_from_the_seed_where_it_holds(tmp_path):
    """`train.seed` gives the initial weights only to who sets it before the package builds the model."""
    import torch

    run = train(tmp_path, {"train": {"steps": 2}}, initial_seed=7)
    (run / "step_000000.pt").rename(tmp_path / "first.pt")
    initial = load(run / "step_000002.pt").own_init()
    content = torch.load(tmp_path / "first.pt", weights_only=True)
    assert all(torch.equal(t, content["model"][n]) for n, t in initial.module.peer.state_dict().items())


def test_training_without_a_fast_state_writes_into_the_weights(tmp_path):
    """Self-modification's weights then shrink to nothing within a step, and no optimiser bounds how far they go."""
    run = train(tmp_path, {"train": {"steps": 1, "use_fast_state": False}}, initial_seed=3)
    subject, initial = load(run / "step_000001.pt"), load(run / "step_000000.pt")
    norms = [float(s.module.peer.blocks[0].selfmod.m_k.w2.weight.detach().norm()) for s in (subject, initial)]
    assert norms[0] < 1e-2 * norms[1]
    assert subject.own_init().path == initial.path
    assert "learning_rate" not in subject.training()
    assert subject.training()["outer_learning_rate"] == 1e-2


def test_weights_that_do_not_fit_are_never_left_out(toy_run, tmp_path):
    """Keys of a compiled model are known by their prefix; any other difference is refused, not skipped."""
    import torch

    content = torch.load(toy_run / "step_000060.pt", weights_only=True)
    weights = content["model"]
    content["model"] = {f"_orig_mod.{name}": t for name, t in weights.items()}
    torch.save(content, tmp_path / "step_000060.pt")
    compiled = load(tmp_path / "step_000060.pt").module.peer
    assert torch.equal(compiled.embed.weight, weights["embed.weight"])

    def saved(model):
        torch.save({**content, "model": model}, tmp_path / "step_000061.pt")
        return tmp_path / "step_000061.pt"

    some = dict(list(weights.items())[:-1])
    with pytest.raises(BadInputError, match=r"step_000061\.pt: weights do not fit .*: norm\.bias|lm_head"):
        load(saved(some))
    with pytest.raises(BadInputError, match="do not fit"):
        load(saved({**weights, "extra": weights["norm.bias"]}))
    with pytest.raises(BadInputError, match=r"do not fit .*: norm\.bias"):
        load(saved({**weights, "norm.bias": torch.zeros(3)}))
    attention = copy.deepcopy(content)
    attention["config"]["model"]["block_variant"] = "hope_attention"
    torch.save(attention, tmp_path / "step_000062.pt")
    with pytest.raises(BadInputError, match="block_variant is 'hope_attention'"):
        load(tmp_path / "step_000062.pt")


def test_other_files_are_left_to_others(tmp_path, monkeypatch):
    from importlib import metadata

    import torch
    from nested_learning_subject import load_subject

    text = tmp_path / "a.pt"
    text.write_text("not a checkpoint")
    assert load_subject(text) is None
    torch.save({"model": {}}, tmp_path / "b.pt")
    assert load_subject(tmp_path / "b.pt") is None

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert load_subject(tmp_path / "c.pt") is None


def test_identity_tells_computations_apart():
    same = make(seed=1).identity()
    assert same == make(seed=2).identity()
    for part in ({"model": {"self_mod_chunk_size": 4}}, {"train": {"online_chunk_size": 16}},
                 {"train": {"per_layer_teach_signal": True}}):  # fmt: skip
        assert make(**part).identity() != same
    assert same["version"] == "0.2.0"
