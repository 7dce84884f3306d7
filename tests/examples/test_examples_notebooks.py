"""The notebooks run from top to bottom in an empty folder, without a word of a library's, and show what they showed."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


def kinds(notebook):
    """What each code cell put out: text, tables, figures; a bar that has gone is nothing."""
    found = []
    for cell in notebook.cells:
        seen = set()
        for output in cell.get("outputs", []):
            assert output.output_type != "error", "\n".join(output.traceback)
            assert output.get("name") != "stderr", output.text
            seen |= {kind for kind, data in output.get("data", {}).items() if data} | {output.get("name", "")}
        found.append(seen - {""})
    return found


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"quickstart", "intervene", "own_probe"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_was_run(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in kind or "text/html" in kind for kind in kinds(notebook))


@pytest.mark.slow  # it starts a kernel and trains
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOPEPROBE_CACHE", str(tmp_path / "cache"))
    committed, again = (nbformat.read(path, as_version=4) for _ in range(2))
    options = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(again, timeout=500, kernel_name="python3", resources=options).execute()
    assert kinds(again) == kinds(committed)
