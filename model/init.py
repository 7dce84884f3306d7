"""Initial weights as a pure function of configuration and seed.

Every parameter draws from a generator of its own, seeded by the seed and the parameter's name: variants share the
initial weights wherever names and shapes agree, and the step-0 weights of a run can be rebuilt from its checkpoint at
any time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hopeprobe.model.config import ModelConfig


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill all parameters in place.

    Matrices and biases are uniform on +-1/sqrt(fan in), PyTorch's own rule for linear and convolution layers, which the
    published norms imply; the embedding is normal with `embed_std`; level mixing starts even; gate biases at
    their values. Drawn in float64 and rounded, so that float32 and float64 models hold the same weights.
    """
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(_draw(name, parameter, config, seed))


def _draw(name: str, parameter: Tensor, config: ModelConfig, seed: int) -> Tensor:
    last = name.rsplit(".", 1)[-1]
    full = torch.zeros(parameter.shape, dtype=torch.float64)
    if last in ("weight", "bias"):  # of a LayerNorm: everything else has names of its own
        return full + (1.0 if last == "weight" else 0.0)
    if last.startswith("mix_"):
        return full
    if last == "momentum_bias":
        return full
    if last in ("eta_bias", "alpha_bias"):
        return full + float(getattr(config, last) or 0.0)  # a Titans layer has them always
    generator = _generator(seed, name)
    if last == "embed":
        return full.normal_(0.0, config.embed_std, generator=generator)
    fan_in = parameter.shape[-1]
    if last == "b_in":
        fan_in = config.dim
    elif last == "b_out":
        fan_in = config.dim * (config.cms_multiplier if ".cms." in name else config.mlp_multiplier)
    bound = fan_in**-0.5
    return full.uniform_(-bound, bound, generator=generator)


#: Of a model's state, what belongs to the text that it is gated by.
FREQUENCIES = "unigram"


def digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) over names, shapes and float32 values of weights, in the order of their names.

    Token frequencies are no weights: they come from a text, not from a seed.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        if name == FREQUENCIES:
            continue
        total.update(f"{name}:{tuple(tensor.shape)};".encode())
        total.update(tensor.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy().tobytes())
    return total.hexdigest()
