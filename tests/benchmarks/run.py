"""Speed as ratios, each against a ceiling or an alternative measured in the same run; nothing here is a test.

    hooks      what the idle hook points of one forward pass cost, as a share of that pass
    streaming  arithmetic a streaming evaluation does (with all writes), against the matrix-product rate of this machine
    workers    a pass with a batch in each thread against one with all threads on each batch
    probes     a pass that feeds all probes which need no intervention, and their rows, against one that only scores
    closed     the chunk write in closed form against the same recurrence token by token

Run with `make bench`; `--json FILE` keeps the numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hopeprobe.conditions import LIVE
from hopeprobe.hooks import HookPoint
from hopeprobe.model.config import ModelConfig, preset
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.subject import HopeSubject
from hopeprobe.model.write import chunk_decay, solve_errors
from hopeprobe.opening import suitable_batch
from hopeprobe.probes import PROBES, Probe
from hopeprobe.probes.integrity import MeanLoss
from hopeprobe.probes.passes import run_pass
from hopeprobe.probes.workers import blas_threads
from hopeprobe.tokens import EvalWindows, load_tokens

TOKENS = 32_768  # what `hopeprobe analyze` reads


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time after one warm-up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def streaming_flops(config: ModelConfig) -> float:
    """Multiply-adds counted as two, a token: reads, writes, inner backward, CMS in dense form, head."""
    d, h = config.dim, config.dim * config.cms_multiplier
    memory = 4 * d * d  # one memory read by one token
    selfmod = (2 * 2 + 2 + 2 * 0.5) * memory + 2 * 6 * memory + 6 * memory + 10 * 2 * d * d + 2 * 2 * memory
    cms = len(config.cms_levels) * (2 + 2 + 1) * 4 * d * h
    return config.layers * (selfmod + cms) + 4 * d * config.vocab_size


def hooks(name: str) -> dict[str, float]:
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
        whole = seconds(lambda: model(tokens), 3)
    point, x = model.hook_dict["hook_embed"], torch.zeros(1)
    idle = seconds(lambda: [point(x) for _ in range(100_000)]) / 100_000
    return {"calls": calls, "ns a call": idle * 1e9, "share of a forward pass": calls * idle / whole}


def streaming(name: str) -> dict[str, float]:
    """Tokens a second, and the share of the machine's matrix-product rate that is reached."""
    model = HopeModel(preset(name))
    batch = 8
    tokens = torch.randint(0, model.config.vocab_size, (batch, model.config.context + 1))
    a = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / seconds(lambda: a @ a, 9)
    with torch.no_grad():
        took = seconds(lambda: model(tokens), 3)
    n = batch * model.config.context
    return {
        "tokens/s": n / took,
        "GFLOP a token": streaming_flops(model.config) / 1e9,
        "GFLOP/s of a matrix product": rate / 1e9,
        "floor / measured": n * streaming_flops(model.config) / rate / took,
    }


class Scoring(Probe):
    """Reads the losses and nothing else."""

    name, question, statistics = "scoring", "What is the loss?", ("loss",)

    def applies(self, subject):
        """Every model."""

    def accumulator(self, subject, condition, windows):
        """Make one of the mean loss."""
        return MeanLoss(condition)


class OneAtATime(HopeSubject):
    """A subject without replicas."""

    def replica(self) -> None:
        """Have none."""


def workers_and_probes(name: str) -> tuple[dict[str, float], dict[str, float]]:
    """Three kinds of pass in turn, three times; medians of the ratios within a turn, and what the rows cost."""
    model = HopeModel(preset(name))
    subject, alone = HopeSubject(model), OneAtATime(model)
    context = model.config.context
    batch = suitable_batch(context, "window")
    windows = EvalWindows(load_tokens("builtin"), "heldout", context=context, tokens=TOKENS, batch=batch)
    fitting = [p for p in PROBES.values() if p.applies(subject) is None]
    watching = [p for p in fitting if [c.name for c in p.conditions(subject)] == [LIVE.name]]
    by_workers, by_probes, rows = [], [], []
    with blas_threads(1):
        for _ in range(3):
            bare = once(lambda: run_pass(subject, windows, [Scoring()], LIVE))
            by_workers.append(once(lambda: run_pass(alone, windows, [Scoring()], LIVE)) / bare)
            started = time.perf_counter()
            found = run_pass(subject, windows, watching, LIVE)
            if found.failed:
                raise RuntimeError(str(found.failed))
            by_probes.append((time.perf_counter() - started) / bare)
            rows.append(once(lambda: [a.measurements() for a in found.accumulators.values()]) / bare)  # noqa: B023
    return {"a thread each: times as fast": statistics.median(by_workers)}, {
        "probes": len(watching),
        "pass / bare pass": statistics.median(by_probes),
        "rows with intervals / bare pass": statistics.median(rows),
    }


def once(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def closed() -> dict[str, float]:
    """One chunk of 64 tokens, d = 256, B = 8."""
    batch, n, d = 8, 64, 256
    k = torch.nn.functional.normalize(torch.randn(batch, n, d), dim=-1)
    eta, log_alpha = torch.rand(batch, n) * 0.1, -torch.rand(batch, n) * 0.01
    push, w = torch.randn(batch, n, d), torch.randn(batch, d, d)

    def form() -> torch.Tensor:
        decay = chunk_decay(k, eta, log_alpha)
        errors = solve_errors(decay, eta, push, None, k @ w.mT)
        return decay.end[:, None, None] * w - errors.mT @ (decay.to_end[..., None] * k)

    def loop() -> torch.Tensor:
        now = w
        for t in range(n):
            read = (now @ k[:, t, :, None])[..., 0] + push[:, t]
            now = (
                log_alpha[:, t].exp()[:, None, None] * now
                - (eta[:, t, None] * read)[..., None] * k[:, t, None]
            )
        return now

    return {"closed form / token loop": seconds(form) / seconds(loop)}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny", help="tiny or small")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    results = {"hooks": hooks(options.preset), "streaming": streaming(options.preset), "closed": closed()}
    results["workers"], results["probes"] = workers_and_probes(options.preset)
    table = Table(title=f"{options.preset}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for column in ("benchmark", "what", "value"):
        table.add_column(column)
    for name, numbers in results.items():
        for what, value in numbers.items():
            table.add_row(name, what, f"{value:.4g}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
