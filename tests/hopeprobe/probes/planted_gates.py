"""A model whose every write has a known worth: what a probe of gates must find in it, and what it must not."""

import contextlib

import numpy as np
import torch

from hopeprobe.hooks import Hooked, HookRegistry, HookSpec
from hopeprobe.model.config import GateConfig
from hopeprobe.model.gate import Gate
from hopeprobe.model.scores import Seen
from hopeprobe.subject import GateRule, MissingCapability, Subject, WindowLosses
from hopeprobe.tokens import TokenData

VOCAB, CONTEXT, TICK = 400, 64, 8
CARRIERS = VOCAB // 10  # the first tenth of the tokens
GATE, SCORE, SURPRISE = "memory.hook_write_gate", "hook_gate_score", "hook_surprise"


def text(seed, documents=72):
    """Documents of exchangeable tokens, a window each."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, size=(documents, CONTEXT + 1))
    return TokenData.from_documents(tokens.tolist(), name=f"planted {seed}", vocab_size=VOCAB, end_of_text=0)


class Module(Hooked, torch.nn.Module):
    """Hook points, and no weights."""

    def __init__(self):
        super().__init__()
        registry = HookRegistry()
        for name, editable in ((SURPRISE, False), (SCORE, False), (GATE, True)):
            setattr(
                self,
                name.replace(".", "_"),
                registry.add(name, HookSpec(("batch", "pos"), "tick", editable, name)),
            )
        self._register_hooks(registry)


class Planted(Subject):
    """Loss of a token: its own, less the worth written before it as a share of all worth that went by.

    own [V]: nats. worth [V] >= 0: of writing a token. gain: nats that all of it saves.
    """

    context, tick, vocab_size, tokenizer = CONTEXT, TICK, VOCAB, "gpt2"
    name, trained_steps, seed, dtype = "planted", 100, None, "float64"

    def __init__(self, own, worth, gain=1.0):
        self.module, self.gate = Module(), GateRule("random", 1.0)
        self.own, self.worth, self.gain = torch.as_tensor(own), torch.as_tensor(worth), gain

    def run(self, tokens, lengths=None, state=None):
        assert state is None
        targets = tokens[:, 1:]
        scored = torch.arange(targets.shape[1]) < (lengths[:, None] if lengths is not None else CONTEXT)
        threshold = self.gate.threshold
        absolute = self.gate.rule == "absolute"
        config = GateConfig() if absolute else GateConfig(self.gate.rule, self.gate.budget, threshold)
        gate = Gate(config, threshold or 0.0, layers=1)
        remembered = gate.init_state(len(tokens), self.own)
        written = seen = torch.zeros(len(tokens), dtype=torch.float64)
        losses = []
        every_own, every_worth = self.drawn(tokens)
        for start in range(0, targets.shape[1], TICK):
            here = targets[:, start : start + TICK]
            own, worth = (each[:, start : start + TICK] for each in (every_own, every_worth))
            share = torch.where(seen > 0, written / seen.clamp_min(1e-9), 0.0)
            known = scored[:, start : start + TICK]
            loss = self.module.hook_surprise((own - self.gain * share[:, None]) * known)
            unigram = torch.zeros_like(loss)
            decided = gate.decide(
                Seen(loss, torch.where(known, here, -1), unigram, unigram, None),
                remembered,
                start,
            )
            remembered = decided.state
            self.module.hook_gate_score(decided.score[:, 0])
            passed = self.module.memory_hook_write_gate(decided.gate[:, 0])
            written = written + (passed * worth).sum(1)
            seen = seen + (worth * known).sum(1)
            losses.append(loss)
        return WindowLosses(torch.cat(losses, 1), scored, None)

    def drawn(self, tokens):
        """Own loss and worth of every target of windows [R, L + 1]."""
        return self.own[tokens[:, 1:]], self.worth[tokens[:, 1:]]

    def write_periods(self):
        return {"memory": TICK}

    def freeze_hooks(self, mechanism=None):
        return [(GATE, lambda gate, hook: torch.zeros_like(gate))]

    def gate_rules(self):
        rules = ("absolute", "quantile", "zscore", "ratio", "excess", "entropy-gap", "momentum", "random")
        return dict.fromkeys(rules, ("all",))

    @contextlib.contextmanager
    def gated(self, gate, surprisal=None):
        before, self.gate = self.gate, gate
        try:
            yield
        finally:
            self.gate = before

    def replica(self):
        return type(self)(self.own, self.worth, self.gain)

    def own_init(self):
        return Planted(self.own, self.worth, 0.0)

    def reinitialised(self, seed):
        return Planted(self.own, self.worth, 0.0)

    def parameter_groups(self):
        return {"all": {"own": self.own, "worth": self.worth, "gain": torch.tensor(self.gain)}}

    def identity(self):
        return {"model": "planted"}


class Orphan(Planted):
    """Its initial weights are not known: half the passes."""

    def own_init(self):
        raise MissingCapability("planted: no initial weights")


class Exchangeable(Orphan):
    """Own loss and worth are drawn anew wherever a token stands, the same ones whenever the window is read again.

    Were they of the token, a vocabulary of 400 would relate the two by chance, in every document alike: a rule could
    truly win.
    """

    def drawn(self, tokens):
        own, worth = [], []
        for row in tokens.numpy():
            rng = np.random.default_rng(row)
            own.append(1.0 + rng.gamma(2.0, 2.0, len(row) - 1))
            worth.append(rng.gamma(0.5, 1.0, len(row) - 1))
        return torch.as_tensor(np.array(own)), torch.as_tensor(np.array(worth))


def exchangeable():
    """Nothing that is known of a token says what writing it is worth."""
    return Exchangeable(np.zeros(VOCAB), np.zeros(VOCAB))


def unrelated(seed):
    """Worth and loss are the token's, and drawn apart."""
    rng = np.random.default_rng(10_000 + seed)
    return Orphan(1.0 + rng.gamma(2.0, 2.0, VOCAB), rng.gamma(0.5, 1.0, VOCAB))


def carriers(seed):
    """All worth is with a tenth of the tokens, and these surprise."""
    rng = np.random.default_rng(20_000 + seed)
    own = 1.0 + rng.gamma(2.0, 1.0, VOCAB)
    own[:CARRIERS] += 6.0
    worth = np.zeros(VOCAB)
    worth[:CARRIERS] = 1.0
    return Planted(own, worth)
