"""The study's commands: grids of runs. `app` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hopeprobe.cli.options import (
    Batch,
    CheckpointEvery,
    Data,
    Device,
    HeldOutTokens,
    LearningRate,
    Preset,
    Published,
    Seeds,
    Steps,
    Threads,
    TruncateTicks,
    Workers,
    given,
    refuse,
)


def ablate(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the grid; what is done in it is not repeated.")
    ],
    preset: Preset = "tiny",
    variants: Annotated[
        str, typer.Option("--variants", help="Names with commas between; all: every variant.")
    ] = "all",
    seeds: Seeds = 3,
    data: Data = ["builtin"],  # noqa: B006
    steps: Steps = 2000,
    batch: Batch = 8,
    learning_rate: LearningRate = None,
    tokens: HeldOutTokens = 32_768,
    checkpoint_every: CheckpointEvery = 100,
    truncate_ticks: TruncateTicks = 0,
    published: Published = False,
    workers: Workers = None,
    threads: Threads = 1,
    device: Device = "auto",
    probes: Annotated[
        str,
        typer.Option("--probes", help="Probes to run on the checkpoints, commas between; all: every one."),
    ] = "",
    probe_steps: Annotated[
        str,
        typer.Option(
            "--probe-steps", help="Steps to probe, commas between; default every checkpoint interval."
        ),
    ] = "",
    probe_tokens: Annotated[
        int, typer.Option("--probe-tokens", min=1, help="Scored tokens a probe.")
    ] = 12_288,
) -> None:
    """Train every variant with several seeds; losses, paired differences, and what becomes of the study's claims."""
    from hopeprobe.cli.probing import ProbeOptions
    from hopeprobe.cli.study import GridOptions, run_ablation, variants_from

    options = GridOptions(
        out, preset, data, seeds, steps, batch, learning_rate, tokens, checkpoint_every, truncate_ticks, published,
        workers, threads, device,
    )  # fmt: skip
    probing = ProbeOptions.typed(probes, probe_steps, probe_tokens)
    if probing is None:
        refuse(given(context, "probe_steps", "probe_tokens"), "no probe runs: name some with --probes")
    raise typer.Exit(run_ablation(options, variants_from(variants), [], probing))


def sweep(
    out: Annotated[Path, typer.Option("--out", help="Folder of the grid; that of ablate will do.")],
    threshold: Annotated[
        list[float],
        typer.Option("--threshold", help="Surprise in nats that a token must exceed to be written."),
    ],
    preset: Preset = "tiny",
    seeds: Seeds = 3,
    data: Data = ["builtin"],  # noqa: B006
    steps: Steps = 2000,
    batch: Batch = 8,
    learning_rate: LearningRate = None,
    tokens: HeldOutTokens = 32_768,
    checkpoint_every: CheckpointEvery = 100,
    truncate_ticks: TruncateTicks = 0,
    published: Published = False,
    workers: Workers = None,
    threads: Threads = 1,
    device: Device = "auto",
) -> None:
    """Train `full` at several surprise thresholds; those under the lowest surprise are one computation and run once."""
    from hopeprobe.cli.study import GridOptions, run_ablation

    options = GridOptions(
        out, preset, data, seeds, steps, batch, learning_rate, tokens, checkpoint_every, truncate_ticks, published,
        workers, threads, device,
    )  # fmt: skip
    raise typer.Exit(run_ablation(options, [], threshold))


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of grids, one a size.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for tables and figures; without it they are only shown."),
    ] = None,
) -> None:
    """Redraw grids from their records; several by size: what each component matters, and whether the order turns."""
    from hopeprobe.cli.study import run_comparison

    raise typer.Exit(run_comparison(runs, out))
