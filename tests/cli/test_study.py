"""`ablate`, `sweep`, `compare`: from a command to tables and figures, again without repeating, and what is refused.

What needs a whole grid is slow: four cells with GPT-2's vocabulary take a quarter of a minute.
"""

import dataclasses
import json
import shutil

import pandas as pd
import pytest

from hopeprobe.model.cell import run_cell
from hopeprobe.model.config import PRESETS
from hopeprobe.study import read_grid


@pytest.fixture(scope="module", autouse=True)
def small_and_here():
    """The smallest preset is smaller still, and cells run in this process."""
    from hopeprobe.model import grid

    small = dataclasses.replace(PRESETS["nano"], dim=16, context=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "nano", small)
        patch.setattr(
            grid._Grid, "_run", lambda self, spec: self._done(spec, run_cell(spec, self.data)) is None
        )
        yield


OPTIONS = ("--preset", "nano", "--steps", 3, "--batch", 2, "--tokens", 600, "--checkpoint-every", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory, text):
    """A grid of four cells, two of them one computation."""
    from hopeprobe.cli import run

    out = tmp_path_factory.mktemp("grid")
    options = map(str, (*OPTIONS, "--data", text, "--seeds", 2, "--variants", "no-surprise,transformer"))
    assert run(["ablate", "--out", str(out), *options]) == 0
    return out


def again(call, command, made, text, *more):
    return call(command, "--out", made, "--data", text, *OPTIONS, *more)


@pytest.mark.slow
def test_a_grid_leaves_its_record_tables_and_figures(made):
    names = {path.name for path in made.iterdir() if path.is_file()}
    assert names == {
        "ablation.json", "cells.csv", "table.csv", "tables.md", "claims.md", "figure-4.png", "figure-5.png",
    }  # fmt: skip
    grid = read_grid(made)
    assert grid.names == ["full", "no-surprise", "transformer"]  # full is always there, to compare with
    assert grid.seeds == [0, 1]
    assert {cell.same_as for cell in grid.of("no-surprise").values()} == {"full"}
    assert len({cell.first_batch for cell in grid.cells if cell.seed == 0}) == 1
    assert "path" not in json.dumps(grid.to_dict()["data"])
    table = pd.read_csv(made / "table.csv").set_index("name")
    lives = [cell.live for cell in grid.of("full").values()]
    assert abs(table.loc["full", "live_mean"] - sum(lives) / 2) < 1e-4


@pytest.mark.slow
def test_what_is_done_is_shown_and_not_repeated(call, made, text):
    before = {path: path.stat().st_mtime_ns for path in made.glob("*/*/*")}
    done = again(call, "ablate", made, text, "--seeds", 2, "--variants", "no-surprise,transformer")
    assert done.code == 0, done.err
    assert {path: path.stat().st_mtime_ns for path in made.glob("*/*/*")} == before
    for said in (
        "Not the published setting",
        "over 2 seeds, not over texts",
        "= full",
        "resolves",
        "its claim",
    ):
        assert said in done.out


