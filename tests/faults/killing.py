"""Processes of hopeprobe that are killed: a server that has all imported and forks, and moments to kill at.

`Server.run` starts one piece of work and kills it with SIGKILL, from outside after some seconds, or from inside at the
n-th time that it opens a file to write, waits for the disk, renames, adds a line, takes a lock. Inside, what the system
is asked through (`os.fsync`, `os.replace`, `os.write`, `fcntl.flock`) is wrapped; the code that asks is as it is
shipped. A cold process begins with Python itself, so that its imports are among the moments.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

#: What a process can be killed at; `nth` of each kind is drawn among as many as an unkilled run has.
AIMS = ("open", "fsync", "rename", "renamed", "append", "flock")
_COLD = "import sys; from hopeprobe.cli import main; main(sys.argv[1:])"
_PRELOADED = (
    "torch", "pandas", "matplotlib.backends.backend_agg", "seaborn", "rich.progress", "typer", "safetensors",
    "hopeprobe.cli.app", "hopeprobe.cli.training", "hopeprobe.cli.regression", "hopeprobe.cli.reporting",
    "hopeprobe.analysis", "hopeprobe.plots", "hopeprobe.report", "hopeprobe.model.subject", "hopeprobe.tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """When to kill: after `seconds`, from outside; or at the `nth` event of a kind, `seconds` later."""

    kind: str  # "random", "start-up" (of a cold process), one of AIMS, or "never"
    seconds: float = 0.0
    nth: int = 0


NEVER = Moment("never")


@dataclass(frozen=True)
class Ended:
    """How a process ended: whether it was killed, else its status; how long it took; what it said."""

    killed: bool
    status: int
    seconds: float
    said: str
    events: dict[str, int]


class Server:
    """A process that has everything imported, and makes another for every piece of work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, words: list[str], cache: Path, moment: Moment = NEVER, cold: bool = False) -> Ended:
        """Run `hopeprobe WORDS`, or `tokenise FILE`, and kill it where it gets that far."""
        said = self.folder / "said"
        job = {"words": words, "cache": str(cache), "moment": asdict(moment), "cold": cold, "said": str(said)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Ended(**answer, said=said.read_text(errors="replace"))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _serve() -> None:
    import importlib

    for name in _PRELOADED:
        importlib.import_module(name)
    from hopeprobe.tokens import load_tokenizer

    load_tokenizer("gpt2").encode("a word")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


def _run(job: dict) -> dict:
    moment = Moment(**job["moment"])
    counts = Path(job["said"]).with_name("events")
    counts.unlink(missing_ok=True)
    outside = moment.kind in ("random", "start-up")
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _be(job, moment, counts)
    left = moment.seconds if outside else 300.0
    end = started + left
    while left > 0 and not _has_ended(pid):
        signal.sigtimedwait({signal.SIGCHLD}, left)  # of any child, an earlier one too
        left = end - time.monotonic()
    os.kill(pid, signal.SIGKILL)  # it is still ours, if only its status: nobody waited for it yet
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    seconds = time.monotonic() - started
    assert not killed or moment.kind != "never", "it took too long"
    return {
        "killed": killed,
        "status": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "events": json.loads(counts.read_text()) if counts.exists() else {},
    }


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _be(job: dict, moment: Moment, counts: Path) -> None:
    """Be the process of a piece of work; never returns."""
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        os.environ["HOPEPROBE_CACHE"] = job["cache"]
        said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        words = job["words"]
        if job["cold"]:
            os.execv(sys.executable, [sys.executable, "-c", _COLD, *words])
        sys.argv[:] = ["hopeprobe", *words]
        if "torch" in sys.modules:  # as in a process that begins: another seed in each
            sys.modules["torch"].seed()
        _watch(moment, counts)
        if words[0] == "tokenise":
            from hopeprobe.tokens import load_tokens

            print(load_tokens(words[1]).fingerprint)
            status = 0
        else:
            from hopeprobe.cli import run

            status = run(words)
    except BaseException:  # noqa: BLE001 - a child must not go on as the server
        import traceback

        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch(moment: Moment, counts: Path) -> None:
    """Count what may be aimed at, and die at the moment that was."""
    import fcntl

    seen: Counter[str] = Counter()
    atexit.register(lambda: counts.write_text(json.dumps(seen)))

    def due(kind: str) -> bool:
        seen[kind] += 1
        return kind == moment.kind and seen[kind] == moment.nth

    def die() -> None:
        if moment.seconds:
            threading.Timer(moment.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def opened(event: str, given: tuple) -> None:
        if event == "open" and str(given[0]).endswith(".hopeprobe") and due("open"):
            die()

    def before(module: object, name: str, kind: str, after: str = "") -> None:
        real = getattr(module, name)

        def inner(*arguments, **named):
            if due(kind):
                die()
            answer = real(*arguments, **named)
            if after and due(after):
                die()
            return answer

        setattr(module, name, inner)

    write = os.write

    def half(descriptor: int, content: bytes) -> int:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and due("append"):
            write(descriptor, content[: len(content) // 2])
            die()
        return write(descriptor, content)

    sys.addaudithook(opened)
    before(os, "fsync", "fsync")
    before(os, "replace", "rename", after="renamed")
    before(fcntl, "flock", "flock")
    os.write = half


if __name__ == "__main__":
    _serve()
