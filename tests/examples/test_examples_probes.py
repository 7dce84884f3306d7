"""A page for each probe, made from its docstring: the question, definition, nulls, how to read it, how it fails."""

import importlib.util
import re
from pathlib import Path

import pytest

from hopeprobe.probes import PROBES
from hopeprobe.probes.definitions import shared_definitions

PAGES = Path(__file__).parents[2] / "examples" / "probes"


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make", PAGES / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_what_the_docstrings_say(make, tmp_path):
    """`python examples/probes/make.py` writes them anew."""
    make.main(tmp_path)
    assert sorted(path.name for path in PAGES.glob("*.md")) == sorted(f"{name}.md" for name in PROBES)
    for path in tmp_path.iterdir():
        assert (PAGES / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize("name", PROBES)
def test_a_page_has_every_part(name):
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    for heading in ("Definition", "How to read it", "How it fails", "Cost"):
        (part,) = re.findall(rf"^## {heading}\n\n(.+?)\n\n", text, re.MULTILINE | re.DOTALL)
        assert len(part) > 30, heading
    assert text.count("\n## Nulls\n") == 1 or "\nNulls " in text or " Null of " in text, (
        "in a part of its own or shared"
    )
    for statistic in PROBES[name].statistics:
        assert statistic.removesuffix("_by_position") in text, statistic


def test_what_a_probe_shares_is_told_with_it():
    assert list(shared_definitions(PROBES["selfmod-drift"])) == ["movement.py"]
    assert "displacement        ‖θ_n − θ_0‖" in shared_definitions(PROBES["selfmod-drift"])["movement.py"]
    assert shared_definitions(PROBES["surprise"]) == {}


def test_the_readme_leads_to_each():
    readme = (PAGES.parents[1] / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(examples/probes/([\w-]+)\.md\)", readme)) == set(PROBES)
