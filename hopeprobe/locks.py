"""One process at a time in the folder of a run or a grid, or on a file that takes long to make; others are told who.

    with run_lock(folder): ...

The lock is the kernel's (`flock`) on a hidden file, `.lock` in the folder or `.NAME.lock` beside the file: it goes with
the process, however that ends, so one that was killed is never in the way, whatever its file says. The file tells
others who holds it, and is removed when all went well. Processes of one machine see each other on any disk; those of
several on what they share by NFS (Linux passes the lock on to the server) or by another file system whose locks reach
all machines. Mounted with `nolock`, `local_lock`, `localflock`, locks end at the machine. Where a disk has none at all,
a warning says so; on a system without `flock`, such as Windows, nothing is held.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import importlib.util
import itertools
import json
import os
import shlex
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hopeprobe.errors import BadInputError

#: Whether the system has locks for files; a disk of it may have none all the same.
HAS_LOCKS = importlib.util.find_spec("fcntl") is not None
if HAS_LOCKS:
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterator

_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(
    os, "O_NONBLOCK", 0
)  # a link, a pipe: what a stranger left there
_SHOWN = 160
_TRIES = 5
_PAUSE = 0.05  # seconds
_OTHER_FOLDER = "another --out"


@contextlib.contextmanager
def run_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the folder of a run or of a grid; it is made, and goes again if nothing was written there.

    Raises BadInputError where another process, or another thread of this one, holds it, and where nothing can be
    written.
    """
    target = Path(folder)
    with _passing(target), _held(target / ".lock", target, _OTHER_FOLDER):
        yield


@contextlib.contextmanager
def file_lock(file: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a file that is to be written, from before what goes into it is measured. As `run_lock` in all else."""
    target = Path(file)
    with _passing(target.parent), _held(target.with_name(f".{target.name}.lock"), target, "another file"):
        yield


def refuse_held(folder: str | os.PathLike[str]) -> None:
    """Raise BadInputError where another process holds a folder now: to be told before hours go into tokens.

    So it does where the folder could not be held: too long a name, one that may not be looked into.
    """
    path = Path(folder) / ".lock"
    if not HAS_LOCKS:
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    except FileNotFoundError:  # nobody holds it
        return
    except OSError as error:
        raise _refused(path, error, _OTHER_FOLDER) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(descriptor, Path(folder), _OTHER_FOLDER) from None
    except OSError:  # a disk without locks is told when it is to be held
        return
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _passing(folder: Path) -> Iterator[None]:
    """Remove what was made of a folder, and of those above it, if nothing is in it afterwards."""
    made = list(itertools.takewhile(lambda each: not os.path.lexists(each), (folder, *folder.parents)))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the first that holds something
            for each in made:
                each.rmdir()


@contextlib.contextmanager
def _held(path: Path, target: Path, instead: str) -> Iterator[None]:
    if not HAS_LOCKS:
        yield
        return
    try:
        descriptor = _acquired(path, target, instead)
    except BaseException:  # an interrupt as it was made
        with contextlib.suppress(OSError):
            _remove_free(path)
        raise
    try:
        yield
    finally:
        if descriptor is not None:
            # Removed while it is held: one who has opened it meanwhile sees that it is gone, and makes another.
            if is_at(descriptor, path):
                with contextlib.suppress(OSError):
                    path.unlink()
            os.close(descriptor)


def _acquired(path: Path, target: Path, instead: str) -> int | None:
    """A descriptor that holds the lock, None where the disk has no locks."""
    for patience in range(_TRIES, -1, -1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _opened(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and patience:
                continue  # the folder went as its last holder let go of it
            raise _refused(path, error, instead) from None
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not patience:
                    raise _in_use(descriptor, target, instead) from None
                time.sleep(_PAUSE)  # one that only looks lets go at once
                continue
            except OSError as error:
                what = (
                    f"{target} cannot be locked ({error.strerror or error}): let no other process write there"
                )
                warnings.warn(what, RuntimeWarning, stacklevel=6)
                return None
            if is_at(descriptor, path) and _told(descriptor, path):
                stack.pop_all()
                return descriptor
    raise BadInputError(f"{target} cannot be held: {path} goes again and again; choose {instead}")


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
    except PermissionError:  # a killed process of another user left it: enough to lock, and to make another
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | _FLAGS)


def _remove_free(path: Path) -> None:
    """Remove the file of a lock that nobody holds. Raises OSError where one does, or there is none."""
    descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(descriptor, path):
            path.unlink()
    finally:
        os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    return False


def _told(descriptor: int, path: Path) -> bool:
    """Write down who holds it; False where the file was another user's and has been removed."""
    now = dt.datetime.now().astimezone()
    who = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": now.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "command": _command(),
    }
    content = json.dumps(who).encode() + b"\n"
    try:
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
    except OSError as error:
        if error.errno == errno.EBADF:  # opened to be read only
            with contextlib.suppress(OSError):
                path.unlink()
                return False
    return True  # on a full disk it is held all the same


def _command() -> str:
    name, *rest = sys.argv if sys.argv and sys.argv[0] else sys.orig_argv
    if name == "-c":  # Python's; the program itself is long
        name, rest = sys.executable, ["-c", "...", *rest]
    return shlex.join([os.path.basename(name), *rest])


def _refused(path: Path, error: OSError, instead: str) -> BadInputError:
    return BadInputError(f"cannot write in {path.parent}: {error.strerror or error}; choose {instead}")


def _in_use(descriptor: int, target: Path, instead: str) -> BadInputError:
    said: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(os.pread(descriptor, 1 << 16, 0))
        said = found if isinstance(found, dict) else {}
    known = {key: _shown(said[key]) for key in ("pid", "host", "since", "command") if key in said}
    who = f"process {known['pid']}" if "pid" in known else "another process, which does not say its number"
    where = f" on {known['host']}" if "host" in known else ""
    what = f" ({known.get('command', '')}, since {known['since']})" if "since" in known else ""
    return BadInputError(
        f"{target} is in use by {who}{where}{what}: let it end or stop it, or choose {instead}"
    )


def _shown(value: object) -> str:
    text = "".join(sign if sign.isprintable() else "?" for sign in str(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
