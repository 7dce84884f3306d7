"""Outputs and logits with fast and with meta weights: known answers, a reference that asks the layers themselves."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from hopeprobe.analysis import analyze
from hopeprobe.errors import MeasurementError
from hopeprobe.model.config import CMSLevel, ModelConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.subject import HopeSubject
from hopeprobe.probes.base import Place
from hopeprobe.probes.meta_fast_outputs import kl, mechanisms_of, read_outputs, relative_distance
from hopeprobe.subject import MissingCapability, Subject
from hopeprobe.tokens import EvalWindows, TokenData

VOCAB = 37
CONFIG = ModelConfig(vocab_size=VOCAB, dim=8, layers=2, context=72, heads=2, embed_std=0.5)
CHAIN = dataclasses.replace(CONFIG, cms_mode="chain", decay_target="zero", query="static", chunk=16)
LENGTHS = [72, 71, 40, 39, 72, 8]


def make(config=CONFIG, dtype=torch.float64):
    return HopeSubject(HopeModel(config, 0, dtype))


def batches_of(batch=4, lengths=LENGTHS):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, VOCAB, n + 1) for n in lengths]
    data = TokenData.from_documents(documents, name="text", vocab_size=VOCAB, end_of_text=0)
    return list(EvalWindows(data, "all", context=72, tokens=None, batch=batch))


def place(name, layer=None, component="", position=32):
    return Place(name, layer, component, str(position))


def at_meta(block, held):
    """A layer's state with fast weights at meta weights; what the convolution has read stays."""
    fresh = block.init_state(1)
    return fresh._replace(selfmod=fresh.selfmod._replace(conv_tail=held.selfmod.conv_tail))


@torch.no_grad()
def reference(model, window, position):
    """Every row of one window: each layer and level read twice at the inputs of the live stream."""
    state = model(window[None, : position + 1]).state
    layers = tuple(at_meta(block, held) for block, held in zip(model.blocks, state.layers, strict=True))
    reset = state._replace(layers=layers)
    tokens = window[None, position : position + 8]
    found = {}

    def distance(live, meta):
        pairs = zip(live[0].numpy(), meta[0].numpy(), strict=True)
        return np.mean([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])

    x = model.embed[tokens]
    for i, block in enumerate(model.blocks):
        live, meta = state.layers[i], reset.layers[i]
        normed = block.norm(x)
        y = [block.selfmod.read(normed, block.selfmod.stacked(), held.selfmod)[0] for held in (live, meta)]
        found[place("output_divergence", i, "selfmod", position)] = distance(*y)
        current = x + y[0]
        for level, fast, slow in zip(block.cms.level_list(), live.cms, meta.cms, strict=True):
            out = [level.read(current, held)[0] for held in (fast, slow)]
            added = [one - current for one in out]
            found[place("output_divergence", i, f"cms.{level.spec.name}", position)] = distance(*added)
            current = out[0] if block.cms.chain else current
        x = block.cms.read(x + y[0], live.cms)[0]
    p, q = (model.peek(held._replace(pending=tokens))[0].numpy() for held in (state, reset))
    found[place("logit_kl", position=position)] = rel_entr(softmax(p, -1), softmax(q, -1)).sum(-1).mean()
    return found


@pytest.mark.parametrize("config", [CONFIG, CHAIN], ids=["gated", "chain"])
@pytest.mark.parametrize("batch", [1, 4])
def test_agrees_with_layers_that_are_read_twice_at_the_live_inputs(config, batch):
    subject, batches = make(config), batches_of(batch)
    found = read_outputs(subject, batches)
    windows = [row for b in batches for row in b.tokens]
    assert all(len(readings) == len(LENGTHS) for readings in found.values())
    reached = {32: [0, 1, 2, 4], 64: [0, 4]}
    for position, rows in reached.items():
        for r in rows:
            expected = reference(subject.module, torch.from_numpy(windows[r]), position)
            assert set(expected) == {p for p in found if p.position == str(position)}
            for where, value in expected.items():
                assert found[where][r].tokens == 8
                assert found[where][r].value == pytest.approx(value, rel=1e-8, abs=1e-14), where
                assert value > 1e-8
    for where, readings in found.items():
        assert [r for r, one in enumerate(readings) if one.tokens] == reached[int(where.position)]


def test_nothing_is_left_on_the_model_and_nothing_is_written():
    subject = make()
    before = {name: weight.clone() for name, weight in subject.module.state_dict().items()}
    first = read_outputs(subject, batches_of())
    assert read_outputs(subject, batches_of()) == first
    assert not any(point.active for point in subject.module.hook_dict.values())
    assert all(torch.equal(weight, before[name]) for name, weight in subject.module.state_dict().items())


def test_a_model_that_writes_nothing_says_what_it_would_with_meta_weights():
    closed = make(dataclasses.replace(CONFIG, surprise_threshold=1e9))
    values = [
        r.value for readings in read_outputs(closed, batches_of()).values() for r in readings if r.tokens
    ]
    assert values
    assert set(values) == {0.0}


