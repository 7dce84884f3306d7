"""Code written for TransformerLens: the same functions run on its own hooked modules and on our model."""

import pytest
import torch

pytestmark = pytest.mark.interop


@pytest.fixture
def lens():
    """A residual network on TransformerLens's own machinery (its HookedTransformer is gone since version 4)."""
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hook_resid_pre, self.mlp = HookPoint(), torch.nn.Linear(16, 16)

        def forward(self, x):
            x = self.hook_resid_pre(x)
            return x + self.mlp(x).tanh()

    class Network(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(61, 16)
            self.blocks = torch.nn.ModuleList([Block(), Block()])
            self.setup()

        def forward(self, tokens):
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    return Network()


@pytest.fixture(params=["transformer-lens", "hopeprobe"])
def any_model(request, model, lens):
    """A model, a point in its residual stream, and what it gives for tokens, whatever its output is called."""
    if request.param == "hopeprobe":
        return model, "blocks.1.hook_resid_pre", lambda out: out.losses
    return lens, "blocks.1.hook_resid_pre", lambda out: out


def read(model, tokens, name):
    """Names by a predicate, a cache by name, None to observe."""
    out, cache = model.run_with_cache(tokens, names_filter=lambda hook_name: hook_name == name)
    seen = []

    def look(tensor, hook):
        seen.append((hook.name, tensor))

    model.run_with_hooks(tokens, fwd_hooks=[(name, look)])
    return out, cache[name], seen


def steer(model, tokens, name, by):
    """A hook that returns a tensor replaces; a context takes its hooks off."""
    with model.hooks(fwd_hooks=[(name, lambda tensor, hook: tensor + by)]):
        return model(tokens)


def gradient(model, tokens, name, loss):
    """Backward hooks get the gradient at the point."""
    found = []
    with model.hooks(bwd_hooks=[(name, lambda grad, hook: found.append(grad))]):
        loss(model(tokens)).sum().backward()
    return found


def test_reading(any_model, tokens):
    model, name, _ = any_model
    _, cached, seen = read(model, tokens, name)
    assert cached.shape[0] == 2
    assert cached.shape[2] == 16
    assert {n for n, _ in seen} == {name}
    torch.testing.assert_close(torch.cat([t for _, t in seen], dim=1), cached)


def test_steering(any_model, tokens):
    model, name, loss = any_model
    plain = loss(model(tokens))
    torch.testing.assert_close(loss(steer(model, tokens, name, 0.0)), plain)
    assert (loss(steer(model, tokens, name, torch.arange(16.0))) - plain).abs().max() > 1e-4
    torch.testing.assert_close(loss(model(tokens)), plain)  # the hooks are off


def test_gradients(any_model, tokens):
    model, name, loss = any_model
    found = gradient(model, tokens, name, loss)
    assert found
    assert all(grad.shape[2] == 16 for grad in found)
    assert any(grad.abs().max() > 0 for grad in found)


def test_hooks_that_stay_until_reset(any_model, tokens):
    model, name, loss = any_model
    plain = loss(model(tokens))
    model.add_hook(name, lambda tensor, hook: tensor * 0)
    assert (loss(model(tokens)) - plain).abs().max() > 1e-4
    model.reset_hooks()
    torch.testing.assert_close(loss(model(tokens)), plain)


def test_points_are_listed_by_name(any_model):
    model, name, _ = any_model
    assert model.hook_dict[name].name == name


def test_a_typing_error_is_an_error_with_us_alone(model, lens, tokens):
    from hopeprobe.errors import BadInputError

    _, cache = lens.run_with_cache(tokens[:, :-1], names_filter="blocks.1.hook_resid_per")
    assert len(cache) == 0, "TransformerLens gives an empty cache"
    with pytest.raises(BadInputError, match="hook_resid_pre"):
        model.run_with_cache(tokens, names_filter="blocks.1.hook_resid_per")
