"""What a map says is tried before anything is measured: a point that shows something else would be believed.

On two short random windows: the model gives the same logits twice; they do not depend on later tokens, nor on the other
row; every point fires, with the tokens that went in; a copy put in at an editable point changes nothing; and with a
memory's `freeze` in force its fast weights are the parameters that they are said to start from.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from hopeprobe.errors import BadInputError, MeasurementError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from hopeprobe.hooks import HookPoint

    from .subject import MappedSubject

_MOST = 4096  # tokens of a window
_ROWS = 2


def sample_length(subject: MappedSubject) -> int:
    """Tokens of the windows that a map is tried on: two of everything that is written, within the context."""
    periods = [memory.period for memory in subject.module.spec.memories]
    return min(2 * math.lcm(*periods) if periods else 32, subject.context, _MOST)


def check_subject(subject: MappedSubject) -> None:
    """Raise BadInputError, naming the point or the claim, where the map does not hold of the model."""
    told, length = subject.module.spec.told, sample_length(subject)
    tokens = torch.randint(
        subject.vocab_size, (_ROWS, length + 1), generator=torch.Generator().manual_seed(0)
    )
    tokens = tokens.to(subject.device)
    subject.parameter_groups()
    try:
        logits = subject.read(tokens[:, :-1])
        if not torch.isfinite(logits).all():
            return  # diverged weights are for probes to tell
        near = math.sqrt(torch.finfo(logits.dtype).eps) * float(logits.float().std())
        if not _close(subject.read(tokens[:, :-1]), logits, near):
            raise BadInputError(
                f"{told}: the model gives other logits of the same tokens each time, also after eval()"
            )
        _check_causal(subject, tokens[:, :-1], logits, near)
        _check_points(subject, tokens, logits, near)
        _check_freeze(subject, tokens)
    except MeasurementError as error:
        raise BadInputError(str(error)) from error


def _check_causal(subject: MappedSubject, tokens: Tensor, logits: Tensor, near: float) -> None:
    told, half = subject.module.spec.told, tokens.shape[1] // 2
    other = (tokens + 1) % subject.vocab_size
    # Half of a window is where a chunk ends: what a chunk tells its own beginning shows from its last token alone.
    for first in (half, tokens.shape[1] - 1):
        later = torch.cat([tokens[:, :first], other[:, first:]], dim=1)
        if not _close(subject.read(later)[:, :first], logits[:, :first], near):
            raise BadInputError(
                f"{told}: logits change with tokens that come later, so losses would be those of a model that looks "
                "ahead"
            )
    beside = torch.cat([tokens[:1], other[1:]])
    if not _close(subject.read(beside)[:1], logits[:1], near):
        raise BadInputError(
            f"{told}: a row's logits change with the other row of its batch, so documents would not be independent"
        )


def _check_points(subject: MappedSubject, tokens: Tensor, logits: Tensor, near: float) -> None:
    model, told, length = subject.module, subject.module.spec.told, tokens.shape[1] - 1
    seen: dict[str, list[tuple[int, ...]]] = {}

    def look(tensor: Tensor, hook: HookPoint) -> None:
        seen.setdefault(hook.name, []).append(tuple(tensor.shape))

    with model.hooks([("*", look)], allow_unfired=True):
        subject.run(tokens)
    for name, point in model.hook_dict.items():
        spec = point.spec
        if name not in seen:
            needs = f" in {length} tokens" if spec.cadence == "write" else ""
            raise BadInputError(
                f"{told}, {name}: the forward pass never came by {model.placed[name].spec.module}{needs}"
            )
        if any(shape[0] != _ROWS for shape in seen[name]):
            raise BadInputError(
                f"{told}, {name}: it is {list(seen[name][0])} of {_ROWS} windows; the batch comes first"
            )
        if spec.cadence == "tick" and "pos" in spec.dims:
            read = [shape[spec.dims.index("pos")] for shape in seen[name]]
            if sum(read) != length:
                raise BadInputError(
                    f"{told}, {name}: it fired with {' + '.join(map(str, read))} positions for {length} tokens"
                )
        if name in model.metas:
            _check_shape(subject, name, seen[name][0])
    editable = [name for name, point in model.hook_dict.items() if point.spec.editable]
    if editable and not _unchanged(subject, editable, tokens, logits, near):
        wrong = [name for name in editable if not _unchanged(subject, [name], tokens, logits, near)]
        raise BadInputError(f"{told}, {', '.join(wrong[:3])}: a copy put in its place changes the logits")


def _unchanged(
    subject: MappedSubject, names: Sequence[str], tokens: Tensor, logits: Tensor, near: float
) -> bool:
    """Whether copies in place of what these points show leave the logits as they were."""

    def copied(tensor: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
        return tensor.clone()

    with subject.module.hooks([(list(names), copied)]):
        return _close(subject.read(tokens[:, :-1]), logits, near)


def _check_shape(subject: MappedSubject, name: str, shape: tuple[int, ...]) -> None:
    meta = subject.meta_weights()[name]
    if tuple(meta.shape) != shape[1:]:
        raise BadInputError(
            f"{subject.module.spec.told}, {name}: fast weights of a row are {list(shape[1:])}, and "
            f"{subject.module.metas[name]}, which they are to start from, is {list(meta.shape)}"
        )


def _check_freeze(subject: MappedSubject, tokens: Tensor) -> None:
    model, metas = subject.module, subject.meta_weights()
    for memory in model.spec.memories:
        if not memory.freeze:
            continue
        mine = [name for name in model.metas if model.placed[name].spec in memory.fast]
        moved: dict[str, float] = {}

        def look(tensor: Tensor, hook: object) -> None:
            meta = metas[hook.name]  # type: ignore[attr-defined]
            far = float((tensor - meta).norm() / meta.norm().clamp(min=1e-30))
            moved[hook.name] = max(far, moved.get(hook.name, 0.0))  # type: ignore[attr-defined]  # noqa: B023

        with model.hooks([*subject.freeze_hooks(memory.name), (mine, look)]):
            subject.run(tokens)
        for name, far in moved.items():
            if not far <= 4 * torch.finfo(metas[name].dtype).eps:
                raise BadInputError(
                    f"{model.spec.told}, [memory.{memory.name}.freeze]: with it in force {name} still is {far:.2g} of "
                    f"its norm away from {model.metas[name]}: either it does not freeze, or they start elsewhere"
                )


def _distance(metas: Mapping[str, Tensor], moved: dict[str, float], tensor: Tensor, hook: HookPoint) -> None:
    """Keep the largest relative distance from the meta weights that a point has shown."""
    meta = metas[hook.name]
    far = float((tensor - meta).norm() / meta.norm().clamp(min=1e-30))
    moved[hook.name] = max(far, moved.get(hook.name, 0.0))


def _close(a: Tensor, b: Tensor, near: float) -> bool:
    return bool(((a - b).abs().max() <= near).item())
