"""Files that the package saved: found by `hopeprobe.load`, never half loaded, set beside their own beginning."""

import shutil
from importlib import metadata

import pytest
from peer_streams import MEMORIES, make, plain
from peer_toys import VOCAB, train

from hopeprobe.errors import BadInputError
from hopeprobe.subject import MissingCapability, load

pytestmark = pytest.mark.peers


def test_the_entry_point_is_the_adapters():
    """Installed as a distribution of its own, all of whose modules are there wherever one stands."""
    import subprocess
    import sys

    from hopeprobe.subject import LOADER_GROUP

    (entry,) = (e for e in metadata.entry_points(group=LOADER_GROUP) if e.name == "nested-learning")
    assert entry.dist.name == "hopeprobe-nested-learning"
    listed = entry.dist.read_text("top_level.txt").split()
    assert {"nested_learning_subject", "nested_learning_titan", "nested_learning_parts"} <= set(listed)
    code = f"import {', '.join(listed)}; print({entry.module}.{entry.attr}.__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == "nested_learning_subject", done.stderr


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
    other = r"is of another run: blocks\.0\.selfmod\.m_q\.w2\.weight differs"
    with pytest.raises(MissingCapability, match=rf"what train\.seed 7 gives {other}"):
        lonely.own_init()
    content = torch.load(toy_run / "step_000000.pt", weights_only=True)
    content["model"] = make(seed=5).module.peer.state_dict()
    torch.save(content, tmp_path / "step_000000.pt")
    with pytest.raises(MissingCapability, match=rf"step_000000\.pt beside it {other}"):
        lonely.own_init()


@pytest.mark.parametrize("damage", ["cut off", "another configuration", "no weights"])
def test_a_beginning_that_cannot_be_used_is_as_good_as_absent(toy_run, tmp_path, damage):
    import torch

    shutil.copy(toy_run / "step_000060.pt", tmp_path / "step_000060.pt")
    first = tmp_path / "step_000000.pt"
    content = torch.load(toy_run / "step_000000.pt", weights_only=True)
    if damage == "another configuration":
        content["config"]["model"]["self_mod_chunk_size"] = 4
    elif damage == "no weights":
        content["model"] = {}
    torch.save(content, first)
    if damage == "cut off":
        first.write_bytes(first.read_bytes()[:1000])
    why = {
        "cut off": "is no checkpoint",
        "another configuration": "has another",
        "no weights": "cannot be used",
    }
    with pytest.raises(
        MissingCapability, match=rf"step_000000\.pt beside it {why[damage]}.*; what train\.seed 7"
    ):
        load(tmp_path / "step_000060.pt").own_init()


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


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("model", {"block_variant": "hope_mamba"}, "cannot build the model .*Unsupported block_variant='hope_mamba'"),
        ("model", {"heads": 3, "block_variant": "transformer"}, "build the model .*dim must be divisible by heads"),
        ("model", {"vocab_size": "many"}, "cannot build the model"),
        ("data", {"seq_len": "long"}, "cannot be read: invalid literal .* 'long'"),
        (
            "train",
            {"online_carry_attention_cache": True, "online_chunk_size": 8},
            "one or the other",
        ),
    ],
)  # fmt: skip
def test_a_configuration_that_the_package_cannot_run(toy_run, tmp_path, part, values, message):
    import torch

    content = torch.load(toy_run / "step_000060.pt", weights_only=True)
    if part == "train":
        content["config"]["model"] |= {"block_variant": "hope_attention", "local_conv_window": 4}
    content["config"][part] |= values
    torch.save(content, tmp_path / "step_000062.pt")
    with pytest.raises(BadInputError, match=rf"step_000062\.pt: .*{message}"):
        load(tmp_path / "step_000062.pt")


def test_other_files_are_left_to_others(tmp_path):
    import torch
    from nested_learning_subject import load_subject

    assert load_subject(tmp_path / "nowhere.pt") is None
    text = tmp_path / "a.pt"
    text.write_text("not a checkpoint")
    assert load_subject(text) is None
    torch.save({"model": {}}, tmp_path / "b.pt")
    assert load_subject(tmp_path / "b.pt") is None
    trainers = {"model": {}, "optimizer": {}, "step": 3, "config": {"model": {"dim": 16}, "lr": 1e-3}}
    for config in (trainers["config"], {"model": "gpt"}, {}, "a.yaml", None):
        torch.save(trainers | {"config": config}, tmp_path / "c.pt")
        assert load_subject(tmp_path / "c.pt") is None


def test_the_package_is_asked_for(toy_run, monkeypatch):
    """Without it, or with another than was read, a file of its is told from others', and not half read."""
    path, version = toy_run / "step_000060.pt", metadata.version

    def absent(name):
        if name == "nested-learning":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(BadInputError, match=r"step_000060\.pt is .*pip install nested-learning==0\.2\.0"):
        load(path)
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.3.0" if name == "nested-learning" else version(name)
    )
    with pytest.raises(BadInputError, match=r"knows what 0\.2\.0 computes, and 0\.3\.0 is installed"):
        load(path)


def test_identity_tells_computations_apart():
    same = make(seed=1).identity()
    assert same == make(seed=2).identity()
    for part in ({"model": {"self_mod_chunk_size": 4}}, {"train": {"online_chunk_size": 16}},
                 {"train": {"per_layer_teach_signal": True}}):  # fmt: skip
        assert make(**part).identity() != same
    assert same["version"] == "0.2.0"


def shipped():
    """Names of the configurations that come with the package, of whole models."""
    from importlib import resources

    folder = resources.files("nested_learning") / "configs"
    names = [path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml")]
    for group in ("hope", "ablations"):
        names += [f"{group}/{path.name.removesuffix('.yaml')}" for path in (folder / group).iterdir()]
    return sorted(names)


def test_every_configuration_that_comes_with_the_package(tokens):
    """At a toy's size: each is called as it says, and runs, its five kinds of model among them."""
    import torch
    from nested_learning.config_utils import compose_config
    from nested_learning_subject import NestedLearningSubject
    from omegaconf import OmegaConf

    kinds, ticks = set(), set()
    for name in shipped():
        config = OmegaConf.to_container(compose_config(name))
        config["model"] |= {"vocab_size": 97, "dim": 16, "heads": 2, "num_layers": 2}
        config["data"]["seq_len"] = 16
        subject = NestedLearningSubject(config, seed=0)
        out = subject.run(tokens[:1, :17])
        assert bool(torch.isfinite(out.losses).all()), name
        first = plain(subject, tokens[:1, : min(subject.tick, 16) + 1])
        torch.testing.assert_close(out.losses[:, : first.shape[1]], first, rtol=0, atol=1e-5, msg=name)
        model = config["model"]
        kinds.add(
            model.get("type") if model.get("type") == "titan" else model.get("block_variant", "hope_hybrid")
        )
        ticks.add(subject.tick)
    assert kinds == {"hope_selfmod", "hope_attention", "hope_hybrid", "transformer", "titan"}
    assert {1, 16} <= ticks
