"""Options that several commands take are declared once."""

import ast
from collections import Counter
from pathlib import Path

import typer

from hopeprobe.cli.app import app

CLI = Path(__file__).parents[2] / "cli"


def declarations(source):
    """Every `typer.Option(...)` and `typer.Argument(...)`, as it would be written without regard to its layout."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("typer.Option", "typer.Argument"):
            yield ast.unparse(node)


def test_none_is_declared_twice():
    found = Counter(
        one for path in CLI.glob("*.py") for one in declarations(path.read_text(encoding="utf-8"))
    )
    assert len(found) > 40
    assert [one for one, count in found.items() if count > 1] == []


def test_every_command_is_there_in_the_order_of_use():
    commands = typer.main.get_command(app).commands
    assert list(commands) == [
        "demo", "train", "analyze", "baseline", "check", "report", "export", "hooks", "probes", "params",
        "ablate", "sweep", "compare",
    ]  # fmt: skip
    assert all(command.help for command in commands.values())
