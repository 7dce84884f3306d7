"""A command as one of several processes: which commands that makes sense for, and who says what went wrong.

`torchrun` has no status but 0 and 1 of its own. What a rank ended with is in its summary, and in the file that
TORCHELASTIC_ERROR_FILE names to it: each error is recorded as torch.distributed.elastic would have it, without a
traceback where the message is meant for people.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hopeprobe import ranks
from hopeprobe.errors import BadInputError, HopeprobeError, LostRankError
from hopeprobe.printable import message

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMANDS = ("train", "analyze")
"""What several processes can share; the others take one."""

#: Seconds in which torchrun, if it is there, finds the rank that was lost, for the cause, and ends the others.
_GRACE = 3.0


def as_rank(arguments: list[str], run: Callable[[], Any]) -> Any:
    """Run a command line as one of several ranks. Raises BadInputError for one that they cannot share."""
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

    class Handler(ErrorHandler):  # torch's way to say how errors are kept
        def record_exception(self, e: BaseException) -> None:
            file = self._get_error_file_path()
            text = _for_people(e)
            if file is None or text is None:
                super().record_exception(e)
            elif not isinstance(e, LostRankError):
                about = {"py_callstack": f"hopeprobe: {text}", "timestamp": str(int(time.time()))}
                self._write_error_file(file, json.dumps({"message": {"message": text, "extraInfo": about}}))

    def shared() -> Any:
        command = next((a for a in arguments if not a.startswith("-")), None)
        if command is not None and command not in COMMANDS:
            raise BadInputError(
                f"{command} runs in one process: start it without torchrun. Several share {' and '.join(COMMANDS)}"
            )
        return run()

    with ranks.joined(), _quiet_unless_first():
        return record(shared, Handler())()


def _for_people(error: BaseException) -> str | None:
    """The message of an error of ours, or of the parser's; None of a defect."""
    if isinstance(error, HopeprobeError):
        return message(str(error))
    told = getattr(error, "format_message", None)  # what errors of the parser have
    return message(str(told())) if told is not None else None


@contextlib.contextmanager
def _quiet_unless_first() -> Iterator[None]:
    if ranks.first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def wait_for_the_cause(error: HopeprobeError) -> None:
    """Where a rank was lost, let torchrun see to it, which then ends this one too."""
    if isinstance(error, LostRankError) and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(_GRACE)
