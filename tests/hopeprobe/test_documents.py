"""JSON from anywhere: what Python's own reader lets pass, each refused in one sentence."""

import json

import pytest

from hopeprobe import documents
from hopeprobe.documents import parse_json, read_document, read_records


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('{"a": NaN}', "NaN is no number"),
        ("[Infinity]", "Infinity is no number"),
        ("1e999", "1e999 is too large a number"),
        ("9" * 5000, "too large a whole number"),
        (str(1 << 63), "too large a whole number"),
        ('"\\ud800"', "is no Unicode text"),
        ('{"\\udfff": 1}', "is no Unicode text"),
        ("[" * 200_000, "nested too deep"),
        ("[" * 60 + "]" * 60, "nested too deep"),
        ("{", "Expecting property name"),
    ],
)
def test_what_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_what_is_read():
    text = '{"a": [1, -2.5, null, true, "\\u0000\\u00e9"], "b": {"c": 9223372036854775807}}'
    assert parse_json(text) == json.loads(text)
    assert parse_json("[NaN, -Infinity]", special=True)[1] == -float("inf")


def test_a_file_with_a_mark_of_its_encoding_is_read_and_one_that_is_too_large_is_not(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_document(path) == "[1]"
    monkeypatch.setattr(documents, "MOST_BYTES", 5)
    with pytest.raises(ValueError, match="more than"):
        read_document(path)


def test_lines_are_those_of_the_file_and_only_the_last_may_be_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "\u2028"}\n{"b": 1}\n{"c":', encoding="utf-8")
    assert [record for _, record in read_records(path)] == [{"a": "\u2028"}, {"b": 1}]
    for text, said in (('{"a": 1}\n{"c":\n', "line 2"), ("[1]\n", "line 1: it is no JSON object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            list(read_records(path))


@pytest.mark.parametrize("content", [b"\xc0\xfe", b'{"a": 1}\n\xff\xfe{', b'{"a": 1}\n{"b": "\xe9"}'])
def test_what_is_no_text_is_not_taken_for_cut_off(tmp_path, content):
    """In another encoding, say: nothing of it would be read, and nobody told."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"line \d: 'utf-8' codec can't decode"):
        list(read_records(path))


def test_a_file_that_is_cut_off_anywhere_loses_the_last_line_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    first, last = b'\xef\xbb\xbf{"a": "\xc3\xa4"}\n', '{"b": "ä€😀"}'.encode()
    for end in range(len(last) + 1):
        path.write_bytes(first + last[:end])
        whole = [{"b": "ä€😀"}] if end == len(last) else []
        assert [record for _, record in read_records(path)] == [{"a": "ä"}, *whole], last[:end]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1}\n{"b": "\xc3"}\n{"c": 2}\n', "line 2: 'utf-8' codec"),
        (b'{"a": 1}\n{"b": "\xc3\n', "line 2: 'utf-8' codec"),
        (b'\xff\n{"a": 1}', "line 1: 'utf-8' codec"),
    ],
)
def test_half_a_character_elsewhere_is_an_error(tmp_path, content, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{said}"):
        list(read_records(path))
