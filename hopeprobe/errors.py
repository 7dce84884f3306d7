"""Errors that reach a person: each says what is wrong with which file, and what to do.

Every one carries the exit status of the command line (design, section 7): 2 for bad input, 3 for a measurement that
could not be made or a process that was lost, 4 for training that diverged. Anything else that escapes is a defect of
ours and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HopeprobeError(Exception):
    """Base of all errors meant for people; `exit_code` is the process status the command line ends with."""

    exit_code: int = 2


class BadInputError(HopeprobeError):
    """What was given cannot be used: a file, a name, a number, a configuration (exit 2)."""

    exit_code = 2


class DamagedFileError(BadInputError):
    """A file was cut off or changed since it was written, and is of no use to anybody (exit 2)."""


class MeasurementError(HopeprobeError):
    """A measurement could not be made although the input was understood (exit 3)."""

    exit_code = 3


class DivergedError(HopeprobeError):
    """Training met a value that is not finite (exit 4)."""

    exit_code = 4


class LostRankError(HopeprobeError):
    """One of several processes that work as one ended, or does not answer (exit 3)."""

    exit_code = 3


def near_names(name: str, known: Iterable[str], n: int = 3) -> str:
    """A sentence part that offers the names nearest to `name`: `"; did you mean 'a', 'b'?"`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f"; did you mean {', '.join(repr(c) for c in close)}?" if close else ""
