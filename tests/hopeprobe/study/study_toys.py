"""Grids made by hand: losses are given, everything else is plausible."""

from hopeprobe.study import Cell, Grid

MODEL = {"dim": 64, "layers": 2, "context": 128}
TRAIN = {"steps": 200, "batch": 8, "learning_rate": 3e-3}
DATA = {"name": "sample.jsonl", "fingerprint": "f", "n_documents": 100}
EVALUATION = {"tokens": 4096, "documents": 20, "epochs": 0.2}


def cell(name, seed, live, **more):
    """`frozen` is 0.02 above `live` unless given."""
    given = {
        "variant": name, "steps": 200, "status": "done", "parameters": 1000, "first_batch": f"digest {seed}",
        "frozen": live + 0.02, "gate_rate": 1.0, "surprise_min": 0.5,
        "curve": {"step": [100, 150, 200], "loss": [live + 1, live + 0.5, live], "held_out_step": [200],
                  "live": [live], "frozen": [live + 0.02]},
    }  # fmt: skip
    if live != live:
        given["curve"] = {}
    return Cell(name=name, seed=seed, live=live, **(given | more))


def grid(cells, model=MODEL, train=TRAIN, preset="tiny", data=DATA, evaluation=EVALUATION):
    return Grid(preset, model, train, data, evaluation, ({"cores": 2},), tuple(cells))
