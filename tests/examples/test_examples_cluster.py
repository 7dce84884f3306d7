"""The page on clusters: its commands run, its files are what Slurm's and Kubernetes' shells would run."""

import shlex
import subprocess
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
