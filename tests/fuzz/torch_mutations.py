"""Changes to checkpoints that are still archives, pickles and headers: the shapes, sizes and names that they declare."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import struct
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
from mutations import Mutation, change_data

CANARY = "canary/touched"  # below the working folder of whoever reads


class Planted:
    """Would make a file, whatever reads it."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def plant(rng: random.Random) -> Any:
    import os
    import subprocess

    touch = f"open({CANARY!r}, 'w').close()"
    chosen = [
        Planted(exec, touch), Planted(eval, touch), Planted(os.system, f"touch {CANARY}"), Planted(os.mkdir, CANARY),
        Planted(open, CANARY, "w"), Planted(subprocess.call, ["touch", CANARY]), Planted(getattr, torch, "load"),
        Planted(torch.load, CANARY), Planted(torch.zeros, 1 << 40), Planted(bytearray, 1 << 40), Planted(torch.Tensor, 1 << 36),
        Planted(Path, CANARY), torch.nn.Linear(2, 2),
    ]  # fmt: skip
    return rng.choice(chosen)


def _members(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def _archive(members: list[tuple[str, bytes]], **given: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", given.get("compression", zipfile.ZIP_STORED)) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = given.get("compression", zipfile.ZIP_STORED)
            info.external_attr = given.get("external_attr", 0)
            archive.writestr(info, content)
    return file.getvalue()


def change_members(content: bytes, rng: random.Random) -> bytes:
    import warnings

    members = _members(content)
    at, other = rng.randrange(len(members)), rng.randrange(len(members))
    name, inside = members[at]
    how = rng.randrange(10)
    given: dict[str, Any] = {}
    if how == 0:
        del members[at]
    elif how == 1:
        members.append((name, members[other][1]))
    elif how == 2:
        members[at] = (
            rng.choice(
                ["../../canary/escaped", "/tmp/absolute", "a\\b", "", "x/../../y", name + "/", name.upper()]
            ),
            inside,
        )
    elif how == 3:
        given["compression"] = zipfile.ZIP_DEFLATED
    elif how == 4:
        members.append((f"{name.partition('/')[0]}/data/bomb", bytes(100 << 20)))
        given["compression"] = zipfile.ZIP_DEFLATED
    elif how == 5:
        members[at] = (name, members[other][1])
    elif how == 6:
        given["external_attr"] = rng.choice([0o120777 << 16, 0x10, 0xFFFFFFFF])  # a symlink, a folder
    elif how == 7:
        members[at] = (name, inside[: rng.randrange(len(inside) + 1)])
    elif how == 8:
        members[at] = (name, inside + rng.randbytes(rng.randrange(1, 5000)))
    else:
        rng.shuffle(members)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        return _archive(members, **given)


def change_pickle(content: bytes, rng: random.Random) -> bytes:
    """Numbers, names and opcodes of the pickle, under a checksum that holds."""
    members = _members(content)
    at = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    members[at] = (members[at][0], changed_pickle(members[at][1], rng))
    return _archive(members)


def changed_pickle(inside: bytes, rng: random.Random) -> bytes:
    how = rng.randrange(8)
    numbers = list(re.finditer(rb"K.|M..|J....", inside, re.DOTALL))
    if how <= 2 and numbers:  # sizes, strides, offsets, counts
        match = rng.choice(numbers)
        value = rng.choice([b"K\x00", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x0f",
                            b"N", b"\x88", b"G" + struct.pack(">d", float("nan"))])  # fmt: skip
        return inside[: match.start()] + value + inside[match.end() :]
    if how == 3:
        swaps = [(b"FloatStorage", b"DoubleStorage"), (b"FloatStorage", b"ByteStorage"), (b"_rebuild_tensor_v2", b"_rebuild_parameter"),
                 (b"OrderedDict", b"Counter"), (b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_meta_tensor_no_storage"),
                 (b"torch\nFloatStorage", b"os\nsystem"), (b"collections\nOrderedDict", b"builtins\nbytearray"),
                 (b"collections\nOrderedDict", b"torch\nTensor")]  # fmt: skip
        return inside.replace(*rng.choice(swaps))
    if how == 4:
        return inside.replace(
            b"X\x03\x00\x00\x00cpu",
            rng.choice([b"X\x04\x00\x00\x00meta", b"X\x06\x00\x00\x00cuda:0", b"X\x02\x00\x00\x00\xff\xfe"]),
        )
    if how == 5:  # a memo far away, a frame and a text without end
        return (
            b"\x80\x04"
            + rng.choice(
                [
                    b"r\xff\xff\xff\x7f",
                    b"\x95" + b"\xff" * 8,
                    b"\x8d" + b"\xff" * 7 + b"\x0f",
                    b"B\xff\xff\xff\x7f",
                ]
            )
            + inside[2:]
        )
    if how == 6:
        depth = rng.choice([100, 100_000])
        return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."
    changed = bytearray(inside)
    for _ in range(rng.randrange(1, 6)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _laughs(rng: random.Random) -> Any:
    found: Any = ["ha"] * 10
    for _ in range(rng.choice([3, 30, 60])):
        found = [found] * 10
    return found


def hostile_value(like: Any, rng: random.Random) -> Any:
    tensor = torch.zeros(3)
    attributed = OrderedDict(a=1)
    attributed.__dict__["note"] = "of a stranger"
    looped: list[Any] = []
    looped.append(looped)
    chosen = [
        None, True, -1, 0, 3.5, float("nan"), float("inf"), 1 << 62, 1 << 600, "", "x" * 100_000, "\x1b[31m", "../../x", b"bytes", [], {},
        {"a": looped}, _laughs(rng), tensor, tensor.to(torch.float16), tensor.int(), torch.zeros(1).expand(1 << 40), attributed,
        torch.nn.Parameter(tensor), Counter(a=1), {1: 2}, {(1, 2): 3}, set(), complex(1, 2), torch.float32, torch.Size([1 << 50]), plant(rng),
    ]  # fmt: skip
    if isinstance(like, torch.Tensor):
        chosen += [like.double(), like.half(), like[..., :1], like[None], like * float("nan"), like.to_sparse(), like.to("meta"),
                   like.flatten()[:1].expand(like.shape), like.t() if like.ndim == 2 else like, like.to(torch.complex64)]  # fmt: skip
    return rng.choice(chosen)


def change_content(content: bytes, rng: random.Random) -> bytes:
    """What a checkpoint holds, changed anywhere and saved again: every checksum holds."""
    import copy
    import warnings

    loaded = torch.load(io.BytesIO(content), weights_only=True)
    loaded = copy.deepcopy(loaded)
    everywhere: list[tuple[Any, Any]] = []
    stack = [loaded]
    while stack:
        here = stack.pop()
        for key in (
            list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        ):
            everywhere.append((here, key))
            stack.append(here[key])
    tops = [pair for pair in everywhere if pair[0] is loaded]
    holder, key = rng.choice(rng.choice([everywhere, tops]))
    how = rng.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice(["surplus", 3, None, "k" * 9000, "\x1b[2J"])] = hostile_value(holder[key], rng)
    elif how == 2 and isinstance(holder, dict):
        holder[f"module.{key}"] = holder.pop(key)
    else:
        holder[key] = hostile_value(holder[key], rng)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = not zipfile.is_zipfile(io.BytesIO(content))
        torch.save(loaded, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def plain_pickle(content: bytes, rng: random.Random) -> bytes:
    return pickle.dumps({"format": "hopeprobe-hope", "version": 1, "config": plant(rng)}, rng.randrange(6))


CHECKPOINT: dict[str, Mutation] = {
    f.__name__: f for f in (change_members, change_pickle, change_content, plain_pickle)
}


def change_old_pickle(content: bytes, rng: random.Random) -> bytes:
    """The pickles of torch's old format are not under a checksum."""
    start = rng.randrange(min(2000, len(content)))
    return (
        content[:start] + changed_pickle(content[start:], rng)
        if rng.random() < 0.3
        else changed_pickle(content, rng)
    )


OLD: dict[str, Mutation] = {f.__name__: f for f in (change_old_pickle, change_content, plain_pickle)}


def _header(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def change_header(content: bytes, rng: random.Random) -> bytes:
    header, data = _header(content)
    changed, text = change_data(header, rng)
    written = json.dumps(changed).replace('"@@hostile@@"', text).encode()
    length = rng.choice([len(written)] * 5 + [0, 1 << 40, (1 << 64) - 1, len(written) + 8])
    return length.to_bytes(8, "little") + written + data


def change_metadata(content: bytes, rng: random.Random) -> bytes:
    """What the metadata say of the checkpoint, under a digest that holds."""
    from safetensors.torch import load

    from hopeprobe.safetensors_files import as_bytes

    header, _ = _header(content)
    told = {k: v for k, v in header["__metadata__"].items() if "sha256" not in k}
    changed, text = change_data(json.loads(told["checkpoint"]), rng)
    told["checkpoint"] = json.dumps(changed).replace('"@@hostile@@"', text)
    return as_bytes(load(content), told)


SAFETENSORS: dict[str, Mutation] = {f.__name__: f for f in (change_header, change_metadata)}
