"""Several processes as one: nothing changes for one alone, and by torchrun all hear the same and measure the same."""

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import ranks_analyze

from hopeprobe import ranks
from hopeprobe.errors import BadInputError, HopeprobeError, LostRankError, MeasurementError
from hopeprobe.hooks import HookNeverFiredError, HookPoint, HookSpec
from hopeprobe.hooks.points import InstalledHook
from hopeprobe.probes import PROBES
from hopeprobe.probes.passes import Pass, _drop_first, _Seen
from hopeprobe.results import Results
from hopeprobe.stats import GroupedCovariance, GroupedMean
from hopeprobe.subject import MissingCapability

FOLDER = Path(__file__).parent
STARTED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_one_process_does_the_plain_thing(tmp_path):
    with ranks.joined():
        assert (ranks.rank(), ranks.size(), ranks.first(), ranks.on_this_machine()) == (0, 1, True, 1)
        assert list(ranks.shared("abc")) == ["a", "b", "c"]
        assert ranks.gathered("x") == ranks.gathered_on_first("x") == ["x"]
        assert ranks.on_first(lambda: "x") == ranks.first_then_others(lambda: "x") == "x"
        assert [one.get() for one in ranks.dealt([lambda: 1, lambda: 2])] == [1, 2]
        assert ranks.folded(lambda: 1, lambda a, b: a + b) == 1
        ranks.agreed({"text": object()})
        with pytest.raises(BadInputError, match="no"):
            ranks.on_first(lambda: (_ for _ in ()).throw(BadInputError("no")))
    assert ranks.speaks()


@pytest.mark.parametrize("missing", STARTED)
def test_started_as_one_of_several(monkeypatch, missing):
    for name, value in STARTED.items():
        monkeypatch.setenv(name, value)
    assert ranks.launched()
    monkeypatch.delenv(missing)  # as in the shell of a pod, which is not one of the job's processes
    assert not ranks.launched()


def test_one_of_one_is_alone(monkeypatch):
    for name, value in (STARTED | {"WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    assert not ranks.launched()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "two"),
        ("RANK", "x"),
        ("LOCAL_RANK", "x"),
        ("MASTER_PORT", "x"),
        (ranks.TIMEOUT_VARIABLE, "0"),
        (ranks.TIMEOUT_VARIABLE, "soon"),
    ],
)
def test_what_the_environment_says_is_checked(monkeypatch, name, value):
    for each, given in (STARTED | {name: value}).items():
        monkeypatch.setenv(each, given)
    with pytest.raises(BadInputError, match=name), ranks.joined():
        pass


@pytest.mark.slow
def test_nobody_else_comes(monkeypatch):
    """Rank 1 of two, and no rank 0: an error within the timeout."""
    for each, given in (STARTED | {ranks.TIMEOUT_VARIABLE: "1"}).items():
        monkeypatch.setenv(each, given)
    with pytest.raises(LostRankError, match="could not meet"), ranks.joined():
        pass


def test_moments_are_sent_without_what_holds_nothing():
    rng = np.random.default_rng(0)
    moments = GroupedCovariance(32)
    moments.update(rng.normal(size=(2, 9, 32)), np.ones((2, 9), dtype=bool), np.array([3, 5]))
    sent = pickle.dumps(moments)
    assert len(sent) < 3 * 8 * 33 * 32  # two groups of 64
    other = pickle.loads(sent)
    other.merge(moments)
    twice = moments.compute()
    assert np.array_equal(other.compute().n, 2 * twice.n)
    assert np.allclose(other.compute().means["x"], twice.means["x"])
    empty = pickle.loads(pickle.dumps(GroupedMean()))
    assert empty.n_tokens == 0


def reasons(*seen):
    result = Pass(dict.fromkeys("abc"))
    _drop_first(result, seen)
    return result


def test_every_error_for_people_can_be_told_to_other_ranks():
    kinds, waiting = [], [HopeprobeError]
    while waiting:
        kinds.append(waiting.pop())
        waiting += [kind for kind in kinds[-1].__subclasses__() if kind.__module__.startswith("hopeprobe.")]
    assert {MissingCapability, HookNeverFiredError} < set(kinds)
    point = HookPoint("blocks.0.hook_x", HookSpec(("pos",), "tick", True, "x"))
    for kind in kinds:
        hooks = [InstalledHook(point, lambda tensor, hook: None, "fwd")]
        error = kind(hooks) if kind is HookNeverFiredError else kind("what is wrong")
        told = pickle.loads(pickle.dumps(error))
        assert (type(told), str(told), vars(told)) == (kind, str(error), vars(error))


def test_the_reason_is_the_one_that_one_process_meets_first():
    """Batches 0, 2, 4 are rank 0's, 1 and 3 are rank 1's."""
    late, early = _Seen(dropped=[(4, "a", "at 4")]), _Seen(dropped=[(1, "a", "at 1")])
    found = reasons(late, early)
    assert found.failed == {"a": "at 1"}
    assert list(found.accumulators) == ["b", "c"]


