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
import json
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).with_suffix(".json")
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
    # Windows of 32 tokens for hopeprobe: each shows one write of every memory and level, and many documents are cheap.
    "data": {"seq_len": 32},
    "train": {"use_fast_state": True},
    "optim": {"type": "adamw", "lr": 3e-4},
}
STEPS = 2000
OWN_SEED, SEED = 0, 1
CONTEXT, TOKENS = 512, 16_384  # of the plain figures
MEASURED, FRESH, FRESH_TOKENS = 1280, 5, 512  # of hopeprobe's
THRESHOLDS = (5, 10, 20, 50)
COLUMNS = (
    "probe", "statistic", "condition", "layer", "component", "position",
    "value", "ci_low", "ci_high", "verdict", "note",
)  # fmt: skip
STYLES = {
    "ratio": "{:.0e}",
    "gate": "{:.2%}",
    "relative": "{:.3f}",
    "cosine": "{:.2f}",
    "level": "{:.2f}",
    "drift": "{:.2f}",
}

LARGE = "k.w1 k.w2 v.w1 v.w2 q.w1 q.w2 memory.w1 memory.w2"
SMALL = "eta.w1 eta.w_skip alpha.w1 alpha.w_skip"
MEMORIES = "selfmod.k selfmod.v selfmod.eta selfmod.alpha selfmod.memory"
# What was published, the plain figure that stands beside it, and the rows that judge it: probe, statistic, components.
ROWS = (
    ("CMS level L2 norm", "~26.15, within 0.2 %", "level_norm", ("cms-dynamics", "weight_norm", "")),
    ('CMS "inter-checkpoint drift"', "29.2–29.3", "level_drift", ("cms-dynamics", "displacement", "")),
    ("self-modification parameters tracked", "84", "tracked", None),
    ("drift of large projections", "≈ 13, flat", "matrix_drift", ("selfmod-drift", "displacement", LARGE)),
    ("drift of small components: a row", "≈ 0.8", "row_drift", ("selfmod-drift", "displacement", SMALL)),
    (
        "… and the mean of an η or α memory",
        "≈ 5",
        "memory_drift",
        ("selfmod-drift", "displacement", "eta alpha"),
    ),
    (
        "cosine of fast and slow outputs",
        "mean 0.77",
        "output_cosine",
        ("cms-similarity", "output_cosine", ""),
    ),
    ("cosine of what the levels add", "not reported", "delta_cosine", ("cms-similarity", "delta_cosine", "")),
    ("per-token loss, mean", "66.7", "loss_mean", ("surprise", "mean_loss", "")),
    ("per-token loss, standard deviation", "16.5", "loss_std", ("surprise", "loss_std", "")),
    ("per-token loss, smallest", "9.3", "loss_min", ("surprise", "loss_quantile", "min")),
    ("per-token loss, 10th percentile", "45.0", "loss_p10", ("surprise", "loss_quantile", "p10")),
    ("gate open at τ = 5", "100 %", "gate_5", ("gate-selectivity", "pass_rate", "tau=5")),
    ("gate open at τ = 10", "99.97 %", "gate_10", ("gate-selectivity", "pass_rate", "tau=10")),
    ("gate open at τ = 20", "99.8 %", "gate_20", ("gate-selectivity", "pass_rate", "tau=20")),
    ("gate open at τ = 50", "83.6 %", "gate_50", ("gate-selectivity", "pass_rate", "tau=50")),
    (
        "‖θ_fast − θ_meta‖ / ‖θ_meta‖, 16 tokens",
        "≈ 1.0",
        "relative_drift",
        ("meta-fast", "relative_drift", MEMORIES),
    ),
    ("‖θ_fast‖ / ‖θ_meta‖, 16 tokens", "not reported", "norm_ratio", ("meta-fast", "norm_ratio", MEMORIES)),
)


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
        "tokens": len(loss),
        **{f"gate_{t}": float((loss > t).float().mean()) for t in THRESHOLDS},
    }


