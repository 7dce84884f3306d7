"""Changed files of every kind: an error that names the file or a right answer, and what would be seen if it were not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from run import SEED, fuzz, summary  # noqa: E402


def outcomes(first, each):
    from documents import KINDS

    found = list(fuzz(list(KINDS), range(first, first + each), SEED))
    wrong = [
        f"{one['kind']} {one['index']} ({one['mutation']}): {one['detail']}"
        for one in found
        if one["outcome"] == "WRONG"
    ]
    assert not wrong, "\n\n".join(wrong)
    counts = summary(found, SEED)
    assert counts["mutations"] == each * len(KINDS)
    assert counts["outcomes"]["refused"] > each, "most kinds refuse"
    assert counts["outcomes"]["same answer"] > 0
    return counts


@pytest.mark.slow
def test_a_few_hundred():
    outcomes(0, 11)


@pytest.mark.slow  # a thousand files
def test_a_thousand():
    outcomes(1000, 60)


PLANTED = """
import json, os, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import documents
from kinds import Kind
from mutations import BYTES
from worker import Reader

def kind(use, **given):
    return Kind("a.bin", lambda _: b"whole" * 20, lambda path: use(path) if path.read_bytes() != b"whole" * 20 else "whole", BYTES, **given)

def fails(path): raise KeyError("traceback")
def unnamed(path):
    from hopeprobe.errors import BadInputError
    raise BadInputError("something is wrong")
def writes(path): Path("canary/escaped").write_text("x")
def starts(path): subprocess.run(["true"])
def hoards(path): bytearray(600 << 20)

documents.KINDS.update(fails=kind(fails), unnamed=kind(unnamed), writes=kind(writes), starts=kind(starts), hoards=kind(hoards),
                       accepts=kind(lambda path: "other", exact=True), differs=kind(lambda path: "other", agrees=lambda c, a: False),
                       fine=kind(lambda path: "other"))
reader = Reader(Path(sys.argv[2]), 8)
for name in ("fails", "unnamed", "writes", "starts", "hoards", "accepts", "differs", "fine"):
    print(json.dumps(reader.read(name, 0)))
"""


@pytest.mark.slow  # a process, and memory that is filled
def test_what_must_not_happen_would_be_seen(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PLANTED, str(HERE), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    found = {one["kind"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert len(found) == 8, done.stderr
    assert found["fine"]["outcome"] == "another answer"
    for name in ("fails", "unnamed", "writes", "starts", "accepts", "differs"):
        assert found[name]["outcome"] == "WRONG", name
    assert found["hoards"]["peak"] > 500 << 20


@pytest.mark.slow  # a process that loads torch
def test_a_reader_that_cannot_begin_says_why():
    with pytest.raises(RuntimeError, match=r"no whole file of the kind 'none'.*\n(.*\n)*KeyError: 'none'"):
        list(fuzz(["none"], [0]))
