"""Several processes that work as one: which of them this is, and what they tell each other.

`torchrun` starts the processes, ranks 0 to size - 1 of one job, on one machine or several, and torch.distributed
carries what passes between them. Inside `joined()` work is shared out (`shared`, `dealt`), what each rank found is
gathered and folded in rank order, and whatever must happen once happens on rank 0 (`on_first`). Outside of it, and
where there is one process only, this process is rank 0 of one, nothing is sent, and all here does the plain thing.

All ranks run the same program and meet in the same calls, in the same order. What may differ between machines (a file,
a version, a cache) is therefore compared (`agreed`) or looked up on rank 0; an error that one rank meets in a shared
call is raised on all of them. A rank that is lost ends the others with `LostRankError`.

Nothing is shared by itself in a job of somebody's own: whoever runs `hopeprobe.analyze` on several ranks says so,

    with hopeprobe.ranks.joined():
        results = hopeprobe.analyze("runs/mine/step-002000.pt", "surprise")   # the same on every rank

What is sent is pickled, between the processes of one job only.
"""

from __future__ import annotations

import itertools
import os
import pickle
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hopeprobe.errors import BadInputError, HopeprobeError, LostRankError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

TIMEOUT_VARIABLE = "HOPEPROBE_RANK_TIMEOUT"
"""Environment variable: seconds after which a rank that does not answer is given up."""

TIMEOUT = 1800.0
"""Seconds without it: longer than anything that one rank does while others wait, but for tokenising a text."""

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_DAYS = timedelta(days=30)

_T = TypeVar("_T")


@dataclass
class _Job:
    """This process's place in a job; `alone` while it does something that the others take no part in."""

    rank: int
    size: int
    store: Any
    timeout: float
    alone: int = 0
    calls: int = 0


@dataclass(frozen=True)
class Outcome(Generic[_T]):
    """What a piece of work gave, or the error that it ended with."""

    value: _T | None = None
    error: HopeprobeError | None = None

    def get(self) -> _T:
        """Give the value; raises the error."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


_job: _Job | None = None
_speaks = True
_meetings: list[tuple[Any, int, int]] = []
"""What each time that the ranks met used: the job's store, this rank and how many there are."""


def launched() -> bool:
    """Whether this process was started as one of several (by `torchrun`, or by Slurm with the same variables).

    Raises BadInputError for a number among the variables that is none.
    """
    if not all(name in os.environ for name in _LAUNCHED) or _number("WORLD_SIZE") < 2:
        return False
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):  # which torch takes for numbers
        _number(name)
    return True


def rank() -> int:
    """Return this process's number among those that share the work at hand, 0 where it works alone."""
    return _job.rank if _job is not None and not _job.alone else 0


def size() -> int:
    """Count the processes that share the work at hand."""
    return _job.size if _job is not None and not _job.alone else 1


def first() -> bool:
    """Whether this is the one that writes and prints: rank 0, also while it works alone."""
    return _job is None or _job.rank == 0


def on_this_machine() -> int:
    """Count the ranks that share this machine's memory."""
    return _number("LOCAL_WORLD_SIZE") if _job is not None and "LOCAL_WORLD_SIZE" in os.environ else 1


def speaks() -> bool:
    """Whether it is for this rank to say the error that a job ended with: the first that met one does."""
    return _speaks


@contextmanager
def joined() -> Iterator[None]:
    """Join the job that this process was started in; as one process where it was started alone, or has joined already.

    All of its ranks may join a job again that they have left. Processes talk by gloo, and between GPUs by NCCL. Raises
    BadInputError for a timeout that is none, LostRankError where the others do not come.
    """
    global _job, _speaks  # noqa: PLW0603 - a process is in one job at a time
    if _job is not None or not launched():
        yield
        return
    import torch
    import torch.distributed as dist

    # Its defaults are the group there is when it is first imported, by torch's compiler or checkpointing for one. Were
    # that ours, its threads would outlive it, and one that frees a tensor while Python ends aborts a rank that is done.
    import torch.distributed.nn.functional
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    seconds = _timeout()
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(_number("LOCAL_RANK") % torch.cuda.device_count())
    limit = timedelta(seconds=seconds)
    with _talking("the ranks could not meet", seconds):
        _meetings.append(_meetings[-1] if _meetings else next(rendezvous("env://", timeout=limit)))
        store, number, count = _meetings[-1]
        # At the addresses that the store has from an earlier meeting nobody listens any more.
        store = PrefixStore(f"hopeprobe-{len(_meetings)}", store)
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=limit)
    _job = _Job(number, count, PrefixStore("job", store), seconds)
    _speaks = True
    try:
        yield
    except BaseException as error:
        _speaks = _claimed(_job)
        if not isinstance(error, LostRankError):  # there is something left to leave
            with suppress(RuntimeError):
                dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()
    finally:
        _job = None


def shared(items: Iterable[_T]) -> Iterator[_T]:
    """This rank's share: every `size()`-th of the items, from the `rank()`-th."""
    return itertools.islice(items, rank(), None, size())


