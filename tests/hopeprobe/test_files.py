"""Files are written whole or not at all, at whatever instruction an interrupt comes."""

import builtins
import errno
import functools
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hopeprobe import files, nulls, replacing
from hopeprobe.documents import read_records
from hopeprobe.errors import BadInputError
from hopeprobe.files import append_record, append_whole, check_places, write_atomically
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


def add(path, record):
    with path.open("a+b", buffering=0) as file:
        append_record(file, record)


RECORDS = [{"step": 0, "of": "ä"}, {"step": 10, "of": "€"}]
FIRST, LAST = (json.dumps(record, ensure_ascii=False).encode() for record in RECORDS)


def test_a_record_is_a_line_of_its_own_wherever_a_kill_cut_the_last_one_off(tmp_path):
    path = tmp_path / "log"
    for end in range(len(LAST) + 1):
        path.write_bytes(FIRST + b"\n" + LAST[:end])
        for step in (11, 12):
            add(path, b'{"step": %d}' % step)
        kept = [LAST] if end == len(LAST) else []  # only the end of its line is missing
        assert path.read_bytes().splitlines() == [FIRST, *kept, b'{"step": 11}', b'{"step": 12}'], LAST[:end]
        assert [record["step"] for _, record in read_records(path)] == [0, *([10] * len(kept)), 11, 12]


@pytest.mark.parametrize("size", [1, 20, 300, 70_000])
def test_the_beginning_of_the_first_record_is_cut_off_too(tmp_path, size):
    path = tmp_path / "log"
    path.write_bytes((b'{"step": 7, "note": "' + b"x" * size)[:size])
    add(path, FIRST)
    assert path.read_bytes() == FIRST + b"\n"


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x05\x06\n\x00\x00", b'{\n "a": 1\n}', b"a note", b"\n", b"{name: value}", b"# notes\n{{ template }}",
        b'{"a": 1, "a": 2}', b'{"x": ' + b"[" * 300, b'{"caf\xe9": 1}', b"\\begin\n{\\bf all",
    ],
)  # fmt: skip
def test_what_is_no_record_is_not_cut_off(tmp_path, content):
    """A file that was named by mistake."""
    path = tmp_path / "log"
    path.write_bytes(content)
    add(path, FIRST)
    assert path.read_bytes() == content + b"\n" * (content != b"\n") + FIRST + b"\n"


def test_a_record_for_which_there_is_no_room_leaves_whole_ones(tmp_path, monkeypatch):
    def full(descriptor, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "log"
    path.write_bytes(FIRST + b"\n" + LAST[:5])
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        add(path, LAST)
    assert path.read_bytes() == FIRST + b"\n"


def test_many_add_to_one_file_and_none_cuts_off_what_another_writes(tmp_path):
    """Slowly, a piece at a time: what is seen of a line that is being written looks as what a kill left."""
    pytest.importorskip("fcntl")
    program = """
import os, sys, time
from hopeprobe.files import append_record
write = os.write
def slowly(descriptor, content):
    time.sleep(0.001)
    return write(descriptor, content[:5])
os.write = slowly
for number in range(20):
    with open(sys.argv[1], "a+b", buffering=0) as file:
        append_record(file, b'{"who": %s, "number": %d}' % (sys.argv[2].encode(), number))
"""
    path = tmp_path / "log"
    path.write_bytes(b'{"who": ')
    processes = [subprocess.Popen([sys.executable, "-c", program, path, str(who)]) for who in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    found = [(record["who"], record["number"]) for _, record in read_records(path)]
    assert [sorted(number for who, number in found if who == one) for one in range(3)] == [[*range(20)]] * 3


def test_a_disk_without_locks_gets_its_records_too(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "log").write_bytes(FIRST + b"\n" + LAST[:5])
    add(tmp_path / "log", LAST)
    assert (tmp_path / "log").read_bytes() == FIRST + b"\n" + LAST + b"\n"


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
    with pytest.raises(BadInputError, match=rf"^cannot write {where}: {why}"):
        check_places([Path(where)])


LONG = "x" * 300


def test_a_name_that_is_too_long_anywhere_in_a_place(places):
    os.symlink(LONG, "folder/link")
    for file in (
        f"new/{LONG}",
        f"new/{LONG}/out",
        f"folder/{LONG}/deep/out",
        "folder/link",
        "a/" * 2200 + "out",
    ):
        with pytest.raises(BadInputError, match=f"^cannot write {file}: File name too long; choose another"):
            check_places([Path(file)])
    for folder in (LONG, f"new/{LONG}", f"folder/{LONG}/deep", "a/" * 2200 + "out"):
        with pytest.raises(
            BadInputError, match=f"^cannot write {folder}: File name too long; choose another"
        ):
            check_places(folders=[Path(folder)])
    check_places([Path("x" * 255), Path(f"new/{'é' * 127}")], [Path(f"new/{'x' * 255}")])
    os.unlink("folder/link")


def written(path):
    """Whether the system takes a file there, and the hidden one before it."""
    try:
        with replacing.replacing(path, sync=False) as file:
            file.write(b"x")
    except OSError as error:
        assert error.errno == errno.ENAMETOOLONG  # noqa: PT017 - what else is wrong is an error here
        return False
    path.unlink()
    return True


def allowed(path):
    try:
        check_places([path])
    except BadInputError:
        return False
    return True


@pytest.mark.parametrize("letter", ["x", "é"])
@pytest.mark.parametrize("room", [30, 110, 215, 240])
def test_the_length_of_a_path_is_told_as_writing_finds_it(tmp_path, monkeypatch, room, letter):
    """Up to the longest of the system: the hidden file may have the longer name, or the shorter one."""
    folder, most = tmp_path, os.pathconf(tmp_path, "PC_PATH_MAX") - 1  # bytes; the last ends it
    while (left := most - room - len(os.fsencode(folder)) - 1) > 200:
        folder /= "d" * 100
    folder /= "d" * left
    assert len(os.fsencode(folder)) == most - room
    folder.mkdir(parents=True)
    found = []
    for length in range(max(1, room - 35), room + 3):
        name = letter * (length // len(letter.encode())) + "x" * (length % len(letter.encode()))
        found.append(written(folder / name))
        assert allowed(folder / name) is found[-1], length
        assert list(folder.iterdir()) == []
    assert set(found) == {True, False}
    monkeypatch.chdir(folder)  # where it is a short name, of a long path
    assert not allowed(Path("x" * room))


def test_the_hidden_file_alone_may_be_too_long(tmp_path, monkeypatch):
    """As on disks that know shorter names than others."""
    real, most = os.lstat, 140
    for length in (100, 120, 121, 140):

        def lstat(path, *given, **more):
            if len(os.path.basename(os.fspath(path))) > most:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            return real(path, *given, **more)

        monkeypatch.setattr(os, "lstat", lstat)
        assert allowed(tmp_path / ("x" * length)) is (length <= 120)
        monkeypatch.undo()


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
