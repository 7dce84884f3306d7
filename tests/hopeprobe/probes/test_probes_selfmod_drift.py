"""Drift of the memories' parameters: a run that learns, one whose generators are cut off, and what is not there."""

import dataclasses

import numpy as np
import pytest

from hopeprobe.analysis import analyze, missing_from
from hopeprobe.model.config import preset, published
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.probes.selfmod_drift import SelfModDrift, parts_of
from hopeprobe.subject import MissingCapability, load

PROBE = SelfModDrift()
GENERATORS = ("k", "v", "eta", "alpha")


def frame_of(checkpoint, settings):
    results = analyze(checkpoint, [PROBE], **settings)
    assert not missing_from(results)
    return results.table


def of(frame, statistic, layer, component):
    wanted = (frame.statistic == statistic) & (frame.component == component)
    rows = frame[wanted & (frame.layer.isna() if layer is None else frame.layer == layer)]
    assert len(rows) == 1, (statistic, layer, component)
    return rows.iloc[0]


def test_parts_are_parameters_then_memories_then_all(subject):
    names = list(subject.parameter_groups()["selfmod"])
    parts = parts_of(names)
    assert len(names) == 2 * 17
    assert [p.component for p in parts if p.layer == 0 and p.component.startswith("eta")] == [
        "eta_bias", "eta.w2", "eta.w1", "eta.skip"
    ]  # fmt: skip
    of_memories = {p.component: p.names for p in parts if p.layer is None}
    assert set(of_memories) == {
        "memory", "q", "k", "v", "eta", "alpha", "conv", "eta_bias", "alpha_bias", "all"
    }  # fmt: skip
    assert of_memories["k"] == tuple(n for n in names if ".memories.k." in n)
    assert sorted(of_memories["all"]) == sorted(names)
    assert sorted(n for p in parts if p.layer is not None for n in p.names) == sorted(names)


def test_small_has_the_84_parameters_of_the_study_and_three_a_layer_beside_them():
    names = [n for n in HopeModel.shapes(preset("small")) if ".selfmod." in n]
    parts = [p for p in parts_of(names) if p.layer is not None]
    assert sum(p.component not in ("conv", "eta_bias", "alpha_bias") for p in parts) == 84
    assert len(parts) == 84 + 3 * 6


def test_a_run_that_learns_moved_everywhere(toy_run, settings):
    frame = frame_of(toy_run / "step-000040.pt", settings)
    assert "no-signal" not in set(frame.verdict)
    times = frame[frame.statistic.isin(("settled_step", "moved_by_step_200"))]
    assert set(times.verdict) == {"inconclusive", "n/a"}, "when it was decides nothing"
    distances = frame[frame.statistic == "distance_from_init"]
    assert len(distances) == 2 * 17 + 10
    assert (distances.value > 0).all()
    judged = frame[
        frame.statistic.isin(("distance_from_init", "displacement")) & (frame.verdict != "inconclusive")
    ]
    beyond = judged.verdict[judged.statistic == "distance_from_init"] == "learned"
    assert (beyond == (distances.value[beyond.index] > 0.05)).all()
    assert of(frame, "distance_from_init", None, "all").verdict == "learned"
    for layer, component in ((None, "all"), (0, "k.w1"), (1, "memory.w2")):
        both = {of(frame, s, layer, component).verdict for s in ("distance_from_init", "displacement")}
        assert len(both) == 1, "in other units it is the same distance"
    moved = frame[(frame.statistic == "displacement") & frame.layer.notna()].value
    whole = of(frame, "displacement", None, "all").value
    assert whole == pytest.approx(np.sqrt((moved**2).sum())), "the whole is made of its parts"
    assert of(frame, "settled_step", 0, "k.w1").value == 40
    assert of(frame, "moved_by_step_200", None, "").verdict == "n/a"


def trained(config, data, folder):
    """Five steps under a configuration."""
    train(config, TrainConfig(steps=5, learning_rate=1e-2, warmup=0, eval_tokens=100), data, folder)
    return folder / "step-000005.pt"


def test_generators_that_get_no_gradient_are_no_signal(toy_data, tmp_path, settings, configs):
    """Under the published rule, whose writes are no part of the graph."""
    frame = frame_of(trained(published(configs["toy"]), toy_data, tmp_path), settings)
    for memory in GENERATORS:
        row = of(frame, "distance_from_init", None, memory)
        assert (row.verdict, row.value) == ("no-signal", 0.0)
        assert "never moved: the loss does not reach it" in row.note
        assert of(frame, "settled_step", 1, f"{memory}.w1").verdict == "no-signal"
    for layer, component in ((None, "memory"), (0, "w_q"), (1, "conv")):
        assert of(frame, "distance_from_init", layer, component).verdict in ("learned", "at-init")
    assert "no signal in 20 of" in of(frame, "displacement", None, "all").note


def test_generators_that_weight_decay_alone_moved_are_no_signal_too(toy_data, tmp_path, settings, configs):
    """Memories are read together, so that a generator's gradient is zeros rather than none, and AdamW decays it."""
    config = dataclasses.replace(configs["toy"], write_grad="stop")
    frame = frame_of(trained(config, toy_data, tmp_path), settings)
    for memory in GENERATORS:
        assert of(frame, "distance_from_init", None, memory).verdict == "no-signal"
    row = of(frame, "distance_from_init", 0, "k.w1")
    assert row.value == pytest.approx(1 - (1 - 1e-3) ** 5, rel=1e-3)
    assert "weight decay does without any gradient" in row.note
    assert of(frame, "settled_step", 0, "k.w1").verdict == "no-signal"
    for memory in ("memory", "q", "conv"):
        assert of(frame, "distance_from_init", None, memory).verdict in ("learned", "at-init")


def test_step_zero_is_at_initialisation(toy_run, settings):
    frame = frame_of(toy_run / "step-000000.pt", settings)
    distances = frame[frame.statistic == "distance_from_init"]
    assert set(distances.verdict) == {"at-init"}
    assert set(distances.value) == {0.0}


def test_without_initial_weights_every_statistic_says_so(toy_run, settings, monkeypatch):
    subject = load(toy_run / "step-000040.pt")

    def refuse():
        raise MissingCapability("lost")

    monkeypatch.setattr(subject, "own_init", refuse)
    frame = frame_of(subject, settings)
    assert list(frame.statistic) == list(PROBE.statistics)
    assert set(frame.verdict) == {"n/a"}
    assert frame.note.str.contains("initial weights are not known").all()


def test_a_model_without_memories_is_not_applicable(subject_of, configs, settings):
    frame = frame_of(subject_of(dataclasses.replace(configs["toy"], variant="transformer")), settings)
    assert list(frame.statistic) == list(PROBE.statistics)
    assert set(frame.verdict) == {"n/a"}
    assert frame.note.str.contains("no self-modifying memories").all()
