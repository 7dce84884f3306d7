"""What a file may ask of torch beyond tensors and data: each refused by name, with nothing executed or allocated."""

import pickle
import re
import resource
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch

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
    content["state"] = torch.nn.Linear(2, 2).state_dict()
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    found = read_torch(path)
    assert torch.equal(found["a"], content["a"])
    assert found["b"] == content["b"]
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


def test_a_file_that_does_not_fit_is_not_called_damaged(path, monkeypatch):
    torch.save({"a": torch.zeros(3)}, path)

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", full)
    refused(path, "does not fit into memory")


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
