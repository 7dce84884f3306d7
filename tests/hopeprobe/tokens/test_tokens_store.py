from __future__ import annotations

import builtins
import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hopeprobe import replacing
from hopeprobe.errors import BadInputError
from hopeprobe.tokens import TokenData, cache, load_tokenizer, load_tokens, store

DOCUMENTS = [f"Document number {i} says {'very ' * (i % 7)}little." for i in range(60)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The cache folder; it does not exist yet."""
    return tmp_path / "deep" / "cache"


def refuse_to_tokenise(monkeypatch) -> None:
    monkeypatch.setattr(store, "load_tokenizer", lambda name: pytest.fail("the cache was not used"))


def test_a_text_becomes_documents_of_tokens(text: Path, kept: Path):
    seen: list[tuple[int, int]] = []
    data = load_tokens(text, cache_dir=kept, progress=lambda *done: seen.append(done))
    assert data.tokens.dtype == np.uint16
    assert data.offsets.dtype == np.int64
    assert data.held_out.dtype == np.bool_
    assert isinstance(data.tokens, np.memmap)
    assert not data.tokens.flags.writeable
    assert [data.document_text(i) for i in data.documents()] == DOCUMENTS
    encoded = [load_tokenizer().encode(text) for text in DOCUMENTS]
    assert data.document_tokens(3).tolist() == encoded[3].tolist()
    digests = [hashlib.sha256(ids.astype("<u2").tobytes()).hexdigest() for ids in encoded]
    assert data.held_out.tolist() == [int(digest, 16) % 10 == 0 for digest in digests]
    assert data.held_out.any()
    assert seen[-1] == (60, data.n_tokens("all")) == (60, len(data.tokens))
    assert (data.name, data.tokenizer, data.vocab_size, data.end_of_text) == (
        "text.jsonl",
        "gpt2",
        50257,
        50256,
    )
    assert data.source == {"kind": "file", "path": str(text), "column": "text", "dropped": 0}
    json.dumps(data.identity())
    assert data.identity()["fingerprint"] == data.fingerprint


def test_the_cache_answers_for_the_same_text_under_another_path(text: Path, kept: Path, monkeypatch):
    first = load_tokens(text, cache_dir=kept)
    moved = text.with_name("moved.jsonl")
    text.rename(moved)
    refuse_to_tokenise(monkeypatch)
    again = load_tokens([moved], cache_dir=kept)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.tokens, first.tokens)
    assert np.array_equal(again.held_out, first.held_out)
    assert (again.name, again.source["path"]) == ("moved.jsonl", str(moved))


def test_another_text_is_another_cache_file(text: Path, kept: Path):
    first = load_tokens(text, cache_dir=kept)
    text.write_text(json.dumps({"text": "something else"}))
    assert load_tokens(text, cache_dir=kept).fingerprint != first.fingerprint
    assert len(list(kept.iterdir())) == 2


def flipped(content: bytes, position: int) -> bytes:
    damaged = bytearray(content)
    damaged[position] ^= 1
    return bytes(damaged)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:8] + content[10:],
        lambda content: flipped(content, 3),
        lambda content: flipped(content, 100),
        lambda content: flipped(content, content.index(b'{"dropped"') - 1),
        lambda content: flipped(content, content.index(b'{"dropped"') - 100),
        lambda content: flipped(content, content.index(b'"n_tokens"') + 12),
        lambda content: flipped(content, len(content) - 1),
        lambda content: flipped(content, len(content) - 10),
    ],
)
def test_a_damaged_cache_is_built_again(text: Path, kept: Path, damage):
    data = load_tokens(text, cache_dir=kept)
    (path,) = kept.iterdir()
    good = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(good))
    with pytest.raises(cache.CacheError):
        cache.read_cache(path)
    assert load_tokens(text, cache_dir=kept).fingerprint == data.fingerprint
    assert path.read_bytes() == good
    assert list(kept.iterdir()) == [path]


class FullDisk:
    """A file on a disk that is full after `room` bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: bytes) -> None:
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.file.write(content)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 100, 1500])
def test_a_full_disk_leaves_nothing_and_names_the_way_out(text: Path, kept: Path, monkeypatch, room: int):
    def opened(*args) -> FullDisk:
        return FullDisk(builtins.open(*args), room)

    monkeypatch.setattr(replacing, "open", opened, raising=False)
    with pytest.raises(BadInputError, match=r"No space left on device.*HOPEPROBE_CACHE") as caught:
        load_tokens(text, cache_dir=kept)
    assert str(kept) in str(caught.value)
    assert list(kept.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_nothing(text: Path, kept: Path, monkeypatch, call: str):
    def fail(*args: object) -> None:
        raise OSError(errno.EDQUOT, "quota exceeded")

    monkeypatch.setattr(replacing.os, call, fail)
    with pytest.raises(BadInputError, match="quota exceeded"):
        load_tokens(text, cache_dir=kept)
    assert list(kept.iterdir()) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, BrokenPipeError])
