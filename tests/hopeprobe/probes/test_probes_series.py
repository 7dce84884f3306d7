"""Walking a run: distances against NumPy on the raw files, and what must not be mixed in."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hopeprobe.errors import MeasurementError
from hopeprobe.probes.series import GROUPS_FOLLOWED, Movement, Series, follow, followed
from hopeprobe.subject import MissingCapability, load

STEPS = (0, 1, 2, 5, 10, 20, 40)


@pytest.fixture
def run(toy_run, tmp_path):
    """A copy of the run, to be spoiled."""
    return shutil.copytree(toy_run, tmp_path / "run")


def series_of(folder, step=40):
    subject = load(folder / f"step-{step:06d}.pt")
    return follow(subject, subject.own_init())


def raw(folder, step):
    weights = torch.load(folder / f"step-{step:06d}.pt", weights_only=True)["weights"]
    return {k: v.numpy().astype(np.float64) for k, v in weights.items()}


def changed(folder, number, /, to=None, **fields):
    """Write a checkpoint again with other fields, under its own or another step's name."""
    content = torch.load(folder / f"step-{number:06d}.pt", weights_only=True)
    torch.save(content | fields, folder / f"step-{number if to is None else to:06d}.pt")


def path_of(points):
    """The movement along points [n + 1, d], by its definition."""
    points = np.asarray(points, dtype=float)
    end, start, before = points[-1], points[0], np.concatenate([points[:1], points[:-1]])
    squares = [((points - other) ** 2).sum(1) for other in (0, start, end, before)]
    return Series(range(len(points)), {"w": np.array(squares)}, ()).movement(["w"])


@pytest.mark.parametrize("name", ["blocks.0.selfmod.memories.k.w1", "blocks.1.cms.levels.slow.w_out"])
def test_distances_agree_with_numpy_on_the_files(toy_run, name):
    points = [raw(toy_run, step)[name].ravel() for step in STEPS]
    found, expected = series_of(toy_run).movement([name]), path_of(points)
    assert found.steps == STEPS
    for field in ("norm", "from_start", "to_end", "since"):
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), rtol=1e-12, atol=1e-12)
    assert found.from_start[0] == found.to_end[-1] == found.since[0] == 0


def test_several_parameters_are_one_vector(toy_run):
    names = ["blocks.0.cms.levels.fast.w_in", "blocks.0.cms.levels.fast.b_in"]
    points = [np.concatenate([raw(toy_run, step)[n].ravel() for n in names]) for step in STEPS]
    found, expected = series_of(toy_run).movement(names), path_of(points)
    np.testing.assert_allclose(found.to_end, expected.to_end, rtol=1e-12)
    np.testing.assert_allclose(
        [d for *_, d in found.drifts()],
        [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in itertools.pairwise(points)],
    )


def test_an_early_checkpoint_ignores_what_came_later(toy_run):
    series = series_of(toy_run, 10)
    assert (series.steps, series.skipped) == ((0, 1, 2, 5, 10), ())
    assert series_of(toy_run, 0).steps == (0,)


@pytest.mark.parametrize(
    ("points", "settled", "moved_by_1"),
    [
        ([0, 1, 1, 1], 1, 1.0),
        ([0, 1, 2, 3], 3, 1 / 3),
        ([0, 10, 9.6, 10], 1, 1.0),
        ([0, 10, 9.4, 10], 3, 1.0),  # it was there and left again
        ([0, -5, 5, 5], 2, -1.0),
        ([0, 0, 0, 1], 3, 0.0),
    ],
)
def test_settled_and_moved_by(points, settled, moved_by_1):
    movement = path_of(np.array(points, dtype=float)[:, None])
    assert movement.settled_step() == settled
    assert movement.moved_by(1) == pytest.approx(moved_by_1)
    assert np.isnan(movement.moved_by(7))


def test_what_never_moved_has_settled_at_the_start_and_no_share():
    movement = path_of(np.ones((4, 3)))
    assert movement.settled_step() == 0
    assert np.isnan(movement.moved_by(1))
    assert [d for *_, d in movement.drifts()] == [0, 0, 0]
    assert np.isnan(path_of([[0.0], [1.0]]).drifts()[0][2]), "no drift relative to nothing"


