"""The gate by a threshold; budgets and scores are tested beside it."""

import torch

from hopeprobe.model.config import GateConfig
from hopeprobe.model.gate import Gate
from hopeprobe.model.scores import Seen


def absolute(surprise, scored, threshold):
    targets = torch.where(scored, 0, -1)
    gate = Gate(GateConfig(), threshold, layers=2)
    return gate.decide(Seen(surprise, targets, None, None, None), None, 0).gate[:, 0]


def test_it_opens_above_the_threshold_where_a_token_has_a_loss():
    surprise = torch.tensor([[0.0, 0.02, 0.03, 5.0]], dtype=torch.float64)
    scored = torch.tensor([[True, True, True, False]])
    gate = absolute(surprise, scored, 0.02)
    assert gate.tolist() == [[0.0, 0.0, 1.0, 0.0]]
    assert gate.dtype == torch.float64
    assert absolute(surprise, scored, -1.0).tolist() == [[1.0, 1.0, 1.0, 0.0]]  # padding stays shut


def test_a_loss_that_is_not_finite_is_not_written_as_if_it_were_surprise():
    surprise = torch.tensor([[float("nan"), float("inf")]])
    assert absolute(surprise, torch.tensor([[True, True]]), 0.02).tolist() == [[0.0, 1.0]]
