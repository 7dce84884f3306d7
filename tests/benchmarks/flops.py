"""Operations that the mathematics needs, a token; a multiplication and an addition are two."""

from __future__ import annotations

from hopeprobe.model.config import ModelConfig


def layer(config: ModelConfig) -> float:
    """A self-modifying layer that reads and writes: 72 d^2 under the published rule, in products of matrices alone.

    Reading: a vector memory takes 4 d^2 (two products), a scalar one 2 d^2. Writing one: it answers k and v, its W1
    carries the error back (vector memories: 2 d^2), and each of its matrices takes an outer product. Decay towards the
    meta weights reads k with them too, 2 d^2 a memory. What a chunk's own system costs is left out (C d).
    """
    adaptive_q = config.query == "memory"
    vectors = 4 if adaptive_q else 3
    read = 3 * 4 + 2 * 2 + (4 if adaptive_q else 2)
    write = vectors * (4 + 4 + 2 + 2 + 2) + 2 * (2 + 2 + 2)
    towards_meta = 2 * (vectors + 2) if config.decay_target == "init" else 0
    return float((read + write + towards_meta) * config.dim**2)


def streaming(config: ModelConfig, share: float = 1.0) -> float:
    """A model that reads and writes, without an outer gradient; what a CMS level was written counts as a full matrix.

    A level: forward, backward to its input, each through its meta weights and through what was written, and the outer
    products. The head: logits, and their gradient with respect to what it reads. `share` of the tokens are written; of
    others only the forward of q, `memory` and levels, and the logits, must be.
    """
    d, h = config.dim, config.dim * config.cms_multiplier
    read_levels = len(config.levels) * 2 * 4 * d * h
    read_layer = ((4 if config.query == "memory" else 2) + 4) * d**2
    must = config.layers * (read_layer + read_levels) + 2 * d * config.vocab_size
    cms = len(config.levels) * (2 * 4 + 2 * 4 + 4) * d * h
    return must + share * (config.layers * (layer(config) + cms) + 4 * d * config.vocab_size - must)


def training(config: ModelConfig) -> float:
    """A training step: twice a layer's products for their gradients, through writes; CMS and head likewise.

    The gradient with respect to what a CMS level had been written is not taken; the head adds its table's.
    """
    d, h = config.dim, config.dim * config.cms_multiplier
    cms = len(config.levels) * (2 * 4 + 4) * d * h
    return streaming(config) + config.layers * (2 * layer(config) + cms) + 2 * d * config.vocab_size


def titans_memory(dim: int) -> float:
    """A Titans memory with static projections: k, v, q; read; answer k and carry the error back; W and S written."""
    return float((3 * 2 + 4 + 2 + 2 + 2 + 2 * 4) * dim**2)
