"""The fixture `mechanism`, in the tests of a project that is not this one."""

import json
import os
import subprocess
import sys

import pytest

from hopeprobe.pytest_plugin import Mechanism

PROJECT = """
def test_memories(mechanism):
    settings = dict(probes="surprise", tokens=300, split="all", fresh=0)
    mechanism.check({checkpoint!r}, "mechanism.json", data={text!r}, **settings)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with one test, a text, and a checkpoint of three steps."""
    from hopeprobe.model.config import ModelConfig
    from hopeprobe.model.train import TrainConfig, train
    from hopeprobe.tokens import load_tokens

    folder = tmp_path_factory.mktemp("project")
    text = folder / "text.jsonl"
    documents = [" ".join(f"w{(i * j) % 40}" for j in range(20)) for i in range(100)]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    config = ModelConfig(dim=16, layers=1, context=32, heads=2)
    data = load_tokens(str(text), cache_dir=folder / "cache")
    train(config, TrainConfig(steps=3, batch=2, eval_tokens=64), data, folder / "run")
    checkpoint = folder / "run" / "step-000003.pt"
    (folder / "test_memories.py").write_text(PROJECT.format(checkpoint=str(checkpoint), text=str(text)))
    return folder


def pytest_in(folder, *arguments):
    environment = {**os.environ, "HOPEPROBE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow  # six times Python, torch and pytest
def test_a_project_of_ones_own(project):
    absent = pytest_in(project)
    assert absent.returncode == 1
    assert "mechanism.json is not there: `pytest --mechanism-update` writes it" in absent.stdout
    assert pytest_in(project, "--mechanism-update").returncode == 0
    passed = pytest_in(project)
    assert passed.returncode == 0, passed.stdout
    path = project / "mechanism.json"
    document = json.loads(path.read_text())
    (loss,) = [one for one in document["statistics"] if one["statistic"] == "mean_loss"]
    loss["values"], loss["tolerance"] = [loss["values"][0] + 0.5], 0.25
    path.write_text(json.dumps(document))
    moved = pytest_in(project)
    assert moved.returncode == 1
    assert "1 moved" in moved.stdout
    assert "surprise/mean_loss/live" in moved.stdout
    assert "Traceback" not in moved.stdout + moved.stderr
    assert pytest_in(project, "--mechanism-update").returncode == 0
    (loss,) = [one for one in json.loads(path.read_text())["statistics"] if one["statistic"] == "mean_loss"]
    assert loss["tolerance"] == 0.25, "what a person set is kept"
    assert pytest_in(project).returncode == 0


def test_the_fixture_checks_unless_asked_to_write(mechanism):
    assert isinstance(mechanism, Mechanism)
    assert mechanism.update is False


def test_it_fails_with_what_moved_and_passes_what_did_not(
    toy_run, toy_data, toy_cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOPEPROBE_CACHE", str(toy_cache))
    path, checkpoint = tmp_path / "mechanism.json", toy_run / "step-000040.pt"
    settings = {"probes": "surprise", "tokens": 1600, "split": "all", "fresh": 0}
    with pytest.raises(pytest.fail.Exception, match=r"not there: `pytest --mechanism-update` writes it"):
        Mechanism().check(checkpoint, path, toy_data, **settings)
    assert Mechanism(update=True).check(checkpoint, path, toy_data, **settings) is None
    assert Mechanism().check(checkpoint, path, toy_data).passed
    with pytest.raises(
        pytest.fail.Exception, match=r"other settings than the test asks for \(probes, tokens\)"
    ):
        Mechanism().check(checkpoint, path, toy_data, probes=["surprise", "integrity"], tokens=800)
    document = json.loads(path.read_text())
    (loss,) = [one for one in document["statistics"] if one["statistic"] == "mean_loss"]
    loss["values"], loss["tolerance"] = [loss["values"][0] + 0.5], 0.25
    path.write_text(json.dumps(document))
    with pytest.raises(
        pytest.fail.Exception,
        match=r"1 moved\n  surprise/mean_loss/live: .*tolerance 0.25, found from 0.2501, moved",
    ):
        Mechanism().check(checkpoint, path, toy_data)
    Mechanism(update=True).check(checkpoint, path, toy_data)
    (loss,) = [one for one in json.loads(path.read_text())["statistics"] if one["statistic"] == "mean_loss"]
    assert loss["tolerance"] == 0.25, "what a person set is kept"
    assert Mechanism().check(checkpoint, path, toy_data).passed
