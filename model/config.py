"""Configuration of the model: one frozen dataclass, its presets, and the public reproduction's rule as `published()`.

A configuration is plain data: `to_dict` and `from_dict` round-trip through a checkpoint, and an unknown key is an error
that names its nearest neighbour, never a value silently dropped.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hopeprobe.errors import BadInputError, near_names
from hopeprobe.model.variants import VARIANTS, Parts

#: The six memories of a self-modifying layer, in the order their fast weights are stacked: those with vector output
#: first; `memory`, which answers the query, and `q`, which asks it, ahead of the four that only serve writing.
MEMORIES = ("memory", "q", "k", "v", "eta", "alpha")
SCALAR_MEMORIES = ("eta", "alpha")

_T = TypeVar("_T")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        hint = near_names(str(value), allowed)
        raise BadInputError(f"{name} is {value!r}, must be one of {', '.join(map(repr, allowed))}{hint}")


#: No size is larger, and products of several sizes are still numbers that torch can hold.
_MOST = 1 << 48
#: No seed is larger: what torch's generators and integers hold.
MOST_SEED = (1 << 63) - 1
#: Scores that a gate remembers of each sequence: they are kept in memory.
_MOST_HISTORY = 1 << 16


def check_whole(most: int = _MOST, /, **values: object) -> None:
    """Raise `BadInputError` for what is no whole number, or a larger one than `most`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadInputError(f"{name} is {value!r}, must be a whole number")
        if abs(value) > most:
            raise BadInputError(
                f"{name} is a whole number of {value.bit_length()} bits, must be at most {most}"
            )


def check_finite(config: object, infinite: str = "") -> None:
    """Raise `BadInputError` for a number of a dataclass that is not finite; the one called `infinite` may be that."""
    for each in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, each.name)
        if isinstance(value, float) and not (
            math.isfinite(value) or (math.isinf(value) and each.name == infinite)
        ):
            raise BadInputError(f"{each.name} is {value!r}, must be finite")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise BadInputError(f"{name} is {value!r}, must be above zero")


@dataclass(frozen=True)
class CMSLevel:
    """One level of the CMS: its name, how many tokens pass between two writes, and the step of a write.

    max_change: what was written to a matrix is scaled back to at most so many times the Frobenius norm of its meta
    weights. None, as published: the rule has no decay, and what is written grows with the stream.
    """

    name: str
    period: int  # tokens, > 0
    learning_rate: float = 0.1  # lr_l of equations: applied to the mean gradient of one period, >= 0
    max_change: float | None = None  # share of the meta weights' norm, > 0

    def __post_init__(self) -> None:
        check_whole(period=self.period)
        _check_positive(period=self.period)
        if not self.name.isidentifier():
            raise BadInputError(
                f"CMS level name {self.name!r} must be a word (it becomes part of hook names)"
            )
        if not self.learning_rate >= 0:
            raise BadInputError(
                f"learning_rate of CMS level {self.name!r} is {self.learning_rate!r}, must be >= 0"
            )
        if self.max_change is not None and not 0 < self.max_change < math.inf:
            raise BadInputError(
                f"max_change of CMS level {self.name!r} is {self.max_change!r}, must be above zero and finite, or None"
            )
        check_finite(self)


#: Rules of a gate, each with what it decides by; `model/scores.py` defines them.
GATE_RULES = {
    "absolute": "s_t, against tau",
    "quantile": "s_t, against its own past",
    "zscore": "(s_t - mean) / (deviation + 0.1), both running",
    "ratio": "s_t / running mean",
    "excess": "s_t - unigram surprisal",
    "entropy-gap": "s_t - predictive entropy",
    "assoc": "|gradient of the associative loss|, a layer at a time",
    "momentum": "decayed sum of s up to t",
    "random": "chance",
}
#: Rules that know no threshold: what they decide by has no unit.
_BUDGET_ALONE = ("quantile", "random")


