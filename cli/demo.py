"""`hopeprobe demo`: train a tiny HOPE, measure it, and show each number beside its null."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np

from hopeprobe.analysis import analyze
from hopeprobe.cli.analysis import report_missing, save_figures
from hopeprobe.cli.tables import result_tables
from hopeprobe.cli.terminal import console, progress, say
from hopeprobe.cli.training import load_data, training_progress
from hopeprobe.errors import BadInputError
from hopeprobe.model.checkpoint import run_checkpoints, step_path
from hopeprobe.model.config import PRESET_LEARNING_RATE, preset
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.plots import plot_loss_curve
from hopeprobe.tokens import EvalWindows, Unigram

#: Enough for 64 groups of documents; a larger budget narrows intervals and takes longer than a demo may.
TOKENS = 12_288
FRESH_TOKENS = 1024
#: What two passes and their nulls answer; those that intervene take a dozen more.
PROBES = ("integrity", "cms-similarity")


def run_demo(out: Path, steps: int, seed: int) -> int:
    """Train, analyse, draw; the folder then holds a run, `results.json`, two figures. Returns the exit status."""
    started = time.perf_counter()
    if run_checkpoints(out):
        raise BadInputError(f"{out} holds a run already: choose another --out, or delete it")
    config = preset("tiny")
    train_config = TrainConfig(
        steps=steps,
        seed=seed,
        learning_rate=PRESET_LEARNING_RATE["tiny"],
        checkpoint_every=max(steps, 1),
        eval_every=steps,
        warmup=min(10, steps),
        eval_tokens=4096,
    )
    screen = console()
    with progress() as report:
        data = load_data(["builtin"], report)
        watched = EvalWindows(data, context=config.context, tokens=train_config.eval_tokens)
        targets = np.concatenate(
            [row[1 : n + 1] for batch in watched for row, n in zip(batch.tokens, batch.lengths, strict=True)]
        )
        unigram = Unigram.fit(data.split_tokens("train"), data.vocab_size).loss(targets)
        run = train(config, train_config, data, out, progress=training_progress(report, steps, []))
        trained = time.perf_counter() - started
        results = analyze(
            [step_path(out, run.step)],
            probes=PROBES,
            data=data,
            tokens=TOKENS,
            fresh_tokens=FRESH_TOKENS,
            progress=report,
            device="auto",
        )
    results.write_json(out / "results.json")
    figures = [
        plot_loss_curve(
            out / "metrics.jsonl",
            out / "loss.png",
            unigram=unigram,
            ln_vocab=math.log(config.vocab_size),
        ),
        *save_figures(results, out),
    ]
    for table in result_tables(results):
        screen.print(table)
    last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    say(
        screen,
        f"{steps} steps on {data.name}: held-out loss {last['held_out_live']:.3f} live, "
        f"{last['held_out_frozen']:.3f} frozen, {unigram:.3f} by token frequencies alone (unigram, same tokens); "
        f"fast weights at {last['norm_ratio']:.3f} of their meta weights' norm",
    )
    for path in (*figures, out / "results.json", step_path(out, run.step)):
        say(screen, f"wrote {path}")
    total = time.perf_counter() - started
    say(screen, f"every other question: hopeprobe analyze {step_path(out, run.step)} --all")
    say(screen, f"training {trained:.0f} s, measuring {total - trained:.0f} s")
    return report_missing(results)
