"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hopeprobe.errors import BadInputError


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write `content` to `path`, replacing what was there, or leave everything as it was.

    Folders on the way are made. Raises `BadInputError` naming the file when the disk is full or refuses.
    """
    target = Path(path)
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(
            partial, 0o666 & ~_umask()
        )  # mkstemp's 0600 would hide a result from those it is shared with
        os.replace(partial, target)
    except OSError as error:
        _remove(partial)
        raise BadInputError(
            f"cannot write {target} ({len(content) / 2**20:.1f} MiB): {error.strerror or error}; nothing was left "
            "behind. Free some space, or choose another place"
        ) from None
    except BaseException:  # an interrupt: the half-written file goes too
        _remove(partial)
        raise
    return target


def _remove(partial: str | None) -> None:
    if partial is not None and os.path.exists(partial):
        os.unlink(partial)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
