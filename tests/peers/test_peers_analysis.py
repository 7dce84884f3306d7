"""hopeprobe on files that the package saved: trained weights are told from untrained ones, whatever a file says."""

import math
import shutil

import pytest

from hopeprobe import analyze
from hopeprobe.cli import run as command
from hopeprobe.subject import load

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def measure(toy_text, tmp_path_factory):
    """`analyze` on the toy text, with few re-initialisations."""
    cache = tmp_path_factory.mktemp("cache")

    def inner(subject, probe, fresh=5):
        return analyze(
            subject, probe, data=toy_text, tokens=640, split="all", batch=16, fresh=fresh, cache_dir=cache
        )

    return inner


def rows_of(results, statistic):
    return [row for row in results.rows if row.statistic == statistic]


def test_trained_weights_are_recognised(toy_run, measure):
    results = measure(load(toy_run / "step_000060.pt"), "integrity")
    (loss,) = rows_of(results, "frozen_loss")
    assert loss.verdict == "learned"
    own = next(n for n in results.null_rows if (n.statistic, n.null_kind) == ("frozen_loss", "own-init"))
    assert loss.ci_high < own.low - 3
    distances = {row.component: row.value for row in rows_of(results, "distance_from_init")}
    assert set(distances) == {"embed", "selfmod", "cms", "norm", "all"}
    assert all(value > 0 for value in distances.values())
    nulls = {n.component: n.value for n in results.null_rows if n.null_kind == "optimiser"}
    assert all(value < nulls[group] for group, value in distances.items())
    (keys,) = rows_of(results, "keys_loaded")
    assert keys.value == 60


def test_levels_are_compared_on_what_the_package_runs(toy_run, measure):
    results = measure(load(toy_run / "step_000060.pt"), "cms-similarity", fresh=2)
    for statistic in ("output_cosine", "delta_cosine"):
        rows = rows_of(results, statistic)
        assert [(row.layer, row.component) for row in rows] == [(0, "fast|slow"), (1, "fast|slow")]
        assert all(math.isfinite(row.ci_low) for row in rows)
    kinds = {(n.statistic, n.null_kind) for n in results.null_rows}
    assert {
        ("output_cosine", "own-init"),
        ("output_cosine", "fresh-init"),
        ("delta_cosine", "analytic"),
    } <= kinds


def test_the_step_0_file_is_untrained(toy_run, measure):
    results = measure(load(toy_run / "step_000000.pt"), "integrity")
    assert {row.verdict for row in results.rows if row.probe == "integrity"} == {"untrained"}
    assert "learned" not in {row.verdict for row in results.rows}


@pytest.mark.parametrize("own_init", ["in the folder", "as given"])
def test_a_file_whose_weights_were_never_loaded(toy_run, measure, tmp_path, own_init):
    """It says step 60 and holds another initialisation: the study's case, as its figures look."""
    import torch
    from nested_learning_subject import NestedLearningSubject

    for name in ("step_000000.pt", "step_000060.pt"):
        shutil.copy(toy_run / name, tmp_path / name)
    content = torch.load(tmp_path / "step_000060.pt", weights_only=True)
    initial = load(tmp_path / "step_000000.pt")
    content["model"] = initial.reinitialised(11).module.peer.state_dict()
    torch.save(content, tmp_path / "step_000060.pt")
    subject = load(tmp_path / "step_000060.pt")
    if own_init == "as given":
        subject = NestedLearningSubject(
            content["config"], content=content, path=subject.path, initial=initial
        )
    results = measure(subject, "integrity")
    verdicts = {row.verdict for row in results.rows}
    assert "learned" not in verdicts
    if own_init == "as given":
        assert verdicts == {"untrained"}
        assert (
            "another initialisation is" in results.rows[0].note
            or "the optimiser reaches" in results.rows[0].note
        )
    else:
        assert "at-init" not in verdicts
        assert "m_q.w2.weight differs" in results.checkpoint["own_init"]


def test_the_command_line_reads_them_too(toy_run, capsys):
    assert command(["hooks", str(toy_run / "step_000060.pt"), "--pattern", "blocks.0.cms.*"]) == 0
    printed = capsys.readouterr().out
    assert "blocks.0.cms.slow.hook_delta" in printed
    assert "blocks.1" not in printed
