"""Our self-modifying layer against nested-learning 0.2.0's: same rule, same weights, same input, both writing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import clock
import flops
import torch
from clock import Row
from torch import Tensor

from hopeprobe.hooks import HookRegistry
from hopeprobe.model.config import ModelConfig, published
from hopeprobe.model.selfmod import SelfMod

BATCH, LENGTH, DIM = 8, 512, 256
CHUNKS = ((8, 64), (64, 64))  # of k, v, eta and alpha; of `memory`


def ours(chunks: tuple[int, int], dtype: torch.dtype = torch.float32) -> SelfMod:
    """A layer under the published rule."""
    config = published(ModelConfig(vocab_size=37, dim=DIM, layers=1, heads=2))
    config = dataclasses.replace(config, chunk=chunks[0], chunk_memory=chunks[1])
    torch.manual_seed(0)
    made = SelfMod(config, HookRegistry(), "blocks.0.selfmod").to(dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return made


def theirs(mine: SelfMod) -> torch.nn.Module:
    """The package's layer with the same weights."""
    from nested_learning.titan.self_modifying import SelfModifyingTitans, SelfModifyingTitansConfig

    config = mine.config
    made = SelfModifyingTitans(
        SelfModifyingTitansConfig(
            dim=DIM, eta_scale=1e-3, chunk_size_other=config.chunk, chunk_size_memory=config.chunk_memory
        )
    ).to(mine.conv.dtype)
    names = {"w1": "w1", "w2": "w2", "skip": "w_skip"}
    with torch.no_grad():
        for name, memory in mine.memories.items():
            for own, other in names.items():
                if (weight := getattr(memory, own)) is not None:
                    getattr(getattr(made, f"m_{name}"), other).weight.copy_(weight)
        made.w_q.weight.copy_(mine.w_q)
        made.local_conv.weight.copy_(mine.conv[:, None])
    return made


@torch.no_grad()
def run_ours(layer: SelfMod, x: Tensor) -> Tensor:
    """Read and write all of x (B, T, d)."""
    return layer(x)


@torch.no_grad()
def run_theirs(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """The same."""
    return layer.forward_with_updates(x, layer.init_fast_state())[0]


def difference(chunks: tuple[int, int]) -> float:
    """Largest difference of outputs over the largest output, in float64, over two long chunks of two rows."""
    mine = ours(chunks, torch.float64)
    x = torch.randn(2, 128, DIM, dtype=torch.float64)
    expected = run_theirs(theirs(mine), x)
    return float((run_ours(mine, x) - expected).abs().max() / expected.abs().max())


def _work(whose: str, chunks: tuple[int, int]) -> Callable[[], object]:
    mine = ours(chunks)
    x = torch.randn(BATCH, LENGTH, DIM)
    if whose == "ours":
        return lambda: run_ours(mine, x)
    other = theirs(mine)
    return lambda: run_theirs(other, x)


WORKS = {
    f"{whose} {chunks[0]}": lambda whose=whose, chunks=chunks: _work(whose, chunks)
    for whose in ("ours", "theirs")
    for chunks in CHUNKS
}


def thin_products(chunks: tuple[int, int]) -> Callable[[], object]:
    """Nothing but a layer's large products, of the same shapes, tick after tick: what the machine takes for those."""
    n, d, b = chunks[0], DIM, BATCH
    w2, w1 = torch.randn(b, 4 * d, d), torch.randn(2 * b, d, d)
    memory2, memory1 = torch.randn(b, d, d), torch.randn(b, d, d)
    x, both = torch.randn(b, n, d), torch.randn(b, 2 * n, d)
    rows, both_rows = torch.randn(2 * b, n, d), torch.randn(2 * b, 2 * n, d)
    left = 1e-3 * torch.randn(b, n, 4 * d)
    long, long_both = torch.randn(b, chunks[1], d), torch.randn(b, 2 * chunks[1], d)
    w_q = torch.randn(d, d)

    def work() -> None:
        for at in range(0, LENGTH, n):
            (w2 @ x.mT if n == 8 else x @ w2.mT), rows @ w1.mT, x @ w_q.mT, x @ memory2.mT, x @ memory1.mT
            both @ w2.mT, both_rows @ w1.mT, rows @ w1
            w2.baddbmm_(left.mT, x, alpha=1e-6), w1.baddbmm_(rows.mT, rows, alpha=1e-6)
            if (at + n) % chunks[1] == 0:
                long_both @ memory2.mT, long_both @ memory1.mT, long @ memory1
                memory2.baddbmm_(long.mT, long, alpha=1e-6), memory1.baddbmm_(long.mT, long, alpha=1e-6)

    return work


def rows(turns: int) -> list[Row]:
    """Time, and peak memory, of both; their ceiling is 72 d^2 operations a token."""
    found = []
    for chunks, goal, share in zip(CHUNKS, (40, 100), (0.30, 0.50), strict=True):
        apart = difference(chunks)
        if not apart < 1e-9:
            raise RuntimeError(f"the layers do not compute the same: outputs differ by {apart:.1e}")
        name = f"layer, chunks {chunks[0]}/{chunks[1]}"
        mine = _work("ours", chunks)
        works = {"ours": mine, "theirs": _work("theirs", chunks)}
        times = clock.by_turns(works, max(1, turns // 3), warm=0, calls={"ours": 5})
        speed = clock.ratio(times, "theirs", "ours")
        close = clock.by_turns(
            {"ours": mine, "matrix": clock.matrix_rate(), "thin": thin_products(chunks)}, 3 * turns, warm=2
        )
        work = flops.layer(mine_config(chunks)) * BATCH * LENGTH
        per_flop = [t / clock.MATRIX_FLOPS for t in close["matrix"]]
        ceilings = [work * t for t in per_flop]
        shares = [c / t for c, t in zip(ceilings, close["ours"], strict=True)]
        middle = clock.statistics.median
        found.append(
            Row(
                name, middle(close["ours"]), middle(times["theirs"]), speed, peer_is="nested-learning",
                ceiling=middle(ceilings), share=middle(shares), goal=f">= {goal}x", met=speed >= goal,
                note=f"outputs agree to {apart:.0e} (float64)", turns=times,
            )
        )  # fmt: skip
        reached = [c / t for c, t in zip(ceilings, close["thin"], strict=True)]
        found.append(
            Row(
                f"{name}: share of the matrix rate", middle(shares), unit="", goal=f">= {share:.0%}",
                met=middle(shares) >= share, turns=close,
                note=f"its products alone, in these shapes, reach {middle(reached):.0%}: they are "
                f"{clock.ratio(close, 'thin', 'ours'):.0%} of our time",
            )
        )  # fmt: skip
    peaks = {w: clock.peak_bytes("layer", f"{w} 8") / 2**20 for w in ("ours", "theirs")}
    share = peaks["ours"] / peaks["theirs"]
    found.append(
        Row(
            "layer, chunks 8/64: peak memory", peaks["ours"], peaks["theirs"], peaks["theirs"] / peaks["ours"],
            unit="MiB", peer_is="nested-learning", goal=">= 5x", met=share <= 0.2,
        )
    )  # fmt: skip
    return found


def mine_config(chunks: tuple[int, int]) -> ModelConfig:
    """The configuration that `ours` has."""
    return dataclasses.replace(
        published(ModelConfig(vocab_size=37, dim=DIM, layers=1, heads=2)),
        chunk=chunks[0],
        chunk_memory=chunks[1],
    )
