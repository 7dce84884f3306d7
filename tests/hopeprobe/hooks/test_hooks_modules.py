"""Hook points as modules: what torch's own hooks on them see and change, as those of the points do."""

import pytest
import torch

from hopeprobe.errors import BadInputError
from hopeprobe.hooks import PointModules
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.hope import HopeModel

DELTA = "blocks.1.cms.fast.hook_delta"


@pytest.fixture
def model():
    return HopeModel(ModelConfig(vocab_size=61, dim=16, layers=2, context=32, heads=2), 0)


@pytest.fixture
def tokens():
    return torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(0))


def test_a_module_gives_what_its_point_shows(model, tokens):
    seen = []
    whole = PointModules(model)
    whole.points.blocks[1].cms.fast.hook_delta.register_forward_hook(
        lambda module, given, out: seen.append(out)
    )
    with torch.no_grad():
        out = whole(tokens)
        expected, cache = model.run_with_cache(tokens, names_filter=DELTA)
    assert len(seen) == 2, "one a tick"
    torch.testing.assert_close(torch.cat(seen, dim=1), cache[DELTA])
    torch.testing.assert_close(out.losses, expected.losses)


@pytest.mark.parametrize("in_place", [True, False])
def test_an_edit_goes_on(model, tokens, in_place):
    whole = PointModules(model, "blocks.*.hook_delta")

    def edit(module, given, out):
        return out.zero_() if in_place else out * 0

    whole.points.blocks[1].cms.fast.hook_delta.register_forward_hook(edit)
    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=[(DELTA, lambda x, hook: x * 0)])
        torch.testing.assert_close(whole(tokens).losses, expected.losses)
        assert (expected.losses - model(tokens).losses).abs().max() > 1e-4


def test_what_cannot_be_edited_is_not(model, tokens):
    whole = PointModules(model, "hook_surprise")
    whole.points.hook_surprise.register_forward_hook(lambda module, given, out: out.zero_())
    with torch.no_grad():
        torch.testing.assert_close(whole(tokens).losses, model(tokens).losses)


def test_it_has_every_point_and_no_weights_of_its_own(model):
    whole = PointModules(model)
    named = {
        name.removeprefix("points.") for name, module in whole.named_modules() if name.startswith("points.")
    }
    assert set(model.hook_dict) <= named
    assert [id(p) for p in whole.parameters()] == [id(p) for p in model.parameters()]
    assert not any(point.active for point in model.hook_dict.values())


def test_what_is_not_there_is_named(model):
    with pytest.raises(BadInputError, match="hook_delta"):
        PointModules(model, "blocks.0.hook_dleta")
    with pytest.raises(TypeError, match="a Linear has no hook points"):
        PointModules(torch.nn.Linear(1, 1))
