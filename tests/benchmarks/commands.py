"""What a user waits for: whole processes of the installed command."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import clock
from clock import Row


def _run(command: list[str], folder: str, cache: str) -> None:
    subprocess.run(
        command, cwd=folder, env={**os.environ, "HOPEPROBE_CACHE": cache}, check=True, capture_output=True
    )


def rows(environment: Path, turns: int, demo: bool) -> list[Row]:
    """`environment` is the folder with the project's own `python` and `hopeprobe`."""
    found = []
    for name, command, goal in (
        ("import hopeprobe", ["python", "-c", "import hopeprobe"], 0.15),
        ("hopeprobe --help", ["hopeprobe", "--help"], 0.4),
        ("hopeprobe demo", ["hopeprobe", "demo"], 90.0),
    ):
        if name == "hopeprobe demo" and not demo:
            continue
        with tempfile.TemporaryDirectory() as folder:
            whole = [str(environment.absolute() / command[0]), *command[1:]]
            repeats = 1 if name == "hopeprobe demo" else 3 * turns
            if repeats > 1:
                _run(whole, folder, folder)
            took = statistics.median(
                clock.once(lambda w=whole, f=folder: _run(w, f, f)) for _ in range(repeats)
            )
        found.append(Row(name, took, goal=f"<= {goal:g} s", met=took <= goal))
    return found
