"""`--device` and `--precision`: one that is not there ends with status 2, and a run keeps its precision."""

import json

import pytest
import torch


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("gpu", "the device is 'gpu', must be auto, cpu, cuda or cuda:N"),
        ("cuda:7", "there is no cuda:7 here"),
    ],
)
@pytest.mark.parametrize("command", ["train", "analyze", "baseline", "check", "report", "ablate", "sweep"])
def test_a_device_that_is_not_there(call, trained, text, tmp_path, monkeypatch, command, device, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint, data = trained / "step-000003.pt", ("--data", text)
    kept = tmp_path / "kept.json"
    if command == "check":
        if device != "gpu":
            pytest.skip("takes a baseline to make: once is enough")
        made = ("baseline", checkpoint, *data, "--tokens", 1024, "--probe", "surprise", "--output", kept)
        assert call(*made).code == 0
    arguments = {
        "train": ("--preset", "nano", "--steps", 1, *data, "--out", tmp_path / "run"),
        "analyze": (checkpoint, *data, "--probe", "surprise"),
        "baseline": (checkpoint, *data, "--output", tmp_path / "new.json"),
        "check": (checkpoint, "--baseline", kept),
        "report": (checkpoint, *data, "-o", tmp_path / "page.html"),
        "ablate": ("--preset", "nano", "--steps", 1, *data, "--out", tmp_path / "grid"),
        "sweep": ("--preset", "nano", "--steps", 1, *data, "--threshold", 1, "--out", tmp_path / "grid"),
    }
    before = sorted(tmp_path.iterdir())
    code, _, said = call(command, *arguments[command], "--device", device)
    assert (code, words in " ".join(said.split())) == (2, True), said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_run_keeps_its_precision(call, text, tmp_path):
    options = ("train", "--preset", "nano", "--data", text, "--device", "cpu", "--out", tmp_path / "run")
    assert call(*options, "--steps", 1, "--precision", "bf16").code == 0
    assert call(*options, "--steps", 2, "--resume").code == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["train"]["precision"], record["device"], record["train"]["steps"]) == ("bf16", "cpu", 2)
    code, _, said = call(*options, "--steps", 3, "--resume", "--precision", "float32")
    assert (code, "precision was 'bf16', is 'float32'" in " ".join(said.split())) == (2, True), said
    code, _, said = call(*options, "--steps", 3, "--resume", "--precision", "fp8")
    assert (code, "must be float32 or bf16" in said) == (2, True), said
