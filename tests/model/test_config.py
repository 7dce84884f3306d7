"""Configurations: what cannot work is refused with a sentence, and plain data round-trips."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hopeprobe.errors import BadInputError
from hopeprobe.model.config import PRESETS, CMSLevel, ModelConfig, from_dict, preset, published


@pytest.mark.parametrize("name", ["tiny", "small", "scaled"])
def test_presets(name):
    assert preset(name) == PRESETS[name]
    assert preset(name).tick == 8
    assert preset(name).writes
    transformer = preset(name, "transformer")
    assert not transformer.writes
    assert transformer.tick == transformer.context
    assert dataclasses.replace(transformer, variant="full") == preset(name)


@given(st.integers(1, 64), st.integers(1, 64), st.lists(st.integers(1, 64), min_size=1, max_size=3))
def test_the_tick_divides_every_period_and_nothing_larger_does(chunk, chunk_memory, periods):
    levels = tuple(CMSLevel(f"level{i}", p) for i, p in enumerate(periods))
    config = ModelConfig(chunk=chunk, chunk_memory=chunk_memory, cms_levels=levels)
    every = [chunk, chunk_memory, *periods]
    assert all(p % config.tick == 0 for p in every)
    assert not any(all(p % t == 0 for p in every) for t in range(config.tick + 1, min(every) + 1))


def test_published_keeps_the_sizes_and_switches_the_rule():
    config = PRESETS["small"]
    rule = published(config)
    assert rule.tick == 8
    assert (rule.chunk, rule.chunk_memory) == (8, 64)
    assert (rule.query, rule.objective, rule.eta_squash, rule.decay_target, rule.cms_mode, rule.write_grad) == (
        "static", "l2", "softplus", "zero", "chain", "stop",
    )  # fmt: skip
    assert (rule.eta_max, rule.eta_bias, rule.alpha_bias, rule.embed_std) == (1e-3, None, None, 1.0)
    assert [rule.normalise_value, rule.proximal, rule.residual] == [False] * 3
    for same in ("dim", "layers", "context", "heads", "cms_levels", "vocab_size", "surprise_threshold"):
        assert getattr(rule, same) == getattr(config, same)


@given(
    st.builds(
        ModelConfig,
        variant=st.sampled_from(["full", "transformer"]),
        vocab_size=st.integers(1, 60000),
        dim=st.integers(1, 64).map(lambda n: 8 * n),
        layers=st.integers(1, 9),
        objective=st.sampled_from(["half-l2", "l2", "dot"]),
        eta_bias=st.none() | st.floats(-5, 5),
        cms_levels=st.lists(st.integers(1, 64), min_size=1, max_size=3).map(
            lambda ps: tuple(CMSLevel(f"l{i}", p, 0.1 * i, 0.5 if p % 3 else None) for i, p in enumerate(ps))
        ),
    )
)
def test_plain_data_round_trips_also_as_json(config):
    assert from_dict(ModelConfig, config.to_dict()) == config
    assert from_dict(ModelConfig, json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"dimm": 8}, "unknown key 'dimm' in ModelConfig; did you mean 'dim'"),
        ({"cms_levels": [{"name": "fast", "peroid": 8}]}, "unknown key 'peroid' in CMSLevel.*'period'"),
        ({"cms_levels": [{"name": "fast"}]}, "CMSLevel cannot be built"),
        ({"cms_levels": [8]}, "made from a mapping"),
        ({"dim": "8"}, "dim is '8', must be a whole number"),
    ],
)
def test_plain_data_that_does_not_fit(data, message):
    with pytest.raises(BadInputError, match=message):
        from_dict(ModelConfig, data)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "ful"}, "variant is 'ful'.*did you mean 'full'"),
        ({"query": "memories"}, "query is 'memories'.*'memory'"),
        ({"objective": "l1"}, "objective is 'l1'"),
        ({"eta_squash": "tanh"}, "eta_squash"),
        ({"decay_target": "meta"}, "decay_target"),
        ({"write_grad": "throuhg"}, "write_grad.*'through'"),
        ({"cms_mode": "chains"}, "cms_mode.*'chain'"),
        ({"dim": 0}, "dim is 0, must be above zero"),
        ({"dim": 8.5}, "dim is 8.5, must be a whole number"),
        ({"layers": True}, "layers is True"),
        ({"chunk": -8}, "chunk is -8"),
        ({"embed_std": 0.0}, "embed_std"),
        ({"eta_max": float("nan")}, "eta_max is nan"),
        ({"eta_max": math.inf}, "eta_max is inf, must be finite"),
        ({"surprise_threshold": math.nan}, "surprise_threshold is nan, must be finite"),
        ({"alpha_bias": math.nan}, "alpha_bias is nan, must be finite"),
        ({"truncate_ticks": -1}, "truncate_ticks is -1"),
        ({"cms_levels": ()}, "at least one CMS level"),
        ({"cms_levels": (CMSLevel("a", 8), CMSLevel("a", 16))}, "repeat: a, a"),
        ({"variant": "transformer", "dim": 12, "heads": 4}, "divisible by twice"),
    ],
)
def test_values_that_cannot_work(values, message):
    with pytest.raises(BadInputError, match=message):
        ModelConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("fast", 0), "period is 0"),
        (("fast", 8.0), "period is 8.0, must be a whole number"),
        (("fa.st", 8), "must be a word"),
        (("fast", 8, -0.1), "learning_rate of CMS level 'fast' is -0.1"),
        (("fast", 8, float("nan")), "nan"),
        (("fast", 8, float("inf")), "learning_rate is inf, must be finite"),
        (("fast", 8, 0.1, 0.0), "max_change of CMS level 'fast' is 0.0, must be above zero"),
        (("fast", 8, 0.1, float("inf")), "max_change of CMS level 'fast' is inf"),
    ],
)
def test_levels_that_cannot_work(values, message):
    with pytest.raises(BadInputError, match=message):
        CMSLevel(*values)


def test_what_is_left_as_it_is_by_default_is_no_part_of_the_plain_data():
    """Digests of it, of grids and of nulls, are those of versions that did not have it."""
    plain = ModelConfig().to_dict()
    assert "gate" not in plain
    assert all(set(level) == {"name", "period", "learning_rate"} for level in plain["cms_levels"])
    held = ModelConfig(cms_levels=(CMSLevel("fast", 8, max_change=0.5), CMSLevel("slow", 64))).to_dict()
    assert [level.get("max_change") for level in held["cms_levels"]] == [0.5, None]


def test_unknown_presets_and_variants_offer_near_names():
    with pytest.raises(BadInputError, match=r"'tinny'.*did you mean 'tiny'"):
        preset("tinny")
    with pytest.raises(BadInputError, match=r"variant is 'transfomer'.*did you mean 'transformer'"):
        preset("tiny", "transfomer")


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["tiny"].dim = 9
