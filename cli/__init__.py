"""The command line: thin, quick to start, and every error in one line with a status that scripts can rely on.

0 done, 1 a regression was found, 2 bad input, 3 a measurement could not be made, 4 training diverged, 130 interrupted.
`--debug` shows the traceback. Of several ranks one says what went wrong (`cli/several.py`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; the entry point `hopeprobe`."""
    given = sys.argv[1:] if arguments is None else arguments
    in_main = threading.current_thread() is threading.main_thread()
    # Not where it is ignored (nohup).
    ours = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if ours:
            signal.signal(signal.SIGINT, _interrupt)
        status = run(given)
        if ours:  # what is done is done, and ends as it says
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        if "--debug" in given:
            raise
        status = _interrupted()
    sys.exit(status)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Stop at the first interrupt as soon as the batches under way are done, at the second at once."""
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _leave(_signal: int, _frame: FrameType | None) -> None:
    os._exit(_INTERRUPTED)


def run(arguments: list[str]) -> int:
    """Run the command line and return its status."""
    debug = "--debug" in arguments
    try:
        return _run([a for a in arguments if a != "--debug"], debug)
    except KeyboardInterrupt:
        if debug:
            raise
        return _interrupted()


def _run(arguments: list[str], debug: bool) -> int:
    import typer

    from hopeprobe import ranks
    from hopeprobe.cli.app import app
    from hopeprobe.errors import HopeprobeError
    from hopeprobe.printable import message

    def command() -> Any:
        return typer.main.get_command(app).main(arguments, prog_name="hopeprobe", standalone_mode=False)

    # typer brings a click of its own in some versions; its exceptions are found from what typer exports.
    usage_error = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    several = False
    try:
        several = ranks.launched()
        if several:
            from hopeprobe.cli.several import as_rank

            result = as_rank(arguments, command)
        else:
            result = command()
    except HopeprobeError as error:
        if debug:
            raise
        if ranks.speaks():
            print(f"hopeprobe: {message(str(error))}", file=sys.stderr)
        if several:
            from hopeprobe.cli.several import wait_for_the_cause

            wait_for_the_cause(error)
        return error.exit_code
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader went away, `hopeprobe hooks ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        if ranks.speaks():
            print(f"hopeprobe: {message(f'{where}{error.strerror or error}')}", file=sys.stderr)
        return 2
    except Exception as error:
        if signal.getsignal(signal.SIGINT) is _leave:  # some libraries make another error of an interrupt
            raise KeyboardInterrupt from error
        if not isinstance(error, usage_error):
            raise  # a defect of ours shows its traceback
        if ranks.speaks():
            error.show()  # type: ignore[attr-defined]
        return int(error.exit_code)  # type: ignore[attr-defined]
    if result == _INTERRUPTED:  # some versions of typer turn an interrupt into this status themselves
        return _interrupted()
    return result if isinstance(result, int) else 0


def _interrupted() -> int:
    from hopeprobe import ranks

    if ranks.speaks():
        print("hopeprobe: interrupted; every file written so far is whole", file=sys.stderr)
    return _INTERRUPTED


__all__ = ["main", "run"]
