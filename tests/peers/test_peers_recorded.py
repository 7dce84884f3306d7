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

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def module():
    return recipe()


@pytest.fixture(scope="module")
def document():
    return json.loads((EXAMPLES / "reconstruction.json").read_text(encoding="utf-8"))


def rows_of(document, probe, statistic):
    return [r for r in document["results"] if (r["probe"], r["statistic"]) == (probe, statistic)]


def within(span, low, high):
    low_value, high_value = span
    return low <= low_value <= high_value <= high


def test_the_page_is_made_of_the_committed_numbers(module, document):
    assert (EXAMPLES / "reconstruction.md").read_text(encoding="utf-8") == module.page(document)
    assert document["config"] == module.CONFIG
    assert document["missing"] == []


def test_nothing_is_called_learned_and_everything_is_judged(module, document):
    assert {r["verdict"] for r in document["results"] if r["probe"] == "integrity"} == {"untrained"}
    assert "learned" not in {r["verdict"] for r in document["results"]}
    for _, _, key, judged in module.ROWS:
        rows = [row for row in document["results"] if judged and module.matches(row, *judged)]
        assert bool(rows) == bool(judged), key
        assert {row["verdict"] for row in rows} <= {"at-init", "untrained", "collapsed"}, key
    table = module.table(document)
    assert len(table.splitlines()) == 3 + len(module.ROWS)
    assert "not measured" not in table


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


def test_probes_agree_with_the_plain_figures(document):
    """The same quantity, once by the package and arithmetic, once by a probe: on other windows of the same text."""
    f = document["figures"]
    cosines = {r["layer"]: r["value"] for r in rows_of(document, "cms-similarity", "output_cosine")}
    for layer, value in enumerate(f["output_cosine_by_layer"]):
        assert cosines[layer] == pytest.approx(value, abs=0.02)
    (mean,) = rows_of(document, "surprise", "mean_loss")
    (std,) = rows_of(document, "surprise", "loss_std")
    assert mean["ci_low"] - 1 < f["loss_mean"] < mean["ci_high"] + 1
    assert std["value"] == pytest.approx(f["loss_std"], rel=0.1)
    rates = {r["component"]: r["value"] for r in rows_of(document, "gate-selectivity", "pass_rate")}
    for threshold in (5, 10, 20, 50):
        assert rates[f"tau={threshold}"] == pytest.approx(f[f"gate_{threshold}"], abs=0.03)


def test_distances_of_memories_agree(document):
    moved = rows_of(document, "selfmod-drift", "displacement")
    for memories, weights, key in (
        ("k v q memory", ("w1", "w2"), "matrix_drift"),
        ("eta alpha", ("w1", "w_skip"), "row_drift"),
    ):
        names = {f"{m}.{w}" for m in memories.split() for w in weights}
        values = [r["value"] for r in moved if r.get("component") in names]
        assert len(values) == 6 * len(names)
        assert [min(values), max(values)] == pytest.approx(document["figures"][key], rel=1e-4)


def test_norms_and_distances_of_levels_agree(document):
    for statistic, key in (("weight_norm", "level_norm"), ("displacement", "level_drift")):
        values = [r["value"] for r in rows_of(document, "cms-dynamics", statistic)]
        assert len(values) == 12
        assert [min(values), max(values)] == pytest.approx(document["figures"][key], rel=1e-4)


def test_what_is_left_of_fast_weights_agrees(document):
    """One half a token: 16 tokens by plain arithmetic, 32 by the probe, of every memory and layer."""
    after_16 = document["figures"]["norm_ratio"]
    after_32 = [r["value"] for r in rows_of(document, "meta-fast", "norm_ratio")]
    assert len(after_32) == 6 * 5
    assert after_16[0] ** 2 / 3 < min(after_32) <= max(after_32) < after_16[1] ** 2 * 3
    assert {r["verdict"] for r in rows_of(document, "meta-fast", "relative_drift")} == {"collapsed"}


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
