"""The page on clusters: its commands run, its files are what Slurm's and Kubernetes' shells would run."""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from hopeprobe.cli.app import app

FOLDER = Path(__file__).parents[2] / "examples/cluster"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


def job():
    (found,) = [one for one in yaml.safe_load_all((FOLDER / "job.yaml").read_text()) if one["kind"] == "Job"]
    return found["spec"]


def container():
    (only,) = job()["template"]["spec"]["containers"]
    return only


def understood(script):
    """The options of its `hopeprobe.cli train`, as the command line itself understands them."""
    line = script.replace("\\\n", " ").partition("-m hopeprobe.cli train")[2].splitlines()[0]
    words = [word for word in shlex.split(line) if not word.startswith("${resume")]
    values = {"$STEPS": "20000", "$PRESET": "small"}
    train = typer.main.get_command(app).commands["train"]
    return train.make_context("train", [values.get(word, word) for word in words]).params


@pytest.mark.parametrize("script", [(FOLDER / "job.sbatch").read_text(), container()["command"][-1]])
def test_scripts_are_shell_and_their_options_are_ours(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    options = understood(script)
    assert (options["steps"], options["preset"], options["batch"]) == (20000, "small", 32)


def test_the_job_is_of_as_many_pods_as_torchrun_is_told():
    environment = {one["name"]: one["value"] for one in container()["env"]}
    assert job()["completionMode"] == "Indexed"
    assert job()["completions"] == job()["parallelism"] == int(environment["NODES"])
    assert int(container()["resources"]["limits"]["nvidia.com/gpu"]) == int(environment["RANKS"])
    (service,) = [
        one for one in yaml.safe_load_all((FOLDER / "job.yaml").read_text()) if one["kind"] == "Service"
    ]
    assert environment["FIRST"] == f"hopeprobe-0.{service['metadata']['name']}"
    assert job()["template"]["spec"]["subdomain"] == service["metadata"]["name"]


@pytest.fixture
def machine(tmp_path):
    """A folder with a text, and an environment with torchrun and stand-ins for Slurm's commands."""
    commands = {
        "torchrun": f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"',
        "python": f'exec {shlex.quote(sys.executable)} "$@"',
        "srun": 'exec "$@"',
        "scontrol": "echo 127.0.0.1",
    }
    for name, body in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    with (tmp_path / "text.jsonl").open("w") as file:
        for i in range(60):
            file.write(json.dumps({"text": " ".join(f"{i * k} and {k}" for k in range(40))}) + "\n")
    own = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    own |= {
        "HOPEPROBE_CACHE": str(tmp_path / "cache"),
        "PRESET": "nano",
        "DATA": "text.jsonl",
        "OUT": "runs/mine",
    }
    return tmp_path, os.environ | own


def steps(folder):
    return [
        json.loads(line)["step"] for line in (folder / "runs/mine/metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_the_commands_of_the_page_run(machine):
    folder, environment = machine
    shown = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    assert len(shown) == 2
    for block in shown:
        done = subprocess.run(
            ["bash", "-euc", block], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "2"
    assert (folder / "runs/two/step-000004.pt").exists()


@pytest.mark.slow
def test_two_pods_meet_and_slurm_goes_on(machine):
    """Two steps as two pods of one rank, then a third by Slurm's script, of one node with two ranks."""
    folder, environment = machine
    pod = {one["name"]: one["value"] for one in container()["env"]} | {
        "NODES": "2", "RANKS": "1", "FIRST": "127.0.0.1", "PORT": "29653", "STEPS": "2"
    }  # fmt: skip
    keep = ("HOPEPROBE_CACHE", "PRESET", "DATA", "OUT", "PATH", "OMP_NUM_THREADS")
    pods = [
        subprocess.Popen(
            container()["command"],
            cwd=folder,
            env=os.environ
            | pod
            | {name: environment[name] for name in keep}
            | {"JOB_COMPLETION_INDEX": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ended = [one.communicate(timeout=400)[1] for one in pods]
    assert [one.returncode for one in pods] == [0, 0], ended
    assert steps(folder) == [1, 2]
    assert json.loads((folder / "runs/mine/run.json").read_text())["ranks"] == 2
    slurm = {
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_CPUS_PER_TASK": "2",
    }
    done = subprocess.run(
        ["bash", FOLDER / "job.sbatch"],
        cwd=folder, env=environment | slurm | {"RANKS": "2", "STEPS": "3"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert steps(folder) == [1, 2, 3]
