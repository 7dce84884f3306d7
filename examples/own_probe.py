"""A probe of your own: how much does each layer change the residual stream?

relative_update   mean_t ‖post_t − pre_t‖ / ‖pre_t‖   for each layer, in [0, ∞)

python examples/own_probe.py runs/mine/step-000200.pt my-text.jsonl
"""

import re
import sys

import numpy as np

import hopeprobe
from hopeprobe.stats import GroupedMean, as_float64, mean_of


class LayerUpdate(hopeprobe.Probe):
    """The question, and what it reads."""

    name = "layer-update"
    question = "How much does each layer change the residual stream?"
    statistics = ("relative_update",)

    def applies(self, subject):
        return None if self.hooks(subject) else "this model has no residual stream"

    def hooks(self, subject):
        return [name for name in subject.module.hook_dict if re.search(r"hook_resid_(pre|post)$", name)]

    def accumulator(self, subject, condition, windows):
        return Updates(condition)


class Updates(hopeprobe.Accumulator):
    """Sums for each group of documents; no activation is kept."""

    def update(self, cache, losses, scored, batch):
        for name in (name for name in cache if name.endswith("hook_resid_pre")):
            before, after = as_float64(cache[name]), as_float64(cache[name.replace("_pre", "_post")])
            change = np.linalg.norm(after - before, axis=-1) / np.linalg.norm(before, axis=-1)
            mean = self.moments.setdefault(name.split(".")[1], GroupedMean())
            mean.update(change, scored, batch.group)

    def quantities(self):
        for layer, mean in self.moments.items():
            place = hopeprobe.Place("relative_update", int(layer))
            yield hopeprobe.Quantity(
                place, "1", mean_of, lambda mean=mean: (mean,), (0.0, np.inf), smallest_effect=0.05
            )


if __name__ == "__main__":
    results = hopeprobe.analyze(sys.argv[1], LayerUpdate(), data=sys.argv[2:] or "builtin", tokens=8192)
    print(results.table[["layer", "value", "ci_low", "ci_high", "verdict"]].to_string(index=False))
    results.plot("layer-update").savefig("layer-update.png")
