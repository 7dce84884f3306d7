"""The API reference is made from docstrings, and holds every public module."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # every module is imported and written
def test_the_reference_has_every_module(tmp_path):
    command = [sys.executable, "-W", "error", ROOT / "examples" / "reference.py", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for folder, package in (
        ("hopeprobe", "hopeprobe"),
        ("model", "hopeprobe/model"),
        ("cli", "hopeprobe/cli"),
    ):
        modules = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")]
        modules = [module for module in modules if module.name != "__main__.py"]  # pdoc leaves it out
        assert modules
        for module in modules:
            page = (tmp_path / package / module).with_suffix(".html")
            page = page.parent.with_suffix(".html") if module.name == "__init__.py" else page
            assert page.stat().st_size > 1000, module
    assert "retention" in (tmp_path / "hopeprobe" / "probes" / "meta_fast.html").read_text(encoding="utf-8")
