"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from hopeprobe.errors import BadInputError


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write `content` to `path`, replacing what was there, or leave everything as it was.

    Folders on the way are made. Raises `BadInputError` naming the file when the disk is full or refuses.
    """
    target = Path(path)
    # Named before it is there: an interrupt as it is made finds it too.
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
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


def _remove(partial: Path) -> None:
    with contextlib.suppress(OSError):  # most often it is not there
        partial.unlink()
