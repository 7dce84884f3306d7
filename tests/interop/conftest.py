"""Beside other people's tools. The tests marked `interop` need `.venv-interop`: `make test-interop`."""

import pytest
import torch

from hopeprobe.model.config import ModelConfig
from hopeprobe.model.hope import HopeModel


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def model():
    return HopeModel(ModelConfig(vocab_size=61, dim=16, layers=2, context=32, heads=2), 0)


@pytest.fixture
def tokens():
    """Two windows of two ticks."""
    return torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(0))
