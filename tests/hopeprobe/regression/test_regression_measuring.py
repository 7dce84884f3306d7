"""Baselines: what they hold, what may change in them, and files that are none."""

import dataclasses
import json
import math

import numpy as np
import pytest

import hopeprobe.regression.measuring as measuring
from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.probes.gate_selectivity import GateSelectivity
from hopeprobe.regression import Baseline, changed, make_baseline, renewed
from hopeprobe.stats.verdict import Verdict
from hopeprobe.subject import GateRule


@pytest.fixture
def given(monkeypatch):
    """`make_baseline` on results made by hand: of the first pass, and of the one in other batches."""

    def make(first, again=None, checkpoints=1, **settings):
        passes = [first, again if again is not None else first]
        monkeypatch.setattr(measuring, "analyze", lambda *_, **__: passes.pop(0))
        monkeypatch.setattr(measuring, "_other_batch", lambda *_: 3)
        monkeypatch.setattr(measuring, "check_seeds", lambda _: None)
        return make_baseline(
            [f"{i}.pt" for i in range(checkpoints)], "surprise", "text.jsonl", 1000, **settings
        )

    return make


def test_noise_is_what_arithmetic_in_another_order_can_do(given, row, results):
    first = results([row("far", 1000.0), row("near", 0.0), row("jumps", 1.0), row("exact", 3.0, n_tokens=0)])
    again = results(
        [row("far", 1000.0), row("near", 0.0), row("jumps", 1.001), row("exact", 3.0, n_tokens=0)]
    )
    noise = {one.address.statistic: one.noise for one in given(first, again).tracked}
    assert noise["far"] == pytest.approx(0.01), "a hundred-thousandth of the number"
    assert noise["near"] == pytest.approx(1e-5), "a thousandth of its standard error"
    assert noise["jumps"] == pytest.approx(0.01), "ten times what other batches changed"
    assert noise["exact"] == pytest.approx(3e-5), "of weights: no tokens, no standard error"


def test_a_token_on_the_other_side_of_a_line_is_noise_where_tokens_are_counted(
    monkeypatch, given, row, results
):
    first = results([row("rate", 0.5)])
    assert given(first).tracked[0].noise == pytest.approx(1e-5)
    monkeypatch.setattr(measuring, "chosen_probes", lambda _: [GateSelectivity()])
    counted = results([row("rate", 0.5, probe="gate-selectivity")])
    assert given(counted).tracked[0].noise == pytest.approx(2 / 1000)


def test_one_checkpoint_tolerates_nothing_but_noise(given, row, results):
    made = given(results([row(value=2.0)]))
    assert not made.of_seeds
    assert made.tracked[0].tolerance == 0.0
    assert made.tracked[0].values == (2.0,)
    assert made.settings.probes == ("surprise",)
    assert made.settings.data == ("text.jsonl",)


def test_tolerances_of_several_seeds_are_twice_their_spread(given, row, results):
    rows = [row("wide", 1.0 + seed, seed=seed) for seed in range(3)]
    rows += [row("narrow", 1.0 + 1e-4 * seed, seed=seed) for seed in range(3)]
    made = given(results(rows), checkpoints=3)
    assert made.of_seeds
    tolerance = {one.address.statistic: one.tolerance for one in made.tracked}
    assert tolerance["wide"] == pytest.approx(2 * np.std([1, 2, 3], ddof=1))
    assert tolerance["narrow"] == 0.01, "the smallest effect that is of interest to its probe"
    assert {one.address.statistic for one in made.unresolved} == {"wide"}


def test_a_row_without_a_number_is_named_and_not_checked(given, row, results):
    rows = [row("whole", 1.0, seed=s) for s in range(2)]
    rows += [row("partly", 1.0), row("partly", math.nan, seed=1), row("one", 2.0, seed=1)]
    made = given(results(rows), checkpoints=2)
    assert [one.address.statistic for one in made.tracked] == ["whole"]
    assert [one.statistic for one in made.unmeasured] == ["partly", "one"]


