"""Real processes, interrupted from the first import to the last file: status 130, one line, and whole files or none."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # every moment is a process that loads torch

LINE = "hopeprobe: interrupted; every file written so far is whole"
# A program started where interrupts are ignored (in the background, by nohup) ignores them too.
PROGRAM = """
import atexit, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
moment, what = sys.argv[1:3]
done = []

def interrupt():
    done.append(moment)
    os.kill(os.getpid(), signal.SIGINT)

def hook(event, given):
    if event == moment and what in str(given) and not done:
        interrupt()

from hopeprobe.cli import main
sys.addaudithook(hook)
if moment == "exit":
    atexit.register(interrupt)
main(sys.argv[3:])
"""
FEW = ("--tokens", "600", "--probe", "surprise")
#: What each command writes, in this order.
WRITTEN = {
    "baseline": ["mech.json"],
    "check": ["junit.xml", "check.json"],
    "report": ["page.html", "results.csv", "surprise.svg", "surprise.tex"],
    "export": ["weights.safetensors"],
}


@pytest.fixture(scope="module")
def given(trained, text, tmp_path_factory):
    """The arguments of each command but for the folder that it writes to."""
    from hopeprobe.cli import run

    checkpoint, mech = str(trained / "step-000003.pt"), str(tmp_path_factory.mktemp("mech") / "mech.json")
    few = ("--data", str(text), *FEW)
    assert run(["baseline", checkpoint, *few, "--output", mech]) == 0
    return {
        "baseline": lambda out: (checkpoint, *few, "--output", out / "mech.json"),
        "check": lambda out: (checkpoint, "--baseline", mech, "--junit", out / "junit.xml", "--format", "json",
                              "--output", out / "check.json"),
        "report": lambda out: (checkpoint, *few, "--output", out / "page.html", "--files", out),
        "export": lambda out: (checkpoint, "--output", out / "weights.safetensors"),
    }  # fmt: skip


def started(command, arguments, moment, what=""):
    call = [sys.executable, "-c", PROGRAM, moment, what, command, *map(str, arguments)]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """What each command writes when it is left alone, or interrupted when all is done, which changes nothing."""
    found = {}
    for command, arguments in given.items():
        out = tmp_path_factory.mktemp("whole")
        process = started(command, arguments(out), "exit")
        _, said = process.communicate()
        assert process.returncode == 0, said
        assert "Traceback" not in said
        assert "interrupted" not in said
        found[command] = contents(out)
        assert found[command].keys() >= set(WRITTEN[command])
    return found


def check_interrupted(process, said, out, whole, command):
    """The status, the line, and that each file is as before or as it should be; how many are."""
    assert process.returncode == 130, said
    assert [line for line in said.splitlines() if not line.startswith("step-000003.pt, ")] == [LINE]
    left = contents(out)
    assert left.keys() <= whole[command].keys(), "nothing hidden, nothing half written"
    new = {name for name, content in left.items() if content == whole[command][name]}
    assert {name for name, content in left.items() if content == b"old"} == left.keys() - new
    assert list(Path(os.environ["HOPEPROBE_CACHE"]).rglob(".*")) == []
    return new


MOMENTS = [
    *((command, "import", f"'{name}'") for command in WRITTEN for name in ("typer.core", "torch", "torch.nn")),
    *((command, "open", "step-000003.pt") for command in WRITTEN),
    ("report", "import", "'matplotlib.figure'"),
    *((command, moment, f".{name}.") for command, names in WRITTEN.items() for name in names
      for moment in ("open", "os.rename")),
]  # fmt: skip


@pytest.mark.parametrize(("command", "moment", "what"), MOMENTS)
def test_interrupted_by_itself(command, moment, what, given, whole, tmp_path):
    """As a module loads, the checkpoint is read, a file is made, and as it is about to replace the earlier one."""
    for name in WRITTEN[command]:
        (tmp_path / name).write_bytes(b"old")
    process = started(command, given[command](tmp_path), moment, what)
    _, said = process.communicate()
    new = check_interrupted(process, said, tmp_path, whole, command)
    name = what.strip(".")
    before = WRITTEN[command][: WRITTEN[command].index(name)] if name in WRITTEN[command] else []
    assert new & set(WRITTEN[command]) == set(before)


@pytest.mark.parametrize("command", ["baseline", "check", "report"])
def test_interrupted_from_outside_while_it_measures(command, given, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # two batches at once, each in a thread
    process = started(command, given[command](tmp_path), "never")
    first = process.stderr.readline()
    assert first.startswith("step-000003.pt, live")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert check_interrupted(process, said, tmp_path, whole, command) == set()