def test_an_error_of_a_whole_pass_takes_those_that_are_left():
    ended = _Seen(error=(2, MeasurementError("at 2")), dropped=[(0, "a", "at 0")])
    found = reasons(ended, _Seen(dropped=[(3, "b", "never seen by one process")]))
    assert found.failed == {"a": "at 0", "b": "at 2", "c": "at 2"}
    assert not found.accumulators
    with pytest.raises(MissingCapability, match="no gates"):
        reasons(ended, _Seen(error=(1, MissingCapability("no gates"))))


@pytest.mark.slow
def test_what_ranks_hear(torchrun, tmp_path):
    ended = torchrun(3, FOLDER / "ranks_talk.py", tmp_path)
    assert ended.code == 0, ended.err
    heard = [json.loads((tmp_path / f"heard-{i}.json").read_text()) for i in range(3)]
    assert [one["shared"] for one in heard] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [one["gathered_on_first"] for one in heard] == [[0, 10, 20], [], []]
    assert [one["first_then_others"] for one in heard] == [False, True, True]
    assert [one["first"] for one in heard] == [True, False, False]
    for one in heard:
        assert one["size"] == 3
        assert one["gathered"] == [0, 10, 20]
        assert one["on_first"] == [1, 0, ["mine"], ["a", "b", "c"], True]
        assert one["on_first raises"] == "BadInputError: rank 0 says no"
        failed = "MeasurementError: three is not measured"
        assert one["dealt"] == [[0, 0], [1, 1], [2, 2], failed, [4, 1]]
        assert one["folded"] == [0, 1, 2]
        assert one["folded raises"] == "BadInputError: rank 1 says no"
        assert one["first_then_others raises"] == "BadInputError: rank 0 says no"
        assert one["agreed"].startswith("BadInputError: rank 2 has another number than rank 0: 1, not 0.")
        assert one["summed"] == pytest.approx([0.6, 3e-9, 3.0], rel=1e-6)
        assert one["summed"] == heard[0]["summed"]
        assert one["gathered again"] == [0, 1, 2]
        if one["threads in"]:  # where the system tells
            own, *others = one["threads in"]
            assert any("gloo" in name for name in others), others
            assert one["threads out"] == one["threads after an error"] == [own]


def same(one, other, path):
    """Documents alike, numbers within 1e-9; the largest difference."""
    if isinstance(one, dict):
        assert list(one) == list(other), path
        return max((same(one[key], other[key], f"{path}.{key}") for key in one), default=0.0)
    if isinstance(one, list):
        assert len(one) == len(other), path
        return max(
            (same(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True))), default=0.0
        )
    if isinstance(one, float) and isinstance(other, float):
        assert math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9), (path, one, other)
        return abs(one - other)
    assert one == other, path
    return 0.0


@pytest.mark.slow
@pytest.mark.parametrize(("count", "which"), [(2, "few")])
def test_ranks_measure_what_one_process_measures(count, which, torchrun, tmp_path, toy_data, toy_run):
    """Rows, nulls and verdicts of every probe; of a series with one that fails, for the same reasons."""
    documents = tmp_path / "documents.json"
    ends = zip(toy_data.offsets[:-1], toy_data.offsets[1:], strict=True)
    documents.write_text(json.dumps([toy_data.tokens[a:b].tolist() for a, b in ends]))
    checkpoints = [toy_run / f"step-{step:06d}.pt" for step in ((10, 40) if which == "few" else (40,))]
    alone = ranks_analyze.run(documents, checkpoints, tmp_path / "cache-alone", ranks_analyze.probes(which))
    program, cache, output = FOLDER / "ranks_analyze.py", tmp_path / "cache", tmp_path / "found"
    ended = torchrun(count, program, which, documents, cache, output, *checkpoints)
    assert ended.code == 0, ended.err
    texts = [(tmp_path / f"found-{i}.json").read_text() for i in range(count)]
    assert len(set(texts)) == 1
    found = Results.from_json(texts[0])
    here = [
        {
            table: [row for row in document[table] if row["probe"] != "counts"]
            for table in ("results", "nulls")
        }
        for document in (json.loads(alone.to_json()), json.loads(texts[0]))
    ]
    print(f"\n{count} ranks, largest difference of {len(alone.rows)} rows: {same(*here, '')}")
    assert [why for why in found.missing if "counts" not in why] == alone.missing
    if which == "few":
        assert sum("fails (live): window" in why for why in alone.missing) == 2
        assert sum("no `state_dict` to send it by" in why for why in found.missing) == 2
    else:
        assert {row.probe for row in alone.rows} == PROBES.keys() - {"learning-signal"}
