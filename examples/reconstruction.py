"""The figures of "Dissecting HOPE", sections 4.2 to 4.4, from a model that was never trained, and what hopeprobe says.

    make reconstruction                         measure anew, in `.venv-peers`: some ten minutes of one core
    python examples/reconstruction.py --page    make the page anew from the committed numbers, without the package

The model is block `hope_selfmod` of nested-learning 0.2.0 at the study's small size, freshly initialised with seed 1,
in a file that says step 2,000; the run's initial weights are those of seed 0. That is what remains when weights are
never loaded: a key prefix and `strict=False` are enough, and the package's `restore_state_dict` has the latter. First
the figures are computed as plainly as the study describes them, with the package alone. Then hopeprobe is asked.

That the study's own checkpoints were like this is an inference from the numbers; their code is not public. What the
table shows is that no figure of these sections needs any training, and that hopeprobe calls none of them learned.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

from hopeprobe.results import Results
from hopeprobe.study.published import INSIDE, Published

FIGURES = Path(__file__).with_suffix(".json")
RESULTS = FIGURES.with_name("reconstruction-results.json")  # of hopeprobe: rows and their nulls
PAGE = Path(__file__).with_suffix(".md")
CONFIG = {
    "model": {
        "vocab_size": 50257,
        "dim": 256,
        "num_layers": 6,
        "heads": 4,
        "block_variant": "hope_selfmod",
        "self_mod_chunk_size": 8,
        "self_mod_chunk_size_memory": 64,
        "titan_level": {"name": "titan", "update_period": 8},
        "cms_levels": [{"name": "fast", "update_period": 8}, {"name": "slow", "update_period": 32}],
    },
    # Windows of 32 tokens for hopeprobe, in one call: each shows one write of every memory and level, and many
    # documents are cheap.
    "data": {"seq_len": 32},
    "train": {
        "use_fast_state": True,
        "online_updates": True,
        "online_chunk_size": 32,
        "online_boundary_targets": True,
    },
    "optim": {"type": "adamw", "lr": 3e-4},
}
STEPS = 2000
OWN_SEED, SEED = 0, 1
CONTEXT, TOKENS = 512, 16_384  # of the plain figures
MEASURED, FRESH, FRESH_TOKENS = 1280, 5, 512  # of hopeprobe's
THRESHOLDS = (5, 10, 20, 50)
STYLES = {
    "ratio": "{:.0e}",
    "gate": "{:.2%}",
    "relative": "{:.3f}",
    "cosine": "{:.2f}",
    "level": "{:.2f}",
    "drift": "{:.2f}",
}

#: Two more figures that the study printed: which row of the table each comes after, and the rows that judge it.
TRACKED = Published("tracked", "4.3", "self-modification parameters tracked", "84", "", "")
MEAN = Published(
    "memory_drift",
    "4.3",
    "… and the mean of an η or α memory",
    "≈ 5",
    "selfmod-drift",
    "displacement",
    "eta|alpha",
)
AFTER = {"delta_cosine": TRACKED, "row_drift": MEAN}
INTEGRITY = Published("weights", "3", "the weights", "of training steps 200 to 2,000", "integrity", ".*")
LENGTH = 16  # tokens after which fast weights are looked at


def claimed():
    """The file that says step 2,000 and holds another initialisation than the run's."""
    from nested_learning_subject import NestedLearningSubject

    initial = NestedLearningSubject(CONFIG, seed=OWN_SEED)
    weights = NestedLearningSubject(CONFIG, seed=SEED).module.peer.state_dict()
    subject = NestedLearningSubject(CONFIG, content={"model": weights, "step": STEPS}, initial=initial)
    subject.name = "step_002000.pt, never loaded"
    return subject


# -- the figures, with the package alone ---------------------------------------------------------------------------


def weight_figures(now, start):
    """Norms and distances of two models' weights: lowest and highest over layers and parts."""
    norms, drifts, large, small, scalars = [], [], [], [], []
    for new, old in zip(now.blocks, start.blocks, strict=True):
        for name, level in new.cms.blocks.items():
            norms.append(distance(level.parameters()))
            drifts.append(distance(level.parameters(), old.cms.blocks[name].parameters()))
        for memory in ("k", "v", "q", "eta", "alpha", "memory"):
            both = (getattr(block.selfmod, f"m_{memory}").parameters() for block in (new, old))
            moved = [(len(p), distance([p], [q])) for p, q in zip(*both, strict=True)]
            if memory in ("eta", "alpha"):
                small += [d for n, d in moved if n == 1]
                scalars.append(sum(d for _, d in moved) / len(moved))
            else:
                large += [d for _, d in moved]
    return {
        "level_norm": span(norms),
        "level_drift": span(drifts),
        "tracked": len(large) + len(small) + len(scalars),  # of an η or α memory W2 is the third
        "matrix_drift": span(large),
        "row_drift": span(small),
        "memory_drift": span(scalars),
    }