def gathered(value: _T) -> list[_T]:
    """What every rank gives, in rank order, on every rank."""
    job = _sharing()
    if job is None:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * job.size
    with _talking("a rank was lost", job.timeout):
        dist.all_gather_object(found, value)
    return found


def gathered_on_first(value: _T) -> list[_T]:
    """What every rank gives, in rank order, on rank 0; nothing elsewhere. For what is large."""
    job = _sharing()
    if job is None:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * job.size if job.rank == 0 else []
    with _talking("a rank was lost", job.timeout):
        dist.gather_object(value, found if job.rank == 0 else None, dst=0)
    return found


def on_first(work: Callable[[], _T]) -> _T:
    """Do on rank 0 what is done once, and give every rank what came of it, or raise there what it raised."""
    job = _sharing()
    if job is None:
        return work()
    import torch.distributed as dist

    outcome = [tried(work) if job.rank == 0 else None]
    with _talking("rank 0 was lost", job.timeout):
        dist.broadcast_object_list(outcome, src=0)
    assert outcome[0] is not None
    return outcome[0].get()


def dealt(jobs: Sequence[Callable[[], _T]]) -> list[Outcome[_T]]:
    """Do each job on one rank, dealt in turn; what came of them, in their order, on every rank."""
    found = gathered([tried(job) for job in shared(jobs)])
    return [found[i % len(found)][i // len(found)] for i in range(len(jobs))]


def folded(work: Callable[[], _T], fold: Callable[[_T, _T], _T]) -> _T:
    """What all ranks found together, each in its share of something: folded in rank order, on every rank.

    Raises what the lowest rank raised that did.
    """
    first, *others = [outcome.get() for outcome in gathered(tried(work))]
    for other in others:
        first = fold(first, other)
    return first


def first_then_others(work: Callable[[], _T]) -> _T:
    """Do on rank 0, then on all others at once, what leaves a file that makes it quick (a tokenised text).

    Others wait as long as it takes; what rank 0 raises is raised on all.
    """
    job = _sharing()
    if job is None:
        return work()
    job.calls += 1
    key = f"done-{job.calls}"
    with _talking("rank 0 was lost", job.timeout):
        if job.rank == 0:
            outcome = tried(work)
            job.store.set(key, pickle.dumps(outcome.error))
            return outcome.get()
        job.store.wait([key], _DAYS)
        error = pickle.loads(job.store.get(key))  # noqa: S301 - from rank 0 of this job
    if error is not None:
        raise error
    return work()


def agreed(what: Mapping[str, object]) -> None:
    """Raise BadInputError, on every rank, where ranks differ in what must be the same on all."""
    given = gathered(dict(what))
    for number, other in enumerate(given):
        for name, value in given[0].items():
            if other.get(name) != value:
                raise BadInputError(
                    f"rank {number} has another {name} than rank 0: {_short(other.get(name))}, not {_short(value)}. "
                    "All ranks must see the same files, in the same versions of the same packages"
                )


def summed(tensor: Tensor) -> None:
    """Add up a tensor of one shape over all ranks, in place, bit for bit the same on each."""
    job = _sharing()
    if job is None:
        return
    import torch.distributed as dist

    with _talking("a rank was lost", job.timeout):
        dist.all_reduce(tensor)


def tried(work: Callable[[], _T]) -> Outcome[_T]:
    """Do something that the other ranks take no part in, and keep the error that it ends with."""
    if _job is not None:
        _job.alone += 1
    try:
        return Outcome(work())
    except HopeprobeError as error:
        return Outcome(error=error)
    finally:
        if _job is not None:
            _job.alone -= 1


def _sharing() -> _Job | None:
    return None if _job is None or _job.alone else _job


@contextmanager
def _talking(what: str, seconds: float) -> Iterator[None]:
    """Name what torch.distributed says of a connection that broke, or of somebody who did not answer."""
    try:
        yield
    except HopeprobeError:
        raise
    except RuntimeError as error:  # all of torch.distributed's are
        detail = str(error).strip().partition("\n")[0]
        raise LostRankError(
            f"{what}: it ended, or did not answer within {seconds:g} s ({TIMEOUT_VARIABLE}). What was written so "
            f"far is whole; start all ranks again, training with --resume. {detail}"
        ) from error


def _claimed(job: _Job) -> bool:
    try:
        return int(job.store.add("said", 1)) == 1
    except RuntimeError:  # whoever kept the store is gone
        return True


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise BadInputError(f"{name} is {os.environ[name]!r} in the environment, must be a number") from None


def _timeout() -> float:
    given = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
    try:
        seconds = float(given)
        timedelta(seconds=seconds)
    except (ValueError, OverflowError):
        seconds = 0.0
    if not seconds > 0:
        raise BadInputError(f"{TIMEOUT_VARIABLE} is {given!r}, must be seconds above zero")
    return seconds


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
