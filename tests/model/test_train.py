"""Training: what a run writes; a resumed one is the same run; a diverged one says where and keeps what was good."""

import dataclasses
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from model_toys import TOY

from hopeprobe.errors import BadInputError, DivergedError
from hopeprobe.locks import run_lock
from hopeprobe.model import train as module
from hopeprobe.model.checkpoint import read, run_checkpoints, save, step_path
from hopeprobe.model.config import CMSLevel
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.measure import held_out
from hopeprobe.model.metrics import MetricsFile
from hopeprobe.model.run import Run, make_optimizer
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.tokens import EvalWindows, TokenData, TrainWindows

MODEL = dataclasses.replace(TOY, vocab_size=53, context=16, embed_std=0.1)
CONFIG = TrainConfig(
    steps=6, batch=2, learning_rate=1e-2, warmup=2, checkpoint_every=4, eval_every=3, eval_tokens=64, seed=5
)
KEYS = {
    "step", "loss", "grad_norm", "learning_rate", "surprise_min", "gate_rate", "retention", "norm_ratio"
}  # fmt: skip


def documents(seed=0, n=40, length=30):
    rng = np.random.default_rng(seed)
    return TokenData.from_documents(
        [rng.integers(0, 52, length) for _ in range(n)], name=f"random {seed}", vocab_size=53, end_of_text=52
    )


DATA = documents()


def run(folder, config=CONFIG, model=MODEL, data=DATA, **options):
    return train(model, config, data, folder, **options)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    """The record as it is, to the byte."""
    return (folder / "metrics.jsonl").read_bytes()


def flat(tree):
    """Every leaf of nested plain data, for comparison bit for bit."""
    if isinstance(tree, torch.Tensor):
        return [(str(tree.dtype), tuple(tree.shape), tree.numpy().tobytes())]
    if isinstance(tree, dict):
        return [leaf for key, part in tree.items() for leaf in [key, *flat(part)]]
    if isinstance(tree, (list, tuple)):
        return [leaf for part in tree for leaf in flat(part)]
    return [tree]


def same_run(one, other, steps=CONFIG.steps):
    assert step_path(one, steps).read_bytes() == step_path(other, steps).read_bytes()
    a, b = read(step_path(one, steps)), read(step_path(other, steps))
    assert flat(a.weights) == flat(b.weights)
    assert flat(a.optimizer) == flat(b.optimizer)
    assert flat(a.generators) == flat(b.generators)
    assert timeless(one) == timeless(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    torch.seed()
    run(folder)
    return folder


class Killed(BaseException):
    """As by a signal: nothing in between may swallow it."""


def kill_at(step):
    def progress(at, metrics):
        if at == step:
            raise Killed

    return progress


def interrupted(folder, step, **options):
    torch.seed()
    with pytest.raises(Killed):
        run(folder, progress=kill_at(step), **options)


# -- what a run writes --------------------------------------------------------------------------------------------


def test_checkpoints_on_schedule(whole):
    assert [p.name for p in run_checkpoints(whole)] == [f"step-00000{s}.pt" for s in (0, 1, 2, 4, 5, 6)]
    assert sorted(p.name for p in whole.iterdir() if p.suffix != ".pt") == [
        "metrics.jsonl",
        "run.json",
        "timings.jsonl",
    ]
    for path in run_checkpoints(whole):
        checkpoint = read(path)
        assert checkpoint.step == int(path.stem[5:])
        assert (checkpoint.optimizer is not None) == (checkpoint.step in (4, 6))
        assert checkpoint.seed == 5
        assert checkpoint.data == DATA.identity()
        assert checkpoint.train == dataclasses.asdict(CONFIG)
    first = read(step_path(whole, 0))
    assert flat(first.weights) == flat(dict(HopeModel(MODEL, 5).state_dict()))
    assert flat(read(step_path(whole, 1)).weights) != flat(first.weights)


def test_early_steps_and_every_so_many():
    assert TrainConfig(steps=450, checkpoint_every=200).checkpoint_steps() == {
        0, 1, 2, 5, 10, 20, 50, 100, 200, 400, 450,
    }  # fmt: skip
    assert TrainConfig(steps=3).checkpoint_steps() == {0, 1, 2, 3}


def test_a_line_a_step(whole):
    written = lines(whole)
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6]
    for line in written:
        evaluated = {"held_out_live", "held_out_frozen"} if line["step"] in (3, 6) else set()
        assert set(line) == KEYS | evaluated
        assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in line.values())
        assert 0 <= line["gate_rate"] <= 1
        assert 0 < line["retention"] < 1
        assert 0 < line["surprise_min"] < line["loss"]
    assert written[5]["held_out_live"] != written[5]["held_out_frozen"]


