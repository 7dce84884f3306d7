"""The Titans layer: one memory, written with momentum and forgetting, as a gate on sliding-window attention.

    u = conv(x)                                    causal, depthwise
    k = l2norm(W_k u), v = l2norm(W_v u), q = l2norm(W_q u)
    eta = eta_max/C sigmoid(<w_eta, u> + b_eta), mu = sigmoid(<w_mu, u> + b_mu), alpha = sigmoid(<w_alpha, u> + b_alpha)
    S_t = mu_t S_{t-1} - eta_t dL_t                momentum; L_t = |M(k_t) - v_t|^2 / 2
    W_t = W' + alpha_t (W_{t-1} - W') + S_t        W' what it decays towards; alpha is what is kept
    y = attention(x) * sigmoid(LayerNorm(M(q)))    memory as a gate; as a layer of its own y = M(q)

Projections are static: nothing here modifies itself. Gradients of a chunk are taken at its start, as the source does,
so that both recurrences are linear and a chunk is a weighted sum of outer products (`momentum_chunk`). That is why
eta is bounded by the chunk's C tokens: a chunk that repeats one token takes C steps along one gradient, and with
eta_max a token fast weights overflowed within a window of ordinary text.

Source: Behrouz, Zhong & Mirrokni, "Titans" (arXiv 2501.00663), Eqs. 9-14 and section 4.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopeprobe.hooks import HookPoint, HookRegistry, HookSpec
from hopeprobe.hooks.points import Cadence
from hopeprobe.model.attention import Attention
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.memories import Memory, convolved, l2norm, reattached
from hopeprobe.model.precision import Rounded, linear
from hopeprobe.model.skip import packed, runs
from hopeprobe.model.state import AttentionState, TitansState, on_host
from hopeprobe.model.write import gelu_backward

_SCALARS = ("eta", "momentum", "alpha")


class Made(NamedTuple):
    """What reading a tick leaves for its write; eta, momentum and alpha before the gate."""

    k: Tensor  # (B, C, d), unit norm
    v: Tensor  # (B, C, d), unit norm where `normalise_value`
    eta: Tensor  # (B, C), > 0
    momentum: Tensor  # (B, C), range (0, 1)
    alpha: Tensor  # (B, C), range (0, 1)
    tail: Tensor  # (B, width - 1, d)
    w2: Tensor  # (B, h, d): the fast weights that were read
    w1: Tensor  # (B, d, h)


class ChunkSums(NamedTuple):
    """A chunk of C tokens with gradients G_i as a weighted sum: what it does to a matrix W and its momentum S.

    W_C - W' = kept (W_0 - W') + carried S_0 - sum_i weight_i G_i;  S_C = left S_0 - sum_i weight_s_i G_i.
    """

    kept: Tensor  # (B,)
    carried: Tensor  # (B,)
    weight: Tensor  # (B, C)
    left: Tensor  # (B,)
    weight_s: Tensor  # (B, C)


def momentum_chunk(gate: Tensor, eta: Tensor, momentum: Tensor, alpha: Tensor) -> ChunkSums:
    """Coefficients of both recurrences over a chunk, all (B, C); a gate of 0 drops the token from both.

        S_t = m_t S_{t-1} - g_t eta_t G_t,  W_t - W' = r_t (W_{t-1} - W') + g_t S_t
        m = 1 - g (1 - mu),  r = 1 - g (1 - alpha)

    With P_ji = prod_{i<l<=j} m_l and A_j = g_j prod_{l>j} r_l: weight_i = g_i eta_i sum_{j>=i} A_j P_ji. Products are
    exponentials of differences of cumulated logarithms, all at most 0.
    """
    tiny = torch.finfo(eta.dtype).tiny
    log_m = (1.0 - gate * (1.0 - momentum)).clamp_min(tiny).log().cumsum(-1)
    log_r = (1.0 - gate * (1.0 - alpha)).clamp_min(tiny).log().cumsum(-1)
    # The upper triangle would overflow: it is zeroed before the exponential, and again after.
    between = (log_m[:, :, None] - log_m[:, None, :]).tril().exp().tril()  # P_ji, (B, j, i)
    arriving = gate * (log_r[:, -1:] - log_r).exp()  # A_j
    step = gate * eta
    return ChunkSums(
        log_r[:, -1].exp(),
        (arriving * log_m.exp()).sum(-1),
        step * (arriving[:, None] @ between)[:, 0],
        log_m[:, -1].exp(),
        step * between[:, -1],
    )


class Titans(nn.Module):
    """A memory with static projections, and sliding-window attention that it gates."""

    def __init__(self, config: ModelConfig, registry: HookRegistry, prefix: str) -> None:
        super().__init__()
        self.config = config
        d = config.dim
        self.memory = Memory(d, scalar=False)
        self.conv = nn.Parameter(torch.empty(d, config.conv_width))
        self.w_q, self.w_k, self.w_v = (nn.Parameter(torch.empty(d, d)) for _ in range(3))
        self.w_scalar = nn.Parameter(torch.empty(len(_SCALARS), d))
        self.eta_bias, self.momentum_bias, self.alpha_bias = (nn.Parameter(torch.empty(())) for _ in _SCALARS)
        self.attention: Attention | None = None
        if config.titans_form == "gate":
            self.attention = Attention(config, config.window)
            self.norm = nn.LayerNorm(d)

        def point(
            name: str, dims: str, equation: str, cadence: Cadence = "tick", editable: bool = True
        ) -> HookPoint:
            spec = HookSpec(tuple(dims.split()), cadence, editable, equation)
            return registry.add(f"{prefix}.{name}", spec)

        self.hook_q = point("hook_q", "batch pos d_model", "q = l2norm(W_q u)")
        self.hook_k = point("hook_k", "batch pos d_model", "k = l2norm(W_k u)")
        of_v = "l2norm(W_v u)" if config.normalise_value else "W_v u"
        self.hook_v = point("hook_v", "batch pos d_model", f"v = {of_v}")
        out = "y = M(q)" if self.attention is None else "y = attention(x) * sigmoid(LayerNorm(M(q)))"
        self.hook_out = point("hook_out", "batch pos d_model", out)
        self.hook_eta = point(
            "hook_eta", "batch pos", "eta = eta_max/C sigmoid(<w_eta, u> + b_eta), before the gate"
        )
        self.hook_momentum = point(
            "hook_momentum", "batch pos", "mu = sigmoid(<w_mu, u> + b_mu), before the gate"
        )
        self.hook_alpha = point(
            "hook_alpha", "batch pos", "alpha = sigmoid(<w_alpha, u> + b_alpha), before the gate"
        )
        self.hook_write_gate = point(
            "hook_write_gate",
            "batch pos",
            "g; eta <- g eta, 1 - mu and 1 - alpha <- g times that, S enters W by g",
        )
        loss = "L = |M(k) - v|^2 / 2 at the fast weights the tick reads"
        self.hook_assoc = point("memory.hook_assoc_loss", "batch pos", loss, editable=False)
        rule = "after the write: W' + kept (W_0 - W') + carried S_0 - sum_i weight_i dL_i"
        self.hook_w1 = point("memory.hook_fast_w1", "batch out in", rule, cadence="write")
        self.hook_w2 = point("memory.hook_fast_w2", "batch out in", rule, cadence="write")

    @property
    def step_max(self) -> float:
        """The largest eta: a chunk's steps together are at most eta_max."""
        return self.config.eta_max / self.config.chunk_memory

    def init_state(self, batch: int) -> TitansState:
        """Fresh state: fast weights equal to the meta weights as they are now, no momentum, nothing seen."""
        d = self.config.dim
        w2, w1 = (w.detach().repeat(batch, 1, 1) for w in (self.memory.w2, self.memory.w1))
        s2, s1 = (self.conv.new_zeros(batch, d, d) for _ in range(2))
        return TitansState(w2, w1, s2, s1, self.conv.new_zeros(batch, self.config.conv_width - 1, d))

    def read(
        self,
        x: Tensor,
        state: TitansState,
        seen: AttentionState | None,
        position: int,
        outer: bool = True,
        of: Rounded | None = None,
    ) -> tuple[Tensor, Made, AttentionState | None]:
        """Read a tick (B, n, d): the output, what its write needs, and attention's next cache.

        `outer` False says that no outer gradient will be taken.
        """
        window = torch.cat([state.conv_tail, x], dim=1)
        u = convolved(window, self.conv)
        tail = window[:, window.shape[1] - (self.config.conv_width - 1) :]
        outer = outer and torch.is_grad_enabled()
        w2, w1 = state.w2, state.w1
        if outer:
            w2, w1 = reattached(self.memory.w2, w2), reattached(self.memory.w1, w1)
        out = _answer(self.hook_q(l2norm(linear(u, self.w_q, None, of).to(u.dtype))), w2, w1)
        if self.attention is not None:
            if seen is None:
                raise ValueError("a Titans layer with attention reads with attention's cache")
            mixed, seen = self.attention.read(x, seen, position, of)
            out = mixed * torch.sigmoid(self.norm(out))
        out = self.hook_out(out)
        with torch.set_grad_enabled(outer):
            v = linear(u, self.w_v, None, of).to(u.dtype)
            k = self.hook_k(l2norm(linear(u, self.w_k, None, of).to(u.dtype)))
            v = self.hook_v(l2norm(v) if self.config.normalise_value else v)
            eta, momentum, alpha = F.linear(u, self.w_scalar).unbind(-1)
            made = Made(
                k,
                v,
                self.hook_eta(self.step_max * torch.sigmoid(eta + self.eta_bias)),
                self.hook_momentum(torch.sigmoid(momentum + self.momentum_bias)),
                self.hook_alpha(torch.sigmoid(alpha + self.alpha_bias)),
                tail,
                w2,
                w1,
            )
            if self.hook_assoc.active:
                self.hook_assoc(0.5 * (_answer(k, w2, w1) - v).square().sum(-1))
        return out, made, seen

    def surprise(self, made: Made) -> Tensor:
        """|dL_t/dM| of each token (B, C), over both matrices, at the fast weights that the tick read."""
        hidden, slope, back = _gradients(made)
        of_w1 = slope.square().sum(-1) * hidden.square().sum(-1)
        return (of_w1 + back.square().sum(-1) * made.k.square().sum(-1)).sqrt()

    def write(
        self, state: TitansState, made: Made, gate: Tensor, donated: bool = False, skips: bool = False
    ) -> TitansState:
        """Write a tick, which is a chunk: the state after it, shown to hooks whether or not a gate was open.

        Args:
            state: as the tick read it.
            made: by `read`.
            gate: (B, C); 0 drops a token exactly.
            donated: nobody needs `state` any more, and no graph does: it is overwritten.
            skips: no outer gradient will be taken: what closed gates make nothing of is left out.
        """
        gate = self.hook_write_gate(gate)
        moved = state._replace(conv_tail=made.tail)
        if on_host(gate) and not gate.requires_grad and not bool(gate.any()):
            # Every gate closed: exactly nothing, momentum stays as it is.
            return moved._replace(w2=_shown(self.hook_w2, state.w2), w1=_shown(self.hook_w1, state.w1))
        held = (state.w2, state.w1, state.s2, state.s1)
        live = gate != 0
        if not skips or bool(live.all()):
            now = self._write(made, *held, gate, donated)
        else:  # open tokens alone, in place in the rows that have any
            now = held if donated else (held[0].clone(), held[1].clone(), held[2].clone(), held[3].clone())
            for part in runs(live.any(1), 4 * made.w2[0].numel()):
                of_tokens = (made.k, made.v, made.eta, made.momentum, made.alpha, gate)
                k, v, eta, mu, alpha, opened = packed(live[part], *(t[part] for t in of_tokens))
                w2, w1, s2, s1 = (t[part] for t in now)
                some = Made(k, v, eta, mu, alpha, made.tail[part], w2, w1)
                self._write(some, w2, w1, s2, s1, opened, donated=True)
        w2, w1, s2, s1 = now
        return moved._replace(w2=_shown(self.hook_w2, w2), w1=_shown(self.hook_w1, w1), s2=s2, s1=s1)

    def _write(
        self, made: Made, w2: Tensor, w1: Tensor, s2: Tensor, s1: Tensor, gate: Tensor, donated: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sums = momentum_chunk(gate, made.eta, made.momentum, made.alpha)
        hidden, slope, back = _gradients(made)
        parts = (
            (w2, s2, made.w2, self.memory.w2, back, made.k),
            (w1, s1, made.w1, self.memory.w1, slope, hidden),
        )
        (w2, s2), (w1, s1) = (
            _written(sums, now if donated else read, held, meta if self.config.decay_target == "init" else None,
                     left, right, donated)
            for now, held, read, meta, left, right in parts
        )  # fmt: skip
        return w2, w1, s2, s1


def _written(
    sums: ChunkSums,
    now: Tensor,
    held: Tensor,
    meta: Tensor | None,
    left: Tensor,
    right: Tensor,
    donated: bool,
) -> tuple[Tensor, Tensor]:
    """One matrix (B, out, in) and its momentum after a chunk whose gradients are left^T right; `donated`: in place."""
    kept, carried, leaves = (c.view(-1, 1, 1) for c in (sums.kept, sums.carried, sums.left))
    if donated:
        new = now.mul_(kept) if meta is None else torch.lerp(meta, now, kept, out=now)
        new.addcmul_(held, carried)
        momentum = held.mul_(leaves)
    else:
        new = torch.addcmul(now * kept if meta is None else torch.lerp(meta, now, kept), held, carried)
        momentum = held * leaves
    # In place, as both are ours by now.
    new.baddbmm_((sums.weight[..., None] * left).mT, right, alpha=-1)
    return new, momentum.baddbmm_((sums.weight_s[..., None] * left).mT, right, alpha=-1)


def _gradients(made: Made) -> tuple[Tensor, Tensor, Tensor]:
    """Activation, dL/dM(k) and dL/d(W2 k), (B, C, .) each: dL/dW1 and dL/dW2 are their outer products."""
    pre = made.k @ made.w2.mT
    hidden = F.gelu(pre)
    slope = made.k + hidden @ made.w1.mT - made.v
    return hidden, slope, gelu_backward(slope @ made.w1, pre)


def _answer(x: Tensor, w2: Tensor, w1: Tensor) -> Tensor:
    """M(x), (B, n, d); weights (B, h, d) and (B, d, h)."""
    return torch.baddbmm(x, F.gelu(x @ w2.mT), w1.mT)


def _shown(point: HookPoint, now: Tensor) -> Tensor:
    """Show written weights to a hook; an edit is the state. Copies both ways: the next write may be in place."""
    if not point.active:
        return now
    shown = now.clone()
    edited = point(shown)
    return now if edited is shown else edited.clone(memory_format=torch.contiguous_format)
