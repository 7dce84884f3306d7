"""Hook points as torch modules, for tools that see only modules: nnsight, torch's own hooks, profilers.

A hook point is a plain object, which costs nothing while it is idle. `PointModules(model)` runs the same model with a
module at each point: what the point shows is the module's output, and what becomes of that output goes on, where the
point can be edited. It fires once a tick or write, as the point does.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hopeprobe.hooks.hooked import Hooked
from hopeprobe.hooks.resolve import resolve

if TYPE_CHECKING:
    from hopeprobe.hooks.points import HookPoint
    from hopeprobe.hooks.resolve import Selector


class PointModules(nn.Module):
    """A model, and its hook points as modules of the same names: `points.blocks[0].cms.fast.hook_delta`.

    Attributes:
        model: the model itself; its weights are these modules' only ones.
        points: a tree of modules, by the parts of the points' names; a list where all parts are numbers.

    """

    def __init__(self, model: nn.Module, names: Selector = "*") -> None:
        """Make a module for each point that `names` selects.

        Raises BadInputError when that is none, TypeError for a model without points.
        """
        super().__init__()
        if not isinstance(model, Hooked):
            raise TypeError(f"a {type(model).__name__} has no hook points")
        self.model = model
        tree: dict[str, Any] = {}
        self._by_name: dict[str, nn.Module] = {}
        for name in resolve(model.hook_dict, names):
            at = tree
            *path, last = name.split(".")
            for part in path:
                at = at.setdefault(part, {})
            # Kept in a dict of ours too: the tree is for the eye, and for whoever wraps its modules.
            at[last] = self._by_name[name] = nn.Identity()
        self.points = _tree(tree)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with its arguments; each point's module is called where the point fires."""
        assert isinstance(self.model, Hooked)
        hooks = [(name, partial(_through, module)) for name, module in self._by_name.items()]
        with self.model.hooks(hooks, allow_unfired=True):
            return self.model(*args, **kwargs)


def _through(module: nn.Module, tensor: Tensor, hook: HookPoint) -> Tensor | None:
    """A copy goes through the module, which may change it in place."""
    given = module(tensor.clone())
    return given if hook.spec.editable else None


def _tree(parts: Mapping[str, Any]) -> nn.Module:
    """A dict of dicts as modules."""
    made = {name: part if isinstance(part, nn.Module) else _tree(part) for name, part in parts.items()}
    if list(made) == [str(i) for i in range(len(made))]:
        return nn.ModuleList(made.values())
    tree = nn.Module()
    for name, module in made.items():
        tree.add_module(name, module)
    return tree
