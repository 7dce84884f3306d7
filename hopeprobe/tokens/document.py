"""What every source of text yields, and what a source must be able to say about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator


class Document(NamedTuple):
    """One document: its text, and where it came from as an error would say it ("notes.jsonl, line 3")."""

    text: str
    origin: str


class Source(Protocol):
    """A place that documents come from: the builtin corpus, one file, or one dataset of the hub."""

    @property
    def name(self) -> str:
        """What a person calls it: "builtin", a file's name, a dataset's name."""

    @property
    def default_limit(self) -> int | None:
        """Tokens after which reading stops unless the caller says otherwise; None reads everything."""

    def key(self) -> str:
        """SHA-256 (hex) that changes whenever the documents would: the cache of tokens is keyed by it."""

    def describe(self) -> dict[str, Any]:
        """JSON-able facts that let another person find the same text."""

    def documents(self) -> Iterator[Document]:
        """Yield the documents, always in the same order; BadInputError where they cannot be read."""
