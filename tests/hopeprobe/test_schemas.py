"""The JSON that is written is what its schema says, and a schema says enough to be broken."""

import dataclasses
import json
import math
from pathlib import Path

import jsonschema
import pytest

from hopeprobe.analysis import analyze
from hopeprobe.errors import BadInputError
from hopeprobe.regression import Baseline, check, make_baseline
from hopeprobe.results import SCHEMA_VERSION, NullRow, ResultRow, Results, nan_to_null
from hopeprobe.schemas import NAMES, schema


def errors(name, document):
    validator = jsonschema.Draft202012Validator(schema(name))
    return [error.message for error in validator.iter_errors(document)]


@pytest.fixture(scope="module")
def documents(toy_run, toy_data, toy_cache):
    """One of each: of one checkpoint, and results of two."""
    path = toy_run / "step-000040.pt"
    shared = {"data": toy_data, "split": "all", "cache_dir": toy_cache}
    probes = ["integrity", "cms-similarity", "cms-dynamics", "surprise", "gate-selectivity"]
    one = analyze(path, probes, tokens=400, fresh=0, **shared)
    two = analyze([path, toy_run / "step-000020.pt"], "surprise", tokens=1600, fresh=2, **shared)
    kept = make_baseline(path, ["surprise", "cms-similarity"], tokens=1600, fresh=0, **shared)
    found = check(path, kept, toy_data, cache_dir=toy_cache)
    return {
        "results": [json.loads(results.to_json()) for results in (one, two)],
        "baseline": [json.loads(kept.to_json())],
        "check": [json.loads(json.dumps(nan_to_null(found.to_dict()), allow_nan=False))],
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_the_schema_says(name, documents):
    jsonschema.Draft202012Validator.check_schema(schema(name))
    for document in documents[name]:
        assert errors(name, document) == []


def test_layers_stay_whole_numbers_beside_rows_that_have_none(documents):
    layers = [one["layer"] for one in documents["check"][0]["statistics"]]
    assert {type(layer) for layer in layers} == {int, type(None)}


def test_versions_are_those_of_the_schemas(documents):
    assert schema("results")["properties"]["schema_version"]["const"] == SCHEMA_VERSION
    for name in NAMES:
        version = schema(name)["properties"]["schema_version"]["const"]
        assert {document["schema_version"] for document in documents[name]} == {version}


def test_every_column_is_in_the_schema():
    definitions = schema("results")["$defs"]
    for kind, cls in (("result", ResultRow), ("null", NullRow)):
        assert set(definitions[kind]["properties"]) == {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("results", lambda d: d["results"][0].pop("verdict"), "'verdict' is a required property"),
        ("results", lambda d: d["results"][0].update(verdict="great"), "'great' is not one of"),
        ("results", lambda d: d["results"][0].update(colour=1), "'colour' was unexpected"),
        ("results", lambda d: d["nulls"][0].update(value="x"), "'x' is not of type"),
        ("results", lambda d: d.update(schema_version=1), "2 was expected"),
        ("baseline", lambda d: d.update(statistics=[]), "[] should be non-empty"),
        ("baseline", lambda d: d["statistics"][0].update(tolerance=-1), "-1 is less than the minimum"),
        ("check", lambda d: d["statistics"][0].update(outcome="fine"), "'fine' is not one of"),
        ("check", lambda d: d.update(exit_code=2), "2 is not one of"),
    ],
)
def test_another_document_is_refused(name, change, message, documents):
    document = json.loads(json.dumps(documents[name][0]))
    change(document)
    assert any(message in error for error in errors(name, document))


KEPT = Path(__file__).parent / "documents"
"""Documents as they were once written: what is committed somewhere must go on to be read."""


@pytest.mark.parametrize("version", [1, 2])
def test_results_of_earlier_versions_are_read(version):
    text = (KEPT / f"results-{version}.json").read_text(encoding="utf-8")
    results, document = Results.from_json(text), json.loads(text)
    assert document["schema_version"] == version
    assert [row.value for row in results.rows] == [record["value"] for record in document["results"]]
    assert len(results.nulls_by_row()) > 0
    assert all(math.isnan(row.smallest_effect) for row in results.rows) is (version == 1)
    assert errors("results", json.loads(results.to_json())) == []


def test_a_baseline_that_is_committed_is_read_and_written_as_it_is():
    text = (KEPT / "baseline-1.json").read_text(encoding="utf-8")
    assert errors("baseline", json.loads(text)) == []
    assert json.loads(Baseline.read(KEPT / "baseline-1.json").to_json()) == json.loads(text)


def test_a_schema_that_there_is_not():
    with pytest.raises(BadInputError, match="did you mean 'results'"):
        schema("result")
