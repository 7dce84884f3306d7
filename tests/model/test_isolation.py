"""A value that is not finite stays in its own sequence, and is named there: first token, layer, memory."""

import dataclasses
import math

import pytest
import torch

from hopeprobe.hooks import place_of, watching_finite
from hopeprobe.model.config import CMSLevel, GateConfig, ModelConfig
from hopeprobe.model.finite import first_not_finite
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.state import average_rows, map_state, select_rows
from hopeprobe.model.subject import HopeSubject

TINY = ModelConfig(
    vocab_size=61,
    dim=16,
    layers=2,
    context=16,
    heads=2,
    cms_levels=(CMSLevel("fast", 8), CMSLevel("slow", 16)),
)
BAD, AT, ROWS = 2, 11, 4
OTHERS = [row for row in range(ROWS) if row != BAD]
CONFIGS = {
    "full": TINY,
    "titans": dataclasses.replace(TINY, variant="titans"),
    "hope-attention": dataclasses.replace(TINY, variant="hope-attention"),
    "transformer": dataclasses.replace(TINY, variant="transformer"),
    "long-chunks": dataclasses.replace(TINY, chunk_memory=16),
}


def made(name, seed=0):
    model = HopeModel(CONFIGS[name], seed=seed)
    tokens = torch.randint(0, 61, (ROWS, 25), generator=torch.Generator().manual_seed(1))
    return model, tokens


def bits(x):
    return x.detach().contiguous().view(torch.int32 if x.dtype == torch.float32 else x.dtype)


def same_bits(one, other):
    differ = []
    map_state(lambda a, b: differ.append(not torch.equal(bits(a), bits(b))) or a, one, other)
    return bool(differ) and not any(differ)


def spoilt(value):
    """A hook that spoils one token of one sequence, or all of its weights; with None it gives back a copy."""
    read = {}

    def edit(tensor, hook):
        start, tensor = read.get(hook.name, 0), tensor.clone()
        if "pos" not in hook.spec.dims:
            here = slice(None)
        else:
            read[hook.name] = start + tensor.shape[1]
            here = slice(AT - start, AT - start + 1) if start <= AT < start + tensor.shape[1] else slice(0, 0)
        if value is not None:
            tensor[BAD, here] = value
        return tensor

    return edit


def fed(model, tokens, hooks=(), state=None):
    with model.hooks(hooks, allow_unfired=True), watching_finite(model) as origins:
        losses, state = model.feed(state or model.init_state(len(tokens)), tokens)
    return losses, state, origins


def check_edits(name, value, points):
    """Spoil one point after the other; gives how often the sequence was named at the token that was edited."""
    model, tokens = made(name)
    named = 0
    for point in points(model):
        losses, state, none = fed(model, tokens, [(point, spoilt(None))])
        assert not none
        got, after, origins = fed(model, tokens, [(point, spoilt(value))])
        assert torch.equal(bits(got[OTHERS]), bits(losses[OTHERS])), point
        assert same_bits(select_rows(after, OTHERS), select_rows(state, OTHERS)), point
        assert set(origins) <= {BAD}, point
        named += BAD in origins and origins[BAD].token == AT
    return named


@pytest.mark.parametrize(
    "name",
    [
        "titans",
        "hope-attention",
        "transformer",
        pytest.param("full", marks=pytest.mark.slow),
        pytest.param("long-chunks", marks=pytest.mark.slow),
    ],
)
def test_whatever_is_edited_in_one_sequence_leaves_every_bit_of_the_others(name):
    def points(model):
        return [
            point.name
            for point in model.hook_dict.values()
            if point.spec.editable and ".1." not in point.name
        ]

    assert check_edits(name, math.nan, points) > 3


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_so_do_values_that_overflow(value):
    assert check_edits(
        "full", value, lambda _: ["hook_embed", "blocks.0.selfmod.hook_v", "blocks.1.hook_resid_post"]
    )


def test_what_is_edited_is_what_is_named():
    model, tokens = made("full")
    named = {}
    for point in (
        "hook_embed",
        "blocks.0.selfmod.hook_k",
        "blocks.1.cms.slow.hook_in",
        "blocks.1.selfmod.hook_eta",
    ):
        named[point] = str(fed(model, tokens, [(point, spoilt(math.nan))])[2][BAD])
    assert named == {
        # A hook sees what those before it gave: the first that sees the edit comes after it.
        "hook_embed": "token 11, outside the layers (hook_embed)",
        "blocks.0.selfmod.hook_k": "token 11, layer 0, memory k (blocks.0.selfmod.hook_k)",
        "blocks.1.cms.slow.hook_in": "token 11, layer 1, cms level slow (blocks.1.cms.slow.hook_in)",
        "blocks.1.selfmod.hook_eta": "token 11, layer 1, memory eta (blocks.1.selfmod.hook_eta)",
    }


