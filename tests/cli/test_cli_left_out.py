"""A sequence that is not finite, on the command line: status 3, named, in no number."""

import json
import math

import pytest

from hopeprobe.model.subject import HopeSubject
from hopeprobe.tokens import EvalWindows, load_tokens

MOST = ("--split", "all", "--tokens", 1500, "--probe", "surprise")


@pytest.fixture
def spoil(monkeypatch, text):
    """Make the first token of one document's window what no number is."""
    data = load_tokens(str(text))
    batch = next(iter(EvalWindows(data, "all", context=32, tokens=1500, batch=100)))
    mark = batch.tokens[5, :25].tolist()
    assert sum(row[:25] == mark for row in batch.tokens.tolist()) == 1
    plain = HopeSubject.run

    def run(self, tokens, lengths=None, state=None):
        rows = [i for i, row in enumerate(tokens.tolist()) if row[:25] == mark]

        def edit(tensor, hook):
            tensor = tensor.clone()
            tensor[rows, 0] = math.nan
            return tensor

        with self.module.hooks([("hook_embed", edit)] if rows else []):
            return plain(self, tokens, lengths, state)

    def plant():
        monkeypatch.setattr(HopeSubject, "run", run)

    return plant


def test_analyze_says_what_is_not_in_its_numbers(call, trained, text, spoil, tmp_path):
    spoil()
    done = call(
        "analyze",
        trained / "step-000003.pt",
        "--data",
        text,
        *MOST,
        "--format",
        "json",
        "--output",
        tmp_path / "r.json",
    )
    assert done.code == 3
    assert (
        "not measured: step-000003.pt: 1 of 47 windows left out, not finite: document 5, window from"
        in done.err
    )
    assert "layer 0" in done.err
    found = json.loads((tmp_path / "r.json").read_text())
    assert "1 of 47 windows left out" in found["checkpoint"]["missing"][0]
    assert all(row["n_tokens"] == 1500 - 32 and row["value"] is not None for row in found["results"])
    assert all("1 of 47 windows left out, not finite" in row["note"] for row in found["results"])


@pytest.mark.slow
def test_no_baseline_is_made_of_it_and_no_check_passes(call, trained, text, spoil, tmp_path):
    mech, last = tmp_path / "mech.json", trained / "step-000003.pt"
    assert call("baseline", last, "--data", text, *MOST, "--output", mech).code == 0
    spoil()
    refused = call("baseline", last, "--data", text, *MOST, "--output", tmp_path / "other.json")
    assert refused.code == 3
    assert "1 of 47 windows left out, not finite: document 5" in refused.err
    assert not (tmp_path / "other.json").exists()
    done = call("check", last, "--baseline", mech)
    assert done.code == 3, done.out
    assert "lost" in done.out
    assert "1 of 47 windows left out, not finite: document 5" in done.out + done.err
