"""Weights and activations as other tools read them."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import hopeprobe
from hopeprobe.errors import BadInputError
from hopeprobe.exporting import as_frame, export_activations, export_weights
from hopeprobe.hooks import ActivationCache

POINTS = ["blocks.0.cms.*.hook_delta", "blocks.0.selfmod.memory.hook_fast_w1", "hook_surprise"]


@pytest.fixture
def cache(subject):
    tokens = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return subject.module.run_with_cache(tokens, names_filter=POINTS)[1]


def test_weights_come_back_bit_for_bit(toy_run, tmp_path):
    subject = hopeprobe.load(toy_run / "step-000040.pt")
    path = export_weights(subject, tmp_path / "weights.safetensors")
    weights = subject.module.state_dict()
    back = load_file(path)
    assert set(back) == set(weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    with safe_open(path, "pt") as file:
        told = file.metadata()
    assert (told["step"], told["seed"], told["tokenizer"]) == ("40", "0", "gpt2")
    assert json.loads(told["identity"]) == json.loads(json.dumps(subject.identity()))


def test_weights_are_not_named_as_what_they_are_not(subject, tmp_path):
    with pytest.raises(BadInputError, match=r"w.npz is named as .npz and .* name it .*w.safetensors$"):
        export_weights(subject, tmp_path / "w.npz")
    assert not (tmp_path / "w.npz").exists()


def test_weights_of_any_type_and_in_one_memory(subject, tmp_path):
    subject.module.register_buffer("narrow", torch.arange(4, dtype=torch.bfloat16))
    subject.module.register_buffer("tied", subject.module.narrow[1:3])
    back = load_file(export_weights(subject, tmp_path / "weights.safetensors"))
    assert torch.equal(back["narrow"], subject.module.narrow)
    assert torch.equal(back["tied"], subject.module.tied)


def test_activations_come_back_with_their_dimensions(cache, tmp_path):
    path = export_activations(cache, tmp_path / "cache.npz")
    with np.load(path, allow_pickle=False) as back:
        dims = json.loads(str(back["dims"]))
        assert set(back.files) == {"dims", *cache}
        for name in cache:
            np.testing.assert_array_equal(back[name], cache[name].numpy())
            assert tuple(dims[name]) == cache.dims(name)
    assert dims["blocks.0.selfmod.memory.hook_fast_w1"][1] == "write"


def test_bfloat16_is_written_exactly(cache, tmp_path):
    name = "hook_surprise"
    cache._parts[name] = [cache[name].bfloat16()]
    with np.load(export_activations(cache, tmp_path / "cache.npz")) as back:
        assert back[name].dtype == np.float32
        np.testing.assert_array_equal(back[name], cache[name].float().numpy())


def test_a_table_has_a_line_a_number(cache):
    name = "blocks.0.cms.fast.hook_delta"
    frame = as_frame(cache, name)
    assert list(frame.columns) == ["batch", "pos", "d_model", "value"]
    assert len(frame) == cache[name].numel()
    line = frame.iloc[-5]
    assert line.value == cache[name][int(line.batch), int(line.pos), int(line.d_model)].item()
    with pytest.raises(KeyError, match="hook_delta"):
        as_frame(cache, "blocks.0.cms.fast.hook_delt")


def test_what_cannot_be_exported(cache, monkeypatch, tmp_path):
    with pytest.raises(BadInputError, match="the cache is empty"):
        export_activations(ActivationCache(["hook_surprise"]), tmp_path / "cache.npz")
    assert not (tmp_path / "cache.npz").exists()
    monkeypatch.setattr("hopeprobe.exporting._MOST_ROWS", 10)
    with pytest.raises(BadInputError, match="more than a table should have"):
        as_frame(cache, "hook_surprise")