def test_a_number_that_other_batches_do_not_have_is_no_baseline(given, row, results):
    with pytest.raises(MeasurementError, match="none in another"):
        given(results([row(value=1.0)]), results([row(value=math.nan)]))


def test_what_could_not_be_measured_makes_no_baseline(given, row, results):
    with pytest.raises(MeasurementError, match="no baseline was made: a hook did not fire"):
        given(results([row()], missing=["a hook did not fire"]))
    with pytest.raises(MeasurementError, match="no number"):
        given(results([row(value=math.nan)]))


def test_tolerances_by_name(given, row, results):
    rows = [row("a", 1.0), row("a", 1.0, layer=1), row("b", 1.0)]
    made = given(results(rows), tolerances={"a": 0.5, "toy-probe/b": 0.25})
    assert [one.tolerance for one in made.tracked] == [0.5, 0.5, 0.25]
    with pytest.raises(BadInputError, match=r"no statistic 'aa'.*did you mean 'a'"):
        given(results(rows), tolerances={"aa": 0.5})
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(BadInputError, match="must be 0 or more"):
            given(results(rows), tolerances={"a": wrong})


def test_a_file_says_what_was_written(given, row, results, tmp_path):
    rows = [row("a", 1.0 + seed, seed=seed, verdict=Verdict.NO_SIGNAL) for seed in range(2)]
    rows += [row("exact", 2.0, seed=s, ci_low=math.nan, ci_high=math.nan, layer=None) for s in range(2)]
    rows += [row("gone", math.nan, seed=s) for s in range(2)]
    made = given(results(rows), checkpoints=2, gate=GateRule("quantile", 0.25))
    path = made.write(tmp_path / "mech.json")
    again = Baseline.read(path)
    assert again.to_json() == made.to_json()
    assert again.settings == made.settings
    assert again.tracked[0] == made.tracked[0]
    assert again.tracked[0].verdicts == (Verdict.NO_SIGNAL,) * 2
    assert math.isnan(again.tracked[1].ci_low[0])
    assert again.unmeasured == made.unmeasured
    table = again.table
    assert table.statistic.tolist() == ["a", "exact"]
    assert table.found[0] == pytest.approx(
        made.tracked[0].tolerance + made.tracked[0].drift((1.0,), 2).resolution
    )


def test_a_tolerance_may_be_edited_by_hand(given, row, results, tmp_path):
    path = given(results([row(value=2.0)])).write(tmp_path / "mech.json")
    document = json.loads(path.read_text())
    document["statistics"][0]["tolerance"] = 0.5
    path.write_text(json.dumps(document))
    assert Baseline.read(path).tracked[0].tolerance == 0.5


def test_renewing_keeps_what_a_person_set(given, row, results):
    old = given(results([row("a", 1.0), row("b", 1.0)]), tolerances={"a": 0.5})
    first = results([row("a", 3.0), row("b", 3.0), row("c", 1.0)])
    given(first)  # what the next measurement gives
    passes = [first, first]
    measuring.analyze = lambda *_, **__: passes.pop(0)  # put back by the fixture
    new = renewed(old, ["9.pt"])
    assert [(one.values[0], one.tolerance) for one in new.tracked] == [(3.0, 0.5), (3.0, 0.0), (1.0, 0.0)]
    in_memory = dataclasses.replace(old, settings=dataclasses.replace(old.settings, data=()))
    with pytest.raises(BadInputError, match="tokens in memory"):
        renewed(in_memory, ["9.pt"])


def test_what_a_baseline_was_not_made_with(given, row, results):
    kept = given(results([row("a", 1.0)]), tolerances={"a": 0.5})
    assert changed(kept, {}) == []
    same = {
        "probes": "surprise",
        "tokens": 1000,
        "split": "heldout",
        "gate": None,
        "tolerances": {"a": 0.5},
        "fresh": 0,
    }
    assert changed(kept, same) == []
    other = {
        "probes": ["surprise", "integrity"],
        "tokens": 999,
        "split": "all",
        "gate": GateRule("random", 0.5),
    }
    assert changed(kept, {**other, "tolerances": {"a": 0.25}}) == [
        "gate",
        "probes",
        "split",
        "tokens",
        "tolerances",
    ]


