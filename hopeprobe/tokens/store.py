"""Tokenised text: `load_tokens` and the `TokenData` that it gives.

A text is tokenised once (about a million tokens a second) and kept in the cache folder, keyed by its content,
so the same text under another path is found again. Files there are only ever replaced whole and may be
deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hopeprobe import ranks
from hopeprobe.errors import BadInputError, near_names
from hopeprobe.tokens.cache import (
    CACHE_VARIABLE,
    CacheError,
    Stored,
    default_cache_dir,
    fingerprint_of,
    is_held_out,
    read_cache,
    write_cache,
)
from hopeprobe.tokens.sources import DataSpec, documents_of, open_sources
from hopeprobe.tokens.tokenizer import END_OF_TEXT, VOCAB_SIZE, check_tokenizer_name, load_tokenizer

if TYPE_CHECKING:
    import os

    from hopeprobe.tokens.document import Source

SPLITS = ("train", "heldout", "all")

Progress = Callable[[int, int], None]
"""Called with the documents and tokens kept so far, after each document."""

_TOO_SHORT = "no document has two tokens: the text is empty or a single token, and at least two are needed"


@dataclass(frozen=True, eq=False)
class TokenData:
    """A text as tokens, cut into documents, a tenth of them held out.

    name: the source's name. tokens: uint16 [N], values 0 … vocab_size - 1, usually memory-mapped, read-only.
    offsets: int64 [D+1], document i is tokens[offsets[i]:offsets[i+1]], at least two tokens. held_out: bool
    [D], a property of each document's tokens alone (`cache.is_held_out`). fingerprint: SHA-256 (hex) over
    tokens, offsets and the tokenizer's name. source: JSON-able description; for `builtin` it has the Python
    version.
    """

    name: str
    tokens: npt.NDArray[np.uint16] = field(repr=False)
    offsets: npt.NDArray[np.int64] = field(repr=False)
    held_out: npt.NDArray[np.bool_] = field(repr=False)
    tokenizer: str
    vocab_size: int
    end_of_text: int
    fingerprint: str
    source: Mapping[str, Any]

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[npt.ArrayLike],
        *,
        name: str,
        tokenizer: str = "gpt2",
        vocab_size: int = VOCAB_SIZE,
        end_of_text: int = END_OF_TEXT,
    ) -> TokenData:
        """Make data of documents that are tokens already: integer arrays [n], values 0 … vocab_size - 1.

        Documents of fewer than two tokens are dropped. Raises BadInputError for a token out of range, for a
        vocabulary that uint16 cannot hold, and where no document is left.
        """
        if not 0 <= end_of_text < vocab_size <= 1 << 16:
            raise BadInputError(
                "0 ≤ end_of_text < vocab_size ≤ 65536 is needed, "
                f"not end_of_text {end_of_text} and vocab_size {vocab_size}"
            )
        kept: list[npt.NDArray[np.uint16]] = []
        for position, document in enumerate(documents):
            ids = np.asarray(document)
            if len(ids) < 2:
                continue
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise BadInputError(f"document {position} of {name} has a token outside 0 … {vocab_size - 1}")
            kept.append(ids.astype(np.uint16))
        if not kept:
            raise BadInputError(f"{name}: {_TOO_SHORT}")
        tokens = np.concatenate(kept)
        offsets = np.cumsum([0, *map(len, kept)], dtype=np.int64)
        held_out = np.array([is_held_out(ids) for ids in kept])
        fingerprint = fingerprint_of(tokens, offsets, tokenizer)
        source = {"kind": "tokens"}
        return cls(name, tokens, offsets, held_out, tokenizer, vocab_size, end_of_text, fingerprint, source)

    @property
    def n_documents(self) -> int:
        """D, the number of documents."""
        return len(self.held_out)

    def documents(self, split: str = "all") -> npt.NDArray[np.int64]:
        """Find the indices of the documents of `split` ("train", "heldout", "all"), ascending: int64 [≤ D].

        Raises BadInputError for another split. The result may be empty.
        """
        if split not in SPLITS:
            known = ", ".join(SPLITS)
            raise BadInputError(
                f"no split is called {split!r}{near_names(split, SPLITS)} (there are: {known})"
            )
        if split == "all":
            return np.arange(self.n_documents, dtype=np.int64)
        return np.flatnonzero(self.held_out == (split == "heldout")).astype(np.int64)

    def lengths(self, split: str = "all") -> npt.NDArray[np.int64]:
        """Tokens in each document of `split`, in the order of `documents`: int64 [≤ D], each at least 2."""
        every: npt.NDArray[np.int64] = np.diff(self.offsets)
        return every[self.documents(split)]

    def n_tokens(self, split: str = "all") -> int:
        """Tokens in all documents of `split`."""
        return int(self.lengths(split).sum())

    def document_tokens(self, document: int) -> npt.NDArray[np.uint16]:
        """Tokens of document 0 … D-1: uint16 [n], n ≥ 2, a view. BadInputError for another index."""
        if not 0 <= document < self.n_documents:
            raise BadInputError(f"{self.name} has documents 0 … {self.n_documents - 1}, not {document}")
        return self.tokens[self.offsets[document] : self.offsets[document + 1]]

    def document_text(self, document: int) -> str:
        """Text of document 0 … D-1. Errors as `document_tokens` and `load_tokenizer`."""
        return load_tokenizer(self.tokenizer).decode(self.document_tokens(document))

    def split_tokens(self, split: str) -> npt.NDArray[np.uint16]:
        """All tokens of `split`, nothing between its documents: uint16 [n_tokens(split)], a copy."""
        inside = np.repeat(np.isin(np.arange(self.n_documents), self.documents(split)), self.lengths())
        return np.asarray(self.tokens[inside])

    def identity(self) -> dict[str, Any]:
        """State what results record about their data, JSON-able: name, fingerprint, sizes, source."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "n_tokens": len(self.tokens),
            "n_documents": self.n_documents,
            "n_held_out": int(self.held_out.sum()),
            "tokenizer": self.tokenizer,
            "source": dict(self.source),
        }


