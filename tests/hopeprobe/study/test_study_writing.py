"""Tables as text: what a reader must be told stands there, and the numbers are those of the rows."""

import math

import pandas as pd
from study_toys import cell, grid

from hopeprobe.study import scaling, summarise
from hopeprobe.study.writing import (
    SWEEP_HEADER,
    TABLE_HEADER,
    scaling_lines,
    setting_lines,
    sweep_lines,
    table_lines,
    write_scaling,
    write_tables,
)


def test_the_setting_is_said_with_its_differences_and_its_limits(made):
    text = " ".join(setting_lines(made))
    for said in (
        "Not the published setting",
        "width 64 (256)",
        "over 4 seeds, not over texts",
        "own noise is 0.044",
    ):
        assert said in text


def test_lines_carry_the_rows_numbers(made):
    rows = summarise(made)
    lines = {line[0]: dict(zip(TABLE_HEADER, line, strict=True)) for line in table_lines(rows)}
    assert lines["full"]["Δ to full, live"] == ""
    assert lines["no-cms"]["Δ to full, live"].startswith("+0.300 [+0.29")
    assert lines["no-cms"]["study's Δ"] == "-0.015"
    assert lines["no-cms"]["its claim"] == "does not hold"
    assert lines["transformer"]["finding"] == "better"


def test_thresholds_have_a_table_of_their_own(made, tmp_path):
    closed = [
        cell("full-tau-3", s, c.live + 0.1, variant="full", threshold=3.0, gate_rate=0.8, surprise_min=0.1)
        for s, c in made.of("full").items()
    ]
    same = [
        cell(
            "full-tau-0.05",
            s,
            c.live,
            variant="full",
            threshold=0.05,
            same_as="full",
            why="every gate was open",
        )
        for s, c in made.of("full").items()
    ]
    rows = summarise(grid([*made.cells, *closed, *same]))
    assert [line[0] for line in table_lines(rows)] == made.names
    lines = {line[0]: dict(zip(SWEEP_HEADER, line, strict=True)) for line in sweep_lines(rows)}
    assert list(lines) == ["full", "full-tau-3", "full-tau-0.05"]
    assert lines["full-tau-3"]["gate open"] == "80.00 %"
    assert lines["full-tau-0.05"]["finding"] == "= full"
    assert lines["full-tau-0.05"]["study's Δ"] == "+0.006"
    write_tables(grid([*made.cells, *closed, *same]), tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert (
        "full-tau-0.05, seeds 0, 1, 2, 3, is the computation of full and was not run: every gate was open."
        in text
    )


def test_files_hold_every_cell_and_row(made, tmp_path):
    broken = cell("titans", 0, math.nan, status="diverged", frozen=math.nan)
    whole = grid([*made.cells, broken])
    written = write_tables(whole, tmp_path)
    assert [path.name for path in written] == ["cells.csv", "table.csv", "tables.md"]
    cells = pd.read_csv(tmp_path / "cells.csv")
    assert len(cells) == 17
    assert cells.loc[cells.name == "titans", "live"].isna().all()
    table = pd.read_csv(tmp_path / "table.csv").set_index("name")
    row = next(r for r in summarise(whole) if r.name == "no-cms")
    assert abs(table.loc["no-cms", "delta_mean"] - row.delta.mean) < 1e-5
    assert table.loc["titans", "diverged"] == 1
    assert "0 (+1 diverged)" in (tmp_path / "tables.md").read_text()
    assert all(
        line.count("|") == 13 for line in (tmp_path / "tables.md").read_text().splitlines() if line[:1] == "|"
    )


def test_sizes(made, tmp_path):
    large = grid(
        [cell(c.name, c.seed, c.live + 0.1 * (c.name == "no-cms"), parameters=2000) for c in made.cells],
        preset="big",
    )
    growths = scaling([made, large])
    line = next(line for line in scaling_lines(growths) if line[0] == "no-cms")
    assert line[1] == "tiny → big"
    assert line[8] == "-0.015 → -0.158"
    write_scaling([made, large], growths, tmp_path)
    ratio = pd.read_csv(tmp_path / "scaling.csv").set_index("name").loc["no-cms", "ratio"]
    assert abs(ratio - 0.4005 / 0.3005) < 1e-4
    assert "| no-cms | tiny → big |" in (tmp_path / "scaling.md").read_text()


def test_a_row_of_which_some_seeds_are_twins_keeps_its_finding(made):
    twin = cell("no-surprise", 0, 7.0, same_as="full", why="open")
    others = [cell("no-surprise", s, made.of("full")[s].live + 0.2 + 0.001 * s) for s in (1, 2, 3)]
    lines = {line[0]: line for line in table_lines(summarise(grid([*made.cells, twin, *others])))}
    assert lines["no-surprise"][8] == "not resolved; = full (1 of 4 seeds)"


def test_cells_of_several_machines_are_said(made):
    import dataclasses

    assert not any("several machines" in line for line in setting_lines(made))
    mixed = dataclasses.replace(made, hardware=({"cores": 2}, {"cores": 8}))
    assert any("several machines" in line for line in setting_lines(mixed))
    cut = dataclasses.replace(made, model={**made.model, "truncate_ticks": 8})
    assert any("cut every 8 ticks" in line for line in setting_lines(cut))
