"""Batches side by side: in order, on replicas that share weights and no hooks, with the same numbers as one by one."""

import threading
import time

import numpy as np
import pytest
import torch

from hopeprobe.conditions import FROZEN, LIVE
from hopeprobe.errors import MeasurementError
from hopeprobe.model.subject import HopeSubject
from hopeprobe.probes.cms_similarity import CMSSimilarity
from hopeprobe.probes.passes import run_pass
from hopeprobe.probes.workers import MOST_WORKERS, blas_threads, replicas, side_by_side, threads_each
from hopeprobe.subject import WindowLosses
from hopeprobe.tokens import EvalWindows


@pytest.fixture
def threads():
    """Two threads, whatever the machine and the environment say."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@pytest.fixture
def windows(toy_data):
    return EvalWindows(toy_data, "all", context=32, tokens=900, batch=4)


def sums(subject, windows, condition):
    found = run_pass(subject, windows, [CMSSimilarity()], condition)
    assert not found.failed
    return found.accumulators["cms-similarity"].moments


@pytest.mark.parametrize("condition", [LIVE, FROZEN], ids=lambda c: c.name)
def test_two_workers_give_the_numbers_of_one_to_the_bit(subject, windows, threads, condition, monkeypatch):
    together = sums(subject, windows, condition)
    monkeypatch.setattr(HopeSubject, "replica", lambda self: None)
    with threads_each(1):
        alone = sums(subject, windows, condition)
    assert together.keys() == alone.keys()
    for name, moments in alone.items():
        a, b = moments.state_dict(), together[name].state_dict()
        for part in a:
            np.testing.assert_array_equal(a[part], b[part], err_msg=f"{name} {part}")


def test_batches_really_run_at_the_same_time(subject, windows, threads, monkeypatch):
    meeting, modules, first_two = threading.Barrier(2, timeout=60), set(), iter([True, True])
    run = HopeSubject.run

    def met(self, tokens, lengths=None, state=None) -> WindowLosses:
        modules.add(id(self.module))
        if next(first_two, False):
            meeting.wait()  # breaks after a minute unless a second batch is under way
        return run(self, tokens, lengths, state)

    monkeypatch.setattr(HopeSubject, "run", met)
    assert not run_pass(subject, windows, [CMSSimilarity()], LIVE).failed
    assert len(modules) == 2


def test_a_replica_shares_weights_and_has_its_own_hooks(subject):
    replica = subject.replica()
    mine, its = dict(subject.module.named_parameters()), dict(replica.module.named_parameters())
    assert mine.keys() == its.keys()
    assert all(mine[name] is its[name] for name in mine)
    fired = []
    with replica.module.hooks([("hook_embed", lambda x, hook: fired.append(1))]):
        tokens = torch.zeros(1, 9, dtype=torch.int64)
        subject.run(tokens)
        assert not fired
        replica.run(tokens)
        assert fired


def test_as_many_as_threads_and_batches_and_no_more(subject, threads):
    assert len(replicas(subject, 5)) == 2
    assert len(replicas(subject, 1)) == 1
    torch.set_num_threads(MOST_WORKERS + 3)
    assert len(replicas(subject, 50)) == MOST_WORKERS


def test_results_come_in_order_whichever_is_done_first():
    def slow_then_fast(worker, i):
        time.sleep(0.02 * (i % 3 == 0))
        return i * i, worker

    found = list(side_by_side(slow_then_fast, ["a", "b"], range(20)))
    assert [(i, square) for i, (square, _) in found] == [(i, i * i) for i in range(20)]
    assert {worker for _, (_, worker) in found} == {"a", "b"}


def test_what_a_worker_raises_is_raised_and_threads_are_given_back(threads):
    def broken(worker, i):
        if i == 3:
            raise MeasurementError("the third")
        return i

    seen = []

    def read():
        seen.extend(i for i, _ in side_by_side(broken, ["a", "b"], range(10)))

    with pytest.raises(MeasurementError, match="the third"):
        read()
    assert seen == [0, 1, 2]
    assert torch.get_num_threads() == 2


def test_blas_is_limited_for_as_long_as_asked():
    from threadpoolctl import threadpool_info

    def blas():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = blas()
    assert before  # NumPy's own
    with blas_threads(1):
        assert set(blas()) == {1}
    assert blas() == before
