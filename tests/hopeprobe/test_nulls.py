"""Nulls and their cache: found again, never mixed up, and never trusted when damaged."""

import dataclasses
import importlib.util
import itertools
import json
import math
import shutil
import sys
import time

import numpy as np
import pytest
import torch

from hopeprobe import nulls
from hopeprobe.conditions import FROZEN, LIVE, Condition
from hopeprobe.errors import MeasurementError
from hopeprobe.nulls import NullCache, fresh_init_values, fresh_seeds, own_init_estimates, weights_digest
from hopeprobe.probes import get_probe
from hopeprobe.probes.cms_similarity import CMSSimilarity
from hopeprobe.probes.integrity import Integrity
from hopeprobe.stats import paired_difference
from hopeprobe.subject import MissingCapability
from hopeprobe.tokens import EvalWindows

PROBES = [get_probe("cms-similarity"), get_probe("integrity")]
KEY = {"probe": "x", "seed": 3}


@pytest.fixture
def windows(toy_data):
    return EvalWindows(toy_data, "all", context=32, tokens=1600, batch=50)


@pytest.fixture
def runs(monkeypatch):
    """Counts the models that were really measured."""
    made = []

    def counted(subject, windows, probes, *rest):
        made.append([probe.name for probe in probes])
        return real(subject, windows, probes, *rest)

    real = nulls.measure
    monkeypatch.setattr(nulls, "measure", counted)
    return made


def assert_same(a, b):
    assert a.values.keys() == b.values.keys()
    for probe, rows in a.values.items():
        assert rows.keys() == b.values[probe].keys()
        for place, value in rows.items():
            other = b.values[probe][place]
            for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
                np.testing.assert_array_equal(getattr(value, field.name), getattr(other, field.name))
            assert dataclasses.is_dataclass(value) or value == other


def test_own_init_is_found_again_with_all_that_a_paired_difference_needs(subject, windows, tmp_path, runs):
    cache = NullCache(tmp_path)
    first = own_init_estimates(subject, windows, PROBES, cache)
    again = own_init_estimates(subject, windows, PROBES, cache)
    assert runs == [["cms-similarity", "integrity"]]
    assert_same(first, again)
    for row, estimate in again.values["cms-similarity"].items():
        difference = paired_difference(estimate, first.values["cms-similarity"][row])
        assert (difference.value, difference.se) == (0, 0)
    without = own_init_estimates(subject, windows, PROBES, NullCache(None))
    assert_same(first, without)


def test_fresh_init_is_found_again(subject, windows, tmp_path, runs):
    cache = NullCache(tmp_path)
    first = fresh_init_values(subject, 5, windows, PROBES, cache)
    again = fresh_init_values(subject, 5, windows, PROBES, cache)
    assert len(runs) == 1
    assert_same(first, again)
    other = fresh_init_values(subject, 6, windows, PROBES, cache)
    assert len(runs) == 2
    assert other.values["integrity"] != first.values["integrity"]


def test_only_what_is_missing_is_measured(subject, windows, tmp_path, runs):
    cache = NullCache(tmp_path)
    fresh_init_values(subject, 5, windows, PROBES[:1], cache)
    fresh_init_values(subject, 5, windows, PROBES, cache)
    assert runs == [["cms-similarity"], ["integrity"]]


def test_whatever_the_numbers_depend_on_is_in_the_key(
    subject, subject_of, configs, windows, toy_data, tmp_path, runs
):
    class Newer(CMSSimilarity):
        version = 2

    class Frozen(CMSSimilarity):
        def conditions(self, subject):
            return (LIVE, FROZEN)

    cache = NullCache(tmp_path)
    probes = PROBES[:1]

    def measure(subject=subject, windows=windows, probes=probes):
        own_init_estimates(subject, windows, probes, cache)
        return len(runs)

    assert measure() == 1
    assert measure(subject_of(seed=0)) == 1, "the same weights, made again"
    assert measure(subject_of(seed=1)) == 2
    assert measure(subject_of(configs["still"])) == 3
    assert measure(windows=windows.take(1599)) == 4
    assert measure(windows=EvalWindows(toy_data, "all", context=32, tokens=1600, carry="document")) == 5
    assert measure(windows=EvalWindows(toy_data, "all", context=32, tokens=1600, batch=3)) == 5
    assert measure(probes=[Newer()]) == 6
    assert measure(probes=[Frozen()]) == 7
    assert measure(probes=[Frozen()]) == 7
    with torch.no_grad():
        subject.module.norm.bias[0] = 1e-6
    assert measure() == 8


class Losses(Integrity):
    """The loss under the conditions that it is given."""

    asked = (LIVE,)

    def conditions(self, subject):
        return self.asked


