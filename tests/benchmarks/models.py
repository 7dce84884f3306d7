"""Whole models at the sizes of `small`: against nested-learning's streaming, and HOPE against a Transformer of ours."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

import clock
import flops
import torch
from clock import Row
from products import products_of
from torch import Tensor

from hopeprobe.model.config import ModelConfig, preset
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.run import make_optimizer
from hopeprobe.model.train_config import TrainConfig

BATCH = 8


def theirs(config: ModelConfig) -> torch.nn.Module:
    """A `hope_selfmod` model of the same width, depth, vocabulary, CMS and chunks (their memory's is 8 as ours)."""
    from nested_learning.training import build_model_from_cfg
    from omegaconf import OmegaConf

    levels = [{"name": lv.name, "update_period": lv.period} for lv in config.cms_levels]
    made = {
        "vocab_size": config.vocab_size,
        "dim": config.dim,
        "num_layers": config.layers,
        "heads": config.heads,
        "block_variant": "hope_selfmod",
        "self_mod_chunk_size": config.chunk,
        "self_mod_chunk_size_memory": config.chunk_memory,
        "self_mod_adaptive_q": config.query == "memory",
        "titan_level": {"name": "titan", "update_period": config.tick},
        "cms_levels": levels,
        "surprise_threshold": config.surprise_threshold,
        "surprise_metric": "loss",
    }
    torch.manual_seed(0)
    return build_model_from_cfg(OmegaConf.create(made))


def stream_theirs(model: torch.nn.Module, tokens: Tensor, tick: int, train: bool) -> float:
    """One pass of the package's online loop over (B, T) tokens, as its training loop makes it; the mean loss."""
    from nested_learning.training import _iter_online_boundary_chunks, compute_teach_signal

    state, losses = model.init_fast_state(), []
    for chunk, following, last in _iter_online_boundary_chunks(tokens, chunk_size=tick):
        with torch.set_grad_enabled(train):
            logits = model.forward_with_block_outputs(chunk, fast_state=state)[0]
            targets = chunk[:, 1:] if following is None else torch.cat([chunk[:, 1:], following[:, None]], 1)
            scored = logits[:, : targets.shape[1]].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(scored, targets.flatten())
        signal = compute_teach_signal(model, logits, chunk, next_tokens=following)
        if train:
            loss.backward()
        with torch.no_grad():
            model(
                chunk,
                teach_signal=signal,
                surprise_value=float(loss),
                fast_state=state,
                finalize_updates=last,
            )
        losses.append(float(loss))
    return statistics.fmean(losses)


def _tokens(config: ModelConfig, length: int) -> Tensor:
    return torch.randint(
        0, config.vocab_size, (BATCH, length + 1), generator=torch.Generator().manual_seed(0)
    )


def _streaming(config: ModelConfig, length: int) -> dict[str, Callable[[], object]]:
    model, other, tokens = HopeModel(config), theirs(config), _tokens(config, length)

    @torch.no_grad()
    def ours() -> None:
        model(tokens)

    return {"ours": ours, "theirs": lambda: stream_theirs(other, tokens[:, :-1], config.tick, train=False)}


def _training(config: ModelConfig, length: int) -> dict[str, Callable[[], object]]:
    """Each a whole step: forward, backward, clipping, AdamW."""
    model, other, tokens = HopeModel(config), theirs(config), _tokens(config, length)
    optimizer = make_optimizer(model, TrainConfig())
    their_optimizer = torch.optim.AdamW(other.parameters(), lr=3e-4)

    def ours() -> None:
        optimizer.zero_grad(set_to_none=True)
        (model(tokens).losses.sum() / tokens[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def peer() -> None:
        their_optimizer.zero_grad(set_to_none=True)
        stream_theirs(other, tokens[:, :-1], config.tick, train=True)
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        their_optimizer.step()

    return {"ours": ours, "theirs": peer}


def _against(
    name: str, works: dict[str, Callable[[], object]], tokens: int, work: float, turns: int, goal: float
) -> Row:
    for _ in range(3):  # the first passes also ask the system for memory
        works["ours"]()
    alone = products_of(works["ours"])
    alone()
    works = {**works, "products": alone, "matrix": clock.matrix_rate()}
    times = clock.by_turns(works, turns, warm=0, calls={"ours": 3})  # steady, as steps follow one another
    speed = clock.ratio(times, "theirs", "ours")
    ceilings = [clock.MATRIX_FLOPS / t / work for t in times["matrix"]]  # tokens a second
    ours = [tokens / t for t in times["ours"]]
    most = statistics.median(c * t for c, t in zip(ceilings, times["theirs"], strict=True)) / tokens
    thin, of_ours = clock.ratio(times, "theirs", "products"), clock.ratio(times, "products", "ours")
    return Row(
        name, statistics.median(ours), tokens / statistics.median(times["theirs"]), speed, unit="tokens/s",
        peer_is="nested-learning", ceiling=statistics.median(ceilings),
        share=statistics.median(a / b for a, b in zip(ours, ceilings, strict=True)), goal=f">= {goal:g}x",
        met=speed >= goal, turns=times,
        note=f"the ceiling itself is {most:.0f}x; its products alone, in their shapes, are {thin:.1f}x and "
        f"{of_ours:.0%} of our time",
    )  # fmt: skip


def rows(name: str, turns: int, length: int = 128) -> list[Row]:
    """Streaming evaluation and a training step of a preset against the package's."""
    config = dataclasses.replace(preset(name), context=length)
    tokens = BATCH * length
    return [
        _against(
            f"{name} full, streaming evaluation", _streaming(config, length), tokens,
            flops.streaming(config), turns, 30,
        ),
        _against(
            f"{name} full, training step", _training(config, length), tokens, flops.training(config), turns, 8
        ),
    ]  # fmt: skip


def transformer(name: str, turns: int, length: int = 256) -> list[Row]:
    """A training step of full HOPE against one of our Transformer with as many parameters."""
    works: dict[str, Callable[[], object]] = {}
    sizes = {}
    for variant in ("full", "transformer-matched"):
        config = preset(name, variant)
        config = dataclasses.replace(config, context=length)
        model, tokens = HopeModel(config), _tokens(config, length)
        sizes[variant] = sum(p.numel() for p in model.parameters()) / 1e6
        optimizer = make_optimizer(model, TrainConfig())

        def step(model=model, tokens=tokens, optimizer=optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            model(tokens).losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        works[variant] = step
    times = clock.by_turns(works, turns, warm=2)
    speed = clock.ratio(times, "transformer-matched", "full")
    tokens_each = BATCH * length
    return [
        Row(
            f"{name} full against a Transformer, training step", tokens_each / statistics.median(times["full"]),
            tokens_each / statistics.median(times["transformer-matched"]), speed, unit="tokens/s",
            peer_is="our Transformer", goal=">= 0.2x", met=speed >= 0.2,
            note=", ".join(f"{k} {v:.1f}M" for k, v in sizes.items()), turns=times,
        )
    ]  # fmt: skip