def fast_figures(subject, windows):
    """Fast weights after 16 tokens that the package reads and writes, of each memory: its matrices as one vector."""
    import torch

    batch = next(iter(windows))
    drift, ratio = [], []
    for row in subject.run(torch.from_numpy(batch.tokens[:4, :17])).state:
        for block, state in zip(subject.module.peer.blocks, row.blocks, strict=True):
            for memory in subject.module.memories:
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
    wanted = {row[3][0] for row in ROWS if row[3]}
    results = analyze(
        subject,
        [name for name in PROBES if name in {"integrity", *wanted}],
        data=text,
        tokens=MEASURED,
        batch=8,
        fresh=FRESH,
        fresh_tokens=FRESH_TOKENS,
        progress=lambda what, done, total: print(f"{what}: {done}/{total}", end="\r", file=sys.stderr),
    )
    seconds["hopeprobe"] = round(time.monotonic() - started)
    kept = [
        {c: rounded(row[c]) for c in COLUMNS if row[c] not in (None, "")}
        for row in json.loads(results.to_json())["results"]
        if row["probe"] == "integrity" or any(matches(row, *judged) for *_, judged in ROWS if judged)
    ]
    versions = {name: metadata.version(name) for name in ("nested-learning", "hopeprobe", "torch")}
    return {
        "what": "hope_selfmod of nested-learning, seed 1, said to be step 2,000 of a run that began at seed 0",
        "command": "make reconstruction",
        "versions": versions,
        "seconds": seconds,
        "config": CONFIG,
        "figures": {key: rounded(value) for key, value in figures.items()},
        "missing": results.checkpoint["missing"],
        "data": results.data,
        "results": kept,
    }


def rounded(value):
    """Six digits are enough for a table, and the same on every machine that has the same torch."""
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


def matches(row, probe, statistic="", components=""):
    """Whether a row of results is one of those that judge a figure."""
    return (
        row["probe"] == probe
        and statistic in ("", row["statistic"])
        and (not components or row.get("component") in components.split())
    )


def verdicts(document, *judged):
    """How rows were judged, counted, and how many notes say that these are other initial weights than the run's."""
    rows = [row for row in document["results"] if matches(row, *judged)]
    counts = Counter(row["verdict"] for row in rows)
    counted = ", ".join(f"{verdict} ({n})" for verdict, n in sorted(counts.items())) or "not measured"
    alike = sum("another initialisation" in row.get("note", "") for row in rows)
    return f"{judged[0]}: {counted}" + (f"; {alike} say: another initialisation" if alike else "")


def table(document):
    """The table, Markdown."""
    lines = [
        "| quantity | published | never trained | hopeprobe's verdict (rows) |",
        "|---|---|---|---|",
        f"| the weights | of training steps 200 to 2,000 | initial | {verdicts(document, 'integrity')} |",
    ]
    for quantity, published, key, judged in ROWS:
        verdict = verdicts(document, *judged) if judged else "a count"
        lines.append(f"| {quantity} | {published} | {shown(key, document['figures'][key])} | {verdict} |")
    return "\n".join(lines)


def page(document):
    """The table with what it takes to read it."""
    model, data, figures = document["config"]["model"], document["data"], document["figures"]
    d, made = model["dim"], document["versions"]
    norm, drift, projections = level_norm(d, 4 * d), level_drift(d, 4 * d), (2 * d / 3) ** 0.5
    return f"""# Sections 4.2 to 4.4 of "Dissecting HOPE", without any training

Made by `{document["command"]}`, do not edit. The model is `hope_selfmod` of nested-learning {made["nested-learning"]}
at the study's small size (dim {d}, {model["num_layers"]} layers), with initial weights of seed {SEED}; its file says
step {STEPS:,} of a run that began at seed {OWN_SEED}. *Never trained* is computed with the package and arithmetic
alone, on {figures["tokens"]:,} tokens; the verdicts are hopeprobe's, on {data["tokens"]:,} tokens of
{data["documents"]} documents. Text: `builtin`, held out.

{table(document)}

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
        RESULTS.write_text(json.dumps(measure(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(document), encoding="utf-8")
    print(table(document))


if __name__ == "__main__":
    main()
