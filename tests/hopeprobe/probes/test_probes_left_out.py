"""A window that is not finite: left out of every number alike, named, and never without a word."""

import math

import numpy as np
import pytest

from hopeprobe.analysis import _Run, analyze, chosen_probes
from hopeprobe.errors import MeasurementError
from hopeprobe.model.subject import HopeSubject
from hopeprobe.monitor import Monitor
from hopeprobe.nulls import NullCache
from hopeprobe.probes.left_out import LeftOut, WindowsNotFiniteError, check_live
from hopeprobe.tokens import EvalWindows

TOKEN = 13  # of the window that is spoilt
PROBES = ("cms-similarity", "surprise", "adaptation", "meta-fast", "gate-selectivity")


class Spoilt(HopeSubject):
    """A value of windows that begin in a certain way is edited before anybody else sees it, as if it came out so."""

    marks, point, value = (), "blocks.1.selfmod.hook_k", math.nan

    def run(self, tokens, lengths=None, state=None):
        rows = [r for r, row in enumerate(tokens[:, :6].tolist()) if tuple(row) in self.marks]
        point, read = self.module.hook_dict[self.point], 0

        def edit(tensor, hook):
            nonlocal read
            start, read = read, read + (tensor.shape[1] if "pos" in hook.spec.dims else 0)
            tensor = tensor.clone()
            if "pos" not in hook.spec.dims:
                tensor[rows] = self.value
            elif start <= TOKEN < read:
                tensor[rows, TOKEN - start] = self.value
            return tensor

        handle = point.add_hook(edit)
        point._fwd = (point._fwd[-1], *point._fwd[:-1])
        try:
            return super().run(tokens, lengths, state)
        finally:
            handle.remove()


@pytest.fixture
def windows(settings):
    return EvalWindows(
        settings["data"], "all", context=32, tokens=settings["tokens"], batch=settings["batch"]
    )


def spoil(subject, windows, chosen, **how):
    """The subject, spoilt in the windows that are chosen by their ordinal; and their documents and starts."""
    found = Spoilt(subject.module)
    rows = next(iter(windows.with_batch(windows.n_windows)))
    found.marks = {tuple(rows.tokens[i, :6].tolist()) for i in chosen}
    for name, value in how.items():
        setattr(found, name, value)
    found.own_init = lambda: subject
    return found, [(int(rows.document[i]), int(rows.start[i])) for i in chosen]


def numbers(rows):
    return {row.key: (row.value, row.ci_low, row.ci_high, row.n_tokens, row.verdict) for row in rows}


def test_everything_is_as_if_the_window_were_not_there(subject, windows, settings, toy_cache):
    spoilt, places = spoil(subject, windows, [7])
    results = analyze(spoilt, PROBES, **settings | {"fresh": 2})
    rest = windows.without(set(places))
    assert rest.n_windows == windows.n_windows - 1
    plain = _Run(subject, spoilt.name, rest, 2, 4096, NullCache.default(toy_cache), None)
    plain.measure(chosen_probes(PROBES))
    assert not plain.missing
    mine, clean = numbers(results.rows), numbers(plain.rows)
    assert mine.keys() == clean.keys()
    assert len(mine) > 100
    for key in mine:
        np.testing.assert_equal(mine[key], clean[key], err_msg=str(key))
    assert repr(results.null_rows) == repr(tuple(plain.null_rows))
    said = (
        f"{spoilt.name}: 1 of {windows.n_windows} windows left out, not finite: document {places[0][0]}, window from "
        f"token 0: first at token {TOKEN}, layer 1, memory k (blocks.1.selfmod.hook_k) (live)"
    )
    assert said in results.missing
    noted = [row for row in results.rows if f"1 of {windows.n_windows} windows left out" in row.note]
    assert noted == [row for row in results.rows if row.n_tokens]
    assert len(noted) > 100
    assert results.checkpoint["windows"] == rest.fingerprint != results.data["windows"]


