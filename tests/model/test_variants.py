"""Variants: what each writes and what it does not, its points and weights, training, and every probe on it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from model_toys import TOY

from hopeprobe import analyze
from hopeprobe.model.checkpoint import read
from hopeprobe.model.config import CMSLevel, preset
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.subject import HopeSubject
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.model.variants import VARIANTS
from hopeprobe.probes import PROBES
from hopeprobe.subject import load
from hopeprobe.tokens import TokenData

MEMORIES = ("memory", "q", "k", "v", "eta", "alpha")
ALL = {f"selfmod.{name}" for name in MEMORIES}
LEVELS = {"cms.fast", "cms.slow"}
WRITTEN = {
    "full": ALL | LEVELS,
    "no-cms": ALL,
    "static-mlp": ALL,
    "no-self-mod": {"selfmod.memory"} | LEVELS,
    "frozen-memory": LEVELS,
    "no-surprise": ALL | LEVELS,
    "hope-attention": LEVELS,
    "same-period": ALL | LEVELS,
    "transformer": set(),
    "transformer-matched": set(),
    "titans": {"titans.memory"},
}
#: All of them; those made of the same pieces as others only where slow tests run too.
SOME_FIRST = [
    name
    if name in ("no-cms", "no-self-mod", "hope-attention", "titans")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in VARIANTS
]
SMALL = dataclasses.replace(TOY, vocab_size=61, layers=1, context=32)


def make(variant, base=TOY, dtype=torch.float64, **changes):
    return HopeModel(dataclasses.replace(base, variant=variant, **changes), seed=1, dtype=dtype)


def names_of(model):
    return {name for name, _ in model.named_parameters()}


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 61, 33 + i % 9) for i in range(60)]
    return TokenData.from_documents(documents, name="text", vocab_size=61, end_of_text=0)


def test_all_are_here():
    assert set(WRITTEN) == set(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_writes_what_it_says_and_nothing_else(variant, tokens):
    """Seen at the points of fast weights, and in the state."""
    model = make(variant)
    fired = set()

    def watch(tensor, hook):
        fired.add(".".join(hook.name.split(".")[2:4]))

    points = [name for name in model.hook_dict if ".hook_fast_" in name]
    assert {".".join(name.split(".")[2:4]) for name in points} == WRITTEN[variant]
    with torch.no_grad(), model.hooks([(name, watch) for name in points]):
        state = model(tokens).state
    assert fired == WRITTEN[variant] == set(HopeSubject(model).write_periods())
    for layer in state.layers:
        levels = {
            f"cms.{spec.name}"
            for spec, held in zip(model.config.levels, layer.cms, strict=True)
            if held.w_in.any()
        }
        assert levels == WRITTEN[variant] & LEVELS
        groups = layer.selfmod.groups if layer.selfmod else ()
        assert any(group is not None for group in groups) == bool(WRITTEN[variant] & ALL)
        assert (layer.titans is not None and bool(layer.titans.s1.any())) == (variant == "titans")


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_shapes_and_values_of_weights_are_shared(variant):
    full, other = dict(make("full").named_parameters()), dict(make(variant).named_parameters())
    shared = full.keys() & other.keys()
    assert {name for name in shared if not torch.equal(full[name], other[name])} == set()
    if variant in ("static-mlp", "no-self-mod", "frozen-memory", "no-surprise", "same-period"):
        assert full.keys() == other.keys()
    if variant == "no-cms":
        assert other.keys() == {name for name in full if ".cms." not in name}
    if variant == "hope-attention":
        assert {n for n in other if ".cms." in n} == {n for n in full if ".cms." in n}
        assert set(other.keys() - full.keys()) == {
            f"blocks.{i}.attention.{w}" for i in (0, 1) for w in ("w_qkv", "w_out")
        }


def test_two_are_the_full_model_with_other_numbers(tokens):
    slow_as_fast = tuple(dataclasses.replace(level, period=8) for level in TOY.cms_levels)
    for variant, same in (
        ("no-surprise", make("full", surprise_threshold=0.0)),
        ("same-period", make("full", cms_levels=slow_as_fast)),
    ):
        assert torch.equal(make(variant)(tokens).losses, same(tokens).losses)
    high = {"surprise_threshold": 3.6}
    assert torch.equal(make("no-surprise", **high)(tokens).losses, make("no-surprise")(tokens).losses)
    assert not torch.equal(make("full", **high)(tokens).losses, make("full")(tokens).losses)
    assert "s_t > 0]" in make("no-surprise", **high).hook_dict["hook_gate"].spec.equation
    three = (CMSLevel("a", 16), CMSLevel("b", 4), CMSLevel("c", 8))
    assert {level.period for level in make("same-period", cms_levels=three).config.levels} == {4}


def test_controls_are_their_variants_without_the_writes(tokens):
    """Up to the first write they agree to the last bit; after it, they do not."""
    for variant, control in (("full", "static-mlp"), ("no-self-mod", "frozen-memory")):
        one, other = (make(name)(tokens).losses for name in (variant, control))
        assert torch.equal(one[:, :8], other[:, :8])
        assert not torch.equal(one[:, 8:], other[:, 8:])
    frozen = make("frozen-memory")
    with torch.no_grad(), frozen.hooks([("blocks.*.cms.*.hook_write_gate", lambda gate, hook: gate * 0)]):
        still = frozen(tokens)
    assert torch.equal(still.losses[:, :8], frozen(tokens).losses[:, :8])


def test_the_memory_without_self_modification_is_written_towards_v(tokens):
    """One token in float64: W1 <- W1 - eta/(1 + eta |a|^2) (M(k) - v) a^T, with nothing left of k's own generator."""
    model = make("no-self-mod", cms_levels=(CMSLevel("fast", 1, 0.0),), chunk=1, chunk_memory=1)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[:1, :2], names_filter="blocks.0.selfmod.*")
    k, v = (cache[f"blocks.0.selfmod.hook_{name}"][0, 0].numpy() for name in "kv")
    eta, alpha = (float(cache[f"blocks.0.selfmod.hook_{name}"][0, 0]) for name in ("eta", "alpha"))
    memory = model.blocks[0].selfmod.memories["memory"]
    w1, w2 = (w.detach().numpy() for w in (memory.w1, memory.w2))
    a = np.array([0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in w2 @ k])
    error = k + w1 @ a - v
    expected = w1 - eta / (1 + eta * a @ a) * np.outer(error, a)
    written = cache["blocks.0.selfmod.memory.hook_fast_w1"]
    assert 0 < alpha < 1, "decay goes towards the meta weights, so the first write does not see it"
    np.testing.assert_allclose(written.numpy().reshape(-1, *w1.shape)[0], expected, rtol=0, atol=1e-12)
    loss = float(cache["blocks.0.selfmod.memory.hook_assoc_loss"][0, 0])
    assert loss == pytest.approx(0.5 * error @ error, rel=1e-12)


