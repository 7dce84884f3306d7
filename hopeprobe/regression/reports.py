"""A check for machines: JUnit XML, which CI systems show as tests, and GitHub's annotations.

JUnit: https://github.com/testmoapp/junitxml, one `testsuite` a probe and one `testcase` a number; what moved is a
`failure`, what is lost an `error`. Annotations: workflow commands on standard output, "Workflow commands for GitHub
Actions", GitHub Docs.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from hopeprobe.files import write_atomically

from .comparing import Outcome, cells

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .comparing import Check, Compared

_MOST_ANNOTATIONS = 10  # of a step; GitHub drops the others without a word


def write_junit(check: Check, path: str | os.PathLike[str]) -> Path:
    """Write the check as JUnit XML, whole or not at all. Raises BadInputError where that cannot be."""
    root = ET.Element("testsuites", _counted("hopeprobe", list(check.compared)))
    probes: dict[str, list[Compared]] = {}
    for one in check.compared:
        probes.setdefault(one.tracked.address.probe, []).append(one)
    for probe, found in probes.items():
        suite = ET.SubElement(root, "testsuite", _counted(probe, found))
        for one in found:
            name = str(one.tracked.address).removeprefix(f"{probe}/")
            case = ET.SubElement(suite, "testcase", {"classname": f"hopeprobe.{probe}", "name": _plain(name)})
            kind = {Outcome.MOVED: "failure", Outcome.LOST: "error"}.get(one.outcome)
            if kind:
                ET.SubElement(case, kind, {"message": _plain(described(one)), "type": str(one.outcome)})
    ET.indent(root)
    text = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return write_atomically(path, text + b"\n")


def github_annotations(check: Check) -> Iterator[str]:
    """GitHub's workflow commands, one a line: errors for what moved or is lost, warnings for what else to know."""
    bad = [one for one in check.ordered() if one.outcome is not Outcome.SAME]
    shown = bad if len(bad) <= _MOST_ANNOTATIONS else bad[: _MOST_ANNOTATIONS - 1]
    for one in shown:
        yield _command("error", f"{one.tracked.address} {one.outcome}", described(one))
    if len(bad) > len(shown):
        rest = f"{len(bad) - len(shown)} more are in the table of the log"
        yield _command("error", check.summary, rest)
    for message in (*check.missing, *check.notes):
        yield _command("warning", "hopeprobe check", message)


def described(one: Compared) -> str:
    """One sentence on what became of a number."""
    _, before, now, difference, interval, tolerance, finds, outcome = cells(one)
    if one.outcome is Outcome.LOST:
        return f"{before} in the baseline, now none: {one.why}"
    limits = f"tolerance {tolerance}, found from {finds}"
    return f"{before} in the baseline, now {now}: {difference} {interval}, {limits}; {outcome}"


def _counted(name: str, found: list[Compared]) -> dict[str, str]:
    count = {word: sum(one.outcome is word for one in found) for word in Outcome}
    return {
        "name": _plain(name),
        "tests": str(len(found)),
        "failures": str(count[Outcome.MOVED]),
        "errors": str(count[Outcome.LOST]),
        "skipped": "0",
    }


def _plain(text: str) -> str:
    """Text without the characters that XML 1.0 cannot hold."""
    return re.sub(r"[^\t\n\r\u0020-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]", "�", text)


def _command(kind: str, title: str, message: str) -> str:
    return f"::{kind} title={_escaped(title, title=True)}::{_escaped(message)}"


def _escaped(text: str, title: bool = False) -> str:
    for sign in "%\r\n:," if title else "%\r\n":
        text = text.replace(sign, f"%{ord(sign):02X}")
    return text
