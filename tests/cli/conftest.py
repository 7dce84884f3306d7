"""A small text, a small trained run, and the command line called in this process."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hopeprobe.cli import run
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.tokens import load_tokens


class Called(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys) -> Callable[..., Called]:
    def inner(*arguments: object) -> Called:
        code = run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Called(code, captured.out, captured.err)

    return inner


@pytest.fixture(scope="session", autouse=True)
def quiet_machine(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOPEPROBE_CACHE", str(tmp_path_factory.mktemp("cache")))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Two hundred documents of sixty words; the next follows from the last, so that there is something to learn."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(40)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(200):
            at = rng.randrange(40)
            document = []
            for _ in range(60):
                document.append(words[at])
                at = (3 * at + 1) % 40 if rng.random() < 0.9 else rng.randrange(40)
            file.write(json.dumps({"text": " ".join(document)}) + "\n")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, text) -> Path:
    """A run of three steps with GPT-2's vocabulary."""
    folder = tmp_path_factory.mktemp("run")
    config = ModelConfig(dim=16, layers=1, context=32, heads=2)
    train(config, TrainConfig(steps=3, batch=2, eval_tokens=64), load_tokens(str(text)), folder)
    return folder
