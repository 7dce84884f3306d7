"""A batch cut over ranks: shares, and by torchrun itself that several ranks are one run."""

import functools
import json
import math
import operator
import shutil
from pathlib import Path

import pytest
import ranks_train
import torch
from hypothesis import given
from hypothesis import strategies as st

from hopeprobe import ranks
from hopeprobe.errors import BadInputError, DivergedError
from hopeprobe.model import parallel
from hopeprobe.model.checkpoint import read, step_path
from hopeprobe.model.run import fresh
from hopeprobe.model.update import Look

PROGRAM = Path(__file__).with_name("ranks_train.py")
LAST = ranks_train.CONFIG.steps
HELD_OUT = {"held_out_live", "held_out_frozen"}


@given(st.integers(1, 40), st.integers(1, 9))
def test_shares_are_the_batch_and_even(batch, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "size", lambda: count)
        shares = []
        for number in range(count):
            patch.setattr(ranks, "rank", lambda number=number: number)
            if batch < count:
                with pytest.raises(BadInputError, match=f"{batch} windows cannot be cut over {count} ranks"):
                    parallel.rows(batch)
                return
            shares.append(list(range(batch))[parallel.rows(batch)])
    assert functools.reduce(operator.iadd, shares, []) == list(range(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_memory_is_shared_by_the_ranks_of_a_machine_and_not_by_devices(monkeypatch):
    assert parallel.rows_together(8, torch.device("cpu")) == 8
    monkeypatch.setattr(ranks, "size", lambda: 4)
    monkeypatch.setattr(ranks, "on_this_machine", lambda: 2)
    assert parallel.rows_together(10, torch.device("cpu")) == 6
    assert parallel.rows_together(10, torch.device("cuda")) == 3


def test_looks_weigh_as_many_windows():
    here, there = (
        Look(9.0, 0.25, 1.0, 0.5, math.nan, (2.0, 1.0)),
        Look(7.0, 0.125, 0.0, 0.9, math.nan, (4.0, 3.0)),
    )
    found = parallel.whole([(3, here), (1, there)], 5.0)
    assert found[:3] == (5.0, 0.125, 0.75)
    assert found.retention == pytest.approx(0.6)
    assert math.isnan(found.ratio)
    assert found.parts == (2.5, 1.5)
    assert found.loss == 4.0


def test_a_gradient_that_one_rank_has_is_everybodys(monkeypatch):
    """The other rank has one of `b` alone, and of `c` no rank has one."""
    a, b, c = (torch.nn.Parameter(torch.zeros(2, n)) for n in (1, 2, 3))
    a.grad = torch.ones(2, 1)
    theirs = torch.cat([torch.zeros(2), torch.full((4,), 3.0), torch.zeros(6), torch.tensor([0.0, 1.0, 0.0])])
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "summed", lambda flat: flat.add_(theirs))
    parallel.sum_gradients([a, b, c])
    assert a.grad.tolist() == [[1.0], [1.0]]
    assert b.grad.tolist() == [[3.0, 3.0]] * 2
    assert c.grad is None


def test_gradients_go_in_pieces_of_one_dtype(monkeypatch):
    wide = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3)), wide]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    sent = []
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "summed", lambda flat: sent.append((flat.dtype, len(flat))))
    monkeypatch.setattr(parallel, "_BUCKET", 4)
    parallel.sum_gradients(parameters)
    assert sent == [(torch.float32, 4), (torch.float32, 4), (torch.float64, 4)]


def test_a_rank_says_which_sequence_of_the_whole_batch_is_not_finite(monkeypatch, tmp_path):
    """Rank 1 of two has the last two windows of five, and the second of them is not finite."""
    run = fresh(ranks_train.MODEL, ranks_train.CONFIG, ranks_train.data(), tmp_path, torch.device("cpu"))
    tokens = torch.randint(0, 52, (5, 17), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(ranks, "summed", lambda flat: None)

    def spoil(tensor, hook):
        return tensor.clone().index_fill_(0, torch.tensor([1]), math.nan)

    with (
        run.model.hooks([("hook_embed", spoil)]),
        pytest.raises(DivergedError, match="sequence 4 of the batch, token 0"),
    ):
        parallel.RankStep(run)(tokens, 1e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every case trained in one process."""
    folder = tmp_path_factory.mktemp("alone")
    ranks_train.run(folder)
    return folder


def compare(folder, other, name):
    """Lines of metrics and last weights within 1e-5; the largest difference of a loss."""
    lines = [
        [json.loads(line) for line in (each / name / "metrics.jsonl").read_text().splitlines()]
        for each in (folder, other)
    ]
    assert [line["step"] for line in lines[0]] == list(range(1, LAST + 1))
    largest = 0.0
    for one, two in zip(*lines, strict=True):
        # A run that ended on the way has measured there too.
        assert one.keys() == two.keys() - (HELD_OUT - one.keys())
        for key in one.keys() - {"tokens_per_s"}:
            assert (one[key] is None) == (two[key] is None), (name, key)
            if one[key] is not None:
                assert two[key] == pytest.approx(one[key], abs=1e-5, rel=0), (name, key, one["step"])
        largest = max(largest, abs(one["loss"] - two["loss"]))
    files = [{path.name for path in (each / name).iterdir()} for each in (folder, other)]
    assert files[0] == files[1]
    ends = [read(step_path(each / name, LAST)) for each in (folder, other)]
    assert ends[0].train == ends[1].train
    assert ends[0].optimizer["state"].keys() == ends[1].optimizer["state"].keys()
    return largest


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_are_one_run(count, alone, torchrun, tmp_path):
    ended = torchrun(count, PROGRAM, tmp_path / "several", LAST, 0)
    assert ended.code == 0, ended.err
    largest = {name: compare(alone, tmp_path / "several", name) for name in ranks_train.CASES}
    print(f"\n{count} ranks, largest difference of a loss: {largest}")
    assert max(largest.values()) > 0  # or it was one process, compared with itself


@pytest.mark.slow
def test_another_number_of_ranks_continues(alone, torchrun, tmp_path):
    """15 steps by one process, then two ranks; and 15 by two ranks, then one process; two on two, bit for bit."""
    cases = ["default", "seldom-open"]
    ranks_train.run(tmp_path / "one-two", 15, cases=cases)
    first = torchrun(2, PROGRAM, tmp_path / "two-one", 15, 0, *cases)
    assert first.code == 0, first.err
    shutil.copytree(tmp_path / "two-one", tmp_path / "two-two")
    for name in ("one-two", "two-two"):
        then = torchrun(2, PROGRAM, tmp_path / name, LAST, 1, *cases)
        assert then.code == 0, then.err
    ranks_train.run(tmp_path / "two-one", LAST, True, cases)
    whole = torchrun(2, PROGRAM, tmp_path / "two", LAST, 0, *cases)
    assert whole.code == 0, whole.err
    for case in cases:
        for name in ("one-two", "two-one", "two-two", "two"):
            compare(alone, tmp_path / name, case)
        assert compare(tmp_path / "two", tmp_path / "two-two", case) == 0.0
