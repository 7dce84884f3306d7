"""JSON that may come from anywhere: strict, of bounded size and depth, and nothing in it said twice.

Python's own reader takes the last of two equal keys, numbers that are none, whole numbers of any length, halves of
characters, and nesting that whoever walks through it cannot follow. Each of these ends later, in a traceback or in a
number that nobody wrote; here each is a `ValueError` that says what it is.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

MOST_BYTES = 1 << 28
"""Of a document: an analysis of a hundred checkpoints has a tenth of that."""

_MOST_DEPTH = 50
_MOST_DIGITS = 19  # of a whole number: what 64 bits hold
_SHOWN = 40


def read_document(path: str | os.PathLike[str]) -> str:
    """The text of a file. Raises OSError, UnicodeDecodeError (a ValueError), and ValueError for too large a one."""
    return _content(path).decode()


def parse_json(text: str, special: bool = False) -> Any:
    """Plain data of a JSON text. special: NaN and Infinity may stand for a number, as Python writes them.

    Raises ValueError for anything else that JSON does not allow, for a key that is there twice, a number out of range,
    text that is no Unicode, and data nested more than 50 deep.
    """

    def constant(name: str) -> float:
        if special:
            return float(name)
        raise ValueError(f"{name} is no number that JSON knows")

    try:
        found = json.loads(
            text,
            object_pairs_hook=_once,
            parse_int=_whole,
            parse_float=None if special else _finite,
            parse_constant=constant,
        )
    except RecursionError:
        raise ValueError("its data are nested too deep") from None
    _check(found)
    return found


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a file and the JSON object in each; the last may be cut off, without its end, by a kill.

    Raises OSError, ValueError for too large a file, and ValueError that says the line for one that is no UTF-8, for
    what `parse_json` refuses, and for no object.
    """
    # As bytes: the file may end within a character, and text has more signs that break lines than JSON has.
    lines = _content(path).split(b"\n")
    whole = lines[-1] == b""
    lines = lines[: len(lines) - whole]
    for number, content in enumerate(lines, 1):
        try:
            line = content.decode()
            record = parse_json(line, special=True)
        except ValueError as error:
            # What was cut off within a character is not what is no UTF-8 at all.
            cut = not isinstance(error, UnicodeDecodeError) or error.reason == "unexpected end of data"
            if cut and number == len(lines) and not whole:
                return
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"line {number}: it is no JSON object")  # noqa: TRY004 - as for all that a file can be
        yield line, record


def _content(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file, without the mark of its encoding. Raises OSError, and ValueError for too large a one."""
    with Path(path).open("rb") as opened:
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
    return content.removeprefix(codecs.BOM_UTF8)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:_SHOWN]!r} is there twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS or abs(int(digits)) >= 1 << 63:
        raise ValueError(f"{digits[:_SHOWN]}{'…' * (len(digits) > _SHOWN)} is too large a whole number")
    return int(digits)


def _finite(digits: str) -> float:
    found = float(digits)
    if found in (float("inf"), float("-inf")):
        raise ValueError(f"{digits[:_SHOWN]} is too large a number")
    return found


def _check(found: Any) -> None:
    """Raise ValueError for data too deep, and for halves of characters; a stack of its own needs no recursion."""
    stack = [iter([found])]
    while stack:
        value = next(stack[-1], stack)
        if value is stack:
            stack.pop()
        elif isinstance(value, str):
            _check_text(value)
        elif isinstance(value, dict | list):
            if len(stack) > _MOST_DEPTH:
                raise ValueError("its data are nested too deep")
            for key in value if isinstance(value, dict) else ():
                _check_text(key)
            stack.append(iter(value.values() if isinstance(value, dict) else value))


def _check_text(text: str) -> None:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[:_SHOWN]!r} is no Unicode text ({error.reason})") from None
