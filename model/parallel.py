"""A batch cut over ranks: each runs its own windows, gradients are added up, and every number is of the whole batch.

Memory writes are a sequence's own, so ranks have nothing to tell each other until the gradient is whole: one sum a
step, by torch.distributed's `all_reduce`. Each rank's gradient weighs as many windows as it has, so that shares need
not be even and the sum is the gradient that one process has, but for roundings.

Why not DistributedDataParallel: a window may be cut into segments with a backward each, it averages where shares are to
be weighted, which parameters have a gradient depends on the data (closed gates skip work), and a rank whose loss is not
finite has no backward that the others could wait for. What is left of it is this sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hopeprobe import ranks
from hopeprobe.errors import BadInputError, DivergedError
from hopeprobe.model.init import digest
from hopeprobe.model.measure import Watch
from hopeprobe.model.run import Run, diverged
from hopeprobe.model.update import Look, check_finite, gradients

#: Numbers sent at once: 2^24 float32 are 64 MiB.
_BUCKET = 2**24


def rows(batch: int) -> slice:
    """Which windows of a batch are this rank's; shares differ by one at most.

    Raises `BadInputError` where some rank would have none.
    """
    count, number = ranks.size(), ranks.rank()
    if batch < count:
        raise BadInputError(
            f"a batch of {batch} windows cannot be cut over {count} ranks: take --batch {count} or more, or fewer ranks"
        )
    share, more = divmod(batch, count)
    start = number * share + min(number, more)
    return slice(start, start + share + (number < more))


def rows_together(batch: int, device: torch.device) -> int:
    """Windows of a batch that share a memory: a rank's own on a device, on a CPU those of all ranks of the machine."""
    own = math.ceil(batch / ranks.size())
    return own if device.type == "cuda" else min(batch, own * ranks.on_this_machine())


class RankStep:
    """A step of one of several ranks: the whole batch's, of which it runs its own windows."""

    def __init__(self, run: Run) -> None:
        self.run, self.watch = run, Watch(run.model)

    def __call__(self, tokens: Tensor, rate: float) -> Look:
        """Change the run's weights by a batch (B, T + 1) of the host's, or raise DivergedError on all ranks."""
        run, parameters = self.run, list(self.run.model.parameters())
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        share = rows(len(tokens))
        own = run.model.check_tokens(tokens[share]).to(run.model.embed.device)
        seen = gradients(run.model, own, self.watch)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(len(own) / len(tokens))
        here = Look.at(seen)
        sum_gradients(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        looks = ranks.gathered((len(own), here))
        look = whole(looks, float(norm))
        if not (math.isfinite(look.loss) and math.isfinite(look.norm)):
            # Those that have it in their own windows know best where it began.
            began = ranks.gathered(
                (
                    not _finite(here),
                    ranks.tried(lambda: check_finite(run, look, own, share.start, len(tokens))).error,
                )
            )
            raise next(
                (error for own_windows, error in began if own_windows and error), began[0][1] or _unsaid(run)
            )
        torch.nn.utils.clip_grads_with_norm_(parameters, run.config.clip, norm)
        run.optimizer.step()
        return look


def _finite(look: Look) -> bool:
    return math.isfinite(look.loss) and math.isfinite(look.norm)


def _unsaid(run: Run) -> DivergedError:
    return diverged(run, run.step + 1, "the loss or the gradient is not finite")


def whole(looks: Sequence[tuple[int, Look]], norm: float) -> Look:
    """The looks of all ranks, each with its number of windows, as one; `norm` is that of the summed gradient."""
    total = sum(count for count, _ in looks)

    def mean(values: Iterable[float]) -> float:
        return sum(count * value for (count, _), value in zip(looks, values, strict=True)) / total

    return Look(
        norm,
        min(look.lowest for _, look in looks),
        mean(look.gate for _, look in looks),
        mean(look.retention for _, look in looks),
        mean(look.ratio for _, look in looks),
        tuple(mean(part) for part in zip(*(look.parts for _, look in looks), strict=True)),
    )


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up gradients over ranks; a parameter that no rank has one of keeps none."""
    if ranks.size() == 1:
        return
    bucket: list[nn.Parameter] = []
    held = 0
    for parameter in parameters:
        if bucket and (held + parameter.numel() > _BUCKET or parameter.dtype != bucket[0].dtype):
            _sum(bucket)
            bucket, held = [], 0
        bucket.append(parameter)
        held += parameter.numel()
    if bucket:
        _sum(bucket)


def _sum(bucket: Sequence[nn.Parameter]) -> None:
    """One sum: all gradients, and behind them by how many ranks each parameter has one."""
    with torch.no_grad():
        has = bucket[0].new_tensor([float(p.grad is not None) for p in bucket])
        flat = torch.cat(
            [*(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket), has]
        )
        ranks.summed(flat)
        *grads, has = torch.split(flat, [*(p.numel() for p in bucket), len(bucket)])
        for parameter, grad, count in zip(bucket, grads, has.tolist(), strict=True):
            if count:
                parameter.grad = grad.view_as(parameter)


def check_weights(model: nn.Module) -> None:
    """Raise `BadInputError` where ranks do not hold the same weights: they would go on as several runs."""
    if ranks.size() > 1:
        ranks.agreed({"set of weights, after as many steps": digest(model.state_dict().items())})
