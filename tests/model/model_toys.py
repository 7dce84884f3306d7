"""Toy models: small enough for float64 and per-token loops, with everything in them that the real ones have."""

import dataclasses

import torch

from hopeprobe.model.config import CMSLevel, ModelConfig, published
from hopeprobe.model.variants import VARIANTS

TOY = ModelConfig(vocab_size=37, dim=8, layers=2, context=64, heads=2, embed_std=0.5)

CONFIGS = {
    "default": TOY,
    "published": published(TOY),
    "chain": dataclasses.replace(TOY, cms_mode="chain"),
    "three-levels": dataclasses.replace(
        TOY, cms_levels=(CMSLevel("fast", 4), CMSLevel("mid", 8), CMSLevel("slow", 16, 0.3))
    ),
    "held-changes": dataclasses.replace(
        TOY, cms_levels=(CMSLevel("fast", 8, 0.3, 0.02), CMSLevel("slow", 16, 0.3, 0.01))
    ),
    "long-chunks": dataclasses.replace(TOY, chunk=16, chunk_memory=32),
    "static-query": dataclasses.replace(TOY, query="static"),
    "dot": dataclasses.replace(TOY, objective="dot"),
    "decay-to-zero": dataclasses.replace(TOY, decay_target="zero"),
    "stop": dataclasses.replace(TOY, write_grad="stop"),
    "selective-gate": dataclasses.replace(TOY, surprise_threshold=3.6),
    "titans-window": dataclasses.replace(
        TOY, variant="titans", window=24, chunk_memory=16, surprise_threshold=3.6
    ),
    "titans-layer": dataclasses.replace(TOY, variant="titans", titans_form="layer", decay_target="zero"),
    **{
        variant: dataclasses.replace(TOY, variant=variant)
        for variant in VARIANTS
        if variant not in ("full", "transformer-matched")  # the default; another size of `transformer`
    },
}


def differences(selfmod, held):
    """Fast minus meta weights of each group of a self-modifying layer, None for one that is never written."""
    with torch.no_grad():
        return [
            None
            if group is None
            else type(group)(*(now - base for now, base in zip(group, meta, strict=True)))
            for group, meta in zip(held.groups, selfmod.stacked(), strict=True)
        ]
