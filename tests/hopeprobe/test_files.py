"""Files are written whole or not at all, at whatever instruction an interrupt comes."""

import builtins
import errno
import functools
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hopeprobe import files, nulls, replacing
from hopeprobe.errors import BadInputError
from hopeprobe.files import append_whole, check_places, write_atomically
from hopeprobe.tokens import cache


def write_a_file(folder):
    write_atomically(folder / "deep" / "out.json", b"content")


def write_tokens(folder):
    documents = [(np.arange(5, dtype=np.uint16), False), (np.arange(9, dtype=np.uint16), True)]
    cache.write_cache(folder / "deep" / "text.tokens", documents, tokenizer="gpt2", footer={})


def write_a_null(folder):
    nulls.NullCache(folder).save({"key": 1}, {"value": 2})


def interrupted_at(instruction, module, write):
    """Whether `write` came to its end before that many instructions of a module, and of `replacing`, were done."""
    done, traced = 0, {module.__file__, replacing.__file__}

    def trace(frame, event, _):
        nonlocal done
        if frame.f_code.co_filename not in traced:
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
def test_an_interrupt_at_any_instruction_leaves_a_whole_file_or_none(tmp_path, module, write, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of files, and none that must last
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

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(replacing, "open", Full, raising=False)
    said = r"out.*No space left on device; nothing half written was left behind\. Free some space, or choose another"
    with pytest.raises(BadInputError, match=said):
        write_atomically(tmp_path / "out", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_file_larger_than_may_be(tmp_path):
    """The system's own limit, in a process of its own."""
    (tmp_path / "out").write_bytes(b"old")
    program = """
import resource, sys
from hopeprobe.errors import BadInputError
from hopeprobe.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    write_atomically(sys.argv[1], bytes(5000))
except BadInputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "out"], capture_output=True, text=True)
    assert (
        "out (0.0 MiB): File too large; nothing half written was left behind. Raise the limit" in done.stdout
    )
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out", b"old")]


def test_a_line_is_added_whole_or_not_at_all(tmp_path, monkeypatch):
    write, room = os.write, 8

    def full(descriptor, content):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(descriptor, content[: min(3, room)])  # a little at a time
        room -= done
        return done

    monkeypatch.setattr(os, "write", full)
    with (tmp_path / "log").open("ab", buffering=0) as file:
        append_whole(file, b"1234\n")
        with pytest.raises(OSError, match="No space"):
            append_whole(file, b"5678\n")
        assert (tmp_path / "log").read_bytes() == b"1234\n"
        room = 100
        append_whole(file, b"90\n")
    assert (tmp_path / "log").read_bytes() == b"1234\n90\n"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder, a file and a pipe, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("old")
    os.mkfifo("pipe")
    yield
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "pipe"]
    assert Path("file").read_text() == "old"


@pytest.mark.parametrize(
    ("where", "why"),
    [
        (".", "it is a folder"),
        ("/", "it is a folder"),
        ("folder", "it is a folder; name a file"),
        ("file/out", "file is a file, not a folder"),
        ("file/deep/out", "file is a file, not a folder"),
        ("pipe", "it is no regular file"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_place_that_cannot_be_a_file_is_refused_early_and_late(places, where, why):
    with pytest.raises(BadInputError, match=rf"^cannot write {where}.*: {why}"):
        write_atomically(where, b"x")
    if len(where) < 256:
        with pytest.raises(BadInputError, match=rf"^cannot write {where}: {why}"):
            check_places([Path(where)])


def test_a_place_that_cannot_be_a_folder(places):
    with pytest.raises(
        BadInputError, match=r"^cannot write file: it is a file, not a folder; choose another place"
    ):
        check_places(folders=[Path("file")])
    with pytest.raises(BadInputError, match=r"^cannot write file/deep: file is a file"):
        check_places(folders=[Path("file/deep")])
    check_places([None, Path("new/deep/out"), Path("file")], [None, Path("folder"), Path("another/folder")])


def test_a_folder_that_nothing_may_be_written_in(places, monkeypatch):
    """As for those who are no administrators; these may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: (str(path), mode) != ("folder", os.W_OK | os.X_OK))
    for files_, folders in (
        ([Path("folder/out")], []),
        ([Path("folder/new/out")], []),
        ([], [Path("folder")]),
    ):
        with pytest.raises(BadInputError, match="nothing may be written in folder; choose another place"):
            check_places(files_, folders)
    check_places([Path("out")])


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no file system here that nobody can write to")
def test_a_file_system_that_nobody_can_write_to():
    """To administrators `os.access` says that they may."""
    with pytest.raises(BadInputError, match="nothing may be written in /proc; choose another place"):
        check_places([Path("/proc/results.json")])


def test_trying_leaves_nothing_behind(places):
    before = sorted(os.listdir("folder"))
    check_places([Path("folder/out")], [Path("folder")])
    assert sorted(os.listdir("folder")) == before


def test_what_is_read_is_not_written_over(places):
    os.symlink(Path("file").absolute(), "folder/link")
    for one, other in (
        ("file", "file"),
        ("folder/../file", "file"),
        ("folder/link", "file"),
        ("new", "./new"),
    ):
        with pytest.raises(BadInputError, match=f"cannot write {one}: it is read too"):
            check_places([Path(one)], read=["builtin", other])
        with pytest.raises(BadInputError, match=f"cannot write {other.removeprefix('./')} twice"):
            check_places([Path(one), Path(other)])
    check_places([Path("file"), Path("new")], read=["builtin", "folder/file"])
    os.unlink("folder/link")
