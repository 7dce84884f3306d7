"""The commands. Each parses its options and hands over; what takes time to import is imported when a command runs.

Those of the study are in `app_study`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hopeprobe.cli.app_study import ablate, compare, sweep
from hopeprobe.cli.options import (
    Batch,
    Budget,
    Carry,
    Checkpoint,
    Data,
    Device,
    Every,
    Gate,
    GateThreshold,
    GateWrites,
    LearningRate,
    MapFile,
    Precision,
    Preset,
    Probe,
    ProbeOrUsual,
    Published,
    Seed,
    Split,
    Tokens,
    TruncateTicks,
    WindowsAtOnce,
    given,
    refuse,
)

app = typer.Typer(
    name="hopeprobe",
    help="Mechanistic analysis of self-modifying memories: every number with its interval, its null and its verdict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Add --debug to any command to see the traceback behind an error.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import hopeprobe

        typer.echo(f"hopeprobe {hopeprobe.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    del version  # its callback did the work


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the run, the tables and the figures.")
    ] = Path("hopeprobe-demo"),
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps.")] = 60,
    seed: Seed = 0,
) -> None:
    """Train a tiny HOPE on text that ships with Python, measure it beside its nulls, save tables and figures."""
    from hopeprobe.cli.demo import run_demo

    raise typer.Exit(run_demo(out, steps, seed))


@app.command()
def train(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for checkpoints, metrics, timings and run.json.")
    ],
    preset: Preset = "tiny",
    variant: Annotated[
        str, typer.Option("--variant", help="Which mechanisms there are: hopeprobe params lists them.")
    ] = "full",
    data: Data = ["builtin"],  # noqa: B006 - typer copies it
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps in total.")] = 2000,
    seed: Seed = 0,
    batch: Batch = 8,
    learning_rate: LearningRate = None,
    published: Published = False,
    truncate_ticks: TruncateTicks = 0,
    gate: Gate = None,
    budget: Budget = None,
    gate_threshold: GateThreshold = None,
    gate_writes: GateWrites = "all",
    straight_through: Annotated[
        bool,
        typer.Option("--straight-through", help="The outer gradient passes the gate as it would a sigmoid."),
    ] = False,
    checkpoint_every: Annotated[int, typer.Option("--checkpoint-every", min=1, help="Steps.")] = 200,
    eval_every: Annotated[int, typer.Option("--eval-every", min=1, help="Steps.")] = 100,
    probe: Annotated[
        list[str] | None,
        typer.Option("--probe", help="A probe to run while it trains; repeat it for several."),
    ] = None,
    probe_every: Annotated[
        int, typer.Option("--probe-every", min=1, help="Steps between two runs of the probes.")
    ] = 100,
    probe_tokens: Annotated[
        int, typer.Option("--probe-tokens", min=1, help="Scored tokens of each run of the probes.")
    ] = 4096,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, bit for bit.")] = False,
    device: Device = "auto",
    precision: Precision = None,
    capture: Annotated[
        bool,
        typer.Option(
            "--capture/--no-capture", help="On CUDA: record a step, and repeat it where it proves the same."
        ),
    ] = True,
) -> None:
    """Train a model: checkpoints, one line of metrics a step, resumable."""
    from hopeprobe.cli.gates import gate_config
    from hopeprobe.cli.training import run_training

    if not probe:
        refuse(given(context, "probe_every", "probe_tokens"), "no probe runs: name one with --probe")
    run_training(
        out,
        preset_name=preset,
        variant=variant,
        data=data,
        use_published=published,
        truncate_ticks=truncate_ticks,
        gate=gate_config(gate, budget, gate_threshold, gate_writes, straight_through),
        resume=resume,
        steps=steps,
        seed=seed,
        batch=batch,
        learning_rate=learning_rate,
        checkpoint_every=checkpoint_every,
        eval_every=eval_every,
        probes=probe or [],
        probe_every=probe_every,
        probe_tokens=probe_tokens,
        device=device,
        precision=precision,
        capture=capture,
    )


@app.command()
def analyze(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CKPT...", help="Checkpoint files.")],
    model_map: MapFile = None,
    probe: Probe = None,
    every: Every = False,
    data: Data = ["builtin"],  # noqa: B006
    tokens: Tokens = 32_768,
    split: Split = "heldout",
    carry: Carry = "window",
    batch: WindowsAtOnce = None,
    gate: Gate = None,
    budget: Budget = None,
    gate_threshold: GateThreshold = None,
    gate_writes: GateWrites = "all",
    output_format: Annotated[str, typer.Option("--format", help="table, json or csv.")] = "table",
    output: Annotated[
        Path | None, typer.Option("--output", help="File to write instead of the terminal.")
    ] = None,
    figures: Annotated[Path | None, typer.Option("--figures", help="Folder to save figures in.")] = None,
    device: Device = "auto",
) -> None:
    """Measure checkpoints with probes; every number has its interval, its nulls and a verdict."""
    from hopeprobe.cli.analysis import run_analysis
    from hopeprobe.cli.gates import gate_rule

    code = run_analysis(
        checkpoints,
        model_map=model_map,
        probes=probe or [],
        every=every,
        data=data,
        tokens=tokens,
        split=split,
        carry=carry,
        batch=batch,
        gate=gate_rule(gate, budget, gate_threshold, gate_writes),
        output_format=output_format,
        output=output,
        figures=figures,
        device=device,
    )
    raise typer.Exit(code)


@app.command()
def baseline(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CKPT...", help="One checkpoint, or one of each of several seeds.")
    ],
    output: Annotated[Path, typer.Option("--output", help="File of the baseline, to be committed.")],
    model_map: MapFile = None,
    probe: ProbeOrUsual = None,
    every: Every = False,
    data: Data = ["builtin"],  # noqa: B006
    tokens: Tokens = 32_768,
    split: Split = "heldout",
    carry: Carry = "window",
    gate: Gate = None,
    budget: Budget = None,
    gate_threshold: GateThreshold = None,
    gate_writes: GateWrites = "all",
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            "--tolerance",
            help="STATISTIC=NUMBER or PROBE/STATISTIC=NUMBER: what may change; may be repeated.",
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Keep a checkpoint's numbers in a file, or those of several seeds, for `hopeprobe check`."""
    from hopeprobe.cli.gates import gate_rule
    from hopeprobe.cli.regression import run_baseline

    rule = gate_rule(gate, budget, gate_threshold, gate_writes)
    raise typer.Exit(
        run_baseline(
            checkpoints,
            model_map,
            output,
            probe or [],
            every,
            data,
            tokens,
            split,
            carry,
            rule,
            tolerance or [],
            device,
        )
    )


