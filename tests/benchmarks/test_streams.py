"""Long streams in short: what the record of a long one holds, on fewer tokens; the ledger against planted faults."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hopeprobe.model.config import GateConfig, ModelConfig, preset
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.subject import HopeSubject

sys.path.insert(0, str(Path(__file__).parent))

from streams import Norms, Stream, run

SMALL = ModelConfig(vocab_size=61, dim=8, layers=1, context=32, heads=2)
RECORD = Path(__file__).parent / "results" / "streams.json"


pytestmark = pytest.mark.usefixtures("one_thread")


def a_stream(gate=None, streams=3, config=SMALL, n=2000):
    config = config if gate is None else dataclasses.replace(config, gate=gate)
    text = np.random.default_rng(0).integers(0, config.vocab_size, n).astype(np.uint16)
    return Stream(HopeSubject(HopeModel(config)), text, streams)


def check(lines, stream, share=None):
    """What must hold of every line, and of how they go on."""
    for line in lines:
        assert line["position"] + line["pending"] == line["fed"]
        assert line["scored"] == line["position"]
        assert not line["losses_not_finite"]
        assert not line["state_not_finite"]
        assert line["norms"]
        assert all(0 < size < 4 and moved < 4 for size, moved, _ in line["norms"].values())
        gate = line["gate"]
        assert gate["differs"] == 0
        assert gate.get("scores_lost", 0) == gate.get("chain_wrong", 0) == 0
        assert gate.get("owed", 0) < 1e-6 * line["scored"] + 1e-6
        assert gate.get("mean", 0) < 1e-4
        assert gate.get("scores", 0) < 1e-3
        if share is not None:
            assert gate["open_share"] == pytest.approx(share, abs=4 / line["scored"])
    assert lines[-1]["fed"] == -(-lines[-1]["tokens"] // stream.streams)
    assert all(stream.alone(row, 24) < 1e-5 for row in range(stream.streams))


@pytest.mark.parametrize(
    "gate",
    [
        None,
        GateConfig("quantile", 0.25, history=32),
        GateConfig("random", 0.25, history=32),
        GateConfig("zscore", threshold=0.5),
        GateConfig("ratio", 0.25, history=32),
        GateConfig("momentum", 0.25, history=32),
    ],
    ids=lambda gate: gate and gate.rule,
)
def test_positions_and_gates_are_right_at_the_end(gate):
    stream = a_stream(gate)
    lines = list(run(stream, 900, 100, piece=13))
    assert [line["fed"] for line in lines] == [100, 200, 300]
    check(lines, stream, gate.budget if gate else 1.0)


def test_the_ledger_sees_a_gate_that_is_wrong():
    stream = a_stream(GateConfig("quantile", 0.25, history=32))
    stream.feed(50)
    held = stream.state.gate
    stream.state = stream.state._replace(
        gate=held._replace(owed=held.owed + 2, scores=held.scores.roll(1, 2))
    )
    stream.feed(150)
    found = stream.line(Norms(stream.subject))["gate"]
    assert found["differs"] > 0
    assert found["owed"] > 0.5


def test_what_is_not_finite_is_counted():
    stream = a_stream()
    stream.feed(30)
    stream.state.layers[0].selfmod.groups[0].w2[1] = torch.nan
    stream.feed(30)
    line = stream.line(Norms(stream.subject))
    assert line["losses_not_finite"] == 32
    assert line["state_not_finite"] > 0
    assert line["gate"]["open_share"] < 1


def test_a_stream_goes_on_from_what_was_kept(tmp_path):
    whole, first, second = (a_stream(GateConfig("momentum", 0.25, history=32)) for _ in range(3))
    lines = list(run(whole, 600, 100, piece=13))
    begun = list(run(first, 300, 100, piece=13))
    first.save(tmp_path / "state.pt")
    second.restore(tmp_path / "state.pt")
    for one in (*lines, *(more := list(run(second, 600, 100, piece=13))), *begun):
        for clock in ("rss_mib", "peak_mib", "tokens_per_s"):
            del one[clock]
    assert begun + more == lines


@pytest.mark.slow
def test_fifty_thousand_tokens():
    stream = a_stream(config=preset("nano"), streams=16, n=60_000)
    lines = list(run(stream, 50_000, 625))
    check(lines, stream, 1.0)
    assert lines[-1]["tokens"] == 50_000
    assert lines[-1]["rss_mib"] < 1.05 * lines[1]["rss_mib"] + 16
    assert lines[-1]["state_bytes"] < 1.5 * lines[1]["state_bytes"]


def test_the_record_says_what_it_must():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    last, every = record["lines"][-1], record["all_lines"]
    assert last["tokens"] == record["reached"] >= 5_000_000
    assert last["position"] + last["pending"] == last["fed"] == last["tokens"] // record["streams"]
    assert every["losses_not_finite"] == every["state_not_finite"] == 0
    assert every["gates_that_differ"] == every["positions_wrong"] == 0
    memories = [one for name, one in record["norms"].items() if ".selfmod." in name]
    levels = [one for name, one in record["norms"].items() if ".cms." in name]
    assert len(memories) > 8 < len(levels) + 1
    assert max(one["largest_ratio"] for one in memories) < 1.2  # they decay towards where they began
    assert max(one["largest_ratio"] for one in levels) < 2  # nothing decays, they walk


def test_levels_with_a_max_change_stay_within_it():
    levels = tuple(dataclasses.replace(level, max_change=0.01) for level in SMALL.cms_levels)
    free, held = a_stream(), a_stream(config=dataclasses.replace(SMALL, cms_levels=levels))
    moved = [
        max(
            values[1]
            for line in run(stream, 900, 100)
            for name, values in line["norms"].items()
            if ".cms." in name
        )
        for stream in (free, held)
    ]
    assert moved[1] <= 0.01 * (1 + 1e-5) < moved[0]


def test_the_record_of_a_held_stream_is_at_its_bound_and_not_over_it():
    record = json.loads((RECORD.parent / "streams-held.json").read_text(encoding="utf-8"))
    assert record["reached"] == 2_000_000
    levels = [one for name, one in record["norms"].items() if ".cms." in name]
    assert max(one["largest_distance"] for one in levels) == pytest.approx(0.25, rel=1e-5)
    assert max(one["largest_ratio"] for one in levels) < 1.25