@pytest.mark.parametrize("variant", SOME_FIRST)
def test_it_trains_and_resumes_bit_for_bit(variant, text, tmp_path):
    config = dataclasses.replace(SMALL, variant=variant)
    options = {"learning_rate": 1e-2, "warmup": 2, "eval_tokens": 100, "checkpoint_every": 2, "batch": 2}
    train(config, TrainConfig(steps=4, **options), text, tmp_path / "whole")
    train(config, TrainConfig(steps=2, **options), text, tmp_path / "parts")
    train(config, TrainConfig(steps=4, **options), text, tmp_path / "parts", resume=True)
    whole, parts = (read(tmp_path / folder / "step-000004.pt") for folder in ("whole", "parts"))
    assert whole.config == parts.config == config
    for name, weight in whole.weights.items():
        assert torch.equal(weight, parts.weights[name]), name
    first = read(tmp_path / "whole" / "step-000000.pt")
    assert any(not torch.equal(first.weights[name], weight) for name, weight in whole.weights.items())


def checkpoint_of(variant, text, folder):
    config = dataclasses.replace(SMALL, variant=variant)
    train(config, TrainConfig(steps=2, warmup=0, eval_tokens=100, checkpoint_every=2, batch=2), text, folder)
    return load(folder / "step-000002.pt")


@pytest.mark.parametrize("variant", SOME_FIRST)
def test_every_probe_measures_it_or_says_why_not(variant, text, tmp_path):
    subject, probes = checkpoint_of(variant, text, tmp_path), sorted(set(PROBES) - {"relative-surprise"})
    results = analyze(subject, probes, data=text, split="all", tokens=400, fresh=0, cache_dir=tmp_path)
    assert results.missing == []
    table = results.table
    assert set(table.probe) == set(probes)
    absent = {probe for probe, rows in table.groupby("probe") if set(rows.verdict) == {"n/a"}}
    cms, memories = VARIANTS[variant].channel == "cms", VARIANTS[variant].mixer == "selfmod"
    expected = set()
    if not cms:
        expected |= {"cms-similarity", "cms-dynamics", "cms-contribution"}
    if not memories:
        expected |= {"selfmod-drift"}
    if not WRITTEN[variant]:
        expected |= {"meta-fast", "adaptation", "gate-selectivity"}
    assert absent == expected
    assert table[table.verdict == "n/a"].note.str.len().min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_rules_are_compared_where_there_is_a_gate(variant, text, tmp_path):
    """A hundred passes each, so apart."""
    subject = checkpoint_of(variant, text, tmp_path)
    results = analyze(
        subject, "relative-surprise", data=text, split="all", tokens=400, fresh=0, cache_dir=tmp_path
    )
    assert results.missing == []
    # Where every token is written another rule would be another variant.
    absent = not WRITTEN[variant] or VARIANTS[variant].no_threshold
    assert (set(results.table.verdict) == {"n/a"}) == bool(absent)
    assert results.table[results.table.verdict == "n/a"].note.str.len().gt(0).all()


def test_sizes_beside_the_published():
    def millions(name, variant):
        return sum(w.numel() for w in HopeModel.shapes(preset(name, variant)).values()) / 1e6

    assert millions("scaled", "transformer-matched") == pytest.approx(81.1, abs=0.05)
    for name in ("tiny", "small", "scaled"):
        for variant in ("static-mlp", "no-self-mod", "frozen-memory", "no-surprise", "same-period"):
            assert millions(name, variant) == millions(name, "full")
        assert millions(name, "no-cms") < millions(name, "full")
        assert millions(name, "transformer-matched") == pytest.approx(millions(name, "full"), rel=0.01)