@app.command()
def check(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(metavar="CKPT...", help="A checkpoint; of a baseline of seeds also several seeds'."),
    ],
    baseline: Annotated[Path, typer.Option("--baseline", help="File that `hopeprobe baseline` wrote.")],
    model_map: MapFile = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", help="Where the baseline's text is now; default where it was. May be repeated."
        ),
    ] = None,
    batch: WindowsAtOnce = None,
    every: Annotated[bool, typer.Option("--every", help="Show what did not move too.")] = False,
    output_format: Annotated[str, typer.Option("--format", help="table or json.")] = "table",
    output: Annotated[
        Path | None, typer.Option("--output", help="File for the table, tab-separated, or the JSON.")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="File for JUnit XML.")] = None,
    github: Annotated[
        bool, typer.Option("--github", help="Print GitHub annotations; by itself in GitHub Actions.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Compare a checkpoint with a baseline: status 0 nothing moved, 1 something did, 3 not all could be measured."""
    from hopeprobe.cli.regression import run_check

    raise typer.Exit(
        run_check(
            checkpoints, model_map, baseline, data, batch, every, output_format, output, junit, github, device
        )
    )


@app.command()
def report(
    context: typer.Context,
    targets: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_CKPT...",
            help="Folders of runs (their last checkpoint), checkpoint files, or results in JSON.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="File of the page.")],
    title: Annotated[str | None, typer.Option("--title", help="Of the page; default what was given.")] = None,
    model_map: MapFile = None,
    probe: ProbeOrUsual = None,
    every: Every = False,
    data: Data = ["builtin"],  # noqa: B006
    tokens: Tokens = 32_768,
    files: Annotated[
        Path | None,
        typer.Option("--files", help="Folder for figures (SVG, PNG) and tables (CSV, LaTeX) as files too."),
    ] = None,
    device: Device = "auto",
) -> None:
    """One page that needs no network: verdicts, figures, tables with their nulls, definitions."""
    from hopeprobe.cli.reporting import run_report

    measuring = given(context, "model_map", "probe", "every", "data", "tokens", "device")
    raise typer.Exit(
        run_report(
            targets, model_map, output, title, probe or [], every, data, tokens, files, measuring, device
        )
    )


@app.command()
def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write, .safetensors.")],
    model_map: MapFile = None,
) -> None:
    """Write a checkpoint's weights as safetensors, for other tools."""
    from hopeprobe.cli.maps import opened
    from hopeprobe.exporting import export_weights
    from hopeprobe.files import check_places
    from hopeprobe.opening import open_checkpoint

    check_places([output], read=[checkpoint])
    (subject,) = opened([checkpoint], model_map)
    typer.echo(f"wrote {export_weights(open_checkpoint(subject), output)}")


@app.command()
def hooks(
    checkpoint: Checkpoint,
    model_map: MapFile = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="A name or glob, for instance '*.cms.*'.")
    ] = None,
    output_format: Annotated[str, typer.Option("--format", help="table or markdown.")] = "table",
) -> None:
    """List a model's hook points: dimensions, when they fire, whether they can be edited, what they hold."""
    from hopeprobe.cli.listing import show_hooks

    show_hooks(checkpoint, model_map, pattern, output_format)


@app.command()
def probes(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[PROBE...]", help="Show the definition of these.")
    ] = None,
) -> None:
    """List the probes and the question each answers; with names, definition, range, nulls, cost and source."""
    from hopeprobe.cli.listing import show_definitions, show_probes

    if names:
        show_definitions(names)
    else:
        show_probes()


@app.command()
def params() -> None:
    """Parameter counts of each preset and variant, beside the published sizes."""
    from hopeprobe.cli.listing import show_params

    show_params()


for command in (ablate, sweep, compare):
    app.command()(command)
