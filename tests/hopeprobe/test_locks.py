"""A lock is held by one, tells who that is, goes with its process, and leaves nothing behind."""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import warnings

import pytest

from hopeprobe import locks
from hopeprobe.errors import BadInputError
from hopeprobe.locks import file_lock, refuse_held, run_lock

fcntl = pytest.importorskip("fcntl")

HOLDER = """
import sys, time
from hopeprobe.locks import file_lock, run_lock
hold = {"run": run_lock, "file": file_lock}[sys.argv[1]]
with hold(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def another(kind, target):
    """A process that holds a lock until its input ends."""
    call = [sys.executable, "-c", HOLDER, kind, str(target)]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process


def test_a_folder_is_held_by_one_and_clean_afterwards(tmp_path):
    folder = tmp_path / "deep" / "run"
    with run_lock(folder):
        said = json.loads((folder / ".lock").read_text())
        assert (said["pid"], said["host"]) == (os.getpid(), socket.gethostname())
        (folder / "work").touch()
        with pytest.raises(BadInputError, match=f"in use by process {os.getpid()} on "), run_lock(folder):
            pass
    assert [path.name for path in folder.iterdir()] == ["work"]
    with run_lock(folder):
        pass


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with run_lock(tmp_path / "deep" / "run"):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with run_lock(tmp_path / "there"):
        pass
    assert (tmp_path / "there").is_dir()


@pytest.mark.parametrize(("kind", "hold"), [("run", run_lock), ("file", file_lock)])
def test_another_process_is_told_who_holds_it_and_a_killed_one_is_not_in_the_way(tmp_path, kind, hold):
    target = tmp_path / "target"
    with another(kind, target) as process:
        with pytest.raises(BadInputError) as refused, hold(target):
            pass
        told = str(refused.value)
        assert told.startswith(f"{target} is in use by process {process.pid} on {socket.gethostname()} (")
        assert f"{kind} {target}"[:100] in told
        assert ", since 20" in told
        assert told.endswith(
            ": let it end or stop it, or choose another " + {"run": "--out", "file": "file"}[kind]
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
    (left,) = tmp_path.rglob(".*lock")
    assert json.loads(left.read_text())["pid"] == process.pid
    with hold(target):
        assert json.loads(left.read_text())["pid"] == os.getpid()
    assert not list(tmp_path.rglob(".*lock"))


def test_one_that_only_looks(tmp_path):
    refuse_held(tmp_path / "nowhere")
    refuse_held(tmp_path)
    (tmp_path / ".lock").write_text("left by one that was killed")
    refuse_held(tmp_path)
    with another("run", tmp_path) as process:
        with pytest.raises(BadInputError, match=f"in use by process {process.pid} on"):
            refuse_held(tmp_path)
        process.communicate("\n")
    refuse_held(tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_that_only_looks_is_told_where_nothing_can_be_held(tmp_path, monkeypatch):
    """In the words of one that is to hold it."""
    (tmp_path / "file").touch()

    def told(folder, number):
        said = f"cannot write in {folder}: {os.strerror(number)}; choose another --out"
        for look in (refuse_held, lambda one: run_lock(one).__enter__()):
            with pytest.raises(BadInputError) as refused:
                look(folder)
            assert str(refused.value) == said

    told(tmp_path / ("x" * 300), errno.ENAMETOOLONG)
    with pytest.raises(BadInputError, match=r"cannot write in .*: Not a directory"):
        refuse_held(tmp_path / "file")

    def refusing(call):
        def inner(path, *given, **more):
            if path == tmp_path / ".lock":
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return call(path, *given, **more)

        return inner

    with monkeypatch.context() as patch:  # as for those who are no administrators; these may look everywhere
        patch.setattr(os, "open", refusing(os.open))
        patch.setattr(os, "stat", refusing(os.stat))
        told(tmp_path, errno.EACCES)


def test_one_that_only_looks_leaves_a_disk_without_locks_alone(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / ".lock").touch()
    monkeypatch.setattr(fcntl, "flock", refuse)
    refuse_held(tmp_path)


@pytest.mark.parametrize("said", ["", "{", "[]", '{"pid": "\\u001b[31m7"}', "\x00\xff"])
def test_a_holder_whose_file_says_nothing_of_use(tmp_path, said, monkeypatch):
    monkeypatch.setattr(locks, "_PAUSE", 0)
    with run_lock(tmp_path):
        (tmp_path / ".lock").write_text(said, encoding="latin1")
        with pytest.raises(BadInputError) as refused, run_lock(tmp_path):
            pass
        assert "in use by " + ("process ?[31m7:" if "pid" in said else "another process, which") in str(
            refused.value
        )


def test_a_lock_whose_file_was_removed_is_no_lock(tmp_path, monkeypatch):
    """One opens the file, its holder lets go and removes it, a third makes another: the first holds what is gone."""
    first, third = run_lock(tmp_path), run_lock(tmp_path)
    opened = locks._opened

    def late(path):
        descriptor = opened(path)
        monkeypatch.setattr(locks, "_opened", opened)
        first.__exit__(None, None, None)
        third.__enter__()
        return descriptor

    first.__enter__()
    monkeypatch.setattr(locks, "_opened", late)
    monkeypatch.setattr(locks, "_PAUSE", 0)
    with pytest.raises(BadInputError, match="in use"), run_lock(tmp_path):
        pass
    third.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["open", "flock", "pwrite"])
def test_an_interrupt_as_it_is_taken_leaves_nothing(tmp_path, monkeypatch, call):
    module = fcntl if call == "flock" else os
    real = getattr(module, call)

    def interrupted(*given):
        monkeypatch.setattr(module, call, real)
        real(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, call, interrupted)
    with pytest.raises(KeyboardInterrupt), run_lock(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_link_in_its_place_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("old")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(BadInputError, match=f"cannot write in {tmp_path}"), run_lock(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "old"


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    expected = pytest.warns(RuntimeWarning, match=r"cannot be locked \(No locks available\): let no other")
    with expected as told, run_lock(tmp_path):
        pass
    assert told[0].filename == __file__


def test_a_full_disk_does_not_keep_it_from_being_held(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        patch.setattr(locks, "_PAUSE", 0)
        with run_lock(tmp_path), pytest.raises(BadInputError, match="another process"), run_lock(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_what_another_user_left_is_replaced(tmp_path, monkeypatch):
    """As for those who are no administrators; these may open everything."""
    path = tmp_path / ".lock"
    path.write_text('{"pid": 1}')
    real = os.open

    def opened(name, flags, *mode):
        if name == path and flags & os.O_RDWR and path.exists() and path.read_text() == '{"pid": 1}':
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(name, flags, *mode)

    monkeypatch.setattr(os, "open", opened)
    with run_lock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_system_without_locks_holds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HAS_LOCKS", False)
    with warnings.catch_warnings(), run_lock(tmp_path), file_lock(tmp_path / "file"):
        refuse_held(tmp_path)
        assert not list(tmp_path.iterdir())
