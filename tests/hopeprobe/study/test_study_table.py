"""A table says the same in HTML, as text and as numbers."""

import pandas as pd

from hopeprobe.study import Table


def test_what_is_shown_can_be_printed_and_computed_with():
    table = Table(("name", "Δ"), [("a", "+0.1"), ("<b>", "")], ["read <this>"])
    assert repr(table) == "read <this>\n\n| name | Δ |\n| --- | --- |\n| a | +0.1 |\n| <b> |  |"
    assert "&lt;b&gt;" in table._repr_html_()
    assert "read &lt;this&gt;" in table._repr_html_()
    assert table.frame.to_dict("list") == {"name": ["a", "<b>"], "Δ": ["+0.1", ""]}
    assert len(table) == 2


def test_numbers_are_made_when_they_are_asked_for():
    made = []

    def numbers():
        made.append(1)
        return pd.DataFrame({"x": [0.123456]})

    table = Table(("x",), [("0.12",)], numbers=numbers)
    assert "0.12" in repr(table)
    assert made == []
    assert table.frame.x.tolist() == [0.123456]


def test_a_table_of_nothing_is_its_notes():
    assert repr(Table(("x",), [], ["nothing to say"])) == "nothing to say"
    assert "<table" not in Table(("x",), [], ["nothing to say"])._repr_html_()
