"""Speed as ratios, each against a peer or a ceiling measured in the same run, in turn with it; nothing here is a test.

    layer        a self-modifying layer against nested-learning's, and against the matrix rate
    titans       a Titans memory against titans-pytorch's
    models       streaming and training of `small` against nested-learning's, and of HOPE against a Transformer
    gates        streaming with gates at a budget against every token written; needs no peer
    probes       idle hook points, one probe and all of them against a bare pass; workers; long streams
    commands     import, --help, demo

Run with `make bench`, in an environment that has the peers; `.venv/bin/python tests/benchmarks/run.py gates` does
without. Every number is a median over `--turns`; ratios are taken
within a turn. `--json FILE` keeps all times.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import warnings
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import clock
import torch
from rich.console import Console
from rich.table import Table

PARTS = ("layer", "titans", "models", "gates", "probes", "commands")
PEERS = ("nested-learning", "titans-pytorch")


def measure(part: str, turns: int, environment: Path, demo: bool) -> list[clock.Row]:
    """All rows of one part."""
    import commands
    import gates
    import layer
    import models
    import probes
    import titans

    if part == "layer":
        return layer.rows(turns)
    if part == "titans":
        return titans.rows(turns)
    if part == "models":
        return models.rows("small", max(1, turns // 2)) + models.transformer("small", max(1, turns // 2))
    if part == "gates":
        return gates.rows("small", max(1, turns // 2))
    if part == "probes":
        cheap = max(1, turns // 2)
        return (
            probes.idle("tiny") + probes.watching("tiny", 3 * turns) + probes.workers("tiny", cheap)
            + probes.contexts("tiny")
        )  # fmt: skip
    return commands.rows(environment, turns, demo)


def shown(value: float | None, unit: str) -> str:
    """A number as its unit wants it; MiB and tokens whole."""
    if value is None:
        return ""
    if unit in ("of a pass", "over a bare pass", ""):
        return f"{value:.2%}" if abs(value) < 0.01 else f"{value:.1%}"
    return f"{value:,.0f} {unit}" if unit in ("MiB", "tokens/s") and value >= 10 else f"{value:.3g} {unit}"


def table(rows: list[clock.Row], title: str) -> Table:
    """What `make bench` prints."""
    made = Table(
        title=title, caption="ceiling: operations alone at the matrix-product rate measured beside the work"
    )
    for column in ("work", "ours", "peer", "ratio", "ceiling", "share of it", "goal", "met", "note"):
        made.add_column(column, justify="left" if column in ("work", "note") else "right")
    for row in rows:
        peer = f"{shown(row.peer, row.unit)} ({row.peer_is})" if row.peer is not None else ""
        made.add_row(
            row.work, shown(row.ours, row.unit), peer, f"{row.ratio:.3g}x" if row.ratio else "",
            shown(row.ceiling, row.unit), f"{row.share:.0%}" if row.share else "", row.goal,
            {True: "yes", False: "no", None: ""}[row.met], row.note,
        )  # fmt: skip
    return made


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", default=[], metavar="PART", help=f"some of {', '.join(PARTS)}; all"
    )
    parser.add_argument("--turns", type=int, default=5, help="turns that count")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument(
        "--environment", type=Path, default=Path(sys.executable).parent, help="of the commands"
    )
    parser.add_argument(
        "--no-demo", action="store_true", help="leave out the demo, which takes a minute or two"
    )
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    warnings.simplefilter("ignore")  # the peers'
    console = Console(width=200 if not sys.stdout.isatty() else None)
    rows: list[clock.Row] = []
    for part in options.parts or PARTS:
        found = measure(part, options.turns, options.environment, not options.no_demo)
        rows += found
        console.print(table(found, part))
    present = {d.metadata["Name"] for d in metadata.distributions()}
    installed = {name: metadata.version(name) for name in PEERS if name in present}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matrix rate, GFLOP/s": clock.MATRIX_FLOPS
        / min(clock.once(clock.matrix_rate()) for _ in range(3))
        / 1e9,
        "copy rate, GB/s": clock.copy_rate() / 1e9,
        **installed,
    }
    console.print(
        ", ".join(f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in machine.items())
    )
    if options.json:
        kept = {"machine": machine, "turns": options.turns, "rows": [dataclasses.asdict(r) for r in rows]}
        options.json.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
