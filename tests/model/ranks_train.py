"""Train every case of a folder's: by torchrun, on as many ranks as there are, or called in one process."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from model_toys import TOY

from hopeprobe import ranks
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.tokens import TokenData

MODEL = dataclasses.replace(TOY, vocab_size=53, context=16, embed_std=0.1)
CONFIG = TrainConfig(
    steps=30,
    batch=5,
    learning_rate=1e-2,
    warmup=2,
    checkpoint_every=15,
    eval_every=10,
    eval_tokens=128,
    seed=5,
)
#: Five windows are cut into 3 and 2, or 2, 2 and 1.
CASES = {
    "default": MODEL,
    "segments": dataclasses.replace(MODEL, truncate_ticks=1),
    "seldom-open": dataclasses.replace(MODEL, surprise_threshold=4.8),
    "transformer": dataclasses.replace(MODEL, variant="transformer"),
    "titans": dataclasses.replace(MODEL, variant="titans", window=12),
}


def data():
    rng = np.random.default_rng(0)
    return TokenData.from_documents(
        [rng.integers(0, 52, 30) for _ in range(60)], name="random", vocab_size=53, end_of_text=52
    )


def run(folder, steps=CONFIG.steps, resume=False, cases=CASES, **options):
    for name in cases:
        config = dataclasses.replace(CONFIG, steps=steps)
        train(CASES[name], config, data(), Path(folder) / name, resume=resume, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, steps, resume, *names = sys.argv[1:]
    with ranks.joined():
        run(folder, int(steps), bool(int(resume)), names or CASES)
    left = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in left), f"{left} outlive the job: they may abort Python's end"
