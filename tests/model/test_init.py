"""Initial weights: a function of seed, name and shape alone, with the norms that were published."""

import dataclasses
import math

import pytest
import torch
from model_toys import CONFIGS, TOY

from hopeprobe.hooks import HookRegistry
from hopeprobe.model.cms import Level
from hopeprobe.model.config import CMSLevel, ModelConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.init import digest, initialise


def test_variants_share_what_they_have_in_common():
    full = HopeModel(TOY, seed=3).state_dict()
    common = 0
    for other in (dataclasses.replace(TOY, variant="transformer"), *CONFIGS.values()):
        if other.embed_std != TOY.embed_std:
            continue
        for name, weight in HopeModel(other, seed=3).state_dict().items():
            if name in full and full[name].shape == weight.shape:
                common += 1
                assert torch.equal(weight, full[name]), name
    assert torch.equal(
        HopeModel(dataclasses.replace(TOY, variant="transformer"), seed=3).embed, full["embed"]
    )
    assert common > 50


def test_single_precision_is_the_double_rounded(config):
    single = HopeModel(config, seed=5).state_dict()
    double = HopeModel(config, seed=5, dtype=torch.float64).state_dict()
    assert all(torch.equal(single[k], double[k].float()) for k in double)
    assert digest(single.items()) == digest(double.items())


def test_seeds_differ_and_repeat():
    one, again, two = (HopeModel(TOY, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], again[k]) for k in one)
    drawn = [k for k in one if one[k].numel() > 1 and "norm" not in k and "mix_" not in k]
    assert len(drawn) > 20
    assert not any(torch.equal(one[k], two[k]) for k in drawn)
    assert digest(one.items()) != digest(two.items())


def test_nothing_else_decides():
    torch.manual_seed(1)
    first = digest(HopeModel(TOY, seed=1).state_dict().items())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert digest(HopeModel(TOY, seed=1).state_dict().items()) == first
    assert torch.equal(torch.get_rng_state(), before)  # and it leaves the global generator alone


def test_parameters_of_one_name_are_not_those_of_another():
    weights = HopeModel(TOY, seed=1).state_dict()
    assert not torch.equal(
        weights["blocks.0.selfmod.memories.k.w2"], weights["blocks.0.selfmod.memories.v.w2"]
    )
    assert not torch.equal(weights["blocks.0.cms.levels.fast.w_in"], weights["blocks.0.cms.levels.slow.w_in"])


def test_the_digest_sees_any_single_weight():
    weights = HopeModel(TOY, seed=1).state_dict()
    first = digest(weights.items())
    assert digest(reversed(list(weights.items()))) == first
    for name in weights:
        changed = {k: v.clone() for k, v in weights.items()}
        flat = changed[name].view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
        assert digest(changed.items()) != first, name
    renamed = {("x" + k if k == "embed" else k): v for k, v in weights.items()}
    assert digest(renamed.items()) != first


def test_ranges_and_constants():
    for name, weight in HopeModel(TOY, seed=1).state_dict().items():
        last = name.rsplit(".", 1)[-1]
        if last == "eta_bias":
            assert weight.item() == -3.0
        elif last == "alpha_bias":
            assert weight.item() == 6.0
        elif last.startswith("mix_") or name.endswith("norm.bias"):
            assert not weight.any()
        elif name.endswith("norm.weight"):
            assert (weight == 1).all()
        elif last != "embed":
            fan_in = {"b_in": 8, "b_out": 32}.get(last, weight.shape[-1])
            top = float(weight.abs().max())
            assert top <= fan_in**-0.5
            if weight.numel() >= 64:
                assert top > 0.9 * fan_in**-0.5, name


def test_the_embedding_has_the_spread_of_the_configuration():
    config = ModelConfig(dim=64, layers=1, heads=2, vocab_size=4000, embed_std=0.02)
    embed = HopeModel(config, seed=1).embed
    assert abs(embed.std().item() / 0.02 - 1) < 0.01


@pytest.mark.parametrize("name", ["normal", "norm", "mlp", "embed"])
def test_the_name_of_a_level_does_not_decide_how_it_is_drawn(name):
    """Owners and kinds are told apart by the parameter's own name, whatever a level is called."""
    config = dataclasses.replace(TOY, cms_levels=(CMSLevel(name, 8),), mlp_multiplier=1)
    level = HopeModel(config, seed=1).blocks[0].cms.level_list()[0]
    assert (level.norm.weight == 1).all()
    assert not level.norm.bias.any()
    for weight, fan_in in ((level.w_in, 8), (level.b_in, 8), (level.w_out, 32), (level.b_out, 32)):
        bound = fan_in**-0.5
        assert 0.5 * bound < weight.abs().max().item() <= bound


def level_vector(seed):
    config = ModelConfig(dim=256, layers=1)
    level = Level(config, CMSLevel("fast", 8), HookRegistry(), "blocks.0.cms.fast").double()
    holder = torch.nn.ModuleDict({"cms": torch.nn.ModuleDict({"fast": level})})
    initialise(torch.nn.ModuleDict({"blocks": holder}), config, seed)
    assert {n for n, _ in level.named_parameters()} == {
        "norm.weight", "norm.bias", "w_in", "b_in", "w_out", "b_out",
    }  # fmt: skip
    return torch.cat([p.detach().flatten() for p in level.parameters()])


def test_the_norms_that_were_published():
    """sqrt(d + h/3 + d/3 + h/(3d) + d/(3h)) of a level; two seeds lie apart by sqrt 2 of the part that is drawn."""
    d, h = 256, 1024
    expected = math.sqrt(d + h / 3 + d / 3 + h / (3 * d) + d / (3 * h))
    assert abs(expected - 26.155) < 1e-3
    for seed in (0, 1):
        assert abs(float(level_vector(seed).norm()) / expected - 1) < 0.002
    distance = float((level_vector(0) - level_vector(1)).norm())
    assert abs(distance / 29.26 - 1) < 0.005
