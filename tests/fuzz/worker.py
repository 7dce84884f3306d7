"""A process that reads changed files, one a line of its input, and is watched while it does.

    echo '["results", 17]' | python worker.py FOLDER SEED

What it must not do is told by hooks of the interpreter: write outside the folders it was given, start a program, import
what the file names; and the folder of the canary is looked at after every file. Memory is bounded by the system, and
its peak is read for each file. Each answer is a line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

MOST_MEMORY = 2 << 30  # bytes beyond what the process has when it begins
_WRITES = {
    "os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.symlink": 1, "os.link": 1, "os.truncate": 0,
    "os.chmod": 0, "shutil.rmtree": 0, "shutil.move": 1,
}  # fmt: skip
_NEVER = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "socket.connect",
    "pty.spawn",
    "code.__new__",
)


class Watch:
    """What happened while it was on."""

    def __init__(self, allowed: list[Path]) -> None:
        self.allowed = [str(path.resolve()) for path in allowed]
        self.on = False
        self.seen: list[str] = []

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            )
            if writes and isinstance(path, str | bytes | os.PathLike):
                self._check(event, path)
        elif event in _WRITES:
            self._check(event, arguments[_WRITES[event]])
        elif event in _NEVER:
            self.seen.append(f"{event} {arguments!r:.100}")

    def _check(self, event: str, path: Any) -> None:
        if isinstance(path, int):  # what is open was looked at when it was opened
            return
        full = os.path.realpath(os.path.join(os.getcwd(), os.fsdecode(path)))
        if full != os.devnull and not any(
            full == one or full.startswith(one + os.sep) for one in self.allowed
        ):
            self.seen.append(f"{event} {full:.100}")


def _memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def chosen(kind: Any, name: str, index: int, seed: int) -> tuple[str, random.Random]:
    """The mutation of an index, and the random numbers it draws: the same in every process."""
    rng = random.Random(f"{seed}:{name}:{index}")
    return list(kind.mutations)[index % len(kind.mutations)], rng


class Reader:
    """Reads changed files in a folder of its own."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder.resolve(), seed
        for name in ("in", "out", "cache", "canary", "made"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        os.chdir(self.folder)
        os.environ |= {
            "HOPEPROBE_CACHE": str(self.folder / "cache"),
            "MPLCONFIGDIR": str(self.folder / "cache"),
        }
        from documents import KINDS

        self.kinds = KINDS
        self.whole: dict[str, tuple[bytes, Any]] = {}
        self.watch = Watch([self.folder / name for name in ("in", "out", "cache", "made")])
        sys.addaudithook(self.watch.hook)

    def original(self, name: str) -> tuple[bytes, Any]:
        """The unchanged file of a kind and its answer; made once."""
        if name not in self.whole:
            kind = self.kinds[name]
            content = kind.make(Path("made"))
            answer = self._use(kind, content)
            self.whole[name] = content, answer
        return self.whole[name]

    def _use(self, kind: Any, content: bytes) -> Any:
        path = Path("in") / kind.file
        path.write_bytes(content)
        try:
            return kind.use(path)
        finally:
            path.unlink(missing_ok=True)

    def changed(self, name: str, index: int) -> tuple[str, bytes]:
        """The mutation's name and the bytes it makes."""
        kind = self.kinds[name]
        from mutations import BYTES

        mutation, rng = chosen(kind, name, index, self.seed)
        content = self.original(name)[0]
        try:
            return mutation, kind.mutations[mutation](content, rng)
        except Exception:  # noqa: BLE001 - what it would put there cannot be saved
            return "flip_bits", BYTES["flip_bits"](content, rng)

    def read(self, name: str, index: int) -> dict[str, Any]:
        """What becomes of one changed file."""
        from hopeprobe.errors import HopeprobeError

        kind = self.kinds[name]
        whole, answer = self.original(name)
        mutation, content = self.changed(name, index)
        before = _tree(Path("canary")) + _tree(Path("in"))
        self.watch.seen.clear()
        _reset_peak()
        start_memory, start = _memory("VmRSS"), time.process_time()
        outcome, detail = "", ""
        self.watch.on = True
        try:
            got = self._use(kind, content)
        except HopeprobeError as error:
            outcome, detail = "refused", str(error)
            if kind.file not in detail:
                outcome, detail = "WRONG", f"the message does not name the file: {detail}"
        except MemoryError:
            outcome, detail = "WRONG", f"out of memory: {traceback.format_exc(limit=-3)}"
        except BaseException as error:  # noqa: BLE001 - each of them is a finding
            outcome, detail = (
                "WRONG",
                f"{type(error).__name__}: {error!s:.300}\n{traceback.format_exc(limit=-4)[-900:]}",
            )
        finally:
            self.watch.on = False
        seconds, peak = time.process_time() - start, _memory("VmHWM") - start_memory
        if not outcome:
            outcome, detail = self._judged(kind, mutation, content, got, answer)
        left = [path for path in _tree(Path("canary")) + _tree(Path("in")) if path not in before]
        if self.watch.seen or left:
            outcome, detail = "WRONG", f"did {self.watch.seen[:3]}, left {left[:3]}; {outcome}: {detail}"
        return {
            "kind": name, "index": index, "mutation": mutation, "outcome": outcome, "detail": detail[:1500],
            "seconds": round(seconds, 4), "peak": max(0, peak), "sha256": hashlib.sha256(content).hexdigest()[:12],
            "unchanged": content == whole,
        }  # fmt: skip

    def _judged(self, kind: Any, mutation: str, content: bytes, got: Any, answer: Any) -> tuple[str, str]:
        from mutations import EXACT

        if got == answer:
            return "same answer", ""
        if kind.exact and (mutation in EXACT or (kind.agrees is None and mutation not in kind.resealed)):
            if got in kind.instead:
                return "set aside", ""
            return "WRONG", f"accepted, and not what was written: {got!r:.300}"
        if kind.agrees is None:
            return "another answer", ""
        try:
            agrees = kind.agrees(content, got)
        except Exception as error:  # noqa: BLE001
            return (
                "WRONG",
                f"accepted, and another reader does not: {type(error).__name__}: {error!s:.300}; {got!r:.200}",
            )
        return (
            ("another answer", "")
            if agrees
            else ("WRONG", f"accepted, and another reader differs: {got!r:.300}")
        )


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    reader = Reader(folder, seed)
    import torch

    torch.set_num_threads(1)
    bound = _memory("VmSize") + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    for line in sys.stdin:
        name, index = json.loads(line)
        reader.original(name)
        print(json.dumps(["begin", name, index]), flush=True)
        print(json.dumps(reader.read(name, index)), flush=True)


if __name__ == "__main__":
    main()
