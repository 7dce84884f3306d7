"""The recipe of examples/reconstruction.py from end to end on a small model: figures, verdicts and the table."""

import copy
import json

import pytest
from peer_toys import recipe

from hopeprobe.results import Results

pytestmark = pytest.mark.peers


def test_the_recipe_runs_and_its_figures_are_those_of_any_untrained_model(monkeypatch, tmp_path, capsys):
    module = recipe()
    config = copy.deepcopy(module.CONFIG)
    config["model"] |= {"dim": 16, "num_layers": 2}
    config["data"]["seq_len"] = 16
    config["model"]["cms_levels"][1]["update_period"] = 16
    small = {"CONFIG": config, "CONTEXT": 32, "TOKENS": 1024, "MEASURED": 560, "FRESH": 2, "FRESH_TOKENS": 64}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    for name, file in {"FIGURES": "small.json", "RESULTS": "results.json", "PAGE": "small.md"}.items():
        monkeypatch.setattr(module, name, tmp_path / file)
    monkeypatch.setenv("HOPEPROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["reconstruction.py"])
    module.main()

    document = json.loads((tmp_path / "small.json").read_text())
    results = Results.read_json(tmp_path / "results.json")
    d, h = 16, 64
    figures = document["figures"]
    assert figures["tracked"] == 2 * 14
    norm, drift = module.level_norm(d, h), module.level_drift(d, h)
    assert all(value == pytest.approx(norm, rel=0.1) for value in figures["level_norm"])
    assert all(value == pytest.approx(drift, rel=0.1) for value in figures["level_drift"])
    assert all(0.99 < value < 1.01 for value in figures["relative_drift"])
    # Of the other probes' rows one in twenty may say `learned` by chance: integrity is what tells.
    assert {row.verdict for row in results.rows if row.probe == "integrity"} == {"untrained"}
    assert results.missing == []
    assert {null.null_kind for null in results.null_rows} >= {"own-init", "fresh-init"}
    printed = capsys.readouterr().out
    assert module.table(document, results) in printed
    assert module.table(document, results) in (tmp_path / "small.md").read_text()
