"""`--gate` and what goes with it: of a model that is trained, or in place of a checkpoint's own gate."""

from __future__ import annotations

from hopeprobe.errors import BadInputError
from hopeprobe.model.config import GateConfig
from hopeprobe.subject import GateRule


def gate_config(
    rule: str | None, budget: float | None, threshold: float | None, writes: str, straight_through: bool
) -> tuple[GateConfig, float | None]:
    """The gate to train with, and the surprise threshold where that is what was given."""
    given = gate_rule(rule, budget, threshold, writes)
    if given is None and straight_through:
        raise BadInputError("--straight-through is about a gate: name one with --gate")
    if given is None:
        return GateConfig(), None
    of_absolute = given.threshold if given.rule == "absolute" else None
    criterion = None if given.rule == "absolute" else given.threshold
    made = GateConfig(given.rule, given.budget, criterion, given.writes, straight_through=straight_through)
    return made, of_absolute


def gate_rule(
    rule: str | None, budget: float | None, threshold: float | None, writes: str
) -> GateRule | None:
    """The gate asked for, None for the model's own."""
    if rule is not None:
        return GateRule(rule, budget, threshold, writes)
    stray = {
        "--budget": budget is not None,
        "--gate-threshold": threshold is not None,
        "--gate-writes": writes != "all",
    }
    for option, given in stray.items():
        if given:
            raise BadInputError(
                f"{option} is about a gate: name one with --gate, for instance --gate quantile"
            )
    return None
