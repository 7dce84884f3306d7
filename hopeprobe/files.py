"""Writing files whole or not at all, and telling early where nothing can be written."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hopeprobe.documents import parse_json
from hopeprobe.errors import BadInputError
from hopeprobe.locks import HAS_LOCKS
from hopeprobe.replacing import hidden, replacing

if HAS_LOCKS:
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_FULL = {errno.ENOSPC, errno.EDQUOT}


def check_places(
    files: Iterable[Path | None] = (), folders: Iterable[Path | None] = (), read: Iterable[str | Path] = ()
) -> None:
    """Raise BadInputError for a place that cannot be written to, before hours go into what would be written there.

    files, folders: to write, None for one that was not asked for. read: what would be lost if it were written over.
    """
    given, known = [Path(one) for one in read], list[Path]()
    for file in filter(None, files):
        _check_file(file)
        if any(_same(file, one) for one in given):
            raise BadInputError(
                f"cannot write {file}: it is read too, and would be lost; choose another file"
            )
        if any(_same(file, one) for one in known):
            raise BadInputError(f"cannot write {file} twice: name a file for each of what is written")
        known.append(file)
    for folder in filter(None, folders):
        _check_folder(folder, folder)
        _check_length(Path(os.path.realpath(folder)), folder)


def _check_file(file: Path) -> None:
    if os.path.isdir(file):
        raise BadInputError(f"cannot write {file}: it is a folder; name a file")
    if os.path.exists(file) and not os.path.isfile(file):  # to replace /dev/null would break more than this
        raise BadInputError(f"cannot write {file}: it is no regular file; choose another")
    # A link is written through.
    real = Path(os.path.realpath(file))
    _check_folder(real.parent if os.path.islink(file) else file.parent, file)
    _check_length(real, file)
    _check_length(hidden(real), file)  # which may be the longer name


def _check_folder(folder: Path, target: Path) -> None:
    """Look at the folder, or where it will be made, at the next one above that is there."""
    there = _first_there(folder)
    if not os.path.isdir(there):
        what = "it" if there == target else there
        raise BadInputError(f"cannot write {target}: {what} is a file, not a folder; choose another place")
    if not _writable(there):
        raise BadInputError(f"cannot write {target}: nothing may be written in {there}; choose another place")


def _first_there(path: Path) -> Path:
    return next((one for one in (path, *path.parents) if os.path.exists(one)), Path())


def _check_length(path: Path, target: Path) -> None:
    """Look whether a path may be that long, and each name in it that is not there yet."""
    there = _first_there(path)
    new = itertools.takewhile(lambda one: one != there, (path, *path.parents))
    # The system looks no further than a folder that is missing: each name is tried in the last that is there.
    for one in (path, *(there / each.name for each in new)):
        try:
            os.lstat(one)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                said = f"cannot write {target}: {error.strerror}; choose another place"
                raise BadInputError(said) from None


def _writable(folder: Path) -> bool:
    """By trying: those who may do anything are told so of file systems that nobody can write to."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        return error.errno in _FULL  # which may change until something is written, and is said better then


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there yet
        return os.path.abspath(one) == os.path.abspath(other)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write `content` to `path`, replacing what was there, or leave everything as it was (see `replacing`).

    Folders on the way are made. Raises `BadInputError` naming the file when the disk is full or refuses.
    """
    target = Path(path)
    _check_file(target)
    try:
        with replacing(target) as file:
            file.write(content)
    except OSError as error:
        raise BadInputError(
            f"cannot write {target} ({len(content) / 2**20:.1f} MiB): {error.strerror or error}; nothing half "
            f"written was left behind. {advice(error)}"
        ) from None
    return target


def append_whole(file: BinaryIO, content: bytes) -> None:
    """Add to an unbuffered file all or nothing: where it cannot be written, what was added is cut off. Raises OSError.

    A process that is killed may leave the beginning; so may a cut of power.
    """
    descriptor = file.fileno()
    size = os.fstat(descriptor).st_size
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    except BaseException:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def append_record(file: BinaryIO, record: bytes) -> None:
    """Add a JSON object as a line, as `append_whole`; the file can be read too. Others may add to it. Raises OSError.

    The beginning of a line that a killed process left is cut off: the record would become the rest of it.
    """
    with _alone(file):
        append_whole(file, _mend(file, record.partition(b":")[0]) + record + b"\n")


@contextlib.contextmanager
def _alone(file: BinaryIO) -> Iterator[None]:
    """Hold a file, but on a disk without locks: what another is just writing must not be taken for left behind."""
    if not HAS_LOCKS:
        yield
        return
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        # Not by closing it alone: a process that was forked meanwhile has it open too.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def _mend(file: BinaryIO, key: bytes) -> bytes:
    """Cut off the beginning of a record that ends a file, and give what must come before the next. Raises OSError.

    That is the end of its line, where it is a whole record, or none that begins as all do, with `key`: a file named by
    mistake loses nothing.
    """
    size = os.fstat(file.fileno()).st_size  # 0 for a pipe, which cannot be read
    start, tail = size, b""
    while start and b"\n" not in tail:
        start = max(0, size - max(1, 16 * len(tail)))
        file.seek(start)
        tail = file.read()
    left = tail[tail.rfind(b"\n") + 1 :]
    if not left:
        return b""
    if not left.startswith(key) and not key.startswith(left):
        return b"\n"
    try:
        parse_json(left.decode(), special=True)
    except ValueError:
        os.ftruncate(file.fileno(), start + len(tail) - len(left))
        return b""
    return b"\n"


def advice(error: OSError) -> str:
    """What to do where nothing can be written: a sentence without its end."""
    if error.errno in _FULL:
        return "Free some space, or choose another place"
    if error.errno == errno.EFBIG:
        return "Raise the limit for the size of files (ulimit -f), or choose another place"
    return "Choose another place"
