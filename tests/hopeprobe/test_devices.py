"""Devices by name: what is taken where, and what is said of one that is not there."""

import pytest
import torch

from hopeprobe.devices import default_precision, device_name, find_device
from hopeprobe.errors import BadInputError
from hopeprobe.subject import Subject, placed


@pytest.fixture
def without(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_two(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def test_auto_takes_an_accelerator_where_there_is_one(without):
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")


def test_auto_and_cuda_are_the_current_one(with_two):
    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 1)
    assert find_device("cuda:0") == torch.device("cuda", 0)
    assert find_device("cpu") == torch.device("cpu")


def test_one_that_is_not_there(with_two):
    with pytest.raises(BadInputError, match="there is no cuda:2 here: the last of 2 is cuda:1"):
        find_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_none_that_is_there(without, name):
    with pytest.raises(
        BadInputError, match=f"there is no {name} here: this torch .* Take --device cpu, or auto"
    ):
        find_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "", "mps", "CPU"])
def test_a_name_that_is_none(name):
    with pytest.raises(BadInputError, match="must be auto, cpu, cuda or cuda:N"):
        find_device(name)


def test_a_device_of_torch_is_taken_as_it_is():
    assert find_device(torch.device("meta")) == torch.device("meta")


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16"), (False, "float32")])
def test_the_usual_precision(monkeypatch, fast, precision):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    assert default_precision(torch.device("cuda", 0)) == precision
    assert default_precision(torch.device("cpu")) == "float32"


def test_what_a_record_calls_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Model of {device}")
    assert device_name(torch.device("cpu")) == "cpu"
    assert device_name(torch.device("cuda", 1)) == "Model of cuda:1"


def test_a_subject_that_cannot_move(with_two):
    class Foreign(Subject):
        name = "foreign"

    one = Foreign()
    assert placed(one, None) is placed(one, "auto") is placed(one, "cpu") is one
    with pytest.raises(
        BadInputError, match="device cuda:0: foreign: this model has no way to another device"
    ):
        placed(one, "cuda:0")
