"""Result tables: what a row may claim, and that what is written is read back."""

import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from hopeprobe.errors import BadInputError
from hopeprobe.results import KEY, NullRow, ResultRow, Results, check_names, joined
from hopeprobe.stats import Verdict


def row(**changes):
    fields = {
        "probe": "cms-similarity",
        "statistic": "cka",
        "checkpoint": "step-000200.pt",
        "step": 200,
        "layer": 3,
        "component": "fast-slow",
        "value": 0.25,
        "unit": "1",
        "ci_low": 0.2,
        "ci_high": 0.3,
        "n_tokens": 4096,
        "n_groups": 64,
        "dtype": "float32",
        "smallest_effect": 0.05,
        "min_detectable": 0.01,
        "p": 0.001,
        "q": 0.002,
        "verdict": Verdict.LEARNED,
        "note": "naïve, “quoted”",
    }
    return ResultRow(**{**fields, **changes})


def null(**changes):
    fields = {"probe": "cms-similarity", "statistic": "cka", "checkpoint": "step-000200.pt", "layer": 3}
    return NullRow(**{**fields, "null_kind": "own-init", "value": 0.9, "n": 4096, **changes})


def example():
    unmeasured = {"value": math.nan, "ci_low": math.nan, "ci_high": math.nan, "p": math.nan, "q": math.nan}
    return Results(
        [row(), row(layer=None, step=None, verdict="n/a", n_tokens=0, **unmeasured)],
        [null(), null(null_kind="fresh-init", low=0.1, high=0.2, n=10)],
        checkpoint={"path": "step-000200.pt", "loss": math.nan},
        data={"fingerprint": "abc", "tokens": 4096},
    )


def test_json_round_trips_and_is_strict():
    results = example()
    text = results.to_json()
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(document)[:5] == ["schema_version", "hopeprobe", "torch", "checkpoint", "data"]
    assert document["data"]["fingerprint"] == "abc"
    assert document["checkpoint"]["loss"] is None
    assert document["results"][1]["value"] is None
    assert document["results"][0]["verdict"] == "learned"
    assert Results.from_json(text).to_json() == text
    again = Results.from_json(text)
    assert again.rows[0] == results.rows[0]
    assert again.versions == results.versions
    assert math.isnan(again.rows[1].value)


def test_frames_have_all_columns_even_when_empty():
    for results in (example(), Results()):
        assert list(results.table.columns) == [
            *KEY,
            *("value", "unit", "ci_low", "ci_high", "n_tokens", "n_groups", "dtype"),
            *("smallest_effect", "min_detectable", "p", "q", "verdict", "note"),
        ]
        assert list(results.nulls.columns) == [*KEY, "null_kind", "value", "low", "high", "n"]
    frame = example().table
    assert frame["layer"].tolist() == [3, pd.NA]
    assert frame["verdict"].tolist() == ["learned", "n/a"]
    assert frame["value"].dtype == np.float64


def test_verdicts_are_counted_by_statistic_and_in_their_order():
    results = Results(
        [row(layer=i, verdict=v) for i, v in enumerate(("inconclusive", "learned", "inconclusive"))]
    )
    results.extend([row(statistic="cosine", verdict="at-init"), row(probe="integrity", verdict="untrained")])
    found = results.verdicts
    assert list(found.columns) == ["learned", "at-init", "untrained", "inconclusive"]
    assert found.index.names == ["checkpoint", "probe", "statistic"]
    assert [names[1:] for names in found.index] == [
        ("cms-similarity", "cka"), ("cms-similarity", "cosine"), ("integrity", "cka")
    ]  # fmt: skip
    assert found.to_numpy().tolist() == [[1, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert found.to_numpy().sum() == len(results.rows)
    assert found.loc[("step-000200.pt", "cms-similarity", "cka"), "inconclusive"] == 2
    assert Results().verdicts.empty
    assert Results().verdicts.index.names == ["checkpoint", "probe", "statistic"]


def test_what_is_missing_is_said_by_results_and_their_text():
    results = example()
    assert results.missing == []
    assert repr(results) == "<Results: 2 rows, 2 nulls, of cms-similarity>"
    results.checkpoint = {"checkpoints": [{"missing": ["a.pt: surprise: x"]}, {}, {"missing": ["b.pt: y"]}]}
    assert results.missing == ["a.pt: surprise: x", "b.pt: y"]
    assert repr(results) == "<Results: 2 rows, 2 nulls, of cms-similarity; 2 not measured>"
    assert repr(Results()) == "<Results: 0 rows, 0 nulls, of nothing>"


MAIN = {
    "name": "step-000200.pt",
    "path": "runs/a/step-000200.pt",
    "step": 200,
    "seed": 1,
    "identity": "e3b0c442",
}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"path": "runs/b/step-000200.pt"},
            "runs/b/step-000200.pt (step 200, seed 1, configuration e3b0c442)",
        ),
        ({"step": 400}, "runs/a/step-000200.pt (step 400, seed 1"),
        ({"seed": 2}, "runs/a/step-000200.pt (step 200, seed 2"),
        ({"seed": None}, "runs/a/step-000200.pt (step 200, configuration e3b0c442)"),
        ({"identity": "9f86d081"}, "configuration 9f86d081)"),
        ({"path": None}, "one in memory (step 200"),
    ],
)
def test_rows_of_two_checkpoints_are_not_joined_under_one_name(changed, told):
    """Each has its own probes, so that no row's key is taken twice: only what is recorded of them tells."""
    one = Results([row()], checkpoint=MAIN)
    other = Results([row(probe="surprise")], checkpoint=MAIN | changed)
    with pytest.raises(BadInputError) as error:
        joined([one, other])
    assert f"step-000200.pt is the name of two checkpoints, {MAIN['path']} (step 200, seed 1" in str(
        error.value
    )
    assert told in str(error.value)
    several = Results([row(probe="surprise")], checkpoint={"checkpoints": [{"name": "x.pt"}, MAIN | changed]})
    with pytest.raises(BadInputError, match="the name of two checkpoints"):
        joined([one, several])