def test_the_lowest_surprise_is_that_of_the_tokens_trained_on(whole):
    with torch.no_grad():
        for step, line in enumerate(
            lines(whole)[:2]
        ):  # the checkpoints of step 0 and 1 are what 1 and 2 read
            batch = torch.from_numpy(
                TrainWindows(DATA, MODEL.context, CONFIG.batch, CONFIG.seed).batch_at(step)
            )
            losses = read(step_path(whole, step)).to_model()(batch).losses
            assert math.isclose(line["surprise_min"], losses.min().item(), rel_tol=1e-6)


def test_the_first_batch_is_the_same_in_every_variant_and_another_with_another_seed(whole, tmp_path):
    def first(folder):
        return json.loads((folder / "run.json").read_text())["first_batch"]

    one = dataclasses.replace(CONFIG, steps=1)
    train(dataclasses.replace(MODEL, variant="transformer"), one, DATA, tmp_path / "same")
    train(MODEL, dataclasses.replace(one, seed=6), DATA, tmp_path / "other")
    assert first(tmp_path / "same") == first(whole) != first(tmp_path / "other")


def test_the_record_of_a_run(whole):
    record = json.loads((whole / "run.json").read_text())
    assert record["model"] == json.loads(json.dumps(MODEL.to_dict()))
    assert record["train"] == dataclasses.asdict(CONFIG)
    assert record["data"]["fingerprint"] == DATA.fingerprint
    assert record["parameters"] == sum(p.numel() for p in HopeModel(MODEL, 0).parameters())
    assert record["init_digest"] == read(step_path(whole, 6)).init_digest
    assert record["epochs"] == 6 * 2 / (DATA.n_tokens("train") // 16)


def test_the_held_out_loss_is_that_of_the_windows(whole):
    model = read(step_path(whole, 6)).to_model()
    windows = EvalWindows(DATA, context=16, tokens=64, batch=3)
    with torch.no_grad():
        parts = [model(torch.from_numpy(b.tokens), torch.from_numpy(b.lengths)) for b in windows]
    losses = torch.cat([p.losses[p.scored] for p in parts]).double()
    assert len(losses) == 64
    assert abs(held_out(model, windows).loss - losses.mean().item()) < 1e-6
    assert abs(lines(whole)[-1]["held_out_live"] - losses.mean().item()) < 1e-6


def poisoned(model, row):
    """A hook that makes one window, of all that are read, not finite from its sixth token on."""
    first = model.embed[torch.from_numpy(row)]
    at = {}

    def spoil(x, hook):
        start = at[hook.name] = at.get(hook.name, -x.shape[1]) + x.shape[1]
        if start >= len(row) - 1:
            start = at[hook.name] = 0  # the next batch
        out = x.clone()
        for token in range(start, start + x.shape[1]):
            if token == 5:
                same = (x[:, token - start] == first[token]).all(1)
                out[same, token - start] = torch.nan
        return out

    return [("hook_embed", spoil)]


def test_a_held_out_window_that_is_not_finite_is_named(whole, monkeypatch):
    model = read(step_path(whole, 6)).to_model()
    windows = EvalWindows(DATA, context=16, tokens=64, batch=3)
    batch = next(iter(windows))
    row = batch.tokens[1]
    others = {tuple(r[:6]) for b in windows for r in b.tokens} - {tuple(row[:6])}
    assert row[5] not in {r[5] for r in others}
    with torch.no_grad(), model.hooks(poisoned(model, row)):
        seen = held_out(model, windows)
    assert math.isnan(seen.loss)
    (named,) = seen.not_finite
    where = f"document {batch.document[1]}, window from token {batch.start[1]}: first token 5, "
    assert named == where + "outside the layers (hook_embed)"


def test_a_loss_that_is_not_finite_stands_in_the_metrics_with_its_window(tmp_path, monkeypatch):
    def bad(model, windows, frozen=False):
        found = held_out(model, windows, frozen)
        return (
            found if frozen else found._replace(loss=math.nan, not_finite=("document 7: first token 5",) * 5)
        )

    monkeypatch.setattr("hopeprobe.model.train.held_out", bad)
    run(tmp_path)
    last = lines(tmp_path)[-1]
    assert last["held_out_live"] is None
    assert last["held_out_live_not_finite"].startswith("5 of ")
    assert last["held_out_live_not_finite"].count("document 7: first token 5") == 3
    assert "held_out_frozen_not_finite" not in last


def test_callbacks_after_each_checkpoint(tmp_path):
    seen = []

    def look(r):
        seen.append((r.step, step_path(r.folder, r.step).exists(), read(step_path(r.folder, r.step)).step))

    run(tmp_path, callbacks=(look, look))
    assert seen == [(s, True, s) for s in (0, 1, 2, 4, 5, 6) for _ in range(2)]


def test_without_held_out_text_nothing_is_evaluated(tmp_path):
    data = documents(3, n=4, length=60)
    data = dataclasses.replace(data, held_out=np.zeros(4, bool))
    run(tmp_path, dataclasses.replace(CONFIG, steps=3), data=data)
    assert all("held_out_live" not in line for line in lines(tmp_path))


# -- the same run again -------------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_run(whole, tmp_path):
    """Whatever state the generators of the process are in, which is another in each, and stays."""
    torch.seed()
    before = torch.get_rng_state()
    run(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    same_run(whole, tmp_path)
    assert (tmp_path / "run.json").read_bytes() == (whole / "run.json").read_bytes()
    for ours, theirs in zip(run_checkpoints(tmp_path), run_checkpoints(whole), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def test_another_seed_is_another_run(whole, tmp_path):
    run(tmp_path, dataclasses.replace(CONFIG, steps=1, seed=6))
    assert lines(tmp_path)[0]["loss"] != lines(whole)[0]["loss"]


@pytest.mark.parametrize("step", [5, 6])
def test_a_resumed_run_is_the_same_bit_for_bit(whole, tmp_path, step):
    """Killed between checkpoints, and before the last is written."""
    interrupted(tmp_path, step)
    assert len(lines(tmp_path)) == step
    torch.seed()
    resumed = run(tmp_path, resume=True)
    assert resumed.step == 6
    same_run(whole, tmp_path)


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_killed_before_it_could_be_resumed_begins_again(whole, tmp_path, step):
    """Also killed at step 4 itself, ahead of the checkpoint."""
    interrupted(tmp_path, step)
    torch.seed()
    run(tmp_path, resume=True)
    same_run(whole, tmp_path)
    assert [p.name for p in run_checkpoints(tmp_path)] == [p.name for p in run_checkpoints(whole)]


@pytest.mark.parametrize(
    "cut", ['{"step": 6, "lo', '{"step": 6, "probes": {"surprise/mean_loss/live": {"value": 7.0}']
)
def test_a_metrics_line_cut_in_the_middle_goes(whole, tmp_path, cut):
    interrupted(tmp_path, 5)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + cut)
    run(tmp_path, resume=True)
    same_run(whole, tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda text: text.replace(b'"step": 2', b'"stepp": 2'),
            r"metrics\.jsonl .*\(line 2: its step is None\).*delete the file",
        ),
        (lambda text: b"notes}\n" + text, r"metrics\.jsonl is not a record of training \(line 1: Expecting"),
        (lambda text: b"[1]\n" + text, r"metrics\.jsonl is not a record of training \(line 1: it is no JSON"),
        (lambda text: b"\xff\xfe" + text, r"metrics\.jsonl is not a record of training"),
    ],
)
def test_a_record_that_was_changed_is_named_and_left(whole, tmp_path, spoil, message):
    interrupted(tmp_path, 5)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(spoil(path.read_bytes()))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(BadInputError, match=message):
        run(tmp_path, dataclasses.replace(CONFIG, steps=7), resume=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    path.unlink()
    assert run(tmp_path, resume=True).step == 6
    assert [line["step"] for line in lines(tmp_path)][-1] == 6


@pytest.mark.parametrize("changed", [{"version": 2}, {"written_by_a_later_version": 1}])
def test_nobody_is_told_to_delete_a_checkpoint_that_is_whole(whole, tmp_path, changed):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    last = run_checkpoints(folder)[-1]
    torch.save(torch.load(last, weights_only=True) | changed, last)
    with pytest.raises(BadInputError, match=rf"{last.name} ") as caught:
        run(folder, resume=True)
    assert "delete it" not in str(caught.value)


def test_a_run_is_read_again_whatever_levels_its_variant_leaves_out(tmp_path):
    levels = tuple(CMSLevel(f"level{i}", MODEL.tick) for i in range(40))
    model = dataclasses.replace(MODEL, variant="transformer", cms_levels=levels)
    run(tmp_path, dataclasses.replace(CONFIG, steps=2), model)
    assert run(tmp_path, dataclasses.replace(CONFIG, steps=3), model, resume=True).step == 3


def test_a_copy_beside_checkpoints_is_none_of_them(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.copy(folder / "step-000006.pt", folder / "step-000006 (1).pt")
    assert run(folder, dataclasses.replace(CONFIG, steps=7), resume=True).step == 7


def test_a_damaged_checkpoint_is_not_passed_over_but_told_how_to_go_on(whole, tmp_path):
    interrupted(tmp_path, 5)
    last = run_checkpoints(tmp_path)[-1]
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(
        BadInputError, match=rf"{last.name} is damaged.*: delete it, and --resume goes on from the one"
    ):
        run(tmp_path, resume=True)
    last.unlink()
    torch.seed()
    run(tmp_path, resume=True)
    same_run(whole, tmp_path)


def test_a_finished_run_resumed_changes_nothing(whole, tmp_path):
    run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert run(tmp_path, resume=True).step == 6
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_run_can_be_extended(whole, tmp_path):
    torch.seed()
    run(tmp_path, dataclasses.replace(CONFIG, steps=5))
    run(tmp_path, resume=True)
    a, b = read(step_path(whole, 6)), read(step_path(tmp_path, 6))
    assert flat(a.weights) == flat(b.weights)
    assert flat(a.optimizer) == flat(b.optimizer)
    assert [x["loss"] for x in lines(tmp_path)] == [x["loss"] for x in lines(whole)]
    assert json.loads((tmp_path / "run.json").read_text())["train"]["steps"] == 6


def test_a_planted_difference_is_seen_by_the_comparison(whole, tmp_path):
    torch.seed()
    run(tmp_path, callbacks=(lambda r: r.step == 4 and r.model.norm.bias.data[0].add_(1e-7),))
    with pytest.raises(AssertionError):
        same_run(whole, tmp_path)


# -- refused ------------------------------------------------------------------------------------------------------

OTHER = {
    "config": ({"model": dataclasses.replace(MODEL, chunk=16)}, "chunk was 8, is 16"),
    "seed": ({"config": dataclasses.replace(CONFIG, seed=6)}, "seed was 5, is 6"),
    "rate": ({"config": dataclasses.replace(CONFIG, learning_rate=0.5)}, "learning_rate was 0.01, is 0.5"),
    "batch": ({"config": dataclasses.replace(CONFIG, batch=3)}, "batch was 2, is 3"),
    "data": ({"data": documents(1)}, "trained on 'random 0', whose tokens differ from those of 'random 1'"),
}


@pytest.mark.parametrize("killed_at", [3, 5])
@pytest.mark.parametrize("what", OTHER)
def test_another_run_cannot_be_resumed(tmp_path, what, killed_at):
    """Also not where it would begin again: its early checkpoints would be of two runs."""
    interrupted(tmp_path, killed_at)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    options, message = OTHER[what]
    with pytest.raises(BadInputError, match=f"{message}.*or choose another --out$"):
        run(tmp_path, resume=True, **options)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_run_that_has_gone_further_is_left_as_it_is(tmp_path):
    """Its record would say fewer steps, and as many epochs less, than its weights have seen."""
    run(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(
        BadInputError, match="has gone 6 steps already, more than the 4 asked for: take at least"
    ):
        run(tmp_path, dataclasses.replace(CONFIG, steps=4), resume=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_with_a_run_is_not_overwritten(whole):
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    with pytest.raises(BadInputError, match="holds a run already: continue it with --resume"):
        run(whole)
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == before


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(BadInputError, match="holds no run to resume"):
        run(tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_too_little_text(tmp_path):
    with pytest.raises(BadInputError, match="context"):
        run(tmp_path, model=dataclasses.replace(MODEL, context=4096))


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("batch", -1), ("learning_rate", 0.0), ("clip", float("nan")), ("warmup", -1), ("seed", -3),
     ("weight_decay", -0.1), ("checkpoint_every", 0), ("eval_every", 0), ("eval_tokens", 0), ("steps", 2.5),
     ("batch", True), ("seed", 2**63), ("seed", 0.5), ("beta1", 1.0), ("beta2", float("nan")), ("epsilon", 0.0),
     ("warmup", float("inf")), ("weight_decay", float("inf"))],
)  # fmt: skip
def test_values_that_cannot_work(name, value):
    with pytest.raises(BadInputError, match=name):
        TrainConfig(**{name: value})


# -- diverged -----------------------------------------------------------------------------------------------------


def diverges(tmp_path, spoil, at=2, model=MODEL):
    """Spoil the run after the checkpoint of a step; the error, once the last good checkpoint has been looked at."""

    def callback(r):
        if r.step == at:
            spoil(r.model)

    with pytest.raises(DivergedError) as caught:
        run(tmp_path, model=model, callbacks=(callback,))
    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert f"stopped at step {at + 1}" in message
    last = run_checkpoints(tmp_path)[-1]
    assert last == step_path(tmp_path, at)
    assert str(last) in message
    assert all(w.isfinite().all() for w in read(last).to_model().state_dict().values())
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, at + 1))
    return message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("weight", "where"),
    [
        ("selfmod.memories.v.w2", "layer 1, memory v (blocks.1.selfmod.hook_v)"),
        ("selfmod.memories.eta.w2", "layer 1, memory eta (blocks.1.selfmod.hook_eta)"),
        ("selfmod.memories.memory.w1", "layer 1, memory memory (blocks.1.selfmod.hook_out)"),
        ("cms.levels.slow.w_out", "layer 1, cms level slow (blocks.1.cms.slow.hook_delta)"),
    ],
)
def test_a_weight_that_is_not_finite(tmp_path, value, weight, where):
    def spoil(model):
        model.get_parameter(f"blocks.1.{weight}").data[0, 0] = value

    assert where in diverges(tmp_path, spoil)


