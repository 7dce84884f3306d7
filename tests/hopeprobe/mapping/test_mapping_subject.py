"""A mapped model as a subject: what probes make of it, files of its run, and what it cannot do."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from chunked import Model

import hopeprobe
from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.mapping import MappedSubject, load_mapped, subject_of
from hopeprobe.probes import PROBES
from hopeprobe.subject import MissingCapability


@pytest.fixture(scope="module")
def results(run, text, tmp_path_factory):
    from chunked import document

    made = document()
    made["model"] |= {
        "build": "chunked:Model", "arguments": "config", "weights": "weights", "strip": "_orig_mod.", "steps": "step",
        "initial": "step-0.pt", "checkpoints": "step-*.pt",
    }  # fmt: skip
    subject = hopeprobe.load(run / "step-60.pt", map=made)
    cache = tmp_path_factory.mktemp("nulls")
    return hopeprobe.analyze(subject, "all", data=text, split="all", tokens=1440, fresh=3, cache_dir=cache)


def test_every_probe_measures_it_or_says_why_not(results):
    assert results.missing == []
    table = results.table
    assert set(table.probe) == set(PROBES)
    absent = {probe for probe, rows in table.groupby("probe") if set(rows.verdict) == {"n/a"}}
    assert absent == {"selfmod-drift", "gate-selectivity", "relative-surprise"}
    assert table[table.verdict == "n/a"].note.str.len().min() > 0


def test_numbers_are_those_of_the_model(results, run, text):
    """Loss and drift of fast weights from their own start, by the model itself, without a map."""
    content = torch.load(run / "step-60.pt", weights_only=True)
    model = Model(**content["config"]).eval()
    model.load_state_dict({k.removeprefix("_orig_mod."): t for k, t in content["weights"].items()})
    kept = {}
    for i, layer in enumerate(model.layers):
        whole = layer.memory.forward
        layer.memory.forward = lambda x, i=i, whole=whole: kept.setdefault(i, whole(x)) and whole(x)
    losses, drift = [], []
    for document in text.documents("all"):
        tokens = torch.from_numpy(text.document_tokens(document).astype(np.int64))[None]
        kept.clear()
        with torch.no_grad():
            logits = model(tokens[:, :-1])["logits"]
        losses.append(torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="none"))
        if len(losses[-1]) >= 16:
            states, start = kept[1][1]["all.weights"][0], model.layers[1].memory.start.detach()
            drift.append(float((states[4] - start).norm() / start.norm()))
    table = results.table
    mean = table[table.statistic == "mean_loss"].value.item()
    assert mean == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    row = table[(table.statistic == "relative_drift") & (table.layer == 1) & (table.position == "16")]
    assert row.value.item() == pytest.approx(np.mean(drift), rel=1e-4)
    assert row.component.item() == "memory"


def test_training_is_seen_and_the_own_beginning_known(results):
    table = results.table.set_index("statistic")
    assert table.loc["mean_loss", "verdict"] == "learned"
    assert table.loc["frozen_loss", "verdict"] == "learned"
    assert table.loc["keys_loaded", "value"] == len(Model().state_dict())
    norms = table.loc["weight_norm"]
    assert (set(norms.component), set(norms.layer)) == ({"fast"}, {0, 1})
    assert set(results.nulls.null_kind) >= {"own-init", "fresh-init"}


def test_its_first_checkpoint_is_untrained(run, of_files, text, tmp_path):
    first = hopeprobe.load(run / "step-0.pt", map=of_files)
    found = hopeprobe.analyze(
        first, ["integrity", "surprise"], data=text, split="all", tokens=1440, cache_dir=tmp_path
    )
    assert set(found.table[found.table.probe == "integrity"].verdict) <= {"untrained", "inconclusive", "n/a"}
    assert "learned" not in set(found.table.verdict)
    assert "untrained" in set(found.table.verdict)


def test_the_run_is_walked_through_the_map(run, of_files):
    subject = load_mapped(run / "step-60.pt", of_files)
    assert [p.name for p in subject.siblings()] == ["step-0.pt", "step-30.pt", "step-60.pt"]
    other = subject.sibling(run / "step-30.pt")
    assert isinstance(other, MappedSubject)
    assert (other.trained_steps, subject.trained_steps) == (30, 60)
    own = subject.own_init()
    assert own.trained_steps == 0
    weights = torch.load(run / "step-0.pt", weights_only=True)["weights"]
    assert torch.equal(own.module.inner.head.bias, weights["_orig_mod.head.bias"])


def test_weights_are_named_by_mechanism(model, edited):
    groups = subject_of(model, edited("model", "context", 16)).parameter_groups()
    assert list(groups) == ["memory", "cms", "embed", "other"]
    assert "blocks.1.cms.fast.1.weight" in groups["cms"]
    assert groups["memory"]["blocks.0.memory.start"] is model.layers[0].memory.start
    assert list(groups["other"]) == ["head.weight", "head.bias"]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_a_module_in_memory_has_what_it_is_given(model, edited):
    made = edited("model", "context", 16)
    bare = subject_of(model, made, name="mine")
    for missing in (
        bare.own_init,
        bare.siblings,
        bare.training,
        lambda: bare.reinitialised(1),
        lambda: bare.init_state(1),
    ):
        with pytest.raises(MissingCapability, match="mine"):
            missing()
    with pytest.raises(MissingCapability, match="way to freeze cms"):
        bare.freeze_hooks("cms")
    whole = subject_of(model, made, initial=copy.deepcopy(model), build=Model)
    assert whole.own_init().trained_steps == 0
    a, b = whole.reinitialised(1), whole.reinitialised(1)
    assert torch.equal(a.module.inner.head.weight, b.module.inner.head.weight)
    assert not torch.equal(a.module.inner.head.weight, whole.reinitialised(2).module.inner.head.weight)


def test_a_build_that_seeds_itself_makes_no_fresh_models(model, edited):
    """Ten models alike would have no spread, and anything would differ from them."""

    def seeded():
        torch.manual_seed(0)
        return Model()

    for build in (seeded, lambda: model):
        subject = subject_of(model, edited("model", "context", 16), build=build)
        with pytest.raises(MissingCapability, match="`build` gives the same ones whatever torch's seed"):
            subject.reinitialised(1)


def test_what_a_callable_makes_has_no_identity_and_what_a_map_names_has(model, edited, run, of_files):
    """Nulls of partial(make, 1) would pass for those of partial(make, 2)."""
    with pytest.raises(MissingCapability, match="`build` of a map"):
        subject_of(model, edited("model", "context", 16), build=Model).identity()
    assert load_mapped(run / "step-60.pt", of_files).identity()["code"]


def test_the_gradient_is_that_of_the_module(model, edited):
    subject = subject_of(model, edited("model", "context", 16))
    tokens = torch.randint(23, (2, 17))
    subject.loss(tokens, torch.tensor([16, 8])).backward()
    ours = model.layers[0].memory.start.grad.clone()
    model.zero_grad()
    model.eval()
    losses = torch.nn.functional.cross_entropy(
        model(tokens[:, :-1])["logits"].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    (losses[0].sum() + losses[1, :8].sum()).div(24).backward()
    torch.testing.assert_close(ours, model.layers[0].memory.start.grad)


def test_whatever_changes_the_computation_changes_the_identity(
    run, of_files, model, edited, monkeypatch, tmp_path
):
    """But weights do not: nulls of a run are shared by its checkpoints."""
    made = edited("model", "context", 16)

    def identity(one=model, plan=made):
        return json.dumps(subject_of(one, plan).identity(), sort_keys=True)

    first = identity()
    assert first == identity(copy.deepcopy(model), copy.deepcopy(made))
    with torch.no_grad():
        model.head.bias += 1
    assert first == identity()
    assert first != identity(plan=edited("memory", "memory", "decay", "init", of=made))
    model.layers[0].memory.rate = 0.25
    assert first != identity()
    del model.layers[0].memory.rate
    model.dropout.p = 0.25
    assert first != identity()
    model.dropout.p = 0.5
    assert first == identity()
    small = load_mapped(run / "step-0.pt", of_files).identity()
    content = torch.load(run / "step-0.pt", weights_only=True)
    torch.save({**content, "config": {"vocab": 23, "dim": 8}}, tmp_path / "same.pt")
    other = load_mapped(tmp_path / "same.pt", of_files).identity()
    assert small["settings"] == other["settings"]
    assert small != other, "the file's arguments are no part of it"


def test_code_beside_a_model_is_part_of_it(tmp_path, monkeypatch):
    """Also what its file imports from its folder, and what builds it; not what is installed."""
    from hopeprobe.mapping.code import code_of

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_rule.py").write_text("def rule(x):\n    return x\n")
    (tmp_path / "own_net.py").write_text(
        "import numpy, torch\nfrom own_rule import rule\nclass Net(torch.nn.Linear):\n    pass\n"
    )
    (tmp_path / "own_build.py").write_text("def build():\n    return None\n")
    import own_build
    import own_net

    net = own_net.Net(1, 1)
    alone, with_build = code_of(net, None), code_of(net, own_build.build)
    assert None not in (alone, with_build)
    assert alone != with_build
    (tmp_path / "own_rule.py").write_text("def rule(x):\n    return 2 * x\n")
    assert code_of(net, None) not in (alone, None)
    (tmp_path / "own_build.py").write_text("def build():\n    return 1\n")
    assert code_of(net, own_build.build) not in (with_build, None)

    exec("class Typed(torch.nn.Linear):\n    pass\n", typed := {"torch": torch, "__name__": "typed_in"})
    assert code_of(typed["Typed"](1, 1), None) is None
    (tmp_path / "own_net.py").unlink()
    assert code_of(net, None) is None


def test_without_code_in_files_nothing_is_kept(model, edited, monkeypatch):
    monkeypatch.setattr("hopeprobe.mapping.subject.code_of", lambda *_: None)
    with pytest.raises(MissingCapability, match="defined in memory"):
        subject_of(model, edited("model", "context", 16)).identity()


def test_initial_weights_are_those_of_step_0(run, of_files, tmp_path):
    for name in ("step-0.pt", "step-60.pt"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    content = torch.load(run / "step-0.pt", weights_only=True)
    for changed, said in (
        ({"step": 3}, "says step 3"),
        ({"config": {"vocab": 23, "dim": 8}}, "with other arguments"),
    ):
        torch.save({**content, **changed}, tmp_path / "step-0.pt")
        with pytest.raises(MissingCapability, match=said):
            load_mapped(tmp_path / "step-60.pt", of_files).own_init()
    (tmp_path / "step-0.pt").unlink()
    with pytest.raises(MissingCapability, match="is not there"):
        load_mapped(tmp_path / "step-60.pt", of_files).own_init()


def test_safetensors_too(run, of_files, tmp_path):
    from safetensors.torch import save_file

    weights = torch.load(run / "step-60.pt", weights_only=True)["weights"]
    file = tmp_path / "model.safetensors"
    save_file({name: t.contiguous() for name, t in weights.items()}, file)
    of_files["model"] |= {"arguments": {"vocab": 23}, "steps": 60}
    del of_files["model"]["weights"]
    subject = load_mapped(file, of_files)
    assert subject.trained_steps == 60
    assert torch.equal(subject.module.inner.head.bias, weights["_orig_mod.head.bias"])
    # A number is each file's: the one that is said to be initial is so all the same.
    of_files["model"] |= {"initial": "first.safetensors"}
    first = torch.load(run / "step-0.pt", weights_only=True)["weights"]
    save_file({name: t.contiguous() for name, t in first.items()}, tmp_path / "first.safetensors")
    own = load_mapped(file, of_files).own_init()
    assert own.trained_steps == 0
    assert torch.equal(own.module.inner.head.bias, first["_orig_mod.head.bias"])


class Bomb:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_cannot_be_used_are_named(run, of_files, tmp_path, capsys):
    whole = (run / "step-60.pt").read_bytes()
    cases = {
        "cut.pt": (whole[: len(whole) // 2], "is damaged"),
        "empty.pt": (b"", "is empty (0 bytes)"),
        "text.pt": (b"not a checkpoint", "is not a checkpoint"),
        "cut.safetensors": (whole[:100], "is damaged"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInputError, match=re.escape(name)) as caught:
            load_mapped(tmp_path / name, of_files)
        assert message in str(caught.value)
    torch.save({"weights": Bomb()}, tmp_path / "bomb.pt")
    torch.save([1], tmp_path / "list.pt")
    for name, message in (
        ("bomb.pt", "wants to run code"),
        ("list.pt", "holds a list"),
        ("no.pt", "does not exist"),
        (".", "is a folder"),
    ):
        with pytest.raises(BadInputError, match=message):
            load_mapped(tmp_path / name, of_files)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("build", None, "build is missing"),
        ("build", "chunked:Modl", "build is 'chunked:Modl', not 'package.module:callable'"),
        ("build", "chunkd:Model", "No module named 'chunkd'; it is looked for in "),
        ("build", "chunked", "not 'package.module:callable'"),
        ("build", "chunked:CHUNK", "'chunked:CHUNK' cannot be called"),
        ("build", "chunked:failing", "raised TypeError"),
        ("build", "chunked:lying", "gave a dict, not a torch module"),
        ("build", "chunked:document", "does not say that it gives a torch module"),
        ("build", "builtins:dict", "does not say that it gives a torch module"),
        ("build", "os:system", "does not say that it gives a torch module"),
        ("build", "subprocess:run", "and is not called"),
        ("build", "torch:load", "and is not called"),
        ("build", "chunked:torch.hub.load", "and is not called"),
        ("arguments", "confg", "there is no 'confg'; did you mean 'config'"),
        ("arguments", "step", "'step' is a int, not keyword arguments"),
        ("arguments", {"vocab": 24}, "its weights are not those of chunked:Model: embed.weight"),
        ("weights", "weight", "there is no 'weight'; did you mean 'weights'"),
        ("weights", "step", "'step' is a int, not named weights"),
        ("weights", None, "among its weights weights, config, step are no tensors"),
        ("strip", "", "its weights are not those of chunked:Model"),
        ("steps", "config", "'config' of the file is {'vocab': 23}, not a number of steps"),
        ("seed", "config.seed", "there is no 'config.seed'"),
    ],
)
def test_what_does_not_make_a_model_of_a_file_is_named(run, of_files, edited, key, value, message):
    of_files["model"].setdefault(key, 0)
    made = edited("model", key, value, of=of_files)
    with pytest.raises(BadInputError) as caught:
        load_mapped(run / "step-60.pt", made)
    assert message in str(caught.value)


def test_what_needs_a_stream_is_not_measured_on_fresh_windows(results):
    """Windows that begin afresh would show that what was written changes nothing."""
    rows = results.table[results.table.statistic.isin(["recall", "state_loss_change"])]
    assert set(rows.verdict) == {"n/a"}
    assert rows.note.str.contains("no state").all()
    change = results.table[(results.table.statistic == "loss_change") & (results.table.component == "memory")]
    assert change.condition.tolist() == ["live - frozen"]
    assert change.value.notna().all()


def test_levels_whose_weights_nobody_names_have_no_rows_of_them(model, edited, text, tmp_path):
    subject = subject_of(model, {**edited("model", "context", 16), "groups": {}})
    found = hopeprobe.analyze(
        subject, "cms-dynamics", data=text, split="all", tokens=320, fresh=0, cache_dir=tmp_path
    )
    rows = found.table[found.table.statistic == "weight_norm"]
    assert rows.verdict.tolist() == ["n/a"]
    assert "does not say which weights" in rows.note.item()


def test_a_loop_of_somebodys_own_is_watched(model, edited, text, tmp_path):
    """Training goes as it would unwatched, dropout and all; what is measured is without."""
    model.train()
    alone = copy.deepcopy(model)
    made, data = (
        edited("model", "context", 16),
        torch.from_numpy(text.document_tokens(0).astype(np.int64))[None],
    )

    def train(one, watch=None):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(4):
            logits = one(data[:, :-1])["logits"]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits[0], data[0, 1:]).backward()
            optimizer.step()
            if watch is not None:
                watch.step()

    monitor = hopeprobe.Monitor(
        ["surprise", "meta-fast"], text, 1440, every=2, split="all", cache_dir=tmp_path
    )
    with monitor.watching(subject_of(model, made)) as watch:
        train(model, watch)
    train(alone)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    assert model.dropout.training
    rows = monitor.results.table
    losses = rows[rows.statistic == "mean_loss"]
    assert losses.step.tolist() == [0, 2, 4]
    assert losses.value.nunique() == 3
    model.eval()
    after = subject_of(model, made)
    found = hopeprobe.analyze(
        after, "surprise", data=text, split="all", tokens=1440, fresh=0, cache_dir=tmp_path
    )
    assert found.table.set_index("statistic").loc["mean_loss", "value"] == pytest.approx(
        losses.value.iloc[-1], rel=1e-6
    )


def test_what_a_model_raises_is_said_with_what_it_was_given(model, edited):
    class Picky(Model):
        def forward(self, tokens):
            if tokens.shape[1] % 4:
                raise ValueError("a multiple of 4\nor nothing")
            return super().forward(tokens)

    subject = subject_of(Picky(), edited("model", "context", 16))
    with pytest.raises(
        MeasurementError, match=r"the model raised, of tokens \[1, 3\], ValueError: a multiple of 4$"
    ):
        subject.run(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(BadInputError, match="the model raised, of tokens"):
        subject_of(Picky(), edited("model", "context", 7))


def test_whether_it_writes_is_known_only_where_the_map_says_so(model, edited, text, tmp_path):
    """Without a memory in its map a model that writes would pass for one that never does, and live for frozen."""
    bare = {**edited("model", "context", 16), "memory": {}, "points": {}}
    silent, said = subject_of(model, bare), subject_of(model, edited("model", "writes", False, of=bare))
    for subject, expected in ((silent, True), (said, False)):
        found = hopeprobe.analyze(
            subject,
            ["integrity", "adaptation"],
            data=text,
            split="all",
            tokens=1440,
            fresh=0,
            cache_dir=tmp_path,
        ).table
        loss = found[found.statistic == "frozen_loss"]
        assert (loss.verdict.item() == "n/a") == expected
        notes = " ".join(found[found.probe == "adaptation"].note)
        assert ("whether it writes is not known" in notes) == expected
        assert ("never writes" in notes) != expected
    with pytest.raises(BadInputError, match="writes is false, and there is"):
        subject_of(model, edited("model", "writes", False, of=edited("model", "context", 16)))
