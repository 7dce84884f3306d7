"""What commands share of their options."""

from __future__ import annotations

import typer


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