def test_a_write_that_only_the_gradient_sees(tmp_path):
    """The last tick's keys reach no loss any more, but its write is where the gradient begins to be NaN."""

    def spoil(model):
        model.add_hook("blocks.0.selfmod.k.hook_fast_w2", lambda w, hook: w * float("nan"))

    assert "layer 0, memory k (blocks.0.selfmod.k.hook_fast_w2)" in diverges(tmp_path, spoil)


def test_a_titans_memory_is_named_too(tmp_path):
    def spoil(model):
        model.add_hook("blocks.0.titans.memory.hook_fast_w2", lambda w, hook: w * float("nan"))

    message = diverges(tmp_path, spoil, model=dataclasses.replace(MODEL, variant="titans"))
    assert "layer 0, memory memory (blocks.0.titans.memory.hook_fast_w2)" in message


def test_the_embedding_and_the_head(tmp_path):
    def spoil(model):
        model.norm.weight.data[0] = float("nan")

    assert "outside the layers (hook_surprise)" in diverges(tmp_path, spoil)


def test_a_gradient_that_is_not_finite_where_the_loss_is(tmp_path):
    """Named before clipping, which would make every gradient NaN."""

    def spoil(model):
        model.blocks[1].selfmod.memories["v"].w2.register_hook(lambda g: g * float("nan"))

    message = diverges(tmp_path, spoil)
    assert "the gradient is not finite, in blocks.1.selfmod.memories.v.w2. The" in message.replace(
        ". the", ". The"
    )


