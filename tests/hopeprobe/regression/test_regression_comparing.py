"""Checks: what became of each number, what is said of it, and the status that scripts rely on."""

import dataclasses
import json
import math

import numpy as np
import pytest

from hopeprobe.analysis import analyze
from hopeprobe.errors import BadInputError
from hopeprobe.regression import Baseline, Settings, Tracked, check, make_baseline
from hopeprobe.regression.baseline import Address, current_versions
from hopeprobe.regression.comparing import Outcome, compare
from hopeprobe.stats.verdict import Verdict
from hopeprobe.subject import GateRule
from hopeprobe.tokens import TokenData

SETTINGS = Settings(("toy-probe",), ("text.jsonl",), 1000)


def baseline_of(values, seeds=1, unmeasured=(), **changed):
    """A baseline of numbers by statistic, one value or one a seed each."""
    fields = {"noise": 1e-3, "tolerance": 0.1, "smallest_effect": 0.01, **changed}
    tracked = []
    for statistic, value in values.items():
        mine = tuple(np.atleast_1d(value).tolist())
        nan = (math.nan,) * len(mine)
        verdicts = fields.get("verdicts", (Verdict.LEARNED,) * len(mine))
        tracked.append(
            Tracked(
                Address("toy-probe", statistic, 0, "a"), "1", mine, verdicts, nan, nan,
                fields["smallest_effect"], fields["noise"], fields["tolerance"],
            )
        )  # fmt: skip
    checkpoints = tuple({"name": f"{i}.pt", "seed": i, "identity": "same"} for i in range(seeds))
    gone = tuple(Address("toy-probe", statistic, 0, "a") for statistic in unmeasured)
    return Baseline(
        SETTINGS, {"fingerprint": "f", "windows": "w"}, checkpoints, tuple(tracked), gone, current_versions()
    )


def test_what_moved_what_is_lost_what_is_new(row, results):
    kept = baseline_of(
        {"same": 1.0, "near": 1.0, "far": 1.0, "gone": 1.0, "absent": 1.0}, unmeasured=["still"]
    )
    now = [
        row("same", 1.0), row("near", 1.1005), row("far", 1.2), row("gone", math.nan, note="it never fired"),
        row("other", 3.0), row("still", 4.0), row("never", math.nan),
    ]  # fmt: skip
    found = compare(kept, results(now))
    outcomes = {one.tracked.address.statistic: str(one.outcome) for one in found.compared}
    assert outcomes == {"same": "same", "near": "same", "far": "moved", "gone": "lost", "absent": "lost"}
    assert [one.why for one in found.of("lost")] == ["n/a: it never fired", "no such row"]
    assert [address.statistic for address in found.new] == ["other"]
    assert (found.exit_code, found.passed) == (1, False)
    assert found.summary == "5 statistics: 1 moved, 2 lost"
    (far,) = found.of(Outcome.MOVED)
    assert (far.before, far.now) == (1.0, 1.2)
    assert far.drift.difference == pytest.approx(0.2)
    assert [line[0] for line in found.lines()] == [
        f"toy-probe/{s}/layer 0/a" for s in ("far", "gone", "absent")
    ]
    assert len(list(found.lines(every=True))) == 5
    assert found.table.statistic.tolist() == ["far", "gone", "absent", "same", "near"]


def test_status_3_for_what_could_not_be_measured(row, results):
    kept = baseline_of({"a": 1.0, "b": 1.0})
    assert compare(kept, results([row("a", 1.0), row("b", 1.0)])).exit_code == 0
    assert compare(kept, results([row("a", 1.0)])).exit_code == 3
    assert compare(kept, results([row("a", 1.0), row("b", 1.0)], missing=["a hook"])).exit_code == 3
    assert compare(kept, results([row("a", 2.0)], missing=["a hook"])).exit_code == 1, (
        "a regression is found first"
    )


@pytest.mark.parametrize("verdict", ["collapsed", "diverged", "no-signal", "untrained"])
def test_a_mechanism_that_died_has_moved_whatever_its_number(verdict, row, results):
    now = results([row("a", 1.0, verdict=Verdict(verdict))])
    (found,) = compare(baseline_of({"a": 1.0}), now).compared
    assert found.outcome is Outcome.MOVED
    assert found.why == f"{verdict}, in the baseline learned"
    was_so = baseline_of({"a": 1.0}, verdicts=(Verdict(verdict),))
    assert compare(was_so, now).passed


