"""Files that the package nested-learning saved: which they are, how training called the model, what it left alone."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nested_learning_hooks import Calls
from torch import Tensor

from hopeprobe.errors import BadInputError
from hopeprobe.foreign import content_of, is_nested_learning

if TYPE_CHECKING:
    from nested_learning.model import HOPEModel
    from nested_learning.titan.model import TitanOnlyModel

PACKAGE = "nested-learning"
VERSION = "0.2.0"
"""The one whose code this adapter was written to; what another one computes nobody has looked at."""

_RENAMED = (
    (".cms.blocks.", ".cms."),
    (".attn.", ".attention."),
    (".titan_memory.", ".titans.memory."),
    (".self_modifier.", ".titans.self_modifier."),
)
"""The package's names of weights, and those in which probes find layer, mechanism and component."""


def read_content(path: Path) -> Mapping[str, Any] | None:
    """What the file holds, None where it is damaged or somebody else's. Raises BadInputError without the package."""
    content = content_of(path)
    if not isinstance(content, Mapping) or not is_nested_learning(content):
        return None
    try:
        found = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise BadInputError(
            f"{path} is a checkpoint of {PACKAGE}, which is not installed here: pip install {PACKAGE}=={VERSION}"
        ) from None
    if found != VERSION:
        raise BadInputError(
            f"{path} is a checkpoint of {PACKAGE}; this adapter knows what {VERSION} computes, and {found} is installed"
        )
    return content


def build(config: Mapping[str, Any], seed: int | None) -> HOPEModel | TitanOnlyModel:
    """The package's model of a configuration; seed: of its weights. Raises BadInputError where there is none."""
    from nested_learning.training import build_model_from_cfg
    from omegaconf import OmegaConf

    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            return build_model_from_cfg(OmegaConf.create({"model": config["model"]}).model)
        except Exception as error:  # of any kind: the package trusts its configuration
            raise BadInputError(
                f"{PACKAGE} cannot build the model of the configuration: {type(error).__name__}: {error}"
            ) from error


def calls_of(config: Mapping[str, Any], model: HOPEModel | TitanOnlyModel, context: int) -> Calls:
    """How training called this model. Raises BadInputError for a combination that the package cannot run."""
    train = config.get("train") or {}
    per_layer = bool(train.get("per_layer_teach_signal"))
    if not hasattr(model, "forward_with_block_outputs"):
        return Calls(context, whole=True)
    if not train.get("online_updates"):
        return Calls(context, whole=True, per_layer=per_layer)
    levels = [level for block in model.blocks for level in getattr(block.config, "cms_levels", ())]
    size = int(train.get("online_chunk_size") or 0)
    if size <= 0 and not levels:
        return Calls(context, whole=True, per_layer=per_layer)
    tick = size if size > 0 else min(level.update_period for level in levels)
    carry = bool(train.get("online_carry_attention_cache")) and tick < context
    attends = any(hasattr(block, "attn") for block in model.blocks)
    if carry and attends and model.config.local_conv_window is not None:
        raise BadInputError(
            "train.online_carry_attention_cache and model.local_conv_window: the package's attention has one or the "
            "other"
        )
    through = train.get("algorithm_mode") == "boundary_state_grad_through_write"
    return Calls(tick, per_layer=per_layer, carry=carry, differentiable=through)


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> int:
    """Load a file's weights, all of them; how many. Compiled models have a prefix before every key."""
    prefix = "_orig_mod."
    named = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    expected = model.state_dict()
    wrong = sorted(named.keys() ^ expected.keys())
    wrong = wrong or [n for n, t in named.items() if t.shape != expected[n].shape]
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise BadInputError(f"weights do not fit the file's own configuration: {shown}")
    model.load_state_dict(named)
    return len(named)


def grouped(model: torch.nn.Module) -> dict[str, dict[str, Tensor]]:
    """Weights by mechanism, under names like `blocks.0.cms.fast.net.1.weight`, `blocks.0.selfmod.k.w1`."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        for theirs, ours in _RENAMED:
            name = name.replace(theirs, ours)
        if ".selfmod.m_" in name:
            name = name.replace(".selfmod.m_", ".selfmod.").removesuffix(".weight")
        parts = name.split(".")
        groups.setdefault(parts[2] if parts[0] == "blocks" else parts[0], {})[name] = parameter
    return groups


def untouched(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights that nothing in the package changes, by its own names: two files of one run have the same, bit for bit.

    `m_q` where queries are static, `self_modifier`, and what `freeze_backbone` froze.
    """
    static = not getattr(model.config, "self_mod_adaptive_q", False)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if (static and ".selfmod.m_q." in name) or ".self_modifier." in name or not parameter.requires_grad
    }
