"""The layout's promises: which way imports run, what a wheel holds, and that file sizes stay readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "hopeprobe": {"hopeprobe"},
    "model": {
        "hopeprobe.model",
        "hopeprobe.hooks",
        "hopeprobe.tokens",
        "hopeprobe.errors",
        "hopeprobe.subject",
        "hopeprobe.files",
        "hopeprobe.locks",
        "hopeprobe.devices",
        "hopeprobe.torch_files",
        "hopeprobe.safetensors_files",
        "hopeprobe.documents",
        "hopeprobe.ranks",
    },
    "cli": {"hopeprobe"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_run_one_way(folder):
    checked = 0
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path):
            if name.split(".")[0] != "hopeprobe":
                continue
            checked += 1
            assert (
                any(name == a or name.startswith(a + ".") for a in ALLOWED[folder]) or name == "hopeprobe"
            ), (path, name)
            if folder == "hopeprobe":
                assert not name.startswith(("hopeprobe.model", "hopeprobe.cli")), (path, name)
            if folder == "model":
                assert not name.startswith("hopeprobe.cli"), (path, name)
    assert checked


def test_no_other_top_level_folder():
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {
        line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line and not line.startswith(".")
    }
    assert folders <= {"hopeprobe", "model", "cli", "tests", "examples"}


def test_every_package_is_in_the_wheel():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for init in [
        *(ROOT / "hopeprobe").rglob("__init__.py"),
        ROOT / "model/__init__.py",
        ROOT / "cli/__init__.py",
    ]:
        parts = init.parent.relative_to(ROOT).parts
        name = ".".join(parts if parts[0] == "hopeprobe" else ("hopeprobe", *parts))
        assert f'"{name}"' in text, name
