"""The same differences at several sizes."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats
from study_toys import cell, grid

from hopeprobe.errors import BadInputError
from hopeprobe.study import scaling
from hopeprobe.study.scaling import other_differences

SHIFTS = (0.001, -0.002, 0.003, 0.0)


def of_size(preset, parameters, **deltas):
    cells = []
    for seed, shift in enumerate(SHIFTS):
        full = 7.0 + 0.1 * seed
        cells.append(cell("full", seed, full, parameters=parameters))
        cells += [
            cell(name.replace("_", "-"), seed, full + delta + shift * (i + 1))
            for i, (name, delta) in enumerate(deltas.items())
        ]
    return grid(cells, preset=preset)


def test_the_change_between_sizes_is_welchs(tmp_path):
    small = of_size("nano", 100, no_self_mod=0.2, transformer=-0.3)
    large = of_size("tiny", 200, no_self_mod=0.9, transformer=0.5)
    found = {growth.name: growth for growth in scaling([large, small])}
    assert [(g.small, g.large) for g in found.values()] == [("nano", "tiny")] * 2
    deltas = [[g.of("no-self-mod")[s].live - g.of("full")[s].live for s in range(4)] for g in (large, small)]
    theirs = stats.ttest_ind(*deltas, equal_var=False)
    np.testing.assert_allclose(found["no-self-mod"].change.ci_low, theirs.confidence_interval()[0], rtol=1e-6)
    assert abs(found["no-self-mod"].ratio - 4.5) < 0.05
    assert (found["no-self-mod"].claim, found["transformer"].claim) == ("holds", "holds")
    assert math.isnan(found["transformer"].ratio)  # the differences have two signs


def test_what_changes_the_other_way_does_not_hold():
    small = of_size("nano", 100, no_self_mod=0.9, transformer=0.0, no_cms=0.0)
    large = of_size("tiny", 200, no_self_mod=0.2, transformer=0.0, no_cms=0.0)
    found = {growth.name: growth.claim for growth in scaling([small, large])}
    assert found == {
        "no-self-mod": "does not hold",
        "transformer": "does not hold",
        "no-cms": "does not hold",
    }


def test_one_seed_resolves_no_change():
    small, large = (of_size(name, n, no_cms=0.1) for name, n in (("nano", 1), ("tiny", 2)))
    alone = [dataclasses.replace(g, cells=tuple(c for c in g.cells if c.seed == 0)) for g in (small, large)]
    (growth,) = scaling(alone)
    assert growth.claim == "not resolved"
    assert math.isnan(growth.change.ci_low)
    assert growth.change.difference == pytest.approx(0.0, abs=1e-9)


def test_three_sizes_are_compared_by_neighbours_and_one_with_nothing():
    sizes = [of_size(name, n, no_cms=0.1) for name, n in (("b", 20), ("a", 10), ("c", 30))]
    assert [(g.small, g.large) for g in scaling(sizes)] == [("a", "b"), ("b", "c")]
    assert scaling(sizes[:1]) == []


def test_what_cannot_be_compared_is_said():
    small = of_size("nano", 100, no_cms=0.1)
    with pytest.raises(BadInputError, match="two grids are of one size: 'nano' and 'nano'"):
        scaling([small, small])
    with pytest.raises(BadInputError, match="two grids are of one size"):  # the same preset, set otherwise
        scaling([small, of_size("nano", 101, no_cms=0.1)])
    with pytest.raises(BadInputError, match="has no 'full'"):
        scaling([small, grid([cell("no-cms", 0, 7.0)], preset="tiny")])


def test_a_diverged_first_seed_does_not_change_the_order_of_sizes():
    small, large = (of_size(name, n, no_cms=0.1) for name, n in (("nano", 100), ("tiny", 200)))
    broken = dataclasses.replace(large.cells[0], status="diverged", parameters=0)
    large = dataclasses.replace(large, cells=(broken, *large.cells[1:]))
    assert [(g.small, g.large) for g in scaling([large, small])] == [("nano", "tiny")]


def test_what_else_differs_is_named():
    small, large = (of_size(name, n, no_cms=0.1) for name, n in (("nano", 100), ("tiny", 200)))
    assert other_differences([small, large]) == []
    longer = dataclasses.replace(large, train={**large.train, "steps": 2000})
    assert other_differences([small, longer]) == ["steps (200, 2000)"]


def test_what_was_run_at_no_size_weighs_on_no_other_row():
    def twins(g):
        more = [
            cell("no-surprise", c.seed, c.live, same_as="full", why="open", parameters=c.parameters)
            for c in g.of("full").values()
        ]
        return dataclasses.replace(g, cells=(*g.cells, *more))

    small, large = of_size("nano", 100, no_cms=0.1), of_size("tiny", 200, no_cms=0.2)
    (alone,) = scaling([small, large])
    found = {growth.name: growth for growth in scaling([twins(small), twins(large)])}
    assert found["no-cms"].q == alone.q
    assert math.isnan(found["no-surprise"].q)
