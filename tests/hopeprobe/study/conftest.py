"""Makes `study_toys` importable, and a grid of four seeds."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from study_toys import cell, grid


@pytest.fixture
def made():
    """Four seeds: `no-cms` 0.3 worse, `no-self-mod` as good, `transformer` 0.5 better."""
    cells = []
    for seed, full in enumerate((7.0, 7.1, 6.9, 7.05)):
        wobble = (0.001, -0.002, 0.003, 0.0)[seed]
        cells += [
            cell("full", seed, full),
            cell("no-cms", seed, full + 0.3 + wobble),
            cell("no-self-mod", seed, full + wobble),
            cell("transformer", seed, full - 0.5 + wobble, frozen=full - 0.5 + wobble),
        ]
    return grid(cells)