@given(st.integers(0, 2**32), st.integers(2, 12))
def test_settled_is_the_first_step_that_no_later_one_leaves(seed, n):
    points = np.random.default_rng(seed).standard_normal((n, 2)).cumsum(0) * np.linspace(1, 0.01, n)[:, None]
    movement = path_of(points)
    far = [np.linalg.norm(p - points[-1]) > 0.05 * np.linalg.norm(points[-1] - points[0]) for p in points]
    assert movement.settled_step() == next(i for i in range(n) if not any(far[i:]))


def test_a_damaged_file_is_left_out(run):
    intact = series_of(run)
    file = run / "step-000005.pt"
    file.write_bytes(file.read_bytes()[:5000])
    series = series_of(run)
    assert series.steps == (0, 1, 2, 10, 20, 40)
    (why,) = series.skipped
    assert "step-000005.pt is left out" in why
    assert "damaged" in why
    name = next(iter(followed(load(run / "step-000040.pt"))))
    np.testing.assert_array_equal(
        series.movement([name]).to_end, np.delete(intact.movement([name]).to_end, STEPS.index(5))
    )


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"init_digest": "0" * 64}, "another run (initial weights)"),
        ({"seed": 7, "init_digest": "1" * 64}, "initial weights"),
        ({"train": {"learning_rate": 0.5}}, "another run (learning_rate)"),
        ({"data": {"name": "toy", "fingerprint": "another text"}}, "another run (data)"),
        ({"step": 10}, "says step 10, which another file had"),
        ({"step": 40}, "says step 40, which another file had"),
        ({"step": 0}, "its weights are not the initial ones"),
    ],
)
def test_a_file_of_another_run_is_left_out(run, fields, why):
    changed(run, 20, **fields)
    series = series_of(run)
    assert series.steps == (0, 1, 2, 5, 10, 40)
    assert len(series.skipped) == 1
    assert why in series.skipped[0]


def test_a_file_of_another_configuration_is_left_out(run):
    content = torch.load(run / "step-000020.pt", weights_only=True)
    changed(run, 20, config=content["config"] | {"eta_max": 0.5})
    (why,) = series_of(run).skipped
    assert "another run (configuration)" in why


def test_weights_that_are_not_finite_are_left_out_of_the_way_and_refused_at_its_end(run):
    weights = torch.load(run / "step-000020.pt", weights_only=True)["weights"]
    weights["blocks.0.selfmod.conv"][0, 0] = torch.nan
    changed(run, 20, weights=weights)
    assert series_of(run).skipped == ("step-000020.pt is left out: a weight is not finite",)
    with pytest.raises(MeasurementError, match="not finite"):
        series_of(run, 20)


def test_a_later_file_under_an_earlier_name_is_not_mixed_in(run):
    changed(run, 40, to=3)
    assert series_of(run, 20).steps == (0, 1, 2, 5, 10, 20)


def test_a_link_that_leads_nowhere_is_left_out(run):
    (run / "step-000007.pt").symlink_to(run / "gone.pt")
    (why,) = series_of(run).skipped
    assert "step-000007.pt is left out" in why


def test_the_walk_is_made_once_for_the_same_files_and_again_for_others(run, monkeypatch):
    subject = load(run / "step-000040.pt")
    initial, read = subject.own_init(), []
    monkeypatch.setattr(
        "hopeprobe.subject.load", lambda path, device=None: read.append(path) or load(path, device=device)
    )
    first = follow(subject, initial)
    assert len(read) == 6
    assert follow(subject, initial) is first
    assert len(read) == 6
    (run / "step-000005.pt").unlink()
    assert follow(subject, initial).steps == (0, 1, 2, 10, 20, 40)
    with torch.no_grad():
        subject.module.blocks[0].selfmod.conv.add_(1)
    assert follow(subject, initial).movement(["blocks.0.selfmod.conv"]).displacement > 1


def test_a_model_that_is_of_no_run_has_no_series(subject):
    with pytest.raises(MissingCapability, match="run"):
        follow(subject, subject)


def test_only_mechanisms_are_followed(subject):
    groups = subject.parameter_groups()
    assert set(followed(subject)) == {name for g in GROUPS_FOLLOWED for name in groups[g]}
    assert "embed" not in followed(subject)
    assert isinstance(path_of([[0.0]]), Movement)
