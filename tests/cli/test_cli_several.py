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


@pytest.mark.parametrize(
    ("defect", "status", "words"),
    [
        ("nan:1:3", 4, "training stopped at step 3: the loss is nan"),
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
