"""`analyze` from end to end: what it claims, what it refuses to claim, and what it says is missing."""

import copy
import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest

import hopeprobe
from hopeprobe import analysis
from hopeprobe.analysis import analyze, missing_from
from hopeprobe.conditions import LIVE
from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.model.subject import HopeSubject
from hopeprobe.nulls import fresh_seeds
from hopeprobe.probes.base import Accumulator, Finding, Measurement, Place, Probe, Quantity
from hopeprobe.probes.integrity import Integrity
from hopeprobe.results import Results
from hopeprobe.stats import FreshInit, GroupedMean, Verdict, jackknife, judge, mean_of, paired_difference
from hopeprobe.subject import MissingCapability, load

BOTH = ("integrity", "cms-similarity")  # not "all": other probes have tests of their own
KEY = ["probe", "statistic", "layer", "component", "condition"]


class Impostor(HopeSubject):
    """Weights of one seed with the record of a run of another."""

    start = None

    def own_init(self):
        return self.start


class Deaf(HopeSubject):
    def run(self, tokens, lengths=None):
        return HopeSubject(copy.deepcopy(self.module)).run(tokens, lengths)


def test_a_trained_model_has_learned_something_and_every_number_has_its_nulls(toy_run, settings):
    results = analyze(toy_run / "step-000040.pt", BOTH, **settings)
    assert missing_from(results) == []
    frame, nulls = results.table, results.nulls
    similarity = frame[frame.probe == "cms-similarity"]
    assert len(similarity) == 2 * (6 + 4)
    assert "learned" in set(similarity.verdict)
    assert set(frame.step) == {40}
    kinds = nulls.groupby("statistic").null_kind.agg(set)
    assert kinds["output_cosine"] == {"own-init", "fresh-init", "shuffled"}
    assert kinds["delta_cosine"] == {"own-init", "fresh-init", "shuffled", "analytic"}
    for statistic in ("output_cka", "delta_cca", "delta_effective_rank"):
        assert kinds[statistic] == {"own-init", "fresh-init"}
    assert kinds["frozen_loss"] == {"own-init", "fresh-init", "analytic", "unigram"}
    for row in similarity.itertuples():
        assert row.ci_low <= row.value <= row.ci_high
        assert (row.n_tokens, row.dtype) == (1600, "float32")
    assert results.checkpoint["name"] == "step-000040.pt"
    assert results.checkpoint["seed"] == 0
    assert results.data["tokens"] == 1600
    assert results.data["split"] == "all"
    assert len(results.data["windows"]) == 64
    assert Results.from_json(results.to_json()).to_json() == results.to_json()


def test_step_zero_is_at_init_everywhere(toy_run, settings):
    frame = analyze(toy_run / "step-000000.pt", "cms-similarity", **settings).table
    assert set(frame.verdict) == {"at-init"}


@pytest.mark.slow
def test_a_model_of_another_seed_is_hardly_ever_learned(subject_of, settings):
    verdicts = []
    for seed in range(1, 7):
        subject = Impostor(subject_of(seed=seed).module)
        subject.start, subject.trained_steps = subject_of(seed=0), 200
        frame = analyze(subject, "cms-similarity", **settings | {"fresh": 10}).table
        verdicts += list(frame.verdict)
    assert len(verdicts) == 120
    assert verdicts.count("learned") <= 0.05 * len(verdicts)


def test_contrasts_of_a_statistic_are_one_family(subject, monkeypatch):
    """Each has its two conditions in its name: by condition every one would be a family of its own, and q be p."""
    rng, families = np.random.default_rng(0), []
    monkeypatch.setattr(
        analysis, "judge", lambda rows, effects: families.append(len(rows)) or judge(rows, effects)
    )
    run = analysis._Run.__new__(analysis._Run)
    run.subject, run.label, run.rows, run.null_rows = subject, "c", [], []

    def finding(k):
        one, other = GroupedMean(), GroupedMean()
        for moments in (one, other):
            moments.update(rng.normal(size=(64, 1)), np.ones((64, 1), bool), np.arange(64))
        here = jackknife(mean_of, one)
        place = Place("loss_change", component=f"level{k}")
        row = Measurement(place, f"live - ablated:level{k}", "nats", here, 0.01)
        return Finding(
            row, paired_difference(here, jackknife(mean_of, other)), FreshInit((0.0, 0.1), here.value)
        )

    run._judge(Integrity(), [finding(k) for k in range(10)])
    assert families == [10]
    assert any(row.q > row.p for row in run.rows)


