"""Toy runs of every variant, trained and saved by the package: loaded, set beside their beginning, probed."""

import shutil

import pytest
from peer_streams import VARIANTS, of_variant
from peer_toys import train

from hopeprobe import PROBES, analyze
from hopeprobe.subject import MissingCapability, load

pytestmark = pytest.mark.peers

GROUPS = {
    "hope_selfmod": ["embed", "selfmod", "cms", "norm"],
    "hope_attention": ["embed", "attention", "cms", "norm"],
    "hope_hybrid": ["embed", "attention", "titans", "cms", "norm"],
    "transformer": ["embed", "attention", "mlp", "norm"],
    "titan": ["embed", "attention", "titans", "norm"],
}
CMS = {"cms-similarity", "cms-dynamics"}
WRITES = {"meta-fast", "adaptation", "gate-selectivity"}
ANSWERED = {
    "hope_selfmod": {"integrity", "learning-signal", "surprise", "selfmod-drift", *CMS, *WRITES},
    "hope_attention": {"integrity", "learning-signal", "surprise", *CMS, *WRITES},
    "hope_hybrid": {"integrity", "learning-signal", "surprise", *CMS, *WRITES},
    "transformer": {"integrity", "learning-signal", "surprise"},
    "titan": {"integrity", "learning-signal", "surprise", *WRITES},
}
"""Probes that measure something of a variant; all others say why they do not."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of 20 steps by variant, each with a file of the weights that it began from; memories are written always."""
    saves = {"enable": True, "save_interval": 10, "save_last": True}
    level = {"titan_level": {"name": "titan", "update_period": 2}}
    return {
        variant: train(
            tmp_path_factory.mktemp(variant),
            {"model": of_variant(variant) | level, "train": {"steps": 20, "checkpoint": saves}},
            initial_seed=3,
        )
        for variant in VARIANTS
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_are_found_with_all_their_weights(runs, variant):
    subject = load(runs[variant] / "step_000020.pt")
    assert type(subject).__name__ == "NestedLearningSubject"
    assert (subject.trained_steps, subject.context) == (20, 16)
    assert [path.name for path in subject.siblings()] == [f"step_{n:06d}.pt" for n in (0, 10, 20)]
    groups, told = subject.parameter_groups(), subject.training()
    assert list(groups) == GROUPS[variant]
    assert sum(map(len, groups.values())) == told["keys"] - 1  # the head is the embedding
    assert told["learning_rate"] == 1e-2


def test_adamw_alone_moves_what_is_never_written(runs, tmp_path):
    """Without a fast state others are written into, and no rate bounds how far they go."""
    import torch

    for variant, alone in (("transformer", True), ("hope_attention", False)):
        content = torch.load(runs[variant] / "step_000020.pt", weights_only=True)
        content["config"]["train"]["use_fast_state"] = False
        torch.save(content, tmp_path / "step_000020.pt")
        assert ("learning_rate" in load(tmp_path / "step_000020.pt").training()) == alone


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_training_leaves_alone_tells_runs_apart(runs, variant, tmp_path):
    import torch

    subject, lonely = load(runs[variant] / "step_000020.pt"), tmp_path / "step_000020.pt"
    initial = subject.own_init()
    assert initial.path.name == "step_000000.pt"
    now, start = (dict(s.module.peer.named_parameters()) for s in (subject, initial))
    still = {name for name in now if torch.equal(now[name], start[name])}
    shutil.copy(subject.path, lonely)
    content = torch.load(initial.path, weights_only=True)
    content["model"] = subject.reinitialised(5).module.peer.state_dict()
    torch.save(content, tmp_path / "step_000000.pt")
    if variant in ("hope_attention", "transformer"):
        assert not still
        assert load(lonely).own_init().path.name == "step_000000.pt"  # a file's word is taken
        (tmp_path / "step_000000.pt").unlink()
        why = r"train\.seed 7 gives may be others: nothing here stays"
    else:
        part = "m_q" if variant == "hope_selfmod" else "self_modifier"
        assert {name for name in now if f".{part}." in name} <= still
        why = rf"step_000000\.pt beside it is of another run: blocks\.0\..*{part}.* differs"
    with pytest.raises(MissingCapability, match=why):
        load(lonely).own_init()


def test_what_was_frozen_tells_runs_apart(tmp_path):
    """`freeze_backbone` leaves attention and the embedding as they were initialised: a witness where there was none."""
    import torch

    model = of_variant("hope_attention") | {"freeze_backbone": True}
    run = train(tmp_path, {"model": model, "train": {"steps": 2}}, initial_seed=7)
    subject = load(run / "step_000002.pt")
    (run / "step_000000.pt").unlink()
    initial = subject.own_init()  # what `train.seed` gives
    assert torch.equal(initial.module.peer.embed.weight, subject.module.peer.embed.weight)
    content = torch.load(subject.path, weights_only=True)
    content["config"]["train"]["seed"] = 8
    torch.save(content, run / "step_000002.pt")
    with pytest.raises(MissingCapability, match=r"is of another run: embed\.weight differs"):
        load(run / "step_000002.pt").own_init()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_probe_ends_in_verdicts_or_says_why_not(runs, variant, toy_text, tmp_path):
    tokens = 128 if variant == "hope_selfmod" else 560
    results = analyze(
        load(runs[variant] / "step_000020.pt"), "all", data=toy_text, tokens=tokens, split="all", batch=16,
        fresh=2, cache_dir=tmp_path,
    )  # fmt: skip
    assert not results.missing
    rows = {name: [row for row in results.rows if row.probe == name] for name in PROBES}
    assert all(rows.values())
    answered = {name for name, found in rows.items() if {row.verdict for row in found} != {"n/a"}}
    assert answered == ANSWERED[variant]
    assert all(row.note for row in results.rows if row.verdict == "n/a")
    if variant != "hope_selfmod":  # 128 tokens are too few for it
        (loss,) = [row for row in rows["integrity"] if row.statistic == "frozen_loss"]
        assert loss.verdict == "learned"
    if variant in ("hope_hybrid", "titan"):
        signal = {row.component: row.verdict for row in rows["learning-signal"] if row.layer == 0}
        made = {name: verdict for name, verdict in signal.items() if "self_modifier" in name}
        memory = {name: verdict for name, verdict in signal.items() if name.startswith("titans.memory")}
        assert len(made) == len(memory) == 6
        assert set(made.values()) == {"no-signal"}
        assert "no-signal" not in memory.values()
        seen = {row.component for row in rows["meta-fast"] if row.statistic == "relative_drift"}
        assert "titans.memory" in seen
    if variant == "titan":  # no read sees a write of its own window
        changes = {row.verdict for row in rows["adaptation"] if row.statistic == "loss_change"}
        assert changes == {"no-signal", "n/a"}


@pytest.mark.parametrize("variant", ["hope_attention", "hope_hybrid", "transformer", "titan"])
def test_nothing_is_learned_at_step_0(runs, variant, toy_text, tmp_path):
    results = analyze(
        load(runs[variant] / "step_000000.pt"), "all", data=toy_text, tokens=560, split="all", batch=16, fresh=2,
        cache_dir=tmp_path,
    )  # fmt: skip
    assert "learned" not in {row.verdict for row in results.rows}
    assert {row.verdict for row in results.rows if row.probe == "integrity"} == {"untrained"}


def test_a_loop_of_ones_own_is_watched(runs, toy_text):
    """A copy is measured: its hook points show what the copy runs, and the loop's model stays as it is."""
    import torch

    from hopeprobe import Monitor

    learner = load(runs["hope_hybrid"] / "step_000020.pt")
    before = {name: t.clone() for name, t in learner.module.state_dict().items()}
    monitor = Monitor("cms-similarity", tokens=320, every=1, data=toy_text, split="all")
    with monitor.watching(learner) as watch:
        watch.step()
    rows = monitor.results.rows
    assert {row.layer for row in rows if row.statistic == "delta_cosine"} == {0, 1}
    assert all(torch.equal(t, before[name]) for name, t in learner.module.state_dict().items())
