"""Gates: which tokens may be written, by a threshold or by a budget; causal, each sequence for itself.

With a threshold, g_t = 1[score_t > theta]. With a budget b, ranked among the last W = 256 scores before it,

    p_t = (#{higher} + U_t (1 + #{equal})) / (1 + #{all})
    g_t = 1[p_t <= b (1 + owed_t / 2)],   owed_t = sum_{i<t} (b - g_i)

U_t is uniform, from a hash of the sequence so far. Where scores are exchangeable p_t is uniform from the first token on
(a conformal p-value), so that exactly b pass; where they drift, `owed` holds the count to the budget: of T tokens b T
pass, to within a few, however long the stream. `random` ranks chance by the same rule, so that between it and any other
the score is the only difference. `scores.py` defines the scores. The absolute threshold is the study's and the public
reproduction's; neither paper defines a gate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hopeprobe.errors import BadInputError
from hopeprobe.model.config import GATE_RULES, GateConfig
from hopeprobe.model.scores import Scored, Seen, hash_start, hash_tick, scored, uniform
from hopeprobe.model.state import GateState

#: How near a score may be to another, or to the threshold, so that a rounding could have put it on the wrong side: ten
#: times what batches of another size move it by in float32. In the score's unit; of `assoc`, a share of the score.
DOUBT = 2e-5
#: Tokens owed that double the share that passes.
_PATIENCE = 2.0
_SCORE_SALT, _RANK_SALT = 1, 2


class Decision(NamedTuple):
    """What a gate says of a tick."""

    gate: Tensor  # (B, G, n): 0 and 1
    score: Tensor  # (B, G, n)
    state: GateState | None
    doubt: Tensor | None  # (B, n) bool: a rounding could turn it; None where nobody asked


class Gate:
    """The gate of a model.

    Args:
        config: the rule.
        threshold: tau of the rule `absolute`, nats.
        layers: whose memories are written: `assoc` has a gate for each.
    """

    def __init__(self, config: GateConfig, threshold: float, layers: int) -> None:
        self.config = config
        self.threshold = threshold if config.rule == "absolute" else config.threshold
        self.width = layers if config.rule == "assoc" else 1

    @property
    def remembers(self) -> bool:
        """Does it need a state."""
        return self.config.budget is not None or self.config.rule in ("zscore", "ratio", "momentum")

    def init_state(self, batch: int, like: Tensor) -> GateState | None:
        """The state of streams without a token yet."""
        if not self.remembers:
            return None
        history = self.config.history if self.config.budget is not None else 0
        empty = like.new_zeros(batch, self.width)
        chain = torch.full((batch,), hash_start(self.config.seed), dtype=torch.int64, device=like.device)
        nothing = like.new_full((batch, self.width, history), float("nan"))
        return GateState(nothing, empty, empty.clone(), empty.clone(), chain)

    def decide(
        self,
        seen: Seen,
        state: GateState | None,
        position: int,
        surprise: Tensor | None = None,
        doubting: bool = False,
    ) -> Decision:
        """Decide on a tick (B, n) after `position` tokens; 0 where a token has no target.

        surprise: `seen.surprise` in the outer graph, for a straight-through gradient. doubting: whether somebody asks
        what could be turned by `DOUBT`.
        """
        held = self._blank(seen.surprise) if state is None else state
        if (state is not None) != self.remembers or held.owed.shape[1] != self.width:
            raise BadInputError("the state was made under another gate: begin with init_state()")
        # A loss that is not a number is no token to write, whatever the rule, and no part of any budget.
        known = ((seen.targets >= 0) & ~seen.surprise.isnan())[:, None].to(seen.surprise.dtype)
        if self.threshold is not None:
            made = scored(self.config.rule, self.config.decay, seen, held.mean, held.square, position)
            after = held._replace(mean=made.mean, square=made.square)
            gate = (made.score > self.threshold).to(made.score.dtype) * known
            doubt = (made.score - self.threshold).abs() <= self._near(made.score) if doubting else None
        else:
            chains, chain = hash_tick(held.chain, seen.targets)
            made = self._ranked(seen, held, chains, position)
            after = held._replace(mean=made.mean, square=made.square, chain=chain)
            near = self._near(made.score) if doubting else None
            chance = _chance(chains, _RANK_SALT, seen)
            gate, after, doubt = _budgeted(self.config, made.score, chance, after, known, near)
        if self.config.straight_through and surprise is not None:
            gate = self._passed_straight(gate, made, surprise, held, known)
        told = (doubt & (known > 0)).any(1) if doubting and doubt is not None else None
        return Decision(gate, made.score, None if state is None else after, told)

    def _near(self, score: Tensor) -> Tensor:
        """How near (B, G, n) is in doubt; of chance, which is exact, nothing: no number is nearer than NaN."""
        if self.config.rule == "random":
            return torch.full_like(score, torch.nan)
        return DOUBT * (score.abs() if self.config.rule == "assoc" else torch.ones_like(score))

    def _ranked(self, seen: Seen, held: GateState, chains: Tensor, position: int) -> Scored:
        if self.config.rule != "random":
            return scored(self.config.rule, self.config.decay, seen, held.mean, held.square, position)
        nothing = seen.surprise.new_zeros(())
        return Scored(_chance(chains, _SCORE_SALT, seen), nothing, held.mean, held.square)

    def _passed_straight(
        self, gate: Tensor, made: Scored, surprise: Tensor, held: GateState, known: Tensor
    ) -> Tensor:
        """The gate, with the gradient of sigmoid((score - cut) / temperature), cut the threshold or the quantile."""
        cut: Tensor | float | None = self.threshold
        if cut is None:
            cut = _quantile(held.scores, 1.0 - (self.config.budget or 0.0))
        moving = made.score + made.slope * (surprise - surprise.detach())[:, None]
        moving = torch.where(known > 0, (moving - cut) / self.config.temperature, 0.0)
        soft = torch.sigmoid(moving) * known
        return gate + (soft - soft.detach())

    def _blank(self, like: Tensor) -> GateState:
        """What a gate that remembers nothing begins every tick with."""
        empty = like.new_zeros(len(like), self.width)
        chain = torch.zeros(len(like), dtype=torch.int64, device=like.device)
        return GateState(like.new_zeros(*empty.shape, 0), empty, empty, empty, chain)

    def equation(self) -> str:
        """What `hook_gate` holds, in a line."""
        config = self.config
        if config.rule == "absolute":
            return f"g_t = [s_t > {self.threshold:g}]"
        score = GATE_RULES[config.rule]
        if config.rule == "assoc":
            return "g_t = 1; the write gates of memories go by |gradient of their associative loss|"
        if config.budget is None:
            return f"g_t = [score_t > {self.threshold:g}], score: {score}"
        return f"g_t = [score_t among the highest {config.budget:.4g} of its past], score: {score}"


def _budgeted(
    config: GateConfig, score: Tensor, chance: Tensor, state: GateState, known: Tensor, near: Tensor | None
) -> tuple[Tensor, GateState, Tensor | None]:
    """Gate (B, G, n) by a budget, the state with what is owed after it and the scores that come to the past, doubts.

    In doubt is a gate that would be another if scores of the past not further than `near` stood on its other side; None
    where `near` is.
    """
    budget, width, n = config.budget or 0.0, state.scores.shape[2], score.shape[2]
    line = torch.cat([state.scores, score], 2)
    past, mine = line.unfold(2, width, 1)[:, :, :n], score[..., None]  # (B, G, n, W): the W before each
    count, lower, equal = (~past.isnan()).sum(-1), (past < mine).sum(-1), (past == mine).sum(-1)
    rank = (count - lower - equal + chance * (1 + equal)) / (count + 1)
    owed, gates, cuts = state.owed, [], []
    for j in range(n):
        cuts.append(budget * (1.0 + owed / _PATIENCE))
        passes = (rank[..., j] <= cuts[-1]).to(score.dtype) * known[..., j]
        owed = owed + budget * known[..., j] - passes
        gates.append(passes)
    after = state._replace(scores=line[..., n:], owed=owed)
    if near is None:
        return torch.stack(gates, -1), after, None
    margin, cut = near[..., None], torch.stack(cuts, -1)
    ahead, at_most = (past > mine + margin).sum(-1), (past >= mine - margin).sum(-1)
    doubt = ((ahead + chance) / (count + 1) <= cut) != ((at_most + chance) / (count + 1) <= cut)
    return torch.stack(gates, -1), after, doubt


def _chance(chains: Tensor, salt: int, seen: Seen) -> Tensor:
    """(B, 1, n)."""
    return uniform(chains, salt, seen.surprise.dtype)[:, None]


def _quantile(scores: Tensor, share: float) -> Tensor:
    """The score (B, G, 1) that a share of them lies below; 0 while there are none."""
    return torch.nanquantile(scores, share, dim=-1, keepdim=True).nan_to_num()
