"""What the variants are made of: one row each. The model is built from the row; nothing else asks for a variant's name.

    full                 self-modifying memories, then CMS levels; all of them are written
    no-cms               the memories alone
    static-mlp           its control, with the parameters of `full`: CMS levels that are never written
    no-self-mod          k, v, q, eta and alpha come from maps of the same size that are never written; M_memory is
                         written, towards v itself
    frozen-memory        its control: no memory is written, the CMS as in `full`
    no-surprise          tau = 0: every token is written
    hope-attention       causal attention in place of the memories
    same-period          every level is written as often as the fastest: is timescale what matters
    transformer          causal attention, then an MLP
    transformer-matched  a Transformer with as many parameters as `full`: at the `scaled` size the study's 81.1M
    titans               one memory with momentum and forgetting, static projections; it gates sliding-window attention

Source: "Dissecting HOPE", section 4.1 and Table 1, for what is left out there; the controls are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Parts:
    """What a block is made of, and what of it is written while it reads.

    Attributes:
        mixer: what mixes positions.
        channel: what follows it.
        memories: which self-modifying memories are written.
        levels: whether CMS levels are written.
        one_period: every level is written as often as the fastest.
        no_threshold: tau is 0, whatever the configuration says.

    """

    mixer: Literal["selfmod", "attention", "titans"] = "selfmod"
    channel: Literal["cms", "mlp", "none"] = "cms"
    memories: Literal["all", "memory", "none"] = "all"
    levels: bool = True
    one_period: bool = False
    no_threshold: bool = False

    @property
    def writes(self) -> bool:
        """Does anything write."""
        return self.memories != "none" or self.levels or self.mixer == "titans"


_TRANSFORMER = Parts(mixer="attention", channel="mlp", memories="none", levels=False)

VARIANTS: dict[str, Parts] = {
    "full": Parts(),
    "no-cms": Parts(channel="none", levels=False),
    "static-mlp": Parts(levels=False),
    "no-self-mod": Parts(memories="memory"),
    "frozen-memory": Parts(memories="none"),
    "no-surprise": Parts(no_threshold=True),
    "hope-attention": Parts(mixer="attention", memories="none"),
    "same-period": Parts(one_period=True),
    "transformer": _TRANSFORMER,
    "transformer-matched": _TRANSFORMER,
    "titans": Parts(mixer="titans", channel="mlp", memories="none", levels=False),
}
