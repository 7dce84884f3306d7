"""Very long streams: does anything grow, drift, or lose count.

    python tests/benchmarks/streams.py --checkpoint runs/tiny/step-000060.pt --tokens 10_000_000 --output long.jsonl

It writes a line of JSON every so often, and keeps a state to go on from. What is read is dealt over the streams in
stretches that begin evenly spaced in the text, in pieces that are no multiple of the tick. A `Ledger` keeps the gate's
account by itself, in float64, from the losses and the gate's equations alone; every line sets what the state holds
beside it. A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hopeprobe
from hopeprobe.files import write_atomically
from hopeprobe.hooks import HookPoint
from hopeprobe.model import state as states
from hopeprobe.model.config import GateConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.state import State, map_state, select_rows
from hopeprobe.model.subject import HopeSubject
from hopeprobe.subject import GateRule
from hopeprobe.tokens import load_tokens

#: Tokens of each stream fed at once: no multiple of a tick, so that every call leaves some of them pending.
PIECE = 100
_KINDS = [kind for kind in vars(states).values() if isinstance(kind, type) and hasattr(kind, "_fields")]
_MASK, _GOLDEN = 2**64 - 1, 0x9E3779B97F4A7C15


class Ledger:
    """The account of a gate, kept beside the model: NumPy, float64 and whole numbers, one entry a stream.

    It sees each token's loss, target and the gate that the model gave, (B, n) each, and decides by itself.
    """

    def __init__(self, config: GateConfig, threshold: float, streams: int) -> None:
        self.config, self.threshold = config, threshold
        self.tokens = 0
        self.opened = np.zeros(streams, np.int64)  # by the model
        self.differs = np.zeros(streams, np.int64)  # tokens on which the model and this ledger disagree
        self.mean, self.square = np.zeros(streams), np.zeros(streams)
        self.scores = np.full((streams, config.history), np.nan)
        self.chain = np.full(streams, (config.seed * _GOLDEN + 0x2545F4914F6CDD1D) & _MASK, np.uint64)

    def enter(self, losses: np.ndarray, targets: np.ndarray, gates: np.ndarray) -> None:
        """Enter the next tokens of every stream."""
        for t in range(losses.shape[1]):
            self._enter(losses[:, t].astype(np.float64), targets[:, t].astype(np.uint64), gates[:, t])

    def _enter(self, loss: np.ndarray, target: np.ndarray, gate: np.ndarray) -> None:
        config = self.config
        self.chain = np.uint64(0x5851F42D4C957F2D) * self.chain + target + np.uint64(1)
        score = self._score(loss)
        if config.budget is None:
            mine = score > self.threshold
        else:
            past = self.scores
            count, equal = (~np.isnan(past)).sum(1), (past == score[:, None]).sum(1)
            higher = (past > score[:, None]).sum(1)
            rank = (higher + self._chance(2) * (1 + equal)) / (1 + count)
            mine = rank <= config.budget * (1 + self.owed / 2)
            self.scores = np.concatenate([past[:, 1:], score[:, None]], 1)
        self.tokens += 1
        self.opened += gate != 0
        self.differs += mine != (gate != 0)

    def _score(self, s: np.ndarray) -> np.ndarray:
        rule, decay = self.config.rule, self.config.decay
        if rule == "random":
            return self._chance(1)
        if rule in ("absolute", "quantile"):
            return s
        mean, square = self.mean, self.square
        self.mean = decay * mean + (1 - decay) * s
        self.square = decay * square + (1 - decay) * s * s if rule == "zscore" else square
        if rule == "momentum":
            return self.mean / (1 - decay ** (self.tokens + 1))
        if rule not in ("zscore", "ratio"):
            raise SystemExit(f"there is no ledger of the rule {rule!r}")
        if not self.tokens:
            return np.full_like(s, float(rule == "ratio"))
        weight = 1 - decay**self.tokens
        before = mean / weight
        if rule == "ratio":
            return s / before
        return (s - before) / (np.sqrt(np.maximum(square / weight - before**2, 0)) + 0.1)

    def _chance(self, salt: int) -> np.ndarray:
        z = self.chain + np.uint64((salt + 1) * _GOLDEN & _MASK)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(40)) / 2.0**24

    @property
    def owed(self) -> np.ndarray:
        """What the budget allows so far, less what was written; from whole numbers, so that nothing adds up."""
        return (self.config.budget or 0.0) * self.tokens - self.opened

    def beside(self, state: State) -> dict[str, float]:
        """How far the state's own account is from this one, the worst stream of each."""
        found = {
            "open_share": float(self.opened.sum() / max(1, self.tokens * len(self.opened))),
            "differs": int(self.differs.sum()),
        }
        if (held := state.gate) is None:
            return found
        if self.config.budget is not None:
            found["owed"] = _worst(held.owed[:, 0], self.owed)
            found["owed_most"] = float(np.abs(self.owed).max())
            last, own = held.scores[:, 0].double().numpy(), self.scores
            found["scores"] = float(np.nanmax(np.abs(last - own), initial=0.0))
            found["scores_lost"] = int((np.isnan(last) != np.isnan(own)).sum())
            found["chain_wrong"] = int((held.chain.numpy().view(np.uint64) != self.chain).sum())
        return found | {
            "mean": _worst(held.mean[:, 0], self.mean),
            "square": _worst(held.square[:, 0], self.square),
        }


