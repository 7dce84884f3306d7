"""What a file may ask of torch beyond tensors and data: each refused by name, with nothing executed or allocated."""

import errno
import pickle
import re
import resource
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from hopeprobe.errors import BadInputError
from hopeprobe.torch_files import read_torch


@pytest.fixture
def path(tmp_path):
    return tmp_path / "stranger.pt"


def refused(path, *said):
    """One error that names the file, and no memory to speak of."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadInputError, match=re.escape(str(path))) as error:
        read_torch(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "KiB"
    for part in said:
        assert part in str(error.value)
    assert len(str(error.value)) < 1000


def repacked(path, change=lambda name, content: content, **given):
    """The archive again, its members changed, every checksum right."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", **given) as archive:
        for name, content in members:
            archive.writestr(name, change(name, content))


@pytest.mark.parametrize("old", [False, True])
def test_tensors_and_plain_data_come_back(path, old):
    content = {"a": torch.arange(6.0).view(2, 3).t(), "b": [1, 2.5, None, "x", (True, {3: b"y"})], "d": torch.float32,
               "s": torch.Size([2]), "half": torch.zeros(3, dtype=torch.bfloat16)}  # fmt: skip
    content["keys"] = {(1, ("a", 2.5)): {1, (2, None)}, None: Counter("aab"), b"y": OrderedDict({True: ()})}
    content["state"] = torch.nn.Linear(2, 2).state_dict()
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    found = read_torch(path)
    assert torch.equal(found["a"], content["a"])
    assert found["b"] == content["b"]
    assert found["keys"] == content["keys"]
    assert torch.equal(found["state"]["weight"], content["state"]["weight"])
    if not old:
        assert torch.equal(read_torch(path, mapped=True)["a"], content["a"])


