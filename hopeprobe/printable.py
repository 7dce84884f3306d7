r"""Text from files on its way to a terminal, a log, a spreadsheet: seen for what it is, and never obeyed.

A name can hold escape sequences that clear a screen or colour a lie green, a line break and `::error::` that CI takes
for a command, marks that turn the order of what follows, and `=` which a spreadsheet computes.
"""

from __future__ import annotations

import re
from typing import Any

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\t\n]"
)
_FORMULA = re.compile(r"\s*[=+\-@]|[\t\r]")
MOST = 4000
"""Characters of one message: what a file says of itself may have any length."""


def printable(text: str, lines: bool = False) -> str:
    r"""The text with control signs written out, as `\x1b` or `\u202e`; lines: line breaks and tabs stay.

    >>> printable("\x1b[2Jall \u202ewell")
    '\\x1b[2Jall \\u202ewell'
    """

    def written(match: re.Match[str]) -> str:
        sign = match[0]
        return sign if lines and sign in "\n\t" else sign.encode("unicode_escape", "surrogatepass").decode()

    return _CONTROLS.sub(written, text)


def message(text: str) -> str:
    """One line of bounded length, with its beginning and its end."""
    short = text if len(text) <= MOST else f"{text[: MOST // 2]} … {text[-MOST // 2 :]}"
    return printable(short)


def printable_json(text: str) -> str:
    r"""A JSON text that says the same, with the control signs that JSON allows in texts as `\u009b`."""
    return re.sub("[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069]", lambda m: f"\\u{ord(m[0]):04x}", text)


def no_formula(value: Any) -> Any:
    """A cell of a table for spreadsheets: text that one would compute begins with an apostrophe, as they write it."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value
