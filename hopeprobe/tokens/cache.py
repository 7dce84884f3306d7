"""The file that keeps a tokenised text: written whole or not at all, and checked whole when it is read.

Layout, little-endian: magic (8 bytes) · tokens uint16 [N] · zero padding to a multiple of 8 · offsets int64
[D+1] · held_out bool [D] · footer (JSON) · SHA-256 of the footer (32 bytes) · footer length uint64 · magic.
The footer comes last because nothing is known about a text before it has been tokenised, and a text need not
fit in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hopeprobe.documents import parse_json
from hopeprobe.errors import BadInputError
from hopeprobe.replacing import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MAGIC = b"HPTOKEN1"
CACHE_VARIABLE = "HOPEPROBE_CACHE"

_TRAILER = struct.Struct("<32sQ8s")
_TOKEN = np.dtype("<u2")
_OFFSET = np.dtype("<i8")
_HASHED = 1 << 22  # tokens hashed at a time: 8 MB


class CacheError(Exception):
    """A cache file is not what was written; whoever reads it builds it again."""


@dataclass(frozen=True, eq=False)
class Stored:
    """What a cache file holds: tokens uint16 [N] (mapped), offsets int64 [D+1], held_out bool [D], footer."""

    tokens: npt.NDArray[np.uint16]
    offsets: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.bool_]
    footer: dict[str, Any]


def default_cache_dir() -> Path:
    """`$HOPEPROBE_CACHE`, else `hopeprobe` under `$XDG_CACHE_HOME`, else `~/.cache/hopeprobe`."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache").expanduser()) / "hopeprobe"


def is_held_out(tokens: npt.NDArray[np.uint16]) -> bool:
    """Whether a document belongs to the held-out tenth: SHA-256 of its tokens modulo 10 is 0.

    A property of the document alone, so neither order nor company changes it, and duplicates stay on one
    side.
    """
    digest = hashlib.sha256(tokens.astype(_TOKEN).tobytes()).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def fingerprint_of(tokens: npt.NDArray[np.uint16], offsets: npt.NDArray[np.int64], tokenizer: str) -> str:
    """SHA-256 (hex) over tokens [N], offsets [D+1] and the tokenizer's name: equal means the same text."""
    digest = hashlib.sha256()
    for start in range(0, len(tokens), _HASHED):
        digest.update(tokens[start : start + _HASHED].astype(_TOKEN).tobytes())
    return _finish(digest, offsets, tokenizer)


def write_cache(
    path: Path,
    documents: Iterable[tuple[npt.NDArray[np.uint16], bool]],
    *,
    tokenizer: str,
    footer: dict[str, Any],
) -> None:
    """Write `documents`, pairs of tokens [n] and held-out flag, as they come; `footer` is read at the end.

    A temporary file in the same folder is renamed when complete and removed otherwise. Raises BadInputError,
    naming the file and how to choose another folder, where it cannot be written (a full disk, no permission).
    """
    with _replacing(path) as write:
        digest = hashlib.sha256()
        lengths: list[int] = []
        flags: list[bool] = []
        write(MAGIC)
        for tokens, held_out in documents:
            content = tokens.astype(_TOKEN).tobytes()
            write(content)
            digest.update(content)
            lengths.append(len(tokens))
            flags.append(held_out)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(_OFFSET)
        held = np.array(flags, dtype=np.bool_)
        described = {
            **footer,
            "tokenizer": tokenizer,
            "n_tokens": int(offsets[-1]),
            "n_documents": len(lengths),
            "fingerprint": _finish(digest, offsets, tokenizer),
            "held_out_sha256": hashlib.sha256(held.tobytes()).hexdigest(),
        }
        encoded = json.dumps(described, sort_keys=True).encode()
        write(bytes(_padding(int(offsets[-1]))))
        write(offsets.tobytes())
        write(held.tobytes())
        write(encoded)
        write(_TRAILER.pack(hashlib.sha256(encoded).digest(), len(encoded), MAGIC))


