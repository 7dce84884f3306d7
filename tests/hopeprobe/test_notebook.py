"""What a notebook shows of results: verdicts first, every row once, nothing that text could break out of."""

import math
from html.parser import HTMLParser

import pytest

from hopeprobe.cells import interval, lines, notes, number
from hopeprobe.notebook import html_table, progress_of
from hopeprobe.results import NullRow, ResultRow, Results
from hopeprobe.stats import Verdict

VOID = {"img", "br"}


class Page(HTMLParser):
    """Tags are closed in the order in which they were opened; texts by the tag that they stand in."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)

    def words(self):
        return [text for _, text in self.texts]


def row(**changes):
    fields = {"probe": "demo", "statistic": "size", "checkpoint": "a.pt", "layer": 0, "component": "fast"}
    measured = {"value": 0.25, "ci_low": 0.2, "ci_high": 0.3, "unit": "1", "n_tokens": 9, "n_groups": 64}
    return ResultRow(**{**fields, **measured, "dtype": "float32", "verdict": Verdict.LEARNED, **changes})


def null(of, kind="own-init", value=0.9, **changes):
    names = ("probe", "statistic", "checkpoint", "step", "layer", "component", "condition", "position")
    return NullRow(**dict(zip(names, of.key, strict=True)), null_kind=kind, value=value, **changes)


def test_verdicts_come_first_then_what_is_missing_then_every_row_with_its_nulls():
    rows = [row(), row(layer=1, verdict=Verdict.DIVERGED, value=math.nan, ci_low=math.nan, ci_high=math.nan)]
    nulls = [
        null(rows[0]),
        null(rows[0], "fresh-init", 0.5, low=0.4, high=0.6),
        null(rows[0], "shuffled", 0.01),
    ]
    results = Results(rows, nulls, checkpoint={"missing": ["a.pt: surprise: the model diverged"]})
    page = Page(results._repr_html_())
    words = page.words()
    assert page.count("table") == 2
    assert page.count("tr") == (1 + 1) + (1 + 2)
    order = [
        words.index(w)
        for w in ("learned", "1", "a.pt: surprise: the model diverged", "demo · a.pt, 2 rows", "0.25")
    ]
    assert order == sorted(order)
    assert {"[0.2, 0.3]", "0.9", "0.4 … 0.6", "shuffled 0.01", "diverged"} <= set(words)


def test_every_text_is_escaped_and_nothing_is_loaded():
    bad = "<script>alert('x')</script>&\""
    made = row(
        probe=bad,
        statistic=bad,
        checkpoint=bad,
        component=bad,
        position=bad,
        condition=bad,
        unit=bad,
        note=bad,
    )
    results = Results([made], [null(made, bad)], checkpoint={"missing": [bad]})
    text = results._repr_html_()
    page = Page(text)
    assert not {"script", "link", "style", "iframe"} & {tag for tag, _ in page.tags}
    assert "<script" not in text
    assert all(set(attributes) <= {"style", "class", "open"} for _, attributes in page.tags)
    assert sum(bad in word for word in page.words()) >= 7


def test_long_tables_are_folded_and_several_checkpoints_named():
    rows = [row(layer=i, checkpoint=c) for c, n in (("a.pt", 41), ("b.pt", 3)) for i in range(n)]
    page = Page(Results(rows)._repr_html_())
    folds = [attributes for tag, attributes in page.tags if tag == "details"]
    assert ["open" in attributes for attributes in folds] == [False, True]
    assert "checkpoint" in page.words()
    assert "checkpoint" not in Page(Results(rows[:3])._repr_html_()).words()


def test_no_results_say_so():
    assert "no results" in Page(Results()._repr_html_()).words()


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "–"), (math.nan, "–"), (0.0, "0"), (1234.5678, "1235"), (1e-9, "1e-09")]
)
def test_numbers_have_four_digits(value, expected):
    assert number(value) == expected


def test_cells_name_units_conditions_and_positions_where_they_tell_rows_apart():
    rows = [
        row(statistic="loss", unit="nats", condition="live"),
        row(statistic="loss", unit="nats", condition="frozen"),
        row(statistic="size", condition="live", position="8", layer=None),
        row(statistic="size", condition="live - frozen", component="both", layer=None),
    ]
    cells = list(lines(rows, {}))
    assert [line[2] for line in cells] == ["fast live", "fast frozen", "fast 8", "both"]
    assert [line[3] for line in cells] == ["0.25 nats", "0.25 nats", "0.25", "0.25"]
    assert [line[1] for line in cells] == ["0", "0", "–", "–"]
    assert cells[0][5:8] == ("–", "–", "–")
    assert interval(row()) == "[0.2, 0.3]"
    assert interval(row(verdict=Verdict.INCONCLUSIVE, ci_low=math.nan, ci_high=math.nan)) == "–"
    assert interval(row(ci_low=0.25, ci_high=0.25)) == "[0.25, 0.25]", "no spread on these tokens"
    assert interval(row(ci_low=0.25, ci_high=0.25, n_tokens=0, n_groups=0)) == "exact"


def test_notes_are_said_once_and_counted():
    said = notes(
        [row(layer=i, note=f"fresh-init on the first 700 tokens, where this is {i}; x") for i in range(3)]
    )
    assert said == ["fresh-init on the first 700 tokens", "x"]
    assert notes([row(note="x"), row(note="x"), row(note="y")]) == ["x (2 rows)", "y"]
    many = notes([row(note=f"note {i}") for i in range(9)])
    assert many == [*(f"note {i}" for i in range(6)), "and 3 more notes"]
    assert notes([row()]) == []


class Kernel:
    """As far as a notebook's shell is asked for: it has a kernel."""

    kernel = object()