def test_the_diverged_step_changed_no_weight(tmp_path):
    kept = {}

    def callback(r):
        kept["run"] = r
        if r.step == 2:
            kept["before"] = {k: v.clone() for k, v in r.model.state_dict().items()}
            r.model.norm.bias.register_hook(lambda g: g * float("inf"))

    with pytest.raises(DivergedError):
        run(tmp_path, callbacks=(callback,))
    assert kept["run"].step == 2
    assert flat(kept["before"]) == flat(dict(kept["run"].model.state_dict()))


def test_weights_that_an_update_made_infinite_are_not_a_good_checkpoint(tmp_path):
    """The loss is looked at before the update: what the update makes is looked at before it is kept."""
    config = dataclasses.replace(CONFIG, learning_rate=3e38, beta1=0.0, weight_decay=1.0, warmup=0)
    with pytest.raises(DivergedError, match=r"step 1: the update made embed.* not finite.*step-000000\.pt"):
        run(tmp_path, config)
    assert run_checkpoints(tmp_path) == [step_path(tmp_path, 0)]


# -- the optimiser ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["full", "transformer"])
def test_decay_is_on_matrices_alone(variant):
    model = HopeModel(dataclasses.replace(MODEL, variant=variant), 0)
    groups = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(decay) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        plain = last in ("eta_bias", "alpha_bias", "mix_bias", "b_in", "b_out", "weight", "bias")
        assert decay[id(parameter)] == (0.0 if plain else 0.3), name
        assert plain == (parameter.ndim < 2)


