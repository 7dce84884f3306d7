"""Tables of a study: as data frames, as lines of text, as CSV and Markdown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hopeprobe.files import write_atomically
from hopeprobe.stats import Contrast, OverSeeds

from .claims import Claim
from .grid import REFERENCE, Grid, differences_to_study, layers_of
from .published import NOISE, column
from .scaling import Growth, other_differences
from .summary import SAME, Row, is_threshold, summarise
from .table import markdown

if TYPE_CHECKING:
    import pandas as pd

#: Digits of a loss, nats a token.
_DIGITS = 3
TABLE_HEADER = (
    "variant", "parameters", "seeds", "loss, live", "loss, frozen", "Δ to full, live", "resolves", "q", "finding",
    "study", "study's Δ", "its claim",
)  # fmt: skip
SWEEP_HEADER = ("threshold", "gate open", "lowest surprise", *TABLE_HEADER[2:])
SCALING_HEADER = (
    "variant", "sizes", "Δ small", "Δ large", "change", "resolves", "q", "ratio", "study's Δ", "its claim",
)  # fmt: skip


def cells_frame(grid: Grid) -> pd.DataFrame:
    """One row a cell."""
    import pandas as pd

    rows = []
    for cell in grid.cells:
        row = dataclasses.asdict(cell)
        del row["curve"], row["first_batch"]
        rows.append({key: _rounded(value) for key, value in row.items()})
    frame: pd.DataFrame = pd.DataFrame(rows)
    return frame


def table_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """One row a variant, numbers as numbers."""
    import pandas as pd

    out = []
    for row in rows:
        flat: dict[str, Any] = {"name": row.name, "parameters": row.parameters, "seeds": row.seeds}
        flat |= {"diverged": row.diverged, "same_as": row.same_as}
        for name in ("live", "frozen", "delta", "delta_frozen"):
            flat |= _spread(name, getattr(row, name))
        flat |= {key: _rounded(getattr(row, key)) for key in ("q", "finding", "published", "published_delta")}
        flat |= {key: _rounded(getattr(row, key)) for key in ("claim", "gate_rate", "surprise_min")}
        out.append(flat)
    frame: pd.DataFrame = pd.DataFrame(out)
    return frame


def scaling_frame(growths: Sequence[Growth]) -> pd.DataFrame:
    """One row a component and pair of sizes."""
    import pandas as pd

    out = []
    for growth in growths:
        flat: dict[str, Any] = {"name": growth.name, "small": growth.small, "large": growth.large}
        flat |= _spread("delta_small", growth.delta_small.delta) | _spread(
            "delta_large", growth.delta_large.delta
        )
        flat |= {f"change_{k}": _rounded(v) for k, v in dataclasses.asdict(growth.change).items()}
        flat |= {"q": _rounded(growth.q), "ratio": _rounded(growth.ratio), "claim": growth.claim}
        out.append(flat)
    frame: pd.DataFrame = pd.DataFrame(out)
    return frame


def _spread(name: str, spread: OverSeeds | None) -> dict[str, Any]:
    keys = [each.name for each in dataclasses.fields(OverSeeds)]
    return {f"{name}_{key}": math.nan if spread is None else _rounded(getattr(spread, key)) for key in keys}


def _rounded(value: Any) -> Any:
    """Six digits: what two machines may have different is beyond."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def table_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells of the table of variants, as text."""
    return [
        (row.name, f"{row.parameters / 1e6:.2f}M", *_common(row))
        for row in rows
        if not is_threshold(row.name)
    ]


def sweep_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of the table of thresholds: `full`, `no-surprise` and every threshold."""
    return [row for row in rows if is_threshold(row.name) or row.name in (REFERENCE, "no-surprise")]


def sweep_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells of the table of thresholds, as text."""
    return [
        (row.name, _percent(row.gate_rate), _number(row.surprise_min, 3), *_common(row))
        for row in sweep_rows(rows)
    ]


def scaling_lines(growths: Sequence[Growth]) -> list[tuple[str, ...]]:
    """Cells of the table of sizes, as text."""
    lines: list[tuple[str, ...]] = []
    for growth in growths:
        study = "" if growth.published is None else " → ".join(f"{each:+.3f}" for each in growth.published)
        lines.append(
            (
                growth.name,
                f"{growth.small} → {growth.large}",
                _interval(growth.delta_small.delta, signed=True),
                _interval(growth.delta_large.delta, signed=True),
                _interval(growth.change, signed=True),
                _number(growth.change.resolution),
                _number(growth.q, 3),
                _number(growth.ratio, 2),
                study,
                growth.claim,
            )
        )
    return lines


def _common(row: Row) -> tuple[str, ...]:
    finding = row.finding
    if row.same_as:
        finding = f"= {row.same_as}" if row.finding == SAME else f"{row.finding}; = {row.same_as}"
    lost = f" (+{row.diverged} diverged)" if row.diverged else ""
    return (
        f"{row.seeds}{lost}",
        _interval(row.live),
        _interval(row.frozen),
        _interval(row.delta, signed=True),
        "" if row.delta is None else _number(row.delta.resolution),
        _number(row.q, 3),
        finding,
        "" if row.published is None else f"{row.published:.3f}",
        "" if row.published_delta is None else f"{row.published_delta:+.3f}",
        row.claim,
    )


