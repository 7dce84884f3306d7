"""Documents from .txt, .jsonl and .parquet files; every complaint names the file and the place in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hopeprobe.errors import BadInputError, near_names
from hopeprobe.tokens.document import Document

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SUFFIXES = (".txt", ".jsonl", ".parquet")
"""What can be read: one document a file, one a line (`{"text": …}`), one a row."""

_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileSource:
    """One file as a `Source`; `column` is the field (.jsonl) or column (.parquet) that holds the text."""

    path: Path
    column: str = "text"
    default_limit: int | None = None

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.path.name

    def key(self) -> str:
        """SHA-256 (hex) over the file's bytes and how they are read; its path plays no part."""
        content = hashlib.sha256()
        with _reading(self.path), open(self.path, "rb") as file:
            while block := file.read(_BLOCK):
                content.update(block)
        how = [self.path.suffix.lower(), self.column, content.hexdigest()]
        return hashlib.sha256(json.dumps(how).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """`{"kind": "file", "path": …, "column": …}`, without the column for .txt."""
        described = {"kind": "file", "path": str(self.path)}
        return described if self.path.suffix.lower() == ".txt" else {**described, "column": self.column}

    def documents(self) -> Iterator[Document]:
        """Yield the file's documents in order; null texts are skipped.

        Raises BadInputError for bytes that are not UTF-8 (with their offset), a line that is not a JSON
        object or a text that is not a string (with the line), a missing column (with those there are), an
        unreadable file.
        """
        readers = {".txt": self._read_txt, ".jsonl": self._read_jsonl, ".parquet": self._read_parquet}
        return readers[self.path.suffix.lower()]()

    def _read_txt(self) -> Iterator[Document]:
        with _reading(self.path):
            content = self.path.read_bytes()
        if content:
            yield Document(self._decode(content, 0).removeprefix("\ufeff"), str(self.path))

    def _read_jsonl(self) -> Iterator[Document]:
        with _reading(self.path), open(self.path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                text = self._decode(line, offset)
                offset += len(line)
                if text.removeprefix("\ufeff").strip():
                    origin = f"{self.path}, line {number}"
                    value = self._parse_line(text.removeprefix("\ufeff"), origin)
                    if value is not None:
                        yield Document(value, origin)

    def _parse_line(self, line: str, origin: str) -> str | None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInputError(f"{origin}: not JSON ({error}); is the file cut off?") from error
        if not isinstance(record, dict):
            raise BadInputError(f"{origin}: a JSON object such as {{{self.column!r}: …}} is needed")
        if self.column not in record:
            raise BadInputError(f"{origin}: {missing_column(self.column, list(record))}; {_OTHER_COLUMN}")
        return checked_text(record[self.column], self.column, origin)

    def _read_parquet(self) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with _reading(self.path), pq.ParquetFile(self.path) as file:
                names = list(file.schema_arrow.names)
                if self.column not in names:
                    raise BadInputError(f"{self.path}: {missing_column(self.column, names)}; {_OTHER_COLUMN}")
                row = 0
                for batch in file.iter_batches(batch_size=1024, columns=[self.column]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        origin = f"{self.path}, row {row}"
                        text = checked_text(value, self.column, origin)
                        if text is not None:
                            yield Document(text, origin)
        except pa.ArrowException as error:
            raise BadInputError(f"{self.path} is not a readable parquet file: {error}") from error
        except UnicodeDecodeError as error:
            raise BadInputError(
                f"{self.path}: column {self.column!r} holds text that is not UTF-8"
            ) from error

    def _decode(self, content: bytes, offset: int) -> str:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadInputError(
                f"{self.path} is not UTF-8: byte 0x{content[error.start]:02x} at byte offset "
                f"{offset + error.start}; convert it, for example with `iconv -f latin1 -t utf-8`"
            ) from error


_OTHER_COLUMN = "rename the one with the text, or name it in Python, load_tokens(..., column=NAME)"


def missing_column(column: str, names: list[str]) -> str:
    """Say what is wrong when `column` is not among `names`, the columns that a record has."""
    there = ", ".join(repr(name) for name in names) or "none"
    return f"no column {column!r}{near_names(column, names)} (there: {there})"


def checked_text(value: object, column: str, origin: str) -> str | None:
    """`value` if it is a string or None (no text); BadInputError for anything else."""
    if value is None or isinstance(value, str):
        return value
    raise BadInputError(f"{origin}: column {column!r} holds {type(value).__name__}, not text")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:  # it was there when it was named
        raise BadInputError(
            f"{path} cannot be read: it was removed meanwhile; put it back and start again"
        ) from error
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror or error}") from error
