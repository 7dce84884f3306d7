"""Options that several commands take, each declared once, and how a command tells which were typed.

    def analyze(tokens: Tokens = 32_768) -> None: ...

Defaults stand with the commands, in whose --help they are shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# What is measured, with which probes, on which text.
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint file.")]
MapFile = Annotated[
    str | None,
    typer.Option(
        "--map", help="For any torch model: a map's TOML file, or its name (titans-pytorch); its code is run."
    ),
]
Probe = Annotated[list[str] | None, typer.Option("--probe", help="A probe's name; repeat it for several.")]
ProbeOrUsual = Annotated[
    list[str] | None,
    typer.Option("--probe", help="A probe's name; repeat it for several. Default: one a mechanism."),
]
Every = Annotated[bool, typer.Option("--all", help="Every probe.")]
Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        help="builtin, openwebtext, hf:NAME[:COLUMN], or a path to .txt, .jsonl or .parquet; may be repeated.",
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Scored tokens to measure on.")]
Split = Annotated[str, typer.Option("--split", help="heldout, train or all documents.")]
Carry = Annotated[
    str, typer.Option("--carry", help="Fresh state at each window, or carried to the document's end.")
]
WindowsAtOnce = Annotated[
    int | None, typer.Option("--batch", min=1, help="Windows at once; default by the model's context.")
]

Device = Annotated[
    str, typer.Option("--device", help="auto (an accelerator where there is one), cpu, cuda or cuda:N.")
]

# Which tokens are written.
Gate = Annotated[
    str | None,
    typer.Option(
        "--gate",
        help="absolute, quantile, zscore, ratio, excess, entropy-gap, assoc, momentum or random.",
    ),
]
Budget = Annotated[
    float | None, typer.Option("--budget", help="Of the gate: share of the tokens that are written, as 0.25.")
]
GateThreshold = Annotated[
    float | None, typer.Option("--gate-threshold", help="Of the gate's score, in place of a budget.")
]
GateWrites = Annotated[
    str, typer.Option("--gate-writes", help="Whose writes the gate is for: all, selfmod, cms or titans.")
]

# How a model is trained.
Preset = Annotated[str, typer.Option("--preset", help="nano, tiny, small or scaled.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of initial weights and data order.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Windows a step.")]
LearningRate = Annotated[
    float | None, typer.Option("--learning-rate", help="Of AdamW; default 3e-4, for nano and tiny 3e-3.")
]
Published = Annotated[
    bool, typer.Option("--published", help="The rule of the public reproduction, which collapses.")
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision", help="Of activations: float32 or bf16; default bf16 on an accelerator, else float32."
    ),
]
TruncateTicks = Annotated[
    int, typer.Option("--truncate-ticks", min=0, help="Cut the outer gradient every N ticks; 0: never.")
]

# How a grid is.
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Seeds 0 to N - 1 of every cell.")]
Steps = Annotated[
    int, typer.Option("--steps", min=1, help="Optimiser steps of every cell; a grid can be extended.")
]
HeldOutTokens = Annotated[
    int, typer.Option("--tokens", min=1, help="Held-out tokens that the losses are measured on.")
]
CheckpointEvery = Annotated[
    int, typer.Option("--checkpoint-every", min=1, help="Steps, and what a killed cell can lose.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Cells at once; default one a core, as memory allows.")
]
Threads = Annotated[
    int, typer.Option("--threads", min=1, help="Of each worker; losses depend on it in their last digits.")
]


def given(context: typer.Context, *names: str) -> list[str]:
    """Those of these parameters that were typed, as options are written: a default tells nothing of what was meant."""
    return [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name in names
        and (source := context.get_parameter_source(parameter.name)) is not None
        and source.name != "DEFAULT"
    ]


def refuse(options: list[str], why: str) -> None:
    """Raise BadInputError for options that would do nothing, if there are any."""
    if options:
        from hopeprobe.errors import BadInputError

        raise BadInputError(f"{', '.join(options)}: {why}")