def test_warm_up_is_linear_then_the_rate_is_constant(whole):
    config = TrainConfig(learning_rate=0.5, warmup=4)
    assert [config.rate(s) for s in (1, 2, 3, 4, 5, 999)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert TrainConfig(warmup=0, learning_rate=0.5).rate(1) == 0.5
    assert [line["learning_rate"] for line in lines(whole)] == [0.005, 0.01, 0.01, 0.01, 0.01, 0.01]


def test_an_update_is_adamws_with_the_clipped_gradient(tmp_path):
    """One step by hand: at the first step AdamW moves by rate * g / (|g| + eps), after decay."""
    config = dataclasses.replace(CONFIG, steps=1, clip=0.05, epsilon=1e-3, weight_decay=0.2)
    trained = run(tmp_path, config).model
    model = HopeModel(MODEL, 5)
    tokens = torch.from_numpy(module.TrainWindows(DATA, 16, 2, 5).batch_at(0))
    model(tokens).losses.mean().backward()
    grads = [p.grad.double() for p in model.parameters()]
    norm = torch.cat([g.flatten() for g in grads]).norm().item()
    assert norm > 0.05
    assert abs(lines(tmp_path)[0]["grad_norm"] / norm - 1) < 1e-5  # as it was, not as clipped
    for (name, after), before, g in zip(trained.named_parameters(), model.parameters(), grads, strict=True):
        g = g * (0.05 / norm)
        decayed = before.detach().double() * (1 - 0.005 * (0.2 if before.ndim >= 2 else 0.0))
        expected = decayed - 0.005 * g / (g.abs() + 1e-3)
        assert (after.detach().double() - expected).abs().max() < 1e-6, name


def test_a_small_gradient_is_not_clipped(tmp_path):
    a = run(tmp_path / "a", dataclasses.replace(CONFIG, steps=2, clip=1e6)).model.state_dict()
    b = run(tmp_path / "b", dataclasses.replace(CONFIG, steps=2, clip=1e9)).model.state_dict()
    assert flat(dict(a)) == flat(dict(b))


# -- learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["full", "transformer"])
def test_the_loss_falls_where_there_is_something_to_learn(tmp_path, variant):
    rng = np.random.default_rng(0)
    text = [
        (rng.integers(0, 10) + np.arange(n)) % 10 for n in range(20, 80)
    ]  # counting: the next token is known
    data = TokenData.from_documents(text, name="counting", vocab_size=11, end_of_text=10)
    model = dataclasses.replace(MODEL, vocab_size=11, variant=variant)
    config = dataclasses.replace(
        CONFIG, steps=40, batch=4, eval_every=40, checkpoint_every=40, learning_rate=2e-2
    )
    run(tmp_path, config, model, data)
    losses = [line["loss"] for line in lines(tmp_path)]
    assert abs(losses[0] - math.log(11)) < 0.5
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    last = lines(tmp_path)[-1]
    assert last["held_out_live"] < 0.6 * losses[0]
    if variant == "transformer":
        assert last["gate_rate"] is last["retention"] is last["norm_ratio"] is None  # JSON has no NaN
        assert last["held_out_live"] == last["held_out_frozen"]
        # resumes too
        before = lines(tmp_path)
        run(tmp_path, dataclasses.replace(config, steps=41), model, data, resume=True)
        assert lines(tmp_path)[:40] == before


def test_a_resume_needs_no_file_but_the_last(whole, tmp_path):
    checkpoint = read(step_path(whole, 4))
    save(step_path(tmp_path, 4), checkpoint)
    run(tmp_path, resume=True)
    assert flat(read(step_path(tmp_path, 6)).weights) == flat(read(step_path(whole, 6)).weights)


def test_one_process_a_folder(whole, tmp_path):
    with run_lock(tmp_path), pytest.raises(BadInputError, match=f"in use by process {os.getpid()}"):
        run(tmp_path)
    assert not list(tmp_path.iterdir())
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with run_lock(whole), pytest.raises(BadInputError, match="in use"):
        run(whole, resume=True)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_a_run_killed_before_its_first_checkpoint_goes_on_too(whole, tmp_path, monkeypatch):
    def killed(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", killed)
        with pytest.raises(Killed):
            run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    torch.seed()
    run(tmp_path, resume=True)
    same_run(whole, tmp_path)


@pytest.mark.parametrize("what", ["removed", "replaced", "the folder"])
def test_a_record_that_goes_while_it_is_written_stops_the_run(tmp_path, what):
    folder = tmp_path / "run"

    def meddle(step, metrics):
        if step == 3:
            if what == "the folder":
                shutil.rmtree(folder)
            else:
                (folder / "metrics.jsonl").unlink()
            if what == "replaced":
                (folder / "metrics.jsonl").touch()

    with pytest.raises(BadInputError, match=r"metrics\.jsonl was removed or replaced while the run wrote it"):
        run(folder, progress=meddle)
    assert not step_path(folder, 4).exists()


def test_lines_are_on_the_disk_before_the_checkpoint_that_they_lead_to(tmp_path, monkeypatch):
    order = []
    synced = MetricsFile.sync
    monkeypatch.setattr(MetricsFile, "sync", lambda self: (order.append(len(lines(tmp_path))), synced(self)))
    run(tmp_path, callbacks=(lambda run: order.append(f"checkpoint {run.step}"),))
    assert order == [
        "checkpoint 0",
        *(each for step in (1, 2, 4, 5, 6) for each in (step, f"checkpoint {step}")),
    ]