@pytest.mark.slow
def test_a_sweep_joins_the_grid_it_is_given(call, made, text, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(made, out)
    done = again(call, "sweep", out, text, "--seeds", 2, "--threshold", 0.05, "--threshold", 10.83)
    assert done.code == 0, done.err
    assert "surprise thresholds" in done.out
    grid = read_grid(out)
    assert grid.names == ["full", "full-tau-0.05", "full-tau-10.83", "no-surprise", "transformer"]
    assert {cell.same_as for cell in grid.of("full-tau-0.05").values()} == {"full"}
    assert all(cell.gate_rate < 1 for cell in grid.of("full-tau-10.83").values())


@pytest.mark.slow
def test_a_longer_grid_leaves_the_shorter_cells_out(call, made, text, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(made, out)
    options = ("--preset", "nano", "--steps", 4, "--batch", 2, "--tokens", 600, "--checkpoint-every", 2)
    done = call("ablate", "--out", out, "--data", text, *options, "--seeds", 1, "--variants", "full")
    assert done.code == 0, done.err
    assert [(c.name, c.seed, c.steps) for c in read_grid(out).cells] == [("full", 0, 4)]


@pytest.mark.slow
def test_comparing_redraws_what_the_run_drew(call, made, tmp_path):
    done = call("compare", made, "--out", tmp_path)
    assert done.code == 0, done.err
    for name in ("cells.csv", "table.csv", "tables.md", "claims.md", "figure-4.png", "figure-5.png"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes(), name


@pytest.mark.slow
def test_sizes_are_set_beside_each_other(call, made, tmp_path):
    larger = json.loads((made / "ablation.json").read_text())
    larger["preset"] = "tiny"
    for cell in larger["cells"]:
        cell["parameters"] *= 2
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "ablation.json").write_text(json.dumps(larger))
    done = call("compare", tmp_path / "tiny", made, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "nano → tiny" in done.out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "nano", "tiny", "scaling.csv", "scaling.md", "claims.md", "figure-4.png", "figure-5.png",
    }  # fmt: skip


@pytest.mark.slow
def test_probes_over_the_checkpoints_of_a_grid(call, made, text, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(made, out)
    probes = ("--probes", "cms-dynamics", "--probe-tokens", 600)
    done = again(call, "ablate", out, text, "--seeds", 2, "--variants", "full", *probes)
    assert done.code == 0, done.err
    rows = pd.read_csv(out / "probes.csv")
    assert set(rows.name) == {"full"}
    assert set(rows.step) == {2, 3}  # what a run can resume from
    assert (rows.loc[rows.statistic == "weight_norm", "seeds"] == 2).all()
    assert (out / "figure-1.png").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/*/probes/*.json")}
    assert len(kept) == 4
    done = again(call, "ablate", out, text, "--seeds", 2, "--variants", "full", *probes, "--probe-steps", "3")
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*/probes/*.json")} == kept
    assert set(pd.read_csv(out / "probes.csv").step) == {2, 3}
    monkeypatch.setattr("hopeprobe.cli.probing.code_digest", lambda parts: "other code")
    done = again(call, "ablate", out, text, "--seeds", 2, "--variants", "full", *probes, "--probe-steps", "3")
    assert (
        sum(path.stat().st_mtime_ns != kept[path] for path in kept) == 2
    )  # both seeds, at the step asked for
    assert set(pd.read_csv(out / "probes.csv").step) == {3}
    done = again(call, "ablate", out, text, "--seeds", 1, "--variants", "full", *probes, "--probe-steps", "7")
    assert done.code == 3
    assert "full, seed 0: there is no checkpoint of step 7" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ablate", "--variants", "no-cmss"), "there is no variant 'no-cmss'; did you mean 'no-cms'"),
        (("ablate", "--variants", ","), "no variant was named"),
        (("ablate", "--preset", "tinny"), "'tinny', must be one of"),
        (("ablate", "--probes", "cms-simlarity"), "cms-similarity"),
        (("ablate", "--probes", "surprise", "--probe-steps", "ten"), "--probe-steps is 'ten'"),
        (("sweep", "--threshold", "-1"), "the threshold is -1; surprise is a loss"),
        (("sweep", "--threshold", "inf"), "the threshold is inf"),
        (("ablate", "--learning-rate", "inf"), "learning_rate is inf, must be above zero and finite"),
        (("ablate", "--data", "nowhere.jsonl"), "there is no file 'nowhere.jsonl'"),
        (("ablate", "--learning-rate", "-1"), "learning_rate is -1.0, must be above zero and finite"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(call, tmp_path, arguments, said):
    done = call(*arguments, "--out", tmp_path / "out")
    assert done.code == 2
    assert said in done.err
    assert len(done.err.strip().splitlines()) <= 3
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_grid_is_named(call, tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    for target, said in [
        (
            tmp_path,
            f"{tmp_path / 'ablation.json'} does not exist: `hopeprobe ablate --out {tmp_path}` writes it",
        ),
        (
            tmp_path / "no",
            f"{tmp_path / 'no/ablation.json'} does not exist: `hopeprobe ablate --out {tmp_path / 'no'}`",
        ),
        (
            tmp_path / "ablation.json",
            f"ablation.json does not exist: `hopeprobe ablate --out {tmp_path}` writes it",
        ),
        (tmp_path / "notes.txt", f"{tmp_path / 'notes.txt'} is not the record of a grid"),
    ]:
        done = call("compare", target)
        assert (done.code, done.out) == (2, "")
        assert said in done.err


def test_a_run_that_diverges_is_named_and_ends_with_4(call, text, tmp_path):
    options = ("--preset", "nano", "--steps", 6, "--batch", 2, "--tokens", 600, "--checkpoint-every", 2)
    done = call(
        "ablate", "--out", tmp_path, "--data", text, *options, "--seeds", 1, "--variants", "full",
        "--learning-rate", 1e30,
    )  # fmt: skip
    assert done.code == 4
    assert "diverged: full, seed 0: training stopped at step" in done.err
    assert str(tmp_path) not in (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "0 (+1 diverged)" in done.out


def test_more_tokens_than_there_are_is_told_before_training(call, text, tmp_path):
    for more in (("--tokens", 10**9), ("--probes", "surprise", "--probe-tokens", 10**9)):
        done = again(call, "ablate", tmp_path / "out", text, "--variants", "full", *more)
        assert done.code == 2
        assert "tokens to predict, fewer than the 1000000000 asked for" in done.err
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_another_grid_s_folder_is_refused_and_left_as_it_is(call, made, text):
    before = {path: path.read_bytes() for path in made.rglob("*.*") if path.is_file()}
    done = again(call, "ablate", made, text, "--variants", "titans", "--learning-rate", 1e-4)
    assert done.code == 2
    assert "is of a grid set otherwise (train differ): choose another --out" in done.err
    assert {path: path.read_bytes() for path in made.rglob("*.*") if path.is_file()} == before


@pytest.mark.slow
def test_no_path_of_the_machine_is_in_what_may_be_published(made):
    for path in made.iterdir():
        if path.suffix in (".json", ".csv", ".md"):
            assert str(made) not in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_record_is_as_good_as_its_folder(call, made):
    assert call("compare", made / "ablation.json").code == 0