def _worst(held: torch.Tensor, own: np.ndarray) -> float:
    return float(np.abs(held.double().numpy() - own).max())


class Norms:
    """Norms of fast weights over those they start from, of the stream that went furthest, by hook point."""

    def __init__(self, subject: HopeSubject) -> None:
        self.meta = dict(subject.meta_weights())
        self.found: dict[str, tuple[float, float, float]] = {}

    def __call__(self, fast: torch.Tensor, hook: HookPoint) -> None:
        """Look at (B, out, in)."""
        meta = self.meta[hook.name]
        size, moved = (
            fast.flatten(1).norm(dim=1) / meta.norm(),
            (fast - meta).flatten(1).norm(dim=1) / meta.norm(),
        )
        self.found[hook.name] = float(size.max()), float(moved.max()), float(moved.median())

    def shown(self) -> dict[str, list[float]]:
        """By hook point: the largest norm ratio, the largest and the median distance."""
        return {name: [round(x, 6) for x in values] for name, values in sorted(self.found.items())}


def state_bytes(state: State) -> int:
    """Bytes of all tensors of a state."""
    sizes: list[int] = []
    map_state(lambda t: sizes.append(t.numel() * t.element_size()) or t, state)
    return sum(sizes)


def resident() -> dict[str, float]:
    """MiB of this process now, and the most there ever were."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rss_mib": round(pages * resource.getpagesize() / 2**20, 1), "peak_mib": round(peak, 1)}


class Stream:
    """Streams of one model and how far they have come.

    tokens: the text (N,), of which stream r reads from r N / streams on, beginning again at its end.
    """

    def __init__(self, subject: HopeSubject, tokens: np.ndarray, streams: int) -> None:
        self.subject, self.model = subject, subject.module
        self.text, self.streams = tokens, streams
        self.starts = np.arange(streams) * len(tokens) // streams
        self.state = self.model.init_state(streams)
        self.ledger = Ledger(self.model.config.gate, self.model.gate.threshold or 0.0, streams)
        self.fed, self.seconds = 0, 0.0  # tokens of each stream; of all calls
        self.not_finite = 0
        self.loss_sum, self.loss_count = 0.0, 0  # since the last line

    def at(self, start: int, n: int) -> np.ndarray:
        """Tokens start .. start + n - 1 of every stream, (B, n)."""
        return self.text[(self.starts[:, None] + start + np.arange(n)) % len(self.text)].astype(np.int64)

    @torch.no_grad()
    def feed(self, n: int) -> torch.Tensor:
        """Go on by n tokens; gives the losses that came (B, m)."""
        gates: list[torch.Tensor] = []
        started = time.perf_counter()
        with self.model.hooks(
            [("hook_gate", lambda gate, _: gates.append(gate.clone()))], allow_unfired=True
        ):
            losses, self.state = self.model.feed(self.state, torch.from_numpy(self.at(self.fed, n)))
        self.seconds += time.perf_counter() - started
        self.fed += n
        if losses.shape[1]:
            targets = self.at(self.ledger.tokens + 1, losses.shape[1])
            self.ledger.enter(losses.numpy(), targets, torch.cat(gates, 1).numpy())
            finite = losses.isfinite()
            self.not_finite += int((~finite).sum())
            self.loss_sum += float(losses[finite].double().sum())
            self.loss_count += int(finite.sum())
        return losses

    def line(self, norms: Norms) -> dict[str, Any]:
        """What is known now."""
        bad: list[int] = []
        map_state(lambda t: bad.append(int((~t.isfinite()).sum())) or t, self.state.layers)
        mean = self.loss_sum / self.loss_count if self.loss_count else None
        self.loss_sum, self.loss_count = 0.0, 0
        return {
            "tokens": self.fed * self.streams,
            "fed": self.fed,
            "position": self.state.position,
            "pending": self.state.pending.shape[1],
            "scored": self.ledger.tokens,
            "loss": mean,
            "losses_not_finite": self.not_finite,
            "state_not_finite": sum(bad),
            "state_bytes": state_bytes(self.state),
            **resident(),
            "tokens_per_s": round(self.fed * self.streams / self.seconds, 1),
            "gate": self.ledger.beside(self.state),
            "norms": norms.shown(),
        }

    @torch.no_grad()
    def alone(self, row: int, n: int = 64) -> float:
        """The largest difference of the next losses of one stream, fed on with the others or by itself."""
        tokens = torch.from_numpy(self.at(self.fed, n))
        together, _ = self.model.feed(self.state, tokens)
        by_itself, _ = self.model.feed(select_rows(self.state, [row]), tokens[row : row + 1])
        return float((together[row] - by_itself[0]).abs().max())

    def save(self, path: Path) -> None:
        """Keep all that going on needs."""
        content = {"state": self.state, "ledger": vars(self.ledger) | {"config": None}}
        content |= {"fed": self.fed, "seconds": self.seconds, "not_finite": self.not_finite}
        content["ledger"] = {
            k: torch.from_numpy(v.view(np.int64) if v.dtype == np.uint64 else v)
            if isinstance(v, np.ndarray)
            else v
            for k, v in content["ledger"].items()
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(path, buffer.getvalue())

    def restore(self, path: Path) -> None:
        """Go on from there."""
        with torch.serialization.safe_globals(_KINDS):
            content = torch.load(path, weights_only=True)
        self.state, self.fed, self.seconds = content["state"], content["fed"], content["seconds"]
        self.not_finite = content["not_finite"]
        for key, value in content["ledger"].items():
            if isinstance(value, torch.Tensor):
                value = value.numpy()
                setattr(self.ledger, key, value.view(np.uint64) if key == "chain" else value)
            elif key != "config":
                setattr(self.ledger, key, value)


def run(stream: Stream, total: int, every: int, piece: int = PIECE) -> Iterator[dict[str, Any]]:
    """Feed until `total` tokens of all streams, and give a line after each `every` tokens of one, and at the end."""
    norms = Norms(stream.subject)
    end = -(-total // stream.streams)
    while stream.fed < end:
        stop = min(end, (stream.fed // every + 1) * every)
        while stream.fed < stop:
            n = min(piece, stop - stream.fed)
            if stream.fed + n < stop:
                stream.feed(n)
                continue
            with stream.model.hooks([(lambda name: name in norms.meta, norms)], allow_unfired=True):
                stream.feed(n)
        yield stream.line(norms)


def summary(lines: list[dict[str, Any]], streams: int, asked: int, about: str) -> dict[str, Any]:
    """What is worth keeping of all lines: some of them, and how far each norm went."""
    kept = [line for i, line in enumerate(lines) if i % 10 == 0 or line is lines[-1]]
    norms = {
        name: {
            "first": lines[0]["norms"][name],
            "last": lines[-1]["norms"][name],
            "largest_ratio": max(line["norms"][name][0] for line in lines),
            "largest_distance": max(line["norms"][name][1] for line in lines),
        }
        for name in lines[0]["norms"]
    }
    return {
        "about": about,
        "streams": streams,
        "asked": asked,
        "reached": lines[-1]["tokens"],
        "all_lines": {
            "n": len(lines),
            "losses_not_finite": max(line["losses_not_finite"] for line in lines),
            "state_not_finite": max(line["state_not_finite"] for line in lines),
            "gates_that_differ": max(line["gate"]["differs"] for line in lines),
            "positions_wrong": sum(line["position"] + line["pending"] != line["fed"] for line in lines),
            "state_bytes": [f(line["state_bytes"] for line in lines) for f in (min, max)],
        },
        "norms": norms,
        "lines": [{k: v for k, v in line.items() if k != "norms"} for line in kept],
    }


def held(subject: HopeSubject, most: float) -> HopeSubject:
    """The same weights in a model whose CMS levels are held to a `max_change`."""
    config = subject.module.config
    levels = tuple(dataclasses.replace(level, max_change=most) for level in config.cms_levels)
    model = HopeModel(dataclasses.replace(config, cms_levels=levels), None)
    model.load_state_dict(subject.module.state_dict())
    return HopeSubject(model)


def main() -> None:
    """Read, and keep what was seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="what to read with")
    parser.add_argument("--summary", type=Path, help="write a summary of the lines in --output here, and end")
    parser.add_argument("--about", default="", help="of the summary: where and how it was run")
    parser.add_argument("--data", action="append", help="as for `hopeprobe analyze`; builtin")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of all streams together")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--every", type=int, default=1000, help="tokens of one stream between two lines")
    parser.add_argument("--keep-every", type=int, default=4, help="lines between two states that are kept")
    parser.add_argument("--rule", help="of another gate than the model's own")
    parser.add_argument("--budget", type=float)
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--max-change", type=float, help="of every CMS level, in place of the model's own")
    parser.add_argument("--output", type=Path, required=True, help="lines; the state lies beside it")
    options = parser.parse_args()
    if options.summary:
        found = [json.loads(line) for line in options.output.read_text(encoding="utf-8").splitlines()]
        content = summary(found, options.streams, options.tokens, options.about)
        options.summary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return
    if options.checkpoint is None:
        parser.error("--checkpoint is needed to read with")
    torch.set_num_threads(1)
    gate = GateRule(options.rule, options.budget, options.threshold) if options.rule else None
    subject = hopeprobe.load(options.checkpoint)
    assert isinstance(subject, HopeSubject)
    subject = subject if gate is None else subject.with_gate(gate)
    subject = subject if options.max_change is None else held(subject, options.max_change)
    text = load_tokens(tuple(options.data or ["builtin"]))
    stream = Stream(subject, np.asarray(text.tokens), options.streams)
    kept = options.output.with_suffix(".state.pt")
    lines: list[str] = []
    if kept.exists():
        stream.restore(kept)
        written = options.output.read_text(encoding="utf-8").splitlines()
        lines = [line for line in written if json.loads(line)["fed"] <= stream.fed]
        options.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"on from {stream.fed * stream.streams:,} tokens", flush=True)
    for line in run(stream, options.tokens, options.every):
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        lines.append(json.dumps(line))
        told = {k: line[k] for k in ("tokens", "loss", "rss_mib", "state_bytes", "tokens_per_s")}
        print(json.dumps(told | {"not_finite": line["losses_not_finite"]}), flush=True)
        if len(lines) % options.keep_every == 0 or stream.fed * stream.streams >= options.tokens:
            stream.save(kept)
    print(f"alone: {[stream.alone(row) for row in (0, stream.streams // 2, stream.streams - 1)]}")


if __name__ == "__main__":
    sys.exit(main())