@pytest.fixture
def displayed(monkeypatch):
    """What a notebook would be sent: the first display, then its updates."""
    import IPython
    import IPython.display

    sent = []

    class Handle:
        def update(self, data, raw):
            sent.append(data)

    def display(data, raw, display_id):
        assert raw
        assert display_id
        sent.append(data)
        return Handle()

    monkeypatch.setattr(IPython, "get_ipython", Kernel)
    monkeypatch.setattr(IPython.display, "display", display)
    return sent


def test_a_notebook_shows_a_bar_that_goes_when_all_is_done(displayed, monkeypatch):
    monkeypatch.setattr("hopeprobe.notebook._SECONDS", 0.0)
    with progress_of(None) as told:
        told("a <b>", 1, 4)
        told("a <b>", 4, 4)
        told("tokens", 7, 0)
    assert displayed[0]["text/html"] == '<div><progress value="1" max="4"></progress> a &lt;b&gt; 1/4</div>'
    assert displayed[2]["text/html"] == "<div><progress ></progress> tokens 7</div>"
    assert displayed[-1] == {"text/plain": ""}


def test_a_bar_is_not_drawn_more_often_than_eyes_see(displayed):
    with progress_of(None) as told:
        for done in range(1000):
            told("batches", done, 1000)
        told("batches", 1000, 1000)
    assert 3 <= len(displayed) < 50, "the first, the last, the end, and one now and then"


def test_elsewhere_nothing_is_drawn(displayed, monkeypatch):
    import IPython

    def mine(*_):
        pass

    with progress_of(mine) as told:
        assert told is mine, "what was given is what is told"
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)
    with progress_of(None) as told:
        assert told is None
    assert displayed == []


def test_an_analysis_in_a_notebook_has_a_bar(displayed, toy_run, settings):
    from hopeprobe.analysis import analyze

    analyze(toy_run / "step-000040.pt", "surprise", **settings)
    assert any("step-000040.pt" in one.get("text/html", "") for one in displayed)
    assert displayed[-1] == {"text/plain": ""}


def test_tables_of_texts_align_numbers_and_colour_verdicts_and_answers():
    head = ("name", "Δ", "verdict", "answer")
    rows = [
        ("4.1, a", "+0.1 [0, 1]", "untrained 7, at-init 2", "does not hold"),
        ("1 b", "", "n/a", "<i>"),
        ("2", "–", "untrained 7, or so", "learned by heart"),
    ]
    text = html_table(head, rows)
    page = Page(text)
    cells = [attributes["style"] for tag, attributes in page.tags if tag in ("th", "td")]
    sides = [style.rpartition(":")[2] for style in cells]
    assert sides == ["left", "right", "left", "left"] * 4
    coloured = [said for tag, said in page.texts if tag == "span"]
    assert coloured == ["untrained 7", "at-init 2", "does not hold", "n/a"]
    assert {"untrained 7, or so", "learned by heart", "<i>"} <= set(page.words())