def level_norm(d, h):
    """What torch's initialisation gives a level: LayerNorm of ones, two matrices and their biases, uniform."""
    return (d + h / 3 + d / 3 + h / (3 * d) + d / (3 * h)) ** 0.5


def level_drift(d, h):
    """The distance of two such levels."""
    return (2 * (h / 3 + d / 3 + h / (3 * d) + d / (3 * h))) ** 0.5


def distance(tensors, others=None):
    """Of weights taken as one vector; without others, from zero."""
    tensors = [t.detach().double() for t in tensors]
    others = [t.detach().double() for t in others] if others else [0.0] * len(tensors)
    return sum(float((t - o).square().sum()) for t, o in zip(tensors, others, strict=True)) ** 0.5


def reading_figures(model, windows):
    """One plain forward pass a window: cosines a layer, and every token's loss."""
    import torch
    import torch.nn.functional as F

    outputs, hooks = {}, []
    for i, block in enumerate(model.blocks):
        for name, level in block.cms.blocks.items():
            hooks.append(
                level.register_forward_hook(
                    lambda _, args, out, at=(i, name): outputs.__setitem__(at, (out, out - args[0]))
                )
            )
    cosines, losses = [], []
    for batch in windows:
        tokens, lengths = torch.from_numpy(batch.tokens), torch.from_numpy(batch.lengths)
        with torch.no_grad():
            logits = model(tokens[:, :-1])
        mask = torch.arange(tokens.shape[1] - 1) < lengths[:, None]
        losses.append(F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")[mask])
        pairs = [(outputs[i, "fast"], outputs[i, "slow"]) for i in range(len(model.blocks))]
        both = [[F.cosine_similarity(a[k], b[k], dim=-1)[mask] for a, b in pairs] for k in (0, 1)]
        cosines.append(torch.stack([torch.stack(of_kind) for of_kind in both]))
    for hook in hooks:
        hook.remove()
    by_layer = torch.cat(cosines, dim=2).mean(dim=2)  # (output or delta, layer)
    loss = torch.cat(losses)
    return {
        "output_cosine": float(by_layer[0].mean()),
        "output_cosine_by_layer": by_layer[0].tolist(),
        "delta_cosine": span(by_layer[1].tolist()),
        "loss_mean": float(loss.mean()),
        "loss_std": float(loss.std()),
        "loss_min": float(loss.min()),
        "loss_p10": float(loss.quantile(0.1)),
        "loss_p50": float(loss.median()),
        "tokens": len(loss),
        **{f"gate_{t}": float((loss > t).float().mean()) for t in THRESHOLDS},
    }


def fast_figures(subject, windows):
    """Fast weights after a few tokens that the package reads and writes, of each memory: its matrices as one vector."""
    import torch

    batch = next(iter(windows))
    memories = [name.partition(".")[2] for name in subject.write_periods() if name.startswith("selfmod.")]
    drift, ratio = [], []
    for row in subject.run(torch.from_numpy(batch.tokens[:4, : LENGTH + 1])).state:
        for block, state in zip(subject.module.peer.blocks, row.fast.blocks, strict=True):
            for memory in memories:
                start, end = getattr(block.selfmod, f"m_{memory}"), getattr(state.selfmod_state, memory)
                names = [name for name in ("w1", "w2", "w_skip") if getattr(end, name) is not None]
                meta = [getattr(start, name).weight for name in names]
                fast = [getattr(end, name)[0] for name in names]
                drift.append(distance(fast, meta) / distance(meta))
                ratio.append(distance(fast) / distance(meta))
    return {"relative_drift": span(drift), "norm_ratio": span(ratio)}


def span(values):
    """Lowest and highest."""
    values = list(values)
    return [min(values), max(values)]


# -- measuring, and the table --------------------------------------------------------------------------------------


def measure():
    """Everything, as plain data."""
    from hopeprobe import analyze
    from hopeprobe.probes import PROBES
    from hopeprobe.tokens import EvalWindows, load_tokens

    subject, text = claimed(), load_tokens("builtin")
    windows = EvalWindows(text, "heldout", context=CONTEXT, tokens=TOKENS, batch=4)
    started = time.monotonic()
    figures = weight_figures(subject.module.peer, subject.own_init().module.peer)
    figures |= reading_figures(subject.module.peer, windows)
    figures |= fast_figures(subject, windows)
    seconds = {"figures": round(time.monotonic() - started)}

    started = time.monotonic()
    results = analyze(
        subject,
        [name for name in PROBES if name in {figure.probe for figure in INSIDE}],
        data=text,
        tokens=MEASURED,
        batch=8,
        fresh=FRESH,
        fresh_tokens=FRESH_TOKENS,
        progress=lambda what, done, total: print(f"{what}: {done}/{total}", end="\r", file=sys.stderr),
    )
    seconds["hopeprobe"] = round(time.monotonic() - started)
    versions = {name: metadata.version(name) for name in ("nested-learning", "hopeprobe", "torch")}
    document = {
        "what": "hope_selfmod of nested-learning, seed 1, said to be step 2,000 of a run that began at seed 0",
        "command": "make reconstruction",
        "versions": versions,
        "seconds": seconds,
        "config": CONFIG,
        "figures": {key: rounded(value) for key, value in figures.items()},
    }
    return document, judging(results)


def judging(results):
    """The rows that judge a figure, and their nulls, with as many digits as a table needs."""
    rows = [row for row in results.rows if any(judges(row, figure) for figure in (INTEGRITY, MEAN, *INSIDE))]
    kept = {row.key for row in rows}
    nulls = [null for null in results.null_rows if null.key[:-1] in kept]
    return Results(
        map(with_six_digits, rows), map(with_six_digits, nulls),
        checkpoint=results.checkpoint, data=results.data, versions=results.versions,
    )  # fmt: skip


def with_six_digits(row):
    """Beyond is what two machines may have different."""
    fields = dataclasses.asdict(row)
    return dataclasses.replace(row, **{k: rounded(v) for k, v in fields.items() if isinstance(v, float)})


def rounded(value):
    """Six digits are enough for a table."""
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def shown(key, value):
    """A figure, with the digits that the study gives its own."""
    if key == "tracked":
        return str(value)
    style = next((style for part, style in STYLES.items() if part in key), "{:.1f}")
    texts = [style.format(v).replace("-", "−") for v in (value if isinstance(value, list) else [value])]
    return " to ".join(dict.fromkeys(texts))


def judges(row, figure):
    """Whether a row of results is one of those that judge a figure."""
    return (
        row.probe == figure.probe
        and re.fullmatch(figure.statistic, row.statistic) is not None
        and re.fullmatch(figure.component, row.component) is not None
    )


def verdicts(results, figure):
    """How rows were judged, counted, and how many notes say that these are other initial weights than the run's."""
    if not figure.probe:
        return "a count"
    rows = [row for row in results.rows if judges(row, figure)]
    counts = Counter(map(str, (row.verdict for row in rows)))
    counted = ", ".join(f"{verdict} ({n})" for verdict, n in sorted(counts.items())) or "not measured"
    alike = sum("another initialisation" in row.note for row in rows)
    return f"{figure.probe}: {counted}" + (f"; {alike} say: another initialisation" if alike else "")


def figures_in_order():
    """What the table has a row of: all that the study printed."""
    for figure in INSIDE:
        if figure.probe != "integrity":
            yield figure
        if figure.key in AFTER:
            yield AFTER[figure.key]


def table(document, results):
    """The table, Markdown."""
    lines = [
        "| quantity | published | never trained | hopeprobe's verdict (rows) |",
        "|---|---|---|---|",
        f"| {INTEGRITY.quantity} | {INTEGRITY.printed} | initial | {verdicts(results, INTEGRITY)} |",
    ]
    for figure in figures_in_order():
        quantity = figure.quantity + (f", {LENGTH} tokens" if figure.probe == "meta-fast" else "")
        value = shown(figure.key, document["figures"][figure.key])
        lines.append(f"| {quantity} | {figure.printed} | {value} | {verdicts(results, figure)} |")
    return "\n".join(lines)


def page(document, results):
    """The table with what it takes to read it."""
    model, data, figures = document["config"]["model"], results.data, document["figures"]
    d, made = model["dim"], document["versions"]
    norm, drift, projections = level_norm(d, 4 * d), level_drift(d, 4 * d), (2 * d / 3) ** 0.5
    return f"""# Sections 4.2 to 4.4 of "Dissecting HOPE", without any training

Made by `{document["command"]}`, do not edit. The model is `hope_selfmod` of nested-learning {made["nested-learning"]}
at the study's small size (dim {d}, {model["num_layers"]} layers), with initial weights of seed {SEED}; its file says
step {STEPS:,} of a run that began at seed {OWN_SEED}. *Never trained* is computed with the package and arithmetic
alone, on {figures["tokens"]:,} tokens; the verdicts are hopeprobe's, on {data["tokens"]:,} tokens of
{data["documents"]} documents. Text: `builtin`, held out.

{table(document, results)}

No figure needs training. With h = 4d a level's norm is √(d + h/3 + d/3 + h/(3d) + d/(3h)) = {norm:.2f}; two levels lie
{drift:.2f} apart, two projections √(2d/3) = {projections:.2f}, two rows √(2/3) = 0.82. That the study's checkpoints
were like this is an inference from the numbers; its code is not public. `untrained` is what hopeprobe says of weights
that are another initialisation than the run's, and then of every number that the rule leaves open; `at-init` of one
that the run had before any training; `collapsed` of fast weights of which nothing is left: such is a drift of 1.0.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--page", action="store_true", help="make the page anew from the committed numbers, no more"
    )
    if not parser.parse_args().page:
        document, results = measure()
        FIGURES.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        results.write_json(RESULTS)
    document = json.loads(FIGURES.read_text(encoding="utf-8"))
    results = Results.read_json(RESULTS)
    PAGE.write_text(page(document, results), encoding="utf-8")
    print(table(document, results))


if __name__ == "__main__":
    main()
