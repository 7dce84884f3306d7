"""What a run goes on from: an optimiser's state that is not that of its model and run is refused, whatever it holds."""

import copy
import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from model_toys import TOY

from hopeprobe.errors import BadInputError
from hopeprobe.model.checkpoint import Checkpoint, read, run_checkpoints, save
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.init import digest
from hopeprobe.model.optimizer import make_optimizer
from hopeprobe.model.resuming import restore
from hopeprobe.model.train import train
from hopeprobe.model.train_config import TrainConfig
from hopeprobe.tokens import TokenData

CONFIG = TrainConfig(weight_decay=0.0)


@pytest.fixture(scope="module")
def whole():
    """A checkpoint with the moments of one update."""
    model = HopeModel(TOY, 3)
    optimizer = make_optimizer(model, CONFIG)
    model(torch.arange(9)[None]).losses.sum().backward()
    optimizer.step()
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    first = digest(HopeModel(TOY, 3).state_dict().items())
    return Checkpoint(TOY, 3, 1, weights, first, "gpt2", {}, {}, optimizer.state_dict(), None)


def fresh(config=CONFIG):
    return make_optimizer(HopeModel(TOY, 3), config)


def test_what_fits_is_put_back(whole):
    optimizer = fresh()
    restore(whole, optimizer)
    ours, theirs = optimizer.state_dict()["state"], whole.optimizer["state"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[at][name], held[name]) for at, held in theirs.items() for name in held)


def test_a_whole_number_is_the_number_it_is(whole):
    restore(whole, fresh(dataclasses.replace(CONFIG, weight_decay=0)))


def test_another_setting_is_refused(whole):
    with pytest.raises(BadInputError, match="set to, are others"):
        restore(whole, fresh(dataclasses.replace(CONFIG, beta1=0.5)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", torch.tensor(1 + 2j)),  # a number of which torch makes updates that are none
        ("lr", torch.tensor([0.1, 0.2])),
        ("lr", "0.1"),
        ("betas", (torch.tensor([0.9, 0.9]), 0.999)),
        ("betas", [0.9]),
        pytest.param("eps", 10**5000, id="a number of 5001 digits"),
        ("eps", float("nan")),
        ("weight_decay", 0.5),
        ("amsgrad", True),
        ("params", [0]),
        (3, 4),
    ],
)  # fmt: skip
def test_settings_that_are_none(whole, name, value):
    changed = copy.deepcopy(whole.optimizer)
    changed["param_groups"][0][name] = value
    before = fresh()
    with pytest.raises(BadInputError, match="not that of its model: its groups of parameters"):
        restore(dataclasses.replace(whole, optimizer=changed), before)
    assert not before.state, "nothing of it was taken"


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("step", torch.tensor(1 + 2j), "number of steps"),
        ("step", torch.tensor([1.0, 2.0]), "number of steps"),
        ("step", torch.tensor(-1.0), "number of steps"),
        ("step", torch.tensor(float("inf")), "number of steps"),
        ("step", torch.tensor(1.0).to(torch.float8_e4m3fn), "number of steps"),
        ("step", 3, "number of steps"),
        ("exp_avg", torch.zeros(3), "shape of its parameter"),
        ("exp_avg", torch.zeros(3, dtype=torch.complex64), "shape of its parameter"),
        ("exp_avg", torch.complex64, "not in torch.float32"),
        ("exp_avg_sq", torch.float8_e5m2, "not in torch.float32"),
        ("exp_avg_sq", torch.int64, "not in torch.float32"),
        ("exp_avg_sq", math.nan, "is not finite"),
        ("max_exp_avg_sq", torch.zeros(1), "steps and moments"),
    ],
)
def test_moments_that_are_none(whole, name, value, why):
    changed = copy.deepcopy(whole.optimizer)
    first = changed["state"][0]
    if isinstance(value, torch.dtype):
        value = first[name].to(value)
    elif isinstance(value, float):
        value = first[name] * value
    first[name] = value
    with pytest.raises(BadInputError, match=f"not that of its model: .*{why}"):
        restore(dataclasses.replace(whole, optimizer=changed), fresh())


def test_moments_that_are_not_there(whole):
    with pytest.raises(BadInputError, match="it holds no moments"):
        restore(dataclasses.replace(whole, optimizer={**whole.optimizer, "state": {}}), fresh())


def test_moments_of_more_updates_than_the_run_has_steps(whole):
    changed = copy.deepcopy(whole.optimizer)
    changed["state"][0]["step"] += 1
    with pytest.raises(BadInputError, match="had 2 updates, in a run of 1 steps"):
        restore(dataclasses.replace(whole, optimizer=changed), fresh())


def test_a_mean_of_squares_below_zero(whole):
    changed = copy.deepcopy(whole.optimizer)
    changed["state"][0]["exp_avg_sq"].view(-1)[-1] = -1e-12
    with pytest.raises(BadInputError, match="exp_avg_sq, a mean of squares, is below zero"):
        restore(dataclasses.replace(whole, optimizer=changed), fresh())


@pytest.mark.parametrize("generator", [torch.zeros(3), torch.zeros(4, dtype=torch.uint8), "x"])
def test_a_generator_that_is_none(whole, generator):
    with pytest.raises(BadInputError, match="not that of its model"):
        restore(dataclasses.replace(whole, generators={"torch": generator}), fresh())


def test_the_error_names_the_checkpoint_and_the_one_before_goes_on(tmp_path):
    rng = np.random.default_rng(0)
    data = TokenData.from_documents(
        [rng.integers(0, 52, 30) for _ in range(40)], name="random", vocab_size=53, end_of_text=52
    )
    model = dataclasses.replace(TOY, vocab_size=53, context=16)
    config = TrainConfig(steps=3, batch=2, warmup=1, checkpoint_every=1, eval_every=3, eval_tokens=64)
    train(model, config, data, tmp_path)
    last = run_checkpoints(tmp_path)[-1]
    changed = read(last)
    changed.optimizer["param_groups"][0]["lr"] = torch.tensor(1 + 2j)
    save(last, changed)
    before = last.read_bytes()
    with pytest.raises(
        BadInputError, match=rf"^{re.escape(str(last))}: its optimiser .* Delete it, and --resume"
    ):
        train(model, config, data, tmp_path, resume=True)
    assert last.read_bytes() == before
    last.unlink()
    assert train(model, config, data, tmp_path, resume=True).step == 3
