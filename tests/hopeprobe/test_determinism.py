"""The same bytes twice, and what threads and batches can move: less than a millionth of a number's scale.

The scale of a row is its value or the width of its interval, whichever is more: a number about 0 has no other. Of nats,
and of a difference between conditions, it is at least 1: a difference of losses moves as they do.
"""

import math

import pytest
import torch

from hopeprobe.analysis import analyze
from hopeprobe.probes import PROBES
from hopeprobe.subject import GateRule, load

MOST = 1e-6
FEW = ("integrity", "meta-fast", "surprise")
CLOSING = GateRule("random", 0.05)


def scale(row):
    width = 0.0 if math.isnan(row.ci_low) else row.ci_high - row.ci_low
    return max(abs(row.value), width, 1.0 if row.unit == "nats" or " - " in row.condition else 0.0)


def furthest(results, others):
    """The largest difference of values and intervals over the row's scale, and where; AssertionError for lost rows."""
    mine, theirs = ({row.key: row for row in one.rows} for one in (results, others))
    assert mine.keys() == theirs.keys()
    worst = (0.0, None)
    for key, row in mine.items():
        assert row.verdict == theirs[key].verdict, key
        assert row.n_tokens == theirs[key].n_tokens, key
        for name in ("value", "ci_low", "ci_high"):
            a, b = getattr(row, name), getattr(theirs[key], name)
            assert math.isnan(a) == math.isnan(b), key
            if a != b and not math.isnan(a):
                worst = max(worst, (abs(a - b) / scale(row), (*map(str, key), name)))
    return worst


def measured(run, settings, cache, probes, batch, threads, gate=None):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        subject = load(run / "step-000040.pt")
        return analyze(
            subject if gate is None else subject.with_gate(gate),
            probes,
            **settings | {"fresh": 0, "cache_dir": cache, "batch": batch},
        )
    finally:
        torch.set_num_threads(before)


def check(run, settings, tmp_path, probes, others=((50, 2), (11, 1)), gate=None):
    first = measured(run, settings, tmp_path / "one", probes, 50, 1, gate)
    assert {row.probe for row in first.rows} == set(probes)
    for i, (batch, threads) in enumerate(others):
        other = measured(run, settings, tmp_path / f"other-{i}", probes, batch, threads, gate)
        worst, where = furthest(first, other)
        assert worst < MOST, (batch, threads, worst, where)
    return first


def test_threads_and_batches_move_a_number_by_less_than_a_millionth(toy_run, settings, tmp_path):
    first = check(toy_run, settings, tmp_path, FEW)
    again = measured(toy_run, settings, tmp_path / "anew", FEW, 50, 1)
    cached = measured(toy_run, settings, tmp_path / "one", FEW, 50, 1)
    assert first.to_json() == again.to_json() == cached.to_json()
    row = first.rows[0]
    object.__setattr__(row, "value", row.value * (1 + 1e-5))  # what the check is for
    assert furthest(first, again)[0] > MOST


def test_what_is_written_of_one_window_is_not_what_is_seen_of_another(toy_run, settings, tmp_path):
    """Under a gate that opens for one token in twenty, for whole periods of small batches nothing is written."""
    first = check(toy_run, settings, tmp_path, FEW, others=((11, 1), (1, 1)), gate=CLOSING)
    rows = [row for row in first.rows if row.statistic == "relative_drift"]
    assert rows
    assert all(row.value > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("gate", [None, CLOSING], ids=["own", "closing"])
def test_threads_and_batches_move_no_probe(toy_run, settings, tmp_path, gate):
    # Each analysis takes minutes.
    check(toy_run, settings, tmp_path, tuple(PROBES), others=((11, 2),), gate=gate)