def load_tokens(
    data: DataSpec | Sequence[DataSpec],
    *,
    tokenizer: str = "gpt2",
    cache_dir: str | os.PathLike[str] | None = None,
    max_tokens: int | None = None,
    column: str = "text",
    progress: Progress | None = None,
) -> TokenData:
    """Tokens of `data`, from the cache where they are, else tokenised now and kept there.

    data: `builtin`, `openwebtext`, `hf:NAME[:COLUMN]`, paths of .txt, .jsonl, .parquet files, or several of
    these. cache_dir: where tokens are kept (default `cache.default_cache_dir()`). max_tokens: of all together; stop
    there, cutting the last document, and name no source that was not reached (`source["not_reached"]` does); by default
    files are read to the end and each dataset of the hub to 20 million tokens. column: the field with the text in
    .jsonl and .parquet files. progress: called while tokenising, not when the cache answers.

    Documents of fewer than two tokens are dropped (`source["dropped"]` counts them). Raises BadInputError for
    data that cannot be read (see `read_documents`) or changes while it is, an unknown tokenizer, a text of fewer
    than two tokens, and a cache folder that cannot be written.
    """
    check_tokenizer_name(tokenizer)
    if max_tokens is not None and max_tokens < 2:
        raise BadInputError(f"max_tokens is {max_tokens}; at least two tokens are needed")
    sources = open_sources(data, column=column)
    # Each source's own, or one for all of them.
    limits = [source.default_limit if max_tokens is None else None for source in sources]
    name = _joined_name(sources)
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    keys = [source.key() for source in sources]
    path = folder / f"{_cache_key(keys, tokenizer, limits, max_tokens)}.tokens"

    def read_or_build() -> Stored:
        stored = _read_or_none(path, len(sources))
        if stored is None:
            _build(path, sources, keys, name, tokenizer, limits, max_tokens, progress)
            stored = _read_or_none(path, len(sources))
        if stored is None:
            what = "is not what was just written to it; is the disk failing?"
            gone = "was removed as soon as it was written; let nothing clear the folder, and start again"
            raise BadInputError(f"the token cache {path} {what if path.exists() else gone}")
        return stored

    return _token_data(ranks.first_then_others(read_or_build), sources, tokenizer)


