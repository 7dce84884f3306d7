from __future__ import annotations

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError

from hopeprobe.errors import BadInputError
from hopeprobe.tokens import load_tokens, open_sources, read_documents
from hopeprobe.tokens.hub import DEFAULT_LIMIT, HubSource


class Hub:
    """Stands in for `datasets.load_dataset`: answers by revision, remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str | None]] = []
        self.answers: dict[str | None, object] = {}

    def load_dataset(self, name, *, split, streaming, revision=None):
        assert split == "train"
        assert streaming
        self.calls.append((name, revision))
        answer = self.answers[revision]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


def texts(data: str) -> list[str]:
    return [document.text for document in read_documents(data)]


def test_a_dataset_is_streamed(hub: Hub):
    rows = datasets.Dataset.from_dict({"text": ["a", None, "c"]}).to_iterable_dataset()
    hub.answers = {None: rows}
    documents = list(read_documents("hf:someone/corpus"))
    assert [document.text for document in documents] == ["a", "c"]
    assert documents[1].origin == "hf:someone/corpus, row 3"
    assert hub.calls == [("someone/corpus", None)]


def test_the_column_may_be_named(hub: Hub):
    hub.answers = {None: [{"body": "b", "text": "t"}]}
    assert texts("hf:corpus:body") == ["b"]


def test_a_dataset_defined_by_a_script_is_read_from_its_parquet_conversion(hub: Hub):
    script = RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
    hub.answers = {None: script, "refs/convert/parquet": [{"text": "a"}]}
    (source,) = open_sources("openwebtext")
    assert source.name == "openwebtext"
    assert [document.text for document in source.documents()] == ["a"]
    assert hub.calls == [
        ("Skylion007/openwebtext", None),
        ("Skylion007/openwebtext", "refs/convert/parquet"),
    ]
    assert source.describe()["revision"] == "refs/convert/parquet"


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (ConnectionError("Couldn't reach 'corpus' on the Hub\nmore"), "cannot be reached.*--data builtin"),
        (
            DatasetNotFoundError("Dataset 'corpus' doesn't exist"),
            "no dataset 'corpus' that you may read.*HF_TOKEN",
        ),
        (
            ValueError("Bad split: train. Available splits: ['test']"),
            r"failed \(ValueError: Bad split: train",
        ),
        (RuntimeError(""), r"failed \(RuntimeError: no message"),
        (
            [{"body": "x", "texts": "y"}],
            "row 1: no column 'text'; did you mean 'texts'.*there: 'body', 'texts'.*name it, hf:.*:COLUMN",
        ),
        ([{"text": ["x"]}], "row 1: column 'text' holds list, not text"),
        ([], "corpus is empty"),
    ],
)
def test_what_goes_wrong_is_said(hub: Hub, answer: object, complaint: str):
    hub.answers = {None: answer}
    with pytest.raises(BadInputError, match=complaint):
        texts("hf:corpus")


def test_the_parquet_conversion_may_be_out_of_reach_too(hub: Hub):
    hub.answers = {
        None: RuntimeError("Dataset scripts are no longer supported, but found x.py"),
        "refs/convert/parquet": ConnectionError("gone"),
    }
    with pytest.raises(BadInputError, match="cannot be reached"):
        texts("hf:corpus")


def test_a_stream_that_breaks_leaves_no_cache(hub: Hub, tmp_path):
    def breaking():
        yield {"text": "a first document"}
        raise TimeoutError("read timed out")

    hub.answers = {None: breaking()}
    with pytest.raises(BadInputError, match="TimeoutError: read timed out"):
        load_tokens("hf:corpus", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_name_is_refused():
    with pytest.raises(BadInputError, match="names no dataset"):
        open_sources("hf:")


def test_the_hub_is_read_up_to_a_limit_and_not_asked_again(hub: Hub, tmp_path):
    def endless():
        while True:
            yield {"text": "a b c d e f g h"}

    hub.answers = {None: endless()}
    data = load_tokens("hf:corpus", cache_dir=tmp_path, max_tokens=21)
    assert data.lengths().tolist() == [8, 8, 5]
    again = load_tokens("hf:corpus", cache_dir=tmp_path, max_tokens=21)
    assert len(hub.calls) == 1
    assert again.source == {**data.source} == {
        "kind": "hub", "dataset": "corpus", "column": "text", "revision": "main", "dropped": 0,
    }  # fmt: skip
    load_tokens("hf:corpus", cache_dir=tmp_path, max_tokens=22)
    assert len(hub.calls) == 2


def test_without_a_limit_the_hub_has_one():
    (source,) = open_sources("openwebtext")
    assert source.default_limit == DEFAULT_LIMIT == 20_000_000


@pytest.mark.parametrize("first", [True, False])
def test_the_limit_of_the_hub_is_not_that_of_a_file_beside_it(hub: Hub, tmp_path, monkeypatch, first):
    made = HubSource.__post_init__
    monkeypatch.setattr(
        HubSource, "__post_init__", lambda self: (made(self), setattr(self, "default_limit", 20))[0]
    )
    hub.answers = {None: ({"text": "a b c d e f g h"} for _ in range(1000))}
    mine = tmp_path / "mine.txt"
    mine.write_text("one document of my own\n" * 3)
    given = ["hf:corpus", str(mine)] if first else [str(mine), "hf:corpus"]
    data = load_tokens(given, cache_dir=tmp_path / "kept")
    alone = load_tokens(str(mine), cache_dir=tmp_path / "kept")
    of_hub, of_mine = [8, 8, 4], alone.lengths().tolist()
    assert data.lengths().tolist() == (of_hub + of_mine if first else of_mine + of_hub)
    assert len(load_tokens(given, cache_dir=tmp_path / "kept", max_tokens=10).tokens) == 10, "of all together"
