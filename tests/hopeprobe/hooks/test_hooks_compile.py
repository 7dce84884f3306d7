"""Under torch.compile a hook fires or something raises; it is never skipped in silence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from hopeprobe.hooks import Hooked, HookNeverFiredError, HookRegistry, HookSpec

# Torch itself reads `.grad` of a tensor that crosses a graph break, and warns about its own reading.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

BACKENDS = ["eager", "aot_eager"]
POINTS = 10  # more than dynamo's recompile limit of 8


class Chain(Hooked, nn.Module):
    """Points called in both documented forms between compiled operations."""

    def __init__(self) -> None:
        super().__init__()
        registry = HookRegistry()
        self.mix = nn.Linear(3, 3)
        self.points = [
            registry.add(f"points.{i}", HookSpec(("batch", "d"), "tick", True, "x")) for i in range(POINTS)
        ]
        self._register_hooks(registry)

    def forward(self, x):
        x = self.mix(x)
        for i, point in enumerate(self.points):
            x = point(x) if i % 2 else (point(x) if point.active else x)
            x = torch.tanh(x)
        return x


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def chain():
    torch.manual_seed(0)
    return Chain()


X = torch.ones(2, 3)


class Grads(list):
    def __call__(self, grad, hook):
        self.append(grad.clone())


def double(tensor, hook):
    return tensor * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("late", [False, True], ids=["before", "late"])
def test_hooks_fire_whether_added_before_or_after_the_first_compiled_run(chain, backend, late):
    compiled = torch.compile(chain, backend=backend)
    plain = chain(X)
    if late:
        assert torch.equal(compiled(X), plain)
    for name in ("points.2", "points.3"):
        grads = Grads()
        with chain.hooks([(name, double)], [(name, grads)]) as handle:
            out = compiled(X)
            out.sum().backward()
            reference = chain(X)
            expected = torch.autograd.grad(reference.sum(), chain.mix.bias)[0]
        assert handle.fired[name] == 4  # forward and backward, compiled and not
        assert torch.equal(out, reference)
        assert not torch.equal(out, plain)
        torch.testing.assert_close(grads[0], grads[1])
        torch.testing.assert_close(chain.mix.bias.grad, expected)
        chain.zero_grad()
        assert torch.equal(compiled(X), plain)  # and off again


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_late_permanent_hook_fires(chain, backend):
    compiled = torch.compile(chain, backend=backend)
    compiled(X)
    handle = chain.add_hook("points.*", lambda t, hook: None)
    compiled(X)
    second = chain.add_hook("points.3", double)  # the point is in the graph as active already
    out = compiled(X)
    assert set(handle.fired.values()) == {2}
    assert second.fired == {"points.3": 1}
    assert torch.equal(out, chain(X))


def test_more_patterns_of_hooks_than_the_compiler_caches_still_fire(chain):
    compiled = torch.compile(chain, backend="eager")
    for name in chain.hook_dict:
        with chain.caching(name) as cache:
            compiled(X)
        assert torch.equal(cache[name], chain.run_with_cache(X, names_filter=name)[1][name])


def test_idle_points_do_not_break_the_graph(chain):
    compiled = torch.compile(chain, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), chain(X))


@pytest.mark.parametrize("late", [False, True], ids=["before", "late"])
def test_fullgraph_refuses_a_hook_aloud(chain, late):
    compiled = torch.compile(chain, backend="eager", fullgraph=True)
    if late:
        compiled(X)
    chain.add_hook("points.3", double)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(X)


def test_a_graph_that_runs_without_its_guards_raises_after_the_run(chain):
    compiled = torch.compile(chain, backend="eager")
    plain = compiled(X)
    with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
        with (
            pytest.raises(HookNeverFiredError, match="compiled or traced graph") as caught,
            chain.hooks([("points.3", double)]),
        ):
            assert torch.equal(compiled(X), plain)  # the planted defect: the hook is skipped
        assert caught.value.names == ("points.3",)
        with pytest.raises(HookNeverFiredError), chain.caching():
            compiled(X)


def test_a_traced_graph_raises_after_the_run(chain):
    program = torch.export.export(chain, (X,)).module()
    with pytest.raises(HookNeverFiredError), chain.caching("points.*"):
        program(X)


def test_a_model_compiled_in_place_runs_its_hooks(chain):
    chain.compile(backend="eager")
    chain(X)
    _, cache = chain.run_with_cache(X, names_filter="points.3")
    assert cache["points.3"].shape == (2, 1, 3)  # batch, tick, d


def test_the_hooks_do_not_import_the_compiler():
    code = (
        "import sys, torch; from hopeprobe.hooks import HookPoint, HookSpec; "
        "p = HookPoint('h', HookSpec(('b',), 'tick', True, 'x')); p.add_hook(lambda t, hook: None); "
        "p(torch.ones(1)); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
