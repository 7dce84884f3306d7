"""The `builtin` corpus: text that every Python ships, so that nothing has to be downloaded.

The language's documentation topics (`pydoc_data.topics`, what `help("assert")` prints) and the docstrings of
the standard library, one document a module. Sources are parsed, never imported. About 600k GPT-2 tokens; the
text varies with the Python version, so what is measured on it names that version.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sysconfig
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hopeprobe.errors import BadInputError
from hopeprobe.tokens.document import Document

if TYPE_CHECKING:
    from collections.abc import Iterator

MIN_CHARACTERS = 200
"""Shorter documents are left out: most are one generated line that eighty codec modules share."""

_TOPICS = "pydoc_data/topics.py"
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@dataclass(frozen=True)
class BuiltinSource:
    """The `builtin` corpus as a `Source`; `root` is the folder of the standard library's sources."""

    root: Path = field(default_factory=_stdlib)
    name: str = "builtin"
    default_limit: int | None = None

    def key(self) -> str:
        """SHA-256 (hex) over the names and bytes of all files read (a fifth of a second)."""
        digest = hashlib.sha256(f"builtin {MIN_CHARACTERS}".encode())
        for relative, path in self._files():
            digest.update(f"\n{relative}\n".encode())
            digest.update(hashlib.sha256(_read(path)).digest())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """`{"kind": "builtin", "python": version}`."""
        return {"kind": "builtin", "python": platform.python_version()}

    def documents(self) -> Iterator[Document]:
        """Topics by name, then modules by path (parsing takes some seconds).

        A module's document is its docstrings and those of its classes and functions in source order, joined
        by blank lines. Raises BadInputError where this Python came without its sources.
        """
        files = self._files()
        for relative, path in files:
            if relative == _TOPICS:
                for topic, text in sorted(_topics(_parse(path)).items()):
                    if len(text) >= MIN_CHARACTERS:
                        yield Document(text, f"builtin topic {topic!r}")
        for relative, path in files:
            text = "\n\n".join(_docstrings(_parse(path)))
            if len(text) >= MIN_CHARACTERS:
                yield Document(text, f"builtin module {relative}")

    def _files(self) -> list[tuple[str, Path]]:
        """List the sources as (relative path, path), in the same order on every platform."""
        kept: list[tuple[str, Path]] = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
            paths = [Path(folder, name) for name in names if name.endswith(".py")]
            kept += [(path.relative_to(self.root).as_posix(), path) for path in paths]
        if not kept:
            raise BadInputError(
                f"this Python has no standard library sources in {self.root}, so there is no builtin text; "
                "give a .txt, .jsonl or .parquet file instead"
            )
        return sorted(kept)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInputError(f"the standard library's {path} cannot be read: {error}") from error


def _parse(path: Path) -> ast.Module:
    source = _read(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own invalid escapes are not our concern
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            # Some files are templates or fixtures that are not Python on purpose: they hold no documentation.
            return ast.Module(body=[], type_ignores=[])


def _topics(module: ast.Module) -> dict[str, str]:
    """Read the dictionary that a `topics = {…}` statement spells out."""
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            if "topics" in names:
                return {str(name): str(text) for name, text in ast.literal_eval(statement.value).items()}
    return {}


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of `node` and of all that is defined in it, in source order."""
    if isinstance(node, _DOCUMENTED):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _docstrings(child)