@dataclass(frozen=True)
class GateConfig:
    """Which tokens may be written: those whose score exceeds a threshold, or ranks high among those before it.

    With a budget b a token passes when the share of the scores before it, of the same sequence, that are higher is at
    most b, corrected by what was written so far (`model/gate.py`). "Absolute" takes the threshold of `ModelConfig`.
    """

    rule: str = "absolute"  # one of GATE_RULES
    budget: float | None = None  # share of the tokens that are written, (0, 1]
    threshold: float | None = None  # of the score, in its own unit, where there is no budget
    writes: str = (
        "all"  # which writes the gate is for: all, or those of selfmod, cms or titans; others are open
    )
    decay: float = 0.95  # of running means, a token
    history: int = 256  # scores of the past that one is ranked among
    straight_through: bool = False  # the outer gradient passes the gate as if it were a sigmoid of the score
    temperature: float = 1.0  # of that sigmoid, in the score's unit
    seed: int = 0  # of `random`, and of what ranks a first token and ties

    def __post_init__(self) -> None:
        if self.rule == "oracle":
            raise BadInputError(
                "the rule 'oracle' knows what a write will be worth, so no model can gate by it: the probe "
                "relative-surprise measures what it would give"
            )
        _check_choice("gate rule", self.rule, tuple(GATE_RULES))
        _check_choice("gate writes", self.writes, ("all", "selfmod", "cms", "titans"))
        check_whole(history=self.history)
        check_whole(MOST_SEED, seed=self.seed)
        _check_positive(history=self.history, temperature=self.temperature)
        if self.history > _MOST_HISTORY:
            raise BadInputError(f"the gate's history is {self.history!r}, must be at most {_MOST_HISTORY}")
        if not 0 < self.decay < 1:
            raise BadInputError(f"the gate's decay is {self.decay!r}, must lie between 0 and 1")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise BadInputError(f"the gate's threshold is {self.threshold!r}, must be finite")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise BadInputError(f"the gate's budget is {self.budget!r}, must be above 0 and at most 1")
        self._check_criterion()
        if self.straight_through and self.rule in ("assoc", "random"):
            raise BadInputError(f"a straight-through gradient needs a rule on the loss, not {self.rule!r}")
        check_finite(self)

    def _check_criterion(self) -> None:
        if self.rule == "absolute":
            if self.budget is not None:
                raise BadInputError(
                    "the rule 'absolute' has a threshold; 'quantile' writes a budget of the same surprise"
                )
            if self.threshold is not None:
                raise BadInputError("the threshold of the rule 'absolute' is surprise_threshold")
        elif self.rule in _BUDGET_ALONE:
            if self.budget is None or self.threshold is not None:
                raise BadInputError(
                    f"the rule {self.rule!r} needs a budget (--budget), the share of tokens that are written, and no "
                    "threshold"
                )
        elif (self.budget is None) == (self.threshold is None):
            raise BadInputError(
                f"the rule {self.rule!r} needs a budget or a threshold, one of the two (--budget, --gate-threshold)"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the computation of a model; the weights follow from it and a seed.

    Defaults are the parametrisation of the design (section 3); `published()` switches to the rule of the public
    reproduction. Raises `BadInputError` for values that cannot work.
    """

    variant: str = "full"  # one of `variants.VARIANTS`: which mechanisms there are, and which of them write
    vocab_size: int = 50257
    dim: int = 256  # d, width of the residual stream
    layers: int = 6
    context: int = 512  # tokens of one training window

    # Self-modifying memories
    chunk: int = 8  # tokens between writes of all memories but `memory`
    chunk_memory: int = 8  # tokens between writes of `memory`
    conv_width: int = 4  # causal depthwise convolution ahead of the memories
    query: Literal["memory", "static"] = "memory"  # q from a self-modifying memory or from a static map
    normalise_value: bool = True  # l2-normalise v and the self-generated target
    objective: Literal["half-l2", "l2", "dot"] = "half-l2"
    eta_squash: Literal["sigmoid", "softplus"] = "sigmoid"
    eta_max: float = 1.0
    eta_bias: float | None = -3.0  # initial value of a slow parameter; None: no such parameter
    alpha_bias: float | None = 6.0  # likewise; sigmoid(6) retains 0.9975 a token
    decay_target: Literal["init", "zero"] = (
        "init"  # what fast weights decay towards: the meta weights or zero
    )
    proximal: bool = True  # divide the W1 step by 1 + eta |a|^2
    write_grad: Literal["through", "stop"] = "through"  # does the outer gradient flow through writes
    truncate_ticks: int = 0  # cut the outer gradient every so many ticks; 0: never

    # CMS
    cms_levels: tuple[CMSLevel, ...] = (CMSLevel("fast", 8), CMSLevel("slow", 32))
    cms_mode: Literal["gated", "chain"] = "gated"
    cms_multiplier: int = 4  # hidden width of a level, in units of d

    # Titans
    titans_form: Literal["gate", "layer"] = (
        "gate"  # the memory gates attention, or is a layer of its own (LMM)
    )
    window: int = 64  # tokens that a Titans layer's attention sees

    # Gate, embedding, blocks
    surprise_threshold: float = 0.02  # tau in nats: a token is written when its cross-entropy exceeds it
    gate: GateConfig = GateConfig()  # another rule than that threshold
    embed_std: float = 0.02
    residual: bool = True  # pre-norm residual blocks; False: the bare composition of the public reproduction
    heads: int = 4  # attention heads, where there is attention
    mlp_multiplier: int = 4  # hidden width of the MLP of a Transformer

    def __post_init__(self) -> None:
        levels: tuple[Any, ...] = self.cms_levels  # plain data, from a checkpoint
        object.__setattr__(
            self,
            "cms_levels",
            tuple(lv if isinstance(lv, CMSLevel) else from_dict(CMSLevel, lv) for lv in levels),
        )
        gate: Any = self.gate
        object.__setattr__(
            self, "gate", gate if isinstance(gate, GateConfig) else from_dict(GateConfig, gate)
        )
        check_whole(
            vocab_size=self.vocab_size, dim=self.dim, layers=self.layers, context=self.context, chunk=self.chunk,
            chunk_memory=self.chunk_memory, conv_width=self.conv_width, truncate_ticks=self.truncate_ticks,
            cms_multiplier=self.cms_multiplier, heads=self.heads, mlp_multiplier=self.mlp_multiplier,
            window=self.window,
        )  # fmt: skip
        _check_choice("variant", self.variant, tuple(VARIANTS))
        _check_choice("query", self.query, ("memory", "static"))
        _check_choice("objective", self.objective, ("half-l2", "l2", "dot"))
        _check_choice("eta_squash", self.eta_squash, ("sigmoid", "softplus"))
        _check_choice("decay_target", self.decay_target, ("init", "zero"))
        _check_choice("write_grad", self.write_grad, ("through", "stop"))
        _check_choice("cms_mode", self.cms_mode, ("gated", "chain"))
        _check_choice("titans_form", self.titans_form, ("gate", "layer"))
        _check_positive(
            vocab_size=self.vocab_size, dim=self.dim, layers=self.layers, context=self.context, chunk=self.chunk,
            chunk_memory=self.chunk_memory, conv_width=self.conv_width, eta_max=self.eta_max,
            cms_multiplier=self.cms_multiplier, embed_std=self.embed_std, heads=self.heads,
            mlp_multiplier=self.mlp_multiplier, window=self.window,
        )  # fmt: skip
        if self.truncate_ticks < 0:
            raise BadInputError(f"truncate_ticks is {self.truncate_ticks}, must be 0 (never) or more")
        if self.parts.channel == "cms" and not self.cms_levels:
            raise BadInputError(f"variant {self.variant!r} needs at least one CMS level")
        names = [lv.name for lv in self.cms_levels]
        if len(set(names)) != len(names):
            raise BadInputError(f"CMS level names repeat: {', '.join(names)}")
        if self.attends and self.dim % (2 * self.heads):
            raise BadInputError(
                f"dim {self.dim} must be divisible by twice the number of heads ({self.heads})"
            )
        check_finite(self, infinite="surprise_threshold")  # closes the gate, or opens it
        self._check_gate()

    def _check_gate(self) -> None:
        rule, writes = self.gate.rule, self.gate.writes
        if self.gate == GateConfig():
            return
        if not self.writes:
            raise BadInputError(f"variant {self.variant!r} writes nothing: there is nothing to gate")
        if self.parts.no_threshold:
            raise BadInputError(
                f"variant {self.variant!r} is defined by its gate, which lets every token pass"
            )
        memories = [name for name in self.mechanisms if name != "cms"]
        if writes != "all" and writes not in self.mechanisms:
            there = ", ".join(self.mechanisms)
            raise BadInputError(
                f"variant {self.variant!r} has no writes of {writes!r} to gate (there are: {there})"
            )
        carried = self.write_grad == "through" and memories and writes != "cms"
        if self.gate.straight_through and not carried:
            raise BadInputError(
                "a straight-through gradient reaches a gate through the writes of memories that the outer gradient "
                "passes, and there are none"
            )
        if rule == "assoc" and (not memories or writes == "cms"):
            raise BadInputError(
                "the rule 'assoc' gates memories by their own loss: there must be some that are written"
            )

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """What writes: `selfmod`, `cms`, `titans`."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.periods))

    @property
    def parts(self) -> Parts:
        """What the variant is made of."""
        return VARIANTS[self.variant]

    @property
    def attends(self) -> bool:
        """Is there attention."""
        parts = self.parts
        return parts.mixer == "attention" or (parts.mixer == "titans" and self.titans_form == "gate")

    @property
    def levels(self) -> tuple[CMSLevel, ...]:
        """CMS levels of this variant, with the periods that it writes them at."""
        if self.parts.channel != "cms":
            return ()
        if not self.parts.one_period:
            return self.cms_levels
        period = min(level.period for level in self.cms_levels)
        return tuple(dataclasses.replace(level, period=period) for level in self.cms_levels)

    @property
    def threshold(self) -> float:
        """Tau of this variant, nats."""
        return 0.0 if self.parts.no_threshold else self.surprise_threshold

    @property
    def writes(self) -> bool:
        """Does anything in this model write while it reads."""
        return self.parts.writes

    @property
    def periods(self) -> dict[str, int]:
        """Tokens between two writes of what is written: `selfmod.{memory}`, `cms.{level}`, `titans.memory`."""
        names = [name for name in MEMORIES if name != "q" or self.query == "memory"]
        written = {"all": names, "memory": ["memory"], "none": []}[self.parts.memories]
        found = {f"selfmod.{n}": self.chunk_memory if n == "memory" else self.chunk for n in written}
        levels = self.levels if self.parts.levels else ()
        found |= {f"cms.{level.name}": level.period for level in levels}
        return found | ({"titans.memory": self.chunk_memory} if self.parts.mixer == "titans" else {})

    @property
    def tick(self) -> int:
        """C: the greatest common divisor of all write periods; the whole context where nothing writes."""
        return math.gcd(*self.periods.values()) if self.writes else self.context

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint.

        A gate left as it is by default is left out, and so is a level's bound where there is none: what was identified
        by this before there were these stays so.
        """
        content = dataclasses.asdict(self)
        for level in content["cms_levels"]:
            if level["max_change"] is None:
                del level["max_change"]
        if self.gate == GateConfig():
            del content["gate"]
        return content


def from_dict(cls: type[_T], data: Mapping[str, Any]) -> _T:
    """Build a configuration dataclass from plain data; an unknown key raises `BadInputError` with near names."""
    if not isinstance(data, Mapping):
        raise BadInputError(f"{cls.__name__} is made from a mapping, not from {reprlib.repr(data)}")
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise BadInputError(
                f"unknown key {reprlib.repr(key)} in {cls.__name__}{near_names(str(key)[:100], known)}"
            )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    for each in dataclasses.fields(cls):  # type: ignore[arg-type]
        if each.name in values:
            _check_kind(each.name, values[each.name], str(each.type))
    try:
        return cls(**values)
    except TypeError as error:
        raise BadInputError(f"{cls.__name__} cannot be built from {reprlib.repr(values)}: {error}") from None


#: What the types of fields, as they are written above, allow of plain data; of others the classes check themselves.
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "bool": ("true or false", (bool,)),
    "str": ("text", (str,)),
    "None": ("none", (type(None),)),
}


def _check_kind(what: str, value: object, annotation: str) -> None:
    """Raise `BadInputError` for a value from a file that is not of the field's type, or that is NaN."""
    words = ["str"] if annotation.startswith("Literal") else annotation.split(" | ")
    if not all(word in _KINDS for word in words):
        return
    allowed = tuple(kind for word in words for kind in _KINDS[word][1])
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise BadInputError(
            f"{what} is {reprlib.repr(value)}, must be {' or '.join(_KINDS[w][0] for w in words)}"
        )
    if isinstance(value, float) and math.isnan(value):
        raise BadInputError(f"{what} is not a number (NaN)")


PRESETS: dict[str, ModelConfig] = {
    "nano": ModelConfig(dim=32, layers=1, context=128, heads=2),
    "tiny": ModelConfig(dim=64, layers=2, context=128, heads=2),
    "small": ModelConfig(dim=256, layers=6, context=512, heads=4),
    "scaled": ModelConfig(dim=512, layers=8, context=512, heads=8),
}

#: Sizes of `transformer-matched`: at `scaled` the study's; else the width of `full`, and as many layers as match it.
MATCHED = {
    "nano": (32, 2, 2),
    "tiny": (64, 4, 2),
    "small": (256, 13, 4),
    "scaled": (768, 6, 12),
}  # dim, layers, heads

#: AdamW's learning rate where a preset wants another than the study's 3e-4.
PRESET_LEARNING_RATE = {"nano": 3e-3, "tiny": 3e-3}


def preset(name: str, variant: str = "full") -> ModelConfig:
    """The configuration of a preset in a variant; `BadInputError` offers near names for an unknown one."""
    _check_choice("preset", name, tuple(PRESETS))
    _check_choice("variant", variant, tuple(VARIANTS))
    config = dataclasses.replace(PRESETS[name], variant=variant)
    if variant != "transformer-matched":
        return config
    dim, layers, heads = MATCHED[name]
    return dataclasses.replace(config, dim=dim, layers=layers, heads=heads)


def published(config: ModelConfig) -> ModelConfig:
    """The same sizes under the rule of the public reproduction (`nested-learning` 0.2.0, block `hope_selfmod`).

    Static W_q, v and its target not normalised, objective |.|^2 with its factor 2, eta = 1e-3 softplus, alpha without a
    bias, decay to zero, N(0, 1) tied embeddings, no residual stream, chain CMS, chunks 8 and 64, writes outside the
    outer gradient. It collapses: see `reference/equations.md`, "What the published rule does".
    """
    return dataclasses.replace(
        config,
        query="static",
        normalise_value=False,
        objective="l2",
        eta_squash="softplus",
        eta_max=1e-3,
        eta_bias=None,
        alpha_bias=None,
        decay_target="zero",
        proximal=False,
        embed_std=1.0,
        residual=False,
        cms_mode="chain",
        chunk=8,
        chunk_memory=64,
        write_grad="stop",
    )
