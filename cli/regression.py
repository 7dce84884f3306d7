"""`hopeprobe baseline` and `hopeprobe check`: numbers kept in a file, and later ones set against them."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
from rich.table import Table

from hopeprobe.cells import number
from hopeprobe.cli.analysis import asked_probes
from hopeprobe.cli.maps import opened
from hopeprobe.cli.terminal import console, progress, say, shown
from hopeprobe.errors import BadInputError, near_names
from hopeprobe.files import check_places, write_atomically
from hopeprobe.locks import file_lock
from hopeprobe.printable import printable, printable_json
from hopeprobe.regression import DEFAULT_PROBES, Baseline, Check, check, make_baseline
from hopeprobe.regression.comparing import COLUMNS, Outcome
from hopeprobe.regression.reports import github_annotations, write_junit
from hopeprobe.results import nan_to_null
from hopeprobe.subject import GateRule

_STYLES = {"moved": "red", "lost": "yellow"}


def run_baseline(
    checkpoints: list[Path],
    model_map: str | None,
    output: Path,
    probes: list[str],
    every: bool,
    data: list[str],
    tokens: int,
    split: str,
    carry: str,
    gate: GateRule | None,
    tolerance: list[str],
    device: str,
) -> int:
    """Measure and write; 0."""
    tolerances = dict(map(_tolerance, tolerance))
    chosen = asked_probes(probes, every, DEFAULT_PROBES)
    check_places([output], read=[*checkpoints, *data])
    with file_lock(output), progress() as report:
        made = make_baseline(
            opened(checkpoints, model_map),
            chosen,
            data,
            tokens,
            split,
            carry,
            gate,
            tolerances,
            progress=report,
            device=device,
        )
        made.write(output)
    screen = console()
    screen.print(_kept(made))
    for line in filter(None, (*_reading(made), made.dead)):
        say(screen, line)
    say(screen, f"wrote {output}; compare with: hopeprobe check CKPT --baseline {output}")
    return 0


def run_check(
    checkpoints: list[Path],
    model_map: str | None,
    baseline: Path,
    data: list[str] | None,
    batch: int | None,
    every: bool,
    output_format: str,
    output: Path | None,
    junit: Path | None,
    github: bool,
    device: str,
) -> int:
    """Measure, compare, show, and return the exit status."""
    if output_format not in ("table", "json"):
        hint = near_names(output_format, ("table", "json"))
        raise BadInputError(f"--format is {output_format!r}, must be table or json{hint}")
    check_places([output, junit], read=[*checkpoints, baseline, *(data or ())])
    kept = Baseline.read(baseline)
    check_places([output, junit], read=kept.settings.data)
    with progress() as report:
        found = check(opened(checkpoints, model_map), kept, data, batch=batch, progress=report, device=device)
    if junit is not None:
        write_junit(found, junit)
    if output_format == "json":
        text = json.dumps(nan_to_null(found.to_dict()), allow_nan=False, indent=1, ensure_ascii=False) + "\n"
        if output is None:
            print(printable_json(text), end="")
        else:
            write_atomically(output, text.encode())
    else:
        _show(found, every, output)
    if github or os.environ.get("GITHUB_ACTIONS") == "true":
        # On standard output, where the runner reads them; beside JSON there they would be no JSON.
        quiet = output_format == "json" and output is None
        for line in github_annotations(found):
            say(console(stderr=quiet), line)
    return found.exit_code


def _tolerance(given: str) -> tuple[str, float]:
    name, sign, value = given.rpartition("=")
    try:
        return name, float(value if sign and name else "?")
    except ValueError:
        raise BadInputError(
            f"--tolerance is {given!r}, must be STATISTIC=NUMBER, for instance output_cosine=0.02"
        ) from None


def _kept(made: Baseline) -> Table:
    """A line a statistic: how many numbers, what may change, what would be found."""
    table = Table(title=shown("baseline"), title_justify="left")
    for name in ("statistic", "numbers", "values", "tolerance", "smallest change found", "verdicts"):
        table.add_column(name, justify="left" if name in ("statistic", "verdicts") else "right")
    frame = made.table
    for (probe, statistic), rows in frame.groupby(["probe", "statistic"], sort=False):
        unit = "" if rows.unit.iloc[0] == "1" else f" {rows.unit.iloc[0]}"
        counts = Counter(verdict for text in rows.verdict for verdict in text.split(", "))
        table.add_row(
            shown(f"{probe}/{statistic}"),
            str(len(rows)),
            _range(rows.value.tolist()) + unit,
            _range(rows.tolerance.tolist()),
            _range(rows.found.tolist()),
            shown(", ".join(f"{n} {verdict}" for verdict, n in counts.items())),
        )
    return table


def _range(values: list[float]) -> str:
    low, high = (number(float(end)) for end in (np.min(values), np.max(values)))
    return low if low == high else f"{low} … {high}"


def _reading(made: Baseline) -> list[str]:
    n, seeds = len(made.tracked), len(made.checkpoints)
    what = f"{n} statistics" + (f", {len(made.unmeasured)} rows without a number" if made.unmeasured else "")
    where = f"{made.data.get('tokens')} tokens of {made.data.get('name')}"
    if not made.of_seeds:
        expects = "the same numbers, and finds what differs by more than arithmetic in another order can"
        return [f"{what}, of one checkpoint on {where}: a check expects {expects}"]
    found = [f"{what}, of {seeds} seeds on {where}: a check expects another seed's", made.tails]
    if made.unresolved:
        found.append(
            f"{len(made.unresolved)} of {n} tolerances are below the smallest change beyond them that {seeds} seeds "
            "can show: changes of their size can go unseen. More seeds, or fewer statistics, show smaller ones"
        )
    return found


def _show(found: Check, every: bool, output: Path | None) -> None:
    lines = list(found.lines(every))
    if output is not None:
        texts = ["\t".join(COLUMNS), *("\t".join(map(printable, cells)) for cells in lines)]
        write_atomically(output, ("\n".join(texts) + "\n").encode())
    screen = console()
    if lines:
        table = Table()
        for name in COLUMNS:
            left = name in ("statistic", "outcome")
            table.add_column(
                name, justify="left" if left else "right", overflow="fold" if left else "ellipsis"
            )
        for *cells, outcome in lines:
            style = _STYLES.get(outcome.partition(":")[0], "default")
            table.add_row(*map(shown, cells), shown(outcome, style=style))
        screen.print(table)
    if found.new:
        say(screen, f"{len(found.new)} numbers are not in the baseline and were not checked: {_few(found)}")
    for note in found.notes:
        say(screen, f"note: {note}")
    for message in found.missing:
        say(console(stderr=True), f"not measured: {message}")
    verdict = (
        "regression" if found.of(Outcome.MOVED) else "passed" if found.passed else "not all was measured"
    )
    say(screen, f"{verdict}: {found.summary}")


def _few(found: Check) -> str:
    shown = ", ".join(map(str, found.new[:3]))
    return shown + (", …" if len(found.new) > 3 else "")
