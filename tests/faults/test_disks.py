"""Full and read-only disks, folders that may not be written, caches that go: said, nothing half written, resumable."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hopeprobe.cli import run as hopeprobe
from hopeprobe.errors import BadInputError
from hopeprobe.files import check_places, write_atomically
from hopeprobe.locks import file_lock, run_lock
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.nulls import NullCache
from hopeprobe.tokens import TokenData, load_tokens

MODEL = ModelConfig(vocab_size=53, dim=8, layers=1, context=16, heads=2)
CONFIG = TrainConfig(steps=6, batch=2, warmup=2, checkpoint_every=2, eval_every=3, eval_tokens=64)


def documents():
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 52, 30) for _ in range(40)]
    return TokenData.from_documents(made, name="random", vocab_size=53, end_of_text=52)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(folder, **options):
    return train(MODEL, CONFIG, documents(), folder, **options)


def contents(folder):
    """All files but for what clocks said."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    found.pop("timings.jsonl", None)
    return found, [json.loads(line) for line in found.pop("metrics.jsonl").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trained(folder)
    return contents(folder)


def text_in(folder):
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(f"w{rng.randrange(40)}" for _ in range(60))}) for _ in range(60)]
    path = folder / "text.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_disk_that_fills_while_it_trains(disk, whole, step):
    out = disk.folder / "run"

    def fill(at, metrics):
        if at == step:
            disk.fill()

    with pytest.raises(BadInputError, match=r"(step-|metrics).*No space left on device.*[Ff]ree some space"):
        trained(out, progress=fill)
    files, lines = contents(out)
    assert set(files) >= {"run.json", *(f"step-00000{s}.pt" for s in (0, 1, 2, 4) if s < step)}
    assert all(content == whole[0][name] for name, content in files.items()), "all that is there is whole"
    assert lines == whole[1][: len(lines)]
    disk.free()
    trained(out, resume=True)
    assert contents(out) == whole


@pytest.mark.slow
def test_the_command_says_so_ends_with_2_and_goes_on_with_more_room(disk, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOPEPROBE_CACHE", str(tmp_path / "cache"))
    disk.remount("size=16m")  # two checkpoints
    given = ["train", "--preset", "nano", "--batch", "1", "--steps", "3", "--data", str(text_in(tmp_path))]
    out = disk.folder / "run"
    assert hopeprobe([*given, "--out", str(out)]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hopeprobe: ")]
    assert said.startswith(f"hopeprobe: cannot write {out}/step-000002.pt (")
    assert "No space left on device; nothing half written was left behind. Free some space, or choose" in said
    left = sorted(path.name for path in out.iterdir())
    assert left == ["metrics.jsonl", "run.json", "step-000000.pt", "step-000001.pt", "timings.jsonl"]
    disk.remount("size=200m")
    assert hopeprobe([*given, "--out", str(out), "--resume"]) == 0
    assert hopeprobe([*given, "--out", str(tmp_path / "whole")]) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_cache_of_tokens_on_a_full_disk(disk, tmp_path):
    text = text_in(tmp_path)
    with pytest.raises(
        BadInputError, match=r"token cache .*No space left on device; free some space or choose"
    ):
        load_tokens(text, cache_dir=disk.folder / "cache", progress=lambda *_: disk.fill())
    assert list((disk.folder / "cache").iterdir()) == []
    disk.free()
    load_tokens(text, cache_dir=disk.folder / "cache")


def test_nulls_on_a_full_disk_are_computed_and_not_kept(disk):
    disk.fill()
    cache = NullCache(disk.folder)
    with pytest.warns(RuntimeWarning, match="nulls cannot be cached in .*No space left on device"):
        cache.save({"key": 1}, [1.0] * 10_000)
    assert [path.name for path in disk.folder.rglob("*") if path.is_file()] == ["filler"]


def test_a_file_is_as_it_was_where_the_new_one_does_not_fit(disk):
    path = disk.folder / "mech.json"
    write_atomically(path, b"old")
    disk.fill()
    with (
        file_lock(path),
        pytest.raises(BadInputError, match=r"mech\.json \(0.1 MiB\): No space left on device"),
    ):
        write_atomically(path, bytes(100_000))
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(disk.folder)) == ["filler", "mech.json"]


def test_a_read_only_disk(disk, whole, capsys):
    out = disk.folder / "run"
    trained(out)
    disk.remount("ro")
    given = ["train", "--preset", "nano", "--steps", "3"]
    for folder in (out, disk.folder / "another"):
        assert hopeprobe([*given, "--out", str(folder)]) == 2
        said = capsys.readouterr().err
        assert f"cannot write {folder}: nothing may be written in " in said
        assert said.endswith("choose another place\n")
    with pytest.raises(BadInputError, match=r"cannot write in .*Read-only file system; choose another --out"):
        trained(out, resume=True)
    with pytest.raises(BadInputError, match=r"cannot write .*: nothing may be written in .*choose another"):
        write_atomically(out / "step-000000.pt", b"")
    assert contents(out) == whole


def test_a_folder_that_may_not_be_written(refused, monkeypatch):
    """Nobody's own folder, as nobody."""
    for path in (refused / "out", refused / "new", refused / "deep" / "new"):
        for write in (lambda path: check_places([path]), lambda path: write_atomically(path, b"new")):
            with pytest.raises(BadInputError, match=r"nothing may be written in .*; choose another place"):
                write(path)
        # As where it changes between the look and the writing.
        monkeypatch.setattr("hopeprobe.files._writable", lambda _: True)
        with pytest.raises(BadInputError, match=r"cannot write .*Permission denied; nothing half written"):
            write_atomically(path, b"new")
        monkeypatch.undo()
    with (
        pytest.raises(BadInputError, match=r"cannot write in .*Permission denied; choose another"),
        run_lock(refused),
    ):
        pass
    assert (refused / "out").read_bytes() == b"old"
    assert os.listdir(refused) == ["out"]


def test_a_cache_that_goes_while_it_trains(tmp_path):
    text, cache = text_in(tmp_path), tmp_path / "cache"
    model = ModelConfig(dim=8, layers=1, context=16, heads=2)

    def run(out, progress):
        train(model, CONFIG, load_tokens(text, cache_dir=cache), out, progress=progress)

    run(tmp_path / "kept", None)
    run(tmp_path / "gone", lambda step, metrics: shutil.rmtree(cache, ignore_errors=True))
    assert not cache.exists()
    assert contents(tmp_path / "gone") == contents(tmp_path / "kept")


def test_every_file_of_the_package_is_written_by_one_piece_of_code():
    """Nothing else opens a file to write: what does is named here, with why."""
    known = {
        "hopeprobe/replacing.py": "the one",
        "hopeprobe/monitor.py": "adds lines",
        "model/metrics.py": "adds lines",
        "hopeprobe/locks.py": "the file of a lock",
        "cli/several.py": "the null device, for ranks that are not heard",
    }
    root = Path(__file__).parents[2]
    found = {
        str(path.relative_to(root))
        for folder in ("hopeprobe", "model", "cli")
        for path in (root / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if any(sign in line for sign in _SIGNS)
    }
    assert found == set(known)


_SIGNS = ('"xb"', '"wb"', '"w"', '"ab"', '"a"', "write_text(", "write_bytes(", "os.replace(", "O_CREAT", "mkstemp(",
         "NamedTemporaryFile", "TemporaryDirectory", "savez(", "np.save(")  # fmt: skip
