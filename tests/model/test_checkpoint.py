"""Checkpoints: what was saved comes back, what cannot be trusted is refused by name, nothing half-written stays."""

import contextlib
import dataclasses
import errno
import os
import pickle
import re
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_toys import CONFIGS, TOY

import hopeprobe
from hopeprobe.errors import BadInputError
from hopeprobe.model import checkpoint as module
from hopeprobe.model.checkpoint import (
    Checkpoint,
    initial_model,
    read,
    run_checkpoints,
    save,
    step_path,
)
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.init import digest

KINDS = {
    "full": TOY,
    "transformer": dataclasses.replace(TOY, variant="transformer"),
    "published": CONFIGS["published"],
}


def checkpoint_of(config=TOY, dtype=torch.float32, **values):
    model = HopeModel(config, 3, dtype)
    weights = dict(model.state_dict())
    defaults = {
        "seed": 3, "step": 7, "weights": weights, "init_digest": digest(weights.items()), "tokenizer": "gpt2",
        "data": {"name": "toy", "fingerprint": "00"}, "train": {"steps": 9, "learning_rate": 0.1},
    }  # fmt: skip
    return Checkpoint(config=config, **(defaults | values))


def saved(tmp_path, **changes):
    """A checkpoint file whose plain content was changed; a value of None drops the key."""
    path = tmp_path / "step-000007.pt"
    save(path, checkpoint_of())
    if changes:
        content = torch.load(path, weights_only=True) | changes
        torch.save(
            {k: v for k, v in content.items() if v is not None or k in ("optimizer", "generators")}, path
        )
    return path


def refused(path, *parts):
    """Both ways to open it give one error that names the file; its message."""
    with pytest.raises(BadInputError, match=re.escape(str(path))) as caught:
        read(path)
    with pytest.raises(BadInputError, match=re.escape(str(path))):
        hopeprobe.load(path)
    message = str(caught.value)
    for part in parts:
        assert part in message
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path, kind, dtype):
    before = checkpoint_of(
        KINDS[kind], dtype, optimizer={"state": {0: {"step": torch.tensor(3.0)}}},
        generators={"torch": torch.get_rng_state()},
    )  # fmt: skip
    save(tmp_path / "a.pt", before)
    after = read(tmp_path / "a.pt")
    for field in dataclasses.fields(Checkpoint):
        if field.name not in ("weights", "optimizer", "generators"):
            assert getattr(after, field.name) == getattr(before, field.name)
    assert torch.equal(after.optimizer["state"][0]["step"], torch.tensor(3.0))
    assert torch.equal(after.generators["torch"], before.generators["torch"])
    model = after.to_model()
    assert model.embed.dtype == dtype
    assert model.seed == 3
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before.weights[name])
    tokens = torch.arange(17)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).losses, HopeModel(KINDS[kind], 3, dtype)(tokens).losses)


def test_what_is_saved_is_a_copy(tmp_path):
    before = checkpoint_of()
    save(tmp_path / "a.pt", before)
    before.weights["embed"].zero_()
    assert read(tmp_path / "a.pt").weights["embed"].any()


def test_only_the_file_is_left_and_others_may_read_it(tmp_path):
    save(tmp_path / "new" / "a.pt", checkpoint_of())
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.pt"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "new" / "a.pt").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("whole"))  # a path: hypothesis shows what it is given


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_off(tmp_path_factory, whole, share):
    path = tmp_path_factory.getbasetemp() / "cut.pt"
    content = whole.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "damaged" if path.stat().st_size else "is empty (0 bytes)")


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 60, -1])
def test_a_file_that_was_cut_off_there(tmp_path, size):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    refused(path, "earlier checkpoint" if size == 0 else "another checkpoint")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BadInputError, match=r"nowhere\.pt"):
        read(tmp_path / "nowhere.pt")
    with pytest.raises(BadInputError, match=r"nowhere\.pt does not exist"):
        hopeprobe.load(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("old_format", [False, True])
def test_a_plain_state_dict_is_of_another_kind(tmp_path, old_format):
    path = tmp_path / "foreign.pt"
    torch.save(torch.nn.Linear(3, 2).state_dict(), path, _use_new_zipfile_serialization=not old_format)
    assert read(path) is None
    with pytest.raises(
        BadInputError,
        match=r"foreign\.pt is not a checkpoint that can be read \(known kinds: hope\): other models join by a map",
    ):
        hopeprobe.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"To be, or not to be\n" * 9, b"# A heading\n\nand text\n", b"config: here\nlines: two\n", b'{"dim": 8}',
        b"a,b\n1,2\n", bytes(300), bytes(range(256)), b"\x89PNG\r\n\x1a\n",
    ],
)  # fmt: skip
def test_a_file_that_is_no_torch_file_is_not_called_a_dangerous_one(tmp_path, content):
    path = tmp_path / "notes.pt"
    path.write_bytes(content)
    assert "code" not in refused(path, "is not a checkpoint")


