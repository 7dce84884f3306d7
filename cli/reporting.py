"""`hopeprobe report`: runs, checkpoints and results to one page."""

from __future__ import annotations

from pathlib import Path

from hopeprobe.analysis import analyze
from hopeprobe.cli.analysis import asked_probes, report_missing
from hopeprobe.cli.maps import opened
from hopeprobe.cli.options import refuse
from hopeprobe.cli.terminal import console, progress, say
from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.files import check_places
from hopeprobe.model.checkpoint import run_checkpoints
from hopeprobe.opening import labelled
from hopeprobe.plots import draw_loss_curve
from hopeprobe.plots.canvas import Canvas
from hopeprobe.regression import DEFAULT_PROBES
from hopeprobe.report import export, write_page
from hopeprobe.results import Results, check_names, joined


def run_report(
    targets: list[Path],
    model_map: str | None,
    output: Path,
    title: str | None,
    probes: list[str],
    every: bool,
    data: list[str],
    tokens: int,
    files: Path | None,
    measuring: list[str],
    device: str,
) -> int:
    """Measure what is not measured yet, write the page, and return the exit status: 3 when something is missing.

    measuring: options typed that say how; BadInputError where there is nothing to measure.
    """
    chosen = asked_probes(probes, every, DEFAULT_PROBES)
    checkpoints: list[Path] = []
    folders: list[Path] = []
    kept: list[Path] = []
    read: list[Results] = []
    for target in targets:
        if target.is_dir():
            checkpoints.append(_last_of(target))
            folders.append(target if target.name else target.resolve())
        elif target.suffix == ".json":
            read.append(Results.read_json(target))
            kept.append(target)
        else:
            checkpoints.append(target)
    check_places([output], [files], [*checkpoints, *kept, *data])
    if not checkpoints:
        refuse(
            measuring,
            "results are not measured again: leave it out, or name the checkpoints in place of results",
        )
    # What cannot go together is told before hours are spent on measuring.
    check_names([*(one for results in read for one in results.checkpoints), *_named(checkpoints)])
    curves = _curves(folders)
    if checkpoints:
        with progress() as report:
            measured = analyze(
                opened(checkpoints, model_map), chosen, data, tokens, progress=report, device=device
            )
        read.insert(0, measured)
    results = joined(read)
    name = title or ", ".join(target.name or str(target.resolve().name) for target in targets)
    written = [write_page(results, output, name, curves)]
    if files is not None:
        written += export(results, files, curves)
    screen = console()
    counts = results.table.verdict.value_counts()
    say(screen, ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    for path in written:
        say(screen, f"wrote {path}")
    return report_missing(results)


def _named(checkpoints: list[Path]) -> list[dict[str, str]]:
    """What is known of checkpoints before they are opened, as results will record it."""
    return [
        {"name": name, "path": str(path)}
        for name, path in zip(labelled(checkpoints), checkpoints, strict=True)
    ]


def _last_of(folder: Path) -> Path:
    found = run_checkpoints(folder)
    if not found:
        runs = sorted(path.parent for path in folder.glob("*/step-*.pt"))
        hint = f"; there are runs in it, for instance {runs[-1]}" if runs else ""
        raise BadInputError(f"{folder} holds no checkpoint (step-000200.pt): it is no folder of a run{hint}")
    return found[-1]


def _curves(folders: list[Path]) -> dict[str, Canvas]:
    """A figure of training for each run that has a record of it, by the folder's name."""
    curves: dict[str, Canvas] = {}
    for name, folder in zip(labelled(folders), folders, strict=True):
        record = folder / "metrics.jsonl"
        if record.exists():
            try:
                curves[name] = draw_loss_curve(record)
            except MeasurementError as error:  # a run of which no step is recorded
                say(console(stderr=True), f"{record}: {error}")
    return curves
