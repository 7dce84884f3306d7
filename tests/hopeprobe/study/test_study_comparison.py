"""Everything that a comparison shows is read from records, in one object: tables with numbers, claims and figures."""

import dataclasses

import pytest
from study_toys import cell, grid

from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.study import compare, summarise
from hopeprobe.study.probed import Probed, write_probed


def surprise(name, step, value, statistic="mean_loss", component=""):
    return Probed(
        name, "surprise", statistic, step, None, component, "live", "", "nats", 4, value, value - 0.1, value + 0.1,
        "learned 4", 10.8, 10.8, 10.7, 10.9,
    )  # fmt: skip


@pytest.fixture
def folders(made, tmp_path):
    """Two sizes with a closing threshold; probes of `full`, and of a variant, of the smaller one alone."""
    closed = [
        cell("full-tau-3", s, c.live + 0.1, variant="full", threshold=3.0, gate_rate=0.8)
        for s, c in made.of("full").items()
    ]
    small = grid([*made.cells, *closed])
    large = grid([dataclasses.replace(c, parameters=2000) for c in made.cells], preset="big")
    for each in (small, large):
        each.write(tmp_path / each.preset)
    probed = [surprise("full", 200, 7.2), surprise("full", 200, 7.0, "loss_quantile", "p50")]
    write_probed([*probed, surprise("titans", 200, 9.9)], tmp_path / "tiny")
    return tmp_path / "tiny", tmp_path / "big"


def test_sizes_are_in_order_whatever_the_order_they_are_named_in(folders):
    small, large = folders
    found = compare(large, small / "ablation.json")
    assert list(found.variants) == ["tiny", "big"]
    assert list(found.thresholds) == ["tiny"]
    assert {line[1] for line in found.sizes.lines} == {"tiny → big"}
    assert len(found.growths) == 3


def test_tables_hold_the_numbers_that_they_show(folders, made):
    found = compare(*folders)
    table = found.variants["tiny"]
    names = [line[0] for line in table.lines]
    assert names == ["full", "no-cms", "no-self-mod", "transformer"]
    assert table.frame.name.tolist() == names
    delta = next(row for row in summarise(made) if row.name == "no-cms").delta.mean
    assert table.frame.set_index("name").delta_mean["no-cms"] == pytest.approx(delta, abs=1e-5)
    assert {line[0]: line[5][:6] for line in table.lines}["no-cms"] == "+0.300"
    assert "Not the published setting" in " ".join(table.notes)
    gates = found.thresholds["tiny"].frame.set_index("name").gate_rate
    assert gates.to_dict() == {"full": 1.0, "full-tau-3": 0.8}
    assert len(found.sizes.frame) == len(found.sizes.lines)


def test_probes_are_of_full_in_the_largest_grid_that_has_any(folders):
    found = compare(*folders)
    assert found.inside.preset == "tiny"
    assert [(row.name, row.value) for row in found.probed] == [("full", 7.2), ("full", 7.0)]
    said = found.claims.frame.set_index("claim")
    assert said.answer["mean per-token loss is 66.7 nats"] == "does not hold"
    assert said.here["mean per-token loss is 66.7 nats"] == "tiny: 7.2 [7.1, 7.3]"
    assert compare(folders[1]).probed == ()


def test_a_notebook_and_a_terminal_show_every_table(folders):
    found = compare(*folders)
    for text in (found._repr_html_(), repr(found)):
        said = text.replace("&#x27;", "'")
        for title in (
            "variants, tiny",
            "variants, big",
            "surprise thresholds, tiny",
            "sizes",
            "the study's claims",
        ):
            assert title in said
        assert "surprise thresholds, big" not in text
    alone = repr(compare(folders[1]))
    assert "sizes" not in alone
    assert "variants, big" in alone


def test_figures_have_the_study_s_numbers(folders):
    found = compare(*folders)
    assert list(found.plot()) == ["figure-3", "figure-4", "figure-5"]
    assert "What each component matters" in found.plot(4).get_suptitle()
    with pytest.raises(BadInputError, match="figures 1 to 5, and no figure 6"):
        found.plot(6)
    with pytest.raises(MeasurementError, match="no probe of this figure was run"):
        found.plot(1)


def test_what_cannot_be_compared_is_said(folders, tmp_path):
    with pytest.raises(BadInputError, match="at least one grid"):
        compare()
    with pytest.raises(BadInputError, match="two grids are of one size"):
        compare(folders[0], folders[0])
    with pytest.raises(BadInputError, match=r"ablation.json does not exist"):
        compare(tmp_path / "nothing")