def test_a_null_holds_all_conditions_of_its_probe_and_is_that_of_no_others(
    subject, windows, tmp_path, runs, monkeypatch
):
    cache, probe = NullCache(tmp_path), Losses()

    def measure():
        found = own_init_estimates(subject, windows, [probe], cache)
        return len(runs), [condition for condition, _ in found.values["integrity"]]

    assert measure() == (1, ["live"])
    monkeypatch.setattr(Losses, "asked", (LIVE, FROZEN))
    assert measure() == (2, ["live", "frozen"])
    assert measure() == (2, ["live", "frozen"])
    other = [Condition("swapped", batch=n) for n in (4, 8)]
    monkeypatch.setattr(Losses, "asked", (other[0],))
    assert measure() == (3, ["swapped"])
    monkeypatch.setattr(Losses, "asked", (other[1],))
    assert measure() == (4, ["swapped"])
    monkeypatch.setattr(Losses, "asked", (Condition("shuffled", batch=8),))
    assert measure() == (5, ["shuffled"])
    probe.threshold = 0.5
    assert measure() == (6, ["shuffled"])
    assert measure() == (6, ["shuffled"])


def test_what_failed_in_part_is_told_and_not_kept(subject, windows, tmp_path, runs, monkeypatch):
    def diverges(subject, prepared, batch):
        raise MeasurementError("it diverged")

    monkeypatch.setattr(Losses, "asked", (LIVE, Condition("bad", run=diverges)))
    for number in (1, 2):
        found = own_init_estimates(subject, windows, [Losses()], NullCache(tmp_path))
        assert [condition for condition, _ in found.values["integrity"]] == ["live"]
        assert found.why("integrity", "bad") == "it diverged"
        assert found.why("cms-similarity", "bad") is None
        assert len(runs) == number
    assert not (tmp_path / "nulls").exists()


def test_a_damaged_file_is_measured_again_and_replaced(subject, windows, tmp_path, runs):
    cache = NullCache(tmp_path)
    first = fresh_init_values(subject, 5, windows, PROBES, cache)
    good = {file: file.read_bytes() for file in (tmp_path / "nulls").iterdir()}
    assert len(good) == 2
    for number, damage in enumerate((lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"[]")):
        for file, content in good.items():
            file.write_bytes(damage(content))
        assert_same(fresh_init_values(subject, 5, windows, PROBES, cache), first)
        assert len(runs) == 2 + number
        assert {file: file.read_bytes() for file in good} == good


def test_no_flipped_bit_changes_what_is_read(tmp_path):
    cache = NullCache(tmp_path)
    payload = [[["output_cosine", 0, "fast|slow", ""], 0.7731], [["cka", 1, "a|b", ""], math.inf]]
    cache.save(KEY, payload)
    file = cache.path(KEY)
    good = file.read_bytes()
    for i, bit in itertools.product(range(len(good)), range(8)):
        file.write_bytes(good[:i] + bytes([good[i] ^ 1 << bit]) + good[i + 1 :])
        assert cache.load(KEY) in (None, payload)


def test_a_file_under_another_key_is_not_taken(tmp_path):
    cache = NullCache(tmp_path)
    cache.save(KEY, [1.5, math.inf])
    assert cache.load(KEY) == [1.5, math.inf]
    other = {**KEY, "seed": 4}
    cache.path(KEY).rename(cache.path(other))
    assert cache.load(other) is None
    assert cache.load(KEY) is None


def test_a_cache_that_cannot_be_written_costs_a_warning_and_nothing_else(subject, windows, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    cache = NullCache(blocked)
    with pytest.warns(RuntimeWarning, match="nulls cannot be cached"):
        found = fresh_init_values(subject, 5, windows, PROBES, cache)
    assert_same(found, fresh_init_values(subject, 5, windows, PROBES, NullCache(None)))
    fresh_init_values(subject, 5, windows, PROBES, cache)  # warned once


def test_a_full_disk_leaves_no_file_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nulls.os, "replace", full)
    cache = NullCache(tmp_path)
    with pytest.warns(RuntimeWarning, match="No space left"):
        cache.save(KEY, [1.0])
    assert list((tmp_path / "nulls").iterdir()) == []


def test_files_are_plain_json(tmp_path):
    cache = NullCache(tmp_path)
    cache.save(KEY, {"a": 0.1})
    assert json.loads(cache.path(KEY).read_text())["payload"] == {"a": 0.1}


