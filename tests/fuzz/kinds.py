"""The kinds of file that hopeprobe reads: a whole one, how it is read and used, and what an answer must agree with.

`use` reads a file as a command would and goes on with what it holds; its answer is plain and can be compared. `agrees` is
asked where a changed file was accepted: by a reader of its own, does the file say that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mutations import Mutation, change_data

import hopeprobe
from hopeprobe.errors import BadInputError
from hopeprobe.exporting import export_weights
from hopeprobe.model.checkpoint import Checkpoint, read, save
from hopeprobe.model.config import CMSLevel, ModelConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.init import digest
from hopeprobe.model.optimizer import make_optimizer
from hopeprobe.model.resuming import restore
from hopeprobe.model.train_config import TrainConfig
from hopeprobe.nulls import NullCache, _decode, _digest
from hopeprobe.subject import MissingCapability
from hopeprobe.tokens import load_tokens

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = ModelConfig(
    vocab_size=37, dim=8, layers=2, context=16, heads=2, cms_levels=(CMSLevel("fast", 4), CMSLevel("slow", 8))
)
TOKENS = torch.arange(17)[None]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file. exact: its checksums see every change of bytes, so that what is accepted is what was written."""

    file: str  # where it lies, below the working folder
    make: Callable[[Path], bytes]
    use: Callable[[Path], Any]
    mutations: dict[str, Mutation]
    agrees: Callable[[bytes, Any], bool] | None = None
    exact: bool = False
    instead: tuple[Any, ...] = ()  # answers that say that the file was set aside
    resealed: tuple[str, ...] = ()  # mutations that make the checksum anew


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _checkpoint(full: bool = False) -> Checkpoint:
    model = HopeModel(CONFIG, 3)
    optimizer = make_optimizer(model, TrainConfig())
    if full:
        model(TOKENS).losses.sum().backward()
        optimizer.step()
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    first = digest(HopeModel(CONFIG, 3).state_dict().items())
    return Checkpoint(
        CONFIG, 3, 7, weights, first, "gpt2", {"name": "toy", "fingerprint": "00"}, {"steps": 9, "learning_rate": 0.1},
        optimizer.state_dict() if full else None, {"torch": torch.get_rng_state()} if full else None,
    )  # fmt: skip


def _saved(full: bool) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        save(folder / "made.pt", _checkpoint(full))
        return (folder / "made.pt").read_bytes()

    return make


