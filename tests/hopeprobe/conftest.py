"""A toy text and toy models, small enough that a whole analysis takes about a second."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from hopeprobe.model.config import CMSLevel, ModelConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.subject import HopeSubject
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.tokens import TokenData

VOCAB = 97
CONFIG = ModelConfig(vocab_size=VOCAB, dim=16, layers=2, context=32, heads=2)
STILL = dataclasses.replace(CONFIG, cms_levels=(CMSLevel("fast", 8, 0.0), CMSLevel("slow", 32, 0.0)))


def make_subject(config=CONFIG, seed=0):
    return HopeSubject(HopeModel(config, seed))


@pytest.fixture(scope="session")
def toy_data():
    """220 documents of 30 to 50 tokens of a Markov chain, so that there is something to learn."""
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.full(VOCAB, 0.05), size=VOCAB).cumsum(axis=1)
    documents = []
    for _ in range(220):
        tokens = [int(rng.integers(VOCAB))]
        for _ in range(int(rng.integers(30, 50))):
            tokens.append(min(int(np.searchsorted(table[tokens[-1]], rng.random())), VOCAB - 1))
        documents.append(tokens)
    return TokenData.from_documents(documents, name="toy", vocab_size=VOCAB, end_of_text=0)


@pytest.fixture(scope="session")
def toy_run(toy_data, tmp_path_factory):
    """The folder of a run of 40 steps that learns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(
        steps=40, learning_rate=1e-2, warmup=5, checkpoint_every=40, eval_every=20, eval_tokens=300
    )
    train(CONFIG, config, toy_data, folder)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory):
    """Where nulls are kept for the whole session: the fresh ones are the same for all toy models."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(toy_data, toy_cache):
    """Arguments of `analyze` for the toy text."""
    return {
        "data": toy_data, "tokens": 1600, "split": "all", "batch": 50, "fresh": 5, "cache_dir": toy_cache
    }  # fmt: skip


@pytest.fixture
def subject():
    return make_subject()


@pytest.fixture
def subject_of():
    return make_subject


@pytest.fixture
def configs():
    """Configurations: `toy`, and `still`, whose CMS levels are never changed by a write."""
    return {"toy": CONFIG, "still": STILL}
