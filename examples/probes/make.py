"""The pages of probes, from their docstrings: `python examples/probes/make.py` writes one beside this file for each.

What `hopeprobe probes NAME` prints, in parts: the question, definition, nulls, how to read it, how it fails.
"""

import re
import sys
from pathlib import Path

from hopeprobe.probes import PROBES
from hopeprobe.probes.definitions import shared_definitions

HEADINGS = {
    "Nulls": "Nulls",
    "Verdicts": "Verdicts",
    "Reading": "How to read it",
    "Fails": "How it fails",
    "Cost": "Cost",
    "Source": "Source",
}


def page(name):
    """One probe's page, in Markdown."""
    question, _, text = PROBES[name].describe().partition("\n\n")
    parts = [f"# {name}", question, "## Definition"]
    for paragraph in re.sub(r"(?<=\.)\sSource: ", "\n\nSource: ", text).split("\n\n"):
        lead = re.match(rf"({'|'.join(HEADINGS)})\b[.:]? ", paragraph)
        if lead:
            heading = f"## {HEADINGS[lead[1]]}"
            if heading not in parts:
                parts.append(heading)
            # "Nulls: own-init" begins anew under its heading; "Nulls of the distance" and "Verdicts are" go on.
            if lead[0].rstrip()[-1] in ".:":
                paragraph = paragraph[lead.end() :]
                paragraph = paragraph[0].upper() + paragraph[1:]
        parts.append(paragraph)
    for file, shared in shared_definitions(PROBES[name]).items():
        parts += [f"## `{file}`", shared]
    parts.append(
        f"`hopeprobe analyze CKPT --probe {name}` measures it, and `hopeprobe probes {name}` prints this page.\n"
        "What a verdict means is in the [README](../../README.md)."
    )
    return "\n\n".join(parts) + "\n"


def main(folder):
    """Write the pages."""
    for name in PROBES:
        (folder / f"{name}.md").write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