class Calls:
    def __init__(self, function, *arguments):
        self.given = function, arguments

    def __reduce__(self):
        return self.given


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (Calls(bytearray, 1 << 40), "bytearray"),  # torch would make room for a terabyte
        (Calls(torch.Tensor, 1 << 36), "Tensor"),  # of what memory holds
        (Calls(print, "executed"), "print"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_calls(path, made, named, old, capsys):
    torch.save({"a": made}, path, _use_new_zipfile_serialization=not old)
    refused(path, "run code", named)
    assert "executed" not in capsys.readouterr().out


def test_lists_without_end(path):
    shared = ["ha"] * 10
    for _ in range(40):
        shared = [shared] * 10
    torch.save({"a": shared}, path)
    refused(path, "more than 2000000 values")
    looped = []
    looped.append(looped)
    torch.save(looped, path)
    refused(path, "deep in each other")


def doubled(levels, pair):
    """Pickled: one thing twice, that twice, and so on: of 60 levels, nobody comes to the end."""
    content = pair()
    for _ in range(levels):
        content = pair((content, content))
    return pickle.dumps(content, 2)[2:-1]


def text(said):
    return b"X" + struct.pack("<I", len(said)) + said


def storage(key, kind=None, more=b""):
    return (
        b"("
        + (kind or text(b"storage"))
        + b"ctorch\nFloatStorage\n"
        + key
        + text(b"cpu")
        + b"K\0"
        + more
        + b"tQ"
    )


def endless(levels):
    """Pickles that hash or print what is doubled, by where they do."""
    lists, tuples = doubled(levels, list), doubled(levels, tuple)
    ordered = b"ccollections\nOrderedDict\n"
    rebuild = b"ctorch._tensor\n_rebuild_from_type_v2\n(" + ordered * 2
    return {
        "a storage's key": storage(lists),
        "a storage's kind": storage(text(b"0"), lists),
        "the key of a view": storage(text(b"0"), more=b"(" + tuples + b"K\0K\0t"),
        "a dictionary's key": b"}" + tuples + b"Ns",
        "a deep key": b"})" + b"\x85" * 200_000 + b"Ns",  # of which a hash runs out of stack
        "a dictionary's second key": b"}(NN" + tuples + b"Nu",
        "the key of a whole dictionary": b"(" + tuples + b"Nd",
        "a set's member": b"\x8f(" + tuples + b"\x90",
        "a frozen set's member": b"(" + tuples + b"\x91",
        "what a set is made of": b"c__builtin__\nset\n](" + tuples + b"e\x85R",
        "what a set is made of by another call": rebuild.replace(ordered, b"c__builtin__\nset\n", 1)
        + b"](" + tuples + b"e\x85NtR",
        "what a new set is made of": b"ccollections\nCounter\n](" + tuples + b"e\x85\x81",
        "what a dictionary is made of": ordered + b"](" + tuples + b"N\x86e\x85R",
        "a dictionary's attributes": ordered + b")R](" + tuples + b"N\x86eb",
        "a state that is printed": rebuild + b")" + lists + b"\x85tR",
        "a printed state of dictionaries": ordered + b")Rq\0"
        + levels * (ordered + b")R(K\0h\0K\1h\0uq\0") + rebuild + b")h\0\x85tR",
    }  # fmt: skip


def test_a_storage_without_a_name(path):
    for given in (storage(b"]"), storage(b"K\1"), storage(text(b"0"), b"]")):
        torch.save({}, path)
        pickled = b"\x80\x02" + given + b"."
        repacked(path, lambda name, content, p=pickled: p if name.endswith("data.pkl") else content)
        refused(path, "a storage without a name")


def test_a_pickle_that_makes_a_storage_itself(path):
    """Of ten petabytes: torch would ask for them, and say that memory is short."""
    torch.save({}, path)
    asked = (10**16).to_bytes(8, "little")
    code = b"\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x08" + asked + b"\x85R."
    repacked(path, lambda name, content: code if name.endswith("data.pkl") else content)
    refused(path, "it makes room for a storage")


@pytest.mark.parametrize("old", [False, True])
def test_metadata_that_many_dictionaries_share(path, old):
    """As parts of one model's weights have it: it is no key and no argument of any."""
    whole = nn.Sequential(*(nn.Linear(1, 1) for _ in range(300))).state_dict()
    parts = []
    for _ in range(300):
        parts.append(OrderedDict((name, 0) for name in list(whole)[:3]))
        parts[-1]._metadata = whole._metadata
    torch.save(parts, path, _use_new_zipfile_serialization=not old)
    assert read_torch(path) == parts


def test_a_text_that_calls_copy_many_times(path):
    """40 kB encoded 200 times: 8 MB of a file of 46 kB. Encoded once, as torch does with bytes, it is read."""
    torch.save({}, path)
    encode, named = b"c_codecs\nencode\n", text(b"latin1") + b"\x86R"
    once = text(b"a" * 40_000) + b"q\0"
    for times, said in ((1, None), (200, "hold more than")):
        code = b"\x80\x02" + once + b"](" + (encode + b"h\0" + named) * times + b"e."
        repacked(path, lambda name, content, p=code: p if name.endswith("data.pkl") else content)
        if said is None:
            assert read_torch(path) == [b"a" * 40_000]
        else:
            refused(path, said)


def test_what_is_hashed_or_printed_without_end(tmp_path):
    """Each in a second of its own: the process is ended otherwise, for Python cannot leave a hash."""
    start = [pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    for levels in (40, 60):
        pickles = {name: b"\x80\x02" + code + b"." for name, code in endless(levels).items()}
        for name, pickled in pickles.items():
            with zipfile.ZipFile(tmp_path / f"{name}, {levels}", "w") as archive:
                archive.writestr("a/data.pkl", pickled)
                archive.writestr("a/version", "3\n")
                archive.writestr("a/data/0", b"")
            content = b"".join([*start, pickled, pickle.dumps(["0"], 2)])
            (tmp_path / f"{name}, {levels}, old").write_bytes(content)
        listed = b"\x80\x02](" + doubled(levels, list) + b"e."
        (tmp_path / f"the list of storages, {levels}").write_bytes(b"".join([*start, start[-1], listed]))
    done = run(
        "import signal",
        "for path in sorted(Path(sys.argv[1]).iterdir()):",
        "    print(path.name, end=': ', flush=True)",
        "    signal.setitimer(signal.ITIMER_PROF, 1)",
        "    said(path)",
        "    signal.setitimer(signal.ITIMER_PROF, 0)",
        argument=tmp_path,
    )
    assert len(done) == 2 * (2 * len(pickles) + 1)
    for line in done:
        assert "is damaged" in line
        assert "cut off" not in line, "refused by what torch raised"


def run(*lines, argument):
    """The lines that a process of its own prints, which has read a small file already."""
    small = argument.parent / "small.pt"
    torch.save({"a": torch.zeros(3)}, small)
    program = f"""
import sys
from pathlib import Path
from hopeprobe.errors import BadInputError
from hopeprobe.torch_files import read_torch

def said(path, **given):
    try:
        print("read", len(read_torch(path, **given)))
    except BadInputError as error:
        print(error)

said(Path({str(small)!r}))
"""
    command = [sys.executable, "-c", program + "\n".join(lines), str(argument)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-1000:]
    first, *others = done.stdout.splitlines()
    assert first == "read 1"
    return others


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"
        ),
        RuntimeError("unable to mmap 600001343 bytes from file <large.pt>: Cannot allocate memory (12)"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried"
        ),
    ],
)
def test_a_file_that_does_not_fit_is_not_called_damaged(path, monkeypatch, error):
    """What torch says; that it does is tested below."""
    torch.save({"a": torch.zeros(3)}, path)

    def full(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", full)
    refused(path, "does not fit into memory")


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="nothing says how much memory a process has"
)
def test_a_file_that_does_not_fit(tmp_path):
    paths = [tmp_path / "large.pt", tmp_path / "old.pt"]
    for path, new in zip(paths, (True, False), strict=True):
        torch.save({"a": torch.zeros(48 << 18)}, path, _use_new_zipfile_serialization=new)
    done = run(
        "import re, resource",
        "has = int(re.search(r'VmSize:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]) << 10",
        "_, hard = resource.getrlimit(resource.RLIMIT_AS)",
        "for limit in (has + (32 << 20), hard):",
        "    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))",
        "    for name in ('large.pt', 'old.pt'):",
        "        for mapped in (False, True):",
        "            said(Path(sys.argv[1], name), mapped=mapped)",
        argument=tmp_path,
    )
    full = [
        f"{path} does not fit into memory ({path.stat().st_size} bytes)" for path in paths for _ in range(2)
    ]
    assert done == [*full, *["read 1"] * 4]


