"""`hopeprobe hooks`, `probes` and `params`: what there is."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from hopeprobe.cli.terminal import console, say, shown
from hopeprobe.errors import BadInputError
from hopeprobe.printable import printable

#: The study's section 3: "~19M", "~73M", and its Transformer matched in size.
PUBLISHED = {
    ("small", "full"): "~19M",
    ("scaled", "full"): "~73.1M",
    ("scaled", "transformer-matched"): "81.2M",
}


def show_hooks(checkpoint: Path, model_map: str | None, pattern: str | None, output_format: str) -> None:
    """Print the registry of a checkpoint's model."""
    from hopeprobe.hooks import describe, markdown_table, resolve
    from hopeprobe.subject import load

    points = load(checkpoint, map=model_map).module.hook_dict
    if pattern is not None:
        points = {name: points[name] for name in resolve(points, pattern)}
    if output_format == "markdown":
        print(printable(markdown_table(points), lines=True))
        return
    if output_format != "table":
        raise BadInputError(f"--format is {output_format!r}, must be table or markdown")
    table = Table(title=shown(f"hook points of {checkpoint.name}"), title_justify="left")
    for column in ("name", "shape", "fires", "editable", "holds"):
        table.add_column(column, no_wrap=column != "holds", overflow="fold")
    for row in describe(points):
        cells = (row.name, row.dims, row.cadence, "yes" if row.editable else "no", row.equation)
        table.add_row(*map(shown, cells))
    console().print(table)


def show_probes() -> None:
    """Print the registry of probes."""
    from hopeprobe.probes import PROBES

    table = Table()
    table.add_column("probe", no_wrap=True)
    table.add_column("answers")
    for name, probe in PROBES.items():
        table.add_row(name, probe.question)
    console().print(table)


def show_definitions(names: list[str]) -> None:
    """Print what each of these probes measures, with what it shares. Raises BadInputError for one that there is not."""
    from hopeprobe.probes import get_probe
    from hopeprobe.probes.definitions import shared_definitions

    chosen = [get_probe(name) for name in names]
    screen = console()
    for i, probe in enumerate(chosen):
        say(
            screen,
            ("\n\n" if i else "") + f"{probe.name}\n{'-' * len(probe.name)}\n{probe.describe()}",
            lines=True,
        )
        for file, text in shared_definitions(probe).items():
            say(screen, f"\n`{file}`:\n\n{text}")


def show_params() -> None:
    """Print parameter counts, embedding and rest, of each preset and variant."""
    from hopeprobe.model.config import PRESETS, preset
    from hopeprobe.model.hope import HopeModel
    from hopeprobe.model.variants import VARIANTS

    table = Table(title="parameters (embedding tied to the head)", title_justify="left")
    for column in ("preset", "variant", "dim", "layers", "context"):
        table.add_column(column, justify="left" if column in ("preset", "variant") else "right")
    for column in ("total", "embedding", "memories", "CMS", "rest", "published"):
        table.add_column(column, justify="right")
    for name in PRESETS:
        for variant in VARIANTS:
            config = preset(name, variant)
            shapes = {k: v.numel() for k, v in HopeModel.shapes(config).items()}
            embedding = shapes.pop("embed")
            memories = sum(
                n
                for k, n in shapes.items()
                if (".selfmod." in k or ".titans." in k) and ".attention." not in k
            )
            cms = sum(n for k, n in shapes.items() if ".cms." in k)
            rest = sum(shapes.values()) - memories - cms
            counts = (embedding + memories + cms + rest, embedding, memories, cms, rest)
            table.add_row(
                name,
                variant,
                *(str(n) for n in (config.dim, config.layers, config.context)),
                *(f"{n / 1e6:.2f}M" if n else "–" for n in counts),
                PUBLISHED.get((name, variant), "–"),
            )
    console().print(table)