def test_results_of_one_checkpoint_and_of_checkpoints_with_names_of_their_own_are_joined():
    other = MAIN | {"name": "b/step-000200.pt", "path": "runs/b/step-000200.pt"}
    made = joined(
        [
            Results([row()], checkpoint=MAIN),
            Results([row(probe="surprise")], checkpoint=dict(MAIN)),
            Results([row(checkpoint="b/step-000200.pt")], checkpoint=other),
        ]
    )
    assert made.checkpoints == [MAIN, other]
    assert len(made.rows) == 3
    again = joined(
        [Results([row()], checkpoint=MAIN), Results([row(layer=4)], checkpoint=MAIN | {"missing": ["x"]})]
    )
    assert (len(again.rows), again.missing) == (2, ["x"]), (
        "what was found out later differs, the checkpoint does not"
    )


def test_what_a_description_leaves_out_is_not_compared():
    named = {"name": MAIN["name"], "path": MAIN["path"]}
    check_names([MAIN, named, {"name": MAIN["name"]}, {"path": "runs/b/step-000200.pt"}, {}])
    with pytest.raises(BadInputError, match=r"runs/c\.pt"):
        check_names([{"name": MAIN["name"]}, named, named | {"path": "runs/c.pt"}])


def test_nulls_are_found_by_their_row():
    results = Results([row(), row(layer=4)], [null(step=200, component="fast-slow"), null(layer=9)])
    assert [n.value for n in results.nulls_by_row()[results.rows[0].key].values()] == [0.9]
    assert results.rows[1].key not in results.nulls_by_row()
    assert set(results.nulls_by_row()[results.rows[0].key]) == {"own-init"}


def test_how_far_an_interval_reaches():
    assert row(value=0.25, ci_low=0.2, ci_high=0.35).error == pytest.approx((0.05, 0.1))
    assert row(value=0.25, ci_low=math.nan, ci_high=math.nan, verdict="inconclusive").error == (0, 0)
    # A corrected value may lie outside its interval once both are cut to the range.
    assert row(value=0.25, ci_low=0.3, ci_high=0.4).error == pytest.approx((0, 0.15))