def test_a_tensor_larger_than_its_file(path):
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, path)
    refused(path, "a tensor of 1099511627776 numbers")
    torch.save({"a": torch.zeros(1).expand(64)}, path)
    assert read_torch(path)["a"].shape == (64,), "a constant may be"


def test_a_storage_that_says_it_is_larger(path):
    torch.save({"a": torch.zeros(4)}, path)
    large = b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"t"
    repacked(path, lambda name, c: c.replace(b"cpuq\x06K\x04t", b"cpuq\x06" + large) if "pkl" in name else c)
    refused(path, "bytes, and there are 16")
    torch.save({"a": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    start, end = content.index(b"cpuq"), content.index(b"Nt", content.index(b"cpuq"))
    path.write_bytes(content[: start + 5] + large[:-1] + content[end:])
    refused(path, "bytes, and there are")


def test_tensors_that_are_none_or_more(path):
    attributed = OrderedDict(a=1)
    attributed.__dict__["note"] = "of a stranger"
    named = torch.zeros(2)
    named.note = "x"
    for content in (torch.zeros(3).to("meta"), torch.eye(3).to_sparse(), attributed, {"a": 1 << 600}):
        torch.save({"a": content}, path)
        refused(path)


def test_memos_and_texts_that_are_far_away(path):
    for pickled in (
        b"\x80\x04Nr\xff\xff\xff\x7f.",
        b"\x80\x04\x8d" + b"\xff" * 7 + b"\x0f.",
        b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    ):
        torch.save({}, path)
        repacked(path, lambda name, content, p=pickled: p if name.endswith("data.pkl") else content)
        try:
            assert read_torch(path) is None
        except BadInputError:
            refused(path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: repacked(p, compression=zipfile.ZIP_DEFLATED), "is compressed"),
        (lambda p: p.write_bytes(p.read_bytes() + b"PK"), ""),
        (lambda p: repacked(p, lambda n, c: c[:-1] if "data/0" in n else c), "bytes, and there are 15"),
    ],
)
def test_archives_that_torch_does_not_write(path, spoil, said):
    torch.save({"a": torch.zeros(4)}, path)
    spoil(path)
    refused(path, "is damaged", said)


def test_members_twice_and_outside(path):
    for name in ("stranger/data/0", "../../escaped", "/tmp/escaped", "a\\b"):
        torch.save({"a": torch.zeros(4)}, path)
        with pytest.warns(UserWarning, match="Duplicate") if name.startswith("stranger") else _nothing(), \
                zipfile.ZipFile(path, "a") as archive:  # fmt: skip
            archive.writestr(name, b"x")
        refused(path, "is damaged")


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_members_that_share_their_bytes(path):
    """A directory of many members at one place: the bomb that grows with the square of its size."""
    torch.save({"a": torch.zeros(4096)}, path)
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    count, size, start = struct.unpack("<HII", content[end + 10 : end + 20])
    directory = content[start : start + size]
    at = content.index(b"/data/0", start) - len("stranger") - 46
    entry = content[at : content.index(b"PK\x01\x02", at + 4)]
    more = b"".join(entry.replace(b"data/0", f"data/{i}".encode()) for i in range(1, 9))
    path.write_bytes(
        content[:start] + directory + more + content[end : end + 8]
        + struct.pack("<HHII", count + 8, count + 8, size + len(more), start) + content[end + 20 :]
    )  # fmt: skip
    refused(path, "is damaged")


def test_a_pickle_alone_and_random_bytes(path):
    path.write_bytes(pickle.dumps({"a": Calls(print, "executed")}))
    refused(path, "run code")
    path.write_bytes(b"c" + bytes(1 << 20))
    refused(path, "is not a checkpoint")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/notes.txt", "no checkpoint")
    refused(path, "is damaged")
