"""The study under `examples/study/`: one command gives its tables and figures again from the records alone."""

import json
import re
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from hopeprobe.cli import run
from hopeprobe.study import read_grid, summarise
from hopeprobe.study.grid import differences_to_study

STUDY = Path(__file__).parents[2] / "examples" / "study"
GRIDS = sorted(path.parent for path in STUDY.glob("*/ablation.json"))
TEXTS = sorted(path.relative_to(STUDY) for path in STUDY.rglob("*") if path.suffix in (".csv", ".md"))
FIGURES = sorted(path.relative_to(STUDY) for path in STUDY.rglob("*.png"))


@pytest.fixture(scope="module")
def redrawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    assert run(["compare", *map(str, GRIDS), "--out", str(out)]) == 0
    return out


def test_every_table_is_regenerated_to_the_byte(redrawn):
    given = {
        Path("README.md"),
        *(grid.relative_to(STUDY) / "probes.csv" for grid in GRIDS),
    }  # what is read, not made
    made = [path for path in TEXTS if path not in given]
    assert {path.name for path in made} == {
        "cells.csv", "table.csv", "tables.md", "claims.md", "scaling.csv", "scaling.md",
    }  # fmt: skip
    for path in made:
        assert (redrawn / path).read_bytes() == (STUDY / path).read_bytes(), path


def test_every_figure_is_regenerated(redrawn):
    assert [path.name for path in FIGURES] == [f"figure-{i}.png" for i in range(1, 6)]
    for path in FIGURES:
        ours, committed = (matplotlib.image.imread(folder / path) for folder in (redrawn, STUDY))
        assert ours.shape == committed.shape, path
        assert np.abs(ours - committed).mean() < 0.005, path  # other fonts move a letter by a pixel


def test_another_record_gives_other_tables(tmp_path):
    shutil.copytree(GRIDS[0], tmp_path / "grid")
    record = json.loads((tmp_path / "grid" / "ablation.json").read_text())
    changed = next(cell for cell in record["cells"] if cell["name"] == "no-cms")
    changed["live"] += 0.01
    (tmp_path / "grid" / "ablation.json").write_text(json.dumps(record))
    assert run(["compare", str(tmp_path / "grid"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "table.csv").read_bytes() != (GRIDS[0] / "table.csv").read_bytes()


def test_cells_saw_the_same_data_and_none_is_called_the_published_setting():
    for folder in GRIDS:
        grid = read_grid(folder)
        for seed in grid.seeds:
            assert len({cell.first_batch for cell in grid.cells if cell.seed == seed}) == 1
        assert len({cell.first_batch for cell in grid.cells}) == len(grid.seeds)
        assert differences_to_study(grid)
        assert "Not the published setting" in (folder / "tables.md").read_text(encoding="utf-8")


def test_the_reading_quotes_the_tables():
    """Every number with a sign in the reading's table of differences stands in the tables it was taken from."""
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|]+) \| ([^|]+) \|", text, re.MULTILINE)
    assert len(rows) > 5
    for name, *quoted in rows:
        for folder, said in zip(GRIDS, quoted, strict=True):
            row = next(row for row in summarise(read_grid(folder)) if row.name == name)
            if row.delta is None or row.finding == "same":
                continue
            interval = f"{row.delta.mean:+.3f} [{row.delta.ci_low:+.3f}, {row.delta.ci_high:+.3f}]"
            assert said.strip() == interval, (name, folder.name)