@pytest.mark.parametrize(
    ("point", "value", "where"),
    [
        ("hook_embed", math.nan, "outside the layers (hook_embed)"),
        ("blocks.0.cms.slow.hook_delta", math.inf, "layer 0, cms level slow (blocks.0.cms.slow.hook_delta)"),
        ("blocks.0.selfmod.v.hook_fast_w1", math.nan, "layer 0, memory v (blocks.0.selfmod.v.hook_fast_w1)"),
        ("blocks.0.selfmod.memory.hook_fast_w1", 3e38, "layer 0, memory memory (blocks.0.selfmod."),
    ],
)
def test_it_is_named_whatever_is_not_finite(subject, windows, settings, point, value, where):
    spoilt, places = spoil(subject, windows, [3, 30], point=point, value=value)
    results = analyze(spoilt, ["surprise"], **settings | {"fresh": 0})
    (message,) = results.missing
    assert message.startswith(f"{spoilt.name}: 2 of {windows.n_windows} windows left out, not finite: ")
    for document, start in places:
        # Every write is spoilt: it shows at the last token of the first tick, or as the next tick is read.
        token = 8 if value == 3e38 else 7 if "hook_fast" in point else TOKEN
        assert f"document {document}, window from token {start}: first at token {token}, {where}" in message
    assert all(row.n_tokens < windows.n_tokens for row in results.rows if row.n_tokens)


def test_what_only_the_fast_weights_show(subject, windows, settings):
    """Spoilt by the last write of the window: no token that counts is read after it."""
    rows = next(iter(windows.with_batch(windows.n_windows)))
    one = int(np.flatnonzero(rows.lengths == 32)[0])
    spoilt, places = spoil(subject, windows, [one], point="blocks.0.cms.slow.hook_fast_in")

    results = analyze(spoilt, ["meta-fast"], **settings | {"fresh": 0})
    assert any(
        f"document {places[0][0]}, window from token {places[0][1]}: first at token 31, layer 0, cms level slow"
        in one
        for one in results.missing
    )
    assert not [row for row in results.rows if row.verdict == "diverged"]


def test_a_model_that_diverged_is_not_measured_on_what_is_left(subject, windows, settings):
    spoilt, _ = spoil(subject, windows, range(windows.n_windows // 4 + 2))
    with pytest.raises(MeasurementError, match=r"the loss is not finite at .* tokens: the model diverged"):
        analyze(spoilt, ["surprise"], **settings | {"fresh": 0})


@pytest.mark.slow
def test_a_probe_without_a_pass_finds_them_too(subject, windows, settings):
    spoilt, places = spoil(subject, windows, [7])

    def loss(tokens, lengths=None):
        return HopeSubject.loss(subject, tokens, lengths) + spoilt.run(tokens, lengths).losses.sum() * 0

    spoilt.loss = loss
    results = analyze(spoilt, ["learning-signal"], **settings | {"fresh": 0, "tokens": 320})
    assert f"document {places[0][0]}, window from token 0: first at token {TOKEN}" in results.missing[0]
    assert all(np.isfinite(row.value) for row in results.rows)


def test_training_that_is_watched_says_it_in_its_line(subject, windows, settings, tmp_path):
    spoilt, places = spoil(subject, windows, [7])
    monitor = Monitor("surprise", settings["data"], settings["tokens"], 1, "all", cache_dir=tmp_path)
    found = monitor.measure(spoilt, 1)
    assert f"document {places[0][0]}, window from token 0: first at token {TOKEN}" in found["missing"][0]
    assert all(one["value"] is not None for one in found["probes"].values())


def test_windows_without_some(windows):
    rows = next(iter(windows.with_batch(windows.n_windows)))
    gone = {(int(rows.document[i]), int(rows.start[i])) for i in (0, 5, windows.n_windows - 1)}
    rest = windows.without(gone)
    left = next(iter(rest.with_batch(1000)))
    keep = [i for i in range(windows.n_windows) if i not in (0, 5, windows.n_windows - 1)]
    assert np.array_equal(left.group, rows.group[keep])
    assert np.array_equal(left.index, np.arange(len(keep)))
    assert rest.n_tokens == int(rows.lengths[keep].sum()) == int(left.lengths.sum())
    assert rest.fingerprint != windows.fingerprint == windows.without(set()).fingerprint
    part = rest.take(100)
    assert part.n_tokens == 100
    assert np.array_equal(next(iter(part.with_batch(1000))).document, left.document[: part.n_windows])
    assert (
        windows.take(500).fingerprint == EvalWindows(windows.data, "all", context=32, tokens=500).fingerprint
    )


def test_nothing_is_left_out_without_cause(subject, windows):
    check_live(subject, windows)  # which raises for what is not finite
    spoilt, places = spoil(subject, windows, [7])
    with pytest.raises(WindowsNotFiniteError) as error:
        check_live(spoilt, windows)
    assert error.value.found == (
        LeftOut(*places[0], TOKEN, "layer 1, memory k (blocks.1.selfmod.hook_k)", "live"),
    )