def read_cache(path: Path) -> Stored:
    """Map `path` and check all of it against its digests (about a second per gigabyte).

    Raises FileNotFoundError where there is none, and CacheError where sizes or digests disagree.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        footer, footer_bytes = _read_footer(file, size)
        n_tokens, n_documents = footer["n_tokens"], footer["n_documents"]
        tables = len(MAGIC) + n_tokens * _TOKEN.itemsize + _padding(n_tokens)
        expected = tables + (n_documents + 1) * _OFFSET.itemsize + n_documents + footer_bytes + _TRAILER.size
        if size != expected or n_documents < 1 or n_tokens < 1:
            raise CacheError(f"{path} has {size} bytes where {expected} are expected")
        file.seek(tables)
        offsets = np.frombuffer(file.read((n_documents + 1) * _OFFSET.itemsize), dtype=_OFFSET)
        held_out = np.frombuffer(file.read(n_documents), dtype=np.bool_)
    if (
        held_out.view(np.uint8).max() > 1
        or offsets[0] != 0
        or offsets[-1] != n_tokens
        or np.diff(offsets).min() < 2
    ):
        raise CacheError(f"{path} has documents that are none")
    tokens = np.memmap(path, dtype=_TOKEN, mode="r", offset=len(MAGIC), shape=(n_tokens,))
    if (
        fingerprint_of(tokens, offsets, str(footer["tokenizer"])) != footer["fingerprint"]
        or hashlib.sha256(held_out.tobytes()).hexdigest() != footer["held_out_sha256"]
    ):
        raise CacheError(f"{path} does not have the content it was written with")
    return Stored(tokens, offsets, held_out, footer)


def _read_footer(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    if size < len(MAGIC) + _TRAILER.size or file.read(len(MAGIC)) != MAGIC:
        raise CacheError(f"{file.name} is no token cache")
    file.seek(size - _TRAILER.size)
    digest, length, magic = _TRAILER.unpack(file.read(_TRAILER.size))
    if magic != MAGIC or length > size - _TRAILER.size - len(MAGIC):
        raise CacheError(f"{file.name} is cut off")
    file.seek(size - _TRAILER.size - length)
    encoded = file.read(length)
    if hashlib.sha256(encoded).digest() != digest:
        raise CacheError(f"{file.name} has a damaged footer")
    try:
        footer = parse_json(encoded.decode())
    except ValueError as error:
        raise CacheError(f"{file.name} has a footer that is none: {error}") from None
    kinds = {
        "n_tokens": int,
        "n_documents": int,
        "tokenizer": str,
        "fingerprint": str,
        "held_out_sha256": str,
    }
    if not isinstance(footer, dict) or any(type(footer.get(key)) is not kind for key, kind in kinds.items()):
        raise CacheError(f"{file.name} has a footer without what it must say")
    return footer, length


def _finish(digest: hashlib._Hash, offsets: npt.NDArray[np.int64], tokenizer: str) -> str:
    digest.update(offsets.astype(_OFFSET).tobytes())
    digest.update(tokenizer.encode())
    return digest.hexdigest()


def _padding(n_tokens: int) -> int:
    return -n_tokens * _TOKEN.itemsize % 8


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Give a function that writes to a file which replaces `path` if the block succeeds, and vanishes if not.

    Only its own failures are told as such: what the block raises passes through.
    """
    with contextlib.ExitStack() as undone:
        with _writing(path):
            file = undone.enter_context(replacing(path))

        def write(content: bytes) -> None:
            with _writing(path):
                file.write(content)

        yield write
        with _writing(path):
            undone.pop_all().close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInputError(
            f"the token cache {path} cannot be written: {error.strerror or error}; free some space "
            f"or choose another folder with the environment variable {CACHE_VARIABLE} (`cache_dir` in Python)"
        ) from error
