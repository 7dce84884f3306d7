"""Our models inside nnsight, the real package: what a trace reads and changes is what hooks read and change."""

import pytest
import torch

from hopeprobe.hooks import PointModules

pytestmark = pytest.mark.interop
DELTA = "blocks.0.cms.fast.hook_delta"


@pytest.fixture
def traced(model):
    from nnsight import NNsight

    return NNsight(PointModules(model))


def test_a_trace_reads_each_tick(model, traced, tokens):
    with traced.trace(tokens) as tracer:
        seen = list().save()  # noqa: C408 - what a trace is to keep is told to it so
        for _ in tracer.iter[0:2]:
            seen.append(traced.points.blocks[0].cms.fast.hook_delta.output)
        out = traced.output.save()
    expected, cache = model.run_with_cache(tokens, names_filter=DELTA)
    torch.testing.assert_close(torch.cat(list(seen), dim=1), cache[DELTA], check_device=True)
    torch.testing.assert_close(out.losses, expected.losses)


def test_a_trace_intervenes(model, traced, tokens):
    with traced.trace(tokens) as tracer:
        for _ in tracer.iter[0:2]:
            traced.points.blocks[0].cms.fast.hook_delta.output[:] = 0
        out = traced.output.save()
    expected = model.run_with_hooks(tokens, fwd_hooks=[(DELTA, lambda x, hook: x * 0)])
    torch.testing.assert_close(out.losses, expected.losses)
    assert (out.losses - model(tokens).losses).abs().max() > 1e-4


def test_a_trace_closes_a_write_gate(model, traced, tokens):
    with traced.trace(tokens) as tracer:
        for _ in tracer.iter[0:2]:
            traced.points.blocks[1].selfmod.hook_write_gate.output[:] = 0
        out = traced.output.save()
    expected = model.run_with_hooks(
        tokens, fwd_hooks=[("blocks.1.selfmod.hook_write_gate", lambda gate, hook: gate * 0)]
    )
    torch.testing.assert_close(out.losses, expected.losses)
    assert (out.losses - model(tokens).losses).abs().max() > 0


def test_fast_weights_are_read_as_written(model, traced, tokens):
    with traced.trace(tokens):
        fast = traced.points.blocks[0].selfmod.k.hook_fast_w1.output.save()
    _, cache = model.run_with_cache(tokens, names_filter="blocks.0.selfmod.k.hook_fast_w1")
    torch.testing.assert_close(fast, cache["blocks.0.selfmod.k.hook_fast_w1"][:, 0])
