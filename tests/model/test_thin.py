"""Products with fast weights: every gradient is what plain autograd gives of the same mathematics."""

import pytest
import torch
from model_toys import TOY

from hopeprobe.model.hope import HopeModel
from hopeprobe.model.thin import attach, back_each, decay_and_write, rows_only, sealed, times, times_each

B, M, OUT, IN, N = 2, 3, 5, 4, 6


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs():
    """Everything that a stream of two writes reads."""
    made = {
        "meta": draw(M, OUT, IN, seed=1),
        "w": draw(B, M, OUT, IN, seed=2),
        "end": draw(B, seed=3).sigmoid(),
        "left_shared": draw(B, N, M * OUT, seed=4),
        "right_shared": draw(B, N, IN, seed=5),
        "left_each": draw(B * M, N, OUT, seed=6),
        "right_each": draw(B * M, N, IN, seed=7),
        "x": draw(B, N, IN, seed=8),
        "xs": draw(B * M, N, IN, seed=9),
        "ys": draw(B * M, N, OUT, seed=10),
    }
    return {name: t.requires_grad_(name != "w") for name, t in made.items()}


def plain_write(w, meta, end, left, right, shared):
    if shared:
        left = left.unflatten(-1, (M, OUT)).permute(0, 2, 1, 3)
        right = right[:, None].expand(-1, M, -1, -1)
    else:
        left, right = left.unflatten(0, (B, M)), right.unflatten(0, (B, M))
    kept = end[:, None, None, None]
    decayed = kept * w if meta is None else kept * w + (1 - kept) * meta
    return decayed - left.mT @ right


def stream(given, shared, decays_to_zero, fast):
    """Read, write, read, write, read; `fast` by the code under test, else by plain autograd. Every output's sum."""
    meta = None if decays_to_zero else given["meta"]
    kind = "shared" if shared else "each"
    left, right = given[f"left_{kind}"], given[f"right_{kind}"]
    w = (
        attach(given["meta"], given["w"], shared=shared)
        if fast
        else given["w"] + (given["meta"] - given["meta"].detach())
    )
    total = 0.0
    for turn in range(3):
        if shared and fast:
            found = [times(given["x"], w), times(given["x"] * 2, w, slice(1, 3))]
        elif shared:
            whole = torch.einsum("bni,bmoi->bnmo", given["x"], w)
            found = [whole, 2 * whole[:, :, 1:3]]
        elif fast:
            one = times_each(given["xs"][:B], w, slice(2, 3))
            found = [times_each(given["xs"], w), one, back_each(given["ys"], w)]
        else:
            flat = w.flatten(0, 1)
            found = [given["xs"] @ flat.mT, given["xs"][:B] @ w[:, 2].mT, given["ys"] @ flat]
        total = total + sum((f * torch.arange(1, f.numel() + 1).view_as(f).cos()).sum() for f in found)
        if turn < 2:
            step = (meta, given["end"], left * (1 + turn), right)
            w = decay_and_write(w, *step, shared=shared) if fast else plain_write(w, *step, shared)
    return total, w


@pytest.mark.parametrize("decays_to_zero", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_plain_autograd(shared, decays_to_zero):
    mine, theirs = inputs(), inputs()
    for given, fast in ((mine, True), (theirs, False)):
        total, _ = stream(given, shared, decays_to_zero, fast)
        total.backward(retain_graph=True)
        total.backward()  # what the first left behind must not count again
    got = {name: t.grad for name, t in mine.items()}
    for name, t in theirs.items():
        assert (got[name] is None) == (t.grad is None), name
        if t.grad is not None:
            assert t.grad.any(), name
            torch.testing.assert_close(got[name], t.grad, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("shared", [False, True])
def test_a_gradient_of_the_rows_alone_leaves_nothing_to_the_weights(shared):
    """The inner gradient of a CMS write is such a one: it runs through the same products."""
    mine, theirs = inputs(), inputs()
    total, last = stream(mine, shared, False, fast=True)
    rows = mine["x" if shared else "xs"]
    (first,) = torch.autograd.grad(total, rows, retain_graph=True)
    held = last.grad_fn.slot
    assert held.factors  # nothing told them what would be asked
    held.factors.clear()
    with rows_only():
        (again,) = torch.autograd.grad(total, rows, retain_graph=True)
    assert not held.factors
    assert torch.equal(again, first)
    total.backward()
    assert not held.factors
    stream(theirs, shared, False, fast=False)[0].backward()
    torch.testing.assert_close(first, theirs["x" if shared else "xs"].grad)
    torch.testing.assert_close(mine["meta"].grad, theirs["meta"].grad)


def test_sealed_weights_have_their_whole_gradient():
    """Asked of the weights themselves, autograd would not see what products left with their maker."""
    x, w = draw(B, N, IN), stream(inputs(), True, False, fast=True)[1]
    expected = 2 * times(x, w).flatten(2).mT @ x
    for shown, found in ((sealed(w), True), (w, False)):
        grad = torch.autograd.grad(times(x, shown).square().sum(), shown, allow_unused=True)[0]
        assert (grad is not None) == found
        if grad is not None:
            torch.testing.assert_close(grad.flatten(1, 2), expected)


def test_a_state_that_a_caller_gets_has_its_whole_gradient():
    """A model goes on from it as from numbers that were put there."""
    model = HopeModel(TOY, seed=1, dtype=torch.float64)
    tokens = torch.randint(0, 37, (2, 33), generator=torch.Generator().manual_seed(0))
    state = model(tokens[:, :17]).state
    mine = state.layers[0].selfmod.groups[0].w2
    (got,) = torch.autograd.grad(model(tokens[:, 16:], state=state).losses.sum(), mine, retain_graph=True)
    number = mine.detach().clone().requires_grad_()
    layer = state.layers[0]
    group = layer.selfmod.groups[0]._replace(w2=number)
    layer = layer._replace(selfmod=layer.selfmod._replace(groups=(group,)))
    replaced = state._replace(layers=(layer, state.layers[1]))
    (expected,) = torch.autograd.grad(model(tokens[:, 16:], state=replaced).losses.sum(), number)
    assert expected.any()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_second_derivatives_are_refused_and_not_wrong():
    given = inputs()
    total, _ = stream(given, True, False, fast=True)
    (grad,) = torch.autograd.grad(total.square(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_the_shape_of_a_product_does_not_change_its_value(rows):
    """Few rows of tall matrices are multiplied the other way round."""
    x, w = draw(B, rows, IN, seed=1), draw(B, M, OUT, IN, seed=2)
    found = times(x, w)
    assert found.is_contiguous()
    torch.testing.assert_close(found, torch.einsum("bni,bmoi->bnmo", x, w))


def test_in_place_only_where_it_is_given_away():
    given = {name: t.detach() for name, t in inputs().items()}
    step = (given["meta"], given["end"], given["left_shared"], given["right_shared"])
    before = given["w"].clone()
    new = decay_and_write(given["w"], *step, shared=True)
    assert torch.equal(given["w"], before)
    again = decay_and_write(given["w"], *step, shared=True, donated=True)
    assert again.data_ptr() == given["w"].data_ptr()
    assert torch.equal(again, new)
    torch.testing.assert_close(new, plain_write(before, *step, True))
