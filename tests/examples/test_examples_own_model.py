"""The example of a model of one's own: trained and measured as its file says; its map shows what it does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model"


@pytest.mark.slow
def test_as_its_first_lines_say(tmp_path):
    for file in EXAMPLE.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    docstring = (tmp_path / "delta_memory.py").read_text(encoding="utf-8").split('"""')[1]
    train, analyze = (f"`{line.replace(chr(10), ' ')}`"[1:-1] for line in docstring.split("`")[1::2])
    assert train == "python delta_memory.py"
    trained = subprocess.run(
        [sys.executable, *train.split()[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert trained.returncode == 0, trained.stderr
    assert analyze.startswith("hopeprobe analyze step-60.pt --map map.toml")
    main = "import sys; from hopeprobe.cli import main; main(sys.argv[1:])"
    words = [*analyze.split()[1:], "--tokens", "4096", "--format", "json", "--output", "results.json"]
    done = subprocess.run([sys.executable, "-c", main, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    drift = [row for row in rows if row["statistic"] == "relative_drift"]
    assert {row["position"] for row in drift} == {"16", "32", "48", "64"}
    assert {row["layer"] for row in drift} == {0, 1}
    assert all(row["value"] > 0 for row in drift)
    (change,) = [r for r in rows if r["statistic"] == "loss_change" and r["component"] == "memory"]
    assert change["condition"] == "live - frozen"
    assert change["ci_low"] < change["value"] < change["ci_high"]
