"""The gate of one sequence, token by token in float64: what `model/gate.py` and `model/scores.py` are held against.

Written from their equations: sums run over all tokens so far with explicit powers, integers are Python's, and gradients
of an associative loss are autograd's.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
OF_SCORES, OF_RANKS = 1, 2  # salts


def uniforms(tokens, salt, seed=0):
    """U_t on [0, 1) of every token: h_t = a h_{t-1} + token_t + 1 modulo 2^64, then splitmix64, the upper 24 bits."""
    chain = (seed * GOLDEN + 0x2545F4914F6CDD1D) & MASK
    found = []
    for token in tokens:
        chain = (0x5851F42D4C957F2D * chain + int(token) + 1) & MASK
        z = (chain + (salt + 1) * GOLDEN) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(((z ^ (z >> 31)) >> 40) / 2**24)
    return np.array(found)


def fading(values, decay):
    """Mean of values weighted by decay to the power of their age, the last one's age 0."""
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    return math.fsum(w * x for w, x in zip(weights, values, strict=True)) / math.fsum(weights)


def scores(rule, surprise, decay=0.95, *, unigram=None, entropy=None, tokens=None, seed=0):
    """Score of every token of a sequence; `unigram` and `entropy` are of its tokens, nats."""
    s = [float(x) for x in surprise]
    if rule in ("absolute", "quantile"):
        return np.array(s)
    if rule == "excess":
        return np.array([x - float(u) for x, u in zip(s, unigram, strict=True)])
    if rule == "entropy-gap":
        return np.array([x - float(h) for x, h in zip(s, entropy, strict=True)])
    if rule == "momentum":
        return np.array([fading(s[: t + 1], decay) for t in range(len(s))])
    if rule == "random":
        return uniforms(tokens, OF_SCORES, seed)
    before = {"zscore": 0.0, "ratio": 1.0}[rule]
    found = [before]
    for t in range(1, len(s)):
        mean = fading(s[:t], decay)
        deviation = math.sqrt(fading([(x - mean) ** 2 for x in s[:t]], decay))
        found.append((s[t] - mean) / (deviation + 0.1) if rule == "zscore" else s[t] / mean)
    return np.array(found)


def slopes(rule, surprise, decay=0.95):
    """d score_t / d s_t, by the definition of each score."""
    s = [float(x) for x in surprise]
    found = []
    for t in range(len(s)):
        if rule == "momentum":
            found.append(1.0 / math.fsum(decay**age for age in range(t + 1)))
        elif rule in ("zscore", "ratio") and t == 0:
            found.append(0.0)
        elif rule in ("zscore", "ratio"):
            mean = fading(s[:t], decay)
            deviation = math.sqrt(fading([(x - mean) ** 2 for x in s[:t]], decay))
            found.append(1.0 / (deviation + 0.1) if rule == "zscore" else 1.0 / mean)
        else:
            found.append(1.0)
    return np.array(found)


def budgeted(score, chance, budget, history=256):
    """Gates by a budget, and p_t: the rank among the last `history` scores, ties and the token itself by chance."""
    gates, ranks = [], []
    for t, mine in enumerate(score):
        past = score[max(0, t - history) : t]
        higher, equal = sum(x > mine for x in past), sum(x == mine for x in past)
        ranks.append((higher + chance[t] * (1 + equal)) / (1 + len(past)))
        owed = math.fsum(budget - g for g in gates)
        gates.append(float(ranks[t] <= budget * (1 + owed / 2)))
    return np.array(gates), np.array(ranks)


def decided(config, score, tokens, threshold=None):
    """Gates of a sequence under a `GateConfig`; `threshold` is tau of the rule `absolute`."""
    threshold = config.threshold if threshold is None else threshold
    if config.budget is None:
        return (np.asarray(score) > threshold).astype(float)
    return budgeted(score, uniforms(tokens, OF_RANKS, config.seed), config.budget, config.history)[0]


def entropies(logits):
    """-sum p log p of every row of logits (T, V), nats."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -(np.exp(log_p) * log_p).sum(axis=1)


def _answer(w, x):
    skip = w["skip"] @ x if "skip" in w else x
    return skip + w["w1"] @ F.gelu(w["w2"] @ x)


def _inner_loss(config, w, k, target):
    if config.variant != "titans" and config.objective == "dot":
        return -(_answer(w, k) * target).sum()
    half = 0.5 if config.variant == "titans" or config.objective == "half-l2" else 1.0
    return half * ((_answer(w, k) - target) ** 2).sum()


def _target(config, w, v):
    """What a memory is written towards: v, or its own answer to v."""
    if config.variant == "titans" or config.parts.memories == "memory":
        return v
    answer = _answer(w, v).detach()
    return F.normalize(answer, dim=0, eps=1e-6) if config.normalise_value and "skip" not in w else answer


def assoc_scores(model, cache, layer):
    """|gradient of the associative losses| of a layer, (T,), by autograd at the weights each tick read.

    cache: of a run of one row, with every `hook_k`, `hook_v` and `hook_fast_*`.
    """
    config, mixer = model.config, "titans" if model.config.variant == "titans" else "selfmod"
    block, at = model.blocks[layer], f"blocks.{layer}.{mixer}"
    memories = {"memory": block.titans.memory} if block.titans else block.selfmod.memories
    k, v = (cache[f"{at}.{name}"][0] for name in ("hook_k", "hook_v"))
    written = [name.partition(".")[2] for name in config.periods if name.startswith(mixer)]
    total = np.zeros(len(k))
    for name in written:
        period = config.periods[f"{mixer}.{name}"]
        current = {w: p.detach() for w, p in memories[name].named_parameters()}
        writes = {w: iter(cache[f"{at}.{name}.hook_fast_{w}"][0]) for w in current}
        for t in range(len(k)):
            if t and t % period == 0:
                current = {w: next(writes[w]) for w in current}
            with torch.enable_grad():
                inner = {w: x.clone().requires_grad_() for w, x in current.items()}
                loss = _inner_loss(config, inner, k[t], _target(config, current, v[t]))
                total[t] += sum(float((g**2).sum()) for g in torch.autograd.grad(loss, list(inner.values())))
    return np.sqrt(total)
