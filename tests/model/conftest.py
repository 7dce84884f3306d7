"""Fixtures over the toy models of `model_toys`."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from model_toys import CONFIGS, TOY

from hopeprobe.model.hope import HopeModel


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(CONFIGS))
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def model(config):
    return HopeModel(config, seed=1, dtype=torch.float64)


@pytest.fixture
def toy():
    return HopeModel(TOY, seed=1, dtype=torch.float64)


@pytest.fixture
def tokens():
    return torch.randint(0, TOY.vocab_size, (3, 70), generator=torch.Generator().manual_seed(0))
