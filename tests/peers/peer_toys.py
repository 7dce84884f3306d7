"""Toy runs, trained and saved by the package nested-learning itself."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).parents[2] / "examples"
VOCAB = 97
CONFIG = {
    "model": {
        "vocab_size": VOCAB,
        "dim": 16,
        "num_layers": 2,
        "heads": 2,
        "block_variant": "hope_selfmod",
        "self_mod_chunk_size": 8,
        "self_mod_chunk_size_memory": 64,
        "titan_level": {"name": "titan", "update_period": 8},
        "cms_levels": [{"name": "fast", "update_period": 8}, {"name": "slow", "update_period": 16}],
    },
    "data": {"source": "shards", "batch_size": 4, "seq_len": 16},
    "train": {
        "steps": 60,
        "seed": 7,
        "device": "cpu",
        "log_interval": 60,
        "online_updates": True,
        "online_boundary_targets": True,
        "use_fast_state": True,
        "checkpoint": {"enable": True, "save_interval": 30, "save_last": True},
    },
    "optim": {"type": "adamw", "lr": 1e-2, "fused": False},
}


def changed(**parts):
    """The toy configuration with some keys of `model`, `train`, `data` or `optim` changed."""
    config = copy.deepcopy(CONFIG)
    for part, values in parts.items():
        config[part] |= values
    return config


def chain(rows, length, seed):
    """Sequences of a Markov chain, int64 [rows, length], so that there is something to learn."""
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.full(VOCAB, 0.05), size=VOCAB).cumsum(axis=1)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(VOCAB, size=(rows, length))
    for t in range(1, length):
        drawn = (table[tokens[:, t - 1]] < rng.random(rows)[:, None]).sum(axis=1)
        tokens[:, t] = np.minimum(drawn, VOCAB - 1)
    return tokens.astype(np.int64)


def train(folder, config, initial_seed):
    """Let the package train; the weights it starts from are saved as its own files are, as step 0."""
    import torch
    from nested_learning.training import build_model_from_cfg, run_training_loop
    from omegaconf import OmegaConf

    config = changed(**config)
    shards, run = folder / "shards", folder / "run"
    shards.mkdir()
    np.save(shards / "a.npy", chain(200, 17, seed=1))
    config["data"]["shards_dir"] = str(shards)
    config["train"]["checkpoint"]["dir"] = str(run)
    cfg = OmegaConf.create(config)
    run.mkdir()
    torch.manual_seed(initial_seed)
    model = build_model_from_cfg(cfg.model)
    torch.save(
        {"model": model.state_dict(), "optimizer": {}, "step": 0, "config": config}, run / "step_000000.pt"
    )
    torch.manual_seed(initial_seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its data loader's
        run_training_loop(cfg, device=torch.device("cpu"))
    return run


def recipe():
    """The module examples/reconstruction.py, fresh."""
    spec = importlib.util.spec_from_file_location("reconstruction", EXAMPLES / "reconstruction.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
