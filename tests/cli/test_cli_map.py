"""`--map`: every command that opens a checkpoint opens a model of somebody's through one."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with the example's files and step-0.pt of a small one of its models."""
    for name in ("delta_memory.py", "map.toml"):
        shutil.copy(EXAMPLE / name, tmp_path)
    spec = importlib.util.spec_from_file_location("example_of_own_model", tmp_path / "delta_memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = {"dim": 4, "depth": 1}
    torch.manual_seed(0)
    weights = module.LanguageModel(**config).state_dict()
    torch.save({"model": weights, "config": config, "step": 0}, tmp_path / "step-0.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_command_takes_it(call, own, text):
    listed = call("hooks", "step-0.pt", "--map", "map.toml")
    assert listed.code == 0
    assert "blocks.0.memory.hook_fast_w" in listed.out
    small = ("--map", "map.toml", "--data", text, "--tokens", "512")
    done = call("analyze", "step-0.pt", *small, "--probe", "surprise", "--format", "json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["checkpoint"]["step"] == 0
    kept = call("baseline", "step-0.pt", *small, "--probe", "surprise", "--output", "kept.json")
    assert kept.code == 0, kept.err
    same = call("check", "step-0.pt", "--map", "map.toml", "--baseline", "kept.json")
    assert same.code == 0, same.out
    page = call("report", "step-0.pt", *small, "--probe", "surprise", "-o", "page.html")
    assert page.code == 0, page.err
    assert (own / "page.html").exists()
    out = call("export", "step-0.pt", "--map", "map.toml", "-o", "w.safetensors")
    assert out.code == 0, out.err


def test_what_is_wrong_is_a_line(call, own):
    without = call("analyze", "step-0.pt", "--probe", "surprise")
    assert without.code == 2
    assert "other models join by a map" in without.err
    cases = {
        "none.toml": "cannot read the map none.toml",
        "titan": "no map is called 'titan'",
        "titans-pytorch": "No module named 'titans_pytorch'",
        "step-0.pt": "the map step-0.pt is not TOML",
    }
    for given, said in cases.items():
        done = call("analyze", "step-0.pt", "--probe", "surprise", "--map", given)
        assert (done.code, done.out) == (2, "")
        assert said in done.err
        assert done.err.count("\n") == 1
    results = call("report", "none.json", "--map", "map.toml", "-o", "page.html")
    assert results.code == 2
