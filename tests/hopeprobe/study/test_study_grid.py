"""The record of a grid: there and back, what it refuses, how it differs from the study's setting."""

import json
import math

import pytest
from study_toys import DATA, EVALUATION, MODEL, TRAIN, cell, grid

from hopeprobe.errors import BadInputError
from hopeprobe.study import differences_to_study, read_grid


def test_there_and_back(made, tmp_path):
    broken = cell("titans", 0, math.nan, status="diverged", frozen=math.nan, gate_rate=math.nan)
    whole = grid([*made.cells, broken])
    whole.write(tmp_path)
    assert read_grid(tmp_path).to_dict() == whole.to_dict()
    assert read_grid(tmp_path / "ablation.json").names == [*made.names, "titans"]
    assert math.isnan(read_grid(tmp_path).of("titans")[0].live)


def test_cells_that_saw_other_data_are_no_grid():
    with pytest.raises(BadInputError, match="seed 0: no-cms began with other tokens than full"):
        grid([cell("full", 0, 7.0), cell("no-cms", 0, 7.1, first_batch="another")])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not the record of a grid"),
        ("[]", "schema_version"),
        ('{"schema_version": 99}', "version 1"),
        ('{"schema_version": 1}', "does not have what the record of a grid has"),
        ('{"schema_version": 1, "cells": 3}', "does not have what the record of a grid has"),
        (
            '{"schema_version": 1, "cells": [{"nam": "full"}]}',
            "unknown key 'nam' in Cell; did you mean 'name'",
        ),
    ],
)
def test_another_file_is_refused_by_name(content, said, tmp_path):
    (tmp_path / "ablation.json").write_text(content)
    with pytest.raises(BadInputError, match=r"ablation\.json") as error:
        read_grid(tmp_path)
    assert said in str(error.value)


def test_a_cut_off_record_is_refused(made, tmp_path):
    path = made.write(tmp_path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(BadInputError, match=r"ablation\.json is not the record of a grid"):
        read_grid(tmp_path)


def test_a_folder_without_one_says_how_to_get_it(tmp_path):
    with pytest.raises(BadInputError, match="hopeprobe ablate"):
        read_grid(tmp_path)


def test_every_difference_to_the_study_is_named(made):
    assert differences_to_study(made) == [
        "width 64 (256)", "layers 2 (6)", "context 128 (512)", "steps 200 (2,000)", "learning rate 0.003 (0.0003)",
        "data sample.jsonl (openwebtext)",
    ]  # fmt: skip


def test_only_its_own_sizes_steps_and_data_are_the_published_setting(made):
    def differences(model=None, train=None, data=None, evaluation=None):
        return differences_to_study(
            grid(
                made.cells,
                {**MODEL, "dim": 256, "layers": 6, "context": 512} | (model or {}),
                {**TRAIN, "steps": 2000, "learning_rate": 3e-4} | (train or {}),
                preset="small",
                data={**DATA, "name": "openwebtext"} | (data or {}),
                evaluation={**EVALUATION} | (evaluation or {}),
            )
        )

    assert differences() == []
    assert differences({"dim": 512, "layers": 8}) == []
    assert differences({"dim": 512}) == ["layers 6 (8)"]
    assert differences(train={"steps": 1999}) == ["steps 1,999 (2,000)"]
    assert differences(data={"name": "openwebtext-sample.jsonl"}) == [
        "data openwebtext-sample.jsonl (openwebtext)"
    ]
    assert differences(evaluation={"epochs": 4.9}) == ["4.9 epochs (less than one)"]
    assert json.dumps(made.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["cells"].clear(), "there is no cell in it"),
        (lambda r: r["cells"].append(r["cells"][0]), "full, seed 0 is there twice"),
        (lambda r: r["cells"][0].update(live=None), "full, seed 0 is done and has no loss"),
        (lambda r: r["cells"][0].update(frozen="7"), "full, seed 0 is done and has no loss"),
        (lambda r: r["cells"][0].update(live=math.nan), "NaN is no number that JSON knows"),
        (lambda r: r["cells"][0].update(seed="0"), "not the name, numbers and status of a cell"),
        (lambda r: r["cells"][0].update(status="finished"), "not the name, numbers and status of a cell"),
        (lambda r: r["cells"][0].update(parameters=None), "not the name, numbers and status of a cell"),
        (lambda r: r["cells"][0].update(curve=None), "full, seed 0 has no curve of numbers"),
        (lambda r: r["cells"][0]["curve"].update(loss=[None]), "full, seed 0 has no curve of numbers"),
        (lambda r: r["cells"][0]["curve"].update(loss=[1.0]), "full, seed 0 has a curve of unequal lengths"),
        (lambda r: r.update(model=None), "model has None for 'dim'"),
        (lambda r: r["train"].pop("steps"), "train has None for 'steps'"),
        (lambda r: r["evaluation"].pop("epochs"), "evaluation has None for 'epochs'"),
        (lambda r: r["data"].update(name=3), "data has 3 for 'name'"),
        (lambda r: r.update(preset=None), "preset is None"),
        (lambda r: r["cells"][0].update(first_batch=""), "began with other tokens"),
    ],
)
def test_a_record_that_was_edited_is_refused_where_it_is_wrong(made, change, said, tmp_path):
    record = json.loads(json.dumps(made.to_dict()))
    change(record)
    (tmp_path / "ablation.json").write_text(json.dumps(record))
    with pytest.raises(BadInputError) as error:
        read_grid(tmp_path)
    assert said in str(error.value)
    assert "ablation.json" in str(error.value)
