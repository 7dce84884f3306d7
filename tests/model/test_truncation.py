"""Cutting the outer gradient: the same gradient whichever way it is cut, and a refusal of what memory cannot hold."""

import dataclasses
import os

import pytest
import torch
from model_toys import TOY

from hopeprobe.errors import BadInputError
from hopeprobe.model.config import preset
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.state import detach_state
from hopeprobe.model.truncation import check_memory, graph_bytes, segments


def test_segments_give_the_truncated_gradient():
    """Inside one graph, or by separate backwards: the two must agree, and differ from the whole gradient."""
    cut = dataclasses.replace(TOY, truncate_ticks=2, context=64)
    model = HopeModel(cut, seed=1, dtype=torch.float64)
    tokens = torch.randint(0, TOY.vocab_size, (2, 65), generator=torch.Generator().manual_seed(0))
    parts = list(segments(cut, tokens))
    assert [p.shape[1] for p in parts] == [17, 17, 17, 17]
    model(tokens).losses.mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    state = model.init_state(2)
    for part in parts:
        out = model(part, state=state)
        (out.losses.sum() / 128).backward()
        state = detach_state(out.state)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-10, atol=1e-14), name
    whole = HopeModel(dataclasses.replace(TOY, context=64), seed=1, dtype=torch.float64)
    whole(tokens).losses.mean().backward()
    memory = "blocks.0.selfmod.memories.eta.w2"
    assert not torch.allclose(dict(whole.named_parameters())[memory].grad, expected[memory])


def test_without_truncation_there_is_one_segment():
    tokens = torch.zeros(2, 65, dtype=torch.int64)
    assert [p.shape for p in segments(TOY, tokens)] == [tokens.shape]


def test_what_the_machine_cannot_hold_is_refused_with_what_it_can(monkeypatch):
    config = preset("small")
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2 * 2**18}[name])
    with pytest.raises(BadInputError, match="--truncate-ticks") as caught:
        check_memory(config, 8)
    advised = int(str(caught.value).split("--truncate-ticks ")[1].split(",")[0])
    cut = dataclasses.replace(config, truncate_ticks=advised)
    assert graph_bytes(cut, 8) < 2 * 2**30
    check_memory(cut, 8)
    check_memory(preset("small", "transformer"), 8)
