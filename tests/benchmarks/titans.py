"""Our Titans memory against titans-pytorch 0.5.5, both with momentum, forgetting and static projections.

The mathematics is one where a chunk is one token: there outputs are compared. Longer chunks differ: the package has one
momentum, one forgetting and one step of W a chunk, ours one each a token, at the same gradients (of the chunk's start).
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable

import clock
import flops
import torch
import torch.nn.functional as F
from clock import Row
from products import products_of
from torch import Tensor, nn

from hopeprobe.hooks import HookRegistry
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.titans import Titans

BATCH, LENGTH, DIM = 8, 512, 256


def ours(chunk: int, dim: int = DIM, dtype: torch.dtype = torch.float32) -> Titans:
    """The memory as a layer of its own."""
    config = ModelConfig(
        variant="titans", titans_form="layer", vocab_size=37, dim=dim, layers=1, heads=2, chunk_memory=chunk,
        normalise_value=False, decay_target="zero", conv_width=1,
    )  # fmt: skip
    torch.manual_seed(0)
    made = Titans(config, HookRegistry(), "blocks.0.titans").to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5 / dim**0.5)
    nn.init.ones_(made.conv)
    return made


class PeerMemory(nn.Module):
    """The package's memory model of our shape: x + W1 gelu(W2 x)."""

    def __init__(self, w1: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(w1.detach().float()), nn.Parameter(w2.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """Answer x (..., d)."""
        return x + F.gelu(x @ self.w2.mT) @ self.w1.mT


class Unit(nn.Module):
    """l2norm, where the package takes an activation of its keys."""

    def forward(self, x: Tensor) -> Tensor:
        """x / |x|."""
        return F.normalize(x, dim=-1, eps=1e-6)


def theirs(mine: Titans, chunk: int, sequential: bool) -> nn.Module:
    """The package's layer with our weights; `sequential` takes a chunk's gradients at its start, as ours does.

    Else it takes all of them at the initial weights: less work, and another result.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from titans_pytorch import NeuralMemory

    made = NeuralMemory(
        mine.config.dim, chunk_size=chunk, batch_size=chunk if sequential else None,
        model=PeerMemory(mine.memory.w1, mine.memory.w2), mem_model_norm_add_residual=False, pre_rmsnorm=False,
        store_memory_loss_fn=lambda predicted, target: 0.5 * (predicted - target).square().sum(-1),
        default_step_transform_max_lr=mine.step_max,
    ).to(mine.conv.dtype)  # fmt: skip
    made.to_queries, made.to_keys = (
        nn.Sequential(nn.Linear(mine.config.dim, mine.config.dim, bias=False), Unit()).to(mine.conv.dtype)
        for _ in range(2)
    )
    with torch.no_grad():  # the package tries its memory in float32: its weights get their own type only here
        for parameter, weight in zip(
            made.memory_model_parameters, (mine.memory.w1, mine.memory.w2), strict=True
        ):
            parameter.data = weight.detach()[None].to(parameter.dtype).clone()  # theirs is a view of itself
        made.to_queries[0].weight.copy_(mine.w_q)
        made.to_keys[0].weight.copy_(mine.w_k)
        made.to_values.weight.copy_(mine.w_v)
        linears = (made.to_adaptive_step[0], made.to_momentum[0], made.to_decay_factor[0])
        biases = (mine.eta_bias, mine.momentum_bias, mine.alpha_bias)
        for linear, weight, bias in zip(linears, mine.w_scalar, biases, strict=True):
            linear.weight.copy_(weight[None])
            linear.bias.fill_(float(bias))
        linears[2].weight.neg_()  # theirs says what is forgotten, ours what is kept
        linears[2].bias.neg_()
    return made


@torch.no_grad()
def run_ours(layer: Titans, x: Tensor) -> Tensor:
    """Read and write all of x (B, T, d), a chunk at a time, as `HopeModel` does: no state but the last is anybody's."""
    tick = layer.config.chunk_memory
    state, outputs = layer.init_state(len(x)), []
    gate = torch.ones(len(x), tick, dtype=x.dtype)
    for at in range(0, x.shape[1], tick):
        out, made, _ = layer.read(x[:, at : at + tick], state, None, at, outer=False)
        outputs.append(out)
        state = layer.write(state, made, gate, donated=True)
    return torch.cat(outputs, 1)


@torch.no_grad()
def run_theirs(layer: nn.Module, x: Tensor) -> Tensor:
    """The same."""
    return layer(x)[0]


def difference() -> float:
    """Largest difference of outputs over the largest output, float64, chunks of one token, 16 tokens.

    The package reads a token with the memory that this token has been written to already, ours before.
    """
    mine = ours(1, dim=16, dtype=torch.float64)
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    expected = run_theirs(theirs(mine, 1, sequential=True), x)
    state, gate, outputs = mine.init_state(2), torch.ones(2, 1, dtype=x.dtype), []
    with torch.no_grad():
        for at in range(16):
            made = mine.read(x[:, at : at + 1], state, None, at)[1]
            state = mine.write(state, made, gate)
            outputs.append(mine.read(x[:, at : at + 1], state, None, at)[0])
    return float((torch.cat(outputs, 1) - expected).abs().max() / expected.abs().max())


def rows(turns: int) -> list[Row]:
    """Both forms of the package, the faster of which counts."""
    apart = difference()
    if not apart < 1e-9:
        raise RuntimeError(f"the Titans memories do not compute the same: outputs differ by {apart:.1e}")
    found = []
    for chunk, goal in ((8, 20), (64, 5)):
        mine, x = ours(chunk), torch.randn(BATCH, LENGTH, DIM)
        works: dict[str, Callable[[], object]] = {
            "ours": lambda mine=mine, x=x: run_ours(mine, x),
            "matrix": clock.matrix_rate(),
        }
        for name, sequential in (("sequential", True), ("parallel", False)):
            other = theirs(mine, chunk, sequential)
            works[name] = lambda other=other, x=x: run_theirs(other, x)
        works["products"] = products_of(works["ours"])
        times = clock.by_turns(works, turns, warm=1)
        fastest = min(("sequential", "parallel"), key=lambda n: statistics.median(times[n]))
        speed = clock.ratio(times, fastest, "ours")
        work = flops.titans_memory(DIM) * BATCH * LENGTH / clock.MATRIX_FLOPS
        ceilings = [work * t for t in times["matrix"]]
        most = statistics.median(t / c for c, t in zip(ceilings, times[fastest], strict=True))
        found.append(
            Row(
                f"Titans memory, chunk {chunk}", statistics.median(times["ours"]), statistics.median(times[fastest]),
                speed, peer_is=f"titans-pytorch, {fastest}", ceiling=statistics.median(ceilings),
                share=statistics.median(c / t for c, t in zip(ceilings, times["ours"], strict=True)),
                goal=f">= {goal}x", met=speed >= goal,
                note=f"at chunk 1 outputs agree to {apart:.0e} (float64); the ceiling itself is {most:.1f}x, its "
                f"products alone, in their shapes, {clock.ratio(times, fastest, 'products'):.1f}x",
                turns=times,
            )
        )  # fmt: skip
    return found
