"""Names of strangers in all that is printed and written: shown, never obeyed; nothing is written outside the folder."""

import csv
import io
import json
import xml.etree.ElementTree as ET

import pytest

from hopeprobe.printable import MOST, message, no_formula, printable, printable_json
from hopeprobe.report.export import file_name
from hopeprobe.results import NullRow, ResultRow, Results

HOSTILE = (
    "\x1b[2J\x1b[32mlearned", "a\n::error::owned\r\n::set-env name=PATH::/evil", "\u202egnp.exe", "=cmd|' /C calc'!A0",
    "[bold red]markup[/bold red]", "<img src=x onerror=document.title='owned'>", "../../escaped", "/tmp/escaped",
    "$\\frac{1$ & 100% #_^~", "\u009b31mC1", "x" * 3000,
)  # fmt: skip


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """Results of checkpoints and probes of such names, in a folder of their own inside another."""
    inside = tmp_path / "outer" / "inner"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    rows = [
        ResultRow(
            probe=("cms-similarity", name)[i % 2], statistic="output_cosine", checkpoint=name, step=i, layer=i % 3,
            component=name, value=0.25, unit="1", ci_low=0.2, ci_high=0.3, n_tokens=9, n_groups=64, dtype="float32",
            verdict="learned", note=name,
        )
        for i, name in enumerate(HOSTILE)
    ]  # fmt: skip
    nulls = [
        NullRow(probe=r.probe, statistic=r.statistic, checkpoint=r.checkpoint, step=r.step, layer=r.layer,
                component=r.component, null_kind="own-init", value=0.5, n=9)
        for r in rows
    ]  # fmt: skip
    described = {"checkpoints": [{"name": name, "missing": [name]} for name in HOSTILE]}
    Results(rows, nulls, checkpoint=described, data={"name": HOSTILE[5]}).write_json("results.json")
    return inside


def tame(text):
    """No sign that a terminal or a CI runner obeys."""
    assert not [line for line in text.splitlines() if line.lstrip().startswith("::")]
    return not set(text) & {"\x1b", "\u009b", "\u202e", "\r"}


@pytest.mark.slow  # every figure of eleven checkpoints
@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_report_of_them(call, hostile):
    done = call("report", "results.json", "-o", "report.html", "--files", "files")
    assert done.code == 3, "what is missing is told"
    assert tame(done.out)
    assert tame(done.err)
    page = (hostile / "report.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror" in page
    outside = [
        path for path in hostile.parents[1].rglob("*") if path.is_file() and hostile not in path.parents
    ]
    assert not outside
    written = [path.relative_to(hostile).parts for path in hostile.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert all(len(parts) == (2 if parts[0] == "files" else 1) for parts in written)
    for name in ("results.csv", "results.nulls.csv"):
        rows = list(csv.reader(io.StringIO((hostile / "files" / name).read_text())))
        assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "@"))]
        assert any("'=cmd" in cell for row in rows for cell in row)
    for path in (hostile / "files").glob("*.tex"):
        assert tame(path.read_text())


def test_tables_and_errors_in_a_terminal(call, hostile, monkeypatch):
    from hopeprobe.cli import tables, terminal

    screen = terminal.Console(force_terminal=True, color_system=None, width=300, file=io.StringIO())
    for table in tables.result_tables(Results.read_json("results.json")):
        screen.print(table)
    text = screen.file.getvalue()
    assert tame(text)
    assert "\\x1b[2J" in text
    assert "[bold red]markup[/bold red]" in text, "markup is text"
    document = json.loads((hostile / "results.json").read_text())
    document["results"][0][HOSTILE[0]] = 1
    (hostile / "bad.json").write_text(json.dumps(document))
    done = call("report", "bad.json", "-o", "report.html")
    assert done.code == 2
    assert tame(done.err)
    assert done.err.count("\n") == 1


def test_a_grid_whose_size_is_a_path(call, tmp_path, monkeypatch):
    from pathlib import Path

    record = json.loads((Path(__file__).parents[2] / "examples/study/nano/ablation.json").read_text())
    for name, preset in (("a", "../../escaped"), ("b", "/tmp/hopeprobe-escaped")):
        (tmp_path / "in" / name).mkdir(parents=True)
        size = {"dim": 32 if name == "a" else 64}
        changed = json.loads(json.dumps(record | {"preset": preset, "model": record["model"] | size}))
        for cell in changed["cells"]:
            cell["parameters"] *= 1 + (name == "b")
        (tmp_path / "in" / name / "ablation.json").write_text(json.dumps(changed))
    out = tmp_path / "x" / "y" / "out"
    done = call("compare", tmp_path / "in/a", tmp_path / "in/b", "--out", out)
    assert done.code == 0, done.err
    assert not Path("/tmp/hopeprobe-escaped").exists()
    assert {path.parent for path in tmp_path.rglob("table.csv")} == {
        out / "escaped",
        out / "tmp-hopeprobe-escaped",
    }


def test_a_check_for_machines(tmp_path):
    from hopeprobe.regression.reports import _command, _plain

    for name in HOSTILE:
        line = _command("error", name, name)
        assert len(line.splitlines()) == 1
        root = ET.Element("testcase", {"name": _plain(name)})
        assert ET.fromstring(ET.tostring(root)).get("name") is not None


def test_signs_are_written_out():
    assert printable("a\tb\nc\x1b\u202e\ud800\U0001f600é") == "a\\tb\\nc\\x1b\\u202e\\ud800\U0001f600é"
    assert printable("a\nb\x07", lines=True) == "a\nb\\x07"
    assert len(message("y" * 10**6)) <= MOST + 3
    assert json.loads(printable_json(json.dumps(HOSTILE, ensure_ascii=False))) == list(HOSTILE)
    assert "\u009b" not in printable_json(json.dumps(HOSTILE, ensure_ascii=False))
    assert [no_formula(one) for one in ("=1", " +1", "-x", "@x", "a=b", 3.0, None)] == [
        "'=1", "' +1", "'-x", "'@x", "a=b", 3.0, None
    ]  # fmt: skip


def test_names_of_files():
    names = [file_name(name) for name in HOSTILE]
    assert all(
        name and "/" not in name and not name.startswith(".") and len(name.encode()) <= 150 for name in names
    )