@pytest.mark.parametrize("name", ["titans", "hope-attention", "long-chunks"])
def test_whatever_is_spoilt_of_one_sequences_state_leaves_every_bit_of_the_others(name):
    model, tokens = made(name)
    _, begun, _ = fed(model, tokens[:, :13])
    losses, state, _ = fed(model, tokens[:, 13:], state=begun)
    tensors = []
    map_state(lambda t: tensors.append(t.is_floating_point() and t.numel() > 0) or t, begun)
    reached = 0
    for i in (i for i, usable in enumerate(tensors) if usable):
        count = iter(range(len(tensors)))

        def spoil(t, i=i, count=count):
            if next(count) != i:
                return t
            t = t.clone()
            t[BAD] = math.nan
            return t

        got, after, origins = fed(model, tokens[:, 13:], state=map_state(spoil, begun))
        assert torch.equal(bits(got[OTHERS]), bits(losses[OTHERS])), i
        assert same_bits(select_rows(after, OTHERS), select_rows(state, OTHERS)), i
        assert set(origins) <= {BAD}, i
        reached += BAD in origins
    assert reached > 3


def test_a_loss_that_overflows_stays_where_it_is():
    """Fast weights so large that what they answer is no number any more."""
    model, tokens = made("full")
    _, begun, _ = fed(model, tokens[:, :9])
    losses, state, _ = fed(model, tokens[:, 9:], state=begun)

    def huge(t):
        t = t.clone()
        t[BAD] *= 1e30
        return t

    layer = begun.layers[1]
    groups = tuple(type(g)(*map(huge, g)) for g in layer.selfmod.groups)
    spoilt_layer = layer._replace(selfmod=layer.selfmod._replace(groups=groups))
    got, after, origins = fed(
        model, tokens[:, 9:], state=begun._replace(layers=(begun.layers[0], spoilt_layer))
    )
    assert not bool(got[BAD].isfinite().all())
    assert torch.equal(bits(got[OTHERS]), bits(losses[OTHERS]))
    assert same_bits(select_rows(after, OTHERS), select_rows(state, OTHERS))
    assert set(origins) == {BAD}
    assert place_of(origins[BAD].point).startswith("layer 1, ")


@pytest.mark.parametrize("rule", ["quantile", "zscore", "momentum", "random"])
def test_gates_of_the_others_count_as_if_it_were_not_there(rule):
    config = dataclasses.replace(TINY, gate=GateConfig(rule, 0.3, history=16))
    model = HopeModel(config, seed=0)
    tokens = made("full")[1]
    losses, state, _ = fed(model, tokens)
    got, after, origins = fed(model, tokens, [("blocks.0.selfmod.hook_out", spoilt(math.nan))])
    assert set(origins) == {BAD}
    # With closed gates what is written together depends on all rows, so that sums are made in another order.
    torch.testing.assert_close(got[OTHERS], losses[OTHERS], rtol=0, atol=2e-6)
    for field in ("scores", "owed", "mean", "square", "chain"):
        one, other = (getattr(s.gate, field)[OTHERS] for s in (after, state))
        within = (
            2e-4 if rule == "zscore" and field == "scores" else 2e-5
        )  # over a deviation that may be small
        torch.testing.assert_close(one, other, rtol=0, atol=within, equal_nan=True)
    assert bool(state.gate.owed.isfinite().all())


def test_an_average_takes_nothing_from_a_row_of_no_weight():
    x = torch.randn(4, 3, 5)
    x[BAD] = math.nan
    weights = torch.eye(4)
    weights[3, BAD] = 0.5
    averaged = average_rows(x, weights)
    assert torch.equal(averaged[:2], x[:2])
    assert bool(averaged[2].isnan().all())
    assert bool(averaged[3].isnan().all())
    subject = HopeSubject(HopeModel(TINY))
    state = subject.init_state(4)
    state.layers[0].selfmod.groups[0].w2[BAD] = math.nan
    swapped = subject.average_rows(state, torch.eye(4)[[1, 0, 2, 3]])
    assert [bool(row.isfinite().all()) for row in swapped.layers[0].selfmod.groups[0].w2] == [
        True,
        True,
        False,
        True,
    ]


def test_training_says_which_sequence_and_token(monkeypatch):
    model, tokens = made("full")
    with model.hooks([("blocks.1.selfmod.hook_v", spoilt(math.nan))]):
        assert first_not_finite(model, tokens) == (
            "sequence 2 of the batch, token 11, layer 1, memory v (blocks.1.selfmod.hook_v)"
        )
    with model.hooks([("blocks.1.selfmod.hook_v", spoilt(math.nan))]):
        assert first_not_finite(model, tokens, 3, 9).startswith("sequence 5 of the batch, token 11")
    assert first_not_finite(model, tokens) is None
    with torch.no_grad():
        model.blocks[0].norm.weight.fill_(math.nan)
    assert first_not_finite(model, tokens).endswith("; 4 of the 4 sequences are not finite")
    assert first_not_finite(model, tokens[1:3], 1, 4).endswith("; 2 of sequences 1 to 2 are not finite")
