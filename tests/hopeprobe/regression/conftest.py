"""Results made by hand, a row a number, as `analyze` gives them for one checkpoint or several."""

import math

import pytest

from hopeprobe.results import ResultRow, Results
from hopeprobe.stats.verdict import Verdict

DATA = {"name": "toy", "fingerprint": "f", "windows": "w", "context": 32, "tokens": 1000}


def result(statistic="drift", value=1.0, seed=0, **changed):
    fields = {
        "probe": "toy-probe", "checkpoint": f"seed-{seed}", "step": 10, "layer": 0, "component": "a", "unit": "1",
        "n_tokens": 1000, "n_groups": 64, "dtype": "float32", "ci_low": value - 0.02, "ci_high": value + 0.02,
        "smallest_effect": 0.01, "verdict": Verdict.INCONCLUSIVE,
    }  # fmt: skip
    if math.isnan(value):
        fields |= {"ci_low": math.nan, "ci_high": math.nan, "verdict": Verdict.NOT_APPLICABLE, "n_tokens": 0}
    return ResultRow(statistic=statistic, value=value, **fields | changed)


def results_of(rows, missing=()):
    """One checkpoint or several, told apart by the rows' labels."""
    seeds = list(dict.fromkeys(row.checkpoint for row in rows))
    described = [
        {
            "name": name,
            "seed": int(name.split("-")[1]),
            "identity": "same",
            "data": "f",
            "missing": list(missing),
        }
        for name in seeds
    ]
    checkpoint = described[0] if len(described) == 1 else {"checkpoints": described}
    return Results(rows, checkpoint=checkpoint, data=DATA)


@pytest.fixture
def row():
    return result


@pytest.fixture
def results():
    return results_of
