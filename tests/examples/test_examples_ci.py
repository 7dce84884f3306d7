"""The workflow for GitHub Actions: its commands, in their order, do what it says they do."""

import json
import random
import re
import shlex
from pathlib import Path

import pytest
import yaml

from hopeprobe.cli import run

WORKFLOW = Path(__file__).parents[2] / "examples" / "ci" / "mechanism.yml"


@pytest.mark.slow  # it trains
def test_the_workflow_passes_and_fails_where_it_should(tmp_path, monkeypatch, capsys):
    text = WORKFLOW.read_text(encoding="utf-8")
    (job,) = yaml.safe_load(text)["jobs"].values()
    commands = [step["run"] for step in job["steps"] if step.get("run", "").startswith("hopeprobe ")]
    (baseline,) = re.findall(r"^# +(hopeprobe baseline .*)$", text, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["train", "check"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOPEPROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    write_text(tmp_path / "tests" / "text.jsonl")
    train, check = (shlex.split(command)[1:] for command in commands)
    assert run(train) == 0
    assert run(shlex.split(baseline)[1:]) == 0
    assert run(check) == 0
    assert "::error" not in capsys.readouterr().out
    assert (tmp_path / "mechanism.xml").exists()
    assert run([*train, "--seed", "1", "--out", "runs/other"]) == 0
    check[check.index("runs/ci/step-000004.pt")] = "runs/other/step-000004.pt"
    assert run(check) == 1
    assert "::error title=" in capsys.readouterr().out


def write_text(path):
    rng = random.Random(0)
    path.parent.mkdir()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(400):
            words = " ".join(f"w{rng.randrange(200)}" for _ in range(120))
            file.write(json.dumps({"text": words}) + "\n")
