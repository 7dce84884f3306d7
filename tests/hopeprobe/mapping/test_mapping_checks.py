"""Every way in which a map may not hold of a model, planted and found before anything is measured."""

import pytest
import torch
from chunked import Memory, Model
from torch import nn

from hopeprobe.errors import BadInputError
from hopeprobe.mapping import subject_of

FAST = ("memory", "memory", "fast", "w")


class LooksAhead(Model):
    def forward(self, tokens):
        out = super().forward(tokens)
        return {"logits": out["logits"] + 1e-2 * self.head(self.embed(tokens).mean(1, keepdim=True))}


class LooksAheadInItsChunk(Model):
    """As a memory that writes a chunk and reads it then: what comes in later chunks is not seen."""

    def forward(self, tokens):
        out, seen = super().forward(tokens), self.embed(tokens)
        ends = torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in seen.split(4, dim=1)], dim=1)
        return {"logits": out["logits"] + 1e-2 * self.head(ends)}


class MixesRows(Model):
    def forward(self, tokens):
        out = super().forward(tokens)
        return {"logits": out["logits"] + 1e-2 * self.head(self.embed(tokens[:, :1]).mean(0, keepdim=True))}


class Noisy(Model):
    def forward(self, tokens):
        return {"logits": nn.functional.dropout(super().forward(tokens)["logits"], 0.1, training=True)}


class Twice(Model):
    def forward(self, tokens):
        super().forward(tokens)
        return super().forward(tokens)


class Sums(Model):
    def forward(self, tokens):
        return {"logits": super().forward(tokens)["logits"].sum(1)}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (LooksAhead, "logits change with tokens that come later"),
        (LooksAheadInItsChunk, "logits change with tokens that come later"),
        (MixesRows, "a row's logits change with the other row of its batch"),
        (Noisy, "other logits of the same tokens each time"),
        (Twice, "hook_fast_w: 5 writes of 8 tokens, and a period of 4 makes 2"),
        (Sums, r"output.logits of the model is \[1, 23\] for tokens \[1, 8\]"),
    ],
)
def test_models_that_are_not_measured(edited, kind, message):
    torch.manual_seed(0)
    with pytest.raises(BadInputError, match=message):
        subject_of(kind(), edited("model", "context", 16))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "context"), None, "context is missing"),
        (("model", "vocab_size"), 50, "vocab_size is 50, and there are 23 logits"),
        (("model", "logits"), "output.logit", "there is no 'logit' in a dict; it has logits"),
        (("points", "blocks.{layer}.hook_x"), "layer.{layer}", "'layer.{layer}'; did you mean 'layers.{layer}'"),
        (("points", "hook_x"), "layers.{layer}", "{layer} must stand in the point's name and its module's"),
        (("points", "hook_x"), {"module": "embed", "method": "read"}, "embed is a Embedding, without 'read'"),
        (("points", "hook_x"), {"module": "embed", "dims": "batch pos"}, "'hook_x' declares [batch pos]"),
        (("points", "hook_x"), {"module": "head", "value": "output.0"}, "there is no '0' in a Tensor"),
        (("points", "hook_surprise"), "head", "hook_surprise is there already"),
        (("points", "hook_x"), {"module": "layers.0", "method": "half"}, "the forward pass never came by layers.0"),
        ((*FAST, "meta"), "layers.{layer}.memory.begin", "no parameter; did you mean"),
        ((*FAST, "meta"), "layers.{layer}.memory.to_step.weight", "fast weights of a row are [8, 8], and"),
        ((*FAST, "meta"), "layers.{layer}.memory.to_key.weight", "either it does not freeze, or they start elsewhere"),
        ((*FAST, "initial"), False, "3 writes of 8 tokens, and a period of 4 makes 2"),
        (("memory", "memory", "period"), 8, "writes of 16 tokens, and a period of 8 makes 2"),
        (("memory", "memory", "freeze"), {"blocks.{layer}.memory.hook_step": float("-inf")}, "it does not freeze"),
        (("memory", "memory", "freeze"), {"blocks.{layer}.memory.hook_step": -3.0}, "it does not freeze"),
        (("groups", "embed"), ["embeddings"], "there are no weights in 'embeddings'; did you mean 'embed'"),
    ],
)  # fmt: skip
def test_maps_that_do_not_hold(edited, model, path, value, message):
    made = edited("model", "context", 16)
    with pytest.raises(BadInputError) as caught:
        subject_of(model, edited(*path, value, of=made))
    assert message in str(caught.value)


def test_a_module_that_runs_twice_is_told_from_one_that_runs_in_parts(edited, model):
    parts = edited("points", "hook_x", {"module": "layers.0.memory.to_key", "dims": "batch pos d_model"})
    assert "hook_x" in subject_of(model, parts).module.hook_dict, "a chunk at a time, all of them once"
    with pytest.raises(
        BadInputError, match=r"hook_resid_post: it fired with 16 \+ 16 positions for 16 tokens"
    ):
        subject_of(Twice(), {**parts, "memory": {}})


def test_a_point_inside_torch_func_is_not_shown(edited, model):
    class Inside(Memory):
        def forward(self, x):
            torch.func.vmap(self.to_value)(x)
            return super().forward(x)

    model.layers[0].memory = Inside(8)
    made = edited("points", "hook_v", {"module": "layers.0.memory.to_value", "dims": "batch pos d_model"})
    with pytest.raises(BadInputError, match=r"hook_v: it is inside torch\.func"):
        subject_of(model, made)


class ByIdentity(nn.Module):
    """Goes another way for any tensor but its own: a copy of it changes what the model does."""

    def __init__(self, whole):
        super().__init__()
        self.whole = whole

    def forward(self, x):
        self.whole.given = self.whole.first(x)
        return self.whole(self.whole.given)


class Way(nn.Linear):
    def first(self, x):
        return x + 1

    def forward(self, x):
        return super().forward(x) * (1 if x is self.given else 2)


def test_a_point_where_a_copy_changes_the_model_is_found(edited, model):
    model.layers[1].level = ByIdentity(Way(8, 8))
    made = edited("points", "hook_x", {"module": "layers.1.level.whole", "value": "input.0"})
    with pytest.raises(BadInputError, match="hook_x: a copy put in its place changes the logits"):
        subject_of(model, made)


def test_weights_that_are_not_finite_are_for_probes_to_tell(edited, model):
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    assert (
        subject_of(model, edited("model", "context", 16))
        .run(torch.zeros(1, 5, dtype=torch.int64))
        .losses.isnan()
        .any()
    )
