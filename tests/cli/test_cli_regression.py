"""`hopeprobe baseline` and `hopeprobe check`: what they print and write, their statuses, and wrong input."""

import json
import os
from xml.etree import ElementTree as ET

import pytest

from hopeprobe.locks import file_lock

FEW = ("--split", "all", "--tokens", 1500, "--probe", "surprise")


@pytest.fixture(scope="module")
def mech(trained, text, tmp_path_factory):
    from hopeprobe.cli import run

    path = tmp_path_factory.mktemp("baseline") / "mech.json"
    given = ("--data", text, *FEW, "--output", path)
    assert run([str(word) for word in ("baseline", trained / "step-000003.pt", *given)]) == 0
    return path


def edited(path, to, change):
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    to.write_text(json.dumps(document), encoding="utf-8")
    return to


def shift_loss(document):
    for one in document["statistics"]:
        if one["statistic"] == "mean_loss":
            one["values"] = [one["values"][0] + 0.5]


def test_the_same_checkpoint_passes(call, trained, mech):
    done = call("check", trained / "step-000003.pt", "--baseline", mech)
    assert done.code == 0, done.out
    assert "passed:" in done.out
    assert "all as in the baseline" in done.out


def test_two_baselines_in_one_file_are_one_too_many(call, trained, text, mech):
    before = mech.read_bytes()
    with file_lock(mech):
        done = call("baseline", trained / "step-000003.pt", "--data", text, *FEW, "--output", mech)
    assert done.code == 2
    assert f"{mech} is in use by process {os.getpid()} on " in done.err
    assert done.err.endswith("let it end or stop it, or choose another file\n")
    assert mech.read_bytes() == before


def test_every_shows_what_did_not_move(call, trained, mech):
    done = call("check", trained / "step-000003.pt", "--baseline", mech, "--every", "--batch", 5)
    assert done.code == 0
    assert "surprise/mean_loss" in done.out


def test_a_regression_is_status_1_and_written_where_asked(call, trained, mech, tmp_path, monkeypatch):
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    moved = edited(mech, tmp_path / "moved.json", shift_loss)
    files = ("--junit", tmp_path / "junit.xml", "--output", tmp_path / "check.json", "--format", "json")
    done = call("check", trained / "step-000003.pt", "--baseline", moved, *files, "--github")
    assert done.code == 1
    assert done.out.startswith("::error title=surprise/mean_loss/live moved::")
    found = json.loads((tmp_path / "check.json").read_text())
    assert (found["exit_code"], found["statistics"][0]["statistic"]) == (1, "mean_loss")
    assert ET.parse(tmp_path / "junit.xml").getroot().get("failures") == "1"
    shown = call("check", trained / "step-000003.pt", "--baseline", moved, "--output", tmp_path / "check.tsv")
    assert shown.code == 1
    assert "regression:" in shown.out
    assert "::error" not in shown.out
    assert (tmp_path / "check.tsv").read_text().splitlines()[1].startswith("surprise/mean_loss/live\t")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    in_actions = call("check", trained / "step-000003.pt", "--baseline", moved, "--format", "json")
    assert "::error" in in_actions.err
    assert json.loads(in_actions.out)["exit_code"] == 1, "standard output stays JSON"


def test_another_training_step_has_moved(call, trained, mech):
    done = call("check", trained / "step-000000.pt", "--baseline", mech)
    assert done.code == 1
    assert "moved" in done.out


def test_what_is_no_longer_measured_is_status_3(call, trained, mech, tmp_path):
    def ask_for_more(document):
        extra = dict(document["statistics"][0], statistic="no_longer_there")
        document["statistics"].append(extra)

    done = call(
        "check", trained / "step-000003.pt", "--baseline", edited(mech, tmp_path / "more.json", ask_for_more)
    )
    assert done.code == 3
    assert "lost" in done.out
    assert "not all was measured" in done.out


def test_the_baseline_says_what_it_can_find(call, trained, text, tmp_path):
    given = ("--data", text, *FEW)
    output = ("--output", tmp_path / "mech.json", "--tolerance", "mean_loss=0.5")
    done = call("baseline", trained / "step-000003.pt", *given, *output)
    assert done.code == 0
    assert "smallest change found" in done.out
    assert "of one checkpoint on 1500 tokens of text.jsonl" in done.out
    assert f"hopeprobe check CKPT --baseline {tmp_path / 'mech.json'}" in done.out
    (loss,) = [
        one
        for one in json.loads((tmp_path / "mech.json").read_text())["statistics"]
        if one["statistic"] == "mean_loss"
    ]
    assert loss["tolerance"] == 0.5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tolerance", "mean_loss"), "must be STATISTIC=NUMBER"),
        (("--tolerance", "mean_loss=much"), "must be STATISTIC=NUMBER"),
        (("--tolerance", "=3"), "must be STATISTIC=NUMBER"),
        (("--tolerance", "mean_los=3"), "did you mean 'mean_loss'"),
        (("--tolerance", "mean_loss=-3"), "must be 0 or more"),
        (("--probe", "surprize"), "surprise"),
    ],
)
def test_a_baseline_of_what_cannot_be(more, message, call, trained, text, tmp_path):
    given = ("--data", text, *FEW)
    done = call("baseline", trained / "step-000003.pt", *given, *more, "--output", tmp_path / "mech.json")
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "mech.json").exists()


def test_wrong_files_for_a_check(call, trained, text, mech, tmp_path):
    checkpoint = trained / "step-000003.pt"
    empty = tmp_path / "empty.json"
    empty.write_text("")
    cut = tmp_path / "cut.pt"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text() + json.dumps({"text": "one more"}) + "\n")
    for given, message in [
        ((checkpoint, "--baseline", empty), f"{empty} is not a baseline"),
        ((checkpoint, "--baseline", tmp_path / "none.json"), "hopeprobe baseline"),
        ((cut, "--baseline", mech), "cut.pt"),
        ((checkpoint, "--baseline", mech, "--data", other), "not the tokens of the baseline"),
        ((checkpoint, "--baseline", mech, "--format", "tabel"), "did you mean 'table'"),
        ((checkpoint, checkpoint, "--baseline", mech), "a baseline of one"),
    ]:
        done = call("check", *given)
        assert done.code == 2, given
        assert message in done.err, done.err
        assert "Traceback" not in done.err


@pytest.mark.slow  # three trainings
def test_several_seeds(call, text, tmp_path):
    """A grid's checkpoints: the third seed is within what the first two do; with two, little can be found."""
    from hopeprobe.model.config import ModelConfig
    from hopeprobe.model.train import TrainConfig, train
    from hopeprobe.tokens import load_tokens

    config = ModelConfig(dim=16, layers=1, context=32, heads=2)
    for seed in range(3):
        train(
            config,
            TrainConfig(steps=2, batch=2, eval_tokens=64, seed=seed),
            load_tokens(str(text)),
            tmp_path / str(seed),
        )
    paths = [tmp_path / str(seed) / "step-000002.pt" for seed in range(3)]
    given = ("--data", text, *FEW)
    done = call("baseline", *paths[:2], *given, "--output", tmp_path / "mech.json")
    assert done.code == 0, done.err
    assert "of 2 seeds" in done.out
    assert "changes of their size can go unseen" in done.out
    checked = call("check", paths[2], "--baseline", tmp_path / "mech.json")
    assert checked.code == 0, checked.out
    assert "tolerances are below what 2 seeds can show" in checked.out
    twice = call("baseline", paths[0], paths[0], *given, "--output", tmp_path / "twice.json")
    assert twice.code == 2
    assert not (tmp_path / "twice.json").exists()