class Planted:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["archive", "old format", "pickle 2", "pickle 5", "module"])
def test_code_in_a_file_is_refused_and_not_executed(tmp_path, how):
    path, trace = tmp_path / "planted.pt", tmp_path / "executed"
    content = {"format": module.FORMAT, "version": 1, "config": Planted(trace)}
    if how.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, int(how[-1])))
    elif how == "module":
        torch.save(torch.nn.Linear(2, 2), path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "archive")
    refused(path, "run code", "nothing was executed")
    assert not trace.exists()
    if how != "module":  # the trap is a real one
        with path.open("rb") as file:
            torch.load(file, weights_only=False) if not how.startswith("pickle") else pickle.load(file)
        assert trace.exists()


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1, exclude_max=True) | st.floats(0.9, 1, exclude_max=True), st.integers(0, 7))
def test_a_changed_bit_is_seen_or_is_harmless(tmp_path_factory, whole, share, bit):
    """Weights, pickle, headers, directory: one error that names the file, or (in padding) the same content."""
    path = tmp_path_factory.getbasetemp() / "flipped.pt"
    content = bytearray(whole.read_bytes())
    content[int(share * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with contextlib.suppress(BadInputError):
        got, expected = read(path), checkpoint_of()
        assert got.config == expected.config
        assert all(torch.equal(got.weights[k], v) for k, v in expected.weights.items())
        return
    refused(path)


def test_a_member_marked_as_a_folder(tmp_path):
    """Every checksum holds, and torch would take whatever lies in memory for these weights."""
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = content.find(b"archive/data/3", archive.start_dir)
    content[at - 46 + 38] |= 0x10
    path.write_bytes(content)
    refused(path, "damaged", "marked as a folder")


def test_a_changed_weight_is_seen(tmp_path):
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    at = content.find(HopeModel(TOY, 3).embed.detach().numpy().tobytes())
    assert at > 0
    content[at] ^= 1  # by the least significant bit
    path.write_bytes(content)
    refused(path, "damaged", "checksum")


def test_an_unknown_configuration_key_offers_its_neighbour(tmp_path):
    path = saved(tmp_path, config=TOY.to_dict() | {"chunk_memry": 8})
    refused(path, "unknown key 'chunk_memry' in ModelConfig", "did you mean 'chunk_memory'")


@pytest.mark.parametrize("config", [5, "tiny", [1], {"dim": "8"}, {"dim": 7.5}, {"cms_levels": [3]}])
def test_a_configuration_that_is_none(tmp_path, config):
    refused(saved(tmp_path, config=config))


def test_a_newer_version(tmp_path):
    refused(saved(tmp_path, version=2), "version 2", "update hopeprobe")


def test_fields_that_are_missing_or_unknown(tmp_path):
    refused(saved(tmp_path, seed=None), "missing seed")
    refused(saved(tmp_path, optimiser={}), "unexpected 'optimiser'", "did you mean 'optimizer'")


def weights_file(tmp_path, change):
    weights = dict(checkpoint_of().weights)
    change(weights)
    return saved(tmp_path, weights=weights)


def test_a_missing_weight(tmp_path):
    path = weights_file(tmp_path, lambda w: w.pop("blocks.1.cms.mix_bias"))
    refused(path, "missing weights: blocks.1.cms.mix_bias")


def test_an_unexpected_weight(tmp_path):
    path = weights_file(tmp_path, lambda w: w.update({"blocks.0.cms.mix_biass": torch.zeros(2)}))
    refused(path, "unexpected weights: blocks.0.cms.mix_biass", "did you mean 'blocks.0.cms.mix_bias'")


def test_a_renamed_weight_is_one_error_with_both_names(tmp_path):
    path = weights_file(tmp_path, lambda w: w.update({"embedding": w.pop("embed")}))
    refused(path, "missing weights: embed;", "unexpected weights: embedding; did you mean 'embed'")


def test_a_reshaped_weight(tmp_path):
    path = weights_file(tmp_path, lambda w: w.update(embed=w["embed"][:-1]))
    refused(path, "embed has shape (36, 8), expected (37, 8)")


def test_weights_of_several_dtypes(tmp_path):
    path = weights_file(tmp_path, lambda w: w.update(embed=w["embed"].double()))
    refused(path, "several dtypes: torch.float32, torch.float64")


def test_weights_that_are_no_numbers(tmp_path):
    path = weights_file(tmp_path, lambda w: w.update(embed=w["embed"].long()))
    refused(path, "embed are not floating point")
    refused(saved(tmp_path, weights={}), "not a mapping from names to tensors")
    refused(saved(tmp_path, weights={"embed": 3}), "not a mapping from names to tensors")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_prefixes_are_understood(tmp_path, prefix):
    plain = checkpoint_of().weights
    path = saved(tmp_path, weights={prefix + k: v for k, v in plain.items()})
    got = read(path).weights
    assert list(got) == list(plain)
    assert all(torch.equal(got[k], plain[k]) for k in plain)


def test_a_compiled_models_own_state_dict(tmp_path):
    model = HopeModel(TOY, 3)
    wrapped = torch.compile(model, backend="eager").state_dict()
    assert all(k.startswith("_orig_mod.") for k in wrapped)
    got = read(saved(tmp_path, weights=dict(wrapped))).to_model().state_dict()
    assert all(torch.equal(got[k], v) for k, v in model.state_dict().items())


def test_a_prefix_on_some_keys_is_not_guessed_away(tmp_path):
    path = weights_file(tmp_path, lambda w: w.update({"module.embed": w.pop("embed")}))
    refused(path, "missing weights: embed;", "unexpected weights: module.embed")


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = saved(tmp_path)
    earlier = path.read_bytes()
    monkeypatch.setattr(os, call, failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(
        BadInputError, match=rf"cannot write {re.escape(str(path))} .*No space left on device"
    ):
        save(path, checkpoint_of(step=8))
    with pytest.raises(BadInputError, match=r"other\.pt"):
        save(tmp_path / "other.pt", checkpoint_of())
    monkeypatch.undo()
    assert path.read_bytes() == earlier
    assert list(tmp_path.iterdir()) == [path]
    assert read(path).step == 7


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch, error):
    path = saved(tmp_path)
    earlier = path.read_bytes()
    monkeypatch.setattr(os, "fsync", failing(error))
    with pytest.raises(error):
        save(path, checkpoint_of(step=8))
    assert path.read_bytes() == earlier
    assert list(tmp_path.iterdir()) == [path]


def test_the_initial_model_is_rebuilt_and_checked():
    model = HopeModel(TOY, 3)
    trained = {k: v + 1 for k, v in model.state_dict().items()}
    rebuilt = initial_model(checkpoint_of(weights=trained))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in rebuilt.state_dict().items())
    assert initial_model(checkpoint_of(weights=trained, seed=4)) is None
    assert initial_model(checkpoint_of(weights=trained, init_digest="0" * 64)) is None
    double = {k: v.double() for k, v in trained.items()}
    assert initial_model(checkpoint_of(weights=double)).embed.dtype == torch.float64


def test_a_model_of_a_checkpoint_checks_its_weights():
    weights = dict(checkpoint_of().weights)
    del weights["norm.weight"]
    with pytest.raises(BadInputError, match=r"missing weights: norm\.weight"):
        checkpoint_of(weights=weights).to_model()


def test_checkpoints_are_listed_by_step_and_nothing_else_is(tmp_path):
    steps = (0, 5, 100, 20, 1234567)
    for step in steps:
        step_path(tmp_path, step).touch()
    for other in (
        "step-last.pt",
        ".step-000007.pt.x1",
        "step-000009.tmp",
        "best.pt",
        "step-000005 (1).pt",
        "step-000005.bak.pt",
        "step-000005-copy.pt",
        "step-00005.pt",
        "step-00000\u0665.pt",
    ):
        (tmp_path / other).touch()
    assert run_checkpoints(tmp_path) == [step_path(tmp_path, s) for s in sorted(steps)]
    assert step_path(tmp_path, 200).name == "step-000200.pt"
    assert run_checkpoints(tmp_path / "nowhere") == []


def test_a_configuration_of_defaults_is_what_an_empty_one_means(tmp_path):
    """Only keys that differ need be there: what an older file lacks takes the default."""
    config = TOY.to_dict()
    del config["heads"], config["truncate_ticks"]
    got = read(saved(tmp_path, config=config)).config
    assert got == dataclasses.replace(TOY, heads=ModelConfig().heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_refused_with_what_to_do(tmp_path, dtype):
    model = HopeModel(TOY, seed=0)
    weights = {k: v.to(dtype) for k, v in model.state_dict().items()}
    path = tmp_path / "half.pt"
    save(path, Checkpoint(TOY, 0, 1, weights, "", "gpt2"))
    with pytest.raises(BadInputError, match=r"half\.pt.*float32"):
        read(path)