def test_no_interval_no_claim(toy_run, settings):
    frame = analyze(toy_run / "step-000040.pt", "cms-similarity", **settings | {"tokens": 300}).table
    assert set(frame.verdict) == {"inconclusive"}
    assert frame.ci_low.isna().all()
    assert frame.note.str.contains("groups of documents").all()


def test_hooks_that_never_fire_are_missing_and_the_rest_is_there(subject, settings):
    results = analyze(Deaf(subject.module), BOTH, **settings)
    assert {row.statistic for row in results.rows} == {"distance_from_init", "keys_loaded"}
    messages = missing_from(results)
    assert len(messages) == 2
    assert any("cms-similarity (live): hooks never fired" in m for m in messages)
    assert any("integrity (frozen): the model was not frozen" in m for m in messages)
    assert missing_from(Results.from_json(results.to_json())) == messages
    with pytest.raises(MeasurementError, match=r"nothing could be measured: .*never fired"):
        analyze(Deaf(subject.module), "cms-similarity", **settings)


def test_a_statistic_that_overflows_is_missing_and_the_rest_is_there(toy_run, settings):
    def infinite(moments):
        return np.full(moments.n.size, np.inf)

    class Overflowing(Integrity):
        name = "overflowing"

        def conditions(self, subject):
            return (LIVE,)

        def accumulator(self, subject, condition, windows):
            made = super().accumulator(subject, condition, windows)
            row = Quantity(Place("infinite"), "1", infinite, lambda: (made.moments["loss"],))
            made.quantities = lambda: [row]
            return made

    results = analyze(toy_run / "step-000040.pt", [Overflowing(), "integrity"], **settings | {"fresh": 0})
    (message,) = missing_from(results)
    assert message == "step-000040.pt: overflowing (live): the statistic is infinite"
    assert "frozen_loss" in set(results.table[results.table.probe == "integrity"].statistic)


class Mute(Probe):
    """Looks on and says nothing."""

    name, question, statistics = "mute", "?", ("nothing",)

    def applies(self, subject):
        return None

    def accumulator(self, subject, condition, windows):
        return Silence(condition)


class Silence(Accumulator):
    def update(self, cache, losses, scored, batch):
        self.moments.setdefault("loss", GroupedMean()).update(losses, scored, batch.group)

    def quantities(self):
        return []


class Once(Silence):
    """Its rows can be asked for once."""

    def quantities(self):
        yield Quantity(Place("nothing"), "nats", mean_of, lambda: (self.moments["loss"],))


def test_a_probe_that_gives_no_row_is_missing(subject, settings, monkeypatch):
    results = analyze(subject, [Mute(), "integrity"], **settings | {"fresh": 0})
    assert missing_from(results) == [f"{subject.name}: mute: it gave no row, so it measured nothing"]
    assert {row.probe for row in results.rows} == {"integrity"}
    with pytest.raises(MeasurementError, match="mute: it gave no row"):
        analyze(subject, Mute(), **settings | {"fresh": 0})
    monkeypatch.setattr(Mute, "accumulator", lambda self, subject, condition, windows: Once(condition))
    (row,) = analyze(subject, Mute(), **settings | {"fresh": 2}).rows
    assert row.n_tokens == 1600


def test_a_null_that_could_not_be_measured_is_never_taken_for_passed(toy_run, settings, monkeypatch):
    trained = load(toy_run / "step-000040.pt")
    monkeypatch.setattr(trained, "own_init", lambda: Deaf(load(toy_run / "step-000000.pt").module))
    frame = analyze(trained, "cms-similarity", **settings | {"cache_dir": toy_run / "other"}).table
    assert set(frame.verdict) == {"inconclusive"}
    assert frame.note.str.contains("own-init not measured: hooks never fired").all()