def test_between_seeds_only_what_seeds_do_not_do_has_moved(row, results):
    kept = baseline_of({"a": [1.0, 1.1, 0.9, 1.05, 0.95]}, seeds=5, tolerance=0.0)
    assert compare(kept, results([row("a", 1.3, seed=9)])).passed
    assert compare(kept, results([row("a", 3.0, seed=9)])).exit_code == 1
    several = compare(kept, results([row("a", 1.6, seed=9), row("a", 1.65, seed=10)]))
    (one,) = several.compared
    assert one.now == pytest.approx(1.625)
    assert one.values == (1.6, 1.65)
    lone = compare(kept, results([row("a", 1.625, seed=9)])).compared[0]
    assert several.compared[0].drift.high - several.compared[0].drift.low < lone.drift.high - lone.drift.low


def test_a_number_that_one_of_several_checkpoints_lacks_is_lost(row, results):
    """Not the mean of the others."""
    kept = baseline_of({"a": [1.0, 1.1, 0.9], "b": [1.0, 1.1, 0.9]}, seeds=3)
    now = results([row("a", 1.0, seed=8), row("b", 1.0, seed=8), row("a", 1.0, seed=9)])
    found = compare(kept, now)
    assert [str(one.outcome) for one in found.compared] == ["same", "lost"]
    assert found.exit_code == 3


def test_a_check_against_what_never_worked_says_so(row, results):
    kept = baseline_of({"a": 1.0}, verdicts=(Verdict.UNTRAINED,))
    found = compare(kept, results([row("a", 1.0)]))
    assert found.notes[0] == "the baseline itself has numbers of what does not work: 1 untrained"


def test_notes_say_what_a_reader_must_know(row, results):
    one = baseline_of({"a": 1.0})
    assert compare(one, results([row("a", 1.0)])).notes == ()
    other_run = compare(one, results([row("a", 1.0, seed=4)])).notes
    assert any("another training run" in note for note in other_run)
    seeds = baseline_of({"a": [1.0, 1.1]}, seeds=2)
    notes = compare(seeds, results([row("a", 1.0, seed=1)])).notes
    assert any(note.startswith("seed 1 is in the baseline") for note in notes)
    assert any("1 of 1 tolerances are below what 2 seeds can show" in note for note in notes)
    wide = baseline_of({"a": [1.0, 1.1]}, seeds=2, tolerance=1e3)
    assert compare(wide, results([row("a", 1.0, seed=5)])).notes == ()
    old = dataclasses.replace(one, versions={"hopeprobe": "0.0.1", "torch": one.versions["torch"]})
    assert any("the baseline with 0.0.1" in note for note in compare(old, results([row("a", 1.0)])).notes)
    shaped = dataclasses.replace(one, checkpoints=({"seed": 0, "identity": "other"},))
    assert any("configuration" in note for note in compare(shaped, results([row("a", 1.0)])).notes)


def test_each_number_says_what_would_be_found(row, results):
    kept = baseline_of({"a": [1.0, 1.1, 0.9]}, seeds=3)
    lone = compare(kept, results([row("a", 1.0, seed=9)]))
    assert lone.table.found[0] == pytest.approx(0.1 + kept.tracked[0].drift((1.0,), 1).resolution)
    (line,) = lone.lines(every=True)
    assert float(line[-2]) == pytest.approx(lone.table.found[0], rel=1e-3)
    two = compare(kept, results([row("a", 1.0, seed=9), row("a", 1.0, seed=10)]))
    assert two.table.found[0] < lone.table.found[0], "the mean of two says more"
    lost = compare(kept, results([row("b", 1.0, seed=9)]))
    assert lost.table.found[0] == lone.table.found[0]


@pytest.mark.parametrize("checked", [1, 3])
def test_changes_of_the_size_that_is_stated_are_found(row, results, checked):
    """Of normal seeds, 95 times in a hundred; a size that the baseline alone stated was found every second time."""
    rng, names, seeds = np.random.default_rng(checked), [f"s{i}" for i in range(60)], range(10, 10 + checked)
    found = total = 0
    for _ in range(20):
        kept = baseline_of({name: rng.normal(size=5) for name in names}, seeds=5, tolerance=1.0, noise=0.0)
        values = {name: rng.normal(size=checked) for name in names}
        asked = compare(
            kept, results([row(n, v, seed) for n in names for v, seed in zip(values[n], seeds, strict=True)])
        )
        stated = {one.tracked.address.statistic: one.found for one in asked.compared}
        moved = [row(n, v + stated[n], seed) for n in names for v, seed in zip(values[n], seeds, strict=True)]
        found += len(compare(kept, results(moved)).of("moved"))
        total += len(names)
    assert found / total == pytest.approx(0.95, abs=0.02)


