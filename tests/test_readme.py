"""README and guide, executed in an empty folder: the README from top to bottom, then each page of the guide by itself.

Every command ends with status 0 and every snippet runs; a page needs nothing but what `hopeprobe demo` made.
"""

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


README = ROOT / "README.md"
GUIDE = sorted((ROOT / "examples" / "guide").glob("*.md"))
LINK = re.compile(r"\]\(([^)#]+)\)")


def blocks(page=README):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


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


def test_nothing_else_is_in_the_pages():
    assert len(GUIDE) > 5
    for page in (README, *GUIDE):
        for kind, text in blocks(page):
            assert kind in ("bash", "python"), page
            allowed = ("hopeprobe ", "make ") if page == README else ("hopeprobe ",)
            assert kind == "python" or all(ln.startswith(allowed) for ln in text.splitlines()), page


def test_links_lead_somewhere_and_every_page_of_the_guide_is_linked():
    for page in (README, *GUIDE):
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page, target)
    linked = {(ROOT / target).resolve() for target in LINK.findall(README.read_text(encoding="utf-8"))}
    assert set(GUIDE) <= linked


def test_the_readme_stays_a_front_page():
    """Three ways of use, and where the rest is told."""
    assert len(README.read_bytes()) < 11_000


def prose(name="checks"):
    return " ".join((ROOT / "examples" / "guide" / f"{name}.md").read_text(encoding="utf-8").split())


def test_false_alarms_are_those_that_were_measured():
    """Of each pair in the docstring the second is at a tolerance of two standard deviations, the default."""
    measured = re.findall(
        r"^    ([\w', .=σ()]+?)  +((?:[\d.]+, [\d.]+ % *){3,})$", drift.__doc__, re.MULTILINE
    )
    page = (ROOT / "examples" / "guide" / "checks.md").read_text(encoding="utf-8")
    assert len(measured) == 4
    for values, pairs in measured:
        shares = " | ".join(f"{second} %" for _, second in re.findall(r"([\d.]+), ([\d.]+) %", pairs))
        assert f"| {values} | {shares} |" in page


def test_the_statuses_of_analyze_are_those_that_it_has():
    said = re.search(
        r"`analyze` compares with nothing, so it ends with (\d), (\d) or (\d), never with (\d);", prose()
    )
    ends = {report_missing(Results(checkpoint={"missing": missing})) for missing in ([], ["x"])}
    assert set(map(int, said.groups()[:3])) == ends | {BadInputError.exit_code}
    assert said[4] == "1"


def execute(page, folder):
    """Run a page's commands, then its snippets as one script; gives seconds and output of each command."""
    command = [sys.executable, "-c", "import sys; from hopeprobe.cli import main; main(sys.argv[1:])"]
    snippets, seconds, printed = [], {}, {}
    for kind, text in blocks(page):
        if kind == "python":
            snippets.append(text)
            continue
        for line in text.splitlines():
            if line.startswith("make "):
                continue
            started = time.monotonic()
            done = subprocess.run(
                [*command, *shlex.split(line)[1:]], cwd=folder, capture_output=True, text=True
            )
            seconds[line] = time.monotonic() - started
            printed[line] = done.stdout
            assert done.returncode == 0, f"{page.name}: {line}\n{done.stdout}\n{done.stderr}"
            assert done.stdout or "--output" in line, line
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{page.name}: {done.stderr}"
    assert done.stderr == "", f"{page.name}: {done.stderr}"
    return seconds, printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_and_snippet(tmp_path):
    """What the demo promises holds on the way: below the unigram model, norms in range, trained weights recognised."""
    seconds, printed = execute(README, tmp_path)
    for page in GUIDE:
        seconds |= execute(page, tmp_path)[0]
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
