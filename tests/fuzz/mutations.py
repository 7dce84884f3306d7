"""Changes to files that know nothing of torch: of bytes, of lines, of JSON and TOML. Each is a function of (content, random).

A mutation gives the changed bytes. Whether the change may be seen is told by its name: of `EXACT`, whatever is accepted
must be what the unchanged file says.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

#: Values that no reader should trip over, as JSON text.
HOSTILE = (
    "null", "true", "[]", "{}", '""', "0", "-1", "1.5", "NaN", "Infinity", "-Infinity", "1e999", "-0.0",
    "9223372036854775808", "18446744073709551616", "1" + "0" * 400, "7" * 5000, "4294967295", "1e308", "5e-324",
    '"\\ud800"', '"\\u0000"', '"\\u001b[31mred\\u001b[0m"', '"\\u009b2J"', '"../../../canary/escaped"',
    '"/tmp/absolute"', '"<script>alert(1)</script>"', '"=cmd|\' /C calc\'!A0"', '"::error::owned\\n::set-env name=x::y"',
    '"' + "x" * 100_000 + '"', "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000,
    "[" + "0," * 50_000 + "0]", '"$\\\\frac{1$"', '"a\\nb"', '"\\u202egpj.exe"', '"[bold red]markup[/]"', '"hf:../x"', '"nan"',
)  # fmt: skip


def _flip(content: bytes, rng: random.Random, bits: int) -> bytes:
    changed = bytearray(content)
    for _ in range(bits if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + int(2 ** rng.uniform(0, 12)))


def flip_a_bit(content: bytes, rng: random.Random) -> bytes:
    return _flip(content, rng, 1)


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    return _flip(content, rng, rng.randrange(2, 40))


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[
        : rng.choice([rng.randrange(len(content) + 1), rng.randrange(min(64, len(content)) + 1), -1])
    ]


def delete(content: bytes, rng: random.Random) -> bytes:
    start, end = _cut(content, rng)
    return content[:start] + content[end:]


def duplicate(content: bytes, rng: random.Random) -> bytes:
    start, end = _cut(content, rng)
    return content[:end] + content[start:end] * rng.randrange(1, 4) + content[end:]


def overwrite(content: bytes, rng: random.Random) -> bytes:
    start, end = _cut(content, rng)
    fill = rng.choice([b"\x00", b"\xff", b"\x7f", None])
    return (
        content[:start]
        + (rng.randbytes(end - start) if fill is None else fill * (end - start))
        + content[end:]
    )


def splice(content: bytes, rng: random.Random) -> bytes:
    (a, b), (c, d) = _cut(content, rng), _cut(content, rng)
    return content[:a] + content[c:d] + content[b:]


def insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    what = [
        b"\x00",
        b"\xef\xbb\xbf",
        b"\r\n",
        b"\xe2\x80\xa8",
        b"\xff\xfe",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"{",
        b'"',
        rng.randbytes(9),
    ]
    return content[:at] + rng.choice(what) + content[at:]


def append(content: bytes, rng: random.Random) -> bytes:
    return content + rng.choice(
        [b"\x00" * 64, b"PK\x05\x06" + b"\x00" * 18, b"\n", b"{}", content, rng.randbytes(30)]
    )


def replace_all(content: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        [
            b"",
            b"\x00" * 4096,
            rng.randbytes(500),
            b"PK\x03\x04",
            b"\x80\x02}.",
            b"[" * 10_000,
            b'{"a":' * 9000,
        ]
    )


BYTES: dict[str, Mutation] = {
    f.__name__: f
    for f in (
        flip_a_bit,
        flip_bits,
        truncate,
        delete,
        duplicate,
        overwrite,
        splice,
        insert,
        append,
        replace_all,
    )
}
EXACT = frozenset(BYTES)


def encode_otherwise(content: bytes, rng: random.Random) -> bytes:
    text = content.decode("utf-8", "replace")
    kinds = ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp500", "utf-7")
    return text.encode(rng.choice(kinds), "replace")


def change_line_ends(content: bytes, rng: random.Random) -> bytes:
    return content.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b"\x0b", b"\xe2\x80\xa8", b"\x00\n"]))


def move_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    how = rng.randrange(4)
    if how == 0:
        lines[i], lines[j] = lines[j], lines[i]
    elif how == 1:
        lines.insert(i, lines[j])
    elif how == 2:
        del lines[i]
    else:
        lines = lines[:i] + [lines[j]] * rng.randrange(2, 200) + lines[i:]
    return b"\n".join(lines)


def hostile_number(content: bytes, rng: random.Random) -> bytes:
    """Any number in the text by another value."""
    found = list(re.finditer(rb"-?\d+(?:\.\d+)?(?:e-?\d+)?", content))
    if not found:
        return insert(content, rng)
    match = rng.choice(found)
    return content[: match.start()] + rng.choice(HOSTILE).encode() + content[match.end() :]


def hostile_string(content: bytes, rng: random.Random) -> bytes:
    """Any quoted text by another value."""
    found = list(re.finditer(rb'"(?:[^"\\]|\\.)*"', content))
    if not found:
        return insert(content, rng)
    match = rng.choice(found)
    return content[: match.start()] + rng.choice(HOSTILE).encode() + content[match.end() :]


TEXT: dict[str, Mutation] = {
    f.__name__: f for f in (encode_otherwise, change_line_ends, move_lines, hostile_number, hostile_string)
}

_MARK = "@@hostile@@"


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of plain data."""
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        here = stack.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        for key in keys:
            found.append((here, key))
            stack.append(here[key])
    return found