def test_numbers_without_some_windows_are_lost_and_a_mechanism_that_died_is_told(row, results):
    kept = baseline_of({"same": 1.0, "far": 1.0, "died": 1.0, "absent": 1.0})
    now = results([row("same", 1.0), row("far", 9.0), row("died", 0.0, verdict=Verdict.COLLAPSED)])
    assert {str(one.outcome) for one in compare(kept, now).of("same")} == {"same"}
    now.checkpoint["windows"] = "fewer"
    found = compare(kept, now)
    outcomes = {one.tracked.address.statistic: (str(one.outcome), one.why) for one in found.compared}
    assert outcomes == {
        "same": ("lost", "measured without some of the baseline's windows"),
        "far": ("lost", "measured without some of the baseline's windows"),
        "died": ("moved", "collapsed, in the baseline learned"),
        "absent": ("lost", "no such row"),
    }
    assert found.exit_code == 1
    (line,) = [line for line in found.lines(every=True) if "/far/" in line[0]]
    assert line[1:5] == ("1", "9", "\N{EN DASH}", "\N{EN DASH}"), line


def test_a_seed_that_lies_apart_is_named_and_widens_intervals(row, results):
    near = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02]
    plain = baseline_of({"a": near, "b": near}, seeds=6)
    heavy = baseline_of({"a": near, "b": [*near[:-1], 40.0]}, seeds=6)
    assert plain.apart == ()
    assert "spread normally; tails as heavy" in plain.tails
    ten = baseline_of({"a": near + near[:4]}, seeds=10)
    assert ten.tails.endswith("where seeds are spread normally"), "ten seeds would show it"
    assert heavy.tails.startswith("toy-probe/b/layer 0/a of seed 5 lies further from the other seeds'")
    now = [row("a", 1.0, seed=9), row("b", 1.0, seed=9)]
    assert not any("spread" in note for note in compare(plain, results(now)).notes), "nothing moved"
    assert heavy.tails in compare(heavy, results(now)).notes
    assert heavy.found(heavy.tracked[0]) > 1.3 * plain.found(plain.tracked[0])
    moved = compare(plain, results([row("a", 100.0, seed=9), row("b", 1.0, seed=9)]))
    assert plain.tails in moved.notes, "an alarm says how often it is a false one"
    assert baseline_of({"a": 1.0}).tails == ""


def test_plain_data_and_a_notebook(row, results):
    found = compare(baseline_of({"a": 1.0, "<b>": 1.0}), results([row("a", 2.0)]))
    document = found.to_dict()
    assert (document["exit_code"], document["kind"]) == (1, "hopeprobe-check")
    assert document["statistics"][0]["outcome"] == "moved"
    html = found._repr_html_()
    assert "2 statistics: 1 moved, 1 lost" in html
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert repr(found) == "<Check: 2 statistics: 1 moved, 1 lost>"


@pytest.fixture(scope="module")
def run_baseline(toy_run, toy_data, toy_cache):
    return make_baseline(
        toy_run / "step-000040.pt",
        ["cms-similarity", "surprise"],
        toy_data,
        1600,
        "all",
        fresh=0,
        cache_dir=toy_cache,
    )


def test_the_same_checkpoint_is_the_same_in_any_batches(run_baseline, toy_run, toy_data, toy_cache):
    for batch in (None, 7):
        found = check(toy_run / "step-000040.pt", run_baseline, toy_data, batch=batch, cache_dir=toy_cache)
        assert found.passed, list(found.lines())
        assert len(found.compared) > 20
        assert found.notes == ()


def test_a_memory_that_stopped_working_is_found(run_baseline, toy_run, toy_data, toy_cache, monkeypatch):
    """The planted defect: one CMS level whose output weights are a tenth smaller."""
    subject = hopeprobe_load(toy_run / "step-000040.pt")
    subject.module.blocks[0].cms.levels["slow"].w_out.data.mul_(0.9)
    found = check(subject, run_baseline, toy_data, cache_dir=toy_cache)
    moved = {(one.tracked.address.statistic, one.tracked.address.layer) for one in found.of("moved")}
    assert ("delta_effective_rank", 0) in moved or ("output_cosine", 0) in moved
    assert ("mean_loss", None) in moved
    assert found.exit_code == 1


