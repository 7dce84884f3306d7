"""Fixtures over the toy runs of `peer_toys`. The tests marked `peers` need `.venv-peers`: `make test-peers`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from peer_toys import VOCAB, chain, train


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """A run of 60 steps that learns; its initial weights are not those that `train.seed` gives."""
    return train(tmp_path_factory.mktemp("toy"), {}, initial_seed=3)


@pytest.fixture(scope="session")
def toy_text():
    """70 documents of 17 tokens."""
    from hopeprobe.tokens import TokenData

    return TokenData.from_documents(chain(70, 17, seed=2), name="toy", vocab_size=VOCAB, end_of_text=0)


@pytest.fixture
def tokens():
    """Three windows of 40 targets."""
    import torch

    return torch.from_numpy(chain(3, 41, seed=4))
