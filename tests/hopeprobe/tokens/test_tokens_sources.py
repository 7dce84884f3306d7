from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pandas as pd
import pytest

from hopeprobe.errors import BadInputError
from hopeprobe.tokens import open_sources, read_documents
from hopeprobe.tokens.files import FileSource

if TYPE_CHECKING:
    from pathlib import Path


def texts(*args, **kwargs) -> list[str]:
    return [document.text for document in read_documents(*args, **kwargs)]


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_txt_file_is_one_document(tmp_path: Path):
    path = tmp_path / "Notes.TXT"
    path.write_bytes("\ufeffone\r\n\ftwo é".encode())
    assert texts(path) == ["one\r\n\ftwo é"]


def test_a_jsonl_file_is_one_document_a_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "é"}\n\n{"text": null}\n{"text": "b", "id": 3}'.encode())
    documents = list(read_documents(str(path)))
    assert [document.text for document in documents] == ["é", "b"]
    assert documents[1].origin == f"{path}, line 4"


def test_a_parquet_file_is_one_document_a_row(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pd.DataFrame({"id": [1, 2, 3], "body": ["a", None, "c"]}).to_parquet(path)
    assert texts(path, column="body") == ["a", "c"]


def test_several_sources_are_read_in_order(tmp_path: Path):
    (tmp_path / "a.txt").write_text("A")
    paths = [write_jsonl(tmp_path / "b.jsonl", [{"body": "B"}]), tmp_path / "a.txt"]
    assert texts(paths, column="body") == ["B", "A"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_latin_1_bytes_are_reported_with_their_offset(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(b'{"text": "fine"}\n' + '{"text": "caf\xe9"}\n'.encode("latin-1"))
    with pytest.raises(BadInputError, match=rf"{name} is not UTF-8: byte 0xe9 at byte offset 30;"):
        texts(path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "cut of', "line 2: not JSON .* cut off"),
        ("[" * 100_000, "line 2: not JSON"),
        ('"text"', r"line 2: a JSON object such as \{'text': …\}"),
        (
            '{"test": "x", "id": 1}',
            r"line 2: no column 'text'; did you mean 'test'\? \(there: 'test', 'id'\); rename .*column=NAME",
        ),
        ('{"text": 3}', "line 2: column 'text' holds int, not text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, complaint: str):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(BadInputError, match=complaint):
        texts(path)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pd.DataFrame({"body": ["a"], "n": [1]}).to_parquet(path)
    with pytest.raises(
        BadInputError, match=r"a.parquet: no column 'text' \(there: 'body', 'n'\); rename .*column=NAME"
    ):
        texts(path)
    with pytest.raises(BadInputError, match="row 1: column 'n' holds int"):
        texts(path, column="n")


@pytest.mark.parametrize("content", [b"", b"PAR1 not parquet"])
def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"a\.parquet is not a readable parquet file"):
        texts(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    with pytest.raises(BadInputError, match=f"{name} is empty"):
        texts(tmp_path / name)


def test_a_missing_file_offers_its_neighbours(tmp_path: Path):
    (tmp_path / "sample.jsonl").touch()
    with pytest.raises(
        BadInputError, match=r"there is no file '.*sampel.jsonl'; did you mean 'sample.jsonl'"
    ):
        open_sources(tmp_path / "sampel.jsonl")
    with pytest.raises(BadInputError, match="did you mean 'builtin'"):
        open_sources("bultin")
    with pytest.raises(BadInputError, match="there is no file"):
        open_sources(tmp_path / "no such folder" / "a.txt")


@pytest.mark.parametrize("spec", ["a\0b.txt", "x" * 5000 + ".txt", "~nobody-of-this-name/a.txt"])
def test_an_impossible_path_is_an_error_for_people(spec: str):
    with pytest.raises(BadInputError):
        open_sources(spec)


def test_folders_unknown_suffixes_pipes_and_nothing_are_refused(tmp_path: Path):
    with pytest.raises(BadInputError, match=r"is a folder; give the files in it.*\*\.jsonl"):
        open_sources(tmp_path)
    (tmp_path / "a.csv").touch()
    with pytest.raises(BadInputError, match=r"understood are \.txt, \.jsonl, \.parquet"):
        open_sources(tmp_path / "a.csv")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(BadInputError, match="not a regular file"):
        open_sources(tmp_path / "pipe.txt")
    with pytest.raises(BadInputError, match="no data was given; give builtin"):
        open_sources([])


def test_a_file_that_vanishes_is_an_error_for_people(tmp_path: Path):
    for suffix in (".txt", ".jsonl", ".parquet"):
        source = FileSource(tmp_path / f"gone{suffix}")
        with pytest.raises(BadInputError, match="cannot be read"):
            list(source.documents())
        with pytest.raises(BadInputError, match="cannot be read"):
            source.key()


def test_the_key_of_a_file_is_its_content_and_how_it_is_read(tmp_path: Path):
    a, b = (
        write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}]),
        write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}]),
    )
    assert FileSource(a).key() == FileSource(b).key()
    assert FileSource(a).key() != FileSource(a, column="body").key()
    as_text = tmp_path / "a.txt"
    as_text.write_bytes(a.read_bytes())
    assert FileSource(a).key() != FileSource(as_text).key()