def test_an_interruption_leaves_nothing_and_stays_itself(text: Path, kept: Path, interruption):
    def interrupt(documents: int, tokens: int) -> None:
        raise interruption

    with pytest.raises(interruption):
        load_tokens(text, cache_dir=kept, progress=interrupt)
    assert list(kept.iterdir()) == []


def change(path: Path):
    with path.open("a", encoding="utf-8") as file:
        file.write('{"text": "one more document that came as it was read"}\n')


def put_another_in_its_place(path: Path):
    other = path.with_name("other")
    other.write_text('{"text": "another text altogether"}\n', encoding="utf-8")
    other.replace(path)


@pytest.mark.parametrize(
    ("meddle", "said"),
    [
        (change, "text.jsonl changed while it was read.*Start again when it is complete"),
        (put_another_in_its_place, "text.jsonl changed while it was read"),
        (Path.unlink, "text.jsonl cannot be read: it was removed meanwhile; put it back and start again"),
    ],
)
def test_a_file_that_does_not_stay_as_it_was_is_not_kept_under_its_old_name(
    text: Path, kept: Path, meddle, said
):
    def once(documents: int, tokens: int) -> None:
        if documents == 1:
            meddle(text)

    with pytest.raises(BadInputError, match=said):
        load_tokens(text, cache_dir=kept, progress=once)
    assert list(kept.iterdir()) == []


def test_a_file_that_vanishes_before_it_is_read(text: Path, kept: Path, monkeypatch):
    from hopeprobe.tokens import store

    def late(*given: object) -> None:
        text.unlink()
        build(*given)

    build = store._build
    monkeypatch.setattr(store, "_build", late)
    with pytest.raises(BadInputError, match=r"text\.jsonl cannot be read: it was removed meanwhile"):
        load_tokens(text, cache_dir=kept)


def test_a_cache_folder_that_goes(text: Path, kept: Path, monkeypatch):
    """While tokens are read they stay; while they are written, or as they are to be read, it is said."""
    data = load_tokens(text, cache_dir=kept)
    before = data.tokens.tolist()
    shutil.rmtree(kept)
    assert data.tokens.tolist() == before
    assert load_tokens(text, cache_dir=kept).fingerprint == data.fingerprint

    with pytest.raises(BadInputError, match=r"token cache .*cannot be written: No such file or directory"):
        load_tokens(
            text, cache_dir=kept / "other", progress=lambda *_: shutil.rmtree(kept, ignore_errors=True)
        )

    replace = os.replace

    def gone_at_once(one: str, other: str) -> None:
        replace(one, other)
        shutil.rmtree(kept)

    monkeypatch.setattr(os, "replace", gone_at_once)
    with pytest.raises(
        BadInputError, match="was removed as soon as it was written; let nothing clear the folder"
    ):
        load_tokens(text, cache_dir=kept)