def test_fresh_seeds_never_hold_the_runs_own():
    seeds = fresh_seeds(10, None)
    assert len(set(seeds)) == 10
    for own in (*seeds, 0, 1):
        assert own not in fresh_seeds(10, own)
        assert len(set(fresh_seeds(10, own))) == 10
    assert fresh_seeds(3, 0) == seeds[:3]


def test_the_weights_digest_sees_every_weight(subject, subject_of):
    assert weights_digest(subject) == weights_digest(subject_of(seed=0)) != weights_digest(subject_of(seed=1))
    before = weights_digest(subject)
    with torch.no_grad():
        subject.module.blocks[1].norm.bias[3] = -0.0
    assert weights_digest(subject) != before


def test_a_model_without_identity_is_not_cached(subject, windows, tmp_path, runs, monkeypatch):
    def nothing():
        raise MissingCapability("no configuration")

    monkeypatch.setattr(subject, "identity", nothing)
    cache = NullCache(tmp_path)
    for _ in range(2):
        own_init_estimates(subject, windows, PROBES[1:], cache)
    assert len(runs) == 2
    assert not (tmp_path / "nulls").exists()


ADAPTER = """
from hopeprobe.model.subject import HopeSubject
from hopeprobe.probes.integrity import Integrity

class Adapter(HopeSubject):
    pass

class Mine(Integrity):
    name = "mine"
"""


@pytest.fixture
def adapter(tmp_path):
    """Imports an adapter from a file with the given text, as a new process would."""

    def load(text=ADAPTER):
        file = tmp_path / "package" / "adapter.py"
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text)
        spec = importlib.util.spec_from_file_location("adapter_of_a_test", file)
        sys.modules["adapter_of_a_test"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        nulls.code_digest.cache_clear()
        nulls._source_of.cache_clear()
        return module

    yield load
    sys.modules.pop("adapter_of_a_test", None)
    nulls.code_digest.cache_clear()
    nulls._source_of.cache_clear()


def test_nulls_of_other_code_are_not_taken(subject, windows, tmp_path, runs, adapter, monkeypatch):
    cache = NullCache(tmp_path / "cache")

    def measure(module, probe=PROBES[1]):
        own_init_estimates(module.Adapter(subject.module), windows, [probe], cache)
        return len(runs)

    assert measure(adapter()) == 1
    assert measure(adapter()) == 1, "the same code in another process"
    assert measure(adapter(ADAPTER.replace("pass", "factor = 2"))) == 2, "the subject's file"
    (tmp_path / "package" / "helper.py").write_text("factor = 2")
    assert measure(adapter(ADAPTER.replace("pass", "factor = 2"))) == 3, "a file beside it"
    first = adapter()
    assert measure(first, first.Mine()) == 4
    edited = adapter(ADAPTER + "    smallest = 2\n")
    assert measure(edited, edited.Mine()) == 5, "the probe's class"
    package = tmp_path / "hopeprobe"
    shutil.copytree(nulls._PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(nulls, "_PACKAGE", package)
    before = measure(adapter())
    with (package / "stats" / "jackknife.py").open("a") as file:
        file.write("# another formula\n")
    assert measure(adapter()) == before + 1, "the library"


def test_code_that_is_in_no_file_is_not_cached(subject, windows, tmp_path, runs, adapter):
    cache, module = NullCache(tmp_path / "cache"), adapter()
    del module.__file__  # as in a notebook
    typed = module.Adapter(subject.module)
    for _ in range(2):
        own_init_estimates(typed, windows, PROBES[1:], cache)
    assert len(runs) == 2
    assert not (tmp_path / "cache").exists()
    mine = module.Mine()
    for _ in range(2):  # a probe has its version
        own_init_estimates(subject, windows, [mine], cache)
    assert len(runs) == 3
    assert nulls._source_of(module.Mine) == "version 1"


def test_the_digest_of_the_code_is_made_once_and_quickly(subject):
    nulls.code_digest.cache_clear()
    parts = type(subject), type(subject.module), CMSSimilarity
    nulls.code_digest(parts)
    nulls.code_digest.cache_clear()
    start = time.process_time()
    nulls.code_digest(parts)
    assert time.process_time() - start < 0.05
    assert nulls.code_digest(parts) is nulls.code_digest(parts)


def test_the_probes_own_source_is_in_the_key_where_no_file_shows_it(
    subject, windows, tmp_path, runs, adapter
):
    module = adapter()
    del module.__file__
    cache, probe = NullCache(tmp_path / "cache"), module.Mine()
    for number, source in enumerate(("a = 1", "a = 1", "a = 2")):
        nulls._source_of.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nulls.inspect, "getsource", lambda _, source=source: source)
            own_init_estimates(subject, windows, [probe], cache)
        assert len(runs) == (1, 1, 2)[number]
