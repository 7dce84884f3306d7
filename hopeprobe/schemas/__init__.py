"""JSON Schemas (draft 2020-12) of the documents that are written: `results`, `baseline` and `check`, a file each.

A document's `schema_version` is that of its schema here. It is raised when a field is added, taken away or changes its
meaning; documents of earlier versions are still read.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from hopeprobe.errors import BadInputError, near_names

NAMES = ("results", "baseline", "check")


def schema(name: str) -> dict[str, Any]:
    """The schema of a document, by the name of what it holds. Raises BadInputError for another name."""
    if name not in NAMES:
        raise BadInputError(
            f"there is no schema {name!r}{near_names(name, NAMES)}: there are {', '.join(NAMES)}"
        )
    text = resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
