"""The self-modifying Titans layer: six memories that generate their own keys, values, learning rates and retention.

Source: "Nested Learning" (arXiv 2512.24695, section 8), the study's six memories (M_q among them); `memories.py` says
what one of them is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopeprobe.hooks import HookPoint, HookRegistry, HookSpec
from hopeprobe.hooks.points import Cadence
from hopeprobe.model.alone import TOKENS_AT_ONCE, alone
from hopeprobe.model.config import MEMORIES, SCALAR_MEMORIES, ModelConfig
from hopeprobe.model.memories import (
    Generated,
    Memory,
    Reading,
    Weights,
    answer,
    answered,
    attached,
    convolved,
    l2norm,
    read_group,
    repeated,
)
from hopeprobe.model.precision import Rounded, linear
from hopeprobe.model.skip import packed, runs
from hopeprobe.model.state import MemoryState, Pending, SelfModState, on_host
from hopeprobe.model.thin import back_each, decay_and_write, times
from hopeprobe.model.write import errors, gelu_backward, prepare


def _by_rows(tensors: tuple[Tensor, ...], rows: int) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(t, rows) for t in tensors), strict=True)


class SelfMod(nn.Module):
    """A layer of self-modifying memories behind a causal depthwise convolution.

    u = conv(x); k = l2norm(M_k(u)); v = l2norm(M_v(u)); q = l2norm(M_q(u)); eta = eta_max sigmoid(M_eta(u) + b_eta);
    alpha = sigmoid(M_alpha(u) + b_alpha); y = M_memory(q).
    """

    def __init__(self, config: ModelConfig, registry: HookRegistry, prefix: str) -> None:
        super().__init__()
        self.config = config
        names = [n for n in MEMORIES if n != "q" or config.query == "memory"]
        which = config.parts.memories
        self.written = tuple(n for n in names if which == "all" or (which == "memory" and n == "memory"))
        together = which == "none" or (which == "all" and config.chunk == config.chunk_memory)
        self.group_names: tuple[tuple[str, ...], ...] = (
            (tuple(names),) if together else (tuple(names[1:]), ("memory",))
        )
        # Tokens between two writes of each group, None for one that is never written.
        chunk = config.chunk if which == "all" else None
        self.group_chunks = (chunk,) if together else (chunk, config.chunk_memory)
        self.memories = nn.ModuleDict({n: Memory(config.dim, n in SCALAR_MEMORIES) for n in names})
        self.conv = nn.Parameter(torch.empty(config.dim, config.conv_width))
        self.w_q = nn.Parameter(torch.empty(config.dim, config.dim)) if config.query == "static" else None
        self.eta_bias = nn.Parameter(torch.empty(())) if config.eta_bias is not None else None
        self.alpha_bias = nn.Parameter(torch.empty(())) if config.alpha_bias is not None else None
        self.points: list[HookPoint] = []  # all of its own
        self._add_hooks(registry, prefix)

    def _add_hooks(self, registry: HookRegistry, prefix: str) -> None:
        def point(
            name: str, dims: str, equation: str, cadence: Cadence = "tick", editable: bool = True
        ) -> HookPoint:
            spec = HookSpec(tuple(dims.split()), cadence, editable, equation)
            self.points.append(registry.add(f"{prefix}.{name}", spec))
            return self.points[-1]

        norm_v = "v = l2norm(M_v(u))" if self.config.normalise_value else "v = M_v(u)"
        query = "q = l2norm(M_q(u))" if self.w_q is None else "q = l2norm(W_q u)"
        bias_eta = "" if self.eta_bias is None else " + b_eta"
        bias_alpha = "" if self.alpha_bias is None else " + b_alpha"
        self.hook_q = point("hook_q", "batch pos d_model", query)
        self.hook_out = point("hook_out", "batch pos d_model", "y = M_memory(q)")
        self.hook_assoc: dict[str, HookPoint] = {}
        self.hook_fast: dict[str, dict[str, HookPoint]] = {}
        if not self.written:
            return
        self.hook_k = point("hook_k", "batch pos d_model", "k = l2norm(M_k(u))")
        self.hook_v = point("hook_v", "batch pos d_model", norm_v)
        eta = f"eta = {self.config.eta_max:g} {self.config.eta_squash}(M_eta(u){bias_eta}), before the gate"
        self.hook_eta = point("hook_eta", "batch pos", eta)
        alpha = f"alpha = sigmoid(M_alpha(u){bias_alpha}), before the gate"
        self.hook_alpha = point("hook_alpha", "batch pos", alpha)
        self.hook_write_gate = point(
            "hook_write_gate", "batch pos", "g; eta <- g eta, alpha <- 1 - g (1 - alpha)"
        )
        objective = {"half-l2": "|M(k) - vhat|^2 / 2", "l2": "|M(k) - vhat|^2", "dot": "-<M(k), vhat>"}
        if self.config.parts.memories == "memory":
            objective = {name: rule.replace("vhat", "v") for name, rule in objective.items()}
        for name in self.written:
            loss = f"L = {objective[self.config.objective]} at the fast weights the tick reads"
            self.hook_assoc[name] = point(f"{name}.hook_assoc_loss", "batch pos", loss, editable=False)
            after = "after the write: W_C = gamma_C W_0 - E^T diag(gamma_C/gamma_i) K"
            fast = {
                "w1": "W1 " + after.replace("E^T", "(step dL/dout)^T").replace(" K", " gelu(W2 K)"),
                "w2": "W2 " + after,
            }
            if name in SCALAR_MEMORIES:
                fast["skip"] = "skip " + after
            self.hook_fast[name] = {
                w: point(f"{name}.hook_fast_{w}", "batch out in", equation, cadence="write")
                for w, equation in fast.items()
            }

    def stacked(self) -> tuple[Weights, ...]:
        """Meta weights of each group, stacked; differentiable. Made once per window, not per tick."""
        groups = []
        for names in self.group_names:
            mem = [cast(Memory, self.memories[n]) for n in names]
            vectors = [m for m in mem if m.skip is None]
            scalars = [(m.w1, m.skip) for m in mem if m.skip is not None]
            empty = self.conv.new_zeros(0, self.config.dim)
            groups.append(
                Weights(
                    torch.stack([m.w2 for m in mem]),
                    torch.stack([m.w1 for m in vectors]),
                    torch.cat([w1 for w1, _ in scalars]) if scalars else empty,
                    torch.cat([skip for _, skip in scalars]) if scalars else empty,
                )
            )
        return tuple(groups)

    def init_state(self, batch: int) -> SelfModState:
        """Fresh state: fast weights equal to the meta weights as they are now; none of what never writes."""
        with torch.no_grad():
            groups = tuple(
                None if chunk is None else MemoryState(*(w.repeat(batch, *(1,) * w.ndim) for w in meta))
                for meta, chunk in zip(self.stacked(), self.group_chunks, strict=True)
            )
        tail = self.conv.new_zeros(batch, self.config.conv_width - 1, self.config.dim)
        return SelfModState(groups, tuple(() for _ in groups), tail)

    def read(
        self,
        x: Tensor,
        weights: tuple[Weights, ...],
        state: SelfModState,
        outer: bool = True,
        late: bool = False,
        of: Rounded | None = None,
    ) -> tuple[Tensor, Generated]:
        """Read a tick (B, n, d): the layer's output (B, n, d), and what its memories generate for the write.

        `outer` False says that no outer gradient will be taken: what only serves the write then stays out of the graph,
        and `late` leaves it to the write, where nobody watches it.
        """
        outer = outer and torch.is_grad_enabled()
        u, tail = self.mixed(x, state.conv_tail)
        fast = self.attached(weights, state, outer)
        return self.answered(self.asked(u, fast, of), fast), self.made(u, tail, fast, outer, late)

    def mixed(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve x (B, n, d) behind `tail` (B, width - 1, d): u (B, n, d), and the next tail."""
        window = torch.cat([tail, x], dim=1)
        return convolved(window, self.conv), window[:, window.shape[1] - (self.config.conv_width - 1) :]

    def attached(self, weights: tuple[Weights, ...], state: SelfModState, outer: bool) -> tuple[Weights, ...]:
        """Fast weights of each group, in the graph of the meta weights where there is an outer gradient."""
        batch = len(state.conv_tail)
        return tuple(
            repeated(meta, batch) if group is None else attached(meta, group) if outer else Weights(*group)
            for meta, group in zip(weights, state.groups, strict=True)
        )

    def asked(self, u: Tensor, fast: tuple[Weights, ...], of: Rounded | None = None) -> Tensor:
        """Queries (B, n, d) of u."""
        if self.w_q is not None:
            return self.hook_q(l2norm(linear(u, self.w_q, None, of).to(u.dtype)))
        # `memory` is the first of the group it writes with.
        return self.hook_q(l2norm(answer(u, fast[0].w2, fast[0].w1, int(len(fast) == 1))))

    def answered(self, q: Tensor, fast: tuple[Weights, ...]) -> Tensor:
        """The layer's output (B, n, d): what `memory` answers to q."""
        return self.hook_out(answer(q, fast[-1].w2, fast[-1].w1, 0))

    def made(self, u: Tensor, tail: Tensor, fast: tuple[Weights, ...], outer: bool, late: bool) -> Generated:
        """What a write of the tick needs; see `read`."""
        nothing = u[:, :0]
        if not self.written:
            return Generated(nothing, nothing, nothing[..., 0], nothing[..., 0], tail, fast)
        if late and not outer and not self._watched():
            return Generated(nothing, nothing, nothing[..., 0], nothing[..., 0], tail, fast, u)
        with torch.set_grad_enabled(outer):
            made = Generated(*self._generate(u, fast[0]), tail=tail, fast=fast)
            self._observe_losses(made)
        return made

    def _watched(self) -> bool:
        points = (self.hook_k, self.hook_v, self.hook_eta, self.hook_alpha, *self.hook_assoc.values())
        return any(point.active for point in points)

    def _generated(self, made: Generated, gate: Tensor) -> Generated:
        """What `read` left to the write, for rows with an open gate (B, C); 0 for others."""
        u, generators = made.late, made.fast[0]
        if u is None:
            return made
        parts = runs((gate != 0).any(1), generators.w2[0].numel())
        if parts == [slice(0, len(u))]:
            return Generated(*self._generate(u, generators), tail=made.tail, fast=made.fast)
        k, v, eta, alpha = (torch.zeros_like(t) for t in (u, u, gate, gate))
        for part in parts:
            some = self._generate(u[part], Weights(*(w[part] for w in generators)))
            for whole, found in zip((k, v, eta, alpha), some, strict=True):
                whole[part] = found
        return Generated(k, v, eta, alpha, made.tail, made.fast)

    def _generate(self, u: Tensor, w: Weights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k, v, eta and alpha, the last four of a group of w.w1.shape[1] + 2."""
        n_vector = w.w1.shape[1]
        hidden = F.gelu(times(u, w.w2, slice(n_vector - 2, None)))
        hidden_k, hidden_v, hidden_scalar = hidden.split_with_sizes([1, 1, 2], dim=2)
        k = answered(u, hidden_k.squeeze(2), w.w1, n_vector - 2)
        v = answered(u, hidden_v.squeeze(2), w.w1, n_vector - 1)
        scalar = (hidden_scalar * w.w1_scalar[:, None]).sum(-1) + u @ w.skip.mT
        raw_eta, raw_alpha = scalar.unbind(-1)
        if self.eta_bias is not None:
            raw_eta = raw_eta + self.eta_bias
        if self.alpha_bias is not None:
            raw_alpha = raw_alpha + self.alpha_bias
        squash = torch.sigmoid if self.config.eta_squash == "sigmoid" else F.softplus
        eta = self.hook_eta(self.config.eta_max * squash(raw_eta))
        alpha = self.hook_alpha(torch.sigmoid(raw_alpha))
        return (
            self.hook_k(l2norm(k)),
            self.hook_v(l2norm(v) if self.config.normalise_value else v),
            eta,
            alpha,
        )

    def _observe_losses(self, made: Generated) -> None:
        for names, fast, chunk in zip(self.group_names, made.fast, self.group_chunks, strict=True):
            if chunk is None or not any(self.hook_assoc[n].active for n in names):
                continue
            both = read_group(torch.cat([made.k, made.v], 1), fast)
            predicted, target, *scalars = self._predictions(both, made.v)
            for i, name in enumerate(names):
                if not self.hook_assoc[name].active:
                    continue
                j = i - predicted.shape[1]
                got, want = (
                    (predicted[:, i], target[:, i]) if j < 0 else (part[..., j, None] for part in scalars)
                )
                self.hook_assoc[name](self._objective(got, want))

    def _objective(self, predicted: Tensor, target: Tensor) -> Tensor:
        if self.config.objective == "dot":
            return -(predicted * target).sum(-1)
        return (0.5 if self.config.objective == "half-l2" else 1.0) * (predicted - target).square().sum(-1)

    def _predictions(self, both: Reading, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """M(k) and vhat = M(v) from a reading of k and v side by side: (B, mv, C, d) twice, (B, C, m - mv) twice.

        Where memories do not generate their own targets, vhat is v (B, C, d) itself.
        """
        predicted, target = both.vector.chunk(2, dim=2)
        if self.config.parts.memories == "memory":
            target = v[:, None]
        elif self.config.normalise_value:
            target = l2norm(target)  # a scalar target keeps its size: normalised, only its sign would be left
        predicted_scalar, target_scalar = both.scalar.chunk(2, dim=1)
        return predicted, target, predicted_scalar, target_scalar

    def _slope(self, predicted: Tensor, target: Tensor) -> Tensor:
        """dL/dM(k)."""
        if self.config.objective == "dot":
            return -target
        error = predicted - target
        return error if self.config.objective == "half-l2" else 2.0 * error

    def forward(self, x: Tensor) -> Tensor:
        """A layer on its own: read (B, T, d) from a fresh state and write every token, (B, T, d)."""
        return alone(self, x)

    def write(
        self,
        weights: tuple[Weights, ...],
        state: SelfModState,
        made: Generated,
        gate: Tensor,
        donated: bool = False,
        skips: bool = False,
    ) -> SelfModState:
        """Write a tick's tokens into every group whose chunk is complete; keep the others pending.

        Hooks at fast weights fire whenever a chunk is complete, whether or not a gate was open.

        Args:
            weights: of `stacked()`.
            state: as the tick read it.
            made: by `read`.
            gate: (B, C), range [0, 1]; 0 is an exact no-op for that token.
            donated: nobody needs `state` any more, and no graph does: it may be overwritten.
            skips: no outer gradient will be taken: what closed gates make nothing of is left out.
        """
        if not self.written:
            return state._replace(conv_tail=made.tail)
        gate = self.hook_write_gate(gate)
        made = self._generated(made, gate)
        eta = gate * made.eta
        retention = 1.0 - gate * (1.0 - made.alpha)
        fresh = Pending(made.k, made.v, eta, retention.clamp_min(torch.finfo(eta.dtype).tiny).log())
        groups: list[MemoryState | None] = []
        pending: list[tuple[Pending, ...]] = []
        for i, (chunk, group) in enumerate(zip(self.group_chunks, state.groups, strict=True)):
            if chunk is None or group is None:
                groups.append(None)
                pending.append(())
                continue
            held = (*state.pending[i], fresh)
            if sum(ticks.k.shape[1] for ticks in held) < chunk:
                groups.append(group)
                pending.append(held)
                continue
            tokens = fresh if len(held) == 1 else Pending(*(torch.cat(p, 1) for p in zip(*held, strict=True)))
            asked = gate.requires_grad  # closed or not, by a straight-through gradient
            closed = on_host(gate) and not asked and not tokens.eta.any() and not tokens.log_alpha.any()
            written = group  # by a closed gate exactly nothing is, and no work
            if not closed:
                write = self._write_open if skips else self._write_rows
                written = write(weights[i], made.fast[i], tokens, donated)
            groups.append(self._fire_fast(self.group_names[i], written))
            pending.append(())
        return SelfModState(tuple(groups), tuple(pending), made.tail)

    def _gradients(
        self, fast: Weights, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the gradients of a group's associative losses are outer products of.

        dL/dM(k) of vector (B, mv, C, d) and scalar memories (B, C, m - mv); W2 k and its gelu (B, C, m, h); dL/d(W2 k).
        """
        both = read_group(torch.cat([k, v], 1), fast)
        predicted, target, predicted_scalar, target_scalar = self._predictions(both, v)
        slope, slope_scalar = self._slope(predicted, target), self._slope(predicted_scalar, target_scalar)
        pre, hidden = both.pre.chunk(2, dim=1)[0], both.hidden.chunk(2, dim=1)[0]
        back = back_each(slope.flatten(0, 1), fast.w1).view_as(slope).transpose(1, 2)
        back = torch.cat([back, slope_scalar[..., None] * fast.w1_scalar[:, None]], dim=2)
        return slope, slope_scalar, pre, hidden, gelu_backward(back, pre)

    def surprise(self, made: Generated) -> Tensor:
        """|dL_t/dM| of each token (B, n), over all matrices of all memories that write, at what the tick read."""
        total = made.k.new_zeros(())
        k2 = made.k.square().sum(-1)
        for fast, chunk in zip(made.fast, self.group_chunks, strict=True):
            if chunk is None:
                continue
            slope, slope_scalar, _, hidden, push = self._gradients(fast, made.k, made.v)
            n_vector = slope.shape[1]
            hidden2, push2 = hidden.square().sum(-1), push.square().sum((-2, -1))
            of_vectors = (slope.square().sum(-1).transpose(1, 2) * hidden2[..., :n_vector]).sum(-1)
            of_scalars = (slope_scalar.square() * (hidden2[..., n_vector:] + k2[..., None])).sum(-1)
            total = total + of_vectors + of_scalars + push2 * k2
        return total.sqrt()

    def _write_open(self, meta: Weights, fast: Weights, tokens: Pending, donated: bool) -> MemoryState:
        """Open tokens alone, in place in the rows that have any."""
        live = (tokens.eta != 0) | (tokens.log_alpha != 0)
        if bool(live.all()):
            return self._write_rows(meta, fast, tokens, donated)
        now = fast if donated else Weights(*(w.clone() for w in fast))
        for part in runs(live.any(1), now.w2[0].numel()):
            some = Pending(*packed(live[part], *(t[part] for t in tokens)))
            after = self._write_rows(meta, Weights(*(w[part] for w in now)), some, donated=True)
            now.w1_scalar[part], now.skip[part] = after.w1_scalar, after.skip
        return MemoryState(*now)

    def _write_rows(self, meta: Weights, fast: Weights, tokens: Pending, donated: bool) -> MemoryState:
        """In place a few rows after another: a long chunk's intermediates, and its weights, then stay in the cache."""
        rows = max(1, TOKENS_AT_ONCE // tokens.k.shape[1])
        if not donated or len(tokens.k) <= rows or not on_host(tokens.k):
            return self._write_group(meta, fast, tokens, donated)
        parts = [
            self._write_group(meta, Weights(*weights), Pending(*some), donated)
            for weights, some in zip(_by_rows(fast, rows), _by_rows(tokens, rows), strict=True)
        ]
        return MemoryState(
            fast.w2, fast.w1, torch.cat([p.w1_scalar for p in parts]), torch.cat([p.skip for p in parts])
        )

    def _write_group(self, meta: Weights, fast: Weights, tokens: Pending, donated: bool) -> MemoryState:
        k, v, eta, log_alpha = tokens
        slope, slope_scalar, pre, hidden, push = self._gradients(fast, k, v)
        sizes = [slope.shape[1], slope_scalar.shape[2]]
        hidden_vector, hidden_scalar = hidden.split_with_sizes(sizes, dim=2)
        rows = slope.flatten(0, 1)
        chunk = prepare(k, eta, log_alpha)
        meta_w2 = meta_skip = None
        if self.config.decay_target == "init":
            meta_w2, meta_skip = F.linear(k, meta.w2.flatten(0, 1)), F.linear(k, meta.skip)
        errors_w2 = errors(chunk, push.flatten(2), pre.flatten(2), meta_w2)
        errors_skip = errors(chunk, slope_scalar, k @ fast.skip.mT, meta_skip)

        step = eta[..., None].expand(*hidden.shape[:3])
        if self.config.proximal:
            step = step / (1.0 + step * hidden.square().sum(-1))
        step = step * chunk.to_end[..., None]
        step_vector, step_scalar = step.split_with_sizes(sizes, dim=2)
        pushed = step_vector.transpose(1, 2).flatten(0, 1)[..., None] * rows
        activation = hidden_vector.transpose(1, 2).flatten(0, 1)
        w1_scalar_term = ((step_scalar * slope_scalar)[..., None] * hidden_scalar).sum(1)

        def decayed(now: Tensor, base: Tensor) -> Tensor:
            end = chunk.end[:, None, None]
            return torch.lerp(base, now, end) if self.config.decay_target == "init" else end * now

        to = (meta.w2, meta.w1) if self.config.decay_target == "init" else (None, None)
        w2 = decay_and_write(fast.w2, to[0], chunk.end, errors_w2, chunk.keys, shared=True, donated=donated)
        w1 = decay_and_write(fast.w1, to[1], chunk.end, pushed, activation, shared=False, donated=donated)
        skip = torch.baddbmm(decayed(fast.skip, meta.skip), errors_skip.mT, chunk.keys, alpha=-1)
        w1_scalar = decayed(fast.w1_scalar, meta.w1_scalar) - w1_scalar_term
        return MemoryState(w2, w1, w1_scalar, skip)

    def _fire_fast(self, names: tuple[str, ...], state: MemoryState) -> MemoryState:
        """Show fast weights, at the end of a chunk, to their hooks; an edit goes into the state."""
        if not any(p.active for n in names for p in self.hook_fast[n].values()):
            return state
        n_vector = state.w1.shape[1]
        parts = {f: list(t.unbind(1)) for f, t in state._asdict().items()}
        edited_fields = set()
        for i, name in enumerate(names):
            scalar = name in SCALAR_MEMORIES
            j = i - n_vector if scalar else i
            fields = {"w2": "w2", "w1": "w1_scalar" if scalar else "w1", "skip": "skip"}
            for weight, point in self.hook_fast[name].items():
                if not point.active:
                    continue
                field = fields[weight]
                index = i if weight == "w2" else j
                # A copy, as the next write may overwrite the state under whoever keeps what was shown.
                shown = parts[field][index].clone()
                flat = shown.ndim == 2  # a scalar memory's row is shown as (B, 1, in)
                shown = shown[:, None] if flat else shown
                edited = point(shown)
                if edited is not shown:
                    parts[field][index] = edited[:, 0] if flat else edited
                    edited_fields.add(field)
        return state._replace(**{f: torch.stack(parts[f], 1) for f in edited_fields})