def _interval(spread: OverSeeds | Contrast | None, *, signed: bool = False) -> str:
    if spread is None:
        return ""
    value = spread.mean if isinstance(spread, OverSeeds) else spread.difference
    if math.isnan(value):
        return "none"
    sign = "+" if signed else ""
    text = f"{value:{sign}.{_DIGITS}f}"
    return (
        text
        if math.isnan(spread.ci_low)
        else f"{text} [{spread.ci_low:{sign}.3f}, {spread.ci_high:{sign}.3f}]"
    )


def _number(value: float, digits: int = 2) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}g}"


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.2f} %"


def setting_lines(grid: Grid) -> list[str]:
    """What a reader must know of how the numbers came to be, a sentence each."""
    model, text = grid.model, grid.data
    size = f"{grid.preset}: width {model['dim']}, {layers_of(grid)}, context {model['context']}"
    trained = (
        f"{grid.train['steps']:,} steps of {grid.train['batch']} windows, AdamW at {grid.train['learning_rate']:g}, "
        f"{grid.evaluation['epochs']:.2g} epochs of {text['name']} ({text['n_documents']:,} documents)"
    )
    measured = (
        f"losses in nats a token on the same {grid.evaluation['tokens']:,} held-out tokens of "
        f"{grid.evaluation['documents']:,} documents, live and with every write gate closed (frozen)"
    )
    theirs = differences_to_study(grid)
    beside = f"the study's column {column(model['dim'])!r}"
    lines = [f"{size}. {trained}; {measured}."]
    if theirs:
        lines.append(f"Not the published setting; here (and in {beside}): {'; '.join(theirs)}.")
    else:
        lines.append(
            f"The data, steps and sizes of {beside}; which loss that reports, the study does not say."
        )
    lines.append(
        f"Intervals (95 %) are over {len(grid.seeds)} seeds, not over texts: another seed, the same tokens. "
        "Differences are paired by seed. `resolves` is the smallest difference that the test of one row (5 %) finds in "
        "four of five cases; q counts all rows; a claim below `resolves` is not resolved. The study ran one seed; its "
        f"own noise is {NOISE} nats."
    )
    if len(grid.hardware) > 1:
        lines.append(
            "Its cells ran on several machines, thread counts or versions: see `hardware` in the record."
        )
    return lines


def write_tables(grid: Grid, folder: Path) -> list[Path]:
    """Write `cells.csv`, `table.csv` and `tables.md` of one grid."""
    rows = summarise(grid)
    parts = [" ".join(setting_lines(grid)) + "\n", markdown(TABLE_HEADER, table_lines(rows))]
    if any(is_threshold(row.name) for row in rows):
        parts.append(markdown(SWEEP_HEADER, sweep_lines(rows)))
    twins: dict[tuple[str, str | None, str], list[str]] = {}
    for cell in grid.cells:
        if cell.same_as is not None:
            twins.setdefault((cell.name, cell.same_as, cell.why), []).append(str(cell.seed))
    for (name, other, why), seeds in twins.items():
        which = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"
        parts.append(f"{name}, {which}, is the computation of {other} and was not run: {why}.\n")
    parts += [f"{c.name}, seed {c.seed}, diverged: {c.why}.\n" for c in grid.cells if not c.done]
    return [
        write_atomically(
            folder / "cells.csv", cells_frame(grid).to_csv(index=False, lineterminator="\n").encode()
        ),
        write_atomically(
            folder / "table.csv", table_frame(rows).to_csv(index=False, lineterminator="\n").encode()
        ),
        write_atomically(folder / "tables.md", "\n".join(parts).encode()),
    ]


CLAIMS_HEADER = ("study", "claim", "here", "at initialisation", "answer")


def write_claims(found: Sequence[Claim], folder: Path) -> list[Path]:
    """Write `claims.md`; nothing where there is nothing to say."""
    if not found:
        return []
    lines = [dataclasses.astuple(claim) for claim in found]
    return [write_atomically(folder / "claims.md", markdown(CLAIMS_HEADER, lines).encode())]


def write_scaling(grids: Sequence[Grid], growths: Sequence[Growth], folder: Path) -> list[Path]:
    """Write `scaling.csv` and `scaling.md`."""
    sizes = " ".join(setting_lines(grid)[0] for grid in grids)
    note = (
        "Δ is the loss of the variant less that of `full`, live, paired by seed. The change between two sizes has "
        "Welch's interval; the ratio is given where both differences are findings of one sign, and has none.\n"
    )
    others = other_differences(grids)
    if others:
        note += f"The grids differ in more than size, and a change may be of that: {'; '.join(others)}.\n"
    text = f"{sizes}\n\n{note}\n{markdown(SCALING_HEADER, scaling_lines(growths))}"
    return [
        write_atomically(
            folder / "scaling.csv", scaling_frame(growths).to_csv(index=False, lineterminator="\n").encode()
        ),
        write_atomically(folder / "scaling.md", text.encode()),
    ]
