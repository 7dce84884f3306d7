"""Other people's files where nothing reads them: a file that an adapter of ours would read says what to install."""

from types import SimpleNamespace

import pytest
import torch

import hopeprobe
from hopeprobe import subject as subjects
from hopeprobe.cli import run as command
from hopeprobe.errors import BadInputError
from hopeprobe.foreign import is_nested_learning, what_reads

SAVED = {
    "model": {"embed.weight": torch.zeros(3, 2)},
    "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
    "step": 200,
    "config": {
        "model": {"block_variant": "hope_hybrid", "titan_level": {"name": "titan", "update_period": 8}},
        "train": {"seed": 1337},
    },
}
"""What the package nested-learning 0.2.0 saves, but for its size."""


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.fixture
def entries(monkeypatch):
    """Loaders by name, in place of those that are installed."""

    class Entry:
        def __init__(self, name, loader):
            self.name, self.load = name, loader

    def install(**loaders):
        monkeypatch.setattr(
            subjects, "entry_points", lambda group: [Entry(name, loader) for name, loader in loaders.items()]
        )

    return install


def ours():
    from hopeprobe.model.subject import load_subject

    return load_subject


def test_it_says_what_to_install(tmp_path, entries, capsys):
    entries(hope=ours)
    path = saved(tmp_path / "step_000200.pt", SAVED)
    with pytest.raises(BadInputError, match=r"step_000200\.pt .*known kinds: hope") as caught:
        hopeprobe.load(path)
    said = str(caught.value)
    for part in ("a checkpoint of the package nested-learning", "hopeprobe-nested-learning", "make peers"):
        assert part in said
    assert "damaged" not in said
    assert command(["analyze", str(path), "--probe", "integrity"]) == 2
    told = capsys.readouterr()
    assert "make peers" in " ".join((told.out + told.err).split())
    assert "Traceback" not in told.err


@pytest.mark.parametrize(
    "content",
    [
        SAVED | {"config": {"model": {"n_layer": 12}}},  # another trainer's, with the same four fields
        SAVED | {"config": {"model": "gpt"}},
        SAVED | {"config": None},
        {key: SAVED[key] for key in ("model", "optimizer", "config")},
        SAVED["model"],
        [1, 2],
    ],
)
def test_nobody_elses_file_is_taken_for_one(tmp_path, content):
    assert not is_nested_learning(content)
    path = saved(tmp_path / "step_000200.pt", content)
    assert what_reads(path) == ""
    with pytest.raises(BadInputError, match=r"\(known kinds: hope[^)]*\): other models join by a map"):
        hopeprobe.load(path)


def test_files_that_are_no_torch_files_have_no_hint(tmp_path):
    text = tmp_path / "a.pt"
    text.write_text("not a checkpoint")
    assert what_reads(text) == ""
    assert what_reads(tmp_path / "nowhere.pt") == ""
    whole = saved(tmp_path / "b.pt", SAVED).read_bytes()
    text.write_bytes(whole[: len(whole) // 2])
    assert what_reads(text) == ""
    with pytest.raises(BadInputError, match="is damaged"):
        hopeprobe.load(text)


def test_somebodys_adapter_that_cannot_be_imported_stops_nobody(tmp_path, entries):
    def broken():
        raise ImportError("No module named 'mamba'")

    subject = SimpleNamespace(device="cpu")
    entries(mamba=broken, mine=lambda: lambda path: subject if path.name == "mine.pt" else None)
    mine, other = (saved(tmp_path / name, {}) for name in ("mine.pt", "other.pt"))
    assert hopeprobe.load(mine) is subject
    with pytest.raises(
        BadInputError, match=r"known kinds: mine; not usable: mamba \(No module named 'mamba'\)"
    ):
        hopeprobe.load(other)