def hopeprobe_load(path):
    import hopeprobe

    return hopeprobe.load(path)


def test_other_tokens_are_no_check(run_baseline, toy_run, toy_data, toy_cache):
    other = TokenData.from_documents([[1, 2, 3, 4]] * 200, name="other", vocab_size=97, end_of_text=0)
    with pytest.raises(
        BadInputError, match=r"not the tokens of the baseline, the text is another: other .*, was "
    ):
        check(toy_run / "step-000040.pt", run_baseline, other, cache_dir=toy_cache)
    # Only the builtin text beside a builtin text can be that of another Python.
    for was, now, said in [
        ("builtin", "builtin", True),
        ("builtin", "other", False),
        ("other", "builtin", False),
    ]:
        kept = dataclasses.replace(run_baseline, data={**run_baseline.data, "name": was})
        with pytest.raises(BadInputError, match=f"the text is another: {now} .*, was {was} ") as raised:
            check(toy_run / "step-000040.pt", kept, dataclasses.replace(other, name=now), cache_dir=toy_cache)
        assert ("the Python that runs" in str(raised.value)) is said
    with pytest.raises(BadInputError, match="tokens in memory"):
        check(toy_run / "step-000040.pt", run_baseline, cache_dir=toy_cache)
    shorter = dataclasses.replace(
        run_baseline, data={**run_baseline.data, "windows": "others", "context": 64}
    )
    with pytest.raises(BadInputError, match="a context of 32, was 64"):
        check(toy_run / "step-000040.pt", shorter, toy_data, cache_dir=toy_cache)


def test_several_checkpoints_need_a_baseline_of_seeds(run_baseline, toy_run, toy_data):
    with pytest.raises(BadInputError, match=r"a baseline of one: check one at a time, or make"):
        check([toy_run / "step-000040.pt", toy_run / "step-000020.pt"], run_baseline, toy_data)


def test_seeds_must_differ_and_nothing_else(toy_run, toy_data, run_baseline, subject_of, configs, tmp_path):
    copied = tmp_path / "copy" / "step-000040.pt"
    copied.parent.mkdir()
    copied.write_bytes((toy_run / "step-000040.pt").read_bytes())
    of_seeds = dataclasses.replace(run_baseline, checkpoints=run_baseline.checkpoints * 2)
    pairs = [
        (
            [toy_run / "step-000040.pt", toy_run / "step-000020.pt"],
            r"of step 40 and step-000020.pt of 20.*Give one of each seed",
        ),
        ([toy_run / "step-000040.pt", toy_run / "step-000040.pt"], "both of seed 0"),
        (
            [toy_run / "step-000040.pt", copied],
            rf"{toy_run.name}/step-000040.pt and copy/step-000040.pt are both",
        ),
        ([subject_of(), subject_of(configs["still"], 1)], "different configurations"),
    ]
    for given, message in pairs:
        with pytest.raises(BadInputError, match=message):
            make_baseline(given, "surprise", toy_data, 1600)
        with pytest.raises(BadInputError, match=message):
            check(given, of_seeds, toy_data)


def test_a_probe_of_ones_own_is_given_again(run_baseline, toy_run, toy_data):
    renamed = dataclasses.replace(
        run_baseline, settings=dataclasses.replace(run_baseline.settings, probes=("mine",))
    )
    with pytest.raises(BadInputError, match="'mine', which hopeprobe does not have"):
        check(toy_run / "step-000040.pt", renamed, toy_data)


def test_the_gate_is_part_of_the_baseline(toy_run, toy_data, toy_cache):
    path, gate = toy_run / "step-000040.pt", GateRule("random", 0.25)
    kept = make_baseline(path, "surprise", toy_data, 1600, "all", gate=gate, fresh=0, cache_dir=toy_cache)
    direct = analyze(path, "surprise", toy_data, 1600, "all", gate=gate, fresh=0, cache_dir=toy_cache)
    assert kept.tracked[0].values[0] == direct.rows[0].value
    assert check(path, kept, toy_data, cache_dir=toy_cache).passed
    other = dataclasses.replace(kept, settings=dataclasses.replace(kept.settings, gate=None))
    assert check(path, other, toy_data, cache_dir=toy_cache).exit_code == 1
    assert json.loads(kept.to_json())["settings"]["gate"]["rule"] == "random"
