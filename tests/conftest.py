"""No property has a deadline: on shared cores a call that takes a millisecond can take a quarter of a second.

And processes of one job, started by torchrun itself.
"""

import importlib.util
import os
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

if importlib.util.find_spec("hypothesis"):  # not where other people's packages are tested
    from hypothesis import settings

    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")


@pytest.fixture
def one_thread():
    """One thread of torch, and what there was before after it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float
    at: float  # seconds since 1970


@pytest.fixture
def torchrun(tmp_path):
    """`torchrun(2, "-m", "hopeprobe.cli", ...)`: status of torchrun, what was printed, seconds."""

    def start(ranks, *arguments, environment=None, timeout=300, torchrun_options=()):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        known = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "failure.json")}
        begun = time.monotonic()
        done = subprocess.run(
            [*command, *torchrun_options, *map(str, arguments)],
            capture_output=True, text=True, timeout=timeout, env=os.environ | known | (environment or {}),
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - begun, time.time())

    return start