def test_csv_round_trips_through_pandas(tmp_path):
    results = example()
    path, nulls = results.write_csv(tmp_path / "out.csv")
    assert (path.name, nulls.name) == ("out.csv", "out.nulls.csv")
    frame = pd.read_csv(path)
    assert frame["layer"].tolist()[0] == 3
    assert frame["note"].tolist()[0] == "naïve, “quoted”"
    assert pd.read_csv(nulls)["null_kind"].tolist() == ["own-init", "fresh-init"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.csv", "out.nulls.csv"]


def test_write_json_replaces_the_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    assert example().write_json(path) == path
    assert path.read_text(encoding="utf-8") == example().to_json()
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def test_a_file_is_read_back_and_one_that_is_none_is_named(tmp_path):
    path = example().write_json(tmp_path / "out.json")
    assert Results.read_json(path).to_json() == example().to_json()
    (tmp_path / "other.json").write_text('{"schema_version": 0}')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name, said in {
        "other.json": "other.json: not a results document .* `hopeprobe analyze --format json` writes one",
        "bytes.json": "bytes.json is no text",
        "absent.json": "cannot read .*absent.json: No such file",
    }.items():
        with pytest.raises(BadInputError, match=said):
            Results.read_json(tmp_path / name)


@pytest.mark.parametrize("write", ["write_json", "write_csv"])
def test_what_cannot_be_written_is_bad_input_that_names_the_path(tmp_path, write):
    (tmp_path / "file").touch()
    with pytest.raises(BadInputError, match="out"):
        getattr(example(), write)(tmp_path / "file" / "out.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(BadInputError, match="folder"):
        getattr(example(), write)(tmp_path / "folder.csv")
    assert not list((tmp_path / "folder.csv").iterdir())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("verdict", ["learned", "at-init"])
@pytest.mark.parametrize(
    "nothing", [{"value": math.nan}, {"n_tokens": 0}, {"ci_low": math.nan, "ci_high": math.nan}]
)
def test_a_row_that_measured_nothing_cannot_report_success(verdict, nothing):
    with pytest.raises(ValueError, match="measured nothing"):
        row(verdict=verdict, **nothing)
    row(verdict="inconclusive", **nothing)


def test_a_number_that_no_tokens_would_change_needs_none():
    exact = {"value": 0.25, "ci_low": 0.25, "ci_high": 0.25, "n_tokens": 0, "n_groups": 0}
    assert row(verdict="learned", **exact).verdict is Verdict.LEARNED
    with pytest.raises(ValueError, match="measured nothing"):
        row(verdict="learned", **exact | {"ci_high": 0.3})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"verdict": "great"}, "great"),
        ({"value": math.inf}, "infinite"),
        ({"n_tokens": -1}, "negative"),
        ({"ci_low": 0.5}, "not an interval"),
        ({"ci_low": math.nan}, "not an interval"),
    ],
)
def test_impossible_rows_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        row(**bad)


def test_numpy_scalars_become_plain_numbers():
    results = Results(
        [row(layer=np.int64(3), value=np.float32(0.25), n_tokens=np.int32(5))], [null(n=np.int64(7))]
    )
    record = json.loads(results.to_json())["results"][0]
    assert (record["layer"], record["value"], record["n_tokens"]) == (3, 0.25, 5)
    with pytest.raises(TypeError):
        row(n_tokens=1.5)


def test_duplicate_keys_raise_and_add_nothing():
    results = example()
    with pytest.raises(ValueError, match="two rows have the key"):
        results.extend([row(layer=9), row()])
    with pytest.raises(ValueError, match="two rows have the key"):
        results.extend([row(layer=9)], [null()])
    with pytest.raises(ValueError, match="two rows have the key"):
        results.extend(example())
    assert len(results.rows) == len(results.null_rows) == 2
    results.extend(Results([row(layer=9)], [null(layer=9)]))
    assert len(results.rows) == len(results.null_rows) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a results document"),
        ("[]", "schema version"),
        ('{"schema_version": 99}', "schema version"),
        ('{"schema_version": 1}', "without"),
        ("[" * 100_000, "not a results document"),
    ],
)
def test_other_documents_are_bad_input(text, message):
    with pytest.raises(BadInputError, match=message):
        Results.from_json(text)


def test_documents_of_version_1_are_read():
    """They have no `smallest_effect`; all else is as it was."""
    document = json.loads(example().to_json())
    document["schema_version"] = 1
    for record in document["results"]:
        del record["smallest_effect"]
    old = Results.from_json(json.dumps(document))
    assert math.isnan(old.rows[0].smallest_effect)
    assert [row.value for row in old.rows[:1]] == [0.25]
    assert json.loads(old.to_json())["schema_version"] == 2


def test_an_unknown_column_names_its_neighbour():
    document = json.loads(example().to_json())
    document["results"][0]["ci_lo"] = 0.1
    with pytest.raises(BadInputError, match="ci_low"):
        Results.from_json(json.dumps(document))
    document["results"] = ["text"]
    with pytest.raises(BadInputError):
        Results.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("where", "column", "value"),
    [
        ("results", "note", 3),
        ("results", "component", None),
        ("results", "position", ["x"]),
        ("results", "checkpoint", 7),
        ("nulls", "null_kind", 1.5),
    ],
)
def test_a_text_that_is_none_is_refused(where, column, value):
    document = json.loads(example().to_json())
    document[where][0][column] = value
    with pytest.raises(BadInputError, match=rf"column '{column}' holds .*, which is no text"):
        Results.from_json(json.dumps(document))


@pytest.mark.parametrize(
    "described",
    [{"missing": 3}, {"missing": "x"}, {"missing": [1]}, {"checkpoints": ["a.pt"]}, {"checkpoints": 3}],
)
def test_a_description_that_cannot_be_told_is_refused(described):
    document = json.loads(example().to_json()) | {"checkpoint": described}
    with pytest.raises(BadInputError, match="cannot be used"):
        Results.from_json(json.dumps(document))


def test_infinite_numbers_in_the_description_are_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        Results(data={"loss": math.inf}).to_json()


def test_pandas_and_torch_load_when_first_used():
    code = "import sys, hopeprobe.results; print({'pandas', 'torch', 'scipy.stats'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
