"""A file takes its name when it is whole: links, permissions, the order on the disk, and what the killed leave."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hopeprobe import replacing as module
from hopeprobe.errors import BadInputError
from hopeprobe.files import write_atomically
from hopeprobe.locks import HAS_LOCKS
from hopeprobe.replacing import remove_leftovers, replacing

WRITER = """
import os, signal, sys
from hopeprobe.replacing import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
"""

needs_locks = pytest.mark.skipif(not HAS_LOCKS, reason="this system has no locks for files")


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def killed(target):
    """A process is killed as it writes a file."""
    call = [sys.executable, "-c", WRITER, str(target)]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)


@needs_locks
def test_what_a_killed_process_left_goes_and_what_is_being_written_stays(tmp_path):
    killed(tmp_path / "out")
    (left,) = hidden(tmp_path)
    with replacing(tmp_path / "other") as file:  # the first in this process that is written there
        file.write(b"new")
        (mine,) = hidden(tmp_path)
        assert mine != left
        assert remove_leftovers(tmp_path) == []
        call = [
            sys.executable,
            "-c",
            "import sys; from hopeprobe.files import write_atomically as w; w(sys.argv[1], b'3')",
        ]
        subprocess.run([*call, tmp_path / "third"], check=True)
        assert hidden(tmp_path) == [mine], "another process took it for left behind"
    assert sorted(os.listdir(tmp_path)) == ["other", "third"]
    assert (tmp_path / "other").read_bytes() == b"new"


@needs_locks
def test_removing_is_of_our_own_files_alone(tmp_path):
    ours = ".out.json.0123abcd.hopeprobe"
    others = [".out.json.0123abcd", "out.json.0123abcd.hopeprobe", ".0123abcd.hopeprobe", ".out.0123abc.hopeprobe",
              ".out.json.0123abcd.hopeprobe.txt", ".lock"]  # fmt: skip
    for name in (ours, *others):
        (tmp_path / name).touch()
    (tmp_path / ".folder.0123abcd.hopeprobe").mkdir()
    (tmp_path / ".link.0123abcd.hopeprobe").symlink_to(tmp_path / "out.json")
    assert remove_leftovers(tmp_path) == [tmp_path / ours]
    assert len(os.listdir(tmp_path)) == len(others) + 2
    assert remove_leftovers(tmp_path / "nowhere") == []


@needs_locks
def test_one_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    held, removed = module._held, []

    def late(file, partial):
        if not removed:
            removed.extend(remove_leftovers(tmp_path))
        return held(file, partial)

    monkeypatch.setattr(module, "_held", late)
    write_atomically(tmp_path / "out", b"content")
    assert len(removed) == 1
    assert (tmp_path / "out").read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["out"]


def test_many_write_one_file_and_remove_what_is_left(tmp_path):
    """Two processes and two threads: whatever is there is whole, and nothing else is at the end."""
    program = """
import sys
from hopeprobe import replacing
from hopeprobe.files import write_atomically
for number in range(40):
    replacing.remove_leftovers(sys.argv[1])
    write_atomically(f"{sys.argv[1]}/out", bytes([number]) * 5000)
"""
    call = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(call) for _ in range(2)]
    failed = []

    def work():
        try:
            for number in range(40):
                remove_leftovers(tmp_path)
                write_atomically(tmp_path / "out", bytes([number]) * 5000)
                content = (tmp_path / "out").read_bytes()
                assert content == content[:1] * 5000
        except BaseException as error:  # noqa: BLE001 - told below
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for one in (*threads, *processes):
        one.join() if isinstance(one, threading.Thread) else one.wait()
    assert not failed
    assert [process.returncode for process in processes] == [0, 0]
    assert os.listdir(tmp_path) == ["out"]


def test_a_disk_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / ".out.0123abcd.hopeprobe").touch()
    monkeypatch.setattr(fcntl, "flock", refuse)
    write_atomically(tmp_path / "out", b"x")
    assert sorted(os.listdir(tmp_path)) == [".out.0123abcd.hopeprobe", "out"], "one may be writing it"


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("shared/real")
    (tmp_path / "new").symlink_to("shared/new")
    write_atomically(tmp_path / "link", b"content")
    write_atomically(tmp_path / "new", b"content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new").is_symlink()
    assert {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()} == {
        "real": b"content", "new": b"content",
    }  # fmt: skip


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_what_is_replaced_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "out"
    path.touch()
    path.chmod(mode)
    with replacing(path) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == mode, "before anything is in it"
        file.write(b"x")
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_long_name(tmp_path):
    for name in ("x" * 255, "é" * 127):
        write_atomically(tmp_path / name, b"x")
    assert len(os.listdir(tmp_path)) == 2


def test_the_content_reaches_the_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    """Folders that were made too; without `sync` nothing waits."""
    told = []

    def tell(call):
        real = getattr(os, call)

        def inner(*given):
            where = Path(os.readlink(f"/proc/self/fd/{given[0]}")) if call == "fsync" else Path(given[1])
            told.append((call, where.name.partition(".0")[0] if where.name.startswith(".") else where.name))
            return real(*given)

        monkeypatch.setattr(os, call, inner)

    if not Path("/proc/self/fd").exists():
        pytest.skip("looks at open files through /proc")
    monkeypatch.setattr(module.secrets, "token_hex", lambda n: "0" * 2 * n)
    tell("fsync")
    tell("replace")
    write_atomically(tmp_path / "deep" / "er" / "out", b"x")
    folders = [("fsync", "deep"), ("fsync", tmp_path.name)]
    assert told == [*folders, ("fsync", ".out"), ("replace", "out"), ("fsync", "er")]
    told.clear()
    with replacing(tmp_path / "new" / "out", sync=False):
        pass
    assert told == [("replace", "out")]


@pytest.mark.parametrize(("code", "refused"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch, code, refused):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if refused:
        with pytest.raises(BadInputError, match=r"cannot write .*out.*Input/output error"):
            write_atomically(tmp_path / "out", b"x")
    else:
        write_atomically(tmp_path / "out", b"x")
    assert (tmp_path / "out").read_bytes() == b"x"
