"""What an analysis is given: paths that cannot be opened, names that tell apart, text that fits."""

import dataclasses
import errno
import os

import numpy as np
import pytest

from hopeprobe import opening
from hopeprobe.analysis import analyze
from hopeprobe.errors import BadInputError
from hopeprobe.tokens import TokenData


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.EACCES])
def test_a_path_that_the_system_refuses_is_bad_input(settings, monkeypatch, number):
    def refused(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(opening, "load", refused)
    with pytest.raises(BadInputError, match=f"aaa … aaa.*{os.strerror(number)}") as caught:
        analyze("a" * 5000, "integrity", **settings)
    assert len(str(caught.value)) < 250


def test_a_path_too_long_for_any_file_is_bad_input(settings):
    with pytest.raises(BadInputError):
        analyze("a" * 5000, "integrity", **settings)


def test_equal_file_names_get_their_folders(toy_run, settings, tmp_path):
    other = tmp_path / "b" / "step-000000.pt"
    other.parent.mkdir()
    other.write_bytes((toy_run / "step-000000.pt").read_bytes())
    results = analyze([toy_run / "step-000000.pt", other], "integrity", **settings | {"fresh": 0})
    assert set(results.table.checkpoint) == {f"{toy_run.name}/step-000000.pt", "b/step-000000.pt"}
    with pytest.raises(
        BadInputError, match=r"two checkpoints have one name, .*step-000000\.pt, .*: give each once"
    ):
        analyze([other, other], "integrity", **settings)


def test_text_of_another_tokenizer_is_refused(subject, settings):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 90, 40) for _ in range(50)]
    larger = TokenData.from_documents(documents, name="larger", vocab_size=200, end_of_text=0)
    with pytest.raises(BadInputError, match="vocabulary of 97"):
        analyze(subject, "integrity", **settings | {"data": larger})
    named = dataclasses.replace(settings["data"], tokenizer="other")
    with pytest.raises(BadInputError, match=r"'other': tokenise the text for the model, load_tokens\("):
        analyze(subject, "integrity", **settings | {"data": named})
