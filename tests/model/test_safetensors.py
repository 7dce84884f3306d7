"""Exported weights are a checkpoint again: the same model, the same nulls, and a changed bit is seen."""

import dataclasses
import json
import re

import pytest
import torch
from model_toys import TOY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hopeprobe
from hopeprobe.errors import BadInputError
from hopeprobe.exporting import export_weights
from hopeprobe.model.checkpoint import Checkpoint, read, save
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.init import digest
from hopeprobe.model.subject import HopeSubject
from hopeprobe.safetensors_files import as_bytes


@pytest.fixture
def checkpoint(tmp_path):
    model = HopeModel(TOY, 3)
    first = digest(model.state_dict().items())
    weights = {name: weight + 0.01 for name, weight in model.state_dict().items()}
    data, train = {"name": "toy", "fingerprint": "00"}, {"steps": 9, "learning_rate": 0.1}
    made = Checkpoint(TOY, 3, 7, weights, first, "gpt2", data, train)
    save(tmp_path / "a.pt", made)
    return tmp_path / "a.pt"


@pytest.fixture
def exported(checkpoint, tmp_path):
    return export_weights(hopeprobe.load(checkpoint), tmp_path / "a.safetensors")


def test_it_is_the_checkpoint_that_it_was_exported_from(checkpoint, exported):
    before, after = read(checkpoint), read(exported)
    for each in dataclasses.fields(Checkpoint):
        if each.name != "weights":
            assert getattr(after, each.name) == getattr(before, each.name), each.name
    assert before.weights.keys() == after.weights.keys()
    assert all(torch.equal(after.weights[name], weight) for name, weight in before.weights.items())
    one, other = hopeprobe.load(checkpoint), hopeprobe.load(exported)
    assert other.identity() == one.identity()
    assert other.trained_steps == 7
    tokens = torch.arange(17)[None]
    assert torch.equal(one.run(tokens).losses, other.run(tokens).losses)
    assert torch.equal(one.own_init().module.embed, other.own_init().module.embed)


def test_initial_weights_are_a_checkpoint_too(tmp_path):
    path = export_weights(HopeSubject(HopeModel(TOY, 3)), tmp_path / "new.safetensors")
    again = hopeprobe.load(path)
    assert again.trained_steps == 0
    assert torch.equal(again.own_init().module.embed, again.module.embed)


def test_a_changed_bit_is_seen_wherever_it_is(exported, tmp_path):
    whole, seen = exported.read_bytes(), 0
    path = tmp_path / "flipped.safetensors"
    for at in [*range(0, 300, 7), *range(300, len(whole), 1999), len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BadInputError, match=re.escape(str(path))):
            read(path)
        seen += 1
    assert seen > 40


def test_somebody_elses_file_is_of_another_kind(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    assert read(path) is None
    with pytest.raises(BadInputError, match=r"foreign\.safetensors is not a checkpoint that can be read"):
        hopeprobe.load(path)


def test_one_that_was_edited_is_checked_as_any_checkpoint(exported, tmp_path):
    with safe_open(exported, "pt") as file:
        told = {name: text for name, text in file.metadata().items() if "sha256" not in name}
    path, weights = tmp_path / "edited.safetensors", load_file(exported)
    save_file(weights, path, told)
    with pytest.raises(BadInputError, match="has no digest"):
        read(path)
    path.write_bytes(as_bytes(weights, told))
    assert read(path).step == 7
    content = json.loads(told["checkpoint"])
    for change, said in (
        ({"config": content["config"] | {"dim": 16}}, "has shape"),
        ({"config": content["config"] | {"layers": 10**9}}, "1000000000 layers"),
        ({"step": -1}, "its step is -1"),
        ({"seed": "3"}, "its seed is '3'"),
        ({"surplus": 1}, "unexpected 'surplus'"),
    ):
        path.write_bytes(as_bytes(weights, told | {"checkpoint": json.dumps(content | change)}))
        with pytest.raises(BadInputError, match=re.escape(str(path))) as error:
            read(path)
        assert said in str(error.value)
    path.write_bytes(as_bytes(weights, told | {"checkpoint": '{"step": 1, "step": 2}'}))
    with pytest.raises(BadInputError, match="'step' is there twice"):
        read(path)