def _told(values: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    config = dataclasses.replace(CONFIG) if values["config"] is None else values["config"]
    sums = {
        name: (
            str(w.dtype),
            tuple(w.shape),
            hashlib.sha256(w.detach().contiguous().numpy().tobytes()).hexdigest(),
        )
        for name, w in weights.items()
    }
    return repr(
        [
            config,
            values["seed"],
            values["step"],
            values["tokenizer"],
            values["init_digest"],
            sorted(sums.items()),
        ]
    )


def use_checkpoint(path: Path) -> Any:
    found = read(path)
    subject = hopeprobe.load(path)
    assert found is not None
    subject.run(TOKENS[:, :9])
    for made in (
        subject.own_init,
        subject.portable,
        subject.parameter_groups,
        subject.training,
        subject.identity,
    ):
        try:
            made()
        except MissingCapability:  # which is said, and no error
            continue
    export_weights(subject, "out/weights.safetensors")
    return _told(dataclasses.asdict(found) | {"config": found.config}, found.weights)


def _agrees_with_torch(content: bytes, answer: Any) -> bool:
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    weights = loaded["weights"]
    while any(all(k.startswith(p) for k in weights) for p in ("module.", "_orig_mod.")):
        weights = {k.partition(".")[2]: v for k, v in weights.items()}
    config = {
        k: tuple(CMSLevel(**lv) for lv in v) if k == "cms_levels" else v for k, v in loaded["config"].items()
    }
    config["gate"] = type(CONFIG.gate)(**config["gate"]) if "gate" in config else CONFIG.gate
    return bool(answer == _told({**loaded, "config": ModelConfig(**config)}, weights))


def use_resumed(path: Path) -> Any:
    found = read(path)
    if found is None or found.optimizer is None:
        return "nothing to resume"
    model = found.to_model()
    optimizer = make_optimizer(model, TrainConfig())
    try:
        restore(found, optimizer)
    except BadInputError as error:  # as `resumed` says it
        raise BadInputError(f"{path}: {error}") from None
    model(TOKENS).losses.sum().backward()
    optimizer.step()
    moments = [
        {k: hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest() for k, v in state.items()}
        for state in found.optimizer["state"].values()
    ]
    return repr((_told(dataclasses.asdict(found) | {"config": found.config}, found.weights), moments))


MAP = """\
[model]
build = "torch.nn:Linear"
arguments = { in_features = 4, out_features = 3 }
tokenizer = "gpt2"
context = 16
vocab_size = 3
steps = 60

[points]
"blocks.{layer}.hook_resid_post" = "layers.{layer}"
"blocks.{layer}.cms.fast.hook_delta" = { module = "layers.{layer}.fast", value = "output - input.0" }
"blocks.{layer}.titans.hook_step" = { module = "layers.{layer}.step", editable = true }

[memory.titans]
period = 16
decay = "zero"
[memory.titans.freeze]
"blocks.{layer}.titans.hook_step" = -inf
[memory.titans.fast]
w1 = { module = "layers.{layer}.memory", value = "output.1.weights.w1", meta = "layers.{layer}.memory.w1" }

[groups]
"blocks.{layer}.titans" = "layers.{layer}.memory"
embed = ["token_embedding", "positions"]
"""


def use_state_dict(path: Path) -> Any:
    """Through a map, as far as the weights in the model: what follows reads no file."""
    from hopeprobe.mapping.files import built, read_content
    from hopeprobe.mapping.spec import Map

    content = read_content(path)
    plan = {"model": {"build": "torch.nn:Linear", "arguments": {"in_features": 4, "out_features": 3}}}
    inner, _ = built(Map.of(plan), content, path)
    return repr([(k, v.tolist()) for k, v in inner.state_dict().items()])


def _old(folder: Path) -> bytes:
    torch.manual_seed(0)
    file = io.BytesIO()
    torch.save(torch.nn.Linear(4, 3).state_dict(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def _agrees_with_torch_alone(content: bytes, answer: Any) -> bool:
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    order = ("weight", "bias")
    return bool(answer == repr([(k, loaded[k].float().tolist()) for k in order]))


def _exported(folder: Path) -> bytes:
    save(folder / "made.pt", _checkpoint())
    return export_weights(hopeprobe.load(folder / "made.pt"), folder / "made.safetensors").read_bytes()


def _agrees_with_header(content: bytes, answer: Any) -> bool:
    from safetensors.torch import load

    length = int.from_bytes(content[:8], "little")
    told = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["checkpoint"])
    levels = tuple(
        CMSLevel(**lv)
        for lv in told["config"].pop("cms_levels", [vars(lv) for lv in ModelConfig().cms_levels])
    )
    gate = type(CONFIG.gate)(**told["config"].pop("gate", {}))
    config = ModelConfig(**told["config"], cms_levels=levels, gate=gate)
    return bool(answer == _told({**told, "config": config}, load(content)))


# -- caches ------------------------------------------------------------------------------------------------------------

TEXT_LINES = "".join(
    json.dumps({"text": f"document {i}: " + "words and more words. " * (i % 5 + 1)}) + "\n" for i in range(60)
)


def _token_file(folder: Path) -> bytes:
    """The text beside it; its cache lies where `load_tokens` will look for it."""
    text = Path("text.jsonl")
    text.write_text(TEXT_LINES, encoding="utf-8")
    load_tokens(str(text), cache_dir="in")
    (found,) = Path("in").glob("*.tokens")
    content = found.read_bytes()
    found.unlink()
    Path("token-name").write_text(found.name)
    return content


def use_token_cache(path: Path) -> Any:
    target = path.with_name(Path("token-name").read_text())
    path.rename(target)
    try:
        found = load_tokens("text.jsonl", cache_dir="in")
        return repr(
            (found.fingerprint, found.tokens.tolist(), found.held_out.tolist(), found.offsets.tolist())
        )
    finally:
        target.unlink()


def change_footer(content: bytes, rng: random.Random) -> bytes:
    """The footer under a digest that holds."""
    _, length, magic = struct.unpack("<32sQ8s", content[-48:])
    body, footer = content[: -48 - length], json.loads(content[-48 - length : -48])
    changed, text = change_data(footer, rng)
    encoded = json.dumps(changed).replace('"@@hostile@@"', text).encode()
    return body + encoded + struct.pack("<32sQ8s", hashlib.sha256(encoded).digest(), len(encoded), magic)


def change_tables(content: bytes, rng: random.Random) -> bytes:
    """Tokens that are none, offsets that lead backwards, flags that are neither: under digests that hold."""
    _, length, magic = struct.unpack("<32sQ8s", content[-48:])
    footer = json.loads(content[-48 - length : -48])
    n, d = footer["n_tokens"], footer["n_documents"]
    tokens = np.frombuffer(content, "<u2", n, 8).copy()
    start = 8 + 2 * n + (-2 * n % 8)
    offsets = np.frombuffer(content, "<i8", d + 1, start).copy()
    held = np.frombuffer(content, "u1", d, start + 8 * (d + 1)).copy()
    how = rng.randrange(3)
    if how == 0:
        tokens[rng.randrange(n)] = 65535
    elif how == 1:
        offsets[rng.randrange(d + 1)] = rng.choice([-1, 0, 1 << 62, n + 5])
    else:
        held[rng.randrange(d)] = 7
    total = hashlib.sha256(tokens.tobytes() + offsets.tobytes() + footer["tokenizer"].encode())
    footer |= {
        "fingerprint": total.hexdigest(),
        "held_out_sha256": hashlib.sha256(held.tobytes()).hexdigest(),
    }
    encoded = json.dumps(footer, sort_keys=True).encode()
    body = content[:8] + tokens.tobytes() + bytes(-2 * n % 8) + offsets.tobytes() + held.tobytes()
    return body + encoded + struct.pack("<32sQ8s", hashlib.sha256(encoded).digest(), len(encoded), magic)


NULL_KEY = {"probe": "toy", "origin": {"seed": 1}}
_ESTIMATE = {
    "value": 0.5, "ci_low": 0.4, "ci_high": 0.6, "se": 0.05, "df": math.inf, "n_groups": 64, "n": 100, "plug_in": 0.5,
    "influence": [0.0] * 64, "weights": [1 / 64] * 64, "exact": False,
}  # fmt: skip


def _null_file(folder: Path) -> bytes:
    cache = NullCache(folder)
    cache.save(
        NULL_KEY, [["live", ["loss", 0, "", ""], _ESTIMATE], ["live", ["norm", None, "x", ""], math.nan]]
    )
    path = cache.path(NULL_KEY)
    assert path is not None
    return path.read_bytes()


def use_null_cache(path: Path) -> Any:
    cache = NullCache("in")
    target = cache.path(NULL_KEY)
    assert target is not None
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    try:
        return repr(_decode(cache.load(NULL_KEY)))  # None: it is computed again
    finally:
        target.unlink()
        target.parent.rmdir()


def change_payload(content: bytes, rng: random.Random) -> bytes:
    """The numbers under a digest that holds."""
    changed, text = change_data(json.loads(content)["payload"], rng)
    try:
        payload = json.loads(json.dumps(changed).replace('"@@hostile@@"', text))
        return json.dumps(
            {"payload": payload, "sha256": _digest({"key": NULL_KEY, "payload": payload})}
        ).encode()
    except (ValueError, RecursionError):
        return content