def test_a_cache_folder_that_is_a_file_is_explained(text: Path):
    with pytest.raises(BadInputError, match="HOPEPROBE_CACHE"):
        load_tokens(text, cache_dir=text)


def test_where_the_cache_lies(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOPEPROBE_CACHE", str(tmp_path / "mine"))
    assert cache.default_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("HOPEPROBE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / "hopeprobe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / ".cache" / "hopeprobe"


def test_a_limit_cuts_the_last_document_and_keeps_its_split(text: Path, kept: Path):
    whole = load_tokens(text, cache_dir=kept)
    for limit in range(2, 60):
        cut = load_tokens(text, cache_dir=kept, max_tokens=limit)
        # Where one token is left, it is left over: a document has two.
        assert limit - 1 <= len(cut.tokens) <= limit
        assert np.array_equal(cut.tokens, whole.tokens[: len(cut.tokens)])
        assert np.array_equal(cut.held_out, whole.held_out[: cut.n_documents])
    with pytest.raises(BadInputError, match="max_tokens is 1"):
        load_tokens(text, cache_dir=kept, max_tokens=1)


def test_documents_of_one_token_are_dropped_and_counted(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", "a", "two words", "b"]))
    data = load_tokens(path, cache_dir=tmp_path)
    assert (data.n_documents, data.source["dropped"]) == (1, 3)


@pytest.mark.parametrize("content", ["a", '{"text": ""}'])
def test_a_text_without_two_tokens_is_refused(tmp_path: Path, content: str):
    path = tmp_path / ("a.jsonl" if content.startswith("{") else "a.txt")
    path.write_text(content)
    with pytest.raises(BadInputError, match="empty or a single token, and at least two are needed"):
        load_tokens(path, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_lone_surrogates_survive_tokenising(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "half \\ud83d of a pair"}\n')
    assert load_tokens(path, cache_dir=tmp_path).document_text(0) == "half \ufffd of a pair"


def test_an_unknown_tokenizer_split_or_document_is_refused(text: Path, kept: Path):
    with pytest.raises(BadInputError, match="did you mean 'gpt2'"):
        load_tokens(text, tokenizer="gtp2", cache_dir=kept)
    data = load_tokens(text, cache_dir=kept)
    with pytest.raises(BadInputError, match=r"no split is called 'held-out'; did you mean 'heldout'"):
        data.documents("held-out")
    for document in (-1, 60):
        with pytest.raises(BadInputError, match="documents 0 … 59"):
            data.document_tokens(document)


@pytest.mark.parametrize("as_one", [lambda one: [one], lambda one: (str(one),)])
def test_a_list_of_one_is_that_one(text: Path, kept: Path, monkeypatch, as_one):
    """Its name, description and fingerprint too, and nothing is tokenised again."""
    alone = load_tokens(text, cache_dir=kept)
    refuse_to_tokenise(monkeypatch)
    listed = load_tokens(as_one(text), cache_dir=kept)
    assert listed.identity() == alone.identity()
    assert alone.identity()["source"] == {"kind": "file", "path": str(text), "column": "text", "dropped": 0}
    assert len(list(kept.iterdir())) == 1


def test_several_sources_make_one_text(text: Path, tmp_path: Path, kept: Path):
    other = tmp_path / "other.txt"
    other.write_text("one more document")
    data = load_tokens([text, other], cache_dir=kept)
    assert data.name == "text.jsonl+other.txt"
    assert data.n_documents == 61
    assert [source["path"] for source in data.source["sources"]] == [str(text), str(other)]
    assert load_tokens([other, text], cache_dir=kept).fingerprint != data.fingerprint
    assert load_tokens([text] * 5, cache_dir=kept).name == "text.jsonl+4 more"


def test_a_source_behind_the_limit_of_all_is_not_named(text: Path, tmp_path: Path, kept: Path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text("one more document")
    n = len(load_tokens(text, cache_dir=kept).tokens)
    for _ in range(2):  # tokenised, then from the cache
        short = load_tokens([text, other], cache_dir=kept, max_tokens=n)
        assert (short.name, short.source["path"], short.source["not_reached"]) == (
            "text.jsonl", str(text), ["other.txt"],
        )  # fmt: skip
        reached = load_tokens([text, other], cache_dir=kept, max_tokens=n + 2)
        assert (reached.name, len(reached.source["sources"])) == ("text.jsonl+other.txt", 2)
        assert "not_reached" not in reached.source
        refuse_to_tokenise(monkeypatch)


documents = st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=6), min_size=1, max_size=30)


@settings(deadline=None)  # shared machines stall
@given(documents, st.randoms(use_true_random=False))
def test_held_out_is_a_property_of_the_document_alone(contents: list[list[int]], random):
    def flags(order: list[list[int]]) -> list[tuple[tuple[int, ...], bool]]:
        data = TokenData.from_documents(order, name="t", vocab_size=11, end_of_text=10)
        return sorted(
            (tuple(data.document_tokens(i).tolist()), bool(data.held_out[i])) for i in data.documents()
        )

    shuffled = random.sample(contents, len(contents))
    assert flags(contents) == flags(shuffled)


@settings(deadline=None)  # shared machines stall
@given(documents)
def test_train_and_held_out_are_all(contents: list[list[int]]):
    data = TokenData.from_documents(contents, name="t", vocab_size=11, end_of_text=10)
    train, heldout = data.documents("train"), data.documents("heldout")
    assert sorted([*train, *heldout]) == list(range(len(contents)))
    assert data.n_tokens("train") + data.n_tokens("heldout") == data.n_tokens() == len(data.tokens)
    expected = [token for i in train for token in contents[i]]
    assert data.split_tokens("train").tolist() == expected


def test_a_tenth_is_held_out():
    data = TokenData.from_documents(([i % 1000, i // 1000] for i in range(5000)), name="t")
    assert 400 < data.held_out.sum() < 600


def test_the_fingerprint_tells_documents_tokens_and_tokenizers_apart():
    def fingerprint(contents: list[list[int]], tokenizer: str = "gpt2") -> str:
        return TokenData.from_documents(contents, name="t", tokenizer=tokenizer).fingerprint

    same = fingerprint([[1, 2, 3, 4]])
    assert fingerprint([[1, 2, 3, 4], [5]]) == same
    assert (
        len(
            {
                same,
                fingerprint([[1, 2], [3, 4]]),
                fingerprint([[1, 2, 3, 5]]),
                fingerprint([[1, 2, 3, 4]], "x"),
            }
        )
        == 4
    )


def test_tokens_that_do_not_fit_are_refused():
    with pytest.raises(BadInputError, match="document 1 of t has a token outside 0 … 9"):
        TokenData.from_documents([[1, 2], [1, 10]], name="t", vocab_size=10, end_of_text=0)
    with pytest.raises(BadInputError, match="vocab_size ≤ 65536"):
        TokenData.from_documents([[1, 2]], name="t", vocab_size=100_000)
    with pytest.raises(BadInputError, match="at least two are needed"):
        TokenData.from_documents([[1], []], name="t")


def test_the_builtin_text_needs_nothing_and_imports_none_of_its_modules(tmp_path: Path, monkeypatch):
    rare = {"antigravity", "this", "turtledemo", "idlelib"}
    imported = rare & set(sys.modules)
    data = load_tokens("builtin", cache_dir=tmp_path)
    assert rare & set(sys.modules) == imported
    assert data.n_documents > 400
    assert len(data.tokens) > 500_000
    assert len(data.documents("heldout")) > 32  # fewer groups give no interval
    assert data.source["python"] == platform.python_version()
    refuse_to_tokenise(monkeypatch)
    assert load_tokens("builtin", cache_dir=tmp_path).fingerprint == data.fingerprint


def test_importing_the_package_loads_nothing_heavy():
    heavy = ["torch", "datasets", "tiktoken", "pandas", "pyarrow", "scipy"]
    code = f"import sys, hopeprobe.tokens; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
