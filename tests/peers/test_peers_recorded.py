"""What `make test` can check without anybody's package: the committed numbers of examples/reconstruction.py.

The tests beside this file that are marked `peers` run the package itself, by `make test-peers`.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from peer_toys import EXAMPLES, recipe

from hopeprobe.results import Results
from hopeprobe.study import inside
from hopeprobe.study.published import INSIDE

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "examples" / "guide" / "checkpoints.md"


@pytest.fixture(scope="module")
def module():
    return recipe()


@pytest.fixture(scope="module")
def document():
    return json.loads((EXAMPLES / "reconstruction.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def results():
    return Results.read_json(EXAMPLES / "reconstruction-results.json")


def rows_of(results, probe, statistic):
    return [r for r in results.rows if (r.probe, r.statistic) == (probe, statistic)]


def within(span, low, high):
    low_value, high_value = span
    return low <= low_value <= high_value <= high


def test_the_page_is_made_of_the_committed_numbers(module, document, results):
    assert (EXAMPLES / "reconstruction.md").read_text(encoding="utf-8") == module.page(document, results)
    assert document["config"] == module.CONFIG
    assert results.missing == []
    assert results.checkpoint["path"] is None


def test_nothing_is_called_learned_and_everything_is_judged(module, document, results):
    assert {row.verdict for row in results.rows if row.probe == "integrity"} == {"untrained"}
    assert "learned" not in {row.verdict for row in results.rows}
    for figure in (*module.INSIDE, module.MEAN):
        rows = [row for row in results.rows if module.judges(row, figure)]
        assert rows, figure.key
        assert {row.verdict for row in rows} <= {"at-init", "untrained", "collapsed"}, figure.key
    table = module.table(document, results)
    assert len(table.splitlines()) == 3 + len(list(module.figures_in_order()))
    assert "not measured" not in table


def test_rows_have_their_nulls_and_stand_beside_what_was_printed(results):
    """Of a distance from the own initial weights those have none; everything else has both."""
    table = inside({"package": results}).frame
    assert set(table.key) == {figure.key for figure in INSIDE}
    assert table.rows.min() >= 1
    distances = {"distance", "level_drift", "matrix_drift", "row_drift"}
    assert set(table.key[table.own_init_low.isna()]) == distances
    assert not table.fresh_init_low.isna().any()
    for one in table.itertuples():
        assert "learned" not in one.verdicts, one.key
        # As far as fresh weights go: five of them, on fewer tokens.
        gap = 0.15 * max(abs(one.fresh_init_high), abs(one.fresh_init_low))
        assert one.fresh_init_low - gap <= one.mean <= one.fresh_init_high + gap, one.key


def test_figures_are_those_published(document):
    """Each within what two seeds differ by, or the rounding of the published number."""
    f = document["figures"]
    assert f["tracked"] == 84
    assert within(f["level_norm"], 26.15 * 0.998, 26.15 * 1.002)
    assert within(f["level_drift"], 29.15, 29.35)
    assert within(f["matrix_drift"], 12.5, 13.5)
    assert within(f["row_drift"], 0.7, 0.9)
    assert within(f["memory_drift"], 4.5, 5.5)
    assert f["output_cosine"] == pytest.approx(0.77, abs=0.02)
    assert within(f["delta_cosine"], -0.1, 0.1)
    for key, published, tolerance in (
        ("loss_mean", 66.7, 3), ("loss_std", 16.5, 1), ("loss_p10", 45.0, 4), ("loss_min", 9.3, 7),
        ("loss_p50", 67.0, 3),
        ("gate_5", 1.0, 1e-3), ("gate_10", 0.9997, 1e-3), ("gate_20", 0.998, 2e-3), ("gate_50", 0.836, 0.06),
    ):  # fmt: skip
        assert f[key] == pytest.approx(published, abs=tolerance), key
    assert within(f["relative_drift"], 0.999, 1.001)
    assert within(f["norm_ratio"], 1e-7, 1e-4)


def test_figures_have_closed_forms(module, document):
    """A level, two levels, two projections and two rows that torch initialises by itself give them too."""
    d, h = 256, 1024
    assert module.level_norm(d, h) == pytest.approx(26.155, abs=1e-3)
    assert module.level_drift(d, h) == pytest.approx(29.26, abs=1e-2)
    torch.manual_seed(0)
    levels = [[torch.nn.LayerNorm(d), torch.nn.Linear(d, h), torch.nn.Linear(h, d)] for _ in range(2)]
    first, second = ([p.detach().flatten() for part in level for p in part.parameters()] for level in levels)
    a, b = torch.cat(first).double(), torch.cat(second).double()
    assert float(a.norm()) == pytest.approx(module.level_norm(d, h), rel=3e-3)
    assert float((a - b).norm()) == pytest.approx(module.level_drift(d, h), rel=3e-3)
    for rows, key in ((d, "matrix_drift"), (1, "row_drift")):
        p, q = (torch.nn.Linear(d, rows, bias=False).weight.detach().double() for _ in range(2))
        expected = math.sqrt(2 * rows / 3)
        assert float((p - q).norm()) == pytest.approx(expected, rel=0.02 if rows > 1 else 0.15)
        low, high = document["figures"][key]
        assert low <= expected <= high


def test_probes_agree_with_the_plain_figures(document, results):
    """The same quantity, once by the package and arithmetic, once by a probe: on other windows of the same text."""
    f = document["figures"]
    cosines = {r.layer: r.value for r in rows_of(results, "cms-similarity", "output_cosine")}
    for layer, value in enumerate(f["output_cosine_by_layer"]):
        assert cosines[layer] == pytest.approx(value, abs=0.02)
    (mean,) = rows_of(results, "surprise", "mean_loss")
    (std,) = rows_of(results, "surprise", "loss_std")
    assert mean.ci_low - 1 < f["loss_mean"] < mean.ci_high + 1
    assert std.value == pytest.approx(f["loss_std"], rel=0.1)
    rates = {r.component: r.value for r in rows_of(results, "gate-selectivity", "pass_rate")}
    for threshold in (5, 10, 20, 50):
        assert rates[f"tau={threshold}"] == pytest.approx(f[f"gate_{threshold}"], abs=0.03)


def test_distances_of_memories_agree(document, results):
    moved = rows_of(results, "selfmod-drift", "displacement")
    for memories, weights, key in (
        ("k v q memory", ("w1", "w2"), "matrix_drift"),
        ("eta alpha", ("w1", "w_skip"), "row_drift"),
    ):
        names = {f"{m}.{w}" for m in memories.split() for w in weights}
        values = [r.value for r in moved if r.component in names]
        assert len(values) == 6 * len(names)
        assert [min(values), max(values)] == pytest.approx(document["figures"][key], rel=1e-4)


def test_norms_and_distances_of_levels_agree(document, results):
    for statistic, key in (("weight_norm", "level_norm"), ("displacement", "level_drift")):
        values = [r.value for r in rows_of(results, "cms-dynamics", statistic)]
        assert len(values) == 12
        assert [min(values), max(values)] == pytest.approx(document["figures"][key], rel=1e-4)


def test_what_is_left_of_fast_weights_agrees(document, results):
    """One half a token: 16 tokens by plain arithmetic, 32 by the probe, of every memory and layer."""
    after_16 = document["figures"]["norm_ratio"]
    after_32 = [r.value for r in rows_of(results, "meta-fast", "norm_ratio")]
    assert len(after_32) == 6 * 5
    assert after_16[0] ** 2 / 3 < min(after_32) <= max(after_32) < after_16[1] ** 2 * 3
    assert {r.verdict for r in rows_of(results, "meta-fast", "relative_drift")} == {"collapsed"}


def test_the_peers_environment_has_what_hopeprobe_needs():
    """hopeprobe is installed there without its dependencies, so the Makefile names them."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.findall(r'^    "([\w-]+)>=', project.split("dependencies = [")[1].split("]")[0], re.MULTILINE)
    assert "torch" in needed
    recipe_lines = (
        (ROOT / "Makefile").read_text(encoding="utf-8").split("$(PEERS_INSTALLED):")[1].split("touch")[0]
    )
    of_the_package = {"torch", "numpy", "datasets"}  # nested-learning asks for them itself
    assert set(needed) - of_the_package <= set(recipe_lines.split())
    pinned = (ROOT / "constraints-peers.txt").read_text(encoding="utf-8")
    for name in needed:
        assert re.search(rf"^{name}==", pinned, re.MULTILINE), name


def test_the_adapter_is_installed_whole():
    """Modules are listed by hand, and an entry point finds the one that loads; what has to be installed says so."""
    folder = EXAMPLES / "peers"
    text = (folder / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"(\w+)"', text.split("py-modules = [")[1].split("]")[0])
    assert sorted(listed) == sorted(path.stem for path in folder.glob("*.py"))
    module, function = re.search(r'^nested-learning = "(\w+):(\w+)"$', text, re.MULTILINE).groups()
    assert f"\ndef {function}(path: Path)" in (folder / f"{module}.py").read_text(encoding="utf-8")
    assert "pip install --no-deps examples/peers" in GUIDE.read_text(encoding="utf-8")