def test_a_baseline_says_what_of_it_is_dead(given, row, results):
    assert given(results([row("a", 1.0)])).dead == ""
    made = given(results([row("a", 1.0, verdict="untrained"), row("b", 1.0, verdict="collapsed")]))
    assert made.dead == "the baseline itself has numbers of what does not work: 1 untrained, 1 collapsed"


def edited(change):
    def make(document):
        change(document)
        return json.dumps(document)

    return make


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda _: "", "no JSON"),
        (lambda _: "[" * 100_000, "no JSON"),
        (lambda _: "[1]", "kind"),
        (lambda _: '{"kind": "something"}', "kind"),
        (edited(lambda d: d.update(schema_version=7)), "schema version 7, this hopeprobe reads 1"),
        (edited(lambda d: d.pop("statistics")), "no 'statistics'"),
        (edited(lambda d: d.update(statistics=[])), "nothing to check"),
        (edited(lambda d: d.update(statistics=3)), "cannot be used|can be used"),
        (edited(lambda d: d["statistics"][0].pop("noise")), "no 'noise'"),
        (edited(lambda d: d["statistics"][0].update(colour=1)), "can be used"),
        (edited(lambda d: d["statistics"][0].update(values=[1.0, 2.0])), "1 checkpoints"),
        (edited(lambda d: d["statistics"][0].update(values=[None])), "no number"),
        (edited(lambda d: d["statistics"][0].update(values=["x"])), "can be used"),
        (edited(lambda d: d["statistics"][0].update(tolerance=-1)), "tolerance of -1"),
        (edited(lambda d: d["statistics"][0].update(noise=None)), "noise of nan"),
        (edited(lambda d: d["statistics"][0].update(verdicts=["great"])), "can be used"),
        (edited(lambda d: d["statistics"].append(d["statistics"][0])), "twice"),
        (edited(lambda d: d["settings"].update(colour=1)), "can be used"),
        (edited(lambda d: d["settings"].update(data=[3])), "a name in probes or data is 3"),
        (
            edited(lambda d: d["settings"].update(probes=[["surprise"]])),
            r"a name in probes or data is \['surprise",
        ),
        (edited(lambda d: d["settings"].update(tokens="600")), "tokens is '600'"),
        (edited(lambda d: d["settings"].update(tokens=True)), "tokens is True"),
        (edited(lambda d: d["settings"].update(split=None)), "split is None"),
        (edited(lambda d: d["settings"].update(carry=7)), "carry is 7"),
        (edited(lambda d: d["settings"].update(gate={"rule": 7})), "the gate's rule is 7"),
        (
            edited(lambda d: d["settings"].update(gate={"rule": "random", "budget": "x"})),
            "the gate's budget is 'x'",
        ),
        (edited(lambda d: d["statistics"][0].update(component=7)), "the component of a number is 7"),
        (edited(lambda d: d["statistics"][0].update(probe=["x"])), "can be used"),
        (edited(lambda d: d["statistics"][0].update(layer="0")), "the layer of a number is '0'"),
        (edited(lambda d: d["checkpoints"][0].update(identity=["x"])), "identity of a checkpoint is"),
    ],
)
def test_files_that_are_no_baseline(content, message, given, row, results, tmp_path):
    document = json.loads(given(results([row(value=2.0)])).to_json())
    path = tmp_path / "mech.json"
    path.write_text(content(document))
    with pytest.raises(BadInputError, match=f"{message}.*; `hopeprobe baseline` makes one$") as raised:
        Baseline.read(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_there_or_is_no_text(tmp_path):
    with pytest.raises(BadInputError, match="hopeprobe baseline"):
        Baseline.read(tmp_path / "none.json")
    path = tmp_path / "mech.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInputError, match="no text"):
        Baseline.read(path)
