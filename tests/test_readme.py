"""The README, executed from top to bottom in an empty folder: every command and every snippet, in order."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hopeprobe.cli.analysis import report_missing
from hopeprobe.errors import BadInputError
from hopeprobe.results import Results
from hopeprobe.stats import drift

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks():
    return BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def test_make_targets_exist():
    """`make demo` runs `hopeprobe demo`, which is executed below; `make test` runs this."""
    for line in [
        ln for kind, text in blocks() if kind == "bash" for ln in text.splitlines() if ln.startswith("make ")
    ]:
        planned = subprocess.run(
            ["make", "--dry-run", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True
        )
        assert planned.returncode == 0, planned.stderr
        assert {"demo": "hopeprobe demo", "test": "pytest"}[line.split()[1]] in planned.stdout


def test_nothing_else_is_in_the_readme():
    assert {kind for kind, _ in blocks()} == {"bash", "python"}
    for kind, text in blocks():
        assert kind == "python" or all(ln.startswith(("hopeprobe ", "make ")) for ln in text.splitlines())


def prose():
    return " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_false_alarms_are_those_that_were_measured():
    """Of each pair in the docstring the second is at a tolerance of two standard deviations, the default."""
    measured = " ".join(drift.__doc__.split())
    for name, said in (
        ("lognormal values (σ = 0.5) ", "{} of checks where values are lognormal (σ = 0.5)"),
        ("Student's t of 3 degrees of freedom ", "{} where they are Student's t of 3 degrees of freedom"),
    ):
        pairs = re.search(re.escape(name) + r"((?:[\d.]+ % and [\d.]+ %(?:, )?){3})", measured)
        three, five, ten = re.findall(r"and ([\d.]+ %)", pairs[1])
        assert said.format(f"{three}, {five} and {ten}") in prose()
    normal = re.search(r"at most ([\d.]+ % and [\d.]+ % of 3 .*? of 10)", measured)[1]
    most = max(map(float, re.findall(r"([\d.]+) %", normal)))
    assert (
        "where nothing changed and seeds are spread normally, one check in a hundred raises an alarm "
        f"(in simulated checks of sixty numbers {most} % at most)"
    ) in prose()


def test_the_statuses_of_analyze_are_those_that_it_has():
    said = re.search(
        r"`analyze` compares with nothing, so it ends with (\d), (\d) or (\d), never with (\d);", prose()
    )
    ends = {report_missing(Results(checkpoint={"missing": missing})) for missing in ([], ["x"])}
    assert set(map(int, said.groups()[:3])) == ends | {BadInputError.exit_code}
    assert said[4] == "1"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_and_snippet(tmp_path):
    """What the demo promises holds on the way: below the unigram model, norms in range, trained weights recognised."""
    command = (
        shlex.quote(sys.executable) + " -c 'import sys; from hopeprobe.cli import main; main(sys.argv[1:])'"
    )
    snippets, seconds, printed = [], {}, {}
    for kind, text in blocks():
        if kind == "python":
            snippets.append(text)
            continue
        for line in text.splitlines():
            if line.startswith("make "):
                continue
            started = time.monotonic()
            call = [*shlex.split(command), *shlex.split(line)[1:]]
            done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
            seconds[line] = time.monotonic() - started
            printed[line] = done.stdout
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            assert done.stdout or "--output" in line, line
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    print({line: round(s) for line, s in seconds.items()})

    demo = tmp_path / "hopeprobe-demo"
    assert all((demo / name).stat().st_size > 10_000 for name in ("loss.png", "cms-similarity.png"))
    metrics = [json.loads(line) for line in (demo / "metrics.jsonl").read_text().splitlines()]
    assert 0.5 < metrics[-1]["norm_ratio"] < 2
    said = re.search(
        r"held-out loss ([\d.]+) live, ([\d.]+) frozen, ([\d.]+) by token frequencies",
        printed["hopeprobe demo"],
    )
    live, frozen, frequencies = map(float, said.groups())
    assert max(live, frozen) < frequencies
    results = json.loads((demo / "results.json").read_text())
    verdicts = {(r["probe"], r["statistic"]): r["verdict"] for r in results["results"]}
    assert "untrained" not in verdicts.values()
    loss = next(r["value"] for r in results["results"] if r["statistic"] == "frozen_loss")
    unigram = next(n["value"] for n in results["nulls"] if n["null_kind"] == "unigram")
    assert loss < unigram
    assert verdicts["integrity", "frozen_loss"] == "learned"
    assert any(r["verdict"] == "learned" for r in results["results"] if r["probe"] == "cms-similarity")
