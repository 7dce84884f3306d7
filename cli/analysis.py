"""`hopeprobe analyze`: from options to results, in the format asked for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hopeprobe import ranks
from hopeprobe.analysis import analyze, chosen_probes, missing_from
from hopeprobe.cli.maps import opened
from hopeprobe.cli.tables import result_tables
from hopeprobe.cli.terminal import PLAIN_WIDTH, console, progress, say
from hopeprobe.errors import BadInputError, MeasurementError, near_names
from hopeprobe.files import check_places, write_atomically
from hopeprobe.printable import printable_json
from hopeprobe.probes import PROBES
from hopeprobe.report.export import file_names
from hopeprobe.results import Results, csv_files
from hopeprobe.subject import GateRule

FORMATS = ("table", "json", "csv")


def run_analysis(
    checkpoints: list[Path],
    *,
    model_map: str | None,
    probes: list[str],
    every: bool,
    data: list[str],
    tokens: int,
    split: str,
    carry: str,
    batch: int | None,
    gate: GateRule | None,
    output_format: str,
    output: Path | None,
    figures: Path | None,
    device: str,
) -> int:
    """Measure, write, and return the exit status: 3 when a measurement is missing."""
    if output_format not in FORMATS:
        hint = near_names(output_format, FORMATS)
        raise BadInputError(f"--format is {output_format!r}, must be table, json or csv{hint}")
    if output_format == "csv" and output is None:
        raise BadInputError("--format csv writes two tables, results and nulls: name the file with --output")
    chosen = asked_probes(probes, every)
    tables = csv_files(output) if output_format == "csv" and output is not None else (output,)
    if ranks.first():
        check_places(tables, [figures], [*checkpoints, *data])
    with progress() as report:
        results = analyze(
            opened(checkpoints, model_map),
            probes=chosen,
            data=data,
            tokens=tokens,
            split=split,
            carry=carry,
            batch=batch,
            gate=gate,
            progress=report,
            device=device,
        )
    if ranks.first():
        write_results(results, output_format, output)
    if figures is not None and ranks.first():
        for path in save_figures(results, figures):
            say(console(stderr=True), f"figure: {path}")
    return report_missing(results)


def asked_probes(names: list[str], every: bool, usual: Sequence[str] = ()) -> list[str]:
    """What --probe and --all ask for, the usual ones where that is nothing.

    Raises BadInputError for a name that there is not, with --all too, and where nothing is asked for or usual.
    """
    chosen = [probe.name for probe in chosen_probes(names)] if names else list(usual)
    if every:
        return list(PROBES)
    if not chosen:
        raise BadInputError(f"name a probe with --probe ({', '.join(PROBES)}), or take --all")
    return chosen


def write_results(results: Results, output_format: str, output: Path | None) -> None:
    """Print the results, or write them to a file."""
    if output_format == "json" and output is None:
        print(printable_json(results.to_json()))
    elif output_format == "json" and output is not None:
        results.write_json(output)
    elif output_format == "csv" and output is not None:
        results.write_csv(output)
    elif output is None:
        for table in result_tables(results):
            console().print(table)
    else:
        recorder = Console(record=True, width=PLAIN_WIDTH, file=io.StringIO())
        for table in result_tables(results):
            recorder.print(table)
        write_atomically(output, recorder.export_text().encode())


def save_figures(results: Results, folder: Path) -> list[Path]:
    """Every figure that these results allow: `PROBE.png`, and where there are several checkpoints one for each."""
    from hopeprobe.plots import draw_all, save

    figures = draw_all(results)
    names = file_names(figures)
    return [save(figure, folder / f"{names[name]}.png") for name, figure in figures.items()]


def report_missing(results: Results) -> int:
    """Say what could not be measured; 3 if anything, else 0."""
    missing = missing_from(results)
    for message in missing:
        say(console(stderr=True), f"not measured: {message}")
    return MeasurementError.exit_code if missing else 0
