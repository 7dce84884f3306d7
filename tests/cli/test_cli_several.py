"""The command line under torchrun itself: one run, one message, one status, and an end where a rank is lost."""

import json
from pathlib import Path

import pytest

from hopeprobe.cli import run
from hopeprobe.model.checkpoint import read, step_path

pytestmark = pytest.mark.slow

CLI = ("-m", "hopeprobe.cli")
DEFECT = Path(__file__).with_name("ranks_defect.py")
#: Above what starting, importing and ending take on a machine that others use too; a hang takes half an hour.
SECONDS = 120


def training(text, folder, *more, steps=4):
    known = ("--preset", "nano", "--batch", 2, "--steps", steps, "--checkpoint-every", 2, "--eval-every", 4)
    return ("train", *known, "--data", text, "--out", folder, *more)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert (
        run(
            [
                str(a)
                for a in training(
                    text, folder, "--probe", "surprise", "--probe-every", 4, "--probe-tokens", 512
                )
            ]
        )
        == 0
    )
    return folder


def same(folder, alone, start=0):
    for one, two in zip(lines(alone), lines(folder), strict=True):
        assert one.keys() - {"probes"} == two.keys() - {"probes"}
        for key in one.keys() - {"probes", "tokens_per_s"}:
            assert two[key] == pytest.approx(one[key], abs=1e-5, rel=0), (key, one["step"])


def failure(tmp_path):
    """What torchrun hands on of the rank that failed first."""
    return json.loads((tmp_path / "failure.json").read_text())["message"]


def said(ended):
    return [line for line in ended.err.splitlines() if line.startswith("hopeprobe: ")]


def since_defect(ended):
    """Seconds from the defect to the end of torchrun."""
    (at,) = [line.split()[-1] for line in ended.err.splitlines() if line.startswith("defect at")]
    return ended.at - float(at)


def test_train_watched_and_analyze(torchrun, text, alone, tmp_path):
    """Two ranks train and are watched by a probe, then measure: files and output of one."""
    folder = tmp_path / "run"
    options = ("--probe", "surprise", "--probe-every", 4, "--probe-tokens", 512)
    ended = torchrun(2, *CLI, *training(text, folder, *options))
    assert ended.code == 0, ended.err
    assert ended.err.count("training: loss") == ended.err.count(", step 1/4") + ended.err.count(", step 4/4")
    assert ended.out.count("next: hopeprobe analyze") == 1
    same(folder, alone)
    probes = [lines(each)[-1]["probes"] for each in (alone, folder)]
    assert probes[0].keys() == probes[1].keys()
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}
    assert json.loads((folder / "run.json").read_text())["ranks"] == 2
    measuring = ("analyze", alone / "step-000004.pt", "--probe", "surprise", "--data", text, "--tokens", 512)
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert run([str(a) for a in (*measuring, "--format", "json", "--output", one)]) == 0
    cache = {"HOPEPROBE_CACHE": str(tmp_path / "cache")}
    ended = torchrun(2, *CLI, *measuring, "--format", "json", "--output", two, environment=cache)
    assert ended.code == 0, ended.err
    ended = torchrun(2, *CLI, *measuring, environment=cache)
    assert ended.code == 0, ended.err
    assert ended.out.count("mean_loss") >= 1
    documents = [json.loads(path.read_text()) for path in (one, two)]
    for table in ("results", "nulls"):
        rows = [document[table] for document in documents]
        assert [row["statistic"] for row in rows[0]] == [row["statistic"] for row in rows[1]]
        for a, b in zip(*rows, strict=True):
            assert b["value"] == (
                a["value"] if a["value"] is None else pytest.approx(a["value"], abs=1e-9, rel=1e-9)
            )
    assert [r["verdict"] for r in documents[0]["results"]] == [r["verdict"] for r in documents[1]["results"]]


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_rank_that_dies_ends_the_job_and_a_restart_continues(how, torchrun, text, alone, tmp_path):
    """At the first forward pass of step 4: the checkpoint of step 2 is there, and the run goes on from it."""
    folder = tmp_path / "run"
    # One forward pass a step, nothing held out before step 4.
    ended = torchrun(2, DEFECT, *training(text, folder), environment={"DEFECT": f"{how}:1:4"})
    assert ended.code == 1
    assert ended.seconds < SECONDS
    print(f"\n{how}: torchrun ended {since_defect(ended):.1f} s after it")
    assert ("Signal 9 (SIGKILL)" if how == "kill" else "a defect of ours") in ended.err
    assert len(said(ended)) <= (how == "kill"), ended.err  # torchrun may be faster than the other rank
    assert [line["step"] for line in lines(folder)] == [1, 2, 3]
    again = torchrun(2, *CLI, *training(text, folder, "--resume"))
    assert again.code == 0, again.err
    same(folder, alone)
    ends = [read(step_path(each, 4)).optimizer["state"].keys() for each in (folder, alone)]
    assert ends[0] == ends[1]


def test_a_rank_that_does_not_answer_is_given_up(torchrun, text, tmp_path):
    limits = {"DEFECT": "stop:1:2", "HOPEPROBE_RANK_TIMEOUT": "20"}
    ended = torchrun(2, DEFECT, *training(text, tmp_path / "run"), environment=limits)
    assert ended.code == 1
    print(f"\nstop: torchrun ended {since_defect(ended):.1f} s after it")
    (message,) = said(ended)
    assert "did not answer within 20 s (HOPEPROBE_RANK_TIMEOUT)" in message
    assert "--resume" in message


@pytest.mark.parametrize(
    ("defect", "status", "words"),
    [
        ("nan:1:3", 4, "training stopped at step 3: the loss is nan"),
        ("drift:1:1", 2, "rank 1 has another set of weights, after as many steps than rank 0"),
    ],
)
def test_what_goes_wrong_on_one_rank_ends_all_with_one_message(
    defect, status, words, torchrun, text, tmp_path
):
    ended = torchrun(2, DEFECT, *training(text, tmp_path / "run"), environment={"DEFECT": defect})
    assert ended.code == 1
    assert ended.seconds < SECONDS
    (message,) = said(ended)
    assert words in message
    assert failure(tmp_path)["errorCode"] == status
    assert words in failure(tmp_path)["message"]


def test_bad_input_is_told_once(torchrun, text, tmp_path):
    """By whoever meets it: all ranks, rank 0 alone, the parser; and what one process does is refused."""
    missing = torchrun(2, *CLI, *training("nowhere.jsonl", tmp_path / "run"))
    assert missing.code == 1
    (message,) = said(missing)
    assert "there is no file 'nowhere.jsonl'" in message
    assert failure(tmp_path)["errorCode"] == 2
    few = torchrun(3, *CLI, *training(text, tmp_path / "run"))
    (message,) = said(few)
    assert "a batch of 2 windows cannot be cut over 3 ranks" in message
    (tmp_path / "file").touch()
    place = torchrun(2, *CLI, *training(text, tmp_path / "file"))
    (message,) = said(place)
    assert "is a file, not a folder" in message
    assert failure(tmp_path)["errorCode"] == 2
    option = torchrun(2, *CLI, "train", "--stepz", 4)
    assert option.err.count("\nError: No such option: --stepz") == 1
    assert "NoSuchOption" not in option.err  # no traceback of ours, torchrun has one of its own
    assert failure(tmp_path)["errorCode"] == 2
    refused = torchrun(2, *CLI, "demo")
    (message,) = said(refused)
    assert "demo runs in one process: start it without torchrun" in message
    assert failure(tmp_path)["errorCode"] == 2