def test_one_fresh_model_that_failed_is_never_taken_for_passed(toy_run, settings, monkeypatch, subject_of):
    trained = load(toy_run / "step-000040.pt")

    def second_diverges(seed):
        made = subject_of(seed=seed)
        if seed == fresh_seeds(2, 0)[1]:
            made.module.embed.data.fill_(math.nan)
        return made

    monkeypatch.setattr(trained, "reinitialised", second_diverges)
    frame = analyze(trained, "cms-similarity", **settings | {"cache_dir": toy_run / "diverged"}).table
    assert set(frame.verdict) == {"inconclusive"}
    assert frame.note.str.contains("fresh-init not measured: ").all()
    assert frame.p.isna().all()


def test_own_init_alone_shows_no_learning(toy_run, settings):
    for step, verdicts in (("40", {"inconclusive"}), ("00", {"at-init"})):
        frame = analyze(toy_run / f"step-0000{step}.pt", "cms-similarity", **settings | {"fresh": 0}).table
        assert "learned" not in set(frame.verdict)
        assert verdicts <= set(frame.verdict)
        assert frame.note.str.contains("fresh-init was not asked for").all()


def test_a_model_with_hooks_on_it_is_refused_before_anything_is_measured(toy_run, settings, tmp_path):
    subject = load(toy_run / "step-000040.pt")
    handle = subject.module.add_hook("hook_embed", lambda x, hook: x * 2)
    options = settings | {"cache_dir": tmp_path, "fresh": 0}
    for given in (subject, [toy_run / "step-000000.pt", subject]):
        with pytest.raises(BadInputError, match=r"step-000040.pt has hooks on it, at hook_embed"):
            analyze(given, "integrity", **options)
    assert list(tmp_path.iterdir()) == []
    handle.remove()
    assert missing_from(analyze(subject, "integrity", **options)) == []


def test_without_own_init_fresh_decides_and_without_either_nothing(toy_run, settings, monkeypatch):
    def nothing(*_):
        raise MissingCapability("no such weights")

    trained = load(toy_run / "step-000040.pt")
    monkeypatch.setattr(trained, "own_init", nothing)
    results = analyze(trained, "cms-similarity", **settings)
    assert "learned" in set(results.table.verdict)
    assert results.table.note.str.contains("own-init absent: no such weights.*fresh-init alone decides").all()
    assert results.checkpoint["own_init"] == "absent: no such weights"
    monkeypatch.setattr(trained, "reinitialised", nothing)
    frame = analyze(trained, "cms-similarity", **settings | {"cache_dir": toy_run / "empty"}).table
    assert set(frame.verdict) == {"inconclusive"}
    assert frame.note.str.contains("fresh-init not measured: no such weights").all()


def test_a_statistic_undefined_at_initialisation_is_inconclusive(toy_run, settings, subject_of, monkeypatch):
    trained = load(toy_run / "step-000040.pt")
    start = subject_of()
    for weight in start.module.blocks[0].cms.levels["slow"].parameters():
        weight.data.zero_()
    monkeypatch.setattr(trained, "own_init", lambda: start)
    frame = analyze(trained, "cms-similarity", **settings).table
    row = frame[(frame.statistic == "delta_cosine") & (frame.layer == 0)].iloc[0]
    assert row.verdict == "inconclusive"
    assert "not comparable with own-init" in row.note


def test_neither_batch_size_nor_the_cache_changes_results(toy_run, settings, tmp_path):
    path = toy_run / "step-000040.pt"
    base = analyze(path, BOTH, **settings | {"cache_dir": tmp_path, "fresh": 3})
    cached = analyze(path, BOTH, **settings | {"cache_dir": tmp_path, "fresh": 3})
    assert cached.to_json() == base.to_json()
    small = analyze(path, BOTH, **settings | {"cache_dir": tmp_path / "b", "fresh": 3, "batch": 11})
    numbers = ["value", "ci_low", "ci_high", "min_detectable"]
    np.testing.assert_allclose(small.table[numbers], base.table[numbers], atol=1e-4, rtol=1e-4)
    assert list(small.table.verdict) == list(base.table.verdict)
    assert small.data == base.data


