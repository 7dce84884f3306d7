"""Figures and tables as files."""

import re
import xml.etree.ElementTree as ET

import pandas as pd
import pytest

from hopeprobe.analysis import analyze
from hopeprobe.errors import BadInputError
from hopeprobe.plots import draw_loss_curve
from hopeprobe.report import export
from hopeprobe.report.export import as_latex, file_name


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


def test_names_of_files_hold_no_folder():
    assert file_name("../a b/c.pt") == "a-b-c"
    assert file_name("...") == "unnamed"


def test_a_folder_that_cannot_be_written(measured, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="cannot write"):
        export(measured, tmp_path / "file")
