"""A file takes its name when it is whole and on the disk; what killed processes had begun is removed by the next.

Until then it is hidden beside its place, as `.NAME.1f2e3d4c.hopeprobe`, and locked by its writer. Whoever writes in a
folder for the first time removes those there that nobody holds: their writers were killed. That needs a disk with
locks; without, they stay and do no harm.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import re
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hopeprobe.locks import HAS_LOCKS, is_at

if HAS_LOCKS:
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterator

_SUFFIX = ".hopeprobe"
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}" + re.escape(_SUFFIX), re.DOTALL)
_LONGEST = 200  # bytes of a name that is shown in the hidden one's
#: What folders answer that cannot be told to reach the disk, or that one may write in and not read.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}


def hidden(target: Path) -> Path:
    """Where `replacing` writes what will be `target`: a new name beside it, of as many bytes each time."""
    name = target.name.encode(errors="replace")[:_LONGEST].decode(errors="ignore")
    return target.parent / f".{name}.{secrets.token_hex(4)}{_SUFFIX}"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], sync: bool = True) -> Iterator[BinaryIO]:
    """Give a file to write that replaces `path` if the block succeeds, and vanishes if not. Raises OSError.

    A link stays, and what it leads to is replaced; the new file has the permissions of the old one. Folders on the way
    are made. sync: wait for the disk, so that neither a cut of power leaves anything but the old file or the new one.
    """
    target = Path(os.path.realpath(path))
    folder = target.parent
    partial = hidden(target)  # named before it is there: an interrupt as it is made finds it too
    file: BinaryIO | None = None
    try:
        make_folder(folder, sync)
        _remove_leftovers_once(os.fspath(folder))
        while file is None:
            file = _held(open(partial, "xb"), partial)  # noqa: SIM115 - closed below, once it has its name
        _take_permissions(file, target)
        yield file
        file.flush()
        if sync:
            os.fsync(file.fileno())
        if not HAS_LOCKS:  # a system where what is open cannot be renamed, as a rule
            file.close()
        os.replace(partial, target)  # while it is held: nobody takes it for left behind
        file.close()
        if sync:
            _sync_folder(folder)
    except BaseException:
        # Closing writes what is buffered, which fails again on a full disk; the first error is told.
        with contextlib.suppress(OSError):
            if file is not None:
                file.close()
        with contextlib.suppress(OSError):  # it may not be there
            partial.unlink()
        raise


def make_folder(folder: Path, sync: bool = True) -> None:
    """Make a folder and those above it, and wait until the disk has them. Raises OSError."""
    missing = list(itertools.takewhile(lambda each: not os.path.lexists(each), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    if sync:
        for each in missing:
            _sync_folder(each.parent)


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what killed processes had begun to write in a folder, and give it; what is being written now stays."""
    removed: list[Path] = []
    if not HAS_LOCKS:
        return removed
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _PARTIAL.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(
                    OSError
                ):  # it is held, it is another user's, it has just got its name
                    _remove_unheld(entry.path)
                    removed.append(Path(entry.path))
    return removed


@functools.lru_cache(maxsize=256)
def _remove_leftovers_once(folder: str) -> None:
    remove_leftovers(folder)


def _remove_unheld(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)  # names are drawn: this one is nobody else's by now
    finally:
        os.close(descriptor)


def _held(file: BinaryIO, partial: Path) -> BinaryIO | None:
    """The file, locked; None where another process took it for left behind before it was."""
    if HAS_LOCKS:
        with contextlib.suppress(OSError):  # a disk without locks: nothing is removed there either
            fcntl.flock(file, fcntl.LOCK_EX)
            if not is_at(file.fileno(), partial):
                file.close()
                return None
    return file


def _take_permissions(file: BinaryIO, target: Path) -> None:
    with contextlib.suppress(OSError, AttributeError):  # there is none yet; a system without permissions
        os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:  # one may write in it and not read it; a system where folders are not opened
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)
