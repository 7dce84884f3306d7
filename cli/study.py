"""`hopeprobe ablate`, `sweep`, `compare`: grids of runs, their tables and figures."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from hopeprobe.cli.probing import ProbeOptions, probe_cells
from hopeprobe.cli.terminal import console, progress, say, shown
from hopeprobe.cli.training import load_data
from hopeprobe.devices import find_device
from hopeprobe.errors import BadInputError, DivergedError, MeasurementError, near_names
from hopeprobe.locks import refuse_held, run_lock
from hopeprobe.model.config import PRESET_LEARNING_RATE
from hopeprobe.model.grid import Setting, cells, known_cells, run_grid, workers_for
from hopeprobe.model.train import TrainConfig
from hopeprobe.model.variants import VARIANTS
from hopeprobe.report.export import file_name
from hopeprobe.study import Cell, Comparison, Grid, Table, compare
from hopeprobe.study.comparison import FIGURES, probed_in
from hopeprobe.study.grid import REFERENCE
from hopeprobe.study.writing import write_claims, write_scaling, write_tables
from hopeprobe.tokens import EvalWindows

_STYLES = {"holds": "green", "does not hold": "red", "not resolved": "yellow"}


@dataclasses.dataclass(frozen=True)
class GridOptions:
    """What `ablate` and `sweep` have in common, as typed."""

    out: Path
    preset: str
    data: list[str]
    seeds: int
    steps: int
    batch: int
    learning_rate: float | None
    tokens: int
    checkpoint_every: int
    truncate_ticks: int
    published: bool
    workers: int | None
    threads: int
    device: str


def variants_from(text: str) -> list[str]:
    """Names in a comma-separated list, "all" for every variant; BadInputError offers near names."""
    names = list(VARIANTS) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise BadInputError(f"no variant was named (there are: {', '.join(VARIANTS)})")
    for name in names:
        if name not in VARIANTS:
            raise BadInputError(
                f"there is no variant {name!r}{near_names(name, VARIANTS)} (there are: {', '.join(VARIANTS)})"
            )
    return names


def run_ablation(
    options: GridOptions,
    variants: Sequence[str],
    thresholds: Sequence[float],
    probing: ProbeOptions | None = None,
) -> int:
    """Run what is missing of a grid, write its record, tables and figures; returns the exit status."""
    for threshold in thresholds:
        if not 0 <= threshold < math.inf:
            raise BadInputError(
                f"the threshold is {threshold:g}; surprise is a loss in nats, at least 0 and finite"
            )
    rate = options.learning_rate
    setting = Setting(
        options.preset,
        TrainConfig(
            steps=options.steps,
            batch=options.batch,
            learning_rate=PRESET_LEARNING_RATE.get(options.preset, TrainConfig.learning_rate)
            if rate is None
            else rate,
            checkpoint_every=options.checkpoint_every,
            eval_every=options.checkpoint_every,
            eval_tokens=min(options.tokens, TrainConfig.eval_tokens),
        ),
        tuple(_absolute(each) for each in options.data),
        options.tokens,
        options.published,
        options.truncate_ticks,
        options.threads,
        str(find_device(options.device)),
    )
    names = list(dict.fromkeys([REFERENCE, *variants]))
    specs = cells(setting, options.out, names, range(options.seeds), thresholds)
    screen = console(stderr=True)
    refuse_held(options.out)
    with progress() as report:
        data = load_data(list(setting.data), report)
        for tokens in (
            options.tokens,
            *([probing.tokens] if probing else []),
        ):  # too many are told before training
            EvalWindows(data, context=specs[0].model.context, tokens=tokens)
        with run_lock(options.out):
            known_cells(options.out, specs[0].shared(data))  # another grid's folder is, too
            ran = run_grid(specs, data, options.workers or workers_for(specs), report)
            if not ran.records:
                raise MeasurementError("no cell could be run: " + "; ".join(ran.failures))
            grid = grid_of(known_cells(options.out, specs[0].shared(data)), options.out)
            written = [grid.write(options.out), *write_tables(grid, options.out)]
            failures = list(ran.failures)
            if probing is not None:
                failures += probe_cells(
                    options.out, specs, ran.records, data, probing, report, setting.device
                )
            found = Comparison((grid,), grid, probed_in(options.out))
            written += write_claims(found.answers, options.out)
            written += save_study_figures(found, options.out)
    for failure in failures:
        say(screen, f"not measured: {failure}")
    for path in written:
        say(screen, f"wrote {path}")
    show_grids(found, console())
    diverged = [record for record in ran.records if record["status"] == "diverged"]
    for record in diverged:
        say(screen, f"diverged: {record['name']}, seed {record['seed']}: {record['why']}")
    if failures:
        return MeasurementError.exit_code
    return DivergedError.exit_code if diverged else 0


def _absolute(source: str) -> str:
    """A path as workers find it whatever folder they run in; anything else as it is."""
    named = source in ("builtin", "openwebtext") or source.startswith("hf:")
    return source if named or not os.path.exists(source) else str(Path(source).resolve())


def grid_of(records: Sequence[dict[str, Any]], folder: Path) -> Grid:
    """The record of a grid from those of its cells. Raises BadInputError for one that was changed."""
    try:
        return _grid_of(records)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"one of them does not have what a cell has ({type(error).__name__}: {error})"
    except BadInputError as error:
        what = str(error)
    raise BadInputError(
        f"records of cells, {folder / '*' / 'seed-*' / 'cell.json'}, are not of a grid: {what}"
    )


def _grid_of(records: Sequence[dict[str, Any]]) -> Grid:
    known = [each.name for each in dataclasses.fields(Cell)]
    shared = records[0]["shared"]
    evaluation = {**records[0]["evaluation"], "epochs": records[0]["epochs"]}
    hardware = {}
    for record in records:
        where = {**record["machine"], "threads": record["threads"], **record["versions"]}
        hardware[json.dumps(where, sort_keys=True)] = where
    return Grid(
        shared["preset"],
        shared["model"],
        shared["train"],
        shared["data"],
        evaluation,
        tuple(hardware.values()),
        tuple(Cell(**{key: record[key] for key in known if key in record}) for record in records),
    )


def show_grids(found: Comparison, screen: Console) -> None:
    """Print the tables of each grid."""
    for name, table in found.variants.items():
        for sentence in table.notes:
            say(screen, sentence)
        screen.print(_table("variants", table))
        if name in found.thresholds:
            screen.print(_table("surprise thresholds", found.thresholds[name]))


def _table(title: str, content: Table) -> RichTable:
    table = RichTable(title=shown(title), title_justify="left")
    for i, name in enumerate(content.header):
        table.add_column(name, justify="left" if i == 0 or name in ("finding", "its claim") else "right")
    for *first, claim in content.lines:
        table.add_row(*map(shown, first), shown(claim, style=_STYLES.get(claim, "default")))
    return table


def run_comparison(folders: Sequence[Path], out: Path | None) -> int:
    """Redraw one or several grids from their records; several are set beside each other by size."""
    found = compare(*folders)
    screen = console()
    show_grids(found, screen)
    if found.growths:
        screen.print(_table("sizes", found.sizes))
    if found.answers:
        screen.print(_table("the study's claims", found.claims))
    if out is not None:
        written = []
        for grid in found.grids:
            written += write_tables(grid, out if len(found.grids) == 1 else out / file_name(grid.preset))
        if len(found.grids) > 1:
            written += write_scaling(found.grids, found.growths, out)
        written += write_claims(found.answers, out)
        for path in (*written, *save_study_figures(found, out)):
            say(console(stderr=True), f"wrote {path}")
    return 0


def save_study_figures(found: Comparison, out: Path) -> list[Path]:
    """Figures 1 to 5 of the study, as far as there is something to draw."""
    from hopeprobe.plots import save

    drawn = found.plot()
    for name in (f"figure-{number}" for number in FIGURES):
        if name not in drawn:  # one of another time may not stand there
            (out / f"{name}.png").unlink(missing_ok=True)
    return [save(figure, out / f"{name}.png") for name, figure in drawn.items()]
