"""The notebooks run from top to bottom beside their records, without a library's words, and show what they showed."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
RECORDS = ("study", "reconstruction-results.json")  # what notebooks read of the folder that theirs lies in
UNTRAINED = ("package, never trained", "ours, never loaded")
TRAINED = ("tiny, 3 seeds", "nano, trained here")


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


def said(cell):
    """What a code cell printed or displayed, as text."""
    return "\n".join(out.get("text") or out.data.get("text/plain", "") for out in cell.get("outputs", []))


def numbers_without_a_source(notebook):
    """Numbers of the prose that neither an output nor the code of their section has."""
    missing, prose, known = [], "", ""
    for cell in [*notebook.cells, nbformat.v4.new_markdown_cell("## end")]:
        if cell.cell_type == "code":
            known += f"\n{cell.source}\n{said(cell)}"
            continue
        if cell.source.startswith("## "):
            missing += sorted(numbers(prose) - numbers(known))
            prose = known = ""
        prose += "\n" + cell.source
    return missing


def numbers(text):
    """Without signs and thousands commas; sections, figures, tables, code and addresses have none."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`|\]\([^)]*\)|^#.*$|\(Kim 2025\)", "", text, flags=re.MULTILINE)
    text = re.sub(r"\b(?:Figure|Tables?|[Ss]ections?) \d\S*(?: and \d)?|\b4\.[1-5]\b", "", text)
    return set(re.findall(r"\d+(?:\.\d+)?", text.replace(",", "")))


def lines_of(notebook):
    """Lines of the tables that stand beside the study's figures: by quantity and model, a text a column."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type != "code" or not cell.source.startswith("inside("):
            continue
        head, _, *rows = (
            [part.strip() for part in line[1:-1].split(" | ")] for line in said(cell).splitlines()
        )
        quantity = ""
        for row in rows:
            one = dict(zip(head, row, strict=True))
            quantity = one["quantity"] or quantity
            found[quantity, one["of"]] = one
    return found


def verdicts(line):
    """How often a line says what."""
    return {word: int(n) for word, n in re.findall(r"([a-z/-]+) (\d+)", line["verdict"])}


def first(line):
    """The number that a line gives."""
    return float(re.match(r"-?[\d.]+(?:e-?\d+)?", line["here"]).group())


def check_the_study(notebook):
    """What the text says of the tables: verdicts, and figures that come out without training and not with it."""
    lines = lines_of(notebook)
    quantities = list(dict.fromkeys(quantity for quantity, _ in lines))
    assert len(quantities) == 19
    assert {of for _, of in lines} == {*UNTRAINED, *TRAINED}
    for quantity in quantities:
        for of in UNTRAINED:
            assert verdicts(lines[quantity, of]).keys() <= {"untrained", "at-init", "collapsed"}, (
                quantity,
                of,
            )
            assert lines[quantity, of]["fresh-init"] != "–", (quantity, of)
    loss, distance = quantities[:2]
    for of in UNTRAINED:
        assert first(lines[loss, of]) == pytest.approx(67, abs=4)
        assert first(lines[distance, of]) == pytest.approx(2**0.5, abs=0.001)
        assert verdicts(lines[loss, of]) == verdicts(lines[distance, of]) == {"untrained": 1}
        for quantity, printed, near in (
            ("CMS level L2 norm", 26.15, 0.05),
            ('CMS "inter-checkpoint drift"', 29.25, 0.1),
            ("cosine of fast and slow outputs", 0.77, 0.03),
            ("cosine of what the levels add", 0.0, 0.12),
            ("drift of large projections", 13.06, 0.1),
            ("drift of small components: a row", 0.82, 0.05),
            ("‖θ_fast − θ_meta‖ / ‖θ_meta‖", 1.0, 0.001),
            ("‖θ_fast‖ / ‖θ_meta‖", 0.0, 0.001),
        ):
            assert first(lines[quantity, of]) == pytest.approx(printed, abs=near), (quantity, of)
        assert verdicts(lines["‖θ_fast − θ_meta‖ / ‖θ_meta‖", of]).keys() == {"collapsed"}
    assert verdicts(lines[loss, "nano, trained here"]) == {"learned": 1}
    for of in TRAINED:
        for quantity in (
            "cosine of fast and slow outputs",
            "cosine of what the levels add",
            "per-token loss, mean",
        ):
            assert verdicts(lines[quantity, of]).keys() == {"learned"}, (quantity, of)
        assert first(lines["‖θ_fast − θ_meta‖ / ‖θ_meta‖", of]) < 0.2
        assert first(lines["gate open at τ = 10", of]) < 50
    total = next(said(cell) for cell in notebook.cells if "value_counts()" in cell.source)
    learned = next(line.split()[1:] for line in total.splitlines() if line.startswith("learned"))
    assert [int(n) > 0 for n in learned] == [False, False, True]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"quickstart", "intervene", "own_probe", "study"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_was_run(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in kind or "text/html" in kind for kind in kinds(notebook))


@pytest.fixture
def the_study():
    return nbformat.read(EXAMPLES / "notebooks" / "study.ipynb", as_version=4)


def test_the_study_s_text_is_that_of_its_outputs(the_study):
    assert numbers_without_a_source(the_study) == []
    check_the_study(the_study)


def test_a_number_that_no_output_has_is_found(the_study):
    cell = next(cell for cell in the_study.cells if "a cosine of 0.77" in cell.source)
    cell.source = cell.source.replace("0.77", "0.83")
    assert numbers_without_a_source(the_study) == ["0.83"]


@pytest.mark.parametrize(
    ("section", "old", "new"),
    [
        ('inside(sources, "4.2")', "untrained 12", "learned 12"),
        ('inside(sources, "4.3")', "collapsed 30", "at-init 30"),
        ('inside(sources, "4.4")', "23.74 %", "93.74 %"),
        ('inside(sources, "3")', "learned 1", "inconclusive 1"),
        ('inside(sources, "4.2")', "26.15 (", "14.86 ("),
    ],
)
def test_a_table_that_says_otherwise_is_found(the_study, section, old, new):
    cell = next(cell for cell in the_study.cells if cell.source == section)
    for output in cell.outputs:
        text = output.data["text/plain"]
        assert old in text
        output.data["text/plain"] = text.replace(old, new, 1)
    with pytest.raises(AssertionError):
        check_the_study(the_study)


@pytest.mark.slow  # it starts a kernel and trains
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOPEPROBE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "examples" / "notebooks"
    folder.mkdir(parents=True)
    for name in RECORDS:
        record = EXAMPLES / name
        (shutil.copytree if record.is_dir() else shutil.copy)(record, folder.parent / name)
    committed, again = (nbformat.read(path, as_version=4) for _ in range(2))
    options = {"metadata": {"path": str(folder)}}
    NotebookClient(again, timeout=500, kernel_name="python3", resources=options).execute()
    assert kinds(again) == kinds(committed)
    if path.stem == "study":
        assert numbers_without_a_source(again) == []
        check_the_study(again)
