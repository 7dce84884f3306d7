"""The notebook on gates: run again it says what it says, and the table it reads is made as it tells."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from hopeprobe.results import NullRow, ResultRow, Results

GATES = Path(__file__).parents[2] / "examples" / "gates"


def texts(notebook):
    """What each code cell printed or displayed, as plain text, however it came in pieces; figures as the word."""
    found = []
    for cell in notebook.cells:
        pieces = []
        for output in cell.get("outputs", []):
            assert output.output_type != "error", output
            assert output.get("name") != "stderr", output.text
            data = output.get("data", {})
            pieces.append("figure" if "image/png" in data else output.get("text") or data["text/plain"])
        found.append(
            "\n".join(" ".join(line.split()) for line in "\n".join(pieces).splitlines() if line.strip())
        )
    return found


@pytest.mark.slow  # it starts a kernel
def test_the_notebook_says_again_what_it_says():
    committed = nbformat.read(GATES / "gates.ipynb", as_version=4)
    again = nbformat.read(GATES / "gates.ipynb", as_version=4)
    options = {"metadata": {"path": str(GATES)}}
    NotebookClient(again, timeout=300, kernel_name="python3", resources=options).execute()
    assert texts(again) == texts(committed)
    assert texts(committed).count("figure") == 2
    assert not any("Warning" in text for text in texts(committed))


def test_every_number_in_the_answer_is_in_the_tables():
    """The text below the last cell quotes differences: each is one that the notebook computed."""
    committed = nbformat.read(GATES / "gates.ipynb", as_version=4)
    answer = committed.cells[-1]
    assert answer.cell_type == "markdown"
    shown = "\n".join(texts(committed))
    quoted = re.findall(r"[+−]\d\.\d{3,4}", answer.source)
    assert len(quoted) >= 4
    for number in quoted:
        value = float(number.replace("−", "-"))
        digits = len(number.partition(".")[2])
        known = [round(float(n), digits) for n in re.findall(r"[-+]?\d+\.\d+", shown)]
        assert value in known, number


def load_gather():
    spec = importlib.util.spec_from_file_location("gather", GATES / "gather.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gathering(tmp_path, monkeypatch, capsys):
    key = {
        "probe": "relative-surprise", "statistic": "loss_difference", "checkpoint": "a.pt", "step": 2, "layer": None,
        "component": "quantile", "condition": "all", "position": "0.1",
    }  # fmt: skip
    row = ResultRow(
        **key, value=-0.5, unit="nats", ci_low=-0.6, ci_high=-0.4, n_tokens=9, n_groups=64, dtype="float32",
        min_detectable=0.1, p=0.01, q=0.01, verdict="learned", note="beats random (q 0.01)",
    )  # fmt: skip
    null = NullRow(**key, null_kind="own-init", value=0.25, low=0.2, high=0.3, n=9)
    for seed in (0, 1):
        Results([row], [null]).write_json(tmp_path / f"{seed}.json")
    out = tmp_path / "rows.csv"
    files = [f"tiny:{seed}={tmp_path / f'{seed}.json'}" for seed in (0, 1)]
    monkeypatch.setattr(sys, "argv", ["gather.py", *files, "--out", str(out)])
    load_gather().main()
    table = pd.read_csv(out)
    assert capsys.readouterr().out.endswith("2 rows of 2 checkpoints\n")
    assert table.seed.tolist() == [0, 1]
    again = dataclasses.replace(row, value=9.0)
    other = dataclasses.replace(row, statistic="oracle_difference")
    Results([again, other], []).write_json(tmp_path / "more.json")
    monkeypatch.setattr(
        sys, "argv", ["gather.py", *files, f"tiny:1={tmp_path / 'more.json'}", "--out", str(out)]
    )
    load_gather().main()
    joined = pd.read_csv(out)
    assert capsys.readouterr().out.endswith("3 rows of 2 checkpoints\n")
    assert joined.value.tolist() == [-0.5, -0.5, -0.5], "of a row in two files the first counts"
    assert joined.statistic.tolist() == ["loss_difference"] * 2 + ["oracle_difference"]
    assert table[["value", "own-init", "fresh-init", "random"]].iloc[0].fillna("").tolist() == [
        -0.5, 0.25, "", "beats random",
    ]  # fmt: skip


def test_the_table_is_of_three_seeds_of_two_sizes():
    rows = pd.read_csv(GATES / "rows.csv")
    assert rows.groupby("size").seed.nunique().to_dict() == {"nano": 3, "tiny": 3}
    differences = rows[rows.statistic == "loss_difference"]
    assert set(differences.random) <= {"beats random", "loses to random", "not told from random"}
    # Seven rules gate all writes or those of the CMS, eight those of the memories; at four budgets.
    assert len(differences) == 2 * 3 * 4 * (7 + 7 + 8)
