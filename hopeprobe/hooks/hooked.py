"""Run a model with hooks: `hooks`, `run_with_hooks`, `caching`, `run_with_cache`, in TransformerLens's words.

What differs from TransformerLens: names are resolved before anything is registered, and a name that matches
nothing raises; hooks come off however the body ends; and a point that was asked for and never fired raises
after the run, because a hook that did not run measured nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.hooks.cache import ActivationCache
from hopeprobe.hooks.points import Direction, HookFn, HookHandle, HookPoint, InstalledHook
from hopeprobe.hooks.registry import HookRow, describe
from hopeprobe.hooks.resolve import Selector, resolve

if TYPE_CHECKING:
    from types import TracebackType

HookRequests = Iterable[tuple[Selector, HookFn]]


class HookNeverFiredError(MeasurementError):
    """Hook points were asked for and never fired; `names` lists them."""

    def __init__(self, hooks: Iterable[InstalledHook]) -> None:
        names_by_reason: dict[str, list[str]] = {}
        for hook in hooks:
            names = names_by_reason.setdefault(f"{hook.direction}: {_why_unfired(hook)}", [])
            if hook.point.name not in names:
                names.append(hook.point.name)
        self.names = tuple(dict.fromkeys(name for names in names_by_reason.values() for name in names))
        reasons = "\n".join(f"  {', '.join(names)} ({why})" for why, names in names_by_reason.items())
        super().__init__(
            "hooks never fired, so nothing was measured there (allow_unfired=True accepts that):\n" + reasons
        )

    def __reduce__(self) -> tuple[Callable[..., HookNeverFiredError], tuple[str, tuple[str, ...]]]:
        # As one rank tells it to the others, who do not have its hooks.
        return _told, (str(self), self.names)


def _told(text: str, names: tuple[str, ...]) -> HookNeverFiredError:
    error = HookNeverFiredError(())
    error.args, error.names = (text,), names
    return error


def _why_unfired(hook: InstalledHook) -> str:
    if hook.attached:
        return "nothing was backpropagated through it before the hooks came off; run backward() inside"
    if hook.reached:
        return "its tensor does not require grad, or the forward pass ran without grad"
    if hook.removed:
        return "it was removed before the forward pass came by"
    unseen = "or a compiled or traced graph without guards does not see the hook"
    if hook.point.spec.cadence == "write":
        return f"no write period ended: fewer tokens than one write period, or a model that is not written, {unseen}"
    return f"the forward pass did not come by, {unseen}"


class HookContext:
    """What `hooks(...)` returns: the hooks are on inside `with` and off after it, however it ends.

    It can be entered again once left, but not while it is entered (`RuntimeError`). A body that ends normally
    raises `HookNeverFiredError` when a point never fired (with `one_suffices`, when none did); an exception
    of the body's own is never masked.
    """

    def __init__(
        self,
        hook_dict: Mapping[str, HookPoint],
        fwd_hooks: HookRequests = (),
        bwd_hooks: HookRequests = (),
        *,
        allow_unfired: bool = False,
        one_suffices: bool = False,
    ) -> None:
        self._wanted = [*_resolved(hook_dict, fwd_hooks, "fwd"), *_resolved(hook_dict, bwd_hooks, "bwd")]
        self._allow_unfired = allow_unfired
        self._one_suffices = one_suffices
        self._installed: list[InstalledHook] | None = None

    def __enter__(self) -> HookHandle:
        if self._installed is not None:
            raise RuntimeError("this hooks(...) context is entered already; make a second one to nest")
        hooks = [InstalledHook(*wanted) for wanted in self._wanted]
        self._installed = hooks
        try:
            for hook in hooks:
                hook.install()
        except BaseException:  # an interrupt between two registrations
            self._take_off()
            raise
        return HookHandle(hooks)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        hooks = self._installed or []
        unfired = [hook for hook in hooks if not hook.fired]
        excused = self._allow_unfired or (self._one_suffices and len(unfired) < len(hooks))
        # Made before our own removal, so that only a hook somebody else took off is said to be removed.
        error = HookNeverFiredError(unfired) if unfired and not excused and exc_type is None else None
        self._take_off()
        if error is not None:
            raise error

    def _take_off(self) -> None:
        hooks, self._installed = self._installed or [], None
        for hook in hooks:
            hook.remove()


def _resolved(
    hook_dict: Mapping[str, HookPoint], requests: HookRequests, direction: Direction
) -> Iterator[tuple[HookPoint, HookFn, Direction]]:
    for request in cast("Iterable[object]", requests):
        if not (isinstance(request, tuple) and len(request) == 2 and callable(request[1])):
            raise TypeError(f"hooks are given as a list of (selector, function) pairs, not with {request!r}")
        for name in resolve(hook_dict, request[0]):
            yield hook_dict[name], request[1], direction


class Hooked:
    """A mixin for a callable with hook points: `class Model(Hooked, nn.Module)`.

    It needs only `hook_dict`, and `self(...)` for `run_with_hooks` and `run_with_cache`. A model driven by
    another method (`step`) is used inside `hooks` or `caching`.

    `torch.compile(model)` returns a wrapper; the contexts see it (`with model.caching(): compiled(tokens)`),
    while its `run_with_*` are the original's and run uncompiled. After `model.compile()` everything runs
    compiled.
    """

    hook_dict: Mapping[str, HookPoint]

    def _register_hooks(self, points: Mapping[str, HookPoint]) -> None:
        """Declare the points, a `HookRegistry` or a mapping by name; for the model's constructor."""
        for name, point in points.items():
            if point.name != name:
                raise BadInputError(
                    f"the hook point {point.name!r} is registered under another name, {name!r}"
                )
        self.hook_dict = points

    def list_hooks(self, pattern: Selector | None = None) -> list[HookRow]:
        """Say what the points declare, all or those that `pattern` selects (`BadInputError` when none)."""
        if pattern is None:
            return describe(self.hook_dict)
        return describe({name: self.hook_dict[name] for name in resolve(self.hook_dict, pattern)})

    def add_hook(
        self,
        name: Selector,
        fn: HookFn,
        dir: Direction = "fwd",  # noqa: A002 - TransformerLens's word
    ) -> HookHandle:
        """Add a hook that stays until `handle.remove()` or `reset_hooks()`; contexts leave it alone.

        `name` may be any selector. Nothing checks at the end that the hook fired; `handle.fired` counts.
        Raises `BadInputError` when nothing matches.
        """
        hooks = [InstalledHook(self.hook_dict[n], fn, dir) for n in resolve(self.hook_dict, name)]
        for hook in hooks:
            hook.install()
        return HookHandle(hooks)

    def hooks(
        self, fwd_hooks: HookRequests = (), bwd_hooks: HookRequests = (), *, allow_unfired: bool = False
    ) -> HookContext:
        """Make a context in which these hooks are on; each request is `(selector, fn)`.

        `fn(tensor, hook)` returns None to observe, a tensor of the same shape, dtype and device to replace.
        A backward hook gets the gradient, and only from a `backward()` inside the context. The value of the
        context is a `HookHandle`.

        Raises `BadInputError` or `TypeError` at once, with nothing registered, for a selector that matches
        nothing or a malformed request; `HookNeverFiredError` at the end of the context unless
        `allow_unfired`.

            with model.hooks(fwd_hooks=[("blocks.*.cms.fast.hook_delta", lambda delta, hook: delta * 0)]):
                loss = model(tokens)
        """
        return HookContext(self.hook_dict, fwd_hooks, bwd_hooks, allow_unfired=allow_unfired)

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: HookRequests = (),
        bwd_hooks: HookRequests = (),
        allow_unfired: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return `self(*args, **kwargs)`, run inside `hooks(...)`, whose arguments and errors these are.

        Backward hooks fire only if the call runs backward itself; otherwise use `hooks` around both.
        """
        with self.hooks(fwd_hooks, bwd_hooks, allow_unfired=allow_unfired):
            return cast("Callable[..., Any]", self)(*args, **kwargs)

    @contextmanager
    def caching(
        self, names_filter: Selector | None = None, *, detach: bool = True, allow_unfired: bool = False
    ) -> Iterator[ActivationCache]:
        """Record into the cache that the context yields, over as many calls of the model as are made inside.

        `names_filter` selects the points; None takes all that fire. Raises as `hooks` does on entering and
        leaving; with None, `HookNeverFiredError` only when no point fired at all.
        """
        names = resolve(self.hook_dict, "*" if names_filter is None else names_filter)
        cache = ActivationCache(names, detach=detach)
        with HookContext(
            self.hook_dict,
            [(names, cache.record)],
            allow_unfired=allow_unfired,
            one_suffices=names_filter is None,
        ):
            yield cache

    def run_with_cache(
        self,
        *args: Any,
        names_filter: Selector | None = None,
        detach: bool = True,
        allow_unfired: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Return `(self(*args, **kwargs), cache)`; `caching` has the arguments, `ActivationCache` the shapes.

        The cache holds each tensor as the hooks added before left it, so that edits show.
        """
        with self.caching(names_filter, detach=detach, allow_unfired=allow_unfired) as cache:
            out = cast("Callable[..., Any]", self)(*args, **kwargs)
        return out, cache

    def reset_hooks(self) -> None:
        """Remove every hook from every point; torch's own hooks on modules and tensors are not touched."""
        for point in self.hook_dict.values():
            point.remove_hooks()
