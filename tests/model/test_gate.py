"""The surprise gate: above the threshold, and only where there is a loss."""

import torch

from hopeprobe.model.gate import surprise_gate


def test_it_opens_above_the_threshold_where_a_token_has_a_loss():
    surprise = torch.tensor([[0.0, 0.02, 0.03, 5.0]], dtype=torch.float64)
    scored = torch.tensor([[True, True, True, False]])
    gate = surprise_gate(surprise, scored, 0.02)
    assert gate.tolist() == [[0.0, 0.0, 1.0, 0.0]]
    assert gate.dtype == torch.float64
    assert surprise_gate(surprise, scored, -1.0).tolist() == [[1.0, 1.0, 1.0, 0.0]]  # padding stays shut


def test_a_loss_that_is_not_finite_is_not_written_as_if_it_were_surprise():
    surprise = torch.tensor([float("nan"), float("inf")])
    assert surprise_gate(surprise, torch.tensor([True, True]), 0.02).tolist() == [0.0, 1.0]