def test_outputs_differ_by_the_weights_of_their_own_mechanism_alone():
    """Inputs are those of the live stream: a level that is never written gives what it gave, whatever others do."""
    config = dataclasses.replace(CONFIG, cms_levels=(CMSLevel("fast", 8), CMSLevel("slow", 32, 0.0)))
    for mode in ("gated", "chain"):
        found = read_outputs(make(dataclasses.replace(config, cms_mode=mode)), batches_of())
        for layer in (0, 1):
            assert found[place("output_divergence", layer, "cms.slow", 64)][0].value == 0
            assert found[place("output_divergence", layer, "cms.fast", 64)][0].value > 0
        assert found[place("logit_kl", position=64)][0].value > 0


def test_distances_and_divergences_of_known_vectors():
    meta = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 0.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    fast = meta + torch.tensor([1.0, 0.0])
    values = relative_distance(fast, meta)
    assert values[:2] == pytest.approx([(1 / 5 + 1) / 2, 1 / 2])
    assert math.isnan(values[2])
    fast[1, 0, 0] = torch.inf
    assert relative_distance(fast, meta)[1] == np.inf
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl(p.log()[None, None] + 7, q.log()[None, None]) == pytest.approx([expected], rel=1e-6)
    assert kl(q[None, None], q[None, None] + 3)[0] < 1e-12
    logits = torch.tensor([[[0.0, torch.nan]], [[0.0, torch.inf]]])
    assert kl(logits, torch.zeros(2, 1, 2)).tolist() == [math.inf, math.inf]


def test_kl_of_nearly_equal_logits_keeps_its_digits():
    rng = np.random.default_rng(0)
    base, step = rng.normal(0, 3, 5000), 1e-4 * rng.normal(size=5000)
    p = softmax(base)
    centred = step - p @ step
    logits = [torch.from_numpy(x)[None, None] for x in (base, base + step)]
    assert kl(*logits)[0] == pytest.approx(p @ centred**2 / 2, rel=1e-3)
    assert kl(*(x.float() for x in logits))[0] == pytest.approx(p @ centred**2 / 2, rel=1e-2)
    log_p, log_q = log_softmax(base), log_softmax(base + step)
    assert kl(*logits)[0] == pytest.approx(p @ (log_p - log_q), rel=1e-6)


def test_a_model_that_diverged_is_not_compared():
    subject = make()
    subject.module.add_hook("blocks.1.hook_resid_post", lambda x, hook: x * torch.nan)
    with pytest.raises(MeasurementError, match="not finite in 4 of 4 windows: the model diverged"):
        read_outputs(subject, batches_of(8))


def test_what_shows_no_input_or_no_output_is_left_out():
    assert [m.component for m in mechanisms_of(make()) if m.layer == 1] == ["selfmod", "cms.fast", "cms.slow"]

    class Hidden(HopeSubject):
        @property
        def module(self):
            return self.shown

        @module.setter
        def module(self, model):
            kept = {
                n: p for n, p in model.hook_dict.items() if "slow.hook_in" not in n and "hook_resid" not in n
            }
            model.hook_dict = kept
            self.shown = model

    subject = Hidden(HopeModel(CONFIG, 0))
    assert [m.component for m in mechanisms_of(subject)] == ["cms.fast", "cms.fast"]
    statistics = {(p.statistic, p.component) for p in read_outputs(subject, batches_of())}
    assert statistics == {("logit_kl", ""), ("output_divergence", "cms.fast")}


@pytest.mark.parametrize("name", ["run", "logits", "select_rows", "reset_rows"])
def test_a_model_without_a_state_to_read_from_lacks_this(name):
    lacking = type("Lacking", (HopeSubject,), {name: getattr(Subject, name)})(HopeModel(CONFIG, 0))
    with pytest.raises(MissingCapability):
        read_outputs(lacking, batches_of())


def test_rows_come_with_intervals_nulls_and_verdicts(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, VOCAB, 49) for _ in range(40)]
    data = TokenData.from_documents(documents, name="text", vocab_size=VOCAB, end_of_text=0)
    subject = make(dataclasses.replace(CONFIG, context=48), torch.float32)
    results = analyze(
        subject, "meta-fast", data=data, tokens=None, split="all", fresh=0, cache_dir=tmp_path, batch=16
    )
    rows = [row for row in results.rows if row.statistic in ("output_divergence", "logit_kl")]
    assert len(rows) == 2 * 3 + 1
    for row in rows:
        assert row.ci_low < row.value < row.ci_high
        assert (row.n_tokens, row.n_groups, row.position) == (8 * 40, 40, "32")
        assert row.verdict == "at-init"
        nulls = {n.null_kind: n.value for n in results.null_rows if n.key[:-1] == row.key}
        assert nulls["own-init"] == row.value
        assert nulls["fresh-init"] > 0
