"""One cell of a grid: its record against an independent measurement, going on, and which cells are one computation."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hopeprobe.errors import BadInputError
from hopeprobe.model.cell import RECORD, CellSpec, computation, read_record, run_cell, same_computation
from hopeprobe.model.checkpoint import read, step_path
from hopeprobe.model.config import CMSLevel, GateConfig, ModelConfig
from hopeprobe.model.grid import workers_for
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.train import TrainConfig
from hopeprobe.model.variants import VARIANTS
from hopeprobe.tokens import EvalWindows, TokenData

MODEL = ModelConfig(vocab_size=53, dim=8, layers=1, context=16, heads=2, embed_std=0.1)
TRAIN = TrainConfig(
    steps=4, batch=2, learning_rate=1e-2, warmup=2, checkpoint_every=2, eval_every=2, eval_tokens=64
)


def documents(seed=0):
    rng = np.random.default_rng(seed)
    return TokenData.from_documents(
        [rng.integers(0, 52, 30) for _ in range(40)], name=f"random {seed}", vocab_size=53, end_of_text=52
    )


DATA = documents()


def spec(folder, variant="full", seed=5, threshold=None, name=None, steps=4, tokens=60):
    model = dataclasses.replace(MODEL, variant=variant)
    model = model if threshold is None else dataclasses.replace(model, surprise_threshold=threshold)
    train = dataclasses.replace(TRAIN, steps=steps, seed=seed)
    return CellSpec(
        name or variant, variant, seed, "tiny", model, train, ("random",), tokens, folder, threshold
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cell")
    return spec(folder), run_cell(spec(folder), DATA)


@pytest.mark.slow
def test_a_cell_on_a_device_is_the_one_on_the_cpu(full, tmp_path):
    from pretend import DEVICE

    _, here = full
    there = run_cell(dataclasses.replace(spec(tmp_path), device=DEVICE), DATA)
    assert (here["machine"]["device"], there["machine"]["device"]) == ("cpu", "pretend")
    assert there["identity"] == here["identity"]
    for name in ("live", "frozen", "surprise_min", "train_loss"):
        assert math.isclose(there[name], here[name], rel_tol=1e-4), name


def test_cells_on_a_device_run_one_at_a_time(tmp_path):
    ours, theirs = spec(tmp_path), dataclasses.replace(spec(tmp_path), device="cuda:0")
    assert workers_for([ours, ours]) >= workers_for([theirs, theirs]) == 1
    assert CellSpec.from_json(theirs.to_json()) == theirs


def test_the_record_is_what_the_last_checkpoint_gives(full):
    asked, record = full
    model = read(step_path(asked.folder, 4)).to_model()
    losses = {}
    for frozen in (False, True):
        parts = []
        for batch in EvalWindows(DATA, context=16, tokens=60, batch=3):
            hooks = [("blocks.*.hook_write_gate", lambda gate, hook: gate * 0)] if frozen else []
            with torch.no_grad(), model.hooks(fwd_hooks=hooks):
                out = model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.lengths))
            parts.append(out.losses[out.scored].double())
        losses[frozen] = torch.cat(parts)
    assert abs(record["live"] - losses[False].mean().item()) < 1e-6
    assert abs(record["frozen"] - losses[True].mean().item()) < 1e-6
    assert record["live"] != record["frozen"]
    assert record["gate_rate"] == (losses[False] > 0.02).double().mean().item() == 1.0
    lines = [json.loads(line) for line in (asked.folder / "metrics.jsonl").read_text().splitlines()]
    lowest = min(losses[False].min().item(), *(line["surprise_min"] for line in lines))
    assert abs(record["surprise_min"] - lowest) < 1e-6
    assert record["curve"]["step"] == [1, 2, 3, 4]
    np.testing.assert_allclose(record["curve"]["loss"], [line["loss"] for line in lines], atol=1e-5)
    assert record["curve"]["held_out_step"] == [2, 4]
    assert record["train_loss"] == lines[-1]["loss"]
    assert record["evaluation"]["tokens"] == 60
    assert json.loads((asked.folder / RECORD).read_text()) == record


def test_the_same_seed_gives_the_same_losses_and_every_variant_the_same_first_batch(full, tmp_path):
    record = run_cell(spec(tmp_path / "again"), DATA)
    timeless = {k: v for k, v in full[1].items() if k != "train_s"}
    assert {k: v for k, v in record.items() if k != "train_s"} == timeless
    digests = {v: run_cell(spec(tmp_path / v, v, steps=1), DATA)["first_batch"] for v in VARIANTS}
    assert set(digests.values()) == {full[1]["first_batch"]}
    assert run_cell(spec(tmp_path / "seed", seed=6, steps=1), DATA)["first_batch"] != full[1]["first_batch"]


def test_a_killed_cell_goes_on_and_ends_the_same(full, tmp_path):
    class KilledError(Exception):
        pass

    def told(step, loss):
        if step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        run_cell(spec(tmp_path), DATA, told)
    assert read_record(spec(tmp_path), DATA) is None
    steps = []
    record = run_cell(spec(tmp_path), DATA, lambda step, loss: steps.append(step))
    assert steps == [3, 4]  # from the checkpoint of step 2
    assert {k: v for k, v in record.items() if k != "train_s"} == {
        k: v for k, v in full[1].items() if k != "train_s"
    }


def test_a_cell_is_done_only_as_it_was_asked_for(full, tmp_path):
    asked, record = full
    assert read_record(asked, DATA) == record
    for other in (
        dataclasses.replace(asked, tokens=50),
        dataclasses.replace(asked, train=dataclasses.replace(asked.train, steps=6)),
        dataclasses.replace(asked, train=dataclasses.replace(asked.train, learning_rate=1e-3)),
    ):
        assert read_record(other, DATA) is None
    assert read_record(asked, documents(1)) is None
    every = dataclasses.replace(asked, train=dataclasses.replace(asked.train, checkpoint_every=1))
    assert read_record(every, DATA) == record


def test_a_cell_can_be_extended_and_not_cut_short(tmp_path):
    run_cell(spec(tmp_path, steps=2), DATA)
    steps = []
    longer = run_cell(spec(tmp_path), DATA, lambda step, loss: steps.append(step))
    assert (steps, longer["steps"]) == ([3, 4], 4)
    with pytest.raises(BadInputError, match="has gone 4 steps already, more than the 2 asked for"):
        run_cell(spec(tmp_path, steps=2), DATA)


def test_a_run_that_diverges_has_a_record_too(tmp_path):
    wild = spec(tmp_path)
    wild = dataclasses.replace(
        wild, train=dataclasses.replace(wild.train, learning_rate=1e30, warmup=0, clip=1e30)
    )
    record = run_cell(wild, DATA)
    assert record["status"] == "diverged"
    assert "training stopped at step" in record["why"]
    assert "live" not in record
    assert str(tmp_path) not in json.dumps(record)  # a record may be published
    assert record["parameters"] == sum(p.numel() for p in HopeModel(MODEL, 0).parameters())
    assert read_record(wild, DATA) == record


def test_a_damaged_record_is_named(tmp_path):
    asked = spec(tmp_path)
    (tmp_path / RECORD).write_text('{"identity"')
    with pytest.raises(BadInputError, match=r"cell\.json is not the record of a cell .* delete it"):
        read_record(asked, DATA)


def test_a_record_that_lacks_a_field_is_named(full, tmp_path):
    asked, record = full
    for name in ("status", "epochs"):
        lacking = dataclasses.replace(asked, folder=tmp_path)
        (tmp_path / RECORD).write_text(json.dumps({k: v for k, v in record.items() if k != name}))
        with pytest.raises(
            BadInputError, match=rf"cell\.json is not the record of a cell \(it has no {name}\)"
        ):
            read_record(lacking, DATA)


def test_a_spec_travels_as_a_line():
    asked = spec(Path("x"), "titans", threshold=0.5)
    assert "\n" not in asked.to_json()
    assert CellSpec.from_json(asked.to_json()) == asked


def test_what_is_one_computation():
    def key(variant, **more):
        return computation(dataclasses.replace(MODEL, variant=variant, **more))

    assert key("full") == key("no-surprise") == key("full", surprise_threshold=3.0)
    assert key("transformer") == key("transformer-matched")  # at sizes that do not tell them apart
    assert key("same-period") != key("full")
    one = (CMSLevel("fast", 8), CMSLevel("slow", 8))
    assert key("same-period", cms_levels=one) == key("full", cms_levels=one)
    distinct = [v for v in VARIANTS if v not in ("no-surprise", "transformer-matched")]
    assert len({json.dumps(key(v), sort_keys=True) for v in distinct}) == len(distinct)


def test_thresholds_below_every_surprise_are_one_and_others_are_not(full, tmp_path):
    _, record = full
    lowest = record["surprise_min"]
    assert 2 < lowest < 4

    def why(threshold, variant="full", of=record):
        return same_computation(of, dataclasses.replace(MODEL, variant=variant, surprise_threshold=threshold))

    assert "every gate was open: the lowest surprise" in why(0.0)
    assert why(0.02) == "the threshold is 0.02 in both"
    assert why(0.99 * lowest) is not None
    assert why(0.02, "no-surprise") is not None
    assert why(lowest) is why(1.01 * lowest) is why(0.0, "no-cms") is None
    assert why(0.0, of=record | {"surprise_min": None}) is None
    assert why(0.0, of=record | {"status": "diverged"}) is None
    # and so it is: the losses are equal to the last bit below, and differ above
    below = run_cell(spec(tmp_path / "below", threshold=0.99 * lowest), DATA)
    above = run_cell(spec(tmp_path / "above", threshold=1.05 * lowest), DATA)
    plain = run_cell(spec(tmp_path / "plain", "no-surprise"), DATA)
    assert below["live"] == plain["live"] == record["live"]
    assert below["curve"]["loss"] == record["curve"]["loss"]
    assert above["live"] != record["live"]
    assert not math.isnan(above["live"])


def test_runs_under_one_gate_are_one_computation_and_under_two_are_not():
    def gated(**gate):
        return dataclasses.replace(MODEL, gate=GateConfig(**gate))

    quantile = gated(rule="quantile", budget=0.25)
    done = {"status": "done", "model": quantile.to_dict(), "surprise_min": 9.0}
    assert same_computation(done, quantile) == "the gate is the same in both"
    # The threshold is nothing to a gate that does not ask for it; the lowest surprise says nothing of a budget.
    other = dataclasses.replace(quantile, surprise_threshold=1.0)
    assert same_computation(done, other) == "the gate is the same in both"
    for one in (
        MODEL,
        gated(rule="quantile", budget=0.5),
        gated(rule="random", budget=0.25),
        gated(writes="cms"),
    ):
        assert same_computation(done, one) is None
        assert same_computation(done | {"model": one.to_dict()}, quantile) is None


def test_variants_of_one_computation_begin_with_the_same_weights():
    full, none = (HopeModel(dataclasses.replace(MODEL, variant=v), 3) for v in ("full", "no-surprise"))
    assert all(torch.equal(a, b) for a, b in zip(full.parameters(), none.parameters(), strict=True))


def test_a_held_out_loss_that_is_not_finite_is_a_divergence(tmp_path, monkeypatch):
    from hopeprobe.model import cell
    from hopeprobe.model.measure import HeldOut

    monkeypatch.setattr(cell, "held_out", lambda *args, **more: HeldOut(math.nan, math.nan, 1.0))
    record = run_cell(spec(tmp_path), DATA)
    assert (record["status"], record["why"]) == (
        "diverged", "after the last step the held-out loss is nan live, nan frozen",
    )  # fmt: skip
    assert read_record(spec(tmp_path), DATA) == record
