"""Figures and tables as files."""

import dataclasses
import re
import xml.etree.ElementTree as ET

import pandas as pd
import pytest

from hopeprobe.analysis import analyze
from hopeprobe.errors import BadInputError
from hopeprobe.plots import draw_loss_curve
from hopeprobe.report import export
from hopeprobe.report.export import as_latex, file_name, file_names
from hopeprobe.results import Results


@pytest.fixture(scope="module")
def measured(toy_run, toy_data, toy_cache):
    settings = {"data": toy_data, "tokens": 1600, "split": "all", "fresh": 0, "cache_dir": toy_cache}
    return analyze(toy_run / "step-000040.pt", ["cms-similarity", "surprise"], **settings)


def test_every_figure_and_table_is_a_file(measured, toy_run, tmp_path):
    curve = draw_loss_curve(toy_run / "metrics.jsonl")
    written = export(measured, tmp_path, {"toy": curve})
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in written} == {
        "results.csv", "results.nulls.csv", "training-toy.svg", "training-toy.png", "cms-similarity.svg",
        "cms-similarity.png", "surprise.svg", "surprise.png", "cms-similarity.tex", "surprise.tex",
    }  # fmt: skip
    assert len(pd.read_csv(tmp_path / "results.csv")) == len(measured.rows)
    for path in tmp_path.glob("*.svg"):
        assert ET.parse(path).getroot().tag.endswith("svg")
    assert (tmp_path / "surprise.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_figure_is_the_same_file(measured, tmp_path):
    for name in ("one", "other"):
        export(measured, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name


def test_latex_has_a_line_a_row_and_nothing_that_latex_would_take(measured):
    text = as_latex(measured, "step-000040.pt", "cms-similarity")
    rows = [row for row in measured.rows if row.probe == "cms-similarity"]
    body = text.split(r"\endlastfoot")[1]
    assert body.count(r"\\") == len(rows)
    assert text.count(r"\begin{longtable}{lrlrrrrll}") == 1
    assert all(line.count(" & ") == 8 for line in body.splitlines() if line.endswith(r"\\"))
    assert r"output\_cosine" in text
    assert not re.search(r"(?<!\\)[_#%$](?!-\$|\\cdot)", body.replace("$-$", "")), "each is escaped"


def renamed(results, *names):
    """The same rows of several checkpoints."""
    return Results(
        [dataclasses.replace(row, checkpoint=name) for name in names for row in results.rows],
        [dataclasses.replace(null, checkpoint=name) for name in names for null in results.null_rows],
    )


@pytest.mark.slow
def test_names_that_a_file_system_cannot_tell_apart_are_files_of_their_own(measured, toy_run, tmp_path):
    names = ("a/step.pt", "a step.pt", "A-Step.pt")
    curve = draw_loss_curve(toy_run / "metrics.jsonl")
    written = export(renamed(measured, *names), tmp_path, {"run a": curve, "run-a": curve})
    assert len({str(path).lower() for path in written}) == len(written) == 2 + 2 * (2 * 3 + 2) + 2 * 3
    assert len(list(tmp_path.iterdir())) == len(written)
    assert {path.name for path in written} >= {
        "surprise-a-step.svg", "surprise-a-step-2.svg", "surprise-A-Step-3.svg", "training-run-a-2.png",
    }  # fmt: skip
    captions = [
        path.read_text().split("caption{")[1].split("}")[0] for path in written if path.suffix == ".tex"
    ]
    assert sorted(captions) == sorted(
        f"{probe}, {name}" for probe in ("cms-similarity", "surprise") for name in names
    )


def test_each_table_has_a_label_of_its_own(measured, tmp_path):
    both = renamed(measured, "step-1.pt", "step-2.pt")
    export(both, tmp_path)
    labels = {path.stem: re.findall(r"\\label\{(.*?)\}", path.read_text()) for path in tmp_path.glob("*.tex")}
    assert labels == {
        f"{probe}-step-{step}": [f"tab:{probe}-step-{step}"]
        for probe in ("cms-similarity", "surprise")
        for step in (1, 2)
    }
    assert r"\label{tab:surprise}" in as_latex(measured, "step-000040.pt", "surprise")


def test_equal_names_are_numbered_and_none_takes_another_s():
    assert file_names(["a", "b.pt"]) == {"a": "a", "b.pt": "b"}
    assert file_names(["a b", "a/b", "a-b-2", "A-B"]) == {
        "a b": "a-b",
        "a/b": "a-b-3",
        "a-b-2": "a-b-2",
        "A-B": "A-B-4",
    }
    assert list(file_names(["?", "!"]).values()) == ["unnamed", "unnamed-2"]


def test_names_of_files_hold_no_folder():
    assert file_name("../a b/c.pt") == "a-b-c"
    assert file_name("...") == "unnamed"


def test_a_folder_that_cannot_be_written(measured, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="cannot write"):
        export(measured, tmp_path / "file")
