"""Batches side by side: one thread a batch, rather than all threads on one small product after the other.

The products of a tick are small: on two cores, two threads that share each of them are 1.2 times as fast as one,
two that run a batch each 1.6 to 1.9 times; and on a machine that others use too, threads that wait for each other
are slower than one alone. Each worker has its own replica of the subject, hook points included, which shares the
weights; results come in the order of the batches, whichever is done first.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from hopeprobe.subject import Subject

MOST_WORKERS = 4
"""However many cores there are: each worker holds the state and activations of a batch."""

_W = TypeVar("_W")
_B = TypeVar("_B")
_R = TypeVar("_R")


def n_workers(n_batches: int) -> int:
    """Count the workers that there are threads and batches for, at most `MOST_WORKERS`, at least one."""
    import torch

    return max(1, min(torch.get_num_threads(), n_batches, MOST_WORKERS))


def replicas(subject: Subject, n_batches: int) -> list[Subject]:
    """List the subject, and as many replicas of it as there are threads and batches for, `MOST_WORKERS` in all.

    On a device there are none: its threads are its own.
    """
    found = [subject]
    if str(subject.device) != "cpu":
        return found
    while len(found) < n_workers(n_batches):
        replica = subject.replica()
        if replica is None:
            return [subject]
        found.append(replica)
    return found


def side_by_side(
    run: Callable[[_W, _B], _R], workers: Sequence[_W], batches: Iterable[_B]
) -> Iterator[tuple[_B, _R]]:
    """Yield (batch, run(worker, batch)) in the order of the batches, every worker on one batch at a time.

    The threads there are, of torch and of BLAS, are shared out among the workers. As many batches as there are
    workers are under way or waiting to be read. With one worker everything happens in the caller's thread.
    """
    import torch

    if len(workers) == 1:
        for batch in batches:
            yield batch, run(workers[0], batch)
        return
    free: SimpleQueue[_W] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def job(batch: _B) -> _R:
        worker = free.get()
        try:
            return run(worker, batch)
        finally:
            free.put(worker)

    waiting: deque[tuple[_B, Future[_R]]] = deque()
    with threads_each(max(1, torch.get_num_threads() // len(workers))) as n_threads:
        pool = ThreadPoolExecutor(len(workers), initializer=torch.set_num_threads, initargs=(n_threads,))
        try:
            for batch in batches:
                if len(waiting) == len(workers):
                    first, future = waiting.popleft()
                    found = future.result()
                    waiting.append((batch, pool.submit(job, batch)))
                    yield first, found
                else:
                    waiting.append((batch, pool.submit(job, batch)))
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def threads_each(n: int) -> Iterator[int]:
    """Limit torch and BLAS to n threads a call, and give back what was there before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        with blas_threads(n):
            yield n
    finally:
        torch.set_num_threads(before)


@contextmanager
def blas_threads(n: int) -> Iterator[None]:
    """Limit NumPy's and SciPy's BLAS to n threads.

    Eigenvalues of 65 matrices [256, 256] take 0.15 s with one thread, and 8 s with two of which one has to wait for a
    core: the other spins.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(n, user_api="blas"):
        yield
