"""What the benchmarks compare computes the same: their own checks, and that these can fail."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.peers


@pytest.fixture
def bench(monkeypatch):
    """The benchmarks' modules of a name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))

    def load(name):
        for known in ("clock", "flops", name):
            sys.modules.pop(known, None)
        return __import__(name)

    return load


@pytest.mark.parametrize("chunks", [(8, 64), (64, 64)])
def test_the_layer_is_nested_learnings(bench, chunks):
    layer = bench("layer")
    assert layer.difference(chunks) < 1e-12


def test_another_rule_of_the_layer_is_seen(bench, monkeypatch):
    layer = bench("layer")
    theirs = layer.theirs

    def other(mine):
        made = theirs(mine)
        made.m_memory.w2.weight.data.mul_(1.001)
        return made

    monkeypatch.setattr(layer, "theirs", other)
    assert layer.difference((8, 64)) > 1e-7


def test_the_titans_memory_is_titans_pytorchs_where_a_chunk_is_a_token(bench):
    assert bench("titans").difference() < 1e-12


def test_another_momentum_is_seen(bench, monkeypatch):
    titans = bench("titans")
    theirs = titans.theirs

    def other(mine, chunk, sequential):
        made = theirs(mine, chunk, sequential)
        made.to_momentum[0].bias.data.add_(0.01)
        return made

    monkeypatch.setattr(titans, "theirs", other)
    assert titans.difference() > 1e-7
