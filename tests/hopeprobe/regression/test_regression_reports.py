"""A check as JUnit XML and as GitHub's annotations."""

import re
from xml.etree import ElementTree as ET

import pytest

from hopeprobe.errors import BadInputError
from hopeprobe.regression.baseline import Address, Baseline, Settings, Tracked, current_versions
from hopeprobe.regression.comparing import compare
from hopeprobe.regression.reports import github_annotations, write_junit
from hopeprobe.stats.verdict import Verdict


def baseline_of(*statistics, component="a", probe="toy-probe"):
    nan = (float("nan"),)
    tracked = tuple(
        Tracked(
            Address(probe, name, 0, component), "nats", (1.0,), (Verdict.LEARNED,), nan, nan, 0.01, 1e-3, 0.1
        )
        for name in statistics
    )
    settings = Settings((probe,), ("text.jsonl",), 1000)
    return Baseline(settings, {}, ({"seed": 0, "identity": "same"},), tracked, (), current_versions())


def test_junit_has_a_case_a_number(row, results, tmp_path):
    kept = baseline_of("same", "far", "gone")
    found = compare(kept, results([row("same", 1.0, unit="nats"), row("far", 2.0, unit="nats")]))
    path = write_junit(found, tmp_path / "junit.xml")
    root = ET.parse(path).getroot()
    assert root.tag == "testsuites"
    assert [root.get(name) for name in ("tests", "failures", "errors")] == ["3", "1", "1"]
    (suite,) = root
    assert (suite.tag, suite.get("name"), suite.get("tests")) == ("testsuite", "toy-probe", "3")
    cases = {case.get("name"): case for case in suite}
    assert list(cases) == ["same/layer 0/a", "far/layer 0/a", "gone/layer 0/a"]
    assert {case.get("classname") for case in suite} == {"hopeprobe.toy-probe"}
    assert len(cases["same/layer 0/a"]) == 0
    (failure,) = cases["far/layer 0/a"]
    assert failure.tag == "failure"
    assert failure.get("message").startswith("1 nats in the baseline, now 2 nats: +1 [+0.999, +1]")
    (error,) = cases["gone/layer 0/a"]
    assert (error.tag, error.get("message")) == ("error", "1 nats in the baseline, now none: no such row")


def test_junit_of_names_that_xml_cannot_hold(row, results, tmp_path):
    kept = baseline_of("<&\"'\x00\x1b>", component="\ud800")
    path = write_junit(compare(kept, results([row()])), tmp_path / "junit.xml")
    (case,) = ET.parse(path).getroot()[0]
    assert case.get("name") == "<&\"'��>/layer 0/�"


def test_junit_that_cannot_be_written(row, results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="cannot write"):
        write_junit(compare(baseline_of("a"), results([row()])), tmp_path / "file" / "junit.xml")


def test_annotations_are_one_line_each_and_escaped(row, results):
    kept = baseline_of("far", "100%: a,b\nc")
    found = compare(
        kept, results([row("far", 2.0), row("100%: a,b\nc", 2.0)], missing=["a hook\nnever fired, 5 %"])
    )
    lines = list(github_annotations(found))
    assert lines[0].startswith(
        "::error title=toy-probe/far/layer 0/a moved::1 nats in the baseline, now 2 nats"
    )
    assert lines[1].startswith("::error title=toy-probe/100%25%3A a%2Cb%0Ac/layer 0/a moved::")
    assert lines[2] == "::warning title=hopeprobe check::a hook%0Anever fired, 5 %25"
    assert all("\n" not in line for line in lines)


def test_no_more_annotations_than_github_shows(row, results):
    names = [f"s{i}" for i in range(25)]
    found = compare(baseline_of(*names), results([row(name, 2.0) for name in names]))
    lines = list(github_annotations(found))
    assert len(lines) == 10
    assert lines[-1] == "::error title=25 statistics%3A 25 moved::16 more are in the table of the log"
    assert (
        len(
            list(
                github_annotations(
                    compare(baseline_of(*names[:10]), results([row(n, 2.0) for n in names[:10]]))
                )
            )
        )
        == 10
    )
    assert not any(re.search("more are", line) for line in lines[:-1])


def test_nothing_to_say_is_no_annotation(row, results):
    assert list(github_annotations(compare(baseline_of("a"), results([row("a", 1.0)])))) == []
