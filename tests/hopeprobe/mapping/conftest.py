"""A model of somebody's, trained a little, its map, and files of its run."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from chunked import Model, document

from hopeprobe.tokens import TokenData

VOCAB, CONTEXT = 23, 16


@pytest.fixture(autouse=True)
def _alone(one_thread):
    """Every test here keeps to one thread."""


def chain(rows, length, seed):
    """Sequences of a Markov chain, int64 [rows, length]."""
    table = np.random.default_rng(0).dirichlet(np.full(VOCAB, 0.1), size=VOCAB).cumsum(axis=1)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(VOCAB, size=(rows, length))
    for t in range(1, length):
        drawn = (table[tokens[:, t - 1]] < rng.random(rows)[:, None]).sum(axis=1)
        tokens[:, t] = np.minimum(drawn, VOCAB - 1)
    return tokens.astype(np.int64)


@pytest.fixture(scope="session")
def text():
    documents = [row[:n] for row, n in zip(chain(96, 17, 2), [17] * 80 + [11] * 16, strict=True)]
    return TokenData.from_documents(documents, name="chain", tokenizer="toy", vocab_size=VOCAB, end_of_text=0)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Files step-0.pt, step-30.pt, step-60.pt of {"weights", "config", "step"}; weights named as a compiled model's."""
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(5)
    model, data = Model(), torch.from_numpy(chain(256, CONTEXT + 1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(61):
        if step % 30 == 0:
            weights = {f"_orig_mod.{name}": t.clone() for name, t in model.state_dict().items()}
            torch.save(
                {"weights": weights, "config": {"vocab": VOCAB}, "step": step}, folder / f"step-{step}.pt"
            )
        batch = data[(step * 32) % 256 :][:32]
        logits = model(batch[:, :-1])["logits"]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return folder


@pytest.fixture
def of_files():
    """The map, with what it takes to open those files."""
    made = document()
    made["model"] |= {
        "build": "chunked:Model",
        "arguments": "config",
        "weights": "weights",
        "strip": "_orig_mod.",
        "steps": "step",
        "initial": "step-0.pt",
        "checkpoints": "step-*.pt",
    }
    return made


@pytest.fixture
def edited():
    """A copy of the map with one place changed: keys, then the value; None takes the key away."""

    def edit(*path_and_value, of=None):
        *path, last, value = path_and_value
        made = copy.deepcopy(of or document())
        there = made
        for key in path:
            there = there[key]
        if value is None:
            del there[last]
        else:
            there[last] = value
        return made

    return edit


@pytest.fixture
def model():
    torch.manual_seed(3)
    return Model()
