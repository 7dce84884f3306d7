"""The model as an executable reference: one sequence, one token at a time, nothing clever.

Reads like the equations (design, section 3; "Nested Learning", arXiv 2512.24695, section 8). Inner gradients come
from autograd, the delta rule is its plain recurrence, every memory has its own matrices. It is slow, meant for
float64, and what the fast path (`hope.py`, `selfmod.py`, `cms.py`, `write.py`) is tested against. No hooks fire here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hopeprobe.model.attention import MLP, Attention
from hopeprobe.model.block import Block
from hopeprobe.model.cms import CMS
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.memories import Memory, l2norm
from hopeprobe.model.selfmod import SelfMod
from hopeprobe.model.titans import Titans

MemoryWeights = dict[str, Tensor]  # "w1" (out, h), "w2" (h, d), and "skip" (1, d) where out is 1


class ReferenceGates(NamedTuple):
    """Zeros and ones for the T tokens of a window."""

    memories: Tensor  # (layers, T)
    levels: Tensor  # (T,): of all CMS levels


@dataclass
class LayerTrace:
    """Fast weights of one layer, as full matrices, and what waits to be written."""

    meta: dict[str, MemoryWeights]
    fast: dict[str, MemoryWeights]
    waiting: list[
        tuple[Tensor, Tensor, Tensor, Tensor]
    ]  # k, v, eta, alpha of every token so far, after the gate
    tail: Tensor  # (width - 1, d)
    cms_fast: list[dict[str, Tensor]]  # per level, full matrices "w_in" and "w_out", outside the graph
    cms_sum: list[dict[str, Tensor]]  # per level, the gradient accumulated since its last write
    momentum: MemoryWeights  # of a Titans memory
    seen: list[
        tuple[list[Tensor], list[Tensor]]
    ]  # keys, turned by their position, and values of each head, (d / heads,)


def memory_out(w: MemoryWeights, x: Tensor) -> Tensor:
    """M(x) = skip(x) + W1 gelu(W2 x); x (..., d)."""
    skip = x @ w["skip"].mT if "skip" in w else x
    return skip + F.gelu(x @ w["w2"].mT) @ w["w1"].mT


def _meta(selfmod: SelfMod) -> dict[str, MemoryWeights]:
    out: dict[str, MemoryWeights] = {}
    for name, module in selfmod.memories.items():
        memory = cast(Memory, module)
        out[name] = {"w1": memory.w1, "w2": memory.w2}
        if memory.skip is not None:
            out[name]["skip"] = memory.skip
    return out


def init_trace(model: HopeModel) -> list[LayerTrace]:
    """Fresh state of every layer."""
    traces = []
    for module in model.blocks:
        block = cast(Block, module)
        meta = _meta(block.selfmod) if block.selfmod is not None else {}
        momentum: MemoryWeights = {}
        if block.titans is not None:
            meta = {"memory": {"w1": block.titans.memory.w1, "w2": block.titans.memory.w2}}
            momentum = {w: torch.zeros_like(m) for w, m in meta["memory"].items()}
        of_block = block.cms.level_list() if block.cms is not None else []
        levels = [{"w_in": lv.w_in.detach(), "w_out": lv.w_out.detach()} for lv in of_block]
        tail = model.embed.new_zeros(model.config.conv_width - 1, model.config.dim)
        sums = [{k: torch.zeros_like(w) for k, w in lv.items()} for lv in levels]
        traces.append(
            LayerTrace(meta, {n: dict(w) for n, w in meta.items()}, [], tail, levels, sums, momentum, [])
        )
    return traces


def _convolved(conv: Tensor, trace: LayerTrace, x: Tensor) -> Tensor:
    width = conv.shape[1]
    window = torch.cat([trace.tail, x])
    trace.tail = window[len(window) - width + 1 :]
    return torch.stack([(window[t : t + width].mT * conv).sum(-1) for t in range(len(x))])


def _selfmod_read(selfmod: SelfMod, trace: LayerTrace, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    config = selfmod.config
    u = _convolved(selfmod.conv, trace, x)
    k = l2norm(memory_out(trace.fast["k"], u))
    v = memory_out(trace.fast["v"], u)
    if config.normalise_value:
        v = l2norm(v)
    q = l2norm(memory_out(trace.fast["q"], u) if selfmod.w_q is None else u @ selfmod.w_q.mT)
    eta = memory_out(trace.fast["eta"], u)[:, 0] + (0.0 if selfmod.eta_bias is None else selfmod.eta_bias)
    eta = config.eta_max * (torch.sigmoid(eta) if config.eta_squash == "sigmoid" else F.softplus(eta))
    alpha = memory_out(trace.fast["alpha"], u)[:, 0] + (
        0.0 if selfmod.alpha_bias is None else selfmod.alpha_bias
    )
    return memory_out(trace.fast["memory"], q), [k, v, eta, torch.sigmoid(alpha)]


def _objective(config: ModelConfig, w: MemoryWeights, k: Tensor, target: Tensor) -> Tensor:
    if config.objective == "dot":
        return -(memory_out(w, k) * target).sum()
    scale = 0.5 if config.objective == "half-l2" else 1.0
    return scale * (memory_out(w, k) - target).square().sum()


def write_chunk(
    config: ModelConfig,
    meta: MemoryWeights,
    start: MemoryWeights,
    tokens: list[tuple[Tensor, Tensor, Tensor, Tensor]],
) -> MemoryWeights:
    """The delta rule over one chunk of one memory, token by token, all gradients at the chunk's start.

    W_t = W' + alpha_t (W_{t-1} - W') - eta_t W_{t-1} k_t k_t^T - eta_t dL_t for matrices that read k, W' what
    decay goes towards; W1 has no erase term, and by default the proximal step eta_t / (1 + eta_t |a_t|^2).
    """
    current = dict(start)
    for k, v, eta, alpha in tokens:
        target = v
        if config.parts.memories == "all":
            target = memory_out(start, v)  # outside the inner derivative, inside the outer one
            if config.normalise_value and "skip" not in start:
                target = l2norm(target)
        inner = {name: w * 1.0 for name, w in start.items()}
        loss = _objective(config, inner, k, target)
        grads = dict(
            zip(inner, torch.autograd.grad(loss, list(inner.values()), create_graph=True), strict=True)
        )
        hidden = F.gelu(start["w2"] @ k)
        updated = {}
        for name, w in current.items():
            rest = meta[name] if config.decay_target == "init" else torch.zeros_like(w)
            new = rest + alpha * (w - rest)
            if name == "w1":
                step = eta / (1.0 + eta * (hidden @ hidden)) if config.proximal else eta
                updated[name] = new - step * grads[name]
            else:
                updated[name] = new - eta * torch.outer(w @ k, k) - eta * grads[name]
        current = updated
    return current


def _titans_read(titans: Titans, trace: LayerTrace, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    config = titans.config
    u = _convolved(titans.conv, trace, x)
    k, v, q = (u @ w.mT for w in (titans.w_k, titans.w_v, titans.w_q))
    biases = torch.stack([titans.eta_bias, titans.momentum_bias, titans.alpha_bias])
    eta, momentum, alpha = torch.sigmoid(u @ titans.w_scalar.mT + biases).unbind(-1)
    out = memory_out(trace.fast["memory"], l2norm(q))
    if titans.attention is not None:
        out = _attend(titans.attention, trace, x) * torch.sigmoid(titans.norm(out))
    v = l2norm(v) if config.normalise_value else v
    return out, [l2norm(k), v, config.eta_max / config.chunk_memory * eta, momentum, alpha]


def _titans_write(config: ModelConfig, trace: LayerTrace, made: list[Tensor], gate: Tensor) -> None:
    """S_t = mu_t S_{t-1} - eta_t dL_t, W_t = W' + alpha_t (W_{t-1} - W') + S_t; a closed gate skips the token."""
    if config.write_grad == "stop":
        made = [part.detach() for part in made]
    start, meta = trace.fast["memory"], trace.meta["memory"]
    current, momentum = dict(start), dict(trace.momentum)
    for k, v, eta, mu, alpha, g in zip(*made, gate, strict=True):
        inner = {name: w * 1.0 for name, w in start.items()}
        loss = 0.5 * (memory_out(inner, k) - v).square().sum()
        grads = torch.autograd.grad(loss, list(inner.values()), create_graph=True)
        for (name, w), grad in zip(current.items(), grads, strict=True):
            if not g:
                continue
            rest = meta[name] if config.decay_target == "init" else torch.zeros_like(w)
            momentum[name] = mu * momentum[name] - eta * grad
            current[name] = rest + alpha * (w - rest) + momentum[name]
    if config.write_grad == "stop":  # reads keep following the meta weights, one to one
        current = {n: w.detach() + (meta[n] - meta[n].detach()) for n, w in current.items()}
        momentum = {n: w.detach() for n, w in momentum.items()}
    trace.fast["memory"], trace.momentum = current, momentum


def _cms_read(cms: CMS, levels: list[dict[str, Tensor]], x: Tensor) -> Tensor:
    outs = []
    current = x
    for level, w in zip(cms.level_list(), levels, strict=True):
        hidden = F.gelu(level.norm(current) @ w["w_in"].mT + level.b_in)
        outs.append(current + hidden @ w["w_out"].mT + level.b_out)
        if cms.chain:
            current = outs[-1]
    if cms.mix_weight is None or cms.mix_bias is None:
        return outs[-1]
    mix = torch.softmax(F.layer_norm(x, x.shape[-1:]) @ cms.mix_weight.mT + cms.mix_bias, dim=-1)
    return torch.stack(outs, dim=-1).mul(mix[:, None, :]).sum(-1)


def _attend(attention: Attention, trace: LayerTrace, x: Tensor) -> Tensor:
    """Causal attention over the last tokens read, a token and a head at a time."""
    heads, width = attention.config.heads, attention.config.dim // attention.config.heads
    out = []
    for token in x:
        position = len(trace.seen)
        of_token = (attention.w_qkv @ token).view(3, heads, width)
        q, k = ([_rotated(row, position) for row in rows] for rows in of_token[:2])
        trace.seen.append((k, list(of_token[2])))
        visible = trace.seen[-attention.window :]
        mixed = []
        for head in range(heads):
            scores = torch.stack([q[head] @ keys[head] for keys, _ in visible])
            weights = torch.softmax(scores / width**0.5, dim=0)
            mixed.append(weights @ torch.stack([values[head] for _, values in visible]))
        out.append(attention.w_out @ torch.cat(mixed))
    return torch.stack(out)


def _rotated(x: Tensor, position: int) -> Tensor:
    """Rotary positions: pairs (x_i, x_{i + e/2}) turned by position / 10000^(2i/e)."""
    half = len(x) // 2
    angle = position * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])


def _mlp(block: Block, x: Tensor) -> Tensor:
    mlp = cast(MLP, block.mlp)
    hidden = F.gelu(block.mlp_norm(x) @ mlp.w_in.mT + mlp.b_in)
    return x + hidden @ mlp.w_out.mT + mlp.b_out


def reference_losses(
    model: HopeModel, tokens: Tensor, gates: ReferenceGates | None = None
) -> tuple[Tensor, list[LayerTrace]]:
    """Losses (T,) of one window of T + 1 tokens from a fresh state, differentiable, and the state after it.

    First-order CMS writes, `write_grad = "through"` or `"stop"`; no truncation. gates: which tokens are written, where
    that is not the absolute threshold's to say.
    """
    config = model.config
    traces = init_trace(model)
    losses = []
    inputs, targets = tokens[:-1], tokens[1:]
    for start in range(0, len(inputs), config.tick):
        x = model.embed[inputs[start : start + config.tick]]
        seen = [[{k: (w - w.detach()) + f for (k, w), f in _pairs(lv, fast)} for lv, fast in _levels(model, i, traces)]
                for i in range(config.layers)]  # fmt: skip
        made = []
        for i in range(config.layers):
            block = cast(Block, model.blocks[i])
            normed, generated = x if block.norm is None else block.norm(x), list[Tensor]()
            if block.selfmod is not None:
                out, generated = _selfmod_read(block.selfmod, traces[i], normed)
            elif block.titans is not None:
                out, generated = _titans_read(block.titans, traces[i], normed)
            else:
                out = _attend(cast(Attention, block.attention), traces[i], normed)
            x = x + out if config.residual else out
            made.append(generated)
            if block.cms is not None:
                x = _cms_read(block.cms, seen[i], x)
            elif block.mlp is not None:
                x = _mlp(block, x)
        tick_losses = F.cross_entropy(
            model.norm(x) @ model.embed.mT, targets[start : start + config.tick], reduction="none"
        )
        losses.append(tick_losses)
        if config.writes and len(x) == config.tick:
            gate = (tick_losses.detach() > config.threshold).to(x.dtype)
            here = slice(start, start + config.tick)
            of_memories = gate.expand(config.layers, -1) if gates is None else gates.memories[:, here]
            gate = gate if gates is None else gates.levels[here]
            _write(model, traces, made, seen, of_memories, (gate * tick_losses).sum(), start + config.tick)
    return torch.cat(losses), traces


def _levels(
    model: HopeModel, i: int, traces: list[LayerTrace]
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    cms = cast(Block, model.blocks[i]).cms
    of_block = cms.level_list() if cms is not None else []
    metas: list[dict[str, Tensor]] = [{"w_in": lv.w_in, "w_out": lv.w_out} for lv in of_block]
    return list(zip(metas, traces[i].cms_fast, strict=True))


def _pairs(meta: dict[str, Tensor], fast: dict[str, Tensor]) -> list[tuple[tuple[str, Tensor], Tensor]]:
    return [((k, meta[k]), fast[k]) for k in meta]


def _write(
    model: HopeModel,
    traces: list[LayerTrace],
    made: list[list[Tensor]],
    seen: list[list[dict[str, Tensor]]],
    gates: Tensor,
    gated_loss: Tensor,
    end: int,
) -> None:
    config = model.config
    written = [name.removeprefix("selfmod.") for name in config.periods if name.startswith("selfmod.")]
    for i, trace in enumerate(traces):
        if config.parts.mixer == "titans":
            _titans_write(config, trace, made[i], gates[i])
        if written:
            _write_memories(config, trace, made[i], gates[i], written, end)
        if config.parts.levels:
            _write_levels(cast(CMS, cast(Block, model.blocks[i]).cms), trace, seen[i], gated_loss, end)


def _write_memories(
    config: ModelConfig, trace: LayerTrace, made: list[Tensor], gate: Tensor, written: list[str], end: int
) -> None:
    k, v, eta, alpha = made
    if config.write_grad == "stop":
        k, v, eta, alpha = k.detach(), v.detach(), eta.detach(), alpha.detach()
    for t in range(len(gate)):
        trace.waiting.append((k[t], v[t], gate[t] * eta[t], 1 - gate[t] * (1 - alpha[t])))
    for name in written:
        chunk = config.chunk_memory if name == "memory" else config.chunk
        if end % chunk == 0:
            new = write_chunk(config, trace.meta[name], trace.fast[name], trace.waiting[end - chunk : end])
            if config.write_grad == "stop":  # reads keep following the meta weights, one to one
                new = {
                    n: w.detach() + (trace.meta[name][n] - trace.meta[name][n].detach())
                    for n, w in new.items()
                }
            trace.fast[name] = new


def _write_levels(
    cms: CMS, trace: LayerTrace, seen: list[dict[str, Tensor]], gated_loss: Tensor, end: int
) -> None:
    for level, (module, weights) in enumerate(zip(cms.level_list(), seen, strict=True)):
        grads = torch.autograd.grad(gated_loss, list(weights.values()), retain_graph=True)
        for (name, _), grad in zip(weights.items(), grads, strict=True):
            trace.cms_sum[level][name] = trace.cms_sum[level][name] + grad
        if end % module.spec.period == 0:
            rate = module.spec.learning_rate / module.spec.period
            for name, total in trace.cms_sum[level].items():
                trace.cms_fast[level][name] = trace.cms_fast[level][name] - rate * total
                if module.spec.max_change is not None:
                    meta = getattr(module, name).detach()
                    written = trace.cms_fast[level][name] - meta
                    most = module.spec.max_change * meta.square().sum().sqrt()
                    written = written * min(1.0, float(most / written.square().sum().sqrt()))
                    trace.cms_fast[level][name] = meta + written
                trace.cms_sum[level][name] = torch.zeros_like(total)
