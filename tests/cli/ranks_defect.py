"""The command line with something wrong on one rank: DEFECT is WHAT:RANK:FORWARD PASS."""

import os
import signal
import sys
import time

import torch

from hopeprobe.cli import main
from hopeprobe.model.hope import HopeModel

what, on, at = os.environ["DEFECT"].split(":")
forward, passes = HopeModel.forward, 0


def defective(self, *arguments, **options):
    global passes  # noqa: PLW0603
    passes += 1
    out = forward(self, *arguments, **options)
    if os.environ["RANK"] != on or passes < int(at):
        return out
    if passes == int(at):
        print(f"defect at {time.time()}", file=sys.stderr, flush=True)
    if what == "nan":
        return out._replace(losses=out.losses * float("nan"))
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "raise":
        raise RuntimeError("a defect of ours")
    if what == "drift":  # one number of one weight, unlike the other rank's
        with torch.no_grad():
            self.embed.data[0, 0] += 1e-3
    return out


HopeModel.forward = defective
main()
