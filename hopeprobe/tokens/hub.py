"""Documents from a dataset of the Hugging Face hub, streamed: nothing is downloaded beyond what is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hopeprobe.errors import BadInputError
from hopeprobe.tokens.document import Document
from hopeprobe.tokens.files import checked_text, missing_column

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEFAULT_LIMIT = 20_000_000
"""Tokens read from the hub unless told otherwise: some 90 MB of text, a minute of tokenising."""

_PARQUET = "refs/convert/parquet"


@dataclass
class HubSource:
    """The split `train` of the dataset `dataset`, text in `column`, as a `Source`.

    revision: None until `documents` has been read; then the one that answered, "main" or the hub's own
    parquet conversion, which stands in for datasets that are still defined by a script.
    """

    dataset: str
    column: str = "text"
    name: str = ""
    default_limit: int | None = DEFAULT_LIMIT
    revision: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.name = self.name or self.dataset

    def key(self) -> str:
        """SHA-256 (hex) of the dataset's name and column; its content is not known before it is read."""
        return hashlib.sha256(json.dumps(["hub", self.dataset, self.column]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """`{"kind": "hub", "dataset": …, "column": …}`, and the revision once it is known."""
        described = {"kind": "hub", "dataset": self.dataset, "column": self.column}
        return described if self.revision is None else {**described, "revision": self.revision}

    def documents(self) -> Iterator[Document]:
        """Yield the dataset's documents in its own order; null texts are skipped.

        Raises BadInputError where the hub cannot be reached, the dataset, its split `train` or the column
        does not exist, a text is not a string, or the stream breaks.
        """
        with self._asking():
            examples = iter(self._open())
        row = 0
        while True:
            with self._asking():
                example: Mapping[str, object] | None = next(examples, None)
            if example is None:
                return
            row += 1
            origin = f"hf:{self.dataset}, row {row}"
            if self.column not in example:
                raise BadInputError(
                    f"{origin}: {missing_column(self.column, list(example))}; name it, hf:{self.dataset}:COLUMN"
                )
            text = checked_text(example[self.column], self.column, origin)
            if text is not None:
                yield Document(text, origin)

    def _open(self) -> Any:
        import datasets

        try:
            stream = datasets.load_dataset(self.dataset, split="train", streaming=True)
            self.revision = "main"
        except RuntimeError as error:
            if "no longer supported" not in str(error):
                raise
            stream = datasets.load_dataset(self.dataset, split="train", streaming=True, revision=_PARQUET)
            self.revision = _PARQUET
        return stream

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        from datasets.exceptions import DatasetNotFoundError

        try:
            yield
        except DatasetNotFoundError as error:
            raise BadInputError(
                f"the hub has no dataset {self.dataset!r} that you may read ({_first_line(error)}); "
                "check the name, or set HF_TOKEN if it is private or gated"
            ) from error
        except ConnectionError as error:
            raise BadInputError(
                f"the hub cannot be reached for {self.dataset!r} ({_first_line(error)}); check the "
                "network and HF_HUB_OFFLINE, or use --data builtin or a file, which need none"
            ) from error
        except Exception as error:  # datasets lets through what its transports and parsers raise
            raise BadInputError(
                f"reading {self.dataset!r} from the hub failed ({type(error).__name__}: "
                f"{_first_line(error)}); try again, or download it and give a .jsonl or .parquet file"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no message"])[0]
