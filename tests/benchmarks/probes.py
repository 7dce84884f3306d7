"""What watching costs, over a pass that only scores; a model with hook points that nobody listens to; long streams."""

from __future__ import annotations

import dataclasses
import statistics

import clock
import torch
from clock import Row

from hopeprobe.conditions import LIVE
from hopeprobe.hooks import HookPoint
from hopeprobe.model.config import preset
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.subject import HopeSubject
from hopeprobe.opening import suitable_batch
from hopeprobe.probes import PROBES, Probe
from hopeprobe.probes.integrity import MeanLoss
from hopeprobe.probes.passes import run_pass
from hopeprobe.probes.workers import blas_threads
from hopeprobe.tokens import EvalWindows, load_tokens

TOKENS = 8192  # a quarter of what `hopeprobe analyze` reads: many short turns say more than a few long ones


def idle(name: str) -> list[Row]:
    """Idle calls of one forward pass, times the cost of one, over the pass."""
    model = HopeModel(preset(name))
    tokens = torch.randint(0, model.config.vocab_size, (8, model.config.context + 1))
    calls = 0

    def count(tensor: torch.Tensor, hook: HookPoint) -> None:
        nonlocal calls
        calls += 1

    with torch.no_grad():
        with model.hooks(fwd_hooks=[(lambda _: True, count)]):
            model(tokens)
        whole = statistics.median(clock.once(lambda: model(tokens)) for _ in range(3))
    point, x = model.hook_dict["hook_embed"], torch.zeros(1)
    each = (
        statistics.median(clock.once(lambda: [point(x) for _ in range(100_000)]) for _ in range(5)) / 100_000
    )
    share = calls * each / whole
    return [
        Row(
            f"{name}: idle hook points", share, unit="of a pass", goal="<= 1%", met=share <= 0.01,
            note=f"{calls} calls of {each * 1e9:.0f} ns",
        )
    ]  # fmt: skip


class Scoring(Probe):
    """Reads the losses and nothing else."""

    name, question, statistics = "scoring", "What is the loss?", ("loss",)

    def applies(self, subject):
        """Every model."""

    def accumulator(self, subject, condition, windows):
        """Make one of the mean loss."""
        return MeanLoss(condition)


def held_out(context: int) -> EvalWindows:
    """What every pass reads."""
    batch = suitable_batch(context, "window")
    return EvalWindows(load_tokens("builtin"), "heldout", context=context, tokens=TOKENS, batch=batch)


def watching(name: str, turns: int) -> list[Row]:
    """Passes that only score, with one probe, and with all that need no intervention, in turn; and what rows cost."""
    subject = HopeSubject(HopeModel(preset(name)))
    windows = held_out(subject.context)
    fitting = [p for p in PROBES.values() if p.applies(subject) is None]
    live = [p for p in fitting if [c.name for c in p.conditions(subject)] == [LIVE.name]]
    (one,) = ([p] for p in live if p.name == "cms-similarity")  # else a pass without any probe would be timed
    results = {}

    def passed(label: str, probes: list[Probe]) -> None:
        results[label] = run_pass(subject, windows, probes, LIVE)
        if results[label].failed:
            raise RuntimeError(str(results[label].failed))

    def intervals() -> None:
        for accumulator in results["all"].accumulators.values():
            accumulator.measurements()

    with blas_threads(1):
        times = clock.by_turns(
            {
                "bare": lambda: passed("bare", [Scoring()]),
                "one": lambda: passed("one", one),
                "all": lambda: passed("all", live),
                "intervals": intervals,
            },
            turns,
        )
    extra = {label: clock.ratio(times, label, "bare") for label in ("one", "all", "intervals")}
    return [
        Row(
            f"{name}: one probe (cms-similarity)", extra["one"] - 1, unit="over a bare pass", goal="<= 5%",
            met=extra["one"] <= 1.05, turns=times,
        ),
        Row(
            f"{name}: all {len(live)} probes without interventions", extra["all"] - 1, unit="over a bare pass",
            goal="<= 25%", met=extra["all"] <= 1.25, note=f"and their intervals, once: {extra['intervals']:.1%}",
        ),
    ]  # fmt: skip


def workers(name: str, turns: int) -> list[Row]:
    """A pass with a batch in each thread against one with all threads on each batch."""

    class OneAtATime(HopeSubject):
        def replica(self) -> None:
            """Have none."""

    model = HopeModel(preset(name))
    windows = held_out(model.config.context)
    with blas_threads(1):
        times = clock.by_turns(
            {
                "together": lambda: run_pass(HopeSubject(model), windows, [Scoring()], LIVE),
                "alone": lambda: run_pass(OneAtATime(model), windows, [Scoring()], LIVE),
            },
            turns,
        )
    median = {label: statistics.median(t) for label, t in times.items()}
    return [
        Row(
            f"{name}: a pass, a thread each", median["together"], median["alone"],
            clock.ratio(times, "alone", "together"), peer_is="all threads on each batch", turns=times,
        )
    ]  # fmt: skip


def contexts(name: str) -> list[Row]:
    """One stream of 16,384 tokens by pieces of 512, each piece beside the same tokens from a fresh state."""
    piece, pieces = 512, 32
    model = HopeModel(dataclasses.replace(preset(name), context=piece))
    tokens = torch.randint(
        0, model.config.vocab_size, (1, piece * pieces), generator=torch.Generator().manual_seed(0)
    )
    times: dict[str, list[float]] = {"further on": [], "fresh": []}
    held = []
    with torch.no_grad():
        state = model.init_state(1)
        for some in tokens.split(piece, dim=1):
            started = clock.time.perf_counter()
            _, state = model.feed(state, some)
            between = clock.time.perf_counter()
            model.feed(model.init_state(1), some)
            times["further on"].append(between - started)
            times["fresh"].append(clock.time.perf_counter() - between)
            held.append(clock.own_peak())
    per_token = clock.ratio(times, "further on", "fresh")
    return [
        Row(
            f"{name}: a token further on, to 16,384, over one of the first 512", per_token, unit="x", goal="<= 1.1",
            met=per_token <= 1.1 and held[-1] / held[3] <= 1.01, turns=times,
            note=f"peak memory from 2,048 to 16,384 tokens: {held[-1] / held[3] - 1:+.2%}",
        )
    ]  # fmt: skip
