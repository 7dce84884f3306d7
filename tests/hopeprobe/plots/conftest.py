"""Rows of a probe on a grid of places, with their nulls, and the figures that are saved."""

import itertools
import math

import pytest

from hopeprobe.results import NullRow, ResultRow, Results
from hopeprobe.stats import Verdict

PNG = b"\x89PNG\r\n\x1a\n"


def measured(**changes):
    """A row, and its nulls by kind: a number, or value, low and high."""
    nulls = changes.pop("nulls", {"own-init": 0.3, "fresh-init": (0.35, 0.2, 0.5)})
    fields = {
        "probe": "demo-probe",
        "statistic": "size",
        "checkpoint": "step-000200.pt",
        "step": 200,
        "condition": "live",
        "value": 0.5,
        "unit": "1",
        "n_tokens": 9,
        "n_groups": 64,
        "dtype": "float32",
        "verdict": Verdict.INCONCLUSIVE,
        **changes,
    }
    if "ci_low" not in fields and not math.isnan(fields["value"]):
        fields |= {"ci_low": fields["value"] - 0.05, "ci_high": fields["value"] + 0.05}
    row = ResultRow(**fields)
    names = ("probe", "statistic", "checkpoint", "step", "layer", "component", "condition", "position")
    key = dict(zip(names, row.key, strict=True))
    found = []
    for kind, null in nulls.items():
        value, low, high = null if isinstance(null, tuple) else (null, math.nan, math.nan)
        found.append(NullRow(**key, null_kind=kind, value=value, low=low, high=high))
    return row, found


def results_of(*pairs):
    return Results([row for row, _ in pairs], [null for _, nulls in pairs for null in nulls])


def similarity(pairs=("fast|slow",), layers=6, checkpoint="step-000200.pt", value=0.5):
    made = []
    for kind, statistic, layer, pair in itertools.product(
        ("output", "delta"), ("cosine", "cka", "cca"), range(layers), pairs
    ):
        nulls = {"own-init": 0.3, "shuffled": 0.1, "fresh-init": (0.35, 0.2, 0.5)}
        made.append(
            measured(
                probe="cms-similarity",
                statistic=f"{kind}_{statistic}",
                checkpoint=checkpoint,
                layer=layer,
                component=pair,
                value=value + 0.02 * layer,
                **({} if layer else {"ci_low": math.nan, "ci_high": math.nan}),
                nulls=nulls | ({"analytic": 0.0} if (kind, statistic) == ("delta", "cosine") else {}),
            )
        )
    return results_of(*made)


@pytest.fixture
def make():
    """Functions that make rows, and results from them."""
    return measured, results_of


@pytest.fixture
def levels():
    """Make the similarity of CMS levels."""
    return similarity


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that are saved."""
    import matplotlib.figure

    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    return figures
