"""From what a person writes after `--data` to documents."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from hopeprobe.errors import BadInputError, near_names
from hopeprobe.tokens.builtin import BuiltinSource
from hopeprobe.tokens.files import SUFFIXES, FileSource
from hopeprobe.tokens.hub import HubSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hopeprobe.tokens.document import Document, Source

DataSpec: TypeAlias = str | os.PathLike[str]
"""`builtin`, `openwebtext`, `hf:NAME[:COLUMN]`, or the path of a .txt, .jsonl or .parquet file."""

_NAMES = ("builtin", "openwebtext")
_KINDS = "builtin, openwebtext, hf:NAME[:COLUMN], or the path of a .txt, .jsonl or .parquet file"


def open_sources(data: DataSpec | Sequence[DataSpec], *, column: str = "text") -> list[Source]:
    """List the sources that `data`, one specification or several, names; nothing is read yet.

    column: the field or column with the text, for files (`hf:NAME:COLUMN` brings its own). Raises
    BadInputError for a file that does not exist (with near names), a folder, an unknown suffix, an empty
    list.
    """
    specs = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    if not specs:
        raise BadInputError(f"no data was given; give {_KINDS}")
    return [_open_source(os.fspath(spec), column) for spec in specs]


def read_documents(data: DataSpec | Sequence[DataSpec], *, column: str = "text") -> Iterator[Document]:
    """Yield all documents of `data`, source after source; arguments as in `open_sources`.

    Raises BadInputError as `open_sources` does, where a source holds no document, and as the sources' own
    readers do.
    """
    for source in open_sources(data, column=column):
        yield from documents_of(source)


def documents_of(source: Source) -> Iterator[Document]:
    """Yield the documents of one source; BadInputError where there is none at all."""
    empty = True
    for document in source.documents():
        empty = False
        yield document
    if empty:
        raise BadInputError(f"{source.name} is empty: it holds no document")


def _open_source(spec: str, column: str) -> Source:
    if spec == "builtin":
        return BuiltinSource()
    if spec == "openwebtext":
        return HubSource("Skylion007/openwebtext", name="openwebtext")
    if spec.startswith("hf:"):
        dataset, _, hub_column = spec.removeprefix("hf:").partition(":")
        if not dataset:
            raise BadInputError(f"{spec!r} names no dataset; write hf:NAME or hf:NAME:COLUMN")
        return HubSource(dataset, column=hub_column or column)
    return _open_file(spec, column)


def _open_file(spec: str, column: str) -> FileSource:
    try:
        path = Path(spec).expanduser()
        if path.is_dir():
            raise BadInputError(f"{spec!r} is a folder; give the files in it, for example {path / '*.jsonl'}")
        if not path.exists():
            known = [*_NAMES, *(os.listdir(path.parent) if path.parent.is_dir() else [])]
            raise BadInputError(
                f"there is no file {spec!r}{near_names(path.name, sorted(known))} (understood: {_KINDS})"
            )
        if path.suffix.lower() not in SUFFIXES:
            raise BadInputError(f"{spec}: unknown kind of file; understood are {', '.join(SUFFIXES)}")
        if not path.is_file():
            raise BadInputError(
                f"{spec} is not a regular file; it is read more than once, so a pipe will not do"
            )
    except (OSError, ValueError, RuntimeError) as error:
        # A name too long for the system or with a NUL in it, a folder without access, the home of nobody.
        raise BadInputError(f"{spec!r} cannot be looked up: {error}") from error
    return FileSource(path, column=column)