def change_data(document: Any, rng: random.Random) -> tuple[Any, str]:
    """Plain data with one place changed; the second is JSON text to stand where the first holds a mark."""
    document = json.loads(json.dumps(document))
    everywhere = places(document)
    if not everywhere:
        return _MARK, rng.choice(HOSTILE)
    holder, key = rng.choice(everywhere)
    other, at = rng.choice(everywhere)
    text = rng.choice(HOSTILE)
    how = rng.randrange(9)
    if how <= 3:
        holder[key] = _MARK
    elif how == 4:
        del holder[key]
    elif how == 5:
        holder[key] = json.loads(json.dumps(other[at]))
    elif how == 6 and isinstance(holder, dict):
        holder[rng.choice([f"{key}x", "", "__class__", "format", "\x00", "a.b", key.upper()])] = holder.pop(
            key
        )
    elif how == 7 and isinstance(holder, list):
        holder.extend([json.loads(json.dumps(holder[key]))] * rng.randrange(1, 300))
    elif isinstance(holder, dict):
        holder[rng.choice(["surplus", "__init__", "../x", "k" * 5000])] = _MARK
    else:
        holder[key] = {"in": holder[key]}
    return document, text


def change_json(content: bytes, rng: random.Random) -> bytes:
    changed, text = change_data(json.loads(content), rng)
    return json.dumps(changed, indent=rng.choice([None, 1])).replace(json.dumps(_MARK), text).encode()


def repeat_a_key(content: bytes, rng: random.Random) -> bytes:
    """A key of some object a second time, with another value: valid JSON for many readers."""
    found = list(re.finditer(rb'"(?:[^"\\]|\\.)*"\s*:', content))
    if not found:
        return insert(content, rng)
    match = rng.choice(found)
    return (
        content[: match.start()]
        + match[0]
        + b" "
        + rng.choice(HOSTILE).encode()
        + b", "
        + content[match.start() :]
    )


JSON: dict[str, Mutation] = {**TEXT, "change_json": change_json, "repeat_a_key": repeat_a_key}


def change_json_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    try:
        lines[at] = change_json(lines[at], rng).replace(b"\n", b" ")
    except ValueError:
        lines[at] = rng.choice(HOSTILE).encode()
    return b"\n".join(lines)


LINES: dict[str, Mutation] = {**TEXT, "change_json_line": change_json_line, "repeat_a_key": repeat_a_key}


def hostile_toml(content: bytes, rng: random.Random) -> bytes:
    lines = content.decode().split("\n")
    extra = (
        "[model]", "[[points]]", "a.b.c.d = 1", "x = 1979-05-27T07:32:00Z", "x = 0xFFFFFFFFFFFFFFFFFFFFFF", "x = inf",
        'build = "os:system"', 'build = "builtins:exec"', 'build = "subprocess:run"', 'arguments = { command = "touch canary" }',
        "period = 9223372036854775807", "context = 9223372036854775807", "vocab_size = 0", ".".join(["a"] * 3000) + " = 1",
        "x = " + "[" * 3000 + "]" * 3000, "x = " + "{a=" * 2000 + "1" + "}" * 2000, "x = " + "9" * 5000, 'x = "\\ud800"',
        'initial = "../../canary/secret"', 'checkpoints = "../../**/*"', "'' = 1", '"{layer}{layer}" = "a"', 'strip = "a"',
        '"blocks.{layer}.x" = { module = "1", value = "output.__class__.__init__.__globals__" }', 'tokens = "self"',
        'build = "torch:load"', 'build = "json:loads"', 'build = "antigravity:x"', 'build = "os.path:join"', 'build = ":"',
    )  # fmt: skip
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(extra))
    if rng.random() < 0.5:
        del lines[rng.randrange(len(lines))]
    return "\n".join(lines).encode("utf-8", "replace")


TOML: dict[str, Mutation] = {**TEXT, "hostile_toml": hostile_toml}


def hostile_cell(content: bytes, rng: random.Random) -> bytes:
    lines = content.decode().split("\n")
    at = rng.randrange(len(lines))
    cells = lines[at].split(",")
    cells[rng.randrange(len(cells))] = rng.choice([*HOSTILE, '"unclosed', "a,b,c", "inf", "=1+1"])
    lines[at] = ",".join(cells)
    return "\n".join(lines).encode()


CSV: dict[str, Mutation] = {**TEXT, "hostile_cell": hostile_cell}
