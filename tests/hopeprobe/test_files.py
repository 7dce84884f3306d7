"""Files are written whole or not at all, at whatever instruction an interrupt comes."""

import builtins
import errno
import functools
import os
import stat
import sys

import numpy as np
import pytest

from hopeprobe import files, nulls
from hopeprobe.errors import BadInputError
from hopeprobe.files import write_atomically
from hopeprobe.tokens import cache


def write_a_file(folder):
    write_atomically(folder / "deep" / "out.json", b"content")


def write_tokens(folder):
    documents = [(np.arange(5, dtype=np.uint16), False), (np.arange(9, dtype=np.uint16), True)]
    cache.write_cache(folder / "deep" / "text.tokens", documents, tokenizer="gpt2", footer={})


def write_a_null(folder):
    nulls.NullCache(folder).save({"key": 1}, {"value": 2})


def interrupted_at(instruction, module, write):
    """Whether `write` came to its end before that many instructions of a module's code were done."""
    done = 0

    def trace(frame, event, _):
        nonlocal done
        if frame.f_code.co_filename != module.__file__:
            return None
        frame.f_trace_opcodes = True
        done += event == "opcode"
        if done == instruction:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        write()
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(before)
    return True


@pytest.mark.parametrize(
    ("module", "write"), [(files, write_a_file), (cache, write_tokens), (nulls, write_a_null)]
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the file that was open
def test_an_interrupt_at_any_instruction_leaves_a_whole_file_or_none(tmp_path, module, write):
    write(tmp_path / "whole")
    (whole,) = (path for path in (tmp_path / "whole").rglob("*") if path.is_file())
    instruction, outcomes = 0, set()
    while True:
        instruction += 1
        folder = tmp_path / str(instruction)
        if interrupted_at(instruction, module, functools.partial(write, folder)):
            break
        left = [path for path in folder.rglob("*") if path.is_file()]
        assert [path.name for path in left] in ([], [whole.name]), f"interrupted at instruction {instruction}"
        assert all(path.read_bytes() == whole.read_bytes() for path in left)
        outcomes.add(len(left))
    assert instruction > 50
    assert outcomes == {0, 1}, "it was interrupted before and after the file was in its place"


def test_what_is_written_can_be_read_by_those_that_it_is_shared_with(tmp_path):
    (tmp_path / "plain").touch()
    path = write_atomically(tmp_path / "out", b"x")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_full_disk_while_it_is_written_leaves_nothing(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *given):
            self.file = builtins.open(*given)  # noqa: SIM115 - closed by __exit__

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "open", Full, raising=False)
    with pytest.raises(BadInputError, match=r"out.*No space left on device; nothing was left behind"):
        write_atomically(tmp_path / "out", b"content")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", [".", "/", "folder", "file/out"])
def test_a_place_that_cannot_be_a_file_is_named(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(BadInputError, match=rf"cannot write {where} "):
        write_atomically(where, b"x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