def _read_or_none(path: Path, n_sources: int) -> Stored | None:
    try:
        stored = read_cache(path)
        described = stored.footer.get("sources")
        sound = (
            isinstance(described, list)
            and len(described) == n_sources
            and all(isinstance(one, dict) for one in described)
            and isinstance(stored.footer.get("dropped"), int)
            and _reached(stored, n_sources) in range(1, n_sources + 1)
            and int(stored.tokens.max()) < VOCAB_SIZE
        )
    except (FileNotFoundError, CacheError):
        return None  # a damaged cache costs only the time to tokenise again
    except OSError as error:
        raise BadInputError(
            f"the token cache {path} cannot be read: {error.strerror or error}; delete it, "
            f"or choose another folder with the environment variable {CACHE_VARIABLE}"
        ) from error
    return stored if sound else None


def _build(
    path: Path,
    sources: list[Source],
    keys: list[str],
    name: str,
    tokenizer: str,
    limits: list[int | None],
    max_tokens: int | None,
    progress: Progress | None,
) -> None:
    footer: dict[str, Any] = {"dropped": 0}
    encode = load_tokenizer(tokenizer).encode

    def encoded() -> Iterator[tuple[npt.NDArray[np.uint16], bool]]:
        n_documents = n_tokens = 0
        for i, (source, limit) in enumerate(zip(sources, limits, strict=True)):
            footer["reached"] = i + 1
            end = max_tokens if limit is None else n_tokens + limit
            for document in documents_of(source):
                ids = encode(document.text)
                # A document cut by the limit stays in the split that the whole document belongs to.
                held_out = is_held_out(ids)
                if end is not None:
                    ids = ids[: end - n_tokens]
                if len(ids) < 2:
                    footer["dropped"] += 1
                else:
                    n_documents, n_tokens = n_documents + 1, n_tokens + len(ids)
                    yield ids, held_out
                    if progress is not None:
                        progress(n_documents, n_tokens)
                # One token more could not make a document.
                if end is not None and n_tokens > end - 2:
                    break
            if max_tokens is not None and n_tokens > max_tokens - 2:
                break
        if n_documents == 0:
            raise BadInputError(f"{name}: {_TOO_SHORT}")
        for source, key in zip(sources, keys, strict=True):
            if source.key() != key:  # else what is read from now on would pass for what was read before
                raise BadInputError(
                    f"{source.name} changed while it was read, and its tokens are of no one text: nothing is kept. "
                    "Start again when it is complete"
                )
        footer["sources"] = [source.describe() for source in sources]

    write_cache(path, encoded(), tokenizer=tokenizer, footer=footer)


def _token_data(stored: Stored, sources: list[Source], tokenizer: str) -> TokenData:
    # The path is today's; what only reading finds out, such as a revision of the hub, comes from the cache.
    described = [
        {**then, **source.describe()} for then, source in zip(stored.footer["sources"], sources, strict=True)
    ]
    reached = _reached(stored, len(sources))
    described, beyond = described[:reached], [source.name for source in sources[reached:]]
    return TokenData(
        name=_joined_name(sources[:reached]),
        tokens=stored.tokens,
        offsets=stored.offsets,
        held_out=stored.held_out,
        tokenizer=tokenizer,
        vocab_size=VOCAB_SIZE,
        end_of_text=END_OF_TEXT,
        fingerprint=str(stored.footer["fingerprint"]),
        source={
            **(described[0] if len(described) == 1 else {"kind": "several", "sources": described}),
            "dropped": stored.footer["dropped"],
            **({"not_reached": beyond} if beyond else {}),
        },
    )


def _reached(stored: Stored, n_sources: int) -> int:
    """How many of the sources were read before the limit of all of them; 0 where that is not known."""
    reached = stored.footer.get("reached", 1 if n_sources == 1 else 0)
    return reached if type(reached) is int else 0


def _cache_key(keys: list[str], tokenizer: str, limits: list[int | None], max_tokens: int | None) -> str:
    # Of one source, or of several without limits of their own, as when there was one limit for all.
    limit = max_tokens if len(keys) > 1 else max_tokens or limits[0]
    parts = [tokenizer, limits if len(keys) > 1 and any(limits) else limit, keys]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def _joined_name(sources: list[Source]) -> str:
    names = [source.name for source in sources]
    return "+".join(names) if len(names) <= 3 else f"{names[0]}+{len(names) - 1} more"
