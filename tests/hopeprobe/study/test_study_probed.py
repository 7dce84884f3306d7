"""Rows of probes over seeds."""

import dataclasses
import math

import numpy as np
import pytest

from hopeprobe.errors import BadInputError
from hopeprobe.results import NullRow, ResultRow, Results
from hopeprobe.stats import Verdict, over_seeds
from hopeprobe.study.probed import over_runs, read_probed, write_probed


def results(value, layer=0, step=10, verdict=Verdict.INCONCLUSIVE, own=0.5):
    key = {
        "probe": "p", "statistic": "s", "checkpoint": "c", "step": step, "layer": layer, "component": "fast",
        "condition": "live", "position": "",
    }  # fmt: skip
    out = Results()
    row = ResultRow(
        **key, value=value, unit="nats", ci_low=math.nan, ci_high=math.nan, n_tokens=5, n_groups=3, dtype="float32",
        min_detectable=math.nan, p=math.nan, q=math.nan, verdict=verdict,
    )  # fmt: skip
    nulls = [
        NullRow(**key, null_kind="own-init", value=own, low=math.nan, high=math.nan, n=1),
        NullRow(**key, null_kind="fresh-init", value=0.4, low=0.3, high=0.5, n=10),
    ]
    out.extend([row], nulls)
    return out


def test_means_over_runs_and_over_their_nulls():
    values = [1.0, 1.2, 1.7]
    (row,) = over_runs("full", [results(v, own=v / 2) for v in values])
    spread = over_seeds(values)
    assert (row.value, row.ci_low, row.ci_high, row.seeds) == (spread.mean, spread.ci_low, spread.ci_high, 3)
    np.testing.assert_allclose(
        [row.own_init, row.fresh_init, row.fresh_low, row.fresh_high], [0.65, 0.4, 0.3, 0.5]
    )
    assert (row.name, row.statistic, row.unit, row.verdicts) == ("full", "s", "nats", "inconclusive 3")


def test_places_are_kept_apart_and_what_was_not_measured_counts_for_nothing():
    runs = [
        results(1.0),
        results(math.nan),
        results(3.0, layer=1),
        results(5.0, step=20),
        results(7.0, layer=None),
    ]
    rows = over_runs("full", runs)
    assert {(r.layer, r.step): (r.value, r.seeds) for r in rows} == {
        (0, 10): (1.0, 1), (1, 10): (3.0, 1), (0, 20): (5.0, 1), (None, 10): (7.0, 1),
    }  # fmt: skip
    assert next(r for r in rows if (r.layer, r.step) == (0, 10)).verdicts == "inconclusive 2"
    assert over_runs("full", [results(math.nan)]) == []


def test_there_and_back(tmp_path):
    rows = over_runs("full", [results(1 / 3), results(2 / 3)]) + over_runs("full", [results(1.0, layer=None)])
    write_probed(rows, tmp_path)
    back = read_probed(tmp_path)
    assert [(r.layer, r.component, r.position, r.condition) for r in back] == [
        (0, "fast", "", "live"), (None, "fast", "", "live"),
    ]  # fmt: skip
    assert back[0].value == 0.5
    assert math.isnan(back[1].ci_low)
    assert abs(back[0].ci_high - rows[0].ci_high) < 1e-5


def test_no_table_is_no_rows_and_another_file_is_refused(tmp_path):
    assert read_probed(tmp_path) == []
    (tmp_path / "probes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInputError, match=r"probes\.csv is not a table"):
        read_probed(tmp_path)


@pytest.mark.parametrize("name", ["layer", "step", "seeds"])
@pytest.mark.parametrize("text", ["1" + "0" * 400, "7" * 5000, "9223372036854775808", "1.5", "inf", "x"])
def test_a_number_that_is_no_layer_or_step_is_refused(tmp_path, name, text):
    file = write_probed(over_runs("full", [results(1.0)]), tmp_path)
    columns, row = file.read_text().splitlines()
    cells = dict(zip(columns.split(","), row.split(","), strict=True)) | {name: text}
    file.write_text(f"{columns}\n{','.join(cells.values())}\n")
    with pytest.raises(BadInputError, match=rf"probes\.csv is not a table.*{name} is") as caught:
        read_probed(tmp_path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("text", ["nan", "1_0", " 1", "0x1", "1e", "1e999", "x", "\u0661"])
def test_a_number_that_is_none_is_refused(tmp_path, text):
    file = write_probed(over_runs("full", [results(1.0)]), tmp_path)
    file.write_text(file.read_text().replace(",1,1,,,", f",1,{text},,,"), encoding="utf-8")
    with pytest.raises(BadInputError, match=r"probes\.csv is not a table.*value is"):
        read_probed(tmp_path)


def test_a_row_of_many_cells_is_refused_at_once(tmp_path):
    """What guesses columns took twelve seconds and 340 MiB for them."""
    file = write_probed(over_runs("full", [results(1.0)]), tmp_path)
    columns, row = file.read_text().splitlines()
    for lines in (
        [columns, row + "," * 50_000],
        ["0," * 50_000 + columns, row],
        [columns, '"' + row],
        [columns, "a"],
    ):
        file.write_text("\n".join(lines))
        with pytest.raises(BadInputError, match=r"probes\.csv is not a table"):
            read_probed(tmp_path)


def test_texts_stay_what_they_are(tmp_path):
    (row,) = over_runs("full", [results(1.0)])
    odd = dataclasses.replace(row, component="NA", position='a "quoted", one\nof two lines', unit="1")
    write_probed([odd], tmp_path)
    (back,) = read_probed(tmp_path)
    assert (back.component, back.position, back.unit) == (odd.component, odd.position, odd.unit)