def test_fresh_init_is_compared_on_the_same_prefix(toy_run, settings):
    path = toy_run / "step-000040.pt"
    frame = analyze(path, "cms-similarity", **settings, fresh_tokens=700).table
    there = analyze(path, "cms-similarity", **settings | {"tokens": 700, "fresh": 0}).table
    ranks = frame[frame.statistic == "output_cosine"]
    for row in ranks.itertuples():
        same = there[(there.statistic == row.statistic) & (there.layer == row.layer)].iloc[0]
        assert f"fresh-init on the first 700 tokens, where this is {same.value:.4g}" in row.note


def test_several_checkpoints_are_told_apart(toy_run, settings):
    paths = [toy_run / f"step-0000{step}.pt" for step in ("00", "40")]
    results = analyze(paths, "integrity", **settings | {"fresh": 0})
    assert set(results.table.checkpoint) == {"step-000000.pt", "step-000040.pt"}
    assert [c["step"] for c in results.checkpoint["checkpoints"]] == [0, 40]
    assert missing_from(results) == []


def test_each_checkpoint_says_which_windows_it_was_measured_on(toy_run, settings, subject_of, configs):
    shorter = subject_of(dataclasses.replace(configs["toy"], context=16))
    shorter.name = "shorter"
    results = analyze([toy_run / "step-000040.pt", shorter], "integrity", **settings | {"fresh": 0})
    a, b = results.checkpoint["checkpoints"]
    assert (a["context"], b["context"]) == (32, 16)
    assert a["windows"] != b["windows"]
    assert a["tokens"] == b["tokens"] == results.data["tokens"] == 1600
    assert a["documents"] > 0 < b["groups"]
    assert not {"windows", "context"} & results.data.keys()
    assert results.data["fingerprint"] == a["data"] == b["data"]
    results = analyze([toy_run / "step-000040.pt", subject_of()], "integrity", **settings | {"fresh": 0})
    a, b = results.checkpoint["checkpoints"]
    assert results.data["windows"] == a["windows"] == b["windows"]


def test_a_damaged_second_file_is_found_before_the_first_is_measured(toy_run, settings, tmp_path):
    damaged, told = tmp_path / "damaged.pt", []
    damaged.write_bytes((toy_run / "step-000040.pt").read_bytes()[:-1000])
    options = settings | {"progress": lambda *args: told.append(args)}
    with pytest.raises(BadInputError, match=r"damaged\.pt"):
        analyze([toy_run / "step-000040.pt", damaged], "integrity", **options)
    assert told == []


def test_progress_is_told(toy_run, settings, tmp_path):
    told = []
    options = {"fresh": 2, "cache_dir": tmp_path, "progress": lambda *args: told.append(args)}
    analyze(toy_run / "step-000040.pt", BOTH, **settings | options)
    descriptions = list(dict.fromkeys(what for what, _, _ in told))
    assert descriptions == [
        f"step-000040.pt, {null}{condition}"
        for null in ("", "own-init, ", "fresh-init 1/2, ", "fresh-init 2/2, ")
        for condition in ("frozen", "live")
    ]
    assert all(0 < done <= total for _, done, total in told)


def test_what_is_in_the_cache_is_not_run_again(toy_run, settings, tmp_path):
    def run():
        told = []
        options = {"fresh": 2, "fresh_tokens": 700, "cache_dir": tmp_path}
        options["progress"] = lambda *args: told.append(args[0])
        results = analyze(toy_run / "step-000040.pt", "cms-similarity", **settings | options)
        return results.to_json(), list(dict.fromkeys(told))

    first, told = run()
    nulls = ("", "own-init, ", "first 700 tokens, ", "fresh-init 1/2, ", "fresh-init 2/2, ")
    assert told == [f"step-000040.pt, {null}live" for null in nulls]
    again, told = run()
    assert told == ["step-000040.pt, live"]
    assert again == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probes": "cms-similarty"}, "did you mean 'cms-similarity'"),
        ({"probes": ()}, "no probe was asked for"),
        ({"fresh": 1}, "at least two re-initialisations"),
        ({"tokens": 10**9}, "fewer than"),
        ({"split": "test"}, "no split is called"),
        ({"checkpoints": []}, "no checkpoint was given"),
        ({"checkpoints": "nowhere.pt"}, "does not exist"),
        ({"probes": "cms-similarity", "carry": "epoch"}, "carry is window or document"),
    ],
)
def test_bad_input_is_named(subject, settings, change, message):
    with pytest.raises(BadInputError, match=message):
        analyze(**{"checkpoints": subject, "probes": BOTH, **settings, **change})


def test_analyze_is_exported_without_loading_torch():
    assert hopeprobe.analyze is analyze
    code = "import hopeprobe, sys; assert 'torch' not in sys.modules; assert 'analyze' in dir(hopeprobe)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_library_never_imports_the_model():
    code = (
        "import sys, hopeprobe.analysis, hopeprobe.plots\n"
        "assert not [m for m in sys.modules if m.startswith('hopeprobe.model')]\n"
        "assert 'seaborn' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_open_of_weights_that_another_row_calls_untrained_is_untrained(toy_run, subject_of, settings):
    class Certain(Probe):
        """Has a row that the rule calls learned, whatever the weights are."""

        name, question, statistics = "certain", "Is it so?", ("certainty",)

        def applies(self, subject):
            return None

        def conditions(self, subject):
            return ()

        def of_model(self, subject, initial, windows):
            rng = np.random.default_rng(0)
            mean = GroupedMean()
            mean.update(5 + rng.normal(size=(64, 4)), np.ones((64, 4), bool), np.arange(64))
            found = jackknife(mean_of, mean)
            fresh = FreshInit((0.0, 0.1, -0.1), found.value)

            def row(component, **more):
                return Measurement(Place("certainty", component=component), "", "1", found, **more)

            return [
                Finding(row("certain"), None, fresh),
                row("open", override=Verdict.INCONCLUSIVE),
                *(row(v.value, override=v) for v in (Verdict.NO_SIGNAL, Verdict.COLLAPSED, Verdict.DIVERGED)),
                row("none", override=Verdict.NOT_APPLICABLE),
                Finding(row("the same"), paired_difference(found, found), fresh),
            ]

    probes = ["integrity", Certain()]
    trained = analyze(toy_run / "step-000040.pt", probes, **settings)
    rows = {row.component: row.verdict for row in trained.rows if row.probe == "certain"}
    others = {name: rows[name] for name in ("no-signal", "collapsed", "diverged", "none", "the same")}
    assert [str(v) for v in others.values()] == ["no-signal", "collapsed", "diverged", "n/a", "at-init"]
    assert (rows["certain"], rows["open"]) == (Verdict.LEARNED, Verdict.INCONCLUSIVE)
    impostor = subject_of(seed=7)
    impostor.trained_steps, impostor.own_init = 40, lambda: subject_of(seed=0)
    alleged = analyze(impostor, probes, **settings)
    assert {row.verdict for row in alleged.rows if row.probe == "integrity"} == {Verdict.UNTRAINED}
    found = [row for row in alleged.rows if row.probe == "certain"]
    rows = {row.component: row.verdict for row in found}
    assert (rows.pop("certain"), rows.pop("open")) == (Verdict.UNTRAINED, Verdict.UNTRAINED)
    assert all("untrained, as another row says" in row.note for row in found[:2])
    assert rows == others, "these say more than that"
    alone = analyze(impostor, Certain(), **settings)
    assert alone.rows[0].verdict is Verdict.LEARNED  # nobody asked whether they are trained
